//! Durations, sizes and shares, written as Kubernetes users write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a duration, a size or a percentage was refused. The text names the remedy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UnitError {
    /// Not a duration such as `250ms`, `10s`, `5m` or `1h30m`.
    #[error("`{0}` is not a duration: write a number with a unit, such as 250ms, 10s, 5m or 1h30m")]
    Duration(String),
    /// Longer than [`Span::MAX`].
    #[error("`{0}` is too long: the longest duration is 8760h (one year)")]
    DurationTooLong(String),
    /// Not a size such as `32Mi`.
    #[error("`{0}` is not a size: write bytes, or a number with Ki, Mi, Gi, k, M or G, such as 32Mi")]
    Size(String),
    /// Not a share such as `10%`.
    #[error("`{0}` is not a share: write a whole number of per cent from 0% to 100%")]
    Percent(String),
    /// Not a factor from above 0 to [`Beta::MAX`].
    #[error("{0} is no factor for early expiry: write a number above 0 and up to 10, such as 1.0")]
    Beta(f64),
}

/// A length of time in whole milliseconds, from zero to one year.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span {
    millis: u64,
}

impl Span {
    /// One year: nothing in a cache has a use for more.
    pub const MAX: Span = Span { millis: 8760 * 3_600_000 };

    /// A span of `millis` milliseconds, or [`Span::MAX`] where that is shorter.
    pub const fn from_millis(millis: u64) -> Self {
        if millis > Self::MAX.millis { Self::MAX } else { Self { millis } }
    }

    /// A span of `secs` seconds, or [`Span::MAX`] where that is shorter.
    pub const fn from_secs(secs: u64) -> Self {
        Self::from_millis(secs.saturating_mul(1000))
    }

    /// The length in milliseconds.
    pub const fn as_millis(self) -> u64 {
        self.millis
    }

    /// The length as the standard library's type.
    pub const fn as_duration(self) -> Duration {
        Duration::from_millis(self.millis)
    }

    /// Whether the length is zero.
    pub const fn is_zero(&self) -> bool {
        self.millis == 0
    }
}

impl FromStr for Span {
    type Err = UnitError;

    /// Go's syntax for durations, which `kubectl` users know: signed and sub-millisecond lengths are refused.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError::Duration(text.to_owned());
        if text == "0" {
            return Ok(Self::default());
        }
        let mut rest = text;
        let mut millis = 0f64;
        if rest.is_empty() {
            return Err(refuse());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refuse)?;
            let (number, tail) = rest.split_at(digits);
            let number: f64 = number.parse().map_err(|_| refuse())?;
            let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let scale = match unit {
                "ms" => 1.0,
                "s" => 1_000.0,
                "m" => 60_000.0,
                "h" => 3_600_000.0,
                _ => return Err(refuse()),
            };
            millis += number * scale;
            rest = tail;
        }
        if millis.fract() != 0.0 {
            return Err(refuse());
        }
        if millis > Self::MAX.millis as f64 {
            return Err(UnitError::DurationTooLong(text.to_owned()));
        }
        Ok(Self { millis: millis as u64 })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.millis == 0 {
            return f.write_str("0s");
        }
        let (hours, rest) = (self.millis / 3_600_000, self.millis % 3_600_000);
        let (minutes, rest) = (rest / 60_000, rest % 60_000);
        let (seconds, millis) = (rest / 1000, rest % 1000);
        for (amount, unit) in [(hours, "h"), (minutes, "m"), (seconds, "s"), (millis, "ms")] {
            if amount > 0 {
                write!(f, "{amount}{unit}")?;
            }
        }
        Ok(())
    }
}

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize {
    bytes: u64,
}

impl ByteSize {
    /// A size of `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self { bytes }
    }

    /// The size in bytes.
    pub const fn as_bytes(self) -> u64 {
        self.bytes
    }
}

const SIZE_UNITS: [(&str, u64); 8] = [
    ("Ti", 1 << 40),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
    ("T", 1_000_000_000_000),
    ("G", 1_000_000_000),
    ("M", 1_000_000),
    ("k", 1_000),
];

impl FromStr for ByteSize {
    type Err = UnitError;

