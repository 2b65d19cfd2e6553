//! The outstanding misses of one key in this pod, and what a SET that meets them may be.
//!
//! A SET may be the fill of any nil that this pod gave and whose load may still run, or an update. It is stored under a generation
//! only where all of those have it: then every load in question began after the generation did, and an update is newer still.
//!
//! Which nils a SET ends is the hard part. On an exclusive connection it ends that connection's. A pool sends a load's GET and SET
//! over different connections, and a multiplexed one carries many loads. So a SET always counts against one nil: the youngest of its
//! own connection, else the youngest of another. The latter is *matched*: it no longer speaks against other connections' SETs, but
//! its own connection's next SET may still be its fill. As long as each nil brings at most one SET, and updates delete, as many nils
//! stay outstanding as loads run; and since every SET ends all older generations in the cache, what stays outstanding is refused.
//!
//! Three kinds of nils speak, and only the first that has any is heard. Else a single load that never ends in a SET (not found, for
//! example) would make all fills after the next deletion ambiguous for ten leases.
//!
//! 1. The youngest of the SET's own connection, and all that are not older than [`Rule::overlap`].
//! 2. Those not older than the rule's memory.
//! 3. Those whose SET has been seen less than [`Rule::settle`] ago: on a shared connection that SET may have been somebody else's
//!    update, and any client may send a SET twice.
//!
//! A nil older than a lease whose connection was told of the same miss again is *lent*: either an actor has given its load up and asks
//! anew, or a pool has lent the connection to somebody else while the load goes on. The wire does not say which. So it speaks with the
//! first kind, to SETs of its own connection and to those of connections that have no nil. Each of them may have been its load's, and was
//! counted against a younger nil: then it stands for that one's load, which may end over any connection. So as long as that may last it
//! speaks to all. It does all this until a lease after the first SET that was refused for its sake, and then for the loads that it
//! stands for, but no others. So what was given up keeps others from being stored for a lease, or two, once.
//!
//! What a SET has ended speaks on while the SET is on its way: see [`under_way`](super::under_way).

use smallvec::SmallVec;

use super::{Doubt, Generation, Millis, Rule, Verdict};

/// As many nils of one key are told apart; more become a crowd, which may be anybody's.
const MOST_APART: usize = 256;
/// Stands for the connections of a crowd.
const CROWD: u64 = u64::MAX;
/// Stands for a connection that is not known.
const NOBODY: u64 = 0;

/// How much is known of a nil's load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It may run.
    Live,
    /// Another connection sent a SET: the load may have switched connections.
    Matched,
    /// Its own connection sent a SET.
    Over,
}

/// The nil that a SET was counted against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Under which generation it was given, where that is known.
    pub generation: Option<Generation>,
}

/// One nil.
#[derive(Debug, Clone, Copy)]
struct Miss {
    connection: u64,
    generation: Option<Generation>,
    since: Millis,
    /// From when its age counts.
    at: Millis,
    /// When a SET counted against it; as `since` until then.
    seen: Millis,
    state: State,
    /// Its connection was told of the same miss again.
    lent: bool,
    /// When a SET was first refused for its sake, after it had been lent for longer than a lease.
    refused: Option<Millis>,
    /// Until when the loads may go on whose nils were counted off by SETs that may have been its own load's.
    stands_until: Millis,
}

impl Miss {
    fn new(connection: u64, generation: Option<Generation>, now: Millis) -> Self {
        let (since, at, seen, state) = (now, now, now, State::Live);
        Self { connection, generation, since, at, seen, state, lent: false, refused: None, stands_until: 0 }
    }

    fn age(&self, now: Millis) -> Millis {
        now.saturating_sub(self.at)
    }

    /// Whether its load may have outlasted its lease, while its connection was lent to somebody else.
    fn is_late(&self, rule: &Rule, now: Millis) -> bool {
        let is_old = now.saturating_sub(self.since) >= rule.lease && rule.overlap.is_some();
        self.lent && is_old && self.state == State::Live && now < self.end(rule)
    }

    /// A SET counts against it. Returns what it was before.
    fn count(&mut self, state: State, now: Millis) -> State {
        self.seen = now;
        std::mem::replace(&mut self.state, state)
    }

    /// Until when it matters.
    fn end(&self, rule: &Rule) -> Millis {
        if self.state == State::Over {
            return self.seen + rule.settle;
        }
        let memory = self.at + rule.memory;
        self.refused.map_or(memory, |at| self.stands_until.max(at + rule.lease))
    }
}

/// The outstanding misses of one key, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Misses(SmallVec<[Miss; 2]>);

