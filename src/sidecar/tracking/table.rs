//! Which keys a worker has had registered for which of its clients. No I/O, no clock.
//!
//! A server says once that a key has changed, and then forgets who read it. So a key is registered before each read of a client that is
//! to hear of changes, unless it is registered already; what the server says is passed on to all who read it meanwhile.
//!
//! A message may overtake a reply, as they come on different connections. Where a read of the key is under way, its reply may show
//! what was before: the client is told once more behind it. Whether one is, the place of the client's last read of it tells.

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// A client, by its number.
pub type ClientId = u64;

/// A connection on which a server tells of changes. Never used twice.
pub type TrackerId = u64;

/// The most keys of a worker. Beyond, all are forgotten, and clients are told to do the same.
pub const MOST_KEYS: usize = 65_536;
/// The most bytes of their names.
pub const MOST_BYTES: usize = 16 * 1024 * 1024;
/// The most keys that one client is remembered to have read.
pub const MOST_KEYS_PER_CLIENT: usize = 16_384;

/// A client that has read a key, and the place of its last read of it.
pub type Holder = (ClientId, u32);

/// What a read must wait for.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing: the server knows of the key.
    Tracked,
    /// That the server knows of the key. Whether it must be told first.
    Waits(bool),
}

#[derive(Debug)]
enum State {
    /// The server has been told, and has not answered. These wait.
    Asked(SmallVec<[ClientId; 1]>),
    /// It has.
    Tracked,
}

#[derive(Debug)]
struct Entry {
    tracker: TrackerId,
    state: State,
    holders: SmallVec<[Holder; 1]>,
}

/// The table.
#[derive(Debug, Default)]
pub struct Table {
    entries: FxHashMap<Box<[u8]>, Entry>,
    bytes: usize,
    /// How many keys each client is remembered to have read.
    held: FxHashMap<ClientId, usize>,
}

impl Table {
    /// The tracker on which `key` was registered, or is about to be.
    pub fn tracker_of(&self, key: &[u8]) -> Option<TrackerId> {
        self.entries.get(key).map(|entry| entry.tracker)
    }

    /// `client` is about to read `key`, of the server that `tracker` leads to; no other tracker knows of the key.
    pub fn ask(&mut self, key: &[u8], tracker: TrackerId, client: ClientId) -> Asked {
        match self.entries.get_mut(key) {
            Some(Entry { state: State::Tracked, .. }) => Asked::Tracked,
            Some(Entry { state: State::Asked(waiters), .. }) => {
                waiters.push(client);
                Asked::Waits(false)
            }
            None => {
                let state = State::Asked(SmallVec::from_elem(client, 1));
                self.entries.insert(key.into(), Entry { tracker, state, holders: SmallVec::new() });
                self.bytes += key.len();
                Asked::Waits(true)
            }
        }
    }

    /// The read of `client` at `place` is handed on. `false`: no message will tell of a change of the key.
    pub fn hold(&mut self, key: &[u8], client: ClientId, place: u32) -> bool {
        let Some(entry) = self.entries.get_mut(key).filter(|entry| matches!(entry.state, State::Tracked)) else { return false };
        match entry.holders.iter_mut().find(|(holder, _)| *holder == client) {
            Some(holder) => holder.1 = place,
            None => {
                entry.holders.push((client, place));
                *self.held.entry(client).or_default() += 1;
            }
        }
        true
    }

    /// The server has answered the question about `key` on `tracker`: whether it tells of changes now. Those who waited.
    pub fn answered(&mut self, key: &[u8], tracker: TrackerId, tracked: bool) -> SmallVec<[ClientId; 1]> {
        let Some(entry) = self.entries.get_mut(key).filter(|entry| entry.tracker == tracker) else { return SmallVec::new() };
        let State::Asked(waiters) = &mut entry.state else { return SmallVec::new() };
        let waiters = std::mem::take(waiters);
        entry.state = State::Tracked;
        if !tracked {
            self.remove(key);
        }
        waiters
    }

    /// A server says on `tracker` that `key` has changed. Those who read it.
    pub fn invalidated(&mut self, key: &[u8], tracker: TrackerId) -> SmallVec<[Holder; 1]> {
        match self.entries.get(key) {
            // What is asked for now was asked after the change.
            Some(Entry { state: State::Tracked, tracker: known, .. }) if *known == tracker => self.remove(key),
            _ => SmallVec::new(),
        }
    }

    /// Forgets the keys for which `gone` holds, given each, its tracker, and whether the server has yet to answer. Who waited, and who
    /// has read any of them.
    pub fn forget(&mut self, mut gone: impl FnMut(&[u8], TrackerId, bool) -> bool) -> (Vec<ClientId>, Vec<ClientId>) {
        let (mut waiters, mut holders) = (Vec::new(), Vec::new());
        let held = &mut self.held;
        let bytes = &mut self.bytes;
        self.entries.retain(|key, entry| {
            let stays = !gone(key, entry.tracker, matches!(entry.state, State::Asked(_)));
            if !stays {
                *bytes -= key.len();
                if let State::Asked(waiting) = &entry.state {
                    waiters.extend_from_slice(waiting);
                }
                entry.holders.iter().for_each(|(client, _)| {
                    holders.push(*client);
                    release(held, *client);
                });
            }
            stays
        });
        holders.sort_unstable();
        holders.dedup();
        (waiters, holders)
    }

    /// Forgets what `client` has read.
    pub fn leave(&mut self, client: ClientId) {
        if self.held.remove(&client).is_none() {
            return;
        }
        let bytes = &mut self.bytes;
        self.entries.retain(|key, entry| {
            entry.holders.retain(|(holder, _)| *holder != client);
            let stays = !entry.holders.is_empty() || matches!(entry.state, State::Asked(_));
            if !stays {
                *bytes -= key.len();
            }
            stays
        });
    }

    /// Whether there is no room for `more` keys.
    pub fn is_full(&self, more: usize) -> bool {
        self.entries.len() + more > MOST_KEYS || self.bytes > MOST_BYTES
    }

    /// How many keys `client` is remembered to have read.
    pub fn held_by(&self, client: ClientId) -> usize {
        self.held.get(&client).copied().unwrap_or_default()
    }

    fn remove(&mut self, key: &[u8]) -> SmallVec<[Holder; 1]> {
        let Some(entry) = self.entries.remove(key) else { return SmallVec::new() };
        self.bytes -= key.len();
        entry.holders.iter().for_each(|(client, _)| release(&mut self.held, *client));
        entry.holders
    }
}

fn release(held: &mut FxHashMap<ClientId, usize>, client: ClientId) {
    if let Some(count) = held.get_mut(&client) {
        *count -= 1;
        if *count == 0 {
            held.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests;
