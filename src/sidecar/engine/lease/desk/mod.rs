//! The decisions of one pod.
//!
//! The desk is touched by misses, by writes of armed rules (one look-up), and by connections that close; hits pass it by. Everything
//! it keeps is bounded: outstanding misses by [`MOST_MISSES`] (the oldest are then remembered by a hash only), reads that wait by
//! [`MOST_WAITING`] (more get nil at once), and each of either has an end.

mod holds;
mod keys;
mod requests;

use std::collections::VecDeque;
use std::rc::Rc;

use rustc_hash::FxHashMap;
use slab::Slab;
use smallvec::SmallVec;

use super::forgotten::Forgotten;
use super::misses::Misses;
use super::rates::{FIRST_LOAD_MS, Rates, RatesByRule};
use super::timers::{Due, Timers};
use super::under_way::UnderWay;
use super::{
    Asker, Begun, Command, Doubt, Effect, Generation, Millis, Missing, Mode, Name, Reader, Reply, Rule, Token, Verdict, Why,
    Written, key_hash,
};

/// As many outstanding misses are kept with their keys.
pub const MOST_MISSES: usize = 65_536;
/// As many reads of keys may wait.
pub const MOST_WAITING: usize = 65_536;
/// Somebody who waits looks again after this, then after twice as long, up to [`LAST_LOOK_MS`].
const FIRST_LOOK_MS: Millis = 100;
pub(super) const LAST_LOOK_MS: Millis = 400;

/// One pod's knowledge of leases. `V` is a value's bytes, cheap to clone.
#[derive(Debug)]
pub struct Desk<V> {
    random: fastrand::Rng,
    index: FxHashMap<u64, SmallVec<[usize; 1]>>,
    keys: Slab<Key>,
    requests: Slab<Request<V>>,
    connections: FxHashMap<u64, Connection>,
    timers: Timers,
    forgotten: Forgotten,
    /// Keys with outstanding misses, in the order of the first.
    order: VecDeque<(usize, u32)>,
    misses: usize,
    waiting: usize,
    /// Keys for which nobody waits any more, to be looked after at the end of an event.
    touched: Vec<usize>,
    rates: RatesByRule,
    /// For how long a nil counts as an outstanding miss, by the rule that keeps it longest.
    memory: Millis,
    /// Tells the tenants of a slot of `keys` or `requests` apart.
    tenants: u32,
    #[cfg(test)]
    pub(super) broken: Option<super::tests::Switch>,
}

/// What is known of one key.
#[derive(Debug)]
struct Key {
    name: Rc<Name>,
    hash: u64,
    tenant: u32,
    rule: Rule,
    misses: Misses,
    /// Its SETs with another verdict than [`Verdict::Update`] that are not answered.
    under_way: UnderWay,
    /// Whether it is in [`Desk::order`].
    in_order: bool,
    /// The BEGIN that is not answered: its random number.
    ask: Option<u64>,
    /// How many were sent.
    asks: u32,
    /// Whether another must follow it.
    again: bool,
    waiters: VecDeque<Waiter>,
    /// How many of `waiters` still wait.
    waiting: usize,
    held: Option<Held>,
    /// When the load began whose fill is being stored.
    filling_since: Option<Millis>,
    /// What `L` was last known to be. Whoever gets nil from now on loads later than it began.
    known: Option<Generation>,
    /// While the lease is known to be somebody's, or this pod's own: new reads wait without a BEGIN.
    taken_until: Millis,
    /// This pod's own lease, while the cache is away.
    local_until: Millis,
    look_at: Option<Millis>,
    look_pause: Millis,
    watched: bool,
    timer_at: Option<Millis>,
}

/// A part of a request that waits for its key.
#[derive(Debug, Clone, Copy)]
struct Waiter {
    request: usize,
    tenant: u32,
    part: usize,
    /// How many BEGINs had been sent when it came: what they found is older than its own miss.
    since_ask: u32,
}

