//! Which snapshot counts: the newest that can come into force, whichever way it came. No I/O.
//!
//! Two ways are never in step: the cache takes a second, a mounted file a minute, a failover loses the last writes, and a kubelet
//! may show what is long over. So the order of arrival says nothing, and generations say all.

use std::cmp::Reverse;
use std::sync::Arc;

use serde::Serialize;

use crate::policy::Snapshot;

/// How many snapshots are remembered that did not come into force, and may yet: what they lack may be on its way.
const MAX_WAITING: usize = 8;

/// How a snapshot came. Of two with the same generation, the file's counts: only the control plane writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    /// By the key in the cache.
    Cache,
    /// By the mounted file.
    File,
}

impl Way {
    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::File => "file",
        }
    }
}

/// A snapshot that can be read.
#[derive(Debug, Clone)]
pub struct Offer {
    /// How it came.
    pub way: Way,
    /// What it says.
    pub snapshot: Arc<Snapshot>,
    /// Tells its bytes from others'.
    pub fingerprint: u64,
}

type Rank = (u64, Way);

impl Offer {
    fn rank(&self) -> Rank {
        (self.snapshot.generation, self.way)
    }
}

/// What has been offered.
#[derive(Debug)]
pub struct Offers {
    /// Whether generations count. They do not where the file is the only way: then it says what is wanted.
    by_generation: bool,
    rank: fn(&Offer) -> Rank,
    /// The newest from the file: it tells where the cache is.
    file: Option<Offer>,
    /// What may come into force.
    waiting: Vec<Offer>,
    /// What is in force.
    held: Option<Offer>,
}

impl Offers {
    /// Where snapshots come by file and through the cache.
    pub fn both_ways() -> Self {
        Self { by_generation: true, ..Self::by_file() }
    }

    /// Where they come by file alone.
    pub fn by_file() -> Self {
        Self { by_generation: false, rank: Offer::rank, file: None, waiting: Vec::new(), held: None }
    }

    /// Another has come.
    pub fn add(&mut self, offer: Offer) {
        if !self.by_generation {
            self.waiting.clear();
        }
        if offer.way == Way::File && (!self.by_generation || self.file.as_ref().is_none_or(|file| self.is_at_least(&offer, file)))
        {
            self.file = Some(offer.clone());
        }
        if self.by_generation && self.held.as_ref().is_some_and(|held| !self.is_at_least(&offer, held)) {
            return;
        }
        let rank = (self.rank)(&offer);
        self.waiting.retain(|other| (self.rank)(other) != rank);
        if self.waiting.len() == MAX_WAITING {
            self.waiting.sort_by_key(|offer| Reverse((self.rank)(offer)));
            self.waiting.pop();
        }
        self.waiting.push(offer);
    }

    /// A snapshot from the file that cannot come into force tells where the cache is.
    pub fn add_place(&mut self, place: Offer) {
        if self.file.as_ref().is_none_or(|file| self.is_at_least(&place, file)) {
            self.file = Some(place);
        }
    }

    fn is_at_least(&self, offer: &Offer, other: &Offer) -> bool {
        (self.rank)(offer) >= (self.rank)(other)
    }

    /// The file's newest.
    pub fn file(&self) -> Option<&Offer> {
        self.file.as_ref()
    }

    /// What may be in force, the best first; what is in force is the last of them, for it may have to move with the cache.
    pub fn in_order(&self) -> Vec<Offer> {
        let mut offers = self.waiting.clone();
        offers.sort_by_key(|offer| Reverse((self.rank)(offer)));
        offers.extend(self.held.clone().filter(|_| self.by_generation));
        offers
    }

