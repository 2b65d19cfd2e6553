//! Replicas that ended in good order, and need not be waited for until they are back.
//!
//! Before an agent ends a replica it takes it out of elections, and waits until every sentinel has heard that. Once the server has ended, the
//! agent notes at the primary that it has retired. It begins again as one that nobody promotes, and is let be promoted only after its agent
//! has removed the note, and it has all that the primary had behind that. So whoever finds the note behind a write knows that the replica has
//! that write before anybody promotes it.
//!
//! The note says in which history of a primary's data it was made, by the replication ID: each reign has another. One of an earlier
//! reign says nothing, since its removal may have been lost with the primary of that time.

use std::net::IpAddr;

use super::heirs::Heir;
use super::node::NodeAddr;

/// The key of the note about the replica that is known by this address.
pub fn key(address: &NodeAddr) -> String {
    let host = address.host().parse::<IpAddr>().map_or_else(|_| address.host().to_owned(), |ip| ip.to_canonical().to_string());
    format!("larder:retired:{}", NodeAddr::new(host, address.port()))
}

/// Asks a primary which of these have retired: for the notes, and behind that for its `INFO`. In this order: the reign that notes are of had
/// begun before they were made, so where it is the present one they were read within it.
pub fn question(strays: &[Heir]) -> [Vec<Vec<u8>>; 2] {
    let keys = strays.iter().map(|stray| key(&stray.address).into_bytes());
    [[b"MGET".to_vec()].into_iter().chain(keys).collect(), vec![b"INFO".to_vec(), b"replication".to_vec()]]
}

/// Tells those that have retired from the others, by the answers to [`question`]; nobody has where there are none.
pub fn split(strays: Vec<Heir>, notes: &[Option<&[u8]>], info: &[u8]) -> (Vec<Heir>, Vec<Heir>) {
    let reign = reign(info);
    let mut notes = notes.iter();
    strays.into_iter().partition(|_| reign.is_some() && notes.next().copied().flatten() == reign)
}

/// What a primary calls the history of its data. `None`: it is none.
fn reign(info: &[u8]) -> Option<&[u8]> {
    let field = |name: &[u8]| info.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)).map(<[u8]>::trim_ascii);
    (field(b"role:") == Some(&b"master"[..])).then(|| field(b"master_replid:"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heir(address: &str) -> Heir {
        Heir { address: address.parse().unwrap(), is_passed_over: false }
    }

    #[test]
    fn a_replica_has_one_key_however_its_address_is_written() {
        let key = |address: &str| key(&address.parse().unwrap());
        assert_eq!(key("10.0.0.7:6379"), "larder:retired:10.0.0.7:6379");
        assert_eq!(key("[fd00:0::7]:6379"), key("[fd00::7]:6379"));
        assert_eq!(key("[::ffff:10.0.0.7]:1"), key("10.0.0.7:1"));
        assert_ne!(key("10.0.0.7:1"), key("10.0.0.7:2"));
    }

    #[test]
    fn a_note_counts_in_its_reign_alone() {
        let strays = || vec![heir("10.0.0.2:1"), heir("10.0.0.3:1")];
        let retired = |notes: &[Option<&[u8]>], info: &str| split(strays(), notes, info.as_bytes()).0;
        let info = |role: &str, id: &str| format!("# Replication\r\nrole:{role}\r\nmaster_replid:{id}\r\n");
        assert_eq!(retired(&[None, Some(b"aa")], &info("master", "aa")), [heir("10.0.0.3:1")]);
        assert_eq!(retired(&[Some(b"aa"), Some(b"aa")], &info("master", "aa")), strays());
        assert_eq!(retired(&[Some(b"aa"), Some(b"bb")], &info("master", "cc")), [], "they are of earlier reigns");
        assert_eq!(retired(&[Some(b"aa"), Some(b"aa")], &info("slave", "aa")), []);
        assert_eq!(retired(&[], &info("master", "aa")), [], "they could not be read");
        assert_eq!(retired(&[None, None], ""), []);
        assert_eq!(question(&strays())[0][1], b"larder:retired:10.0.0.2:1");
    }
}
