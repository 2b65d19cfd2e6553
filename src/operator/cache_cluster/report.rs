//! What is told of a CacheCluster: its status, and the events that a change of it makes. The status is pure: facts become words.
//!
//! A status is written only where it differs, and a condition keeps its time until it turns: whoever waits for a change is woken by one.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::EventType;

use crate::api::cache_cluster::{CacheClusterStatus, ConditionType};

/// The longest message of a condition; the API server takes more, readers do not.
const MAX_MESSAGE_CHARS: usize = 1024;

/// One condition: whether, why in a word, and why in a sentence with what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it holds.
    pub holds: bool,
    /// Why, in one word of capitals and small letters.
    pub reason: &'static str,
    /// Why, for people, and what to do where something is to be done.
    pub message: String,
}

impl Verdict {
    /// It holds.
    pub fn yes(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: true, reason, message: message.into() }
    }

    /// It does not.
    pub fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: false, reason, message: message.into() }
    }
}

/// All verdicts on a CacheCluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdicts {
    /// Whether it can be carried out as it is written.
    pub accepted: Verdict,
    /// Whether clients are served.
    pub ready: Verdict,
    /// Whether the operator is on its way.
    pub progressing: Verdict,
    /// Whether the next fault would be worse than it should.
    pub degraded: Verdict,
}

impl Verdicts {
    fn of(&self, kind: ConditionType) -> &Verdict {
        match kind {
            ConditionType::Accepted => &self.accepted,
            ConditionType::Ready => &self.ready,
            ConditionType::Progressing => &self.progressing,
            ConditionType::Degraded => &self.degraded,
        }
    }

    /// In a word or two.
    pub fn summary(&self) -> &'static str {
        match self {
            Self { accepted: Verdict { holds: false, .. }, .. } => "Invalid",
            Self { progressing: Verdict { reason: "Paused", .. }, .. } => "Paused",
            Self { progressing: Verdict { holds: false, reason: "Blocked", .. }, .. } => "Blocked",
            Self { ready: Verdict { holds: false, reason, .. }, .. } => match *reason {
                "Forming" => "Forming",
                "Held" => "Held",
                _ => "Not serving",
            },
            Self { progressing: Verdict { holds: true, reason, .. }, .. } => match *reason {
                "Rolling" => "Rolling",
                "Scaling" => "Scaling",
                "Resharding" => "Resharding",
                "Forming" => "Forming",
                "Configuring" => "Configuring",
                _ => "Repairing",
            },
            Self { degraded: Verdict { holds: true, .. }, .. } => "Degraded",
            _ => "Ready",
        }
    }
}

/// The conditions as they are to stand, given those that do. `None` of `previous` is none at all.
pub fn conditions(previous: &[Condition], verdicts: &Verdicts, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let of = |kind: ConditionType| condition(previous, kind.as_str(), verdicts.of(kind), generation, now);
    ConditionType::ALL.into_iter().map(of).collect()
}

/// A condition as it is to stand, given those that do: it keeps its time until it turns.
pub fn condition(
    previous: &[Condition],
    kind: &str,
    Verdict { holds, reason, message }: &Verdict,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let status = if *holds { "True" } else { "False" };
    let before = previous.iter().find(|condition| condition.type_ == kind && condition.status == status);
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: (*reason).to_owned(),
        message: shortened(message),
        observed_generation: generation,
        last_transition_time: before.map_or(Time(now), |before| before.last_transition_time.clone()),
    }
}

/// A message of a length that readers bear.
pub fn shortened(message: &str) -> String {
    match message.char_indices().nth(MAX_MESSAGE_CHARS) {
        Some((end, _)) => format!("{} …", &message[..end]),
        None => message.to_owned(),
    }
}

/// Something that happened to a CacheCluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happening {
    /// Whether it asks for a person.
    pub warning: bool,
    /// In one word.
    pub reason: String,
    /// For people.
    pub note: String,
}

impl Happening {
    /// As Kubernetes counts it.
    pub fn event_type(&self) -> EventType {
        if self.warning { EventType::Warning } else { EventType::Normal }
    }
}

/// What happened between two statuses. A reason that stays is told once, also when its message goes on changing.
pub fn happenings(before: Option<&CacheClusterStatus>, after: &CacheClusterStatus) -> Vec<Happening> {
    let none = CacheClusterStatus::default();
    let before = before.unwrap_or(&none);
    let mut all = Vec::new();
    if !before.initialized && after.initialized {
        all.push(normal("Formed", find(after, ConditionType::Ready).map_or("", |ready| &ready.message)));
    }
    let primary = |status: &CacheClusterStatus| status.servers.as_ref().and_then(|servers| servers.primary.clone());
    if let (Some(old), Some(new)) = (primary(before), primary(after))
        && old != new
    {
        all.push(normal("FailedOver", &format!("the primary is {new}, and was {old}")));
    }
    for kind in ConditionType::ALL {
        let Some(condition) = find(after, kind) else { continue };
        let earlier = find(before, kind);
        let same = earlier.is_some_and(|earlier| earlier.reason == condition.reason && earlier.status == condition.status);
        if !same && let Some(happening) = turned(kind, earlier, condition) {
            all.push(happening);
        }
    }
    all
}

