//! What a server of a Cluster remembers in its directory: its table of nodes.
//!
//! The table may outlive the data, and the data the table. The agent reads from it which slots the server would claim, and before a
//! start makes it say what was decided.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::boot::Start;
use super::charge::Charge;
use super::node_table::{NodeTable, Role, Seat};
use super::place;

/// The name of the table, which servers' configuration says, too.
pub const NODES_FILE: &str = "nodes.conf";
/// The largest table that is read.
const MAX_TABLE_BYTES: u64 = 4 << 20;

/// The table of one server.
#[derive(Debug, Clone)]
pub struct ClusterMemory {
    path: PathBuf,
    seat: Seat,
}

impl ClusterMemory {
    /// The memory of the server at `seat`, whose directory is this.
    pub fn new(directory: &Path, seat: Seat) -> Self {
        Self { path: directory.join(NODES_FILE), seat }
    }

    /// The memory of the server that an agent is charged with; `None` outside a Cluster.
    pub fn of(charge: &Charge) -> Option<Self> {
        Some(Self::new(&charge.config.server.directory, charge.seat()?))
    }

    /// What the server remembers. `None`: nothing that could be read.
    pub fn read(&self) -> Option<NodeTable> {
        let length = fs::metadata(&self.path).ok()?.len();
        if length > MAX_TABLE_BYTES {
            warn!(path = %self.path.display(), length, "the table of nodes is too large to be read");
            return None;
        }
        NodeTable::parse(&fs::read_to_string(&self.path).ok()?)
    }

    /// Makes the server find its place when it starts; `told` is what one of the majority says. False where that does not say enough:
    /// another may.
    pub fn prepare(&self, start: &Start, told: Option<&NodeTable>) -> io::Result<bool> {
        let own = self.read();
        let text = match start {
            Start::Blank => match &own {
                Some(own) if own.is_blank() => return Ok(true),
                Some(table) => table.compose(own.as_ref(), &self.seat, Role::Blank),
                None => Some(self.seat.first_table()),
            },
            Start::Primary if own.as_ref().is_some_and(|own| own.claim().is_some()) => return Ok(true),
            Start::Primary => match told {
                Some(told) => told.compose(own.as_ref(), &self.seat, Role::Owner),
                // Nobody knows more: it starts as what it remembers, and is told.
                None if own.is_some() => return Ok(true),
                None => Some(self.seat.first_table()),
            },
            Start::Replica { of, .. } => told.and_then(|told| told.compose(own.as_ref(), &self.seat, Role::ReplicaOf(of))),
        };
        let Some(text) = text else { return Ok(false) };
        info!(remembers = own.is_some(), path = %self.path.display(), "the table of nodes is written");
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
        place::replace(&self.path, text.as_bytes())?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::sidecar::upstream::node::NodeAddr;

    fn memory(dir: &TempDir) -> ClusterMemory {
        let seat = Seat { id: "a".repeat(40), address: NodeAddr::new("10.0.0.1", 7000), bus_port: 17_000 };
        ClusterMemory::new(dir.path(), seat)
    }

    fn told() -> NodeTable {
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        let text = format!(
            "{b} 10.0.0.1:7001@17001 myself,master - 0 0 4 connected 0-16383\n{a} 10.0.0.1:7000@17000 slave {b} 0 0 4 connected\n"
        );
        NodeTable::parse(&text).unwrap()
    }

    #[test]
    fn a_table_that_is_right_or_all_that_there_is_stays() {
        let dir = TempDir::new().unwrap();
        let memory = memory(&dir);
        assert_eq!(memory.read(), None);
        assert!(memory.prepare(&Start::Blank, None).unwrap());
        let first = memory.read().unwrap();
        assert!(first.is_blank() && first.id() == "a".repeat(40));
        for start in [Start::Blank, Start::Primary] {
            assert!(memory.prepare(&start, None).unwrap());
            assert_eq!(memory.read().unwrap(), first);
        }
        fs::write(dir.path().join(NODES_FILE), "torn").unwrap();
        assert!(memory.prepare(&Start::Primary, None).unwrap());
        assert_eq!(memory.read().unwrap(), first);
    }

    #[test]
    fn a_claim_that_is_no_longer_the_servers_is_given_up() {
        let dir = TempDir::new().unwrap();
        let memory = memory(&dir);
        let claim = format!("{} 10.0.0.1:7000@17000 myself,master - 0 0 3 connected 0-16383\n", "a".repeat(40));
        fs::write(dir.path().join(NODES_FILE), claim).unwrap();
        assert_eq!(memory.read().unwrap().claim(), Some(3));
        let start = Start::Replica { of: NodeAddr::new("10.0.0.1", 7001), promotable: false };
        assert!(!memory.prepare(&start, None).unwrap(), "nobody says who it is");
        assert!(memory.prepare(&start, Some(&told())).unwrap());
        assert_eq!(memory.read().unwrap().claim(), None);
    }
}
