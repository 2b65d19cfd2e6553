//! A client in a server's own pod, with one connection over the pod's loopback interface, which counts up and keeps each count in a key of
//! its own. Each count carries the server's own time: how late the test hears of it depends on how busy the machine is.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::cluster::eventually;
use super::tier::Tier;

/// A line that it wrote, and when that was heard.
pub type Heard = (Instant, String);

/// Counts, keeps the number for two hours, and tells it with the server's time in seconds and microseconds.
const COUNT: &str = "local now, number = redis.call('TIME'), redis.call('INCR', KEYS[1]) \
                     redis.call('SET', KEYS[1] .. ':' .. number, number, 'EX', 7200) return number .. ' ' .. now[1] .. ' ' .. now[2]";
/// How many of the first so many numbers are kept.
const KEPT: &str = "local kept = 0 for number = 1, tonumber(ARGV[1]) do \
                    if redis.call('GET', KEYS[1] .. ':' .. number) == tostring(number) then kept = kept + 1 end end return kept";

pub struct Counter {
    key: String,
    child: Child,
    heard: Arc<Mutex<Vec<Heard>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Counter {
    /// Counts in a key, so often, for `within` at most.
    pub fn start(tier: &Tier, pod: &str, key: &str, every: Duration, within: Duration) -> Self {
        let mut line = tier.client_line("app", &tier.password(), pod, "6379");
        let times = (within.as_millis() / every.as_millis()).to_string();
        let every = every.as_secs_f64().to_string();
        line.extend(["-r", &times, "-i", &every, "EVAL", COUNT, "1", key].map(str::to_owned));
        let mut command = Command::new("kubectl");
        command.args(line).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl runs");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("a pipe")), Box::new(child.stderr.take().expect("a pipe"))];
        let readers = streams.map(|stream| {
            let heard = Arc::clone(&heard);
            thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), line));
                }
            })
        });
        Self { key: key.to_owned(), child, heard, readers: readers.into() }
    }

    /// What it wrote so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for so many lines more.
    pub fn await_more(&self, lines: usize) {
        let before = self.heard().len();
        eventually(&format!("{} goes on", self.key), Duration::from_secs(180), || match self.heard().len() {
            now if now >= before + lines => Ok(()),
            now => Err(format!("{now} lines: {:?}", self.heard().last())),
        });
    }

    /// Ends it. All that it wrote, but for a last line that may have been cut off.
    pub fn finish(mut self) -> Vec<Heard> {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            reader.join().expect("lines are read");
        }
        let mut heard = self.heard();
        heard.pop();
        heard
    }
}

/// How many of the first so many counts of a key are still kept, as a server says.
pub fn kept(tier: &Tier, pod: &str, key: &str, counts: usize) -> usize {
    let said = tier.ask(pod, "6379", &["EVAL", KEPT, "1", key, &counts.to_string()]).unwrap_or_else(|error| panic!("{error}"));
    said.trim_start_matches("(integer) ").trim().parse().unwrap_or_else(|error| panic!("{said:?}: {error}"))
}

/// A count that the server acknowledged, with its own time of that since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    pub number: u64,
    at: Duration,
}

impl Count {
    /// What a line acknowledges, if it does.
    pub fn of(line: &str) -> Option<Self> {
        let fields = line.split(' ').map(|field| field.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
        let [number, seconds, micros] = fields[..] else { return None };
        Some(Self { number, at: Duration::from_secs(seconds) + Duration::from_micros(micros) })
    }
}

/// Acknowledged counts by the test's clock, and how late the server was at most before some moment.
pub struct Counts {
    counts: Vec<(Instant, Count)>,
}

impl Counts {
    /// Of all lines. The line before `until` that was heard soonest after its count ties the server's clock to the test's.
    pub fn of(heard: &[Heard], until: Instant) -> Self {
        let counts: Vec<(Instant, Count)> = heard.iter().filter_map(|(at, line)| Some((*at, Count::of(line)?))).collect();
        let first = counts.first().expect("it acknowledged something").1.at;
        let soonest = counts.iter().filter(|(heard, _)| *heard < until).min_by_key(|(heard, count)| {
            // All of one start, and in order: only the differences matter.
            (heard.duration_since(counts[0].0) + Duration::from_secs(3600)).saturating_sub(count.at.saturating_sub(first))
        });
        let (heard, tie) = *soonest.expect("it acknowledged something before that");
        let placed = |count: &Count| match count.at.checked_sub(tie.at) {
            Some(later) => heard + later,
            None => heard - (tie.at - count.at),
        };
        Self { counts: counts.iter().map(|(_, count)| (placed(count), *count)).collect() }
    }

    pub fn last(&self) -> Instant {
        self.counts.last().expect("there is one").0
    }

    pub fn since(&self, moment: Instant) -> usize {
        self.counts.iter().filter(|(at, _)| *at > moment).count()
    }

    pub fn all(&self) -> usize {
        self.counts.len()
    }

    /// The longest time between two counts, before that moment and after it.
    pub fn gaps(&self, moment: Instant) -> (Duration, Duration) {
        let longest = |of: &dyn Fn(Instant) -> bool| {
            let pairs = self.counts.windows(2).filter(|pair| of(pair[1].0));
            pairs.map(|pair| pair[1].0.saturating_duration_since(pair[0].0)).max().unwrap_or_default()
        };
        (longest(&|at| at < moment), longest(&|at| at >= moment))
    }
}