/// What a condition that turned tells, if anything: that all is well needs no event unless it was not.
fn turned(kind: ConditionType, earlier: Option<&Condition>, condition: &Condition) -> Option<Happening> {
    let holds = condition.status == "True";
    let warning =
        |condition: &Condition| Happening { warning: true, reason: condition.reason.clone(), note: condition.message.clone() };
    match kind {
        ConditionType::Accepted if !holds => Some(warning(condition)),
        ConditionType::Accepted => earlier.map(|_| normal("Accepted", "the specification is carried out")),
        ConditionType::Ready if !holds => match condition.reason.as_str() {
            // It never served, or its other conditions tell more.
            "Forming" | "Refused" => None,
            _ => Some(warning(condition)),
        },
        ConditionType::Ready => None,
        ConditionType::Progressing => match (condition.reason.as_str(), earlier.map(|earlier| earlier.reason.as_str())) {
            ("Blocked", _) => Some(warning(condition)),
            ("Rolling" | "Scaling" | "Resharding" | "Paused", _) => Some(normal(&condition.reason, &condition.message)),
            ("Settled", Some("Rolling")) => Some(normal("RolledOut", "every pod is of the wanted revision")),
            ("Settled", Some("Configuring")) => Some(normal("Configured", "every server has proved its settings and users")),
            ("Settled", Some("Resharding")) => Some(normal("Resharded", "every slot is where it is to be")),
            ("Settled", Some("Scaling")) => Some(normal("Scaled", "there are as many servers and sentinels as wanted")),
            _ => None,
        },
        ConditionType::Degraded if holds && ["TooFewNodes", "CertificatesUnreadable"].contains(&condition.reason.as_str()) => {
            Some(warning(condition))
        }
        ConditionType::Degraded => None,
    }
}

fn normal(reason: &str, note: &str) -> Happening {
    Happening { warning: false, reason: reason.to_owned(), note: note.to_owned() }
}

fn find(status: &CacheClusterStatus, kind: ConditionType) -> Option<&Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts() -> Verdicts {
        Verdicts {
            accepted: Verdict::yes("Accepted", ""),
            ready: Verdict::yes("Serving", "shop-0-0 is the primary"),
            progressing: Verdict::no("Settled", ""),
            degraded: Verdict::no("Healthy", ""),
        }
    }

    fn status(verdicts: &Verdicts, before: &[Condition], at: i64) -> CacheClusterStatus {
        let now = Timestamp::from_second(at).unwrap();
        let initialized = verdicts.ready.holds;
        CacheClusterStatus { conditions: conditions(before, verdicts, Some(2), now), initialized, ..Default::default() }
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_turns() {
        let first = status(&verdicts(), &[], 100);
        assert_eq!(status(&verdicts(), &first.conditions, 200).conditions, first.conditions);
        let mut other = verdicts();
        other.ready.message = "shop-0-1 is the primary".to_owned();
        let second = status(&other, &first.conditions, 300);
        assert_ne!(second.conditions, first.conditions);
        assert_eq!(second.conditions[1].last_transition_time, first.conditions[1].last_transition_time);
        other.ready = Verdict::no("NoPrimary", "none");
        let third = status(&other, &second.conditions, 400);
        assert_eq!(third.conditions[1].last_transition_time.0.as_second(), 400);
        assert_eq!(third.conditions[0].last_transition_time.0.as_second(), 100);
    }

    #[test]
    fn each_turn_is_told_once() {
        let mut forming = verdicts();
        forming.ready = Verdict::no("Forming", "");
        let before = status(&forming, &[], 1);
        let after = status(&verdicts(), &before.conditions, 2);
        assert_eq!(happenings(Some(&before), &after), [normal("Formed", "shop-0-0 is the primary")]);
        assert_eq!(happenings(Some(&after), &after), []);
        let mut rolling = verdicts();
        rolling.progressing = Verdict::yes("Rolling", "1 of 2");
        let roll = status(&rolling, &after.conditions, 3);
        assert_eq!(happenings(Some(&after), &roll), [normal("Rolling", "1 of 2")]);
        assert_eq!(happenings(Some(&roll), &after), [normal("RolledOut", "every pod is of the wanted revision")]);
        let mut refused = verdicts();
        (refused.accepted, refused.ready) = (Verdict::no("InvalidSpec", "why"), Verdict::no("Refused", ""));
        let told = happenings(None, &status(&refused, &[], 4));
        assert_eq!(told.len(), 1);
        assert!(told[0].warning && told[0].reason == "InvalidSpec");
    }

    #[test]
    fn the_summary_says_what_matters_most() {
        let check = |change: fn(&mut Verdicts), expected| {
            let mut verdicts = verdicts();
            change(&mut verdicts);
            assert_eq!(verdicts.summary(), expected);
        };
        check(|_| (), "Ready");
        check(|all| all.degraded = Verdict::yes("TooFewNodes", ""), "Degraded");
        check(|all| all.progressing = Verdict::yes("Rolling", ""), "Rolling");
        check(|all| all.ready = Verdict::no("NoPrimary", ""), "Not serving");
        check(|all| all.accepted = Verdict::no("InvalidSpec", ""), "Invalid");
    }
}
