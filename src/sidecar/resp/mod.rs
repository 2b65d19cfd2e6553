//! The wire: a resumable, bounded scanner over RESP2 and RESP3.

mod args;

pub use args::CommandArgs;
