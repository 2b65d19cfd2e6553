//! Asks the servers of a Cluster which of them its primaries take for the primary of this server's shard.
//!
//! Each shard that owns slots has one vote, which its primary casts by what its table of nodes says. The shard that is asked about has one,
//! too: it counts for whom it was given to where one of its servers owns its slots. A shard whose servers do not answer counts as
//! a voter that does not, unless others' tables say that it owns nothing.

use futures_util::future::join_all;
use tracing::debug;

use super::boot::Vote;
use super::charge::{Charge, ClusterCharge};
use super::line::{Line, LineError};
use super::node_table::NodeTable;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::node::NodeAddr;

/// How many tables are read at the same time. Each is as large as the Cluster.
const AT_ONCE: usize = 16;

/// What was said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ballot {
    /// The votes, one of each shard that owns slots.
    pub votes: Vec<Vote>,
    /// Who voted, and for whom.
    named: Vec<(NodeAddr, NodeAddr)>,
}

/// What one server's table says.
#[derive(Debug, Clone, PartialEq)]
struct Opinion {
    server: NodeAddr,
    /// The epoch of its own claim; one without has no vote.
    claim: Option<u64>,
    /// The server that it takes for the owner of the slots of the shard that is asked about, and the epoch of that one's claim.
    owner: Option<(NodeAddr, u64)>,
    /// Whether each shard owns slots, as it says.
    owns: Vec<bool>,
}

/// Asks everybody. Nobody votes outside a Cluster.
pub async fn hold(charge: &Charge, access: &Access) -> Ballot {
    let Some(cluster) = &charge.cluster else { return Ballot::default() };
    let own = own_shard(charge);
    // The server itself is not asked: it does not run.
    let asked = cluster.shards.iter().chain([&own]).enumerate();
    let asked = asked.flat_map(|(shard, servers)| servers.iter().map(move |server| (shard, server)));
    let asked: Vec<(usize, &NodeAddr)> = asked.filter(|(_, server)| **server != charge.address).collect();
    let mut opinions = Vec::with_capacity(asked.len());
    for some in asked.chunks(AT_ONCE) {
        let servers = some.iter().map(|(_, server)| *server);
        let answers = join_all(servers.map(|server| opinion_of(server, cluster, &own, access))).await;
        let answers = answers.into_iter().zip(some).filter_map(|(opinion, (shard, _))| Some((*shard, opinion?)));
        opinions.extend(answers);
    }
    count(cluster, &opinions)
}

async fn opinion_of(server: &NodeAddr, cluster: &ClusterCharge, own: &[NodeAddr], access: &Access) -> Option<Opinion> {
    let table = match ask_for_table(server, access).await {
        Ok(table) => table?,
        Err(error) => {
            debug!(%error, "a server of the Cluster does not tell whom it knows");
            return None;
        }
    };
    let owns = cluster.shards.iter().map(|servers| table.owner_among(servers).is_some()).collect();
    Some(Opinion { server: server.clone(), claim: table.claim(), owner: table.owner_among(own), owns })
}

/// The servers of the shard that is asked about.
fn own_shard(charge: &Charge) -> Vec<NodeAddr> {
    charge.peers.iter().map(|peer| peer.address.clone()).chain([charge.address.clone()]).collect()
}

/// The votes, by shard; the last is that of the shard that is asked about.
fn count(cluster: &ClusterCharge, opinions: &[(usize, Opinion)]) -> Ballot {
    let mut ballot = Ballot::default();
    for shard in 0..=cluster.shards.len() {
        let is_own = shard == cluster.shards.len();
        let of_shard = opinions.iter().filter(|(of, _)| *of == shard).map(|(_, opinion)| opinion);
        let voter = of_shard.filter(|opinion| opinion.claim.is_some()).max_by_key(|opinion| opinion.claim);
        let owns_nothing = || {
            let says = |opinion: &Opinion| opinion.owns.get(shard).copied().unwrap_or(true);
            !is_own && !opinions.is_empty() && !opinions.iter().any(|(_, opinion)| says(opinion))
        };
        match voter {
            Some(Opinion { server, owner: Some((owner, claim)), .. }) => {
                ballot.named.push((server.clone(), owner.clone()));
                ballot.votes.push(Vote::Names { primary: owner.clone(), claim: Some(*claim), failing_over: false });
            }
            Some(Opinion { owner: None, .. }) => ballot.votes.push(Vote::KnowsNone),
            None if owns_nothing() => {}
            None => ballot.votes.push(Vote::Unreachable),
        }
    }
    ballot
}

