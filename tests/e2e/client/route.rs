//! The way to the primary of some keys: the one that sentinels name, or the owner of the keys' slot in a Cluster.

use super::resp::{ASK, Connection, Fault, MOVED, Reply};
use super::{Guide, Target};

/// How many slots a Cluster has.
const SLOTS: u16 = 16384;
/// How often one command is sent on to another server, as clients of Clusters bound it.
const REDIRECTIONS: usize = 5;

/// A hash tag for the keys of one of several writers, so that their slots are spread evenly.
pub fn tag_of(writer: u32, writers: u32) -> String {
    let is_its_own = |tag: &String| u32::from(slot_of(tag)) * writers / u32::from(SLOTS) == writer;
    (0_u32..).map(|number| number.to_string()).find(is_its_own).expect("every slot has a tag")
}

/// The slot of all keys with a hash tag: CRC-16/XMODEM, as the specification of Redis Cluster has it.
fn slot_of(tag: &str) -> u16 {
    let shift = |crc: u16| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
    let crc = tag.bytes().fold(0, |crc, byte| (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| shift(crc)));
    crc % SLOTS
}

/// A connection to the primary of the keys with one hash tag, which is looked for when it is needed.
pub struct Route {
    target: Target,
    slot: u16,
    open: Option<Connection>,
}

impl Route {
    pub fn to(target: &Target, tag: &str) -> Self {
        Self { target: target.clone(), slot: slot_of(tag), open: None }
    }

    /// The next command has a connection of its own made.
    pub fn close(&mut self) {
        self.open = None;
    }

    /// Sends a command about such keys, and on to whom a server names. After a fault the primary is looked for anew.
    pub fn call(&mut self, command: &[&str]) -> Result<Reply, Fault> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => primary(&self.target, self.slot)?,
        };
        let mut outcome = open.call(command);
        for _ in 0..REDIRECTIONS {
            let Err(fault) = &outcome else { break };
            let named = |word: &str| fault.strip_prefix(word)?.split(' ').nth(1).map(str::to_owned);
            if let Some(address) = named(MOVED) {
                open = Connection::log_in(&address, &self.target)?;
                outcome = open.call(command);
            } else if let Some(address) = named(ASK) {
                // For this once: the slot is still on its way.
                let mut other = Connection::log_in(&address, &self.target)?;
                other.call(&["ASKING"])?;
                outcome = other.call(command);
            } else {
                break;
            }
        }
        let reply = outcome.map_err(|fault| fault.split(' ').next().unwrap_or_default().to_owned())?;
        self.open = Some(open);
        Ok(reply)
    }
}

fn primary(target: &Target, slot: u16) -> Result<Connection, Fault> {
    match &target.guide {
        Guide::Sentinels { address, master } => named_by_sentinels(target, address, master),
        Guide::Cluster { address } => owner(target, address, slot),
    }
}

/// A connection to the server that the sentinels name, and that says of itself that it is the primary.
fn named_by_sentinels(target: &Target, sentinels: &str, master: &str) -> Result<Connection, Fault> {
    let mut sentinel = Connection::log_in(sentinels, target)?;
    let named = sentinel.call(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", master])?;
    let address = match named {
        Reply::List(parts) => match parts.as_slice() {
            [Reply::Text(host), Reply::Text(port)] => format!("{host}:{port}"),
            _ => return Err("no address".to_owned()),
        },
        _ => return Err("no primary".to_owned()),
    };
    let mut server = Connection::log_in(&address, target)?;
    match server.call(&["ROLE"])? {
        Reply::List(parts) if parts.first() == Some(&Reply::Text("master".to_owned())) => Ok(server),
        _ => Err("not the primary".to_owned()),
    }
}

/// A connection to the server that another one takes for the owner of a slot. One that is not says so when it is asked for a key.
fn owner(target: &Target, any: &str, slot: u16) -> Result<Connection, Fault> {
    let Reply::List(ranges) = Connection::log_in(any, target)?.call(&["CLUSTER", "SLOTS"])? else {
        return Err("no slots".to_owned());
    };
    let of_slot = |range: &Reply| {
        let Reply::List(parts) = range else { return None };
        let [Reply::Number(first), Reply::Number(last), Reply::List(node), ..] = parts.as_slice() else { return None };
        let [Reply::Text(host), Reply::Number(port), ..] = node.as_slice() else { return None };
        (*first..=*last).contains(&i64::from(slot)).then(|| format!("{host}:{port}"))
    };
    let address = ranges.iter().find_map(of_slot).ok_or("no owner")?;
    Connection::log_in(&address, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_spread_writers_over_all_slots() {
        // As the servers have it.
        assert_eq!((slot_of("a"), slot_of("123456789")), (15495, 12739));
        let slots: Vec<u16> = (0..6).map(|writer| slot_of(&tag_of(writer, 6))).collect();
        assert!(slots.iter().zip(0..).all(|(slot, writer)| slot * 3 / 8192 == writer), "{slots:?}");
    }
}
