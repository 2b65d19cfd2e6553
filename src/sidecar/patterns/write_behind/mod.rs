//! Write-behind: a value is acknowledged when it is in the [journal](crate::journal), on disk at every server that might serve it next. A
//! relay carries it to the origin later.
//!
//! 1. A mark beside the key says that a write is under way, as for a [write through](super::write_through); the key, its copies and the
//!    right to store what is loaded go, and replicas confirm it.
//! 2. The write is appended to its partition, and to the index of what the origin has not got: one script, refused where the partition is over its bound.
//! 3. The server and all replicas that might take its place have that on disk.
//! 4. The cache gets the value, unless another write of the key overlapped and is the later one by its version; the mark goes.
//!
//! Where the partition has no room and the rule lets it overflow, the sidecar tells the origin itself: it has the key's writes stay out of the
//! journal for so long, with a version of that moment, provided that the origin has all that was journalled before. So all that the origin is
//! told of a key, by whom ever, is in the order of the versions.
//!
//! A miss looks at the index before it asks the origin. It does so behind its lease: a lease stands only where no write has begun since, so what
//! it then stores is no older than what was acknowledged.
//!
//! Wherever a sidecar dies, the mark keeps loads from being stored until the append can come to nothing any more: it is refused by the
//! server after its time. What is left is a miss, and what the index says of it.

mod journaller;
#[cfg(test)]
mod tests;

pub use journaller::Journaller;
