//! The clients of a history: who changes rows, who tells of what nobody else tells of, and who reads.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use larder::origin::changes::pgoutput::Lsn;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::checker::{Carried, Heard, History, Kind, Read, SECOND};
use super::marks::{Id, Shown};
use crate::relay::LONG;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::connect_to_any;

/// Rows of `users`.
pub const USERS: usize = 20;
/// The key that is about all prices.
pub const TOTAL: usize = USERS;
/// Groups of notes, and how many each has.
pub const GROUPS: usize = 4;
pub const NOTES: usize = 4;
pub const KEYS: usize = USERS + 1 + GROUPS * NOTES;

/// The key of this number, and the change of its row.
pub fn key(at: usize) -> String {
    match at {
        0..USERS => format!("user:{}", at + 1),
        TOTAL => "total:all".to_owned(),
        _ => format!("note:{}:{}", group_of(at), at),
    }
}

fn group_of(note: usize) -> usize {
    (note - TOTAL - 1) / NOTES
}

fn change(at: usize, number: u64) -> String {
    match at {
        0..USERS => format!("UPDATE users SET name = '{number}' WHERE id = {}", at + 1),
        TOTAL => format!("UPDATE prices SET cents = {number}"),
        _ => format!("UPDATE notes SET n = {number} WHERE id = {at}"),
    }
}

/// What there is at the beginning.
pub fn tables() -> Vec<String> {
    let notes = (TOTAL + 1..KEYS).map(|at| format!("({}, {at}, 0)", group_of(at))).collect::<Vec<_>>().join(", ");
    vec![
        "UPDATE users SET name = '0'".to_owned(),
        "INSERT INTO prices VALUES (1, 0)".to_owned(),
        "CREATE TABLE notes (grp int, id int PRIMARY KEY, n bigint)".to_owned(),
        format!("INSERT INTO notes VALUES {notes}"),
    ]
}

/// What clients know of each other, and what they have seen.
pub struct World {
    /// The sidecars.
    pub ports: Mutex<Vec<u16>>,
    pub history: Mutex<History>,
    /// What the cache showed last of how far it is.
    pub shown: Mutex<Shown>,
    pub errors: Mutex<BTreeMap<String, u64>>,
    /// The furthest place in the database's log that a writer heard of.
    pub newest: AtomicU64,
    /// Changes end before reads do.
    done: AtomicBool,
    over: AtomicBool,
}

impl World {
    pub fn new(ports: Vec<u16>, versioned: bool) -> Self {
        let kind = |at| match at {
            0..USERS => Kind::Row,
            TOTAL => Kind::All,
            _ => Kind::Told { versioned },
        };
        Self {
            ports: Mutex::new(ports),
            history: Mutex::new(History::new((0..KEYS).map(kind).collect())),
            shown: Mutex::default(),
            errors: Mutex::default(),
            newest: AtomicU64::new(0),
            done: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst) || self.is_over()
    }

    /// Nothing is changed any more.
    pub fn stop_changes(&self) {
        self.done.store(true, Ordering::SeqCst);
    }

    fn connect(&self, random: &mut fastrand::Rng) -> Client {
        connect_to_any(&self.ports, random, LONG)
    }

    fn note_error(&self, text: &str) {
        let word = text.split([':', '`']).next().unwrap_or_default().to_owned();
        *self.errors.lock().unwrap().entry(word).or_default() += 1;
    }

    /// Changes rows of these keys, some of them two at a time, some in vain. Nobody else changes them.
    pub fn change_rows(&self, url: &str, keys: Range<usize>, seed: u64) {
        let (mut random, mut writer) = (fastrand::Rng::with_seed(seed), Writer::new(url));
        while !self.is_done() {
            let mut changed = vec![random.usize(keys.clone())];
            if keys.len() > 1 && random.u8(0..4) == 0 {
                changed.push(keys.start + (changed[0] - keys.start + 1) % keys.len());
            }
            writer.transaction(self, &changed, random.u8(0..8) == 0);
            std::thread::sleep(Duration::from_micros(random.u64(1_000..12_000)));
        }
    }

    /// Changes notes of every other group, and tells of it by key, by tag or by rule.
    pub fn change_notes(&self, url: &str, odd: usize, seed: u64) {
        let (mut random, mut writer) = (fastrand::Rng::with_seed(seed), Writer::new(url));
        let mut client = self.connect(&mut random);
        let own: Vec<usize> = (TOTAL + 1..KEYS).filter(|at| group_of(*at) % 2 == odd).collect();
        while !self.is_done() {
            let note = own[random.usize(..own.len())];
            let (changed, event) = match random.u8(0..8) {
                0 => (own.clone(), ["rule".to_owned(), "note".to_owned()]),
                1 | 2 => {
                    let group = group_of(note);
                    let all = own.iter().copied().filter(|at| group_of(*at) == group).collect();
                    (all, ["tag".to_owned(), format!("group:{group}")])
                }
                _ => (vec![note], ["key".to_owned(), key(note)]),
            };
            if let Some(numbers) = writer.transaction(self, &changed, random.u8(0..16) == 0) {
                match self.tell(&mut client, &event) {
                    Ok(from) => {
                        let carried = changed.iter().zip(numbers).map(|(key, number)| (*key, number));
                        let carried = from.map(|from| carried.map(move |(key, number)| Carried { from, key, number }));
                        self.history.lock().unwrap().carried.extend(carried.into_iter().flatten());
                    }
                    Err(_) => client = self.connect(&mut random),
                }
            }
            std::thread::sleep(Duration::from_millis(random.u64(5..40)));
        }
    }

