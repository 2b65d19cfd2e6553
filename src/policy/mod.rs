//! The vocabulary that both planes share: units, key patterns, rules and the snapshot. No I/O, no kube.

pub mod agent;
pub mod binding;
pub mod changes;
pub mod config_file;
mod cover;
pub mod digest;
pub mod events;
pub mod explain;
pub mod glob;
pub mod heartbeat;
mod journal_name;
pub mod pattern;
mod pattern_scan;
pub mod rule;
pub mod rule_index;
pub mod slots;
pub mod snapshot;
pub mod tags;
pub mod told;
pub mod units;
pub mod versions;

pub use journal_name::{JournalName, JournalNameError};
pub use pattern::{Captures, KeyPattern, PatternError};
pub use rule::{
    AtWaitEnd, CacheAside, Journal, Lifetime, Load, Mode, Overflow, Query, ReadThrough, ReplyForm, RowVersion, Rule, Stampede,
    Store, Strategy, Unmatched, Versioned, WriteBehind, WriteThrough,
};
pub use rule_index::{RuleIndex, RuleScan};
pub use snapshot::{Snapshot, SnapshotError};
pub use units::{Beta, ByteSize, Percent, Span, UnitError};
