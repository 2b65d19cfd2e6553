//! What is told of a policy: its status, and the events that a change of it makes. Pure: facts become words, all of them bounded.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use super::cache::{Figures, Notice};
use super::relay::ABANDON_ANNOTATION;
use super::relay::feeds::Feeds;
use super::relay::tend::{Carriage, left};
use super::verdict::Judgement;
use crate::api::CachePolicy;
use crate::api::cache_policy::{
    CachePolicyStatus, ConditionType, ConnectionsStatus, GenerationStatus, JournalStatus, MAX_GENERATIONS, MAX_NAME_CHARS,
    MAX_NAMED, MAX_REFUSED_CHARS, SidecarsStatus, WorkloadsStatus,
};
use crate::journal::Level;
use crate::operator::cache_cluster::report::{Happening, Verdict, condition};
use crate::policy::Snapshot;
use crate::policy::heartbeat::RuleBeat;
use crate::policy::snapshot::{Origin, VERSION};

/// What is told of a policy that is delivered.
const READY: &str = "its rules lie ready for the sidecars of every workload that it selects";

/// How far the snapshot of a workload has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It lies where sidecars find it.
    Delivered,
    /// An earlier one stays, since something is missing that these policies name.
    WaitsForPolicies(Vec<String>),
    /// Servers do not know yet what its sidecars may do.
    WaitsForUser {
        /// The CacheCluster.
        cluster: String,
    },
    /// The CacheCluster has no room for another workload's user, or for all that it is to be able to do.
    NoRoom {
        /// The CacheCluster.
        cluster: String,
    },
    /// There is none, and an earlier one stays where there was one: something is missing, or no policy is accepted.
    Nothing,
    /// An object could not be written.
    NotWritten(String),
}

/// What a policy is to one workload.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The workload, as a kind and a name with a slash between.
    pub workload: &'a str,
    /// What came of the policy there.
    pub judgement: &'a Judgement,
    /// How far the snapshot has come.
    pub progress: &'a Progress,
    /// The snapshot that lies there.
    pub snapshot: Option<&'a Snapshot>,
    /// How many pods run that mount it.
    pub sidecars: u32,
    /// What they told.
    pub figures: Option<&'a Figures>,
    /// What the policy's rules are called in the snapshot.
    pub rules: &'a BTreeSet<String>,
}

/// What a policy's relay does for it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Relayed<'a> {
    /// How far its journals are carried. `None`: no rule writes behind.
    pub carriage: Option<&'a Carriage>,
    /// How databases' changes are read. `None`: no rule follows a table.
    pub feeds: Option<&'a Feeds>,
    /// Whether the policy is being deleted.
    pub is_leaving: bool,
}

/// All verdicts on a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdicts {
    accepted: Verdict,
    resolved: Verdict,
    delivered: Verdict,
    /// `None`: no rule writes behind.
    carried: Option<Verdict>,
    /// `None`: no rule follows a table.
    followed: Option<Verdict>,
}

