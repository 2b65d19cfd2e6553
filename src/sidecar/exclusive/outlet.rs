//! Sends what a [`LongCommand`] keeps, and what guards its keys, to a server, no faster than the server takes it.

use std::ops::Range;
use std::rc::Rc;

use super::connection::{Dedicated, Owed};
use super::long_command::{LongCommand, LongKey};
use super::spool::SpoolError;
use super::stream::{MOST_UNSENT_BYTES, MOST_WHOLE_BYTES, Passed, settle};
use super::turn::{Turn, Want, turn};
use crate::sidecar::commands::{Access, Effect};
use crate::sidecar::engine::ttl;
use crate::sidecar::patterns::cache_aside::writes;
use crate::sidecar::resp::CommandArgs;
use crate::sidecar::session::{Reader, Session};
use crate::sidecar::upstream::broken::Broken;

/// How much is read from the file at a time.
const CHUNK_BYTES: u64 = 64 * 1024;
/// So many commands of ours are sent before their replies are waited for.
const MOST_OWED: u32 = 1024;

/// Why not all was sent.
#[derive(Debug)]
pub enum Failure {
    /// The session is over.
    Gone,
    /// The connection is lost.
    Lost(Broken),
    /// The kept bytes are.
    Spool(SpoolError),
}

/// Bytes to be sent.
#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    Kept(Range<u64>),
}

/// The way from a spool to a server.
#[derive(Debug)]
pub struct Outlet<'a> {
    /// The client.
    pub reader: &'a mut Reader,
    /// The server.
    pub connection: &'a mut Dedicated,
    command: &'a LongCommand,
    /// The slot that the server has.
    slot: u16,
    batch: Vec<Piece>,
    batched: u64,
}

impl<'a> Outlet<'a> {
    /// For `command`, towards the server of `slot`.
    pub fn new(reader: &'a mut Reader, connection: &'a mut Dedicated, command: &'a LongCommand, slot: u16) -> Self {
        Self { reader, connection, command, slot, batch: Vec::new(), batched: 0 }
    }

    /// Sends bytes.
    pub async fn bytes(&mut self, bytes: Vec<u8>) -> Result<(), Failure> {
        self.batched += bytes.len() as u64;
        self.batch.push(Piece::Bytes(bytes));
        if self.batched >= CHUNK_BYTES { self.flush().await } else { Ok(()) }
    }

