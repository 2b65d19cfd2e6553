//! The records of the queries: start and end of each, as Larder's own query log tells them ([`crate::origin::query_log`]).
//!
//! Whoever asks the database in any phase, a client in this process or a sidecar in its own, does so through [`crate::origin`], which
//! logs every query where it is made. Lines of sidecars come from their log files, those of clients straight from the subscriber
//! that their queries run under; both have the same form, and the same code reads both.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tracing_subscriber::fmt::MakeWriter;

use crate::origin::query_log::{TARGET, fingerprint};

/// The most records that are kept of one load; later queries are counted without.
const MAX_RECORDS: usize = 500_000;
/// The longest line that is taken for one of the log.
const MAX_LINE_BYTES: usize = 64 << 10;
/// How often the files of sidecars are read.
const READ_INTERVAL: Duration = Duration::from_millis(100);
/// How long queries that nobody waits for any more may go on before a load's records are closed.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The filter that switches the log on.
pub fn filter() -> String {
    format!("info,{TARGET}=debug")
}

/// The present time as the log has it: microseconds since 1970.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

/// One query, from the moment it was sent to the database to its end. The wait for a free connection is not part of it.
#[derive(Debug, Clone)]
pub struct Record {
    /// The key: identical queries have the same.
    pub query: Arc<str>,
    /// When it began, in microseconds since 1970.
    pub start_us: u64,
    /// When it ended.
    pub end_us: u64,
    /// How it ended.
    pub outcome: String,
}

impl Record {
    /// How long it took.
    pub const fn took(&self) -> Duration {
        Duration::from_micros(self.end_us.saturating_sub(self.start_us))
    }
}

/// Who asks: each numbers its own queries.
pub type Source = u16;
/// The clients in this process.
const CLIENTS: Source = 0;

/// A line of the log. Other fields are of no interest here.
#[derive(Deserialize)]
struct Event {
    query: u64,
    key: String,
    at_us: u64,
    outcome: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<(Source, u64), (Arc<str>, u64)>,
    done: Vec<Record>,
    /// Since the last [`Recorder::take`].
    begun: u64,
    /// Since the last [`Recorder::take_total`].
    total: u64,
}

/// Puts the lines together.
#[derive(Debug)]
pub struct Recorder {
    names: HashMap<String, Arc<str>>,
    state: Mutex<State>,
}

impl Recorder {
    /// A recorder that knows the names of these keys.
    pub fn new(keys: &[String]) -> Self {
        let names = keys.iter().map(|key| (format!("{:016x}", fingerprint(key.as_bytes())), key.as_str().into()));
        Self { names: names.collect(), state: Mutex::default() }
    }

    /// How many queries began since the last [`Recorder::take`].
    pub fn begun(&self) -> u64 {
        self.lock().begun
    }

    /// The queries that ended since the last call.
    pub fn take(&self) -> Vec<Record> {
        let mut state = self.lock();
        state.begun = 0;
        std::mem::take(&mut state.done)
    }

    /// How many queries began since the last call of this.
    pub fn take_total(&self) -> u64 {
        std::mem::take(&mut self.lock().total)
    }

