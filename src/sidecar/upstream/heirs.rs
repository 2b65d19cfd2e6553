//! Whoever might take a primary's place, whether it can be reached now or not.
//!
//! An election looks at replicas once the primary is dead. One that hangs, or has lost its primary, may be back in that very moment, and be
//! promoted with what it had before: how long its link has been down it counts from when it noticed. So it is not enough that all who
//! follow the primary have a write, nor does it help that sentinels take a replica for dead. An heir that does not follow is left
//! out of account only where nobody promotes it: it says so itself, and where others choose, all of them have heard it. One that does
//! not answer may be anything.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::BufReader;
use tokio::time::{Instant, timeout_at};

use super::access::Access;
use super::admin_client::{Value, ask};
use super::dial::dial_any;
use super::node::NodeAddr;

/// How long a server may take to say whether it may be promoted.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// A server that might take a primary's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heir {
    /// Where it is, as it announces itself.
    pub address: NodeAddr,
    /// Whether all who choose pass it over: sentinels that last heard of it that its priority is 0. In a Cluster replicas stand for
    /// election themselves, and nobody else needs to know.
    pub is_passed_over: bool,
}

/// Who decides that a replica is promoted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Electors {
    /// Sentinels, by what replicas told them last.
    Sentinels,
    /// Each replica of a Cluster itself, where other primaries vote for it.
    Replicas,
}

/// A server that may be promoted without what its primary has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{replica} may be promoted and does not follow the primary ({why}: {})", electors.remedy())]
pub struct Electable {
    /// Which.
    pub replica: NodeAddr,
    /// Why it is not left out of account.
    pub why: &'static str,
    /// Who would promote it.
    pub electors: Electors,
}

impl Electors {
    /// What a person may do about a replica that does not follow.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Sentinels => "get it back, set its replica-priority to 0, or have all sentinels forget it by SENTINEL RESET",
            Self::Replicas => "get it back, set its cluster-replica-no-failover, or have all nodes forget it by CLUSTER FORGET",
        }
    }
}

/// The heirs that are not among `followers`, as their primary names those.
///
/// Both are what replicas announce. Where either has names for addresses, names cannot be told apart from what they stand for, and it
/// must do that as many follow as there are heirs.
pub fn strays(heirs: &[Heir], followers: &[NodeAddr]) -> Vec<Heir> {
    let of = |address: &NodeAddr| address.host().parse::<IpAddr>().ok().map(|ip| (ip.to_canonical(), address.port()));
    let following: Vec<_> = followers.iter().map(of).collect();
    let has_names = following.contains(&None) || heirs.iter().any(|heir| of(&heir.address).is_none());
    if has_names && followers.len() >= heirs.len() {
        return Vec::new();
    }
    let follows = |heir: &&Heir| of(&heir.address).is_some_and(|heir| following.contains(&Some(heir)));
    heirs.iter().filter(|heir| !follows(heir)).cloned().collect()
}

/// Makes sure that none of these is promoted before it has followed its primary again. Asks each of them.
///
/// # Errors
/// The first of which that is not sure.
pub async fn rule_out(strays: &[Heir], access: &Access, electors: Electors) -> Result<(), Electable> {
    let judged = join_all(strays.iter().map(|heir| async move {
        let why = match says(&heir.address, access, electors).await {
            None => "it does not answer",
            Some(false) => "it has not ruled that out",
            Some(true) if !heir.is_passed_over => "not all sentinels have heard yet that its priority is 0",
            Some(true) => return Ok(()),
        };
        Err(Electable { replica: heir.address.clone(), why, electors })
    }));
    judged.await.into_iter().collect()
}

/// Whether a server says that it is a replica which is not to be promoted. `None`: it says nothing.
async fn says(node: &NodeAddr, access: &Access, electors: Electors) -> Option<bool> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let (link, _) = dial_any(node, access, deadline).await.ok()?;
    let question: &[&[u8]] = match electors {
        Electors::Sentinels => &[b"INFO", b"replication"],
        Electors::Replicas => &[b"CLUSTER", b"NODES"],
    };
    let mut link = BufReader::with_capacity(16 * 1024, link);
    let answers = timeout_at(deadline, ask(&mut link, &[question])).await.ok()?.ok()?;
    let text = answers.first().and_then(Value::as_str)?;
    Some(match electors {
        Electors::Sentinels => has_no_priority(text),
        Electors::Replicas => stands_for_no_election(text),
    })
}

