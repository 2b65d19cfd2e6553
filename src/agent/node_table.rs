//! A node's table of its Cluster, as `CLUSTER NODES` tells it and as `nodes.conf` keeps it: whom it knows, who follows whom, who owns which
//! slots. Pure.
//!
//! A server of a Cluster starts as what its own table says, whatever became of its shard meanwhile. So the agent writes that table anew
//! where a majority knows better ([`NodeTable::compose`]): the server comes back in its place at once, also without any memory of its
//! own, and never with a claim that is no longer its. What the form leaves out (ids of shards, further ports) servers tell each other.

use std::fmt::Write as _;

use crate::policy::agent::is_node_id;
use crate::sidecar::upstream::node::NodeAddr;

/// A table that is whole: it says which node it is the table of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTable {
    own: Row,
    others: Vec<Row>,
    /// The greatest epoch that the node has heard of, where the table says it.
    pub current_epoch: u64,
    /// The last epoch in which it voted.
    pub last_vote: u64,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    id: String,
    /// `host:port@bus`, and what is put behind it.
    place: String,
    is_primary: bool,
    /// Whether it is a stranger yet, or nobody knows where it is.
    is_known: bool,
    /// The id of the primary that it follows.
    follows: Option<String>,
    epoch: u64,
    /// Its ranges of slots, as they stand.
    slots: Vec<String>,
}

/// What a server is to find in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role<'a> {
    /// It follows the node at this address.
    ReplicaOf(&'a NodeAddr),
    /// It owns what the table that it is made from says of it.
    Owner,
    /// It owns nothing and follows nobody.
    Blank,
}

/// A place in a Cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// The id that a node has there whose memory is lost, and that nobody remembers.
    pub id: String,
    /// Its announced address.
    pub address: NodeAddr,
    /// The port of its bus.
    pub bus_port: u16,
}

impl Row {
    /// Reads `ID host:port@bus[,…] FLAGS PRIMARY PING PONG EPOCH LINK SLOTS…`, and whether it is the table's own node.
    fn parse(line: &str) -> Option<(Self, bool)> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [id, place, flags, follows, _ping, _pong, epoch, _link, slots @ ..] = &words[..] else { return None };
        if !is_node_id(id) {
            return None;
        }
        let has = |wanted: &str| flags.split(',').any(|flag| flag == wanted);
        let row = Self {
            id: (*id).to_owned(),
            place: (*place).to_owned(),
            is_primary: has("master"),
            is_known: !has("handshake") && !has("noaddr"),
            follows: is_node_id(follows).then(|| (*follows).to_owned()),
            epoch: epoch.parse().ok()?,
            // A slot that is on its way, `[7->-ID]`, is a matter of the node whose table it is.
            slots: slots.iter().filter(|text| !text.starts_with('[')).map(|text| (*text).to_owned()).collect(),
        };
        Some((row, has("myself")))
    }

    fn address(&self) -> Option<NodeAddr> {
        self.place.split_once('@')?.0.parse().ok()
    }

    fn is_owner(&self) -> bool {
        self.is_primary && !self.slots.is_empty()
    }

    fn write(&self, myself: &str, out: &mut String) {
        let (role, follows) = match &self.follows {
            Some(primary) if !self.is_primary => ("slave", primary.as_str()),
            _ => ("master", "-"),
        };
        let link = if myself.is_empty() { "disconnected" } else { "connected" };
        let _ = write!(out, "{} {} {myself}{role} {follows} 0 0 {} {link}", self.id, self.place, self.epoch);
        self.slots.iter().for_each(|slots| {
            let _ = write!(out, " {slots}");
        });
        out.push('\n');
    }
}

impl NodeTable {
    /// Reads a table. `None` where it does not say whose it is.
    pub fn parse(text: &str) -> Option<Self> {
        let (mut own, mut others) = (None, Vec::new());
        let (mut current_epoch, mut last_vote) = (0, 0);
        for line in text.lines() {
            if let Some(variables) = line.strip_prefix("vars ") {
                let words: Vec<&str> = variables.split_ascii_whitespace().collect();
                let value = |name: &str| words.windows(2).find(|pair| pair[0] == name).and_then(|pair| pair[1].parse().ok());
                (current_epoch, last_vote) = (value("currentEpoch").unwrap_or(0), value("lastVoteEpoch").unwrap_or(0));
                continue;
            }
            match Row::parse(line) {
                Some((row, true)) => own = Some(row),
                Some((row, false)) => others.push(row),
                None => {}
            }
        }
        Some(Self { own: own?, others, current_epoch, last_vote })
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        std::iter::once(&self.own).chain(&self.others)
    }