impl Verdicts {
    /// From what came of a policy for each workload. `alone`: what would come of it for one that it had to itself, asked where there is none.
    pub fn of(parts: &[Part<'_>], alone: impl Fn() -> Judgement) -> Self {
        let first = |verdict: fn(&Judgement) -> Verdict| {
            let all = parts.iter().map(|part| verdict(part.judgement));
            let worst = all.clone().find(|verdict| !verdict.holds);
            // Of those that hold, one that has something to say.
            worst.or_else(|| all.max_by_key(|verdict| verdict.message.len())).unwrap_or_else(|| verdict(&alone()))
        };
        let (accepted, resolved) = (first(Judgement::accepted), first(Judgement::resolved_refs));
        let goes_on = !parts.is_empty() && parts.iter().all(|part| part.judgement.has_part());
        let delivered = delivered(parts, accepted.holds && (resolved.holds || goes_on));
        Self { accepted, resolved, delivered, carried: None, followed: None }
    }

    /// Of a policy that is being deleted and waits for its relay.
    pub fn leaving() -> Self {
        let gone = || Verdict::no("Deleted", "the policy is being deleted: its rules are in force for no workload any more");
        Self { accepted: gone(), resolved: gone(), delivered: gone(), carried: None, followed: None }
    }

    /// The same of a policy whose relay does this for it.
    #[must_use]
    pub fn with(self, Relayed { carriage, feeds, is_leaving }: Relayed<'_>) -> Self {
        let followed = feeds.and_then(|feeds| feeds.verdict(is_leaving));
        Self { carried: carriage.map(carried), followed, ..self }
    }

    /// Of a policy that cannot be read.
    pub fn unreadable(error: &str, goes_on: bool) -> Self {
        let later = if goes_on {
            "it goes on as it was when it could last be read"
        } else {
            "the workloads that it selects keep what they have until it can be read"
        };
        Self {
            accepted: Verdict::no("Unreadable", format!("it cannot be read: {error}: correct it, or delete it")),
            resolved: Verdict::no("Unreadable", later),
            delivered: Verdict::no("Unreadable", later),
            carried: None,
            followed: None,
        }
    }

    fn get(&self, kind: ConditionType) -> Option<&Verdict> {
        match kind {
            ConditionType::Accepted => Some(&self.accepted),
            ConditionType::ResolvedRefs => Some(&self.resolved),
            ConditionType::Delivered => Some(&self.delivered),
            ConditionType::Carried => self.carried.as_ref(),
            ConditionType::Followed => self.followed.as_ref(),
        }
    }

    /// In a word or two.
    fn summary(&self) -> &'static str {
        match self {
            Self { accepted: Verdict { reason: "Deleted", .. }, .. } => "Draining",
            Self { accepted: Verdict { holds: false, reason, .. }, .. }
            | Self { resolved: Verdict { holds: false, reason, .. }, .. } => reason,
            Self { carried: Some(Verdict { holds: false, reason: reason @ ("Late" | "DeadLetters"), .. }), .. }
            | Self { followed: Some(Verdict { holds: false, reason: reason @ ("Late" | "NotRead" | "Trouble"), .. }), .. } => {
                reason
            }
            Self { delivered: Verdict { holds: true, .. }, .. } => "Delivered",
            Self { delivered: Verdict { reason: "WaitsForUser" | "WaitsForPolicy", .. }, .. } => "Waiting",
            Self { delivered, .. } => delivered.reason,
        }
    }
}

/// Whether origins have in time what was written behind.
fn carried(carriage: &Carriage) -> Verdict {
    let Carriage { level, late, is_leaving } = carriage;
    if *is_leaving {
        let message = format!(
            "the policy goes once its origins have all that was written behind: {}; see that they answer, decide about dead letters with `larder \
             dead-letters`, or give the rest up with the annotation {ABANDON_ANNOTATION}",
            left(*level)
        );
        return Verdict::no("Draining", message);
    }
    match (level, late) {
        (None, _) => Verdict::no("Unknown", "the cache does not say what its journals hold: see the CacheCluster's status"),
        (Some(level), Some((journal, bound))) => Verdict::no(
            "Late",
            format!(
                "the oldest write in the journal `{journal}` is older than {bound}, and new ones are refused until its origin has it: \
                 {}; see that the origin answers, and what the relay's log says",
                left(Some(*level))
            ),
        ),
        (Some(Level { dead: 1.., .. }), None) => Verdict::no(
            "DeadLetters",
            "an origin refused writes that were acknowledged: see `larder dead-letters list`, and replay or drop them",
        ),
        (Some(_), None) => Verdict::yes("InTime", "origins have what was written behind within its maxLag"),
    }
}

/// What journals hold, at this time.
fn journal(level: &Level, now: Timestamp) -> JournalStatus {
    let lag_seconds = level.lag_ms / 1_000;
    let at = |seconds: u64| Timestamp::from_second(now.as_second().saturating_sub(i64::try_from(seconds).ok()?)).ok();
    let oldest = (level.depth > 0).then(|| at(lag_seconds)).flatten().map(|oldest| oldest.to_string());
    JournalStatus { depth: level.depth, bytes: level.bytes, lag_seconds, oldest, dead_letters: level.dead }
}

