//! How a replica ends without holding up those who write: it retires.
//!
//! Writes that must survive a failover wait for every replica that might be promoted, dead or not. So before a replica ends in good order its
//! agent takes it out of elections, and waits until every sentinel has heard that: they ask replicas every ten seconds. When the
//! server has ended, and nobody can change its mind any more, the agent notes that at the primary
//! ([`retired`](crate::sidecar::upstream::retired)). It takes the note back before it lets the server be promoted again.
//!
//! Not in a Cluster: there is no key that a shard's primary has whatever slots it owns.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::charge::Charge;
use super::info::{Info, Role};
use super::line::{Line, LineError};
use crate::sidecar::upstream::access::{Access, ClusterAccess};
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::retired;

/// How long sentinels may take to hear of it: they ask every ten seconds.
pub const HEARD_WITHIN: Duration = Duration::from_secs(12);
/// How often they are asked.
pub const ASK_EVERY: Duration = Duration::from_millis(200);
/// How many times in a row one of them may be silent before it is not waited for.
pub const MOST_SILENCES: u32 = 3;
/// How long the primary may take to note it.
const NOTED_WITHIN: Duration = Duration::from_secs(3);
/// How long a note lasts, in seconds: a week. Who is away for longer is waited for again.
const NOTE_SECS: &str = "604800";

/// What the sentinels have heard of this server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hearing {
    /// All of them pass it over, none is replacing the primary, and they name this one.
    PassedOver {
        /// Which.
        primary: NodeAddr,
    },
    /// Not all have heard, or they do not agree.
    NotYet,
    /// One of them does not answer.
    Silent,
}

/// What one sentinel says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    passes_over: bool,
    primary: Option<NodeAddr>,
    is_failing_over: bool,
    /// How many sentinels it knows beside itself.
    others: Option<usize>,
}

/// Takes a replica out of elections. False where it is none, or is in a Cluster, or cannot be told.
pub async fn withdraw(charge: &Charge, server: &mut Line) -> bool {
    if charge.cluster.is_some() {
        return false;
    }
    let told = async {
        let info = replication(server).await?;
        if !matches!(info.role(), Some(Role::Replica { .. })) {
            return Ok(false);
        }
        server.ask(&["CONFIG", "SET", "replica-priority", "0"]).await.map(|_| true)
    };
    told.await.unwrap_or_else(|error: LineError| {
        debug!(%error, "the server cannot be taken out of elections");
        false
    })
}

/// Asks all sentinels.
pub async fn hearing(charge: &Charge, access: &Access) -> Hearing {
    let asked = charge.sentinels.iter().map(|sentinel| async {
        let mut line = Line::new(sentinel.clone(), access.clone());
        // In this order: whom it would choose it has chosen by now, if it has begun.
        let replicas = line.ask(&["SENTINEL", "REPLICAS", &charge.master]).await?;
        let master = line.ask(&["SENTINEL", "MASTER", &charge.master]).await?;
        Ok::<_, LineError>(Word::of(&replicas, &master, &charge.address))
    });
    let words: Result<Vec<Word>, LineError> = join_all(asked).await.into_iter().collect();
    match words {
        Ok(words) => judge(&words, &charge.address),
        Err(error) => {
            debug!(%error, "a sentinel does not say whether it passes the server over");
            Hearing::Silent
        }
    }
}

fn judge(words: &[Word], own: &NodeAddr) -> Hearing {
    let has_heard = |word: &Word| {
        // One that is not asked might choose.
        word.passes_over && !word.is_failing_over && word.others.is_some_and(|others| others < words.len())
    };
    match words.first().and_then(|word| word.primary.as_ref()) {
        Some(primary) if primary != own && words.iter().all(|word| has_heard(word) && word.primary.as_ref() == Some(primary)) => {
            Hearing::PassedOver { primary: primary.clone() }
        }
        _ => Hearing::NotYet,
    }
}

impl Word {
    fn of(replicas: &Value, master: &Value, own: &NodeAddr) -> Self {
        let replicas = replicas.as_list().unwrap_or_default();
        let itself = replicas.iter().find(|replica| address(replica).is_some_and(|it| is_same(&it, own)));
        let flags = text(master, "flags").unwrap_or_default();
        Self {
            passes_over: itself.and_then(|replica| text(replica, "slave-priority")) == Some("0"),
            primary: address(master),
            is_failing_over: flags.split(',').any(|flag| flag == "failover_in_progress"),
            others: text(master, "num-other-sentinels").and_then(|count| count.parse().ok()),
        }
    }
}

