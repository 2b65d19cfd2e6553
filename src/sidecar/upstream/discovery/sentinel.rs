//! Follows the primary that the sentinels name.
//!
//! All sentinels are asked, and the answer with the newest configuration epoch counts: an epoch is won by a majority of votes, so
//! of two answers the one with the lower epoch is an old story. The node itself must then confirm that it is a primary. An epoch
//! below the one in use is believed only from a majority, which tells sentinels that were set up anew from one that was cut off.
//! At the start, when nothing is in use yet, a minority is believed only after a grace period.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::io::BufReader;
use tokio::time::{Instant, timeout};

use super::gather::gather;
use super::subscription::Subscriptions;
use super::{ANSWER_LIMIT, AskError, DiscoveryError, Refresh};
use crate::sidecar::upstream::access::{Access, ClusterAccess};
use crate::sidecar::upstream::admin_client::{Value, ask};
use crate::sidecar::upstream::dial::{Link, Role, dial_any};
use crate::sidecar::upstream::heirs::Heir;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::view::ViewKind;

/// The most sentinels that are asked, those that are learnt included.
const MAX_SENTINELS: usize = 16;
/// How long after the start only a majority is believed.
const MAJORITY_GRACE: Duration = Duration::from_secs(3);

/// What one sentinel tells.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Report {
    from: NodeAddr,
    /// Its own identity: an address may be one of several.
    id: String,
    primary: NodeAddr,
    epoch: u64,
    /// The other sentinels that it knows.
    peers: Vec<(String, NodeAddr)>,
    /// The replicas that it can reach.
    replicas: Vec<NodeAddr>,
    /// All that it knows, and whether it passes each over.
    heirs: Vec<(NodeAddr, bool)>,
}

/// The primary to confirm.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    node: NodeAddr,
    epoch: u64,
    replicas: Vec<NodeAddr>,
    /// How many sentinels there are.
    sentinels: usize,
}

/// Asks the sentinels of one primary.
pub struct SentinelFollower {
    master: String,
    seeds: Vec<NodeAddr>,
    learnt: Vec<NodeAddr>,
    access: ClusterAccess,
    links: HashMap<NodeAddr, BufReader<Link>>,
    /// What each sentinel told last, by its identity: one that is silent now may lead the next election.
    last: BTreeMap<String, Report>,
    subscriptions: Subscriptions,
    /// The epoch of the finding in use.
    newest: Option<u64>,
    started: Instant,
}

impl SentinelFollower {
    /// `newest` is the epoch of a finding that is in use already.
    pub fn new(master: String, seeds: Vec<NodeAddr>, access: ClusterAccess, newest: Option<u64>, refresh: Refresh) -> Self {
        let subscriptions = Subscriptions::new(master.clone(), access.sentinels.clone(), refresh);
        let started = Instant::now();
        Self {
            master,
            seeds,
            learnt: Vec::new(),
            access,
            links: HashMap::new(),
            last: BTreeMap::new(),
            subscriptions,
            newest,
            started,
        }
    }

    /// The epoch of the finding in use.
    pub const fn newest(&self) -> Option<u64> {
        self.newest
    }

    pub async fn round(&mut self) -> Result<ViewKind, DiscoveryError> {
        let sentinels: Vec<NodeAddr> = self.seeds.iter().chain(&self.learnt).take(MAX_SENTINELS).cloned().collect();
        self.subscriptions.keep(&sentinels);
        let asks: Vec<_> = sentinels
            .iter()
            .map(|sentinel| ask_sentinel(sentinel, self.links.remove(sentinel), &self.master, &self.access.sentinels))
            .collect();
        let (answers, errors) = gather(asks, sentinels.len() / 2 + 1).await;
        let mut reports = Vec::new();
        for (report, link) in answers {
            self.links.insert(report.from.clone(), link);
            reports.push(report);
        }
        self.learn(&reports);
        if reports.is_empty() {
            let first = errors.first().map_or_else(|| "there was no answer".to_owned(), ToString::to_string);
            return Err(DiscoveryError::NoAnswer { asked: sentinels.len(), first });
        }
        let candidate = choose(&reports, self.seeds.len(), self.newest, self.started.elapsed() > MAJORITY_GRACE)?;
        self.confirm(&candidate.node).await?;
        self.newest = Some(candidate.epoch);
        self.remember(reports);
        let heirs = heirs(&self.last, &candidate);
        Ok(ViewKind::Primary { node: candidate.node, replicas: candidate.replicas, heirs })
    }

