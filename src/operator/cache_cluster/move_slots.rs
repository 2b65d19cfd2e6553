//! Slots with their keys go from one primary of a Cluster to another, as a step of the plan.
//!
//! By the engine's own migration where it has one: that runs in the servers, and is only begun here. Else key by key, in an order that may
//! stop between any two commands: the one that gets a slot is told first (`IMPORTING`), then the one that gives it (`MIGRATING`), from where on
//! no new key comes to the giver; the keys go in batches, of which each is in one place or in both; with none left, the getter claims the slot
//! and then the giver lets it go. Where a key is in both places, the giver's is the newer one and replaces the other: as long as it has the key,
//! it serves it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::future::try_join;
use redis::Cmd;
use tokio::time::sleep;

use super::plan::{NodeId, SlotSet};
use super::slot_migrations::{self, End};
use crate::operator::admin::{Admin, AdminError, Entry, Login};

/// How many slots are on their way together. Each command about a slot is written to the disk before its reply, a group of them at once.
const GROUP: u16 = 32;
/// The most keys of a batch.
const MAX_BATCH: usize = 512;
/// The most bytes of a batch, as `MEMORY USAGE` tells of its keys; a key that is greater goes alone.
const MAX_BATCH_BYTES: u64 = 1 << 20;
/// How long others may have to wait for a batch: servers do nothing else meanwhile.
const BEARABLE: Duration = Duration::from_millis(5);
/// The longest pause after a batch.
const MAX_PAUSE: Duration = Duration::from_millis(250);
/// How long a batch may take before it is given up. Its keys are then in one place or in both.
const BATCH_WITHIN: Duration = Duration::from_secs(5);
/// The shortest pause: timers tick by the millisecond.
const MIN_PAUSE: Duration = Duration::from_millis(1);

/// Why slots did not move. The next plan goes on from what is there.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A server did not do its part.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Keys came into slots that take none, as from scripts that do not name them.
    #[error("{address}: keys come again and again into slots that are on their way")]
    Refilled {
        /// The server that gives them.
        address: SocketAddr,
    },
}

/// One side of a move.
pub struct Side {
    address: SocketAddr,
    id: NodeId,
    admin: Admin,
}

impl Side {
    /// Connects to a node, and learns its name.
    pub async fn connect(address: SocketAddr, entry: Entry<'_>) -> Result<Self, MoveError> {
        let mut admin = Admin::connect_for(address, entry, BATCH_WITHIN * 2).await?;
        let id = NodeId(admin.ask("CLUSTER MYID", &[]).await?);
        Ok(Self { address, id, admin })
    }

    /// Tells the state of slots, all at once.
    async fn set(&mut self, slots: &SlotSet, state: &'static str, node: &NodeId) -> Result<(), MoveError> {
        let set = |slot: u16| {
            let mut command = redis::cmd("CLUSTER");
            command.arg("SETSLOT").arg(slot).arg(state).arg(&node.0);
            command
        };
        let _: Vec<()> = self.admin.ask_all("CLUSTER SETSLOT", slots.iter().map(set).collect()).await?;
        Ok(())
    }

    /// The slots of these that hold keys, and how many each.
    async fn filled(&mut self, slots: &SlotSet) -> Result<Vec<(u16, u64)>, MoveError> {
        let count = |slot: u16| {
            let mut command = redis::cmd("CLUSTER");
            command.arg("COUNTKEYSINSLOT").arg(slot);
            command
        };
        let counts: Vec<u64> = self.admin.ask_all("CLUSTER COUNTKEYSINSLOT", slots.iter().map(count).collect()).await?;
        Ok(slots.iter().zip(counts).filter(|(_, count)| *count > 0).collect())
    }

    /// Some keys of these slots, by slot: at most `count`, and not more than a batch may hold.
    async fn batch(&mut self, filled: &[(u16, u64)], count: usize) -> Result<Vec<Vec<Vec<u8>>>, MoveError> {
        let get = |(slot, count): (u16, u64)| {
            let mut command = redis::cmd("CLUSTER");
            command.arg("GETKEYSINSLOT").arg(slot).arg(count);
            command
        };
        let get = first_keys(filled, count).map(get).collect();
        let keys: Vec<Vec<Vec<u8>>> = self.admin.ask_all("CLUSTER GETKEYSINSLOT", get).await?;
        let usage = |key: &Vec<u8>| {
            let mut command = redis::cmd("MEMORY");
            command.arg("USAGE").arg(key);
            command
        };
        // None: it has gone meanwhile.
        let sizes: Vec<Option<u64>> = self.admin.ask_all("MEMORY USAGE", keys.iter().flatten().map(usage).collect()).await?;
        Ok(within_bytes(keys, &sizes))
    }

