//! A run: writers that write until they are stopped, and the reading back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Target;
use super::resp::{Connection, Fault, Reply, primary};

/// Values go by themselves when a run is abandoned.
const KEPT_SECONDS: &str = "7200";
/// How soon a writer asks again where the primary is.
const ASK_AGAIN: Duration = Duration::from_millis(20);
const READ_BACK_WITHIN: Duration = Duration::from_secs(60);
const READ_BACK_BATCH: usize = 200;

pub struct Run {
    target: Target,
    name: String,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU32>,
    failed: Arc<AtomicU32>,
    writers: Vec<JoinHandle<Written>>,
}

/// What one writer did.
#[derive(Default)]
struct Written {
    /// The numbers of the values that were acknowledged.
    acknowledged: Vec<u32>,
    /// By what went wrong.
    failed: BTreeMap<Fault, u32>,
    /// The longest time without an acknowledgement.
    longest_gap: Duration,
}

impl Run {
    /// Starts the writers. Values are unique among all runs of all clients.
    pub fn start(target: Target, number: u32) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("e2e:{}:{number}", since.as_millis());
        let (stop, acknowledged, failed) = (Arc::default(), Arc::default(), Arc::default());
        let writers = (0..target.writers)
            .map(|writer| {
                let (target, name) = (target.clone(), format!("{name}:{writer}"));
                let (stop, acknowledged, failed) = (Arc::clone(&stop), Arc::clone(&acknowledged), Arc::clone(&failed));
                thread::spawn(move || write(&target, &name, &stop, &acknowledged, &failed))
            })
            .collect();
        Self { target, name, stop, acknowledged, failed, writers }
    }

    pub fn status(&self) -> String {
        let (acknowledged, failed) = (self.acknowledged.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        format!("{{\"acknowledged\":{acknowledged},\"failed\":{failed}}}")
    }

    /// Stops the writers and looks for every value that was acknowledged.
    pub fn stop(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let written: Vec<Written> = self.writers.into_iter().map(|writer| writer.join().unwrap_or_default()).collect();
        let mut failed: BTreeMap<Fault, u32> = BTreeMap::new();
        for (fault, count) in written.iter().flat_map(|written| &written.failed) {
            *failed.entry(fault.clone()).or_default() += count;
        }
        let keys: Vec<String> = (0u32..)
            .zip(&written)
            .flat_map(|(writer, written)| written.acknowledged.iter().map(move |number| (writer, number)))
            .map(|(writer, number)| format!("{}:{writer}:{number}", self.name))
            .collect();
        let (lost, not_read_back) = match read_back(&self.target, &keys) {
            Ok(lost) => (lost, "null".to_owned()),
            Err(fault) => (Vec::new(), format!("{fault:?}")),
        };
        let longest_gap = written.iter().map(|written| written.longest_gap).max().unwrap_or_default();
        // Texts are words of replies and names of keys, which Rust quotes as JSON does.
        format!(
            "{{\"acknowledged\":{},\"failed\":{},\"faults\":{failed:?},\"lost\":{},\"lostExamples\":{:?},\"longestGapMillis\":{},\"notReadBack\":{not_read_back}}}",
            keys.len(),
            failed.values().sum::<u32>(),
            lost.len(),
            lost.iter().take(10).collect::<Vec<_>>(),
            longest_gap.as_millis(),
        )
    }
}

fn write(target: &Target, name: &str, stop: &AtomicBool, acknowledged: &AtomicU32, failed: &AtomicU32) -> Written {
    let mut written = Written::default();
    let mut connection: Option<Connection> = None;
    let mut last = Instant::now();
    let pause = Duration::from_secs(1) / target.rate;
    for number in 0u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if target.reconnect > 0 && number % target.reconnect == 0 {
            connection = None;
        }
        let began = Instant::now();
        let outcome = match connection.take() {
            Some(open) => Ok(open),
            None => primary(target),
        }
        .and_then(|mut open| {
            let key = format!("{name}:{number}");
            open.call(&["SET", &key, &key, "EX", KEPT_SECONDS]).map(|_| open)
        });
        match outcome {
            Ok(open) => {
                connection = Some(open);
                written.longest_gap = written.longest_gap.max(last.elapsed());
                last = Instant::now();
                written.acknowledged.push(number);
                acknowledged.fetch_add(1, Ordering::Relaxed);
                thread::sleep(pause.saturating_sub(began.elapsed()));
            }
            Err(fault) => {
                *written.failed.entry(fault).or_default() += 1;
                failed.fetch_add(1, Ordering::Relaxed);
                thread::sleep(ASK_AGAIN);
            }
        }
    }
    written.longest_gap = written.longest_gap.max(last.elapsed());
    written
}

/// The keys that are gone, or hold something else than their own name. Those that are there are removed: what fills the cache would
/// be evicted from a later run.
fn read_back(target: &Target, keys: &[String]) -> Result<Vec<String>, Fault> {
    let deadline = Instant::now() + READ_BACK_WITHIN;
    let mut lost = Vec::new();
    let mut connection: Option<Connection> = None;
    for batch in keys.chunks(READ_BACK_BATCH) {
        let values = loop {
            match connection.take().map_or_else(|| primary(target), Ok).and_then(|mut open| Ok((values(&mut open, batch)?, open)))
            {
                Ok((values, open)) => {
                    connection = Some(open);
                    break values;
                }
                Err(fault) if Instant::now() > deadline => return Err(fault),
                Err(_) => thread::sleep(ASK_AGAIN),
            }
        };
        if let Some(mut open) = connection.take() {
            let command: Vec<&str> = std::iter::once("UNLINK").chain(batch.iter().map(String::as_str)).collect();
            // They go by themselves otherwise.
            connection = open.call(&command).ok().map(|_| open);
        }
        lost.extend(
            batch.iter().zip(values).filter(|(key, value)| *value != Reply::Text((*key).clone())).map(|(key, _)| key.clone()),
        );
    }
    Ok(lost)
}

fn values(connection: &mut Connection, keys: &[String]) -> Result<Vec<Reply>, Fault> {
    let command: Vec<&str> = std::iter::once("MGET").chain(keys.iter().map(String::as_str)).collect();
    match connection.call(&command)? {
        Reply::List(values) if values.len() == keys.len() => Ok(values),
        other => Err(format!("unexpected: {other:?}")),
    }
}