    /// Waits until every query that began has ended, for as long as that is sensible; `read` brings in what was written meanwhile.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn settle(&self, mut read: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        loop {
            read()?;
            if self.lock().open.is_empty() || Instant::now() >= deadline {
                return Ok(());
            }
            thread::sleep(READ_INTERVAL / 5);
        }
    }

    /// Takes a line of `source`'s log, which may be about something else.
    fn note(&self, source: Source, line: &[u8]) {
        if !contains(line, TARGET.as_bytes()) {
            return;
        }
        let Ok(event) = serde_json::from_slice::<Event>(line) else { return };
        let mut state = self.lock();
        match event.outcome {
            None => {
                let name = self.names.get(&event.key).cloned().unwrap_or_else(|| event.key.into());
                state.open.insert((source, event.query), (name, event.at_us));
                state.begun += 1;
                state.total += 1;
            }
            Some(outcome) => {
                let Some((query, start_us)) = state.open.remove(&(source, event.query)) else { return };
                if state.done.len() < MAX_RECORDS {
                    state.done.push(Record { query, start_us, end_us: event.at_us, outcome });
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    memchr::memmem::find(line, text).is_some()
}

/// Where the subscriber of this process' own queries writes: one line a call.
#[derive(Debug, Clone)]
pub struct ClientLog(Arc<Recorder>);

impl ClientLog {
    /// A subscriber that logs as a sidecar does, into `recorder`.
    pub fn subscriber(recorder: Arc<Recorder>) -> tracing::Dispatch {
        let log = tracing_subscriber::fmt().json().flatten_event(true).with_current_span(false).with_env_filter(filter());
        tracing::Dispatch::new(log.with_writer(Self(recorder)).finish())
    }
}

impl io::Write for ClientLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.note(CLIENTS, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for ClientLog {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A log file of a sidecar, read as it grows.
#[derive(Debug)]
struct Tail {
    source: Source,
    path: PathBuf,
    file: Option<File>,
    read: u64,
    partial: Vec<u8>,
}

impl Tail {
    fn read(&mut self, recorder: &Recorder) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(File::open(&self.path)?),
        };
        if file.metadata()?.len() < self.read {
            return Err(io::Error::other(format!("{} was begun anew: records are lost", self.path.display())));
        }
        let mut chunk = [0; 16 << 10];
        loop {
            let count = file.read(&mut chunk)?;
            let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
            self.read += count as u64;
            self.partial.extend_from_slice(bytes);
            while let Some(end) = memchr::memchr(b'\n', &self.partial) {
                recorder.note(self.source, &self.partial[..end]);
                self.partial.drain(..=end);
            }
            if self.partial.len() > MAX_LINE_BYTES {
                return Err(io::Error::other(format!("{} holds a line without an end", self.path.display())));
            }
        }
    }
}

/// Follows the logs of sidecars for as long as it lives.
#[derive(Debug)]
pub struct Follower {
    recorder: Arc<Recorder>,
    tails: Arc<Mutex<Vec<Tail>>>,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Follows these files, which exist, from their beginning.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub fn start(recorder: Arc<Recorder>, files: Vec<PathBuf>) -> io::Result<Self> {
        let tail = |(source, path)| Tail { source, path, file: None, read: 0, partial: Vec::new() };
        let tails = Arc::new(Mutex::new((CLIENTS + 1..).zip(files).map(tail).collect()));
        let done = Arc::new(AtomicBool::new(false));
        let mut follower = Self { recorder, tails, done, thread: None };
        let (tails, recorder, done) = (follower.tails.clone(), follower.recorder.clone(), follower.done.clone());
        // What goes wrong here goes wrong in `read` again, which tells it.
        let follow = move || {
            while !done.load(Ordering::Relaxed) && read(&tails, &recorder).is_ok() {
                thread::sleep(READ_INTERVAL);
            }
        };
        follower.thread = Some(thread::Builder::new().name("records".to_owned()).spawn(follow)?);
        Ok(follower)
    }

    /// Takes everything that the files hold now.
    ///
    /// # Errors
    /// Where a file cannot be read, or was cut.
    pub fn read(&self) -> io::Result<()> {
        read(&self.tails, &self.recorder)
    }
}

fn read(tails: &Mutex<Vec<Tail>>, recorder: &Recorder) -> io::Result<()> {
    tails.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().try_for_each(|tail| tail.read(recorder))
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The greatest number of identical queries that were under way at once.
pub fn peak_identical(records: &[Record]) -> usize {
    let mut edges: HashMap<&str, Vec<(u64, i32)>> = HashMap::new();
    for record in records {
        edges.entry(&record.query).or_default().extend([(record.start_us, 1), (record.end_us, -1)]);
    }
    let peak_of = |mut edges: Vec<(u64, i32)>| {
        // Where one ends at the very moment another starts, they did not overlap.
        edges.sort_unstable();
        edges
            .iter()
            .scan(0, |open, (_, step)| {
                *open += step;
                Some(*open)
            })
            .max()
            .unwrap_or_default()
    };
    edges.into_values().map(peak_of).max().and_then(|peak| usize::try_from(peak).ok()).unwrap_or_default()
}

/// The longest query.
pub fn longest(records: &[Record]) -> Duration {
    records.iter().map(Record::took).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn queries_overlap_only_while_both_are_under_way() {
        let record = |query: &str, start_us, end_us| Record { query: query.into(), start_us, end_us, outcome: String::new() };
        assert_eq!(peak_identical(&[]), 0);
        assert_eq!(peak_identical(&[record("a", 0, 10), record("a", 10, 20), record("b", 5, 15)]), 1);
        assert_eq!(peak_identical(&[record("a", 0, 10), record("a", 9, 20), record("a", 5, 15)]), 3);
    }

    fn begins(query: u64, key: &str, at_us: u64) -> String {
        let key = fingerprint(key.as_bytes());
        format!(r#"{{"level":"DEBUG","query":{query},"key":"{key:016x}","at_us":{at_us},"target":"{TARGET}"}}"#)
    }

    fn ends(query: u64, key: &str, at_us: u64) -> String {
        begins(query, key, at_us).replace("at_us", r#"outcome":"answered","at_us"#)
    }

    #[test]
    fn lines_of_several_files_become_records_as_they_are_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let paths = ["one.log", "two.log"].map(|name| dir.path().join(name));
        let mut files = paths.each_ref().map(|path| File::create(path).expect("a file"));
        let recorder = Arc::new(Recorder::new(&["k:1".to_owned(), "k:2".to_owned()]));
        let follower = Follower::start(recorder.clone(), paths.to_vec()).expect("follows");
        writeln!(files[0], "{}\n{}", begins(1, "k:1", 10), begins(2, "k:2", 15)).expect("writes");
        // The same number in another file is another query. A line comes in two halves.
        let line = begins(1, "k:1", 12);
        write!(files[1], "starting up\n{}", &line[..30]).expect("writes");
        follower.read().expect("reads");
        assert_eq!(recorder.begun(), 2);
        writeln!(files[1], "{}\n{}", &line[30..], ends(1, "k:1", 19)).expect("writes");
        writeln!(files[0], "{}", ends(1, "k:1", 20)).expect("writes");
        follower.read().expect("reads");
        let records = recorder.take();
        assert_eq!(
            records.iter().map(|r| (&*r.query, r.start_us, r.end_us)).collect::<Vec<_>>(),
            [("k:1", 10, 20), ("k:1", 12, 19)]
        );
        assert_eq!((peak_identical(&records), recorder.begun(), recorder.take_total()), (2, 0, 3));
        // What began before and ends now belongs to the later records.
        writeln!(files[0], "{}", ends(2, "k:2", 30)).expect("writes");
        recorder.settle(|| follower.read()).expect("reads");
        assert_eq!(recorder.take().len(), 1);
        files[0].set_len(0).expect("cuts");
        assert!(follower.read().is_err(), "a cut file has lost records");
    }
}