impl Misses {
    /// Remembers a nil.
    pub fn add(&mut self, connection: u64, generation: Option<Generation>, rule: &Rule, now: Millis) {
        self.prune(rule, now);
        self.0.iter_mut().filter(|miss| miss.connection == connection).for_each(|miss| miss.lent = true);
        self.drop_given_up(connection, rule, now);
        if self.0.len() >= MOST_APART {
            let same = self.0.iter().all(|miss| miss.generation == generation);
            self.0.clear();
            self.0.push(Miss::new(CROWD, generation.filter(|_| same), now));
            return;
        }
        self.0.push(Miss::new(connection, generation, now));
    }

    /// Remembers that a SET counted against a nil and perhaps was never executed, so that older generations may still stand.
    pub fn add_doubt(&mut self, now: Millis) {
        self.0.push(Miss::new(NOBODY, None, now));
    }

    /// What a SET on `connection` may be, where loads take `load_ms` of late.
    pub fn judge(&self, connection: u64, rule: &Rule, load_ms: f64, now: Millis) -> Verdict {
        let overlap = rule.overlap(load_ms);
        let own = self.0.iter().rev().find(|miss| miss.connection == connection && miss.state != State::Over);
        let is_own = |miss: &Miss| miss.connection == CROWD || own.is_some_and(|own| std::ptr::eq(own, miss));
        let is_live = |miss: &Miss| miss.state == State::Live && miss.age(now) < rule.memory;
        let is_late = |miss: &Miss| Self::hears_late(own, miss, now) && miss.is_late(rule, now);
        self.agree(|miss| is_own(miss) || (is_live(miss) && miss.age(now) < overlap) || is_late(miss))
            .or_else(|| self.agree(is_live))
            .or_else(|| self.agree(|miss| miss.state != State::Live && now < miss.seen + rule.settle))
            .unwrap_or(Verdict::Update)
    }

    /// Whether a lent nil speaks to a SET, given the youngest nil of the latter's connection. Where it stands for a younger load, that may
    /// end over any connection.
    fn hears_late(own: Option<&Miss>, lent: &Miss, now: Millis) -> bool {
        now < lent.stands_until || own.is_none_or(|own| own.connection == lent.connection)
    }

    /// Whether a SET on `connection` is likely to be the fill of a nil that was given there.
    pub fn is_loading(&self, connection: u64, rule: &Rule, now: Millis) -> bool {
        let is_own = |miss: &Miss| miss.connection == connection && miss.state != State::Over;
        self.0.iter().any(|miss| is_own(miss) && miss.age(now) < rule.lease)
    }

    /// When a connection got the nil that its next SET is likely to end.
    pub fn since(&self, connection: u64) -> Option<Millis> {
        Some(self.0.iter().rev().find(|miss| miss.connection == connection && miss.state != State::Over)?.since)
    }

    /// Whether a client of `connection` was told of the miss within a lease, and whether or not it has sent a SET since: what its
    /// connection carries behind that SET may have missed before.
    pub fn was_told(&self, connection: u64, rule: &Rule, now: Millis) -> bool {
        self.0.iter().any(|miss| miss.connection == connection && now.saturating_sub(miss.since) < rule.lease)
    }

    /// The generation of a connection's own nil.
    #[cfg(test)]
    pub(super) fn own(&self, connection: u64) -> Option<Generation> {
        self.0.iter().rev().find(|miss| miss.connection == connection && miss.state != State::Over)?.generation
    }

    /// `None`: none is `heard`.
    fn agree(&self, heard: impl Fn(&Miss) -> bool) -> Option<Verdict> {
        let mut heard = self.0.iter().filter(|miss| heard(miss)).map(|miss| miss.generation);
        let first = heard.next()?;
        let (mut same, mut dated) = (true, first.is_some());
        for other in heard {
            same &= other == first;
            dated &= other.is_some();
        }
        Some(match first {
            Some(generation) if same => Verdict::Fill(generation),
            _ if dated => Verdict::Ambiguous(Doubt::Mixed),
            _ => Verdict::Ambiguous(Doubt::Undated),
        })
    }

    /// The load under `generation` that began on `connection` is over. `false`: there is none.
    pub fn end_of(&mut self, connection: u64, generation: Generation, rule: &Rule, now: Millis) -> bool {
        let is_it =
            |miss: &Miss| miss.connection == connection && miss.generation == Some(generation) && miss.state != State::Over;
        let found = self.0.iter().rposition(is_it).map(|own| _ = self.0[own].count(State::Over, now));
        self.prune(rule, now);
        found.is_some()
    }

