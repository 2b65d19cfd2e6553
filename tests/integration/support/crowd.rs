//! Sidecars that are not there: their heartbeats, published at a real server as so many would, and what that server says that it was
//! asked meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use larder::policy::binding::BindingName;
use larder::policy::heartbeat::{Heartbeat, RuleBeat, VERSION};

use super::resp::{Client, encode};

/// Heartbeats in a tenth of a second, at the most: ten thousand sidecars speak every five seconds.
const AT_ONCE: usize = 200;

/// After how many rounds each reads what is told of its binding: every thirty seconds.
const READS_AFTER: u64 = 6;

/// The sidecars of some bindings, as many of each.
pub struct Crowd {
    pub voices: Vec<Voice>,
    /// How many there are of each binding.
    pub each: usize,
    /// Whether they also read their snapshot and their number, changed or not, as sidecars do.
    pub reads: bool,
}

/// The sidecars of one binding.
pub struct Voice {
    pub binding: BindingName,
    /// The rules that they tell of.
    pub rules: Vec<String>,
    /// The generation that they say is in force.
    pub generation: AtomicU64,
}

/// What every sidecar tells in one round.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// The number of the round: sidecars grow older by it.
    pub round: u64,
    /// Of each rule, since the sidecar began.
    pub hits: u64,
    pub misses: u64,
}

impl Voice {
    pub fn new(binding: BindingName, rules: Vec<String>, generation: u64) -> Self {
        Self { binding, rules, generation: generation.into() }
    }

    fn heartbeat(&self, sidecar: usize, tally: Tally) -> Vec<u8> {
        let Tally { round, hits, misses } = tally;
        let rule = |name: &String| RuleBeat {
            name: name.clone(),
            hits,
            misses,
            loads: misses / 2,
            loads_saved: misses - misses / 2,
            ..RuleBeat::default()
        };
        let beat = Heartbeat {
            version: VERSION,
            sidecar: format!("{}-7c9d8b6f5-{sidecar:05}-{:08x}", self.binding, sidecar.wrapping_mul(2_654_435_761) as u32),
            binding: self.binding.to_string(),
            larder: "0.1.0".to_owned(),
            understands: larder::policy::snapshot::VERSION,
            generation: Some(self.generation.load(Ordering::Relaxed)),
            refused: None,
            uptime_seconds: 100 + round * 5,
            clients: 8,
            clients_ever: 20,
            rules: self.rules.iter().map(rule).collect(),
            rules_left_out: 0,
        };
        beat.to_json()
    }
}

impl Crowd {
    /// How many sidecars there are.
    pub fn len(&self) -> usize {
        self.voices.len() * self.each
    }

    /// Every sidecar speaks once. How many of them were heard, by the server's word: on a busy machine the operator may have lost its
    /// connection, and have made another.
    pub fn speak(&self, server: &mut Client, tally: Tally) -> usize {
        let channels: Vec<String> = self.voices.iter().map(|voice| voice.binding.heartbeat_channel()).collect();
        let all = (0..self.each).flat_map(|sidecar| (0..self.voices.len()).map(move |number| (number, sidecar)));
        let all: Vec<(usize, usize)> = all.collect();
        let (began, mut heard) = (Instant::now(), 0);
        for (part, some) in all.chunks(AT_ONCE).enumerate() {
            let mut commands = Vec::new();
            for (number, sidecar) in some {
                let Voice { binding, .. } = &self.voices[*number];
                let beat = self.voices[*number].heartbeat(*sidecar, tally);
                commands.extend(encode(&[b"PUBLISH".as_slice(), channels[*number].as_bytes(), &beat]));
                if self.is_read_by(*sidecar, tally.round) {
                    commands.extend(encode(&["GET", &binding.snapshot_key()]));
                    commands.extend(encode(&["GET", &binding.fleet_key()]));
                }
            }
            server.send(&commands).expect("the server reads");
            for (_, sidecar) in some {
                heard += usize::from(server.read().expect("an answer").int() == 1);
                let reads = if self.is_read_by(*sidecar, tally.round) { 2 } else { 0 };
                (0..reads).for_each(|_| drop(server.read().expect("an answer")));
            }
            // As sidecars speak: not all at once.
            let due = Duration::from_millis(100) * u32::try_from(part + 1).unwrap();
            thread::sleep(due.saturating_sub(began.elapsed()));
        }
        heard
    }

    fn is_read_by(&self, sidecar: usize, round: u64) -> bool {
        self.reads && (sidecar as u64 + round).is_multiple_of(READS_AFTER)
    }
}

/// The commands that an operator sends. What a script does within the server counts beside them.
const COMMANDS: [&str; 9] = ["eval", "role", "set", "getrange", "subscribe", "ping", "auth", "del", "srem"];
const WITHIN: [&str; 5] = ["type", "strlen", "get", "sadd", "srandmember"];

/// What a server was asked, since it began.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// By the operator, without what it publishes.
    pub commands: u64,
    /// Calls within its scripts, where nobody else calls the same.
    pub within: u64,
    /// Calls of whomever, within scripts as well.
    pub all: u64,
    /// The processor time that it used, in seconds.
    pub cpu: f64,
}

impl Load {
    /// Asks the server.
    pub fn of(server: &mut Client) -> Self {
        let (calls, cpu) = (server.line("INFO commandstats").text(), server.line("INFO cpu").text());
        let all =
            |names: &[&str]| names.iter().map(|name| number_of(&calls, &format!("cmdstat_{name}:calls=")) as u64).sum::<u64>();
        Self {
            commands: all(&COMMANDS),
            within: all(&WITHIN),
            all: calls
                .lines()
                .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="))
                .map(|(_, calls)| leading(calls) as u64)
                .sum(),
            cpu: number_of(&cpu, "used_cpu_user:") + number_of(&cpu, "used_cpu_sys:"),
        }
    }

    /// What came since an earlier answer.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            commands: self.commands - earlier.commands,
            within: self.within - earlier.within,
            all: self.all - earlier.all,
            cpu: self.cpu - earlier.cpu,
        }
    }

    /// The most commands of an operator that keeps so many bindings in one cache, in a time in which nothing is to be written but the number
    /// of each one's sidecars: a look in ten seconds at all bindings, fifty at a time, a ping in five. Half of it to spare.
    pub fn most(bindings: usize, time: Duration) -> f64 {
        let (bindings, seconds) = (bindings as f64, time.as_secs_f64());
        let (looks, pings) = ((seconds / 7.5 + 1.0) * (bindings / 50.0 + 2.0), seconds / 5.0 + 2.0);
        (looks + pings + bindings) * 1.5 + 50.0
    }
}

/// The number behind the beginning of a line; zero where there is no such line.
fn number_of(text: &str, beginning: &str) -> f64 {
    text.lines().find_map(|line| line.strip_prefix(beginning)).map_or(0.0, leading)
}

/// The number that a text begins with, up to a comma.
fn leading(text: &str) -> f64 {
    text.split(',').next().unwrap_or_default().trim().parse().expect("a number")
}
