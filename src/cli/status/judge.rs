//! What is well and what is not, from what the API server holds. Pure.
//!
//! Status is read as JSON, field by field: what an older operator does not write, or writes otherwise, is shown as missing, and never
//! keeps the rest from being shown.

use serde::Serialize;
use serde_json::Value;

use crate::cli::output::harmless;

/// What stands for what is not told.
pub const UNKNOWN: &str = "-";

/// Everything that was asked about, what is not well first.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether all is well.
    pub well: bool,
    /// The CacheClusters.
    pub clusters: Vec<Cluster>,
    /// The CachePolicies.
    pub policies: Vec<Policy>,
}

/// A CacheCluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// What it is, and how it is.
    #[serde(flatten)]
    pub about: About,
    /// In a word or two.
    pub phase: String,
    /// The primary's pod.
    pub primary: String,
    /// How many servers serve in step, of how many.
    pub in_step: String,
    /// How many sentinels name the primary, of how many.
    pub sentinels: String,
    /// The engine and its version.
    pub version: String,
}

/// A CachePolicy.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// What it is, and how it is.
    #[serde(flatten)]
    pub about: About,
    /// The CacheCluster.
    pub cluster: String,
    /// Enforce or Observe.
    pub mode: String,
    /// How many workloads follow it.
    pub workloads: String,
    /// How many sidecars have the newest, of how many.
    pub sidecars: String,
    /// The share of reads that the cache answers.
    pub hit_ratio: String,
    /// The share of loads that the origin was spared.
    pub origin_load_saved: String,
    /// How many writes wait in its journals for their origins, and for how long.
    pub journal: String,
    /// How far the reading of databases' changes is behind.
    pub changes: String,
}

/// What is told of any object.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct About {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whether nothing is wrong with it.
    pub well: bool,
    /// What is wrong or under way, the worst first.
    pub findings: Vec<Finding>,
}

/// Something that a person should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How much it weighs.
    pub weight: Weight,
    /// The condition that it comes from, and its status; empty where it comes from none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub condition: String,
    /// Why, in one word.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Why, in a sentence that says what to do.
    pub message: String,
}

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Weight {
    /// Something is not well.
    Wrong,
    /// Something is under way, or as somebody wants it.
    Note,
}

impl Report {
    /// Judges the objects.
    pub fn of(clusters: &[Value], policies: &[Value]) -> Self {
        let mut report = Self {
            well: true,
            clusters: clusters.iter().map(Cluster::of).collect(),
            policies: policies.iter().map(Policy::of).collect(),
        };
        report.clusters.sort_by(|a, b| a.about.rank().cmp(&b.about.rank()));
        report.policies.sort_by(|a, b| a.about.rank().cmp(&b.about.rank()));
        let well = report.abouts().all(|about| about.well);
        Self { well, ..report }
    }

    fn abouts(&self) -> impl Iterator<Item = &About> {
        self.clusters.iter().map(|cluster| &cluster.about).chain(self.policies.iter().map(|policy| &policy.about))
    }
}

impl Cluster {
    fn of(object: &Value) -> Self {
        let (spec, status) = (&object["spec"], &object["status"]);
        let version = [&spec["engine"]["kind"], &spec["engine"]["version"]].map(text).join(" ");
        Self {
            about: About::of(object, "is the operator running, and does it watch this namespace?", weigh_cluster),
            phase: text(&status["summary"]),
            primary: text(&status["servers"]["primary"]),
            in_step: text(&status["servers"]["ready"]),
            sentinels: text(&status["sentinels"]["ready"]),
            version,
        }
    }
}

