//! What the sidecars of a binding have told, put together. Pure data, bounded, to be shown in a status and in events.

use std::collections::BTreeMap;

use crate::policy::heartbeat::RuleBeat;

/// The most generations that are told apart.
pub const MAX_GENERATIONS: usize = 8;
/// The most conspicuous things that are told at once.
pub const MAX_NOTICES: usize = 20;

/// What the sidecars of one binding have told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// Whether heartbeats are being heard now. Where not, the rest is as it was when they last were.
    pub listening: bool,
    /// Sidecars that live: each has spoken within three of its intervals.
    pub live: u32,
    /// How many sidecars the fleet's key tells sidecars of; what their shares of connections are made of. `None`: it has not been written.
    pub fleet: Option<u32>,
    /// The generation that the cache is to hold.
    pub wanted: u64,
    /// Live sidecars with just that in force.
    pub current: u32,
    /// Live sidecars by the generation in force, the newest first; of [`MAX_GENERATIONS`] at most, those with the most sidecars.
    pub generations: Vec<(u64, u32)>,
    /// Live sidecars to which no snapshot has come yet.
    pub without_snapshot: u32,
    /// Live sidecars that refused a snapshot since the one in force.
    pub refused: Option<Refusal>,
    /// The newest form of snapshots that every live sidecar understands. `None`: nobody has spoken, or not everybody had the time to.
    pub understands: Option<u32>,
    /// Clients that are connected to live sidecars.
    pub clients: u64,
    /// Live sidecars that run for two minutes and more, and that no client has ever come to.
    pub unused: u32,
    /// What was counted for each rule of the snapshot, and under [`crate::policy::heartbeat::UNMATCHED`], since this operator listens:
    /// by processes that are gone as well.
    pub rules: BTreeMap<String, RuleBeat>,
    /// Of that, what was counted in the last five to ten minutes.
    pub recent: BTreeMap<String, RuleBeat>,
    /// Live sidecars whose counts had no room here, or that left rules out: the sums lack something.
    pub partly_counted: u32,
    /// A newer snapshot than the wanted one that lies in the cache, which is not replaced: its generation. Whoever makes snapshots has to
    /// go on from there.
    pub newer_in_cache: Option<u64>,
    /// What a person should know, [`MAX_NOTICES`] at most.
    pub notices: Vec<Notice>,
}

/// Sidecars that refused a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// How many.
    pub sidecars: u32,
    /// The newest generation that was refused, where it could be read.
    pub generation: Option<u64>,
    /// Why, as one of those that refused just that says: short, and without control characters.
    pub reason: String,
}

/// What a person should know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// No client has come to sidecars within two minutes.
    SidecarUnused {
        /// How many.
        sidecars: u32,
        /// Of so many.
        of: u32,
    },
    /// No read matched a rule for ten minutes, though others were used. Writes are not told of.
    NeverMatched {
        /// The rule.
        rule: String,
    },
    /// Many reads are of keys that nobody fills.
    NeverFilled {
        /// The rule.
        rule: String,
        /// How many reads, lately.
        reads: u64,
        /// Of so many.
        of: u64,
    },
    /// Many reads waited for another client's load for too long.
    WaitsTimeOut {
        /// The rule.
        rule: String,
        /// How many reads, lately.
        reads: u64,
        /// Of so many that found nothing.
        of: u64,
    },
}

impl Notice {
    /// The reason of an event about it.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::SidecarUnused { .. } => "SidecarUnused",
            Self::NeverMatched { .. } => "RuleNeverMatched",
            Self::NeverFilled { .. } => "MissesNeverFilled",
            Self::WaitsTimeOut { .. } => "WaitsTimeOut",
        }
    }
    /// What it is about, whatever the numbers.
    pub fn subject(&self) -> (&'static str, &str) {
        let rule = match self {
            Self::SidecarUnused { .. } => "",
            Self::NeverMatched { rule } | Self::NeverFilled { rule, .. } | Self::WaitsTimeOut { rule, .. } => rule,
        };
        (self.reason(), rule)
    }
}
