//! What histories have shown.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write as _};

use super::clients::{Heard, World};

#[derive(Default)]
pub struct Seen {
    pub histories: usize,
    pub wrong: Vec<String>,
    pub made: usize,
    pub not_made: usize,
    pub unheard: usize,
    pub reads: usize,
    /// Reads that the cache served, through the sidecars that lived at the end.
    pub hits: u64,
    /// How often something was played again, since a server was replaced that was alive.
    pub again: usize,
    pub errors: BTreeMap<String, u64>,
}

impl Seen {
    pub fn new(wrong: Vec<String>, world: &World, hits: u64) -> Self {
        let writes = world.writes.lock().unwrap();
        let heard = |heard| writes.iter().filter(|write| write.heard == heard).count();
        Self {
            histories: 1,
            wrong,
            made: heard(Heard::Made),
            not_made: heard(Heard::NotMade),
            unheard: heard(Heard::Nothing),
            reads: world.reads.lock().unwrap().len(),
            hits,
            again: 0,
            errors: world.errors.lock().unwrap().clone(),
        }
    }

    pub fn sum(all: Vec<Self>) -> Self {
        all.into_iter().fold(Self::default(), |mut sum, other| {
            sum.histories += other.histories;
            sum.wrong.extend(other.wrong);
            sum.made += other.made;
            sum.not_made += other.not_made;
            sum.unheard += other.unheard;
            sum.reads += other.reads;
            sum.hits += other.hits;
            sum.again += other.again;
            other.errors.into_iter().for_each(|(text, count)| *sum.errors.entry(text).or_default() += count);
            sum
        })
    }

    #[track_caller]
    pub fn assert_right(&self) {
        assert!(self.wrong.is_empty(), "{} wrong:\n{}", self.wrong.len(), self.wrong[..self.wrong.len().min(20)].join("\n"));
    }

    /// What holds is not held of nothing, on a busy machine either.
    #[track_caller]
    pub fn assert_busy(&self) {
        let Self { histories, made, reads, hits, .. } = self;
        assert!(*made > 50 * histories && *reads > 200 * histories && *hits > 0, "{made} made, {reads} reads, {hits} hits");
    }

    /// All of it as a table, with `more`.
    pub fn table(&self, more: &[(&str, u64)]) -> String {
        let own = [
            ("writes that were acknowledged", self.made as u64),
            ("writes that were refused: none of them came to the database", self.not_made as u64),
            ("writes of which nobody heard what became", self.unheard as u64),
            ("reads", self.reads as u64),
            (
                "histories that were played again: they showed something wrong, after a server was replaced that was alive, which is not promised against",
                self.again as u64,
            ),
        ];
        let wrong = (
            "**wrong: values older than an acknowledged write, acknowledged writes that the database does not have, refused ones that it has, \
             values in the cache that it has not**",
            self.wrong.len() as u64,
        );
        let mut text = "| | |\n|---|---|\n".to_owned();
        for (what, count) in own.iter().chain(more).chain([&wrong]) {
            let _ = writeln!(text, "| {what} | {count} |");
        }
        self.wrong.iter().for_each(|wrong| {
            let _ = write!(text, "\n- {wrong}\n");
        });
        text
    }
}

impl Display for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { wrong, made, not_made, unheard, reads, hits, errors, .. } = self;
        write!(f, "{made} made, {not_made} not, {unheard} unheard; {reads} reads, {hits} hits; {} wrong; {errors:?}", wrong.len())
    }
}