    /// The whole-number part of Kubernetes' quantity syntax.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || UnitError::Size(text.to_owned());
        let (number, unit) =
            SIZE_UNITS.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit))).unwrap_or((text, 1));
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refuse());
        }
        let number: u64 = number.parse().map_err(|_| refuse())?;
        number.checked_mul(unit).map(Self::from_bytes).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZE_UNITS.iter().filter(|(suffix, _)| suffix.ends_with('i'));
        for (suffix, unit) in binary {
            if self.bytes >= *unit && self.bytes.is_multiple_of(*unit) {
                return write!(f, "{}{suffix}", self.bytes / unit);
            }
        }
        write!(f, "{}", self.bytes)
    }
}

/// A share from 0 % to 100 %.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Percent {
    whole: u8,
}

impl Percent {
    /// A share of `whole` per cent, at most 100.
    pub const fn new(whole: u8) -> Self {
        Self { whole: if whole > 100 { 100 } else { whole } }
    }

    /// The share in per cent.
    pub const fn as_whole(self) -> u8 {
        self.whole
    }
}

impl FromStr for Percent {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        text.strip_suffix('%')
            .filter(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .filter(|whole| *whole <= 100)
            .map(Self::new)
            .ok_or_else(|| UnitError::Percent(text.to_owned()))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.whole)
    }
}

/// The factor β of probabilistic early expiry: a read of a value whose load takes δ is a miss with probability exp(−τ/βδ) when τ
/// of its TTL is left. Above 0 and at most [`Beta::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Beta(f64);

impl Beta {
    /// One refresh of 2.7 askers, at any rate of reads; a greater factor refreshes earlier.
    pub const ONE: Beta = Beta(1.0);
    /// Ten: values are then loaded anew some hundred load times before they expire.
    pub const MAX: f64 = 10.0;

    /// The factor.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Beta {
    type Error = UnitError;

    fn try_from(factor: f64) -> Result<Self, UnitError> {
        if factor > 0.0 && factor <= Self::MAX { Ok(Self(factor)) } else { Err(UnitError::Beta(factor)) }
    }
}

impl From<Beta> for f64 {
    fn from(beta: Beta) -> f64 {
        beta.0
    }
}

/// Serialises a type as the text that its `FromStr` reads, and shows that text in `Debug`.
macro_rules! as_text {
    ($($name:ty),+) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )+};
}
as_text!(Span, ByteSize, Percent);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check_span(text: &str, millis: Option<u64>) {
        assert_eq!(text.parse::<Span>().ok().map(Span::as_millis), millis, "{text}");
    }

    #[test]
    fn durations_are_written_as_in_kubernetes() {
        check_span("5m", Some(300_000));
        check_span("1h30m", Some(5_400_000));
        check_span("1.5h", Some(5_400_000));
        check_span("250ms", Some(250));
        check_span("0", Some(0));
        check_span("0s", Some(0));
        for bad in ["", "5", "m", "-5m", "5d", "5 m", "0.1ms", "9000h", "1e3s", "..s"] {
            check_span(bad, None);
        }
    }

    #[test]
    fn sizes_and_shares() {
        let size = |text: &str| text.parse::<ByteSize>().ok().map(ByteSize::as_bytes);
        assert_eq!(size("32Mi"), Some(32 << 20));
        assert_eq!(size("1k"), Some(1000));
        assert_eq!(size("7"), Some(7));
        assert_eq!(size("-1"), None);
        assert_eq!(size("Mi"), None);
        assert_eq!(size("99999999Ti"), None);
        let share = |text: &str| text.parse::<Percent>().ok().map(Percent::as_whole);
        assert_eq!(share("10%"), Some(10));
        assert_eq!(share("101%"), None);
        assert_eq!(share("10"), None);
    }

    #[test]
    fn factors_are_above_zero_and_bounded() {
        let read = |text: &str| serde_json::from_str::<Beta>(text).ok().map(Beta::get);
        assert_eq!(read("1"), Some(1.0));
        assert_eq!(read("0.25"), Some(0.25));
        for bad in ["0", "-1", "10.5", "1e300", "null", "\"1\""] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert!(Beta::try_from(f64::NAN).is_err());
        assert_eq!(serde_json::to_string(&Beta::ONE).expect("serialises"), "1.0");
    }

    proptest! {
        #[test]
        fn every_span_reads_back_what_it_shows(millis in 0..=Span::MAX.as_millis()) {
            let span = Span::from_millis(millis);
            prop_assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }

        #[test]
        fn every_size_reads_back_what_it_shows(bytes in any::<u64>()) {
            let size = ByteSize::from_bytes(bytes);
            prop_assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size));
        }
    }
}
