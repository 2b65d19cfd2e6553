//! The wire: resumable, bounded scanners over RESP2 and RESP3, and an encoder.

mod args;
pub mod command;
pub mod encode;
pub mod reply;

pub use args::CommandArgs;
pub use command::{CommandScan, CommandScanner, CommandTail, ProtocolError};
pub use reply::{ReplyError, ReplyScanner};

/// The version of the wire protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Protocol {
    /// What every client speaks.
    #[default]
    Resp2,
    /// After `HELLO 3`.
    Resp3,
}
