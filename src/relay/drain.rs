//! How a partition is drained, step by step, from a claim to its end. Pure: it says what to ask of the journal and of origins, and is told
//! what they answered; a simulation plays both.
//!
//! 1. Entries are read from the front of the partition, where those that are done are trimmed.
//! 2. Each origin that is to be told of them is taken: from then on no relay before this one can change anything there.
//! 3. The batch's [plan](super::plan) is carried out.
//! 4. What the origins have is no longer dirty, by its version, and the batch is trimmed, under the fence of the claim.
//!
//! An answer that does not come, or says that something is in trouble, changes nothing: the same is asked again. Only a refusal of the very
//! entry makes a dead letter. Whoever learns that he is fenced off has nothing more to ask.

use std::collections::BTreeMap;

use super::plan::{Account, Item, Plan, Step, Told};

/// An origin of a batch's entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// `None`: it keeps an account. Else how many entries it is told at once.
    pub at_once: Option<usize>,
}

/// A batch as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Its entries, in order; each origin is an index into `targets`.
    pub items: Vec<Item>,
    /// The origins.
    pub targets: Vec<Target>,
    /// How many bytes the journal ever took, up to the last entry.
    pub through: u64,
}

/// What a relay may do at an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// By what the origin knows it.
    pub fence: u64,
    /// Up to where it has everything.
    pub position: u64,
}

/// What to ask next.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    /// The journal, for the entries at its front.
    Read,
    /// This origin, to take the partition there. The fence is to be this or more.
    Take {
        /// Its name.
        origin: &'a str,
        /// The claim's fence.
        least: u64,
    },
    /// The journal, which of these entries' keys have a dead letter, and of which version.
    Parked(Vec<usize>),
    /// This origin, to make these in one transaction, under this fence; its position is then that of the last.
    Tell {
        /// Its name.
        origin: &'a str,
        /// What it gave when it was taken.
        fence: u64,
        /// What to make.
        entries: &'a [Told],
    },
    /// This origin, which keeps no account, to make each of these.
    TellEach {
        /// Its name.
        origin: &'a str,
        /// What to make.
        entries: &'a [Told],
    },
    /// The journal, to make this entry a dead letter, and to keep it safe.
    Park {
        /// Its index.
        index: usize,
        /// What the origin said.
        why: &'a str,
    },
    /// The journal, to trim up to `upto`, and to forget that keys are dirty.
    Finish {
        /// The last entry's version.
        upto: u64,
        /// As the batch has it.
        through: u64,
        /// The entries that origins have as the last of their keys.
        made: &'a [usize],
    },
    /// Nobody: another relay has the partition.
    Nothing,
}

/// A claim of a partition, and how far it is with the batch at its front.
#[derive(Debug)]
pub struct Drain {
    fence: u64,
    holds: BTreeMap<String, Hold>,
    batch: Option<Batch>,
    plan: Option<Plan>,
    fenced: bool,
}

impl Drain {
    /// Begins under a claim with this fence.
    pub fn new(fence: u64) -> Self {
        Self { fence, holds: BTreeMap::new(), batch: None, plan: None, fenced: false }
    }

    /// The claim's fence.
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// The batch under way.
    pub fn batch(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// How often the batch under way was halved.
    pub fn splits(&self) -> u64 {
        self.plan.as_ref().map_or(0, Plan::splits)
    }

    /// What to ask. The same until an answer is told.
    pub fn next(&self) -> Ask<'_> {
        if self.fenced {
            return Ask::Nothing;
        }
        let Some(batch) = &self.batch else { return Ask::Read };
        let open = batch.targets.iter().find(|target| target.at_once.is_none() && !self.holds.contains_key(&target.name));
        if let Some(target) = open {
            return Ask::Take { origin: &target.name, least: self.fence };
        }
        let Some(plan) = &self.plan else { return Ask::Parked(self.passed(batch)) };
        match plan.next() {
            Step::Tell { origin, entries } => {
                let target = &batch.targets[origin];
                match self.holds.get(&target.name) {
                    Some(hold) => Ask::Tell { origin: &target.name, fence: hold.fence, entries },
                    None => Ask::TellEach { origin: &target.name, entries },
                }
            }
            Step::Park { index, why } => Ask::Park { index, why },
            Step::Finish(made) => {
                let upto = batch.items.last().map_or(0, |item| item.version);
                Ask::Finish { upto, through: batch.through, made }
            }
        }
    }