/// By a server's INFO, of which a primary's has no priority.
fn has_no_priority(info: &str) -> bool {
    info.lines().any(|line| line.trim_end() == "slave_priority:0")
}

/// By a node's own table of nodes.
fn stands_for_no_election(nodes: &str) -> bool {
    let own = nodes.lines().filter_map(|line| line.split(' ').nth(2)).map(|flags| flags.split(',').collect::<Vec<_>>());
    own.filter(|flags| flags.contains(&"myself")).any(|flags| flags.contains(&"slave") && flags.contains(&"nofailover"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heirs(addresses: &[&str]) -> Vec<Heir> {
        addresses.iter().map(|address| Heir { address: at(address), is_passed_over: false }).collect()
    }

    fn at(address: &str) -> NodeAddr {
        address.parse().unwrap()
    }

    #[track_caller]
    fn check(known: &[&str], following: &[&str], want: &[&str]) {
        let following: Vec<NodeAddr> = following.iter().map(|address| at(address)).collect();
        assert_eq!(strays(&heirs(known), &following), heirs(want));
    }

    #[test]
    fn an_heir_that_does_not_follow_strays_however_many_do() {
        check(&["10.0.0.2:1", "10.0.0.3:1"], &["10.0.0.3:1", "10.0.0.2:1"], &[]);
        check(&["10.0.0.2:1", "10.0.0.3:1"], &["10.0.0.2:1"], &["10.0.0.3:1"]);
        // Another than those that are known follows: a copy that somebody draws, or a replica that has just come.
        check(&["10.0.0.2:1", "10.0.0.3:1"], &["10.0.0.2:1", "10.0.0.4:1"], &["10.0.0.3:1"]);
        check(&["10.0.0.2:1"], &["10.0.0.2:2"], &["10.0.0.2:1"]);
        check(&["[fd00::7]:1"], &["[fd00:0::7]:1"], &[]);
        check(&[], &[], &[]);
    }

    #[test]
    fn names_are_counted() {
        check(&["cache-1.shop:1"], &["10.0.0.2:1"], &[]);
        check(&["cache-1.shop:1", "cache-2.shop:1"], &["10.0.0.2:1"], &["cache-1.shop:1", "cache-2.shop:1"]);
    }

    #[test]
    fn a_server_rules_itself_out_as_a_replica_alone() {
        assert!(has_no_priority("# Replication\r\nrole:slave\r\nslave_priority:0\r\n"));
        assert!(!has_no_priority("role:slave\r\nslave_priority:100\r\n"));
        assert!(!has_no_priority("role:master\r\nconnected_slaves:0\r\n"));
        let nodes = |flags: &str| {
            format!("aa 10.0.0.2:1@2 {flags} bb 0 0 1 connected\ncc 10.0.0.3:1@2 slave,nofailover bb 0 0 1 connected\n")
        };
        assert!(stands_for_no_election(&nodes("myself,slave,nofailover")));
        assert!(!stands_for_no_election(&nodes("myself,slave")));
        assert!(!stands_for_no_election(&nodes("myself,master,nofailover")));
    }

    #[tokio::test]
    async fn one_that_does_not_answer_may_be_promoted() {
        // It takes connections, and is silent, as a server that is stopped.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = NodeAddr::new("127.0.0.1", silent.local_addr().unwrap().port());
        let heir = Heir { address: address.clone(), is_passed_over: true };
        let refused = rule_out(&[heir], &Access::fixed(Default::default()), Electors::Sentinels).await.unwrap_err();
        assert_eq!((&refused.replica, refused.why), (&address, "it does not answer"));
        assert!(
            refused.to_string().starts_with(&format!("{address} may be promoted and does not follow the primary (")),
            "{refused}"
        );
    }
}