    /// Remembers the sentinels that the reports name and that no seed is.
    fn learn(&mut self, reports: &[Report]) {
        if reports.is_empty() {
            return;
        }
        let seeds: BTreeSet<&str> =
            reports.iter().filter(|report| self.seeds.contains(&report.from)).map(|report| report.id.as_str()).collect();
        let peers = reports.iter().flat_map(|report| &report.peers);
        let learnt: BTreeMap<&str, &NodeAddr> =
            peers.filter(|(id, _)| !seeds.contains(id.as_str())).map(|(id, address)| (id.as_str(), address)).collect();
        self.learnt = learnt.into_values().filter(|address| !self.seeds.contains(address)).cloned().collect();
        let known: BTreeSet<&NodeAddr> = self.seeds.iter().chain(&self.learnt).collect();
        self.links.retain(|address, _| known.contains(address));
    }

    /// Keeps what was told last by sentinels of which others still know.
    fn remember(&mut self, reports: Vec<Report>) {
        let peers = reports.iter().flat_map(|report| report.peers.iter().map(|(id, _)| id.clone()));
        let known: BTreeSet<String> = peers.collect();
        self.last.retain(|id, _| known.contains(id));
        self.last.extend(reports.into_iter().map(|report| (report.id.clone(), report)));
    }

    async fn confirm(&self, node: &NodeAddr) -> Result<(), DiscoveryError> {
        let unconfirmed = |reason: String| DiscoveryError::Unconfirmed { node: node.clone(), reason };
        match dial_any(node, &self.access.servers, Instant::now() + ANSWER_LIMIT).await {
            Ok((_, Role::Primary)) => Ok(()),
            Ok((_, role)) => Err(unconfirmed(format!("its role is {role:?}"))),
            Err(error) => Err(unconfirmed(error.to_string())),
        }
    }
}

/// Picks the primary to confirm. There are at least `seeds` sentinels; `newest` is the epoch of the finding in use.
fn choose(reports: &[Report], seeds: usize, newest: Option<u64>, minority_will_do: bool) -> Result<Candidate, DiscoveryError> {
    let by_id: BTreeMap<&str, &Report> = reports.iter().map(|report| (report.id.as_str(), report)).collect();
    let peers = reports.iter().flat_map(|report| report.peers.iter().map(|(id, _)| id.as_str()));
    let total = by_id.keys().copied().chain(peers).collect::<BTreeSet<_>>().len().max(seeds);
    let votes = |node: &NodeAddr| by_id.values().filter(|report| report.primary == *node).count();
    let best = by_id.values().max_by_key(|report| (report.epoch, votes(&report.primary), report.replicas.len()));
    let Some(best) = best else { return Err(DiscoveryError::TooFew { answered: 0, total }) };
    let is_majority = |count: usize| count * 2 > total;
    match newest {
        Some(newest) if best.epoch < newest && !is_majority(votes(&best.primary)) => {
            return Err(DiscoveryError::Stale { from: best.from.clone(), epoch: best.epoch, newest });
        }
        None if !minority_will_do && !is_majority(by_id.len()) => {
            return Err(DiscoveryError::TooFew { answered: by_id.len(), total });
        }
        _ => {}
    }
    // What any of them sees any of them may promote.
    let agreeing = by_id.values().filter(|report| report.primary == best.primary);
    let replicas: BTreeSet<NodeAddr> = agreeing.flat_map(|report| report.replicas.iter().cloned()).collect();
    Ok(Candidate { node: best.primary.clone(), epoch: best.epoch, replicas: replicas.into_iter().collect(), sentinels: total })
}