fn delivered(parts: &[Part<'_>], is_in_order: bool) -> Verdict {
    let failed = parts.iter().find_map(|part| match part.progress {
        Progress::NotWritten(error) => Some(Verdict::no("NotWritten", format!("for {}: {error}", part.workload))),
        _ => None,
    });
    let has_no_room = parts.iter().find_map(|part| match part.progress {
        Progress::NoRoom { cluster } => Some(Verdict::no(
            "NoRoom",
            format!(
                "the CacheCluster `{cluster}` has no room for the user of {}: it takes 900 workloads, and 800 KiB of what they may do; shorten \
                 patterns, or use another CacheCluster",
                part.workload
            ),
        )),
        _ => None,
    });
    let waits = parts.iter().find_map(|part| match part.progress {
        Progress::WaitsForUser { cluster } => Some(Verdict::no(
            "WaitsForUser",
            format!(
                "the snapshot of {} follows once every server of the CacheCluster `{cluster}` knows what its sidecars may do, which \
                 takes a minute or so; the status of `{cluster}` tells what it waits for",
                part.workload
            ),
        )),
        _ => None,
    });
    let waits_for_others = parts.iter().find_map(|part| match part.progress {
        Progress::WaitsForPolicies(policies) => Some(Verdict::no(
            "WaitsForPolicy",
            format!(
                "the last good snapshot of {} stays in force, without what was changed here, until all is there that the CachePolicy {} \
                 names: its own status tells what is missing",
                part.workload,
                policies.iter().take(MAX_NAMED).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
            ),
        )),
        _ => None,
    });
    let nothing = parts.iter().any(|part| *part.progress == Progress::Nothing) || !is_in_order;
    match failed.or(has_no_room).or(waits).or(waits_for_others.filter(|_| is_in_order)) {
        Some(verdict) => verdict,
        None if nothing => Verdict::no("NotInForce", "what it says is not in force everywhere: the other conditions tell why"),
        None if parts.is_empty() => Verdict::no(
            "NoWorkload",
            "no Deployment, StatefulSet, DaemonSet or CronJob makes pods with these labels, and no pod with a sidecar has them: see \
             spec.workloads",
        ),
        None => Verdict::yes("Delivered", format!("{READY}{}", left_out(parts).unwrap_or_default())),
    }
}

/// What follows that where sidecars are older than this operator.
fn left_out(parts: &[Part<'_>]) -> Option<String> {
    let is_older = |part: &&Part<'_>| part.sidecars > 0 && part.snapshot.is_some_and(|snapshot| snapshot.version < VERSION);
    let part = parts.iter().find(is_older)?;
    let (workload, form) = (part.workload, part.snapshot?.version);
    Some(format!(
        "; sidecars of {workload} are of an older version, and know the form {form} of snapshots: what it cannot say is left out until all of \
         its pods have been made anew"
    ))
}

/// The status of a policy, given the one before.
pub fn status(
    policy: &CachePolicy,
    verdicts: &Verdicts,
    parts: &[Part<'_>],
    Relayed { carriage, feeds, .. }: Relayed<'_>,
    before: &CachePolicyStatus,
    now: Timestamp,
) -> CachePolicyStatus {
    let names = parts.iter().take(MAX_NAMED).map(|part| begin(part.workload, MAX_NAME_CHARS)).collect();
    CachePolicyStatus {
        observed_generation: policy.metadata.generation,
        conditions: conditions(&before.conditions, verdicts, policy.metadata.generation, now),
        summary: Some(verdicts.summary().to_owned()),
        workloads: Some(WorkloadsStatus {
            matched: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            names,
            generation: parts.iter().filter_map(|part| Some(part.snapshot?.generation)).max(),
        }),
        sidecars: Some(sidecars(parts)),
        hit_ratio: ratio(&counts(parts), |count| count.hits, |count| count.misses),
        origin_load_saved: ratio(&counts(parts), |count| count.saved, |count| count.loads),
        connections: connections(parts),
        journal: carriage.and_then(|carriage| carriage.level).map(|level| journal(&level, now)),
        changes: feeds.map(Feeds::status).unwrap_or_default(),
    }
}

/// The conditions as they are to stand, given those that do.
pub fn conditions(previous: &[Condition], verdicts: &Verdicts, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let of = |kind: ConditionType| Some(condition(previous, kind.as_str(), verdicts.get(kind)?, generation, now));
    ConditionType::ALL.into_iter().filter_map(of).collect()
}

fn sidecars(parts: &[Part<'_>]) -> SidecarsStatus {
    let total: u32 = parts.iter().map(|part| part.sidecars).fold(0, u32::saturating_add);
    // What has not been heard, or not of late, is not known: who is silent for three intervals is none that lives.
    let is_heard = |figures: &&Figures| figures.listening && figures.live > 0;
    let heard: Vec<&Figures> = parts.iter().filter_map(|part| part.figures).filter(is_heard).collect();
    let current: u32 = heard.iter().map(|figures| figures.current).fold(0, u32::saturating_add);
    let current = if heard.is_empty() { format!("-/{total}") } else { format!("{}/{total}", current.min(total)) };
    let refused = heard.iter().find_map(|figures| figures.refused.as_ref());
    SidecarsStatus {
        current,
        total,
        refused: refused.map(|refused| begin(&refused.reason, MAX_REFUSED_CHARS)),
        generations: generations(&heard),
    }
}

/// How many sidecars have which generation in force, of the newest.
fn generations(heard: &[&Figures]) -> Vec<GenerationStatus> {
    let mut sums: BTreeMap<u64, u32> = BTreeMap::new();
    for (generation, sidecars) in heard.iter().flat_map(|figures| &figures.generations) {
        let sum = sums.entry(*generation).or_default();
        *sum = sum.saturating_add(*sidecars);
    }
    let newest = sums.into_iter().rev().take(MAX_GENERATIONS);
    newest.map(|(generation, sidecars)| GenerationStatus { generation, sidecars }).collect()
}

/// The first characters of a text that others chose: the API server refuses a whole status for one that is too long.
fn begin(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}

/// What was counted for the rules of one policy.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    hits: u64,
    misses: u64,
    loads: u64,
    saved: u64,
}

fn counts(parts: &[Part<'_>]) -> Counts {
    let mut sum = Counts::default();
    for part in parts {
        let rules = part.figures.into_iter().flat_map(|figures| &figures.rules);
        for (_, beat) in rules.filter(|(name, _)| part.rules.contains(*name)) {
            let (saved, loads) = loads(beat);
            sum = Counts {
                hits: sum.hits.saturating_add(beat.hits),
                misses: sum.misses.saturating_add(beat.misses),
                loads: sum.loads.saturating_add(loads),
                saved: sum.saved.saturating_add(saved),
            };
        }
    }
    sum
}

/// How many reads needed no load, and how many loads there were.
///
/// A miss that was not spared its load made one. Where sidecars load they count them too, and those that nobody waited for come to it: a stale copy
/// is served, and loaded anew.
fn loads(beat: &RuleBeat) -> (u64, u64) {
    let spared = beat.loads_saved.min(beat.misses);
    (beat.hits.saturating_add(spared), beat.loads.max(beat.misses - spared))
}

/// In whole per cent, rounded down: 100 only where there is nothing else.
fn ratio(counts: &Counts, of: fn(&Counts) -> u64, and: fn(&Counts) -> u64) -> Option<String> {
    let (part, rest) = (u128::from(of(counts)), u128::from(and(counts)));
    (part + rest > 0).then(|| format!("{}%", part * 100 / (part + rest)))
}

/// How many connections the origins of these snapshots may see. Nothing where there is no origin.
fn connections(parts: &[Part<'_>]) -> Option<ConnectionsStatus> {
    let of = |part: &Part<'_>| {
        let (origins, sidecars) = (&part.snapshot?.origins, part.sidecars.max(1));
        // Where a relay loads, it has all connections that there may be.
        let (queued, shared): (Vec<&Origin>, Vec<&Origin>) = origins.iter().partition(|origin| origin.queue(sidecars).is_some());
        let each: u64 = shared.iter().map(|origin| u64::from(origin.share(sidecars))).sum();
        let of_relay: u64 = queued.iter().filter_map(|origin| origin.max_total_connections).map(u64::from).sum();
        (!origins.is_empty()).then(|| (each, each.saturating_mul(u64::from(part.sidecars)).saturating_add(of_relay)))
    };
    let all: Vec<(u64, u64)> = parts.iter().filter_map(of).collect();
    let per_sidecar = all.iter().map(|(each, _)| *each).max()?;
    Some(ConnectionsStatus { per_sidecar, fleet: all.iter().map(|(_, fleet)| *fleet).fold(0, u64::saturating_add) })
}

/// What happened between two statuses: conditions that turned. That all is well needs no event unless it was not.
pub fn happenings(before: &CachePolicyStatus, after: &CachePolicyStatus) -> Vec<Happening> {
    let find = |status: &CachePolicyStatus, kind: ConditionType| {
        status.conditions.iter().find(|condition| condition.type_ == kind.as_str()).cloned()
    };
    let turned = |kind: ConditionType| {
        let (earlier, now) = (find(before, kind), find(after, kind)?);
        let same = earlier.as_ref().is_some_and(|earlier| earlier.reason == now.reason && earlier.status == now.status);
        let holds = now.status == "True";
        // A delivery that waits for something is on its way, or another condition tells more.
        let is_told = match kind {
            ConditionType::Accepted | ConditionType::ResolvedRefs => (!holds || earlier.is_some()) && now.reason != "Deleted",
            // That it waits is told each time that the cache is away, by the CacheCluster's own events.
            ConditionType::Carried => (!holds || earlier.is_some()) && now.reason != "Unknown",
            ConditionType::Followed => {
                let is_new = earlier.is_none() && (holds || now.reason == "Beginning");
                !is_new && now.reason != "Unknown"
            }
            ConditionType::Delivered => holds || ["NotWritten", "NoRoom"].contains(&now.reason.as_str()),
        };
        (!same && is_told).then_some(Happening { warning: !holds, reason: now.reason, note: now.message })
    };
    ConditionType::ALL.into_iter().filter_map(turned).collect()
}

/// What a person should know of what sidecars tell of these rules, each with a key by which it is told once.
pub fn notices(parts: &[Part<'_>]) -> Vec<(String, Happening)> {
    let mut all = Vec::new();
    for part in parts {
        for notice in part.figures.into_iter().flat_map(|figures| &figures.notices) {
            let (rule, note) = match notice {
                Notice::SidecarUnused { sidecars, of } => {
                    (None, format!("no client has come to {sidecars} of {of} sidecars: see that the application uses REDIS_URL"))
                }
                Notice::NeverMatched { rule } => (
                    Some(rule),
                    format!("no read matched the rule `{rule}` for ten minutes, though others were used: see its pattern"),
                ),
                Notice::NeverFilled { rule, reads, of } => (
                    Some(rule),
                    format!(
                        "{reads} of {of} reads under the rule `{rule}` were of keys that nobody fills: see what the application stores"
                    ),
                ),
                Notice::WaitsTimeOut { rule, reads, of } => (
                    Some(rule),
                    format!(
                        "{reads} of {of} misses under the rule `{rule}` waited for a load in vain: loads take longer than its wait"
                    ),
                ),
            };
            if rule.is_none_or(|rule| part.rules.contains(rule)) {
                let key = format!("{} {} {}", part.workload, notice.reason(), rule.map_or("", String::as_str));
                let note = format!("{}: {note}", part.workload);
                all.push((key, Happening { warning: true, reason: notice.reason().to_owned(), note }));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::origins::UrlError;
    use super::super::verdict::{Missing, Refusal};
    use super::*;

    fn judgement() -> Judgement {
        Judgement { policy: "shop".to_owned(), accepted: Ok(()), resolved: Ok(()), goes_on: false, remarks: Vec::new() }
    }

    fn policy() -> CachePolicy {
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
            "metadata": {"name": "shop", "namespace": "store", "generation": 4},
            "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}},
                "rules": [{"name": "r", "keys": "a:{id}", "strategy": "CacheAside"}]},
        });
        serde_json::from_value(policy).unwrap()
    }

    fn snapshot() -> Snapshot {
        let origin = |name: &str, most: u32, total: Option<u32>| {
            let mut origin = json!({"name": name, "kind": {"sql": {"url": {"file": "/etc/larder/secret/x"}}}, "maxConnections": most,
                "connectTimeout": "1s", "timeout": "2s"});
            if let Some(total) = total {
                origin["maxTotalConnections"] = json!(total);
            }
            origin
        };
        let snapshot = json!({
            "version": VERSION, "requires": 3, "generation": 12,
            "cluster": {"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["10.0.0.1:26379"]}}},
            "unmatched": {"bypass": {}}, "rules": [], "origins": [origin("a", 8, Some(40)), origin("b", 2, None)],
        });
        serde_json::from_value(snapshot).unwrap()
    }

    fn shown(parts: &[Part<'_>]) -> CachePolicyStatus {
        let verdicts = Verdicts::of(parts, judgement);
        status(&policy(), &verdicts, parts, Relayed::default(), &CachePolicyStatus::default(), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn what_is_written_behind_is_told_of() {
        let carriage = |level: Option<Level>, late: bool, is_leaving: bool| Carriage {
            level,
            late: late.then(|| ("store.shop.db".parse().unwrap(), crate::policy::Span::from_secs(30))),
            is_leaving,
        };
        let level = |depth, dead| Some(Level { depth, bytes: 700, lag_ms: 90_500, dead, dirty: 3 });
        let now = Timestamp::from_second(1_000).unwrap();
        let told = |carriage: &Carriage| {
            let verdicts = if carriage.is_leaving { Verdicts::leaving() } else { Verdicts::of(&[], judgement) };
            let relayed = Relayed { carriage: Some(carriage), feeds: None, is_leaving: carriage.is_leaving };
            status(&policy(), &verdicts.with(relayed), &[], relayed, &CachePolicyStatus::default(), now)
        };
        for (carriage, expected, said) in [
            (carriage(level(7, 0), false, false), ("True", "InTime"), "within its maxLag"),
            (carriage(level(7, 1), true, false), ("False", "Late"), "`store.shop.db` is older than 30s"),
            (carriage(level(7, 1), false, false), ("False", "DeadLetters"), "larder dead-letters list"),
            (carriage(None, false, false), ("False", "Unknown"), "the cache does not say"),
            (carriage(level(7, 1), false, true), ("False", "Draining"), "7 writes and 1 dead letters are left"),
            (carriage(None, false, true), ("False", "Draining"), "larder.dev/abandon-journal"),
        ] {
            let status = told(&carriage);
            let condition = status.conditions.last().unwrap();
            assert_eq!(
                (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_str()),
                ("Carried", expected.0, expected.1)
            );
            assert!(condition.message.contains(said), "{}", condition.message);
        }
        let status = told(&carriage(level(7, 1), true, false));
        let expected = JournalStatus {
            depth: 7,
            bytes: 700,
            lag_seconds: 90,
            oldest: Some("1970-01-01T00:15:10Z".to_owned()),
            dead_letters: 1,
        };
        assert_eq!((status.journal, status.summary.as_deref()), (Some(expected), Some("Late")));
        assert_eq!(told(&carriage(level(0, 0), false, false)).journal.and_then(|journal| journal.oldest), None);
        assert_eq!(told(&carriage(level(1, 0), false, true)).summary.as_deref(), Some("Draining"));
        // It is told when it turns, and of a deletion nothing else is.
        let [fine, late, leaving] =
            [(false, false), (true, false), (false, true)].map(|(late, leaving)| told(&carriage(level(7, 0), late, leaving)));
        let reasons = |before: &CachePolicyStatus, after: &CachePolicyStatus| -> Vec<(bool, String)> {
            happenings(before, after).into_iter().map(|happening| (happening.warning, happening.reason)).collect()
        };
        assert_eq!(reasons(&fine, &late), [(true, "Late".to_owned())]);
        assert_eq!(reasons(&late, &fine), [(false, "InTime".to_owned())]);
        assert_eq!(reasons(&fine, &leaving), [(true, "Draining".to_owned())]);
    }

    fn reasons(status: &CachePolicyStatus) -> Vec<(&str, &str)> {
        status.conditions.iter().map(|condition| (condition.status.as_str(), condition.reason.as_str())).collect()
    }

    #[test]
    fn the_worst_of_all_workloads_is_told() {
        let (fine, none) = (judgement(), BTreeSet::new());
        let clash = Judgement {
            accepted: Err(Refusal::TwoClusters {
                workload: "Deployment b".to_owned(),
                winner: "w".to_owned(),
                cluster: "c".to_owned(),
            }),
            ..judgement()
        };
        let missing = Judgement {
            resolved: Err(Missing::Url(UrlError::NoSecret {
                origin: "o".to_owned(),
                secret: "s".to_owned(),
                key: "k".to_owned(),
            })),
            ..judgement()
        };
        let goes_on = Judgement { goes_on: true, ..missing.clone() };
        let others = Progress::WaitsForPolicies(vec!["users".to_owned()]);
        let part = |judgement, progress| Part {
            workload: "Deployment/a",
            judgement,
            progress,
            snapshot: None,
            sidecars: 0,
            figures: None,
            rules: &none,
        };
        let waits = Progress::WaitsForUser { cluster: "main".to_owned() };
        let full = Progress::NoRoom { cluster: "main".to_owned() };
        let (there, failed) = (Progress::Delivered, Progress::NotWritten("ConfigMap x: no".to_owned()));
        for (parts, expected, summary) in [
            (vec![part(&fine, &there)], [("True", "Accepted"), ("True", "ResolvedRefs"), ("True", "Delivered")], "Delivered"),
            (
                vec![part(&fine, &there), part(&clash, &there)],
                [("False", "TwoClusters"), ("True", "ResolvedRefs"), ("False", "NotInForce")],
                "TwoClusters",
            ),
            (
                vec![part(&missing, &there), part(&fine, &waits)],
                [("True", "Accepted"), ("False", "SecretNotFound"), ("False", "WaitsForUser")],
                "SecretNotFound",
            ),
            (vec![part(&fine, &waits)], [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "WaitsForUser")], "Waiting"),
            (
                vec![part(&fine, &waits), part(&fine, &failed)],
                [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "NotWritten")],
                "NotWritten",
            ),
            (
                vec![part(&fine, &others)],
                [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "WaitsForPolicy")],
                "Waiting",
            ),
            (
                vec![part(&missing, &others)],
                [("True", "Accepted"), ("False", "SecretNotFound"), ("False", "NotInForce")],
                "SecretNotFound",
            ),
            (
                vec![part(&goes_on, &there)],
                [("True", "Accepted"), ("False", "SecretNotFound"), ("True", "Delivered")],
                "SecretNotFound",
            ),
            (vec![part(&fine, &full)], [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "NoRoom")], "NoRoom"),
            (vec![], [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "NoWorkload")], "NoWorkload"),
        ] {
            let status = shown(&parts);
            assert_eq!((reasons(&status), status.summary.as_deref()), (expected.to_vec(), Some(summary)));
            assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(4)));
        }
    }

    #[test]
    fn what_older_sidecars_are_not_told_is_told() {
        let (fine, there, none) = (judgement(), Progress::Delivered, BTreeSet::new());
        let told = |snapshot: &Snapshot, sidecars| {
            let part = Part {
                workload: "Deployment/a",
                judgement: &fine,
                progress: &there,
                snapshot: Some(snapshot),
                sidecars,
                figures: None,
                rules: &none,
            };
            shown(&[part]).conditions.into_iter().find(|condition| condition.type_ == "Delivered").unwrap().message
        };
        let older = snapshot().in_form(2);
        assert!(told(&older, 1).starts_with(&format!("{READY}; sidecars of Deployment/a")) && told(&older, 1).contains("form 2"));
        assert_eq!([told(&older, 0), told(&snapshot(), 1)], [READY, READY]);
    }

    #[test]
    fn figures_are_those_of_the_policy_s_own_rules() {
        let (fine, there, snapshot) = (judgement(), Progress::Delivered, snapshot());
        let beat = |name: &str, hits, misses, loads, loads_saved| {
            (name.to_owned(), RuleBeat { name: name.to_owned(), hits, misses, loads, loads_saved, ..RuleBeat::default() })
        };
        let figures = Figures {
            listening: true,
            live: 10,
            current: 9,
            generations: vec![(12, 9), (11, 1)],
            rules: [beat("r", 90, 10, 0, 5), beat("other/r", 0, 100, 100, 0)].into(),
            notices: vec![
                Notice::NeverMatched { rule: "r".to_owned() },
                Notice::NeverMatched { rule: "other/r".to_owned() },
                Notice::SidecarUnused { sidecars: 1, of: 10 },
            ],
            ..Figures::default()
        };
        let own: BTreeSet<String> = ["r".to_owned()].into();
        let part = |figures| Part {
            workload: "Deployment/shop",
            judgement: &fine,
            progress: &there,
            snapshot: Some(&snapshot),
            sidecars: 10,
            figures,
            rules: &own,
        };
        let status = shown(&[part(Some(&figures))]);
        assert_eq!((status.hit_ratio.as_deref(), status.origin_load_saved.as_deref()), (Some("90%"), Some("95%")));
        let saved = [
            ("the application loads", beat("r", 80, 20, 0, 5), "85%"),
            ("sidecars load", beat("r", 80, 20, 15, 5), "85%"),
            ("each is served a stale copy, and one load is made behind their backs", beat("r", 0, 9, 1, 9), "90%"),
            ("no more are spared than miss", beat("r", 1, 1, 0, 9), "100%"),
        ];
        let saved = saved.map(|(what, beat, saved)| (what, Figures { rules: [beat].into(), ..figures.clone() }, saved));
        for (what, figures, saved) in &saved {
            assert_eq!(shown(&[part(Some(figures))]).origin_load_saved.as_deref(), Some(*saved), "{what}");
        }
        let sidecars = status.sidecars.unwrap();
        assert_eq!((sidecars.current.as_str(), sidecars.total), ("9/10", 10));
        let told: Vec<(u64, u32)> = sidecars.generations.iter().map(|told| (told.generation, told.sidecars)).collect();
        assert_eq!(told, [(12, 9), (11, 1)]);
        // 4 of the first for each of ten, and 2 of the second.
        assert_eq!(status.connections, Some(ConnectionsStatus { per_sidecar: 6, fleet: 60 }));
        assert_eq!(status.workloads.unwrap().generation, Some(12));
        let notices = notices(&[part(Some(&figures))]);
        let reasons: Vec<&str> = notices.iter().map(|(_, happening)| happening.reason.as_str()).collect();
        assert_eq!(reasons, ["RuleNeverMatched", "SidecarUnused"]);
        let deaf = Figures { listening: false, ..figures.clone() };
        let silent = Figures { live: 0, current: 0, ..figures.clone() };
        for unknown in [None, Some(&deaf), Some(&silent)] {
            let sidecars = shown(&[part(unknown)]).sidecars.unwrap();
            assert_eq!((sidecars.current.as_str(), sidecars.generations), ("-/10", Vec::new()));
        }
        let outdated = Figures { current: 0, ..figures.clone() };
        assert_eq!(shown(&[part(Some(&outdated))]).sidecars.unwrap().current, "0/10");
        assert_eq!(shown(&[part(None)]).hit_ratio, None);
    }

    #[test]
    fn a_status_is_bounded_however_many_workloads_there_are_and_whatever_they_are_called() {
        let (fine, there, none) = (judgement(), Progress::Delivered, BTreeSet::new());
        let kind = "Größe".repeat(100);
        let names: Vec<String> = (0..1000).map(|index| format!("{kind}/shop-{index}")).collect();
        let parts: Vec<Part<'_>> = names
            .iter()
            .map(|workload| Part {
                workload,
                judgement: &fine,
                progress: &there,
                snapshot: None,
                sidecars: 3,
                figures: None,
                rules: &none,
            })
            .collect();
        let workloads = shown(&parts).workloads.unwrap();
        assert_eq!((workloads.matched, workloads.names.len()), (1000, MAX_NAMED));
        assert!(workloads.names.iter().all(|name| name.chars().count() == MAX_NAME_CHARS), "{:?}", workloads.names);
        // Each workload has generations of its own, and two may have the same.
        let figures: Vec<Figures> = (0..1000u64)
            .map(|index| Figures { listening: true, live: 3, generations: vec![(index / 2, 3)], ..Figures::default() })
            .collect();
        let parts: Vec<Part<'_>> =
            parts.iter().zip(&figures).map(|(part, figures)| Part { figures: Some(figures), ..*part }).collect();
        let generations = shown(&parts).sidecars.unwrap().generations;
        assert_eq!(generations.len(), MAX_GENERATIONS);
        assert_eq!(generations[0], GenerationStatus { generation: 499, sidecars: 6 });
    }

    #[test]
    fn a_condition_is_told_when_it_turns() {
        let with = |verdicts: &Verdicts, before: &CachePolicyStatus| {
            status(&policy(), verdicts, &[], Relayed::default(), before, Timestamp::UNIX_EPOCH)
        };
        let fine = Verdicts::of(&[], judgement);
        let broken = Verdicts { resolved: Verdict::no("SecretNotFound", "create it"), ..fine.clone() };
        let none = CachePolicyStatus::default();
        let (first, second) = (with(&fine, &none), with(&broken, &none));
        let told = |before: &CachePolicyStatus, after: &CachePolicyStatus| -> Vec<(bool, String)> {
            happenings(before, after).into_iter().map(|happening| (happening.warning, happening.reason)).collect()
        };
        assert_eq!(told(&none, &first), []);
        assert_eq!(told(&first, &second), [(true, "SecretNotFound".to_owned())]);
        assert_eq!(told(&second, &second), []);
        assert_eq!(told(&second, &first), [(false, "ResolvedRefs".to_owned())]);
    }
}