/// A lease that a client of this pod holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    connection: u64,
    token: Token,
    since: Millis,
    until: Millis,
    /// A SET that may be its load's has been sent.
    ended: bool,
}

#[derive(Debug)]
struct Request<V> {
    tenant: u32,
    asker: Asker,
    parts: SmallVec<[Part<V>; 1]>,
    since: Millis,
    /// When its wait ends at the latest.
    until: Millis,
    /// It reads the key that its own connection loads.
    own: bool,
    /// It asks before the key expires, and its value is held back meanwhile.
    early: bool,
    /// It leads one of its keys: it must not wait for the others.
    won: bool,
    /// A later command of its client was sent: nothing that is found out now may answer it, and it must not wait.
    overtaken: bool,
}

#[derive(Debug)]
struct Part<V> {
    key: usize,
    state: PartState<V>,
}

#[derive(Debug)]
enum PartState<V> {
    /// BEGIN is not answered.
    Asking,
    /// Somebody else loads.
    Waiting,
    Done(Reply<V>),
}

#[derive(Debug, Default)]
struct Connection {
    requests: SmallVec<[usize; 2]>,
    /// Keys whose lease it took; those that it has lost since included.
    holds: SmallVec<[(usize, u32); 2]>,
}

impl<V: Clone> Desk<V> {
    /// A desk that knows nothing. Seeds must differ between pods, and between starts of one.
    pub fn new(seed: u64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            index: FxHashMap::default(),
            keys: Slab::new(),
            requests: Slab::new(),
            connections: FxHashMap::default(),
            timers: Timers::default(),
            forgotten: Forgotten::default(),
            order: VecDeque::new(),
            misses: 0,
            waiting: 0,
            touched: Vec::new(),
            rates: RatesByRule::default(),
            memory: 0,
            tenants: 0,
            #[cfg(test)]
            broken: None,
        }
    }

    /// Whether misses of a rule are tracked at the moment.
    pub fn is_armed(&self, rule: u16, now: Millis) -> bool {
        self.rates.get(rule).is_none_or(|rates| rates.is_armed(now))
    }

    /// The mean time from a holder's nil to its fill, in milliseconds.
    #[inline]
    pub fn load_ms(&self, rule: u16) -> f64 {
        self.rates.get(rule).map_or(FIRST_LOAD_MS, Rates::load_ms)
    }

    /// How long 99 of 100 loads of a rule took of late, where enough are known.
    pub fn load_p99(&self, rule: u16, now: Millis) -> Option<Millis> {
        self.rates.get(rule)?.load_p99(now)
    }

    /// For how long a read waits that does not find its key.
    pub fn wait(&self, rule: &Rule, now: Millis) -> Millis {
        let rates = self.rates.get(rule.id).filter(|_| rule.wait_follows);
        rates.map_or(rule.wait, |rates| rates.wait(rule.wait, now))
    }

    /// How many reads of keys wait.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many outstanding misses are kept with their keys.
    pub fn outstanding(&self) -> usize {
        self.misses
    }

    /// When [`Desk::tick`] is due.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.timers.next()
    }

    /// The rules changed, and with them their ids. What is outstanding stays.
    pub fn policy_changed(&mut self) {
        self.rates.clear();
    }

    // Reads.

    /// A read did not find `missing`.
    pub fn read_missed(&mut self, now: Millis, reader: Reader, missing: &[Missing<'_>], effects: &mut Vec<Effect<V>>) {
        let wait = missing.iter().map(|missing| self.wait(&missing.rule, now)).min().unwrap_or_default();
        let own_wait = self.own_wait(now, &reader, missing);
        let request = self.open_request(now, wait, reader.asker, false, reader.overtaken);
        if let Some(wait) = own_wait {
            self.requests[request].own = true;
            self.timers.push(now + wait, Due::Request(request as u32, self.requests[request].tenant));
        }
        for missing in missing {
            self.open_part(now, request, &reader, missing, effects);
        }
        self.settle(now, request, effects);
        self.finish_touched(now, effects);
    }

    /// A read could not be sent to the cache: this pod decides alone who loads.
    pub fn cache_away(&mut self, now: Millis, reader: Reader, missing: &[Missing<'_>], effects: &mut Vec<Effect<V>>) {
        let mut known = SmallVec::<[usize; 1]>::new();
        for missing in missing {
            if self.is_armed(missing.rule.id, now) {
                known.push(self.key(reader.database, missing.key, missing.rule));
            }
        }
        for key in &known {
            // They take part in this pod's own lease, without asking.
            let key = &mut self.keys[*key];
            key.taken_until = key.taken_until.max(now + 1);
        }
        self.read_missed(now, reader, missing, effects);
        for key in known {
            if self.keys.get(key).is_some_and(|key| key.ask.is_none()) {
                self.grant_locally(now, key, effects);
                self.finish(now, key, effects);
            }
        }
        self.finish_touched(now, effects);
    }

    /// A read found a value that is thought to live for `left`, and the dice say that it should refresh it. `true`: the value is held back
    /// until [`Effect::Early`]. `false`: it is passed on; somebody refreshes it already.
    pub fn expires_early(
        &mut self,
        now: Millis,
        asker: Asker,
        database: u32,
        missing: &Missing<'_>,
        left: Millis,
        effects: &mut Vec<Effect<V>>,
    ) -> bool {
        if !self.is_armed(missing.rule.id, now) || self.waiting >= MOST_WAITING {
            return false;
        }
        let key = self.key(database, missing.key, missing.rule);
        let entry = &self.keys[key];
        if entry.ask.is_some() || now < entry.taken_until.max(entry.local_until) {
            return false;
        }
        let request = self.open_request(now, missing.rule.wait, asker, true, false);
        self.wait_for(request, key);
        self.ask(key, Mode::Early { left }, effects);
        true
    }

    /// A client was told that a key is missing, and must not wait or lead: it watches keys, or asked in a transaction.
    pub fn told_nil(&mut self, now: Millis, reader: Reader, missing: &Missing<'_>, effects: &mut Vec<Effect<V>>) {
        if !self.is_armed(missing.rule.id, now) {
            return;
        }
        let key = self.key(reader.database, missing.key, missing.rule);
        let known = self.keys[key].known;
        self.remember(now, key, reader.asker.connection, known);
        self.finish(now, key, effects);
    }

    /// Whether a SET of the key may be something else than an update.
    pub fn is_outstanding(&mut self, now: Millis, database: u32, key: &[u8]) -> bool {
        self.forgotten.contains(key_hash(database, key), now)
            || self.find(database, key).is_some_and(|key| !self.keys[key].misses.is_empty())
    }

    /// The generation of the key's lease, as far as is known: a value that is loaded from now on may be stored under it.
    pub fn generation(&mut self, database: u32, key: &[u8]) -> Option<Generation> {
        self.find(database, key).and_then(|key| self.keys[key].known)
    }

    /// BEGIN was answered.
    pub fn begun(&mut self, now: Millis, name: &Name, fresh: u64, begun: Begun<V>, effects: &mut Vec<Effect<V>>) {
        let key = self.find(name.database, &name.key).filter(|key| self.keys[*key].ask == Some(fresh));
        let Some(key) = key else {
            // Nobody waits for it any more.
            if let Begun::Leased { token, .. } = begun {
                effects.push(Effect::GiveBack { name: Rc::new(name.clone()), token });
            }
            return;
        };
        let entry = &mut self.keys[key];
        entry.ask = None;
        entry.taken_until = 0;
        let ends_early = !matches!(begun, Begun::Leased { .. });
        #[cfg(test)]
        let ends_early = ends_early && self.broken != Some(super::tests::Switch::EarlyKept);
        if ends_early {
            self.end_early(now, key, effects);
        }
        match begun {
            Begun::Value(value) => self.found(now, key, &value, effects),
            Begun::Fresh => self.keys[key].again = true,
            Begun::Other => self.all_nil(now, key, None, effects),
            Begun::Shared { generation } => self.all_nil(now, key, Some(generation), effects),
            Begun::Leased { token, stale } => self.leased(now, key, token, stale, effects),
            Begun::Busy { generation, taker, stale, remaining } => {
                self.busy(now, key, Token { generation, taker }, stale, remaining, effects);
            }
            Begun::Failed => self.grant_locally(now, key, effects),
        }
        let entry = &mut self.keys[key];
        if std::mem::take(&mut entry.again) && entry.waiting > 0 {
            self.ask(key, Mode::Miss, effects);
        }
        self.finish(now, key, effects);
        self.finish_touched(now, effects);
    }

    /// A later read on the same connection found a value: those before it that still wait saw nothing newer.
    pub fn seen(&mut self, now: Millis, connection: u64, database: u32, key: &[u8], value: &V, effects: &mut Vec<Effect<V>>) {
        let Some(key) = self.find(database, key) else { return };
        for request in self.requests_of(connection) {
            let open = &self.requests[request];
            if !open.early && !open.overtaken && open.parts.len() == 1 && open.parts[0].key == key {
                self.resolve(request, 0, Reply::Value(value.clone()));
                self.settle(now, request, effects);
            }
        }
        self.finish(now, key, effects);
        self.finish_touched(now, effects);
    }

    /// A command arrives on a connection, before it is sent anywhere. Reads that wait on that connection are answered first, unless
    /// the command reads the very same key, or writes it and so may be the fill that they wait for.
    pub fn arrives(&mut self, now: Millis, connection: u64, command: Command<'_>, effects: &mut Vec<Effect<V>>) {
        if self.connections.get(&connection).is_none_or(|connection| connection.requests.is_empty()) {
            return;
        }
        let same = match command {
            Command::Get(database, key) | Command::Set(database, key) => self.find(database, key),
            Command::Other => None,
        };
        for request in self.requests_of(connection) {
            let open = &mut self.requests[request];
            if open.early || (open.parts.len() == 1 && Some(open.parts[0].key) == same) {
                continue;
            }
            open.overtaken = true;
            self.settle_as(now, request, Why::Unparked, effects);
        }
        self.finish_touched(now, effects);
    }

    // Writes.

    /// What a SET or its kin of a key of an armed rule may be that is queued, and may never be carried out: nothing ends by it.
    pub fn weigh(&mut self, now: Millis, connection: u64, database: u32, key: &[u8]) -> Verdict {
        self.judge(now, connection, database, key).1
    }

    /// A SET or its kin of a key of an armed rule arrives: how must it be sent? The effects are for after it has been sent. Where
    /// the verdict is not [`Verdict::Update`], [`Desk::wrote`] must follow.
    pub fn write(&mut self, now: Millis, connection: u64, database: u32, key: &[u8], effects: &mut Vec<Effect<V>>) -> Verdict {
        if self.keys.is_empty() && self.forgotten.is_empty() {
            return Verdict::Update;
        }
        let (found, verdict) = self.judge(now, connection, database, key);
        let Some(key) = found else { return verdict };
        let entry = &mut self.keys[key];
        if let Some(held) = &mut entry.held {
            // Who loads sends its SET over the connection of its nil, or over one that has none: a pool's.
            held.ended |= held.connection == connection || !entry.misses.is_loading(connection, &entry.rule, now);
        }
        if let Verdict::Fill(_) = verdict {
            // Its own nil tells when it began, also where its lease has ended meanwhile. A pool's SET comes over another connection.
            entry.filling_since = entry.misses.since(connection).or(entry.held.map(|held| held.since));
        }
        let ended = self.end_misses(key, |misses, rule| misses.end_one(connection, rule, verdict, now));
        #[cfg(test)]
        self.forget_late(now, key, connection);
        if verdict == Verdict::Update {
            if self.keys[key].waiting > 0 {
                self.look(key, effects);
            }
            self.finish(now, key, effects);
        } else {
            let Key { under_way, rule, .. } = &mut self.keys[key];
            under_way.add(connection, ended, rule, now);
        }
        verdict
    }

    fn judge(&mut self, now: Millis, connection: u64, database: u32, key: &[u8]) -> (Option<usize>, Verdict) {
        let is_forgotten = !self.forgotten.is_empty() && self.forgotten.contains(key_hash(database, key), now);
        let found = self.find(database, key);
        let verdict = match found.map(|key| &self.keys[key]) {
            _ if is_forgotten => Verdict::Ambiguous(Doubt::Forgotten),
            None => Verdict::Update,
            #[cfg(test)]
            Some(entry) if self.broken == Some(super::tests::Switch::OwnMissWins) && entry.misses.own(connection).is_some() => {
                entry.misses.own(connection).map_or(Verdict::Update, Verdict::Fill)
            }
            #[cfg(test)]
            Some(entry) if self.broken == Some(super::tests::Switch::UnderWayIgnored) => {
                entry.misses.judge(connection, &entry.rule, self.load_ms(entry.rule.id), now)
            }
            #[cfg(test)]
            Some(entry) if self.broken == Some(super::tests::Switch::LentUnheard) => {
                let misses = entry.misses.without_lent(connection, &entry.rule, now);
                misses.judge(connection, &entry.rule, self.load_ms(entry.rule.id), now)
            }
            Some(Key { misses, under_way, rule, .. }) => {
                let verdict = misses.judge(connection, rule, self.load_ms(rule.id), now);
                under_way.judge(connection, verdict, rule, now)
            }
        };
        (found, verdict)
    }

    /// A value was to be stored under the generation of a token that its client kept: so it says whose load is over, and where it was
    /// refused (`written` is not [`Written::Stored`]) nothing was written, and no other load's miss is.
    #[expect(clippy::too_many_arguments, reason = "a write has as many properties")]
    pub fn redeemed(
        &mut self,
        now: Millis,
        connection: u64,
        database: u32,
        key: &[u8],
        generation: Generation,
        written: Written,
        effects: &mut Vec<Effect<V>>,
    ) {
        let Some(found) = self.find(database, key) else { return };
        let is_stored = written == Written::Stored;
        self.end_misses(found, |misses, rule| {
            if !misses.end_of(connection, generation, rule, now) && is_stored {
                misses.end_one(connection, rule, Verdict::Fill(generation), now);
            }
        });
        if is_stored {
            return self.conclude(now, connection, found, written, effects);
        }
        let entry = &mut self.keys[found];
        if entry.held.is_some_and(|held| held.token.generation == generation) {
            self.rates.of(entry.rule.id).filled(None);
            // The lease may stand yet, under a later generation.
            self.give_back(found, effects);
            if self.keys[found].waiting > 0 {
                self.look(found, effects);
            }
        }
        self.finish(now, found, effects);
        self.finish_touched(now, effects);
    }

    /// What became of a write whose verdict was not [`Verdict::Update`].
    pub fn wrote(
        &mut self,
        now: Millis,
        connection: u64,
        database: u32,
        key: &[u8],
        written: Written,
        effects: &mut Vec<Effect<V>>,
    ) {
        let Some(key) = self.find(database, key) else {
            if written == Written::Failed {
                // All that was known of the key is over, but the load may not be whose miss was counted off.
                self.forgotten.insert(key_hash(database, key), self.memory, now);
            }
            return;
        };
        self.keys[key].under_way.answered(connection);
        self.conclude(now, connection, key, written, effects);
    }

    fn conclude(&mut self, now: Millis, connection: u64, key: usize, written: Written, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        let filling_since = entry.filling_since.take();
        match written {
            Written::Stored => {
                entry.known = None;
                if let Some(since) = filling_since.or(entry.held.map(|held| held.since)) {
                    self.rates.of(entry.rule.id).loaded(now.saturating_sub(since), now);
                }
                if let Some(held) = entry.held.take() {
                    let took = now.saturating_sub(held.since);
                    self.rates.of(entry.rule.id).filled(Some(took));
                }
            }
            Written::Removed => {
                entry.known = None;
                // Else the lease stands, though not its generation: those who wait, wait for its holder.
                if entry.held.is_some_and(|held| held.ended) {
                    self.rates.of(entry.rule.id).filled(None);
                    self.give_back(key, effects);
                }
            }
            Written::Unchanged | Written::Failed => {
                let is_doubtful = written == Written::Failed;
                #[cfg(test)]
                let is_doubtful = is_doubtful && self.broken != Some(super::tests::Switch::FailureUndoubted);
                if is_doubtful {
                    self.doubt(now, key);
                }
                let entry = &mut self.keys[key];
                if entry.held.is_some_and(|held| held.connection == connection) {
                    self.rates.of(entry.rule.id).filled(None);
                    self.give_back(key, effects);
                }
            }
        }
        let entry = &mut self.keys[key];
        (entry.taken_until, entry.local_until) = (0, 0);
        if entry.waiting > 0 {
            self.look(key, effects);
        }
        self.finish(now, key, effects);
        self.finish_touched(now, effects);
    }

    // What happens around.

    /// A connection is gone.
    pub fn closed(&mut self, now: Millis, connection: u64, effects: &mut Vec<Effect<V>>) {
        let Some(gone) = self.connections.remove(&connection) else { return };
        for request in gone.requests {
            self.drop_request(request);
        }
        for (key, tenant) in gone.holds {
            let is_holder = |key: &&Key| key.tenant == tenant && key.held.is_some_and(|held| held.connection == connection);
            if self.keys.get(key).filter(is_holder).is_some() {
                self.count_unfilled(now, key, effects);
                self.give_back(key, effects);
                if self.keys[key].waiting > 0 {
                    self.look(key, effects);
                }
                self.finish(now, key, effects);
            }
        }
        self.finish_touched(now, effects);
    }

    /// Something may have changed about a key: another pod's lease ended, listening for that has begun, or the key was deleted.
    pub fn wake(&mut self, now: Millis, database: u32, key: &[u8], effects: &mut Vec<Effect<V>>) {
        let Some(key) = self.find(database, key) else { return };
        if self.keys[key].waiting > 0 {
            self.look(key, effects);
            self.finish(now, key, effects);
        }
        self.finish_touched(now, effects);
    }

    /// Servers changed places: every lease ends.
    pub fn topology_changed(&mut self, now: Millis, effects: &mut Vec<Effect<V>>) {
        let keys: Vec<usize> = self.keys.iter().map(|(key, _)| key).collect();
        for key in keys {
            let entry = &mut self.keys[key];
            (entry.held, entry.known, entry.taken_until, entry.local_until) = (None, None, 0, 0);
            if entry.waiting > 0 {
                self.look(key, effects);
            }
            self.finish(now, key, effects);
        }
        self.finish_touched(now, effects);
    }

    /// Forgets a key's outstanding misses.
    #[cfg(test)]
    pub(super) fn forget_misses(&mut self, key: &[u8]) {
        if let Some(key) = self.find(0, key) {
            self.misses -= self.keys[key].misses.len();
            self.keys[key].misses = Misses::default();
        }
    }

    /// Time has passed: see [`Desk::next_deadline`].
    pub fn tick(&mut self, now: Millis, effects: &mut Vec<Effect<V>>) {
        while let Some(due) = self.timers.pop(now) {
            match due {
                Due::Request(request, tenant) => {
                    if self.requests.get(request as usize).is_some_and(|request| request.tenant == tenant) {
                        self.wait_is_over(now, request as usize, effects);
                    }
                }
                Due::Key(key, tenant) => {
                    if self.keys.get(key as usize).is_some_and(|key| key.tenant == tenant) {
                        self.attend(now, key as usize, effects);
                    }
                }
            }
        }
        self.finish_touched(now, effects);
    }
}
