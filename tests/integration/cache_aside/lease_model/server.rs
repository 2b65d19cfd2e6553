//! Keys on a real server, as they are after each step.

use std::collections::BTreeSet;

use larder::sidecar::engine::lease::{Generation, Millis};
use larder::sidecar::slots::Companion;

use super::breaks::Break;
use super::steps::KEYS;
use crate::support::resp::{Client, Value, encode};
use crate::support::server::Redis;

/// A server, and somebody who listens for the ends of leases there.
pub struct Server {
    client: Client,
    listener: Client,
    /// What is changed on the way to the server.
    pub broken: Break,
    /// The beginning of its run id.
    pub run: u32,
    pub keys: [Found; KEYS.len()],
    /// Its clock, when it was last looked at.
    pub now: Millis,
}

/// A key and what is beside it, with the ends of their lives.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Found {
    pub value: Option<(String, Millis)>,
    pub lease: Option<(String, Millis)>,
    pub copy: Option<(String, Millis)>,
    pub negative: bool,
}

/// What a step brought.
pub struct Done {
    pub replies: Vec<Value>,
    /// The server's clock before and behind it.
    pub before: Millis,
    pub after: Millis,
    /// The keys of which the end of a lease was announced.
    pub announced: BTreeSet<usize>,
}

const READS: usize = 7;

pub fn companion(companion: Companion, key: usize) -> Vec<u8> {
    companion.name(KEYS[key].as_bytes())
}

impl Server {
    /// Of `server`, which has the keys' slot.
    pub fn new(server: &Redis, broken: Break) -> Self {
        let mut listener = server.client();
        for key in 0..KEYS.len() {
            listener.call(&[b"SSUBSCRIBE".to_vec(), companion(Companion::Lease, key)]);
        }
        let mut client = server.client();
        let info = client.line("INFO server").text();
        let run = info.lines().find_map(|line| line.strip_prefix("run_id:")).expect("a run id");
        let run = u32::from_str_radix(&run[..8], 16).expect("hexadecimal digits");
        Self { client, listener, broken, run, keys: Default::default(), now: 0 }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.client.line("FLUSHALL");
        self.keys = Default::default();
        let Value::Array(time) = self.client.line("TIME") else { panic!("a time") };
        self.now = millis(&time);
        self.announced();
    }

    /// Waits until the clock shows another millisecond than when it was last looked at.
    pub fn wait_for_the_next_moment(&mut self) {
        let last = self.now;
        while self.now == last {
            self.now = millis(&self.client.line("TIME").items());
        }
    }

    /// Sends commands that bring so many replies, and looks at all keys behind them, in one go.
    pub fn run(&mut self, wire: &[u8], replies: u32) -> Done {
        let time = encode(&["TIME"]);
        let mut all = [&time[..], &self.broken.on_the_way(wire)[..], &time[..]].concat();
        (0..KEYS.len()).for_each(|key| write_reads(key, &mut all));
        self.client.send(&all).expect("the server lives");
        let mut next = || self.client.read().expect("the server answers");
        let before = millis(&next().items());
        let replies = (0..replies).map(|_| next()).collect();
        let after = millis(&next().items());
        let found = [(); KEYS.len()].map(|()| found(&[(); READS].map(|()| next())));
        (self.keys, self.now) = (found, after);
        Done { replies, before, after, announced: self.announced() }
    }

    fn announced(&mut self) -> BTreeSet<usize> {
        self.listener.send(&encode(&["PING"])).expect("the server lives");
        let mut announced = BTreeSet::new();
        loop {
            let message = self.listener.read().expect("the server answers").items();
            if message[0].text() == "pong" {
                return announced;
            }
            let channel = message[1].text();
            let key = (0..KEYS.len()).find(|key| companion(Companion::Lease, *key) == channel.as_bytes());
            assert!(announced.insert(key.expect("a lease's channel")), "{channel} is announced twice");
        }
    }

    /// Lets `span` pass for all keys, by having them end sooner. The server's own clock goes on as it did.
    pub fn pass(&mut self, span: Millis) -> Done {
        let (mut wire, mut replies) = (Vec::new(), 0);
        let mut send = |words: &[&[u8]]| {
            wire.extend(encode(words));
            replies += 1;
        };
        for (key, found) in self.keys.iter().enumerate() {
            let names = [KEYS[key].as_bytes().to_vec(), companion(Companion::Lease, key), companion(Companion::Stale, key)];
            if let Some((text, _)) = &found.lease {
                send(&[b"SET", &names[1], sooner(text, span).as_bytes(), b"KEEPTTL"]);
            }
            for (name, end) in names.iter().zip([&found.value, &found.lease, &found.copy]) {
                if let Some((_, end)) = end {
                    send(&[b"PEXPIREAT", name, (end - span).to_string().as_bytes()]);
                }
            }
        }
        self.run(&wire, replies)
    }
}

/// A lease that is held for less long by `span`.
fn sooner(text: &str, span: Millis) -> String {
    let mut words: Vec<String> = text.split(' ').map(str::to_owned).collect();
    let held: Millis = words[1].parse().expect("a moment");
    words[1] = held.saturating_sub(span).to_string();
    words.join(" ")
}

/// A lease as one of a server that was primary before.
pub fn of_another_run(text: &str) -> String {
    let (generation, rest) = text.split_at(Generation::LEN);
    let generation = Generation::parse(generation.as_bytes()).expect("a generation");
    format!("{}{rest}", Generation { run: !generation.run, ..generation })
}

fn write_reads(key: usize, out: &mut Vec<u8>) {
    for name in [KEYS[key].as_bytes().to_vec(), companion(Companion::Lease, key), companion(Companion::Stale, key)] {
        out.extend(encode(&[&b"GET"[..], &name]));
        out.extend(encode(&[&b"PEXPIRETIME"[..], &name]));
    }
    out.extend(encode(&[b"EXISTS".to_vec(), companion(Companion::Negative, key)]));
}

fn found(replies: &[Value; READS]) -> Found {
    let kept = |at: usize| match &replies[at] {
        Value::Nil => None,
        text => Some((text.text(), u64::try_from(replies[at + 1].int()).expect("it ends"))),
    };
    Found { value: kept(0), lease: kept(2), copy: kept(4), negative: replies[6].int() == 1 }
}

fn millis(time: &[Value]) -> Millis {
    let part = |at: usize| time[at].text().parse::<u64>().expect("a number");
    part(0) * 1000 + part(1) / 1000
}
