//! Connections for large replies, so that other clients' commands do not wait behind them.
//!
//! Nobody knows a reply's size before it comes: the first large one of a client travels on the shared connection. From then on
//! the client's commands take another connection to each server, together with those of few other such clients, or of none;
//! after many small replies in a row they come back. A client changes lane only when all its commands are answered, so that its
//! order is kept.
//!
//! A slow reader that is alone on its connection holds nobody up: it is waited for, and its replies stay with the server.

use std::cell::Cell;

/// A reply of this size is large. Measured on loopback, through a sidecar: 64 KiB take one round trip of a small command more than a
/// small command, 256 KiB two to four more, 1 MiB ten or more.
pub const LARGE_REPLY_BYTES: usize = 256 * 1024;
/// The most connections of a worker to a server for large replies, per protocol and database. Further clients share them.
const MOST_BULK_LANES: usize = 8;
/// After so many commands in a row without a large reply a client goes back to the shared connection.
const SMALL_IN_A_ROW: u16 = 1024;

/// Which replies a client has got lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sizing {
    /// Small ones.
    #[default]
    Small,
    /// A large one, on the shared connection.
    Grown,
    /// It has a lane for large replies. So many small replies, and it goes back.
    Large {
        /// How many are left.
        patience: u16,
    },
}

impl Sizing {
    /// After a large reply.
    pub fn after_large(self) -> Self {
        match self {
            Self::Small | Self::Grown => Self::Grown,
            Self::Large { .. } => Self::on_large_lane(),
        }
    }

    /// On a lane for large replies.
    pub fn on_large_lane() -> Self {
        Self::Large { patience: SMALL_IN_A_ROW }
    }
}

/// How many clients of a worker use each lane for large replies.
#[derive(Debug, Default)]
pub struct BulkLanes {
    clients: [Cell<u32>; MOST_BULK_LANES],
}

impl BulkLanes {
    /// Enters a client into the lane that the fewest use. Never zero, which stands for the shared connection.
    pub fn enter(&self) -> u8 {
        let (mut best, mut fewest) = (0, u32::MAX);
        for (index, clients) in self.clients.iter().enumerate() {
            if clients.get() < fewest {
                (best, fewest) = (index, clients.get());
            }
        }
        self.clients[best].set(fewest + 1);
        best as u8 + 1
    }

    /// Takes a client out of a lane. Nothing, for the shared connection.
    pub fn leave(&self, bulk: u8) {
        if let Some(clients) = self.lane(bulk) {
            clients.set(clients.get().saturating_sub(1));
        }
    }

    /// How many clients use a lane. Zero for the shared connection.
    pub fn clients(&self, bulk: u8) -> u32 {
        self.lane(bulk).map_or(0, Cell::get)
    }

    fn lane(&self, bulk: u8) -> Option<&Cell<u32>> {
        usize::from(bulk).checked_sub(1).and_then(|index| self.clients.get(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_spread_over_the_lanes() {
        let lanes = BulkLanes::default();
        let entered: Vec<u8> = (0..MOST_BULK_LANES).map(|_| lanes.enter()).collect();
        assert!((1..=MOST_BULK_LANES as u8).all(|bulk| entered.contains(&bulk) && lanes.clients(bulk) == 1));
        lanes.leave(3);
        lanes.leave(0);
        assert_eq!((lanes.clients(3), lanes.enter(), lanes.clients(3)), (0, 3, 1));
        assert_eq!(lanes.clients(lanes.enter()), 2);
    }
}
