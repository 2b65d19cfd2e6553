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
//! 1. Those of the SET's own connection, and those not older than a lease.
//! 2. Those not older than the rule's memory.
//! 3. Those whose SET has been seen, while they are not older than [`Rule::settle`]: on a shared connection that SET may have been
//!    somebody else's update.

use smallvec::SmallVec;

use super::{Generation, Millis, Rule, Verdict};

/// As many nils of one key are told apart; more become a crowd.
const MOST_APART: usize = 16;
/// Stands for the connections of a crowd.
const CROWD: u64 = 0;

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

/// One nil.
#[derive(Debug, Clone, Copy)]
struct Miss {
    connection: u64,
    generation: Option<Generation>,
    at: Millis,
    state: State,
}

impl Miss {
    fn age(&self, now: Millis) -> Millis {
        now.saturating_sub(self.at)
    }

    /// Until when it matters.
    fn end(&self, rule: &Rule) -> Millis {
        self.at + if self.state == State::Over { rule.settle } else { rule.memory }
    }
}

/// The outstanding misses of one key, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Misses(SmallVec<[Miss; 2]>);

impl Misses {
    /// Remembers a nil.
    pub fn add(&mut self, connection: u64, generation: Option<Generation>, rule: &Rule, now: Millis) {
        self.prune(rule, now);
        // An actor that asks again, long after, has given its first load up.
        self.0.retain(|miss| miss.connection != connection || miss.age(now) < rule.lease);
        if self.0.len() >= MOST_APART {
            let same = self.0.iter().all(|miss| miss.generation == generation);
            self.0.clear();
            self.0.push(Miss { connection: CROWD, generation: generation.filter(|_| same), at: now, state: State::Live });
            return;
        }
        self.0.push(Miss { connection, generation, at: now, state: State::Live });
    }

    /// What a SET on `connection` may be.
    pub fn judge(&self, connection: u64, rule: &Rule, now: Millis) -> Verdict {
        let is_own = |miss: &Miss| miss.connection == connection && miss.state != State::Over;
        let is_live = |miss: &Miss| miss.state == State::Live && miss.age(now) < rule.memory;
        self.agree(|miss| is_own(miss) || (is_live(miss) && miss.age(now) < rule.lease))
            .or_else(|| self.agree(is_live))
            .or_else(|| self.agree(|miss| miss.age(now) < rule.settle))
            .unwrap_or(Verdict::Update)
    }

    /// `None`: none is `heard`.
    fn agree(&self, heard: impl Fn(&Miss) -> bool) -> Option<Verdict> {
        let mut heard = self.0.iter().filter(|miss| heard(miss)).map(|miss| miss.generation);
        let first = heard.next()?;
        Some(match first {
            Some(generation) if heard.all(|other| other == first) => Verdict::Fill(generation),
            _ => Verdict::Ambiguous,
        })
    }

    /// A SET on `connection` has been judged: one load is over.
    pub fn end_one(&mut self, connection: u64, rule: &Rule, now: Millis) {
        let mut misses = self.0.iter_mut().rev();
        let own = misses.find(|miss| miss.connection == connection && miss.state != State::Over);
        let was_live = own.map(|own| std::mem::replace(&mut own.state, State::Over) == State::Live);
        if was_live != Some(true) {
            let is_live = |miss: &&mut Miss| miss.connection != CROWD && miss.state == State::Live;
            if let Some(other) = self.0.iter_mut().rev().find(is_live) {
                other.state = State::Matched;
            }
        }
        self.0.retain(|miss| miss.connection != connection || miss.age(now) < rule.lease);
        self.prune(rule, now);
    }

    /// Drops what no longer matters.
    pub fn prune(&mut self, rule: &Rule, now: Millis) {
        self.0.retain(|miss| now < miss.end(rule));
    }

    /// When the last of them ends. `None`: there are none.
    pub fn end(&self, rule: &Rule) -> Option<Millis> {
        self.0.iter().map(|miss| miss.end(rule)).max()
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
