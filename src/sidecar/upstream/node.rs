//! Where a server or a sentinel is.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::sync::Arc;

/// A host (name, IPv4 or IPv6 address) and a port. Cloning costs a reference count.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeAddr {
    host: Arc<str>,
    port: u16,
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address: write host:port, such as cache-0.shop.svc:6379, 10.0.0.7:6379 or [fd00::7]:6379")]
pub struct NodeAddrError(String);

impl NodeAddr {
    /// An address of its parts. The host comes without brackets.
    pub fn new(host: impl Into<Arc<str>>, port: u16) -> Self {
        Self { host: host.into(), port }
    }

    /// The host, an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for NodeAddr {
    type Err = NodeAddrError;

    /// Reads `host:port`, `[v6]:port`, and the servers' own `v6:port`, in which the last colon counts.
    fn from_str(text: &str) -> Result<Self, NodeAddrError> {
        let refuse = || NodeAddrError(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
        let port: u16 = port.parse().ok().filter(|port| *port > 0).ok_or_else(refuse)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').filter(|inner| inner.parse::<Ipv6Addr>().is_ok()).ok_or_else(refuse)?,
            None if host.contains(':') && host.parse::<Ipv6Addr>().is_err() => return Err(refuse()),
            None => host,
        };
        let printable = |host: &str| host.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !printable(host) { Err(refuse()) } else { Ok(Self::new(host, port)) }
    }
}

impl fmt::Display for NodeAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for NodeAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(text: &str, host: &str, port: u16) {
        assert_eq!(text.parse(), Ok(NodeAddr::new(host, port)), "{text}");
    }

    #[test]
    fn addresses_are_read_as_users_and_servers_write_them() {
        check("cache-0.shop.svc:6379", "cache-0.shop.svc", 6379);
        check("10.0.0.7:1", "10.0.0.7", 1);
        check("[fd00::7]:6379", "fd00::7", 6379);
        check("fd00::7:6379", "fd00::7", 6379);
        check("::1:6379", "::1", 6379);
        for bad in ["", ":1", "a", "a:", "a:0", "a:65536", "[a]:1", "[::1:1", "a:b:1", "a b:1", "a\r\n:1"] {
            assert!(bad.parse::<NodeAddr>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn an_address_reads_back_what_it_shows(host in "[a-z0-9.-]{1,20}", v6 in any::<[u16; 8]>(), port in 1u16..) {
            for host in [host, Ipv6Addr::from(v6).to_string()] {
                let node = NodeAddr::new(host, port);
                prop_assert_eq!(node.to_string().parse(), Ok(node));
            }
        }
    }
}
