//! A client in a server's own pod, with one connection over the pod's loopback interface, which counts up twenty times a second.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::cluster::eventually;
use super::tier::Tier;

/// A line that it wrote, and when that was heard.
pub type Heard = (Instant, String);

pub struct Counter {
    child: Child,
    heard: Arc<Mutex<Vec<Heard>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Counter {
    /// Counts in the key `counter`, for `within` at most.
    pub fn start(tier: &Tier, pod: &str, within: Duration) -> Self {
        let mut line = tier.client_line("app", &tier.password(), pod, "6379");
        let times = (within.as_secs() * 20).to_string();
        line.extend(["-r", &times, "-i", "0.05", "INCR", "counter"].map(str::to_owned));
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
        Self { child, heard, readers: readers.into() }
    }

    /// What it wrote so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a second's worth of lines more.
    pub fn await_more(&self) {
        let before = self.heard().len();
        eventually("the counter goes on", Duration::from_secs(60), || match self.heard().len() {
            now if now >= before + 20 => Ok(()),
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

/// The number that a line acknowledges.
pub fn number(line: &str) -> Option<u64> {
    line.trim_start_matches("(integer) ").trim().parse().ok()
}