    /// Sends keys on their way. Where the connection between the two servers breaks, keys may be in both places: they are sent again at once,
    /// before somebody deletes one of them in one place alone.
    async fn hand_over(&mut self, commands: Vec<Cmd>) -> Result<(), AdminError> {
        let first: Result<Vec<String>, AdminError> = self.admin.ask_all("MIGRATE", commands.clone()).await;
        match first {
            Err(error) if error.code() == Some("IOERR") => self.admin.ask_all::<String>("MIGRATE", commands).await.map(drop),
            outcome => outcome.map(drop),
        }
    }

    /// How long it takes to answer now.
    async fn latency(&mut self) -> Result<Duration, MoveError> {
        let asked = Instant::now();
        let _: String = self.admin.ask("PING", &[]).await?;
        Ok(asked.elapsed())
    }
}

/// How fast keys go: batches grow as long as nobody waits for them longer than is bearable, and shrink where somebody does.
#[derive(Debug)]
pub struct Pace {
    batch: usize,
    /// What the last batch asks for.
    pause: Duration,
    /// What is still to be paused.
    owed: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { batch: 16, pause: Duration::ZERO, owed: Duration::ZERO }
    }
}

impl Pace {
    /// A batch took the servers so long, and they answered so late after it. The pause leaves others as much time as was taken from them.
    fn record(&mut self, took: Duration, latency: Duration) {
        let slowest = took.max(latency);
        if slowest > BEARABLE {
            self.batch = (self.batch / 2).max(1);
        } else if slowest < BEARABLE / 2 {
            self.batch = (self.batch * 2).min(MAX_BATCH);
        }
        self.pause = if latency > BEARABLE { (self.pause * 2).max(latency).min(MAX_PAUSE) } else { took.min(MAX_PAUSE) };
        self.owed = (self.owed + self.pause).min(MAX_PAUSE);
    }

    /// How long others are left alone now. Pauses too short to be made are added up.
    fn pause(&mut self) -> Option<Duration> {
        (self.owed >= MIN_PAUSE).then(|| std::mem::take(&mut self.owed))
    }
}

/// Makes a node forget that slots were on their way.
pub async fn settle(admin: &mut Admin, slots: &SlotSet) -> Result<(), AdminError> {
    let settle = |slot: u16| {
        let mut command = redis::cmd("CLUSTER");
        command.arg("SETSLOT").arg(slot).arg("STABLE");
        command
    };
    admin.ask_all::<()>("CLUSTER SETSLOT", slots.iter().map(settle).collect()).await.map(drop)
}

/// Has the engine move slots. They are on their way from then on, or will not move; which of the two is observed.
pub async fn at_once(source: &mut Side, target: &mut Side, slots: &SlotSet) -> Result<(), MoveError> {
    Ok(slot_migrations::begin(&mut source.admin, &mut target.admin, &target.id, slots).await?)
}

/// Why the last move of slots failed that the engine made from one node to the other; `None` where it did not.
pub async fn failure(source: &mut Side, target: &mut Side) -> Option<String> {
    let given = slot_migrations::last_failure(&mut source.admin, End::Giver).await;
    if given.is_some() { given } else { slot_migrations::last_failure(&mut target.admin, End::Getter).await }
}

/// Moves slots key by key, a group after the other, while `go_on` says so; a group that has begun is moved as a whole. How many keys have
/// moved.
pub async fn by_keys(
    [source, target]: [&mut Side; 2],
    slots: &SlotSet,
    login: Option<&Login>,
    pace: &mut Pace,
    go_on: impl Fn() -> bool,
) -> Result<u64, MoveError> {
    let (giver, getter) = (source.id.clone(), target.id.clone());
    let (mut rest, mut moved) = (slots.clone(), 0);
    while !rest.is_empty() && go_on() {
        let group = rest.first(GROUP);
        rest.remove(&group);
        target.set(&group, "IMPORTING", &giver).await?;
        source.set(&group, "MIGRATING", &getter).await?;
        moved += empty([&mut *source, &mut *target], &group, login, pace).await?;
        target.set(&group, "NODE", &getter).await?;
        source.set(&group, "NODE", &getter).await?;
    }
    Ok(moved)
}

/// Moves keys until the giver has none of these slots.
async fn empty(
    [source, target]: [&mut Side; 2],
    slots: &SlotSet,
    login: Option<&Login>,
    pace: &mut Pace,
) -> Result<u64, MoveError> {
    let (mut moved, mut tried, mut expected) = (0, 0, None);
    loop {
        let filled = source.filled(slots).await?;
        if filled.is_empty() {
            return Ok(moved);
        }
        let expected = *expected.get_or_insert_with(|| filled.iter().map(|(_, count)| count).sum::<u64>());
        if tried > expected.saturating_mul(2).saturating_add(MAX_BATCH as u64) {
            return Err(MoveError::Refilled { address: source.address });
        }
        let keys = source.batch(&filled, pace.batch).await?;
        let count = keys.iter().map(|keys| keys.len() as u64).sum::<u64>();
        (moved, tried) = (moved + count, tried + count.max(1));
        let begun = Instant::now();
        let commands: Vec<Cmd> = keys.iter().map(|keys| migrate(target.address, keys, login)).collect();
        source.hand_over(commands).await?;
        let took = begun.elapsed();
        let (source_late, target_late) = try_join(source.latency(), target.latency()).await?;
        pace.record(took, source_late.max(target_late));
        if let Some(pause) = pace.pause() {
            sleep(pause).await;
        }
    }
}