    /// `offer` is in force from now on.
    pub fn hold(&mut self, offer: &Offer) {
        let rank = (self.rank)(offer);
        self.waiting.retain(|other| (self.rank)(other) > rank);
        self.held = Some(offer.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;

    fn offer(way: Way, generation: u64) -> Offer {
        let json = format!(
            r#"{{"version":1,"requires":1,"generation":{generation},"unmatched":{{"bypass":{{}}}},
                "cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["127.0.0.1:7000"]}}}}}}}}"#
        );
        let snapshot = Arc::new(Snapshot::parse(json.as_bytes()).expect("valid"));
        Offer { way, snapshot, fingerprint: generation }
    }

    /// What is in force after each of `arrivals`, where `usable` says what can be.
    fn in_force_after(mut offers: Offers, arrivals: &[Rank], usable: &BTreeMap<Rank, bool>) -> Vec<Option<Rank>> {
        let mut all = Vec::new();
        for (generation, way) in arrivals {
            offers.add(offer(*way, *generation));
            if let Some(next) = offers.in_order().into_iter().find(|offer| usable[&offer.rank()]) {
                offers.hold(&next);
            }
            all.push(offers.held.as_ref().map(Offer::rank));
        }
        all
    }

    /// Whether the newest usable one of those that have come is in force at every moment, whatever comes when.
    fn holds(rank: fn(&Offer) -> Rank) -> bool {
        let ways = || prop_oneof![Just(Way::Cache), Just(Way::File)];
        let usable = proptest::collection::vec(any::<bool>(), 12);
        let arrivals = proptest::collection::vec((0u64..6, ways()), 1..25);
        TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() })
            .run(&(usable, arrivals), |(usable, arrivals)| {
                let all = (0u64..6).flat_map(|generation| [(generation, Way::Cache), (generation, Way::File)]);
                let usable: BTreeMap<Rank, bool> = all.zip(usable).collect();
                let got = in_force_after(Offers { rank, ..Offers::both_ways() }, &arrivals, &usable);
                for (at, got) in got.iter().enumerate() {
                    let want = arrivals[..=at].iter().filter(|rank| usable[rank]).max();
                    prop_assert_eq!(got.as_ref(), want);
                }
                Ok(())
            })
            .is_ok()
    }

    #[test]
    fn the_newest_that_can_be_in_force_is_whatever_comes_when() {
        assert!(holds(Offer::rank));
    }

    #[test]
    fn a_choice_by_anything_else_is_noticed() {
        assert!(!holds(|_| (0, Way::Cache)), "the last one wins");
        assert!(!holds(|offer| (u64::from(offer.way == Way::File), Way::Cache)), "the file wins");
        assert!(!holds(|offer| (offer.snapshot.generation, Way::Cache)), "of equals, the last one wins");
        assert!(!holds(|offer| (u64::MAX - offer.snapshot.generation, offer.way)), "the oldest wins");
    }

    #[test]
    fn one_that_lacks_something_may_come_into_force_later() {
        let mut offers = Offers::both_ways();
        offers.add(offer(Way::File, 1));
        offers.hold(&offer(Way::File, 1));
        offers.add(offer(Way::Cache, 2));
        offers.add(offer(Way::Cache, 1));
        assert_eq!(offers.in_order().iter().map(Offer::rank).collect::<Vec<_>>(), [(2, Way::Cache), (1, Way::File)]);
        for generation in 3..100 {
            offers.add(offer(Way::Cache, generation));
        }
        assert_eq!(offers.in_order().len(), MAX_WAITING + 1);
        assert_eq!(offers.in_order()[0].rank(), (99, Way::Cache));
    }

    #[test]
    fn a_place_is_no_policy() {
        let mut offers = Offers::both_ways();
        offers.add_place(offer(Way::File, 5));
        assert!(offers.in_order().is_empty() && offers.file().map(Offer::rank) == Some((5, Way::File)));
        offers.add_place(offer(Way::File, 4));
        offers.add(offer(Way::Cache, 6));
        assert_eq!(offers.in_order().iter().map(Offer::rank).collect::<Vec<_>>(), [(6, Way::Cache)]);
        assert_eq!(offers.file().map(Offer::rank), Some((5, Way::File)), "an older place, and what the cache says, are none");
        offers.add(offer(Way::File, 7));
        assert_eq!((offers.in_order().len(), offers.file().map(Offer::rank)), (2, Some((7, Way::File))));
    }

    #[test]
    fn the_file_alone_says_what_is_wanted() {
        let mut offers = Offers::by_file();
        for generation in [5, 3] {
            offers.add(offer(Way::File, generation));
            assert_eq!(offers.in_order()[0].rank(), (generation, Way::File));
            assert_eq!(offers.file().map(Offer::rank), Some((generation, Way::File)));
            offers.hold(&offer(Way::File, generation));
        }
    }
}