    /// A SET on `connection` has been judged: one load is over. Returns the nil that it was counted against, if it was against any.
    pub fn end_one(&mut self, connection: u64, rule: &Rule, verdict: Verdict, now: Millis) -> Option<Counted> {
        if let Verdict::Ambiguous(_) = verdict {
            self.note_refused(connection, rule, now);
        }
        let is_live = |miss: &Miss| miss.state == State::Live && ![CROWD, NOBODY].contains(&miss.connection);
        let own = self.0.iter().rposition(|miss| miss.connection == connection && miss.state != State::Over);
        let own_nil = own.map(|own| self.0[own]);
        let counted = match own.map(|own| (own, self.0[own].count(State::Over, now))) {
            Some((own, State::Live)) => Some(own),
            _ => {
                let other = self.0.iter().rposition(is_live);
                other.inspect(|other| _ = self.0[*other].count(State::Matched, now))
            }
        };
        // The SET may have been the fill of an older nil, which then stands for the younger one's load: it lasts as long, but so
        // that it cannot be handed on for ever.
        if let Some(counted) = counted {
            let at = self.0[counted].at;
            if let Some(heir) = self.0[..counted].iter_mut().rfind(|miss| is_live(miss)) {
                heir.at = heir.at.max(at.min(heir.since + rule.lease));
            }
            // So does one that is lent.
            let stands =
                |miss: &&mut Miss| miss.refused.is_none_or(|refused| now < refused + rule.lease) && miss.is_late(rule, now);
            for lent in self.0.iter_mut().filter(stands).filter(|lent| Self::hears_late(own_nil.as_ref(), lent, now)) {
                lent.stands_until = lent.stands_until.max(at + rule.lease);
            }
        }
        let ended = counted.map(|counted| Counted { generation: self.0[counted].generation });
        self.drop_given_up(connection, rule, now);
        self.prune(rule, now);
        ended
    }

    /// A SET on `connection` is refused, perhaps for the sake of nils that are lent.
    fn note_refused(&mut self, connection: u64, rule: &Rule, now: Millis) {
        let own = self.0.iter().rev().find(|miss| miss.connection == connection && miss.state != State::Over).copied();
        let late = self.0.iter_mut().filter(|miss| Self::hears_late(own.as_ref(), miss, now) && miss.is_late(rule, now));
        late.for_each(|miss| miss.refused = miss.refused.or(Some(now)));
    }

    /// Who asks again, or sends a SET, has given up what is older than a lease, except that a pool may have lent the connection to
    /// somebody else: then what no SET was counted against may go on.
    fn drop_given_up(&mut self, connection: u64, rule: &Rule, now: Millis) {
        let goes_on = |miss: &Miss| match miss.state {
            State::Live => rule.overlap.is_some(),
            State::Matched => false,
            State::Over => true,
        };
        self.0.retain(|miss| miss.connection != connection || goes_on(miss) || miss.age(now) < rule.lease);
    }

    /// Drops what no longer matters.
    pub fn prune(&mut self, rule: &Rule, now: Millis) {
        self.0.retain(|miss| now < miss.end(rule));
    }

    /// When the last of them ends. `None`: there are none.
    pub fn end(&self, rule: &Rule) -> Option<Millis> {
        self.0.iter().map(|miss| miss.end(rule)).max()
    }

    /// Drops what is older than a lease, as though each connection were one actor's.
    #[cfg(test)]
    pub(super) fn forget_late(&mut self, connection: u64, rule: &Rule, now: Millis) {
        self.0.retain(|miss| miss.connection != connection || miss.state == State::Over || miss.age(now) < rule.lease);
    }

    /// No nil that is lent stands for a load longer than until a lease after the first SET that was refused for its sake.
    #[cfg(test)]
    pub(super) fn stand_briefly(&mut self, rule: &Rule) {
        let briefly = |miss: &Miss| miss.refused.map_or(miss.stands_until, |at| miss.stands_until.min(at + rule.lease));
        self.0.iter_mut().for_each(|miss| miss.stands_until = briefly(miss));
    }

    /// What speaks to SETs on `connection` if lent nils never speak to those of connections with a nil of their own.
    #[cfg(test)]
    pub(super) fn without_lent(&self, connection: u64, rule: &Rule, now: Millis) -> Self {
        let own = self.0.iter().rev().find(|miss| miss.connection == connection && miss.state != State::Over);
        let speaks = |miss: &&Miss| own.is_none_or(|own| own.connection == miss.connection) || !miss.is_late(rule, now);
        Self(self.0.iter().filter(speaks).copied().collect())
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