impl Policy {
    fn of(object: &Value) -> Self {
        let (spec, status) = (&object["spec"], &object["status"]);
        let mut about = About::of(object, "is the operator running, and does it watch this namespace?", weigh_policy);
        let refused = &status["sidecars"]["refused"];
        if !refused.is_null() {
            let message = format!("sidecars go on under an earlier snapshot, since they refuse the newest: {}", text(refused));
            about.add(Finding { weight: Weight::Wrong, ..Finding::note("Refused", message) });
        }
        let (current, total) = sidecars(&status["sidecars"]);
        if let (Ok(current), Ok(total)) = (current.parse::<u64>(), total.parse::<u64>())
            && current < total
        {
            let message = format!("{} of {total} sidecars have not taken up what is written last", total - current);
            about.add(Finding::note("Lagging", message));
        }
        let told = [current.as_str(), total.as_str()].iter().any(|number| *number != UNKNOWN);
        Self {
            about,
            cluster: text(&spec["cacheCluster"]),
            mode: if spec["mode"].is_null() { "Enforce".to_owned() } else { text(&spec["mode"]) },
            workloads: count(&status["workloads"]),
            sidecars: if told { format!("{current}/{total}") } else { UNKNOWN.to_owned() },
            hit_ratio: ratio(&status["hitRatio"]),
            origin_load_saved: ratio(&status["originLoadSaved"]),
            journal: journal(&status["journal"]),
            changes: changes(&status["changes"]),
        }
    }
}

/// How much is written behind.
fn journal(value: &Value) -> String {
    match (value["depth"].as_u64(), value["lagSeconds"].as_u64()) {
        (Some(depth), Some(lag)) if depth > 0 => format!("{depth}, {lag} s"),
        (Some(depth), _) => depth.to_string(),
        _ => UNKNOWN.to_owned(),
    }
}

/// How far the reading of the database is behind that is behind most.
fn changes(value: &Value) -> String {
    let feeds = value.as_array().filter(|feeds| !feeds.is_empty());
    let Some(feeds) = feeds else { return UNKNOWN.to_owned() };
    let lag = |feed: &Value| feed["lagSeconds"].as_u64().filter(|_| feed["reading"] == true);
    match feeds.iter().map(lag).collect::<Option<Vec<u64>>>() {
        Some(lags) => match lags.into_iter().max() {
            Some(lag) if lag > 0 => format!("{lag} s behind"),
            _ => "in time".to_owned(),
        },
        None => "not read".to_owned(),
    }
}

/// How many have the newest, and how many there are: as two numbers, or as `2/3` beside one.
fn sidecars(value: &Value) -> (String, String) {
    let (current, total) = (text(&value["current"]), text(&value["total"]));
    match current.split_once('/') {
        Some((current, total)) => (current.to_owned(), total.to_owned()),
        None => (current, total),
    }
}

impl About {
    fn add(&mut self, finding: Finding) {
        self.well &= finding.weight != Weight::Wrong;
        self.findings.push(finding);
        self.findings.sort_by_key(|finding| finding.weight);
    }

    fn of(object: &Value, unheard: &str, weigh: fn(&Condition) -> Option<Weight>) -> Self {
        let metadata = &object["metadata"];
        let conditions: Vec<Condition> =
            object["status"]["conditions"].as_array().into_iter().flatten().map(Condition::of).collect();
        let mut findings: Vec<Finding> =
            conditions.iter().filter_map(|condition| Some(condition.finding(weigh(condition)?))).collect();
        if conditions.is_empty() {
            findings.push(Finding {
                weight: Weight::Wrong,
                condition: String::new(),
                reason: "NotLookedAt".to_owned(),
                message: format!("nobody has told of it yet: {unheard}"),
            });
        }
        if let (Some(written), Some(seen)) = (metadata["generation"].as_i64(), oldest_look(&object["status"]))
            && seen < written
        {
            findings.push(Finding::note("Outdated", format!("what is told is of generation {seen}, and {written} is written")));
        }
        if !metadata["deletionTimestamp"].is_null() {
            findings.push(Finding::note("Deleting", "it is being deleted".to_owned()));
        }
        findings.sort_by_key(|finding| finding.weight);
        Self {
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]),
            well: findings.iter().all(|finding| finding.weight != Weight::Wrong),
            findings,
        }
    }

    /// What is wrong comes first, then what is under way, then by name.
    fn rank(&self) -> (u8, &str, &str) {
        let order = match self.findings.first().map(|finding| finding.weight) {
            Some(Weight::Wrong) => 0,
            Some(Weight::Note) => 1,
            None => 2,
        };
        (order, &self.namespace, &self.name)
    }
}

