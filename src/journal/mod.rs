//! The journal of what is written behind: writes that are acknowledged, and that their origin has not got yet.
//!
//! Sidecars append, one relay applies. A journal lies in the cache's own servers, as [`PARTITIONS`] partitions; a key's writes are all in
//! one of them, in their order. Each partition is a handful of keys in one slot, so that one script changes all that belongs together:
//!
//! | key | type | what it holds |
//! |---|---|---|
//! | `…:log` | stream | the [entries](Entry), by their [`Version`] |
//! | `…:dirty` | hash | for each key that the origin has an older value of, the [last write](Held) |
//! | `…:head` | hash | `last`: the greatest version given; `in`, `out`: bytes ever appended and trimmed; `position`: up to where all is applied; `fence`: the relay's |
//! | `…:relay` | string | who applies now, with a time to live |
//! | `…:dead` | stream | dead letters: entries that the origin refuses |
//! | `…:parked` | hash | for each key with a dead letter, that entry's version |
//!
//! None but `…:relay` has a time to live: servers that evict volatile keys alone never drop one.
//!
//! Beside it lies what relays note of [databases' changes](feed), and the queue of [loads] that they make for sidecars.
//!
//! This layer knows names, forms and [scripts], and sends nothing. [`model`] is what the scripts are expected to do.

mod entry;
pub mod feed;
pub mod letters;
mod level;
pub mod loads;
pub mod model;
mod place;
pub mod scripts;

pub use entry::{Change, Entry, FormError, Held, Version, weight};
pub use level::Level;
pub use place::{PARTITIONS, Partition, partition_of};
