//! Cluster's redirections: `MOVED` and `ASK`.

use super::node::NodeAddr;
use super::view::SLOTS;

/// Another node that a server names for a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// Whether it holds for this one command only (`ASK`) or from now on (`MOVED`).
    pub ask: bool,
    /// The slot.
    pub slot: u16,
    /// Where to go.
    pub node: NodeAddr,
}

/// Reads an error line such as `-MOVED 3999 10.0.0.7:6381`, with or without `-` and line end. An empty host stands for `asked`,
/// the host that sent it. `None`: it is no redirection, or it names no node (`?`).
pub fn parse_redirect(line: &[u8], asked: &NodeAddr) -> Option<Redirect> {
    let line = line.strip_prefix(b"-").unwrap_or(line);
    let line = line.strip_suffix(b"\r\n").unwrap_or(line);
    let (ask, rest) = match line.strip_prefix(b"MOVED ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix(b"ASK ")?),
    };
    let (slot, address) = std::str::from_utf8(rest).ok()?.split_once(' ')?;
    let slot = slot.parse::<u16>().ok().filter(|slot| usize::from(*slot) < SLOTS)?;
    let address = address.trim_end();
    let node = match address.strip_prefix(':') {
        Some(port) if !port.contains(':') => NodeAddr::new(asked.host(), port.parse().ok().filter(|port| *port > 0)?),
        _ => address.parse::<NodeAddr>().ok().filter(|node| node.host() != "?")?,
    };
    Some(Redirect { ask, slot, node })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Option<(bool, u16, String)> {
        parse_redirect(line.as_bytes(), &NodeAddr::new("asked", 1)).map(|it| (it.ask, it.slot, it.node.to_string()))
    }

    #[test]
    fn redirections_name_a_slot_and_a_node() {
        assert_eq!(parse("-MOVED 3999 127.0.0.1:6381\r\n"), Some((false, 3999, "127.0.0.1:6381".to_owned())));
        assert_eq!(parse("ASK 16383 cache-1.svc:6381"), Some((true, 16383, "cache-1.svc:6381".to_owned())));
        assert_eq!(parse("-MOVED 0 ::1:6381\r\n"), Some((false, 0, "[::1]:6381".to_owned())));
        assert_eq!(parse("-MOVED 0 fd00::1:6381\r\n"), Some((false, 0, "[fd00::1]:6381".to_owned())));
        assert_eq!(parse("-MOVED 7 :6381\r\n"), Some((false, 7, "asked:6381".to_owned())));
    }

    #[test]
    fn other_lines_are_none() {
        for line in [
            "-ERR MOVED 1 a:1",
            "-MOVED",
            "-MOVED 1",
            "-MOVED x a:1",
            "-MOVED 16384 a:1",
            "-MOVED 1 a",
            "-MOVED 1 a:0",
            "-MOVED 1 :0",
            "-MOVED 1 ?:6379",
            "-MOVEDX 1 a:1",
            "+OK",
            "",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in any::<Vec<u8>>(), tail in any::<Vec<u8>>()) {
            let asked = NodeAddr::new("asked", 1);
            parse_redirect(&line, &asked);
            parse_redirect(&[b"-MOVED 1 ", tail.as_slice()].concat(), &asked);
        }
    }
}