/// The generation that the status, or else the oldest condition, is about.
fn oldest_look(status: &Value) -> Option<i64> {
    let of_conditions = || {
        let conditions = status["conditions"].as_array()?;
        conditions.iter().filter_map(|condition| condition["observedGeneration"].as_i64()).min()
    };
    status["observedGeneration"].as_i64().or_else(of_conditions)
}

impl Finding {
    fn note(reason: &str, message: String) -> Self {
        Self { weight: Weight::Note, condition: String::new(), reason: reason.to_owned(), message }
    }
}

/// One of `status.conditions`.
#[derive(Debug)]
struct Condition {
    kind: String,
    status: String,
    reason: String,
    message: String,
}

impl Condition {
    fn of(value: &Value) -> Self {
        let [kind, status, reason, message] = ["type", "status", "reason", "message"].map(|field| text(&value[field]));
        Self { kind, status, reason, message }
    }

    fn finding(&self, weight: Weight) -> Finding {
        let Self { kind, status, reason, message } = self;
        Finding { weight, condition: format!("{kind}={status}"), reason: reason.clone(), message: message.clone() }
    }
}

/// What a condition of a CacheCluster weighs. `None`: nothing.
fn weigh_cluster(condition: &Condition) -> Option<Weight> {
    let Condition { kind, status, reason, .. } = condition;
    match (kind.as_str(), status.as_str(), reason.as_str()) {
        ("Progressing", "False", "Blocked") | (_, "Unknown", _) => Some(Weight::Wrong),
        ("Progressing", "False", "Paused") | ("Progressing", "True", _) => Some(Weight::Note),
        ("Progressing" | "Degraded", "False", _) => None,
        ("Degraded", _, _) | (_, "False", _) => Some(Weight::Wrong),
        _ => None,
    }
}

/// The same of a CachePolicy, all of whose conditions hold when all is well.
fn weigh_policy(condition: &Condition) -> Option<Weight> {
    match (condition.status.as_str(), condition.reason.as_str()) {
        ("True", _) => None,
        // Servers are told what the workload may do, before its sidecars are told to do it.
        ("False", "WaitsForUser" | "Beginning") => Some(Weight::Note),
        _ => Some(Weight::Wrong),
    }
}

/// A value as people read it.
fn text(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => harmless(text),
        other => harmless(&other.to_string()),
    };
    if text.is_empty() { UNKNOWN.to_owned() } else { text }
}

/// A number, how many a list has, or how many are `matched`.
fn count(value: &Value) -> String {
    match value {
        Value::Array(list) => list.len().to_string(),
        Value::Object(fields) => fields.get("matched").map_or_else(|| UNKNOWN.to_owned(), text),
        other => text(other),
    }
}