/// How many keys of which slots make a batch of `count`.
fn first_keys(filled: &[(u16, u64)], count: usize) -> impl Iterator<Item = (u16, u64)> {
    let mut room = count as u64;
    filled.iter().map_while(move |(slot, keys)| {
        let taken = room.min(*keys);
        room -= taken;
        (taken > 0).then_some((*slot, taken))
    })
}

/// Those of the first keys that are not more than a batch may hold, or the first one alone.
fn within_bytes(keys: Vec<Vec<Vec<u8>>>, sizes: &[Option<u64>]) -> Vec<Vec<Vec<u8>>> {
    let mut bytes: u64 = 0;
    let fit = sizes.iter().take_while(|size| {
        bytes = bytes.saturating_add(size.unwrap_or(0));
        bytes <= MAX_BATCH_BYTES
    });
    let mut room = fit.count().max(1);
    let fit = keys.into_iter().map(|mut keys| {
        keys.truncate(room);
        room -= keys.len();
        keys
    });
    fit.filter(|keys| !keys.is_empty()).collect()
}

fn migrate(target: SocketAddr, keys: &[Vec<u8>], login: Option<&Login>) -> Cmd {
    let mut command = redis::cmd("MIGRATE");
    command.arg(target.ip().to_string()).arg(target.port()).arg("").arg(0).arg(BATCH_WITHIN.as_millis() as u64).arg("REPLACE");
    if let Some(Login { user, password }) = login {
        command.arg("AUTH2").arg(user).arg(password);
    }
    command.arg("KEYS").arg(keys);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_grow_while_nobody_waits_and_shrink_where_somebody_does() {
        let (mut pace, short, long) = (Pace::default(), BEARABLE / 10, BEARABLE * 4);
        (0..20).for_each(|_| pace.record(short, short));
        assert_eq!((pace.batch, pace.pause), (MAX_BATCH, short));
        pace.record(long, short);
        assert_eq!((pace.batch, pace.pause), (MAX_BATCH / 2, long), "as long as it took");
        for _ in 0..20 {
            pace.record(short, long);
        }
        assert_eq!((pace.batch, pace.pause), (1, MAX_PAUSE), "servers that are busy are left alone");
        assert_eq!((pace.pause(), pace.pause()), (Some(MAX_PAUSE), None));
        pace.record(BEARABLE, BEARABLE);
        assert_eq!(pace.batch, 1, "neither fast nor slow");
        let mut pace = Pace::default();
        pace.record(MIN_PAUSE / 2, MIN_PAUSE / 2);
        assert_eq!(pace.pause(), None);
        pace.record(MIN_PAUSE / 2, MIN_PAUSE / 2);
        assert_eq!(pace.pause(), Some(MIN_PAUSE), "short ones are added up");
    }

    #[test]
    fn batches_hold_so_many_keys_and_bytes() {
        let filled = [(3, 10), (4, 1), (9, 50), (12, 1)];
        let wanted = |count| first_keys(&filled, count).collect::<Vec<_>>();
        assert_eq!(wanted(16), [(3, 10), (4, 1), (9, 5)]);
        assert_eq!((wanted(10), wanted(100)), (vec![(3, 10)], filled.to_vec()));
        let keys = vec![vec![b"a".to_vec(), b"b".to_vec()], Vec::new(), vec![b"c".to_vec()], vec![b"d".to_vec()]];
        let third = MAX_BATCH_BYTES / 3;
        let sizes = |first: u64| [Some(first), None, Some(third), Some(third)];
        assert_eq!(within_bytes(keys.clone(), &sizes(third)), [keys[0].clone(), keys[2].clone(), keys[3].clone()]);
        assert_eq!(within_bytes(keys.clone(), &sizes(third + 2)), [keys[0].clone(), keys[2].clone()]);
        assert_eq!(within_bytes(keys.clone(), &sizes(MAX_BATCH_BYTES * 2)), [keys[0][..1].to_vec()], "alone");
    }

    #[test]
    fn keys_of_any_bytes_go_with_a_login() {
        let login = Login { user: "larder".to_owned(), password: "secret".to_owned() };
        let keys = [b"a b".to_vec(), vec![0, 255]];
        let packed = migrate(SocketAddr::from(([127, 0, 0, 1], 7000)), &keys, Some(&login)).get_packed_command();
        let text = String::from_utf8_lossy(&packed).replace("\r\n", " ");
        assert!(text.starts_with("*13 $7 MIGRATE $9 127.0.0.1 $4 7000 $0  $1 0 $4 5000 $7 REPLACE $5 AUTH2"), "{text}");
        assert!(packed.ends_with(b"$4\r\nKEYS\r\n$3\r\na b\r\n$2\r\n\x00\xff\r\n"), "{text}");
    }
}
