//! Which of a server's connections a command takes.

use crate::sidecar::resp::Protocol;

/// What a client may ask of its connections to the servers, so that it shares them only with those that ask the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `CLIENT NO-TOUCH`: its commands do not keep keys from being evicted.
    NoTouch,
    /// `CLIENT IMPORT-SOURCE`: it writes what is being imported.
    ImportSource,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 2] = [Mode::NoTouch, Mode::ImportSource];

    const fn bit(self) -> u8 {
        match self {
            Mode::NoTouch => 0x10,
            Mode::ImportSource => 0x20,
        }
    }

    /// CLIENT's subcommand for it.
    pub const fn subcommand(self) -> &'static [u8] {
        match self {
            Mode::NoTouch => b"NO-TOUCH",
            Mode::ImportSource => b"IMPORT-SOURCE",
        }
    }
}

/// Whether a lane is for large replies, and its [`Mode`]s: the four low bits, and the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Share(u8);

/// Which of a node's connections a command needs. Its three bytes stand in each command that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Lane {
    /// The version of the protocol that its client speaks.
    pub protocol: Protocol,
    /// The database that its client selected.
    pub database: u8,
    /// With whom it shares them.
    pub share: Share,
}

impl Lane {
    const BULK: u8 = 0x0f;

    /// The shared connection of clients that speak `protocol` and selected `database`.
    pub fn of(protocol: Protocol, database: u8) -> Self {
        Self { protocol, database, share: Share(0) }
    }

    /// The same without a connection for large replies: for what is not a command of one client alone.
    pub fn shared(self) -> Self {
        self.with_bulk(0)
    }

    /// Zero for the connection that all clients share, else which of those for large replies; see [`bulk`](super::bulk).
    pub fn bulk(self) -> u8 {
        self.share.0 & Self::BULK
    }

    /// The same with another connection for large replies, or none.
    pub fn with_bulk(self, bulk: u8) -> Self {
        Self { share: Share((self.share.0 & !Self::BULK) | (bulk & Self::BULK)), ..self }
    }

    /// Whether its connections are in `mode`.
    pub fn has(self, mode: Mode) -> bool {
        self.share.0 & mode.bit() != 0
    }

    /// The same in or out of `mode`.
    pub fn with(self, mode: Mode, on: bool) -> Self {
        Self { share: Share(if on { self.share.0 | mode.bit() } else { self.share.0 & !mode.bit() }), ..self }
    }

    /// The same in no mode.
    pub fn plain(self) -> Self {
        Self { share: Share(self.share.0 & Self::BULK), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_lanes_for_large_replies_are_apart() {
        let lane = Lane::of(Protocol::Resp3, 7).with_bulk(8).with(Mode::NoTouch, true);
        assert_eq!((lane.bulk(), lane.has(Mode::NoTouch), lane.has(Mode::ImportSource)), (8, true, false));
        assert_eq!(lane.shared(), Lane::of(Protocol::Resp3, 7).with(Mode::NoTouch, true));
        let both = lane.with(Mode::ImportSource, true).with(Mode::NoTouch, false);
        assert_eq!((both.bulk(), both.has(Mode::NoTouch), both.has(Mode::ImportSource)), (8, false, true));
        assert_eq!(both.plain(), Lane::of(Protocol::Resp3, 7).with_bulk(8));
        assert_eq!(size_of::<Lane>(), 3);
    }
}
