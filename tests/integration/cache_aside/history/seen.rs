//! What came of histories.

use std::fmt::Write as _;
use std::time::Duration;

use super::super::total;
use crate::support::sidecar::Sidecar;

/// One command of so many may fail, or be lost with its connection. About one in twenty-five is.
const MOST_ERRORS: u64 = 8;

/// What clients saw.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub hits: u64,
    pub misses: u64,
    pub fills: u64,
    pub writes: u64,
    /// Commands that were told to try again, or that nobody knows what became of them, and those lost with a connection.
    pub errors: u64,
    /// Reads behind which other commands stood, while a client of their connection loaded their key: they were told to repeat it.
    pub cut_short: u64,
    /// For how long the slowest command was waited for.
    pub longest: Duration,
    /// Planned failovers, and servers that answered nothing for longer than a lease.
    pub failovers: u64,
    pub stops: u64,
    /// TTLs that servers were asked for, of keys and companions that were there.
    pub ttls: u64,
    /// Fills that the sidecars did not store.
    pub refused: Refused,
    /// Reads that waited for another client's load and were given its value.
    pub woken: u64,
    /// Values past their TTL, and values loaded anew before it.
    pub early_or_stale: u64,
    /// Times that a rule gave up its leases: from then on nothing is shown.
    pub disarmed: u64,
    /// What must never happen.
    pub wrong: Vec<String>,
}

/// Fills that were not stored, by reason.
#[derive(Debug, Default, Clone, Copy)]
pub struct Refused {
    /// What they were loaded under had ended: the key was written, deleted, evicted, or filled by another.
    pub late: u64,
    /// They may have come of a load that began before something was written, or of one that began after.
    pub mixed: u64,
    /// They may have come of a load of which it is not known since when nothing was written.
    pub undated: u64,
}

impl Refused {
    pub fn by(sidecars: &[Sidecar]) -> Self {
        // The part before the whole, which goes on growing.
        let undated = total(sidecars, "undated_fills");
        Self { late: total(sidecars, "late_fills"), mixed: total(sidecars, "ambiguous_fills") - undated, undated }
    }

    pub fn add(&mut self, other: &Self) {
        self.late += other.late;
        self.mixed += other.mixed;
        self.undated += other.undated;
    }

    pub fn total(&self) -> u64 {
        self.late + self.mixed + self.undated
    }
}

impl Seen {
    /// Several histories together.
    pub fn sum(all: &[Seen]) -> Self {
        let mut sum = Self::default();
        for seen in all {
            sum.hits += seen.hits;
            sum.misses += seen.misses;
            sum.fills += seen.fills;
            sum.writes += seen.writes;
            sum.errors += seen.errors;
            sum.cut_short += seen.cut_short;
            sum.longest = sum.longest.max(seen.longest);
            sum.failovers += seen.failovers;
            sum.stops += seen.stops;
            sum.ttls += seen.ttls;
            sum.refused.add(&seen.refused);
            sum.woken += seen.woken;
            sum.early_or_stale += seen.early_or_stale;
            sum.disarmed += seen.disarmed;
            sum.wrong.extend(seen.wrong.iter().cloned());
        }
        sum
    }

    /// Whether somebody read what is older than an acknowledged write, or another key's.
    pub fn is_outdated(&self) -> bool {
        self.wrong.iter().any(|wrong| wrong.contains("was acknowledged and"))
    }

    /// What must not be: something wrong, a rule without leases, or so many errors that little else was shown.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.wrong.clone();
        if self.disarmed > 0 {
            faults.push(format!("{} times a rule gave up its leases", self.disarmed));
        }
        let commands = self.hits + self.misses + self.fills + self.writes + self.errors;
        if self.errors * MOST_ERRORS > commands {
            faults.push(format!("{} of {commands} commands failed", self.errors));
        }
        faults
    }

    /// A report for people.
    pub fn report(&self, seeds: u64, took: Duration) -> String {
        let mut text = format!(
            "# Soak: cache-aside under faults\n\n`make soak` writes this. {seeds} histories against real servers and sidecars (half of \
             them under Sentinel, half in Cluster), {} s.\nWhat happens in each: `tests/integration/cache_aside/history`.\n\n| | |\n|---|---|\n",
            took.as_secs()
        );
        for (what, count) in [
            ("values read", self.hits),
            ("reads that were told of a miss", self.misses),
            ("fills sent", self.fills),
            (
                "of them not stored: late, since the key was written, deleted, evicted or filled behind the load's beginning",
                self.refused.late,
            ),
            ("of them not stored: doubtful, since loads from before and after a change were under way", self.refused.mixed),
            ("of them not stored: doubtful, since of a load it was not known what had been written since", self.refused.undated),
            ("reads that waited and were given another client's load", self.woken),
            ("stale values served, and values loaded anew before their TTL", self.early_or_stale),
            ("changes of the database, each acknowledged by the cache", self.writes),
            ("commands that failed, or were lost with a connection", self.errors),
            ("reads that must not wait, since their connection carried more, and were told to try again", self.cut_short),
            ("planned failovers", self.failovers),
            ("servers that answered nothing for longer than a lease", self.stops),
            ("milliseconds that the slowest command took", self.longest.as_millis() as u64),
            ("TTLs that were looked at, of keys and companions that were there", self.ttls),
            (
                "**wrong: values older than an acknowledged change or of another key, keys without a TTL, waits without an end**",
                self.wrong.len() as u64,
            ),
        ] {
            let _ = writeln!(text, "| {what} | {count} |");
        }
        text += "\nThat most fills are not stored is the load's nature. Each key changes a dozen times a second. One load in ten never ends in \
                 a SET, and it is heard for a lease, which is a second here: a SET that meets loads from before and after a change is not \
                 stored, since connections may be shared, and it may be any of theirs.\n";
        for wrong in &self.wrong {
            let _ = writeln!(
                text,
                "
- {wrong}"
            );
        }
        text
    }
}