    /// Entries of the batch that their origin has passed.
    fn passed(&self, batch: &Batch) -> Vec<usize> {
        let position = |item: &Item| batch.targets.get(item.origin).and_then(|target| self.holds.get(&target.name));
        let has = |item: &Item| position(item).is_some_and(|hold| item.version <= hold.position);
        batch.items.iter().enumerate().filter(|(_, item)| has(item)).map(|(index, _)| index).collect()
    }

    /// The journal gave this batch; an empty one changes nothing.
    pub fn read(&mut self, batch: Batch) {
        if batch.items.is_empty() {
            return;
        }
        self.batch = Some(batch);
        if let Ask::Parked(passed) = self.next()
            && passed.is_empty()
        {
            self.parked_before(&[]);
        }
    }

    /// The origin is taken.
    pub fn taken(&mut self, hold: Hold) {
        if let Ask::Take { origin, .. } = self.next() {
            let origin = origin.to_owned();
            self.holds.insert(origin, hold);
        }
        if let Ask::Parked(passed) = self.next()
            && passed.is_empty()
        {
            self.parked_before(&[]);
        }
    }

    /// What the journal knows of dead letters of the keys that [`Ask::Parked`] asked for, in its order.
    pub fn parked_before(&mut self, versions: &[Option<u64>]) {
        let Some(batch) = &self.batch else { return };
        let passed = self.passed(batch);
        let parked: Vec<u64> = passed
            .iter()
            .zip(versions)
            .filter(|(index, version)| **version == Some(batch.items[**index].version))
            .map(|(index, _)| batch.items[*index].version)
            .collect();
        let account = |target: &Target| match (target.at_once, self.holds.get(&target.name)) {
            (None, Some(hold)) => Account::Kept(hold.position),
            (at_once, _) => Account::None { at_once: at_once.unwrap_or(1) },
        };
        let accounts: Vec<Account> = batch.targets.iter().map(account).collect();
        self.plan = Some(Plan::new(batch.items.clone(), &accounts, |item| parked.contains(&item.version)));
    }

    /// The origin has made what it was told.
    pub fn told(&mut self) {
        let moved = match self.next() {
            Ask::Tell { origin, entries, .. } => entries.last().map(|told| (origin.to_owned(), told.at)),
            _ => None,
        };
        if let Some((origin, at)) = moved
            && let Some(hold) = self.holds.get_mut(&origin)
        {
            hold.position = at;
        }
        if let Some(plan) = &mut self.plan {
            plan.told();
        }
    }

    /// The origin refuses what it was told.
    pub fn refused(&mut self, why: &str) {
        if let Some(plan) = &mut self.plan {
            plan.refused(why);
        }
    }

    /// What came of each of what an origin without an account was told.
    pub fn told_each(&mut self, outcomes: Vec<Option<Result<(), String>>>) {
        if let Some(plan) = &mut self.plan {
            plan.told_each(outcomes);
        }
    }

    /// The entry is a dead letter.
    pub fn parked(&mut self) {
        if let Some(plan) = &mut self.plan {
            plan.parked();
        }
    }

    /// The batch is trimmed.
    pub fn finished(&mut self) {
        (self.batch, self.plan) = (None, None);
    }

    /// Another relay has the partition, as the journal or an origin says.
    pub fn fenced(&mut self) {
        self.fenced = true;
    }
}