impl Ballot {
    /// These votes, of no shards.
    pub fn of(votes: Vec<Vote>) -> Self {
        Self { votes, named: Vec::new() }
    }

    /// The table of one that voted for `owner`.
    pub async fn table_naming(&self, owner: &NodeAddr, access: &Access) -> Option<NodeTable> {
        for (voter, _) in self.named.iter().filter(|(_, named)| named == owner) {
            match ask_for_table(voter, access).await {
                // It may have changed its mind.
                Ok(Some(table)) if table.owner_among(std::slice::from_ref(owner)).is_some() => return Some(table),
                Ok(_) => {}
                Err(error) => debug!(%error, "a server of the Cluster does not tell again whom it knows"),
            }
        }
        None
    }
}

async fn ask_for_table(server: &NodeAddr, access: &Access) -> Result<Option<NodeTable>, LineError> {
    let mut line = Line::new(server.clone(), access.clone());
    let nodes = line.ask(&["CLUSTER", "NODES"]).await?;
    let Some(mut table) = NodeTable::parse(nodes.as_str().unwrap_or_default()) else { return Ok(None) };
    let info = line.ask(&["CLUSTER", "INFO"]).await?;
    table.current_epoch = current_epoch(&info);
    Ok(Some(table))
}

fn current_epoch(info: &Value) -> u64 {
    let text = info.as_str().unwrap_or_default();
    let epoch = text.lines().find_map(|line| line.trim_end().strip_prefix("cluster_current_epoch:"));
    epoch.and_then(|epoch| epoch.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The epoch in which the owner won the shard that is asked about.
    const CLAIM: u64 = 5;

    fn at(shard: u16, index: u16) -> NodeAddr {
        NodeAddr::new("10.0.0.1", 7000 + shard * 10 + index)
    }

    /// Asked about shard 9, beside the shards 0 and up.
    fn cluster(shards: u16) -> ClusterCharge {
        let shards = (0..shards).map(|shard| vec![at(shard, 0), at(shard, 1)]).collect();
        ClusterCharge { id: String::new(), bus_port: 1, shards }
    }

    fn opinion(shard: u16, index: u16, claim: Option<u64>, owner: Option<u16>, owns: &[bool]) -> (usize, Opinion) {
        let owner = owner.map(|index| (at(9, index), CLAIM));
        (usize::from(shard), Opinion { server: at(shard, index), claim, owner, owns: owns.to_vec() })
    }

    fn names(index: u16) -> Vote {
        Vote::Names { primary: at(9, index), claim: Some(CLAIM), failing_over: false }
    }

    #[test]
    fn primaries_vote_and_a_shard_has_one_voice() {
        let both = &[true, true];
        let opinions = [
            opinion(0, 0, Some(3), Some(0), both),
            opinion(0, 1, Some(7), Some(1), both),
            opinion(1, 0, None, Some(0), both),
            opinion(1, 1, Some(2), None, both),
        ];
        let ballot = count(&cluster(2), &opinions);
        assert_eq!(ballot.votes, [names(1), Vote::KnowsNone, Vote::Unreachable]);
        assert_eq!(ballot.named, [(at(0, 1), at(9, 1))]);
        // The shard itself votes where one of its servers owns its slots.
        let ballot = count(&cluster(2), &[opinions.as_slice(), &[opinion(2, 1, Some(9), Some(1), both)]].concat());
        assert_eq!(ballot.votes.last(), Some(&names(1)));
    }

    #[test]
    fn a_shard_that_owns_nothing_has_no_vote() {
        let first = |owns: &[bool]| count(&cluster(2), &[opinion(0, 0, Some(3), Some(0), owns)]).votes;
        assert_eq!(first(&[true, false]), [names(0), Vote::Unreachable]);
        assert_eq!(first(&[true, true]), [names(0), Vote::Unreachable, Vote::Unreachable]);
        assert_eq!(count(&cluster(2), &[]).votes, [const { Vote::Unreachable }; 3]);
        let unused = [opinion(0, 0, None, None, &[false, false]), opinion(1, 0, None, None, &[false, false])];
        assert_eq!(count(&cluster(2), &unused).votes, [Vote::Unreachable], "nobody owns anything yet");
    }
}