    /// Sends a range of what is kept.
    pub async fn kept(&mut self, mut range: Range<u64>) -> Result<(), Failure> {
        while !range.is_empty() {
            let middle = range.end.min(range.start + CHUNK_BYTES);
            self.batched += middle - range.start;
            self.batch.push(Piece::Kept(range.start..middle));
            range.start = middle;
            if self.batched >= CHUNK_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Hands what was collected to the connection, and waits until it has room for more.
    pub async fn flush(&mut self) -> Result<(), Failure> {
        let batch = std::mem::take(&mut self.batch);
        self.batched = 0;
        let kept = batch.iter().filter_map(|piece| if let Piece::Kept(range) = piece { Some(range.clone()) } else { None });
        let kept = self.command.bytes(kept.collect()).await.map_err(Failure::Spool)?;
        let mut rest = &kept[..];
        for piece in &batch {
            match piece {
                Piece::Bytes(bytes) => self.connection.queue(bytes),
                Piece::Kept(range) => {
                    let (own, others) = rest.split_at(((range.end - range.start) as usize).min(rest.len()));
                    self.connection.queue(own);
                    rest = others;
                }
            }
        }
        self.make_room().await
    }

    async fn make_room(&mut self) -> Result<(), Failure> {
        while self.connection.unsent() > MOST_UNSENT_BYTES {
            let want = Want { unsent_below: MOST_UNSENT_BYTES / 2, slot: self.slot, answers_soon: true, ..Want::default() };
            match turn(self.reader, Some(&mut *self.connection), want).await {
                Turn::Room | Turn::Settled | Turn::Input | Turn::Due => {}
                Turn::Ended | Turn::Gone | Turn::Late => return Err(Failure::Gone),
                Turn::Lost(broken) => return Err(Failure::Lost(broken)),
            }
        }
        Ok(())
    }

    /// Sends all that was collected, and waits until all is answered.
    pub async fn settle(&mut self) -> Result<(), Failure> {
        self.flush().await?;
        match settle(self.reader, self.connection, self.slot).await {
            Passed::Whole => Ok(()),
            Passed::Gone => Err(Failure::Gone),
            Passed::Lost(broken) => Err(Failure::Lost(broken)),
        }
    }

    /// Sends the commands that guard `keys`, which were written. How many. All commands before them are whole.
    pub async fn guards(&mut self, session: &Rc<Session>, keys: impl Iterator<Item = LongKey>) -> Result<u32, Failure> {
        let (mut sent, mut unsettled) = (0, 0);
        for key in keys {
            let own = self.guard(session, key).await?;
            sent += own;
            unsettled += own;
            if unsettled >= MOST_OWED {
                self.settle().await?;
                unsettled = 0;
            }
        }
        self.flush().await?;
        Ok(sent)
    }

    async fn guard(&mut self, session: &Rc<Session>, key: LongKey) -> Result<u32, Failure> {
        let needs = Needs::of(self.command, &key);
        let mut sent = 0;
        if needs.ttl
            && let Some(lifetime) = self.command.policy().lifetime_of(key.rule)
        {
            for around in ttl::guards_around(&lifetime, session.worker().random()) {
                self.connection.owe(Owed::Nobody);
                self.bytes(around.before).await?;
                self.kept(key.as_argument()).await?;
                self.bytes(around.behind).await?;
                sent += 1;
            }
        }
        if needs.removal {
            self.connection.owe(Owed::Nobody);
            for before in ttl::removal_around(key.length as usize, key.slot) {
                self.bytes(before).await?;
                self.kept(key.as_text()).await?;
            }
            sent += 1;
        }
        if needs.verdict {
            sent += self.judge(session, key).await?;
        }
        Ok(sent)
    }

    /// A fill of a key that is leased is judged as any other; what is doubtful is removed.
    async fn judge(&mut self, session: &Rc<Session>, key: LongKey) -> Result<u32, Failure> {
        let text = self.command.bytes(vec![key.as_text()]).await.map_err(Failure::Spool)?;
        let buffer = [self.command.spec.name.as_bytes(), &text].concat();
        let name = self.command.spec.name.len() as u32;
        let ranges = [0..name, name..name + key.length, 0..0];
        let mut removal = Vec::new();
        let count = writes::guard(session, self.command.spec, &CommandArgs::new(&buffer, &ranges), &mut removal);
        (0..count).for_each(|_| self.connection.owe(Owed::Nobody));
        self.bytes(removal).await?;
        Ok(count)
    }
}

/// What must follow a command for one of its keys.
#[derive(Debug, Clone, Copy)]
struct Needs {
    ttl: bool,
    /// Its companions go.
    removal: bool,
    /// It may be one that a client was told to load.
    verdict: bool,
}

impl Needs {
    fn of(command: &LongCommand, key: &LongKey) -> Self {
        let policy = command.policy();
        let writes = command.spec.access == Access::Write && policy.lifetime_of(key.rule).is_some();
        // A longer key is never loaded or leased: the read that would do it is too long to be held.
        let may_be_missed = (key.length as usize) < MOST_WHOLE_BYTES;
        let has_companions = policy.loads(key.rule) || policy.leases(key.rule);
        Self {
            ttl: writes && key.effect == Effect::Write,
            removal: writes && ttl::changes(key.effect) && has_companions && may_be_missed,
            verdict: writes && policy.leases(key.rule) && may_be_missed && matches!(command.spec.name, "mset" | "msetnx"),
        }
    }
}

/// Whether any of `keys`, which `command` names, must be guarded.
pub fn needs_guards(command: &LongCommand, mut keys: impl Iterator<Item = LongKey>) -> bool {
    keys.any(|key| {
        let needs = Needs::of(command, &key);
        needs.ttl || needs.removal
    })
}
