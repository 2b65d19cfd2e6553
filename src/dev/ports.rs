//! Ports for servers, asked from the system.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

/// Below this, systems hand out no port by themselves. A port that they do hand out could be taken by any outgoing connection
/// while a killed server is away, and a client that keeps dialling it could even be connected to itself.
const CEILING: u16 = 32_000;
const FLOOR: u16 = 12_000;
const ATTEMPTS: usize = 200;

/// A port that nobody else can take until the reservation is dropped, just before its server starts.
#[derive(Debug)]
pub struct Reservation {
    listener: TcpListener,
}

impl Reservation {
    /// Reserves a free port on loopback.
    pub fn any() -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            if let Ok(reservation) = Self::at((Ipv4Addr::LOCALHOST, fastrand::u16(FLOOR..CEILING)).into()) {
                return Ok(reservation);
            }
        }
        Self::at((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// Reserves this address; port 0 stands for any.
    pub fn at(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address)? })
    }

    /// Reserves the address; with port 0, a free one of the same host.
    pub fn at_or_any(address: SocketAddr) -> io::Result<Self> {
        let loopback = address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST);
        if address.port() == 0 && loopback { Self::any() } else { Self::at(address) }
    }

    /// Where it is.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