/// Whoever one of the sentinels might make the next primary, by what each told last.
fn heirs(last: &BTreeMap<String, Report>, candidate: &Candidate) -> Vec<Heir> {
    let mut heirs: BTreeMap<&NodeAddr, bool> = BTreeMap::new();
    let all = last.values().flat_map(|report| &report.heirs).filter(|(address, _)| *address != candidate.node);
    all.for_each(|(address, passes_over)| *heirs.entry(address).or_insert(true) &= passes_over);
    // One that has told nothing yet may choose any of them.
    let is_told = last.len() >= candidate.sentinels;
    let heir = |(address, is_passed_over): (&NodeAddr, bool)| Heir { address: address.clone(), is_passed_over };
    heirs.into_iter().map(|(address, passed_over)| heir((address, passed_over && is_told))).collect()
}

/// Asks one sentinel, on `link` where there is one from the last round.
async fn ask_sentinel(
    sentinel: &NodeAddr,
    link: Option<BufReader<Link>>,
    master: &str,
    access: &Access,
) -> Result<(Report, BufReader<Link>), AskError> {
    if let Some(link) = link
        && let Ok(answer) = question(sentinel, link, master).await
    {
        return Ok(answer);
    }
    let (link, _) = dial_any(sentinel, access, Instant::now() + ANSWER_LIMIT).await?;
    question(sentinel, BufReader::new(link), master).await
}

async fn question(sentinel: &NodeAddr, mut link: BufReader<Link>, master: &str) -> Result<(Report, BufReader<Link>), AskError> {
    let master = master.as_bytes();
    let commands: [&[&[u8]]; 5] = [
        &[b"SENTINEL", b"MYID"],
        &[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master],
        &[b"SENTINEL", b"MASTER", master],
        &[b"SENTINEL", b"SENTINELS", master],
        &[b"SENTINEL", b"REPLICAS", master],
    ];
    let replies = timeout(ANSWER_LIMIT, ask(&mut link, &commands)).await;
    let replies = replies.map_err(|_| AskError::answer(sentinel, "the sentinel did not answer in time"))?;
    let replies = replies.map_err(|error| AskError::answer(sentinel, error))?;
    let report = read_report(sentinel, &replies).map_err(|reason| AskError::answer(sentinel, reason))?;
    Ok((report, link))
}

fn read_report(sentinel: &NodeAddr, replies: &[Value]) -> Result<Report, String> {
    let [id, address, master, sentinels, all_replicas] = replies else { return Err("a reply is missing".to_owned()) };
    if let Value::Error(text) = master {
        return Err(format!("the sentinel said `{}`: is the primary's name right?", text.chars().take(100).collect::<String>()));
    }
    let configured = read_address(master).ok_or("its word on the primary is incomplete")?;
    let epoch = master.field("config-epoch").and_then(Value::as_int).and_then(|epoch| u64::try_from(epoch).ok());
    let epoch = epoch.ok_or("its word on the primary has no epoch")?;
    let named = match address.as_list() {
        Some([host, port]) => to_address(host, port).ok_or("it names a primary without an address")?,
        _ => return Err("it names no primary".to_owned()),
    };
    // The leader of a failover names the promoted node before it writes the new epoch down: that epoch is at least the next.
    let epoch = if named == configured { epoch } else { epoch + 1 };
    let peers = entries(sentinels).filter_map(|peer| Some((peer.field("runid")?.as_str()?.to_owned(), read_address(peer)?)));
    let mut replicas: Vec<NodeAddr> = entries(all_replicas)
        .filter(|replica| is_reachable(replica))
        .filter_map(read_address)
        .filter(|it| *it != named)
        .collect();
    replicas.sort();
    replicas.dedup();
    // One that is replacing the primary may have chosen before it heard.
    let flags = master.field("flags").and_then(Value::as_str).unwrap_or_default();
    let is_choosing = flags.split(',').any(|flag| flag == "failover_in_progress");
    let passes_over = |replica: &Value| !is_choosing && replica.field("slave-priority").and_then(Value::as_int) == Some(0);
    let heirs = entries(all_replicas).filter_map(|replica| Some((read_address(replica)?, passes_over(replica)))).collect();
    // Sentinels before 6.2 do not tell their own identity.
    let id = id.as_str().map_or_else(|| sentinel.to_string(), str::to_owned);
    let peers = peers.take(MAX_SENTINELS).collect();
    Ok(Report { from: sentinel.clone(), id, primary: named, epoch, peers, replicas, heirs })
}

