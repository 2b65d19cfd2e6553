//! Readings that another layer makes at each scrape: it counts, and this only writes down what it says.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadingKind {
    /// They only rise.
    Count,
    /// They rise and fall.
    Level,
}

/// A family of numbers, one for each value of a label. The values must be few: names, never keys or errors.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The family's name, without `_total`.
    pub name: &'static str,
    /// What is counted.
    pub help: &'static str,
    /// What the numbers are.
    pub kind: ReadingKind,
    /// The label's name.
    pub label: &'static str,
    /// Its values and their numbers.
    pub lines: Vec<(String, u64)>,
}

#[derive(Debug)]
struct Readings(Vec<Reading>);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Reading { name, help, kind, label, lines } in &self.0 {
            let metric = match kind {
                ReadingKind::Count => MetricType::Counter,
                ReadingKind::Level => MetricType::Gauge,
            };
            let mut family = encoder.encode_descriptor(name, help, None, metric)?;
            for (value, number) in lines {
                let labels = [(*label, value.as_str())];
                let labels = &labels.as_slice();
                match kind {
                    ReadingKind::Count => ConstCounter::new(*number).encode(family.encode_family(labels)?)?,
                    ReadingKind::Level => ConstGauge::new(number.cast_signed()).encode(family.encode_family(labels)?)?,
                }
            }
        }
        Ok(())
    }
}

/// The readings alone, as a whole scrape. Empty only where formatting fails, which it does not.
pub fn render(readings: Vec<Reading>) -> String {
    let mut out = String::new();
    match append(&mut out, readings).and_then(|()| text::encode_eof(&mut out)) {
        Ok(()) => out,
        Err(fmt::Error) => String::new(),
    }
}

/// Appends the readings to a scrape that has not been ended yet.
pub(super) fn append(out: &mut String, readings: Vec<Reading>) -> fmt::Result {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Readings(readings)));
    text::encode_registry(out, &registry)
}
