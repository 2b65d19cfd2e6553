//! A run: writers that write until they are stopped, and the reading back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Target;
use super::resp::{Fault, Reply};
use super::route::{Route, tag_of};

/// Values go by themselves when a run is abandoned.
const KEPT_SECONDS: &str = "7200";
/// How soon a writer asks again where the primary is.
const ASK_AGAIN: Duration = Duration::from_millis(20);
const READ_BACK_WITHIN: Duration = Duration::from_secs(60);
const READ_BACK_BATCH: usize = 200;

pub struct Run {
    target: Target,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU32>,
    failed: Arc<AtomicU32>,
    writers: Vec<JoinHandle<Written>>,
}

/// What one writer did.
#[derive(Default)]
struct Written {
    /// The hash tag of its keys, and what their names begin with.
    tag: String,
    name: String,
    /// The numbers of the values that were acknowledged, and when, since 1970.
    acknowledged: Vec<(u32, Duration)>,
    /// By what went wrong.
    failed: BTreeMap<Fault, u32>,
    /// The longest time without an acknowledgement.
    longest_gap: Duration,
}

impl Written {
    fn key(&self, number: u32) -> String {
        format!("{}:{number}", self.name)
    }
}

impl Run {
    /// Starts the writers. Values are unique among all runs of all clients.
    pub fn start(target: Target, number: u32) -> Self {
        let name = format!("e2e:{}:{number}", since_1970().as_millis());
        let (stop, acknowledged, failed) = (Arc::default(), Arc::default(), Arc::default());
        let writers = (0..target.writers)
            .map(|writer| {
                let (target, tag) = (target.clone(), tag_of(writer, target.writers));
                let name = format!("{{{tag}}}{name}:{writer}");
                let (stop, acknowledged, failed) = (Arc::clone(&stop), Arc::clone(&acknowledged), Arc::clone(&failed));
                thread::spawn(move || write(&target, Written { tag, name, ..Written::default() }, &stop, &acknowledged, &failed))
            })
            .collect();
        Self { target, stop, acknowledged, failed, writers }
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
        let deadline = Instant::now() + READ_BACK_WITHIN;
        let (mut lost, mut lost_at, mut not_read_back) = (Vec::new(), Vec::new(), "null".to_owned());
        for written in &written {
            let keys: Vec<String> = written.acknowledged.iter().map(|(number, _)| written.key(*number)).collect();
            match read_back(&self.target, &written.tag, &keys, deadline) {
                Ok(places) => {
                    lost_at
                        .extend(places.iter().filter_map(|place| written.acknowledged.get(*place)).map(|(_, at)| at.as_millis()));
                    lost.extend(places.iter().filter_map(|place| keys.get(*place)).cloned());
                }
                Err(fault) => not_read_back = format!("{fault:?}"),
            }
        }
        let longest_gap = written.iter().map(|written| written.longest_gap).max().unwrap_or_default();
        // Texts are words of replies and names of keys, which Rust quotes as JSON does.
        format!(
            "{{\"acknowledged\":{},\"failed\":{},\"faults\":{failed:?},\"lost\":{},\"lostExamples\":{:?},\"firstLostMillis\":{},\"lastLostMillis\":{},\"longestGapMillis\":{},\"notReadBack\":{not_read_back}}}",
            written.iter().map(|written| written.acknowledged.len()).sum::<usize>(),
            failed.values().sum::<u32>(),
            lost.len(),
            lost.iter().take(10).collect::<Vec<_>>(),
            lost_at.iter().min().unwrap_or(&0),
            lost_at.iter().max().unwrap_or(&0),
            longest_gap.as_millis(),
        )
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn write(target: &Target, mut written: Written, stop: &AtomicBool, acknowledged: &AtomicU32, failed: &AtomicU32) -> Written {
    let mut route = Route::to(target, &written.tag);
    let mut last = Instant::now();
    let pause = Duration::from_secs(1) / target.rate;
    for number in 0u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if target.reconnect > 0 && number % target.reconnect == 0 {
            route.close();
        }
        let (began, key) = (Instant::now(), written.key(number));
        match route.call(&["SET", &key, &key, "EX", KEPT_SECONDS]) {
            Ok(_) => {
                written.longest_gap = written.longest_gap.max(last.elapsed());
                last = Instant::now();
                written.acknowledged.push((number, since_1970()));
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

/// The places of the keys of one hash tag that are gone, or hold something else than their own name. Those that are there are removed: what
/// fills the cache would be evicted from a later run.
fn read_back(target: &Target, tag: &str, keys: &[String], deadline: Instant) -> Result<Vec<usize>, Fault> {
    let mut lost = Vec::new();
    let mut route = Route::to(target, tag);
    for (first, batch) in (0..).step_by(READ_BACK_BATCH).zip(keys.chunks(READ_BACK_BATCH)) {
        let values = loop {
            match values(&mut route, batch) {
                Ok(values) => break values,
                Err(fault) if Instant::now() > deadline => return Err(fault),
                Err(_) => thread::sleep(ASK_AGAIN),
            }
        };
        let command: Vec<&str> = std::iter::once("UNLINK").chain(batch.iter().map(String::as_str)).collect();
        // They go by themselves otherwise.
        let _ = route.call(&command);
        let differs = |(_, (key, value)): &(usize, (&String, Reply))| *value != Reply::Text((*key).clone());
        lost.extend((first..).zip(batch.iter().zip(values)).filter(differs).map(|(place, _)| place));
    }
    Ok(lost)
}

fn values(route: &mut Route, keys: &[String]) -> Result<Vec<Reply>, Fault> {
    let command: Vec<&str> = std::iter::once("MGET").chain(keys.iter().map(String::as_str)).collect();
    match route.call(&command)? {
        Reply::List(values) if values.len() == keys.len() => Ok(values),
        other => Err(format!("unexpected: {other:?}")),
    }
}