    /// The node's own id.
    pub fn id(&self) -> &str {
        &self.own.id
    }

    /// The epoch with which the node claims slots; `None` where it claims none.
    pub fn claim(&self) -> Option<u64> {
        self.own.is_owner().then_some(self.own.epoch)
    }

    /// Whether the node is a primary that owns nothing.
    pub fn is_blank(&self) -> bool {
        self.own.is_primary && self.own.slots.is_empty()
    }

    /// Which of these servers owns slots, and the epoch of its claim: of several the one with the latest.
    pub fn owner_among(&self, addresses: &[NodeAddr]) -> Option<(NodeAddr, u64)> {
        let owners = self.rows().filter(|row| row.is_owner());
        let ours = owners.filter_map(|row| Some((row.epoch, row.address().filter(|address| addresses.contains(address))?)));
        ours.max_by_key(|(epoch, _)| *epoch).map(|(epoch, address)| (address, epoch))
    }

    fn row_at(&self, address: &NodeAddr) -> Option<&Row> {
        let known = self.rows().filter(|row| row.is_known && row.address().as_ref() == Some(address));
        // An earlier node of the same address may not be forgotten yet.
        known.max_by_key(|row| (row.is_owner(), row.epoch))
    }

    /// The table of the server at `seat`, made from this one, which another node tells; `own` is what the server itself remembers, if
    /// anything. `None` where this table does not know the primary that is to be followed, or nothing that the server could own.
    ///
    /// Who has lost its memory also forgot in which epochs it voted, and is made to vote in none that this table knows.
    pub fn compose(&self, own: Option<&Self>, seat: &Seat, role: Role<'_>) -> Option<String> {
        let remembered = self.row_at(&seat.address);
        let id = match role {
            // Whatever the others call the owner, its slots are that node's.
            Role::Owner => remembered.filter(|row| row.is_owner())?.id.clone(),
            Role::ReplicaOf(_) | Role::Blank => {
                let id = own.map(|own| own.id()).or(remembered.map(|row| row.id.as_str()));
                id.unwrap_or(&seat.id).to_owned()
            }
        };
        let mut row = Row {
            id,
            place: format!("{}:{}@{}", seat.address.host(), seat.address.port(), seat.bus_port),
            is_primary: true,
            is_known: true,
            follows: None,
            epoch: own.map_or(0, |own| own.own.epoch),
            slots: Vec::new(),
        };
        match role {
            Role::Blank => {}
            Role::Owner => {
                let owner = remembered?;
                (row.epoch, row.slots) = (owner.epoch, owner.slots.clone());
            }
            Role::ReplicaOf(primary) => {
                let primary = self.row_at(primary).filter(|primary| primary.is_primary)?;
                (row.is_primary, row.follows, row.epoch) = (false, Some(primary.id.clone()), primary.epoch);
            }
        }
        let is_other =
            |other: &&Row| other.is_known && other.id != row.id && other.address().is_some_and(|address| address != seat.address);
        let mut text = String::new();
        self.rows().filter(is_other).for_each(|other| other.write("", &mut text));
        row.write("myself,", &mut text);
        let greatest = self.current_epoch.max(self.rows().map(|row| row.epoch).max().unwrap_or(0));
        let current = greatest.max(own.map_or(0, |own| own.current_epoch));
        let last_vote = own.map_or(current, |own| own.last_vote);
        let _ = writeln!(text, "vars currentEpoch {current} lastVoteEpoch {last_vote}");
        Some(text)
    }
}