/// A share of one as per cent; a text as it is.
fn ratio(value: &Value) -> String {
    match value.as_f64() {
        Some(share) if (0.0..=1.0).contains(&share) => format!("{:.1} %", share * 100.0),
        _ => text(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn condition(kind: &str, status: &str, reason: &str) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "message": format!("{reason}: do this"), "observedGeneration": 2})
    }

    fn cluster(name: &str, conditions: &[Value]) -> Value {
        json!({
            "metadata": {"namespace": "shop", "name": name, "generation": 2},
            "spec": {"engine": {"kind": "Valkey", "version": "8.1"}},
            "status": {
                "observedGeneration": 2, "conditions": conditions, "summary": "Ready",
                "servers": {"primary": "main-0-0", "ready": "2/2", "updated": "2/2"}, "sentinels": {"ready": "3/3"},
            },
        })
    }

    fn healthy() -> Vec<Value> {
        vec![
            condition("Accepted", "True", "Accepted"),
            condition("Ready", "True", "Serving"),
            condition("Progressing", "False", "Settled"),
            condition("Degraded", "False", "Healthy"),
        ]
    }

    #[test]
    fn what_is_well_has_no_finding() {
        let report = Report::of(&[cluster("main", &healthy())], &[]);
        let main = report.clusters.first().expect("one");
        assert!(report.well && main.about.findings.is_empty(), "{report:?}");
        assert_eq!((main.phase.as_str(), main.primary.as_str(), main.in_step.as_str()), ("Ready", "main-0-0", "2/2"));
        assert_eq!((main.sentinels.as_str(), main.version.as_str()), ("3/3", "Valkey 8.1"));
    }

    #[track_caller]
    fn weighs(at: usize, turned: Value, expected: Option<Weight>) {
        let mut conditions = healthy();
        conditions[at] = turned;
        let report = Report::of(&[cluster("main", &conditions)], &[]);
        let about = &report.clusters.first().expect("one").about;
        assert_eq!(about.findings.first().map(|finding| finding.weight), expected, "{about:?}");
        assert_eq!(report.well, expected != Some(Weight::Wrong));
    }

    #[test]
    fn each_condition_of_a_cluster_is_weighed_by_its_meaning() {
        weighs(0, condition("Accepted", "False", "InvalidSpec"), Some(Weight::Wrong));
        weighs(1, condition("Ready", "False", "NoPrimary"), Some(Weight::Wrong));
        weighs(1, condition("Ready", "Unknown", "Silence"), Some(Weight::Wrong));
        weighs(2, condition("Progressing", "True", "Rolling"), Some(Weight::Note));
        weighs(2, condition("Progressing", "False", "Paused"), Some(Weight::Note));
        weighs(2, condition("Progressing", "False", "Blocked"), Some(Weight::Wrong));
        weighs(3, condition("Degraded", "True", "ReplicasNotInStep"), Some(Weight::Wrong));
        weighs(3, condition("SomethingNew", "True", "Fine"), None);
        weighs(3, condition("SomethingNew", "False", "Broken"), Some(Weight::Wrong));
    }

    #[test]
    fn what_is_wrong_comes_first_and_the_worst_of_it() {
        let mut broken = healthy();
        broken[2] = condition("Progressing", "True", "Repairing");
        broken[3] = condition("Degraded", "True", "ReplicasNotInStep");
        let mut rolling = healthy();
        rolling[2] = condition("Progressing", "True", "Rolling");
        let report =
            Report::of(&[cluster("a-well", &healthy()), cluster("b-rolling", &rolling), cluster("c-broken", &broken)], &[]);
        let names: Vec<&str> = report.clusters.iter().map(|cluster| cluster.about.name.as_str()).collect();
        assert_eq!(names, ["c-broken", "b-rolling", "a-well"]);
        let reasons: Vec<&str> = report.clusters[0].about.findings.iter().map(|finding| finding.reason.as_str()).collect();
        assert_eq!(reasons, ["ReplicasNotInStep", "Repairing"]);
    }

    #[test]
    fn what_nobody_looked_at_is_not_well() {
        let unseen = json!({"metadata": {"namespace": "shop", "name": "new", "generation": 1}, "spec": {}});
        let report = Report::of(std::slice::from_ref(&unseen), std::slice::from_ref(&unseen));
        assert!(!report.well && !report.clusters[0].about.well && !report.policies[0].about.well);
        let Policy { workloads, sidecars, hit_ratio, origin_load_saved, mode, .. } = &report.policies[0];
        assert_eq!([workloads, sidecars, hit_ratio, origin_load_saved, mode], ["-", "-", "-", "-", "Enforce"]);
        let mut old = cluster("main", &healthy());
        old["metadata"]["generation"] = 3.into();
        let report = Report::of(&[old], &[]);
        assert!(report.well && report.clusters[0].about.findings[0].message.contains("generation 2, and 3"), "{report:?}");
    }

    #[test]
    fn policies_tell_their_figures() {
        let policy = json!({
            "metadata": {"namespace": "shop", "name": "catalog", "generation": 2},
            "spec": {"cacheCluster": "main", "mode": "Observe"},
            "status": {
                "conditions": [condition("Accepted", "True", "Accepted"), condition("ResolvedRefs", "False", "SecretNotFound")],
                "workloads": 2, "sidecars": {"current": 3, "total": 5}, "hitRatio": 0.987, "originLoadSaved": "92.1 %",
                "journal": {"depth": 212, "lagSeconds": 3},
                "changes": [{"reading": true, "lagSeconds": 0}, {"reading": true, "lagSeconds": 40}],
            },
        });
        let report = Report::of(&[], std::slice::from_ref(&policy));
        let found = &report.policies[0];
        assert_eq!((found.cluster.as_str(), found.mode.as_str(), found.workloads.as_str()), ("main", "Observe", "2"));
        assert_eq!((found.sidecars.as_str(), found.hit_ratio.as_str()), ("3/5", "98.7 %"));
        assert_eq!(found.origin_load_saved, "92.1 %");
        assert_eq!((found.journal.as_str(), found.changes.as_str()), ("212, 3 s", "40 s behind"));
        for (value, expected) in [
            (json!([{"reading": true, "lagSeconds": 0}]), "in time"),
            (json!([{"reading": true, "lagSeconds": 0}, {"reading": false, "lagSeconds": 0}]), "not read"),
            (json!([{"reading": true}]), "not read"),
            (json!([]), "-"),
            (Value::Null, "-"),
        ] {
            assert_eq!(changes(&value), expected);
        }
        assert_eq!((journal(&json!({"depth": 0, "lagSeconds": 0})), journal(&Value::Null)), ("0".to_owned(), "-".to_owned()));
        let told: Vec<(Weight, &str)> =
            found.about.findings.iter().map(|finding| (finding.weight, finding.reason.as_str())).collect();
        assert_eq!(told, [(Weight::Wrong, "SecretNotFound"), (Weight::Note, "Lagging")]);
        assert!(!report.well);
    }

    #[test]
    fn what_sidecars_say_is_told() {
        let policy = |sidecars: Value, delivered: Value| {
            let policy = json!({
                "metadata": {"namespace": "shop", "name": "catalog", "generation": 2}, "spec": {"cacheCluster": "main"},
                "status": {"observedGeneration": 2, "conditions": [delivered], "sidecars": sidecars,
                    "workloads": {"matched": 2, "names": ["Deployment/shop", "CronJob/report"], "generation": 9}},
            });
            Report::of(&[], &[policy]).policies.remove(0)
        };
        let weights = |policy: &Policy| -> Vec<Weight> { policy.about.findings.iter().map(|finding| finding.weight).collect() };
        let delivered = || condition("Delivered", "True", "Delivered");
        let all = policy(json!({"current": "3/3", "total": 3}), delivered());
        assert_eq!((all.workloads.as_str(), all.sidecars.as_str(), weights(&all)), ("2", "3/3", vec![]));
        let unheard = policy(json!({"current": "-/3", "total": 3}), delivered());
        assert_eq!((unheard.sidecars.as_str(), weights(&unheard)), ("-/3", vec![]));
        let behind = policy(json!({"current": "1/3", "total": 3, "refused": "it is too new"}), delivered());
        assert_eq!((behind.about.well, weights(&behind)), (false, vec![Weight::Wrong, Weight::Note]));
        assert!(behind.about.findings[0].message.ends_with("it is too new"), "{behind:?}");
        let waits = policy(json!({"current": "0/0", "total": 0}), condition("Delivered", "False", "WaitsForUser"));
        assert_eq!((waits.about.well, weights(&waits)), (true, vec![Weight::Note]));
        let lost = policy(json!({"current": "0/0", "total": 0}), condition("Delivered", "False", "NoWorkload"));
        assert_eq!((lost.about.well, weights(&lost)), (false, vec![Weight::Wrong]));
    }

    #[test]
    fn fields_of_another_kind_are_shown_as_they_are() {
        let policy = json!({
            "metadata": {"name": "odd"}, "spec": {"cacheCluster": 7},
            "status": {"conditions": "none", "workloads": ["a", "b"], "sidecars": "many", "hitRatio": 12},
        });
        let report = Report::of(&[], &[policy]);
        let odd = &report.policies[0];
        assert_eq!([&odd.cluster, &odd.workloads, &odd.sidecars, &odd.hit_ratio], ["7", "2", "-", "12"]);
        assert_eq!(odd.about.namespace, UNKNOWN);
    }
}