    /// Writes an event, and waits until it was carried out: since when. `None`: it may be lost, or nobody says so.
    fn tell(&self, client: &mut Client, [kind, what]: &[String; 2]) -> std::io::Result<Option<Instant>> {
        let era = self.shown.lock().unwrap().era;
        let event: Id = match client.try_call(&["XADD", "larder:events", "*", kind, what])? {
            Value::Bulk(id) => String::from_utf8_lossy(&id).parse().expect("an id"),
            other => {
                self.note_error(&format!("XADD: {other:?}"));
                return Ok(None);
            }
        };
        let until = Instant::now() + LONG;
        while Instant::now() < until && !self.is_over() {
            let shown = self.shown.lock().unwrap().clone();
            if shown.era != era {
                return Ok(None);
            }
            if shown.has_carried_out(event) {
                return Ok(Some(Instant::now()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(None)
    }

    /// Reads any keys.
    pub fn read(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            std::thread::sleep(Duration::from_micros(random.u64(0..4_000)));
            let at = random.usize(..KEYS);
            let began = Instant::now();
            let reply = client.try_call(&["GET", &key(at)]);
            let ended = Instant::now();
            let number = match reply {
                Ok(Value::Bulk(text)) => {
                    Some(std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok()).expect("a number"))
                }
                Ok(Value::Nil) => None,
                Ok(other) => {
                    self.note_error(&format!("{other:?}"));
                    continue;
                }
                Err(_) => {
                    client = self.connect(&mut random);
                    continue;
                }
            };
            self.history.lock().unwrap().reads.push(Read { key: at, began, ended, number });
        }
    }

    /// Waits until an event about all notes is carried out, and the second behind it is over, too.
    pub fn settle_notes(&self) {
        let mut client = self.connect(&mut fastrand::Rng::new());
        crate::support::wait_for("the notes are told of", LONG, || {
            self.tell(&mut client, &["rule".to_owned(), "note".to_owned()]).is_ok_and(|from| from.is_some())
        });
        std::thread::sleep(SECOND);
    }
}

/// Whoever changes rows. Postgres may be away at any time.
struct Writer<'a> {
    url: &'a str,
    runtime: tokio::runtime::Runtime,
    connection: Option<PgConnection>,
}

impl<'a> Writer<'a> {
    fn new(url: &'a str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { url, runtime, connection: None }
    }

    /// Changes the rows of these keys in one transaction: their numbers, where it is known to be committed.
    fn transaction(&mut self, world: &World, keys: &[usize], in_vain: bool) -> Option<Vec<u64>> {
        if self.connection.is_none() {
            self.connection = self.runtime.block_on(PgConnection::connect(self.url)).ok();
        }
        let open = self.connection.as_mut()?;
        let numbers: Vec<u64> = keys.iter().map(|key| world.history.lock().unwrap().begin(*key)).collect();
        let changes: Vec<String> = keys.iter().zip(&numbers).map(|(key, number)| change(*key, *number)).collect();
        let text = format!("BEGIN; {}; {}", changes.join("; "), if in_vain { "ROLLBACK" } else { "COMMIT" });
        let outcome = self.runtime.block_on(sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *open));
        let ended = Instant::now();
        // Behind the acknowledgement, so that the commit lies before it.
        let place = "SELECT pg_current_wal_flush_lsn()::text";
        let place = outcome.is_ok().then(|| self.runtime.block_on(sqlx::query_scalar::<_, String>(place).fetch_one(open)).ok());
        let lsn = place.flatten().map(|text| text.parse::<Lsn>().expect("a place").get());
        let heard = match outcome {
            _ if in_vain => Heard::RolledBack,
            Ok(_) => Heard::Committed,
            Err(_) => Heard::Nothing,
        };
        if lsn.is_none() {
            self.connection = None;
        }
        let mut history = world.history.lock().unwrap();
        for (key, number) in keys.iter().zip(&numbers) {
            let write = &mut history.writes[*key][usize::try_from(*number).unwrap() - 1];
            write.heard = heard;
            write.acknowledged = lsn.filter(|_| heard == Heard::Committed).map(|lsn| (ended, lsn));
        }
        world.newest.fetch_max(lsn.unwrap_or(0), Ordering::SeqCst);
        (heard == Heard::Committed).then_some(numbers)
    }
}

/// The clients go when this does, also where a test fails.
pub struct Ends<'a>(pub &'a World);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}
