//! A batch that is not full waits for a moment, so that what comes meanwhile shares its transaction; one that is full does not.

use std::collections::VecDeque;
use std::time::Duration;

use larder::journal::{Partition, partition_of};

use super::together::{database, rows, rules};
use super::{Scene, sentinel};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};

/// At least so long a batch that is not full is waited for, less what a clock in microseconds rounds away.
const LINGER: Duration = Duration::from_millis(19);
const KEY: &str = "users:1";

/// What a relay asked of a partition's log between the append of one write and its reading.
struct Looks {
    /// How often it asked how many entries there are.
    counts: usize,
    /// How long it took from the first time to the reading, by the server's clock.
    lasted: Duration,
}

/// Appends a write to a journal that a relay finds empty, and listens in at the server until the relay has read it.
fn looks(batch: u32) -> Looks {
    let postgres = Postgres::shared();
    let (url, database) = database(&postgres);
    let mut rules = rules();
    rules[0]["strategy"]["writeBehind"]["journal"]["batch"] = batch.into();
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules);
    let relay = scene.relay();
    let log = String::from_utf8(Partition::new(scene.journal(), partition_of(KEY.as_bytes())).log()).expect("a text");
    let mut monitor = scene.servers.holder_of(&log);
    assert_eq!(monitor.line("MONITOR"), Value::Simple("OK".to_owned()));
    scene.append(KEY.as_bytes(), Some("good"));
    let mut lines = Lines { monitor, log, of_late: VecDeque::new() };
    lines.until(&["lua] \"XADD\""]);
    // By itself, not by a script that asks how the journal is.
    let (count, reading) = ("] \"XLEN\"", "] \"XRANGE\"");
    let (first, mut counts) = (lines.until(&[count]).0, 1);
    let read = loop {
        match lines.until(&[count, reading]) {
            (at, name) if name == reading => break at,
            _ => counts += 1,
        }
    };
    scene.wait_until_drained();
    assert_eq!(rows(&postgres, &database).len(), 1);
    relay.stop();
    Looks { counts, lasted: read.saturating_sub(first) }
}

/// What MONITOR shows of a key.
struct Lines {
    monitor: Client,
    log: String,
    /// The last of all, to be shown where none comes any more.
    of_late: VecDeque<String>,
}

impl Lines {
    /// The next with one of these parts, and when the server took it.
    fn until<'a>(&mut self, parts: &[&'a str]) -> (Duration, &'a str) {
        loop {
            let line = self.monitor.read().unwrap_or_else(|error| panic!("{error}, after {:#?}", self.of_late)).text();
            let part = parts.iter().find(|part| line.contains(&self.log) && line.contains(**part));
            // A script's commands are no one's own.
            if let Some(part) = part.filter(|part| part.contains("lua") || !line.contains(" lua] ")) {
                let (seconds, micros) = line.split_once(' ').and_then(|(time, _)| time.split_once('.')).expect("a time");
                let number = |text: &str| text.parse::<u64>().expect("a number");
                return (Duration::from_secs(number(seconds)) + Duration::from_micros(number(micros)), *part);
            }
            self.of_late.truncate(20);
            self.of_late.push_front(line);
        }
    }
}

#[test]
fn a_batch_that_is_not_full_is_waited_for() {
    let Looks { counts, lasted } = looks(100);
    assert_eq!(counts, 2, "it looks again before it reads");
    assert!(lasted >= LINGER, "{lasted:?}");
}

#[test]
fn a_batch_that_is_full_is_not() {
    assert_eq!(looks(1).counts, 1);
}