fn entries(reply: &Value) -> impl Iterator<Item = &Value> {
    reply.as_list().unwrap_or_default().iter()
}

fn read_address(entry: &Value) -> Option<NodeAddr> {
    to_address(entry.field("ip")?, entry.field("port")?)
}

/// Through the text form, so that a host is never anything but what an address may hold.
fn to_address(host: &Value, port: &Value) -> Option<NodeAddr> {
    let port = u16::try_from(port.as_int()?).ok()?;
    NodeAddr::new(host.as_str()?, port).to_string().parse().ok()
}

fn is_reachable(replica: &Value) -> bool {
    let flags = replica.field("flags").and_then(Value::as_str).unwrap_or_default();
    !flags.split(',').any(|flag| matches!(flag, "s_down" | "o_down" | "disconnected"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(host: &str) -> NodeAddr {
        NodeAddr::new(host, 6379)
    }

    /// Sentinel `id` of three says that `primary` is the primary since `epoch`.
    fn report(id: u8, primary: &str, epoch: u64) -> Report {
        let peers = (0..3).filter(|peer| *peer != id).map(|peer| (peer.to_string(), node(&format!("s{peer}")))).collect();
        let from = node(&format!("s{id}"));
        Report { from, id: id.to_string(), primary: node(primary), epoch, peers, replicas: Vec::new(), heirs: Vec::new() }
    }

    #[track_caller]
    fn check(reports: &[Report], newest: Option<u64>, want: Option<&str>) {
        let chosen = choose(reports, 1, newest, false).ok().map(|candidate| candidate.node.host().to_owned());
        assert_eq!(chosen.as_deref(), want);
    }

    #[test]
    fn the_newest_epoch_counts_and_an_old_story_does_not() {
        check(&[report(0, "a", 1), report(1, "b", 2), report(2, "b", 2)], None, Some("b"));
        // The first to know of a failover is alone for a moment.
        check(&[report(0, "a", 1), report(1, "a", 1), report(2, "b", 2)], Some(1), Some("b"));
        // One that was cut off comes back while the others are away.
        check(&[report(0, "a", 1)], Some(2), None);
        // All were set up anew.
        check(&[report(0, "a", 0), report(1, "a", 0)], Some(2), Some("a"));
        check(&[report(0, "a", 0), report(1, "c", 0)], Some(2), None);
    }

    #[test]
    fn at_the_start_a_minority_is_believed_only_after_the_grace_period() {
        check(&[report(0, "a", 1)], None, None);
        assert!(choose(&[report(0, "a", 1)], 3, None, true).is_ok());
        check(&[report(0, "a", 1), report(1, "a", 1)], None, Some("a"));
    }

    #[test]
    fn one_that_knows_no_other_is_no_majority_of_those_configured() {
        let mut alone = report(0, "a", 1);
        alone.peers.clear();
        assert!(choose(std::slice::from_ref(&alone), 3, Some(2), true).is_err());
        assert!(choose(&[alone], 1, Some(2), true).is_ok());
    }

    #[test]
    fn one_sentinel_under_two_addresses_has_one_vote() {
        let mut twin = report(0, "a", 1);
        twin.from = node("other-name");
        check(&[report(0, "a", 1), twin], None, None);
    }

    #[test]
    fn a_replica_is_passed_over_only_where_all_sentinels_do() {
        let told = |id: u8, heirs: &[(&str, bool)]| {
            let heirs = heirs.iter().map(|(host, passed_over)| (node(host), *passed_over)).collect();
            (id.to_string(), Report { heirs, ..report(id, "a", 1) })
        };
        let all = [(0, [("a", true), ("b", true), ("c", true)]), (1, [("a", true), ("b", true), ("c", false)])];
        let mut last: BTreeMap<String, Report> = all.iter().map(|(id, heirs)| told(*id, heirs)).collect();
        let candidate = Candidate { node: node("a"), epoch: 1, replicas: Vec::new(), sentinels: 3 };
        let passed_over = |last: &BTreeMap<String, Report>| -> Vec<(String, bool)> {
            heirs(last, &candidate).iter().map(|heir| (heir.address.host().to_owned(), heir.is_passed_over)).collect()
        };
        let all = |b, c| [("b".to_owned(), b), ("c".to_owned(), c)];
        assert_eq!(passed_over(&last), all(false, false), "the third has told nothing");
        last.extend([told(2, &[])]);
        assert_eq!(passed_over(&last), all(true, false));
    }

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    fn entry(fields: &[(&str, &str)]) -> Value {
        Value::List(fields.iter().flat_map(|(name, value)| [text(name), text(value)]).collect())
    }

    #[test]
    fn a_report_is_read_from_the_replies() {
        let master = entry(&[("ip", "10.0.0.1"), ("port", "1"), ("config-epoch", "7")]);
        let replies = |named: &str| {
            let peer = entry(&[("ip", "fd00::9"), ("port", "26379"), ("runid", "peer")]);
            let up = entry(&[("ip", "10.0.0.3"), ("port", "1"), ("flags", "slave")]);
            let down = [("ip", "10.0.0.4"), ("port", "1"), ("flags", "s_down,slave,disconnected"), ("slave-priority", "0")];
            let down = entry(&down);
            let named = Value::List(vec![text(named), text("1")]);
            [text("me"), named, master.clone(), Value::List(vec![peer]), Value::List(vec![down, up])]
        };
        let report = read_report(&node("s"), &replies("10.0.0.1")).unwrap();
        assert_eq!((report.id.as_str(), report.epoch), ("me", 7));
        assert_eq!(report.peers, [("peer".to_owned(), NodeAddr::new("fd00::9", 26379))]);
        assert_eq!(report.replicas, [NodeAddr::new("10.0.0.3", 1)]);
        assert_eq!(report.heirs, [(NodeAddr::new("10.0.0.4", 1), true), (NodeAddr::new("10.0.0.3", 1), false)]);
        let promoted = read_report(&node("s"), &replies("10.0.0.3")).unwrap();
        assert_eq!((promoted.primary.host(), promoted.epoch), ("10.0.0.3", 8));
        assert_eq!(promoted.replicas, []);
        let unknown = [text("me"), Value::Nil, Value::Error("ERR No such master".to_owned()), Value::Nil, Value::Nil];
        assert!(read_report(&node("s"), &unknown).unwrap_err().contains("name"));
    }

    proptest! {
        /// Whatever three sentinels say, what is chosen is no older than what is in use unless most of them say so.
        #[test]
        fn only_a_majority_turns_back(said in proptest::collection::vec((0u8..3, 0u8..3, 0u64..4), 0..6), newest in 0u64..4) {
            let reports: Vec<Report> = said.iter().map(|(id, host, epoch)| report(*id, &host.to_string(), *epoch)).collect();
            if let Ok(chosen) = choose(&reports, 3, Some(newest), true) && chosen.epoch < newest {
                let voters: BTreeSet<&str> = reports.iter().filter(|it| it.primary == chosen.node).map(|it| it.id.as_str()).collect();
                prop_assert!(voters.len() >= 2);
            }
        }
    }
}