fn text<'a>(entry: &'a Value, name: &str) -> Option<&'a str> {
    entry.field(name).and_then(Value::as_str)
}

fn address(entry: &Value) -> Option<NodeAddr> {
    Some(NodeAddr::new(text(entry, "ip")?, text(entry, "port")?.parse().ok()?))
}

fn is_same(one: &NodeAddr, other: &NodeAddr) -> bool {
    let of = |address: &NodeAddr| address.host().parse::<IpAddr>().ok().map(|ip| (ip.to_canonical(), address.port()));
    one == other || (of(one).is_some() && of(one) == of(other))
}

/// Notes at the primary that this server has retired, once it has ended; where. `None`: that could not be done in time.
///
/// All sentinels must have passed it over before. They are asked again: until its end anybody could have told the server otherwise.
pub async fn note(charge: &Charge, access: &ClusterAccess) -> Option<NodeAddr> {
    let deadline = Instant::now() + NOTED_WITHIN;
    while Instant::now() < deadline {
        // What the server said last is on its way for a moment.
        sleep(ASK_EVERY).await;
        let Hearing::PassedOver { primary } = hearing(charge, &access.sentinels).await else { continue };
        match note_at(&primary, &charge.address, &access.servers).await {
            Ok(true) => return Some(primary),
            Ok(false) => {}
            Err(error) => debug!(%error, "the primary does not note that the server has retired"),
        }
    }
    None
}

async fn note_at(primary: &NodeAddr, own: &NodeAddr, access: &Access) -> Result<bool, LineError> {
    let mut line = Line::new(primary.clone(), access.clone());
    let info = replication(&mut line).await?;
    let (Some(Role::Primary), Some(reign)) = (info.role(), info.lineage()) else { return Ok(false) };
    line.ask(&["SET", &retired::key(own), reign, "EX", NOTE_SECS]).await.map(|_| true)
}

/// Takes a note back that stands at a primary. What an agent before this one sent there has been carried out by then: the primary has
/// answered a greeting on a connection that is younger.
pub async fn take_back(primary: &mut Line, own: &NodeAddr) -> Result<(), LineError> {
    let key = retired::key(own);
    primary.ask(&["PING"]).await?;
    // Where there is none nothing is written: a primary may refuse writes until more replicas are there.
    match primary.ask(&["GET", &key]).await? {
        Value::Nil => Ok(()),
        _ => primary.ask(&["DEL", &key]).await.map(drop),
    }
}

async fn replication(line: &mut Line) -> Result<Info, LineError> {
    let answer = line.ask(&["INFO", "replication"]).await?;
    Ok(Info::parse(answer.as_str().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fields: &[(&str, &str)]) -> Value {
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        Value::List(fields.iter().flat_map(|(name, value)| [text(name), text(value)]).collect())
    }

    fn word(priority: &str, flags: &str, primary: &str, others: &str) -> Word {
        let replica = |ip, priority| entry(&[("ip", ip), ("port", "1"), ("slave-priority", priority)]);
        let replicas = Value::List(vec![replica("10.0.0.3", "100"), replica("10.0.0.2", priority)]);
        let master = entry(&[("ip", primary), ("port", "1"), ("flags", flags), ("num-other-sentinels", others)]);
        Word::of(&replicas, &master, &own())
    }

    fn own() -> NodeAddr {
        NodeAddr::new("10.0.0.2", 1)
    }

    #[test]
    fn it_has_retired_once_every_sentinel_passes_it_over_and_none_has_chosen() {
        let good = || word("0", "master", "10.0.0.1", "1");
        let primary = NodeAddr::new("10.0.0.1", 1);
        assert_eq!(judge(&[good(), good()], &own()), Hearing::PassedOver { primary });
        for (bad, why) in [
            (word("100", "master", "10.0.0.1", "1"), "one has not heard"),
            (word("0", "master,failover_in_progress", "10.0.0.1", "1"), "one may have chosen it before"),
            (word("0", "master", "10.0.0.3", "1"), "one names another primary"),
            (word("0", "master", "10.0.0.1", "2"), "one knows a sentinel that is not asked"),
        ] {
            assert_eq!(judge(&[good(), bad], &own()), Hearing::NotYet, "{why}");
        }
        let itself = || word("0", "master", "10.0.0.2", "1");
        assert_eq!(judge(&[itself(), itself()], &own()), Hearing::NotYet);
        let unknown = Word::of(&Value::List(Vec::new()), &entry(&[("ip", "10.0.0.1"), ("port", "1")]), &own());
        assert!(!unknown.passes_over, "one that does not know it may come to");
        assert_eq!(judge(&[], &own()), Hearing::NotYet);
    }
}