impl Seat {
    /// The table of a node that knows nobody.
    pub fn first_table(&self) -> String {
        let Self { id, address, bus_port } = self;
        let place = format!("{}:{}@{bus_port}", address.host(), address.port());
        format!("{id} {place} myself,master - 0 0 0 connected\nvars currentEpoch 0 lastVoteEpoch 0\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> String {
        format!("{number:040x}")
    }

    fn address(number: u8) -> NodeAddr {
        NodeAddr::new("10.0.0.1", 7000 + u16::from(number))
    }

    fn seat(number: u8) -> Seat {
        Seat { id: id(number), address: address(number), bus_port: 17_000 + u16::from(number) }
    }

    fn line(number: u8, flags: &str, follows: Option<u8>, epoch: u64, slots: &str) -> String {
        let follows = follows.map_or_else(|| "-".to_owned(), id);
        let (address, bus) = (address(number), 17_000 + u16::from(number));
        format!("{} {address}@{bus} {flags} {follows} 0 1796023757123 {epoch} connected {slots}\n", id(number))
    }

    /// As node 1 sees it: node 3 has taken the slots of node 0 over.
    fn after_a_failover() -> NodeTable {
        let text = line(0, "master,fail", None, 1, "")
            + &line(1, "myself,master", None, 5, "5461-10921 [93->-0000000000000000000000000000000000000002]")
            + &line(2, "master", None, 3, "10922-16383")
            + &line(3, "master", None, 6, "0-5460")
            + &line(4, "slave", Some(1), 5, "")
            + &line(9, "master,noaddr", None, 0, "")
            + &line(8, "handshake", None, 0, "");
        NodeTable { current_epoch: 6, ..NodeTable::parse(&text).unwrap() }
    }

    #[test]
    fn a_table_says_who_owns_what() {
        let table = after_a_failover();
        assert_eq!((table.id(), table.claim(), table.is_blank()), (id(1).as_str(), Some(5), false));
        assert_eq!(table.owner_among(&[address(0), address(3)]), Some((address(3), 6)));
        assert_eq!(table.owner_among(&[address(0), address(4)]), None);
        assert_eq!(NodeTable::parse(&line(0, "master", None, 1, "")), None, "whose it is");
        assert_eq!(NodeTable::parse("garbage"), None);
        let first = NodeTable::parse(&seat(7).first_table()).unwrap();
        assert!(first.is_blank() && first.id() == id(7));
    }

    #[test]
    fn a_primary_that_was_replaced_comes_back_as_a_replica() {
        let own =
            NodeTable::parse(&(line(0, "myself,master", None, 1, "0-5460 [7->-x]") + "vars currentEpoch 5 lastVoteEpoch 4\n"));
        let text = after_a_failover().compose(own.as_ref(), &seat(0), Role::ReplicaOf(&address(3))).unwrap();
        let expected = [
            line(1, "master", None, 5, "5461-10921"),
            line(2, "master", None, 3, "10922-16383"),
            line(3, "master", None, 6, "0-5460"),
            line(4, "slave", Some(1), 5, ""),
        ];
        let expected: Vec<String> = expected
            .iter()
            .map(|line| line.replace("1796023757123", "0").replace("connected", "disconnected").trim_end().to_owned())
            .chain([
                format!("{} {}@17000 myself,slave {} 0 0 6 connected", id(0), address(0), id(3)),
                "vars currentEpoch 6 lastVoteEpoch 4".to_owned(),
            ])
            .collect();
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        let again = NodeTable::parse(&text).unwrap();
        assert_eq!((again.claim(), again.is_blank(), again.current_epoch), (None, false, 6));
    }

    #[test]
    fn who_has_lost_its_memory_is_who_the_others_remember_and_does_not_vote_again() {
        let other_seat = Seat { id: id(77), ..seat(4) };
        let text = after_a_failover().compose(None, &other_seat, Role::ReplicaOf(&address(1))).unwrap();
        assert!(text.contains(&format!("{} {}@17004 myself,slave {} 0 0 5 connected", id(4), address(4), id(1))), "{text}");
        assert!(text.ends_with("vars currentEpoch 6 lastVoteEpoch 6\n"), "{text}");
        let unknown = after_a_failover().compose(None, &seat(5), Role::ReplicaOf(&address(1))).unwrap();
        assert!(unknown.contains(&format!("{} {}@17005 myself,slave", id(5), address(5))), "{unknown}");
        assert_eq!(after_a_failover().compose(None, &seat(5), Role::ReplicaOf(&address(6))), None, "whom nobody knows");
        assert_eq!(after_a_failover().compose(None, &seat(5), Role::ReplicaOf(&address(4))), None, "who follows another");
    }

    #[test]
    fn an_owner_that_has_lost_its_memory_is_given_back_what_the_others_say() {
        let text = after_a_failover().compose(None, &seat(3), Role::Owner).unwrap();
        let table = NodeTable::parse(&text).unwrap();
        assert_eq!((table.id(), table.claim()), (id(3).as_str(), Some(6)));
        assert!(text.contains("myself,master - 0 0 6 connected 0-5460\n"), "{text}");
        assert_eq!(after_a_failover().compose(None, &seat(0), Role::Owner), None, "it owns nothing any more");
    }

    #[test]
    fn a_node_that_owns_nothing_keeps_its_name() {
        let own = NodeTable::parse(&(line(4, "myself,slave", Some(1), 5, "") + &line(1, "master", None, 5, "1"))).unwrap();
        let text = own.compose(Some(&own), &seat(4), Role::Blank).unwrap();
        let table = NodeTable::parse(&text).unwrap();
        assert!(table.is_blank() && table.id() == id(4), "{text}");
    }
}
