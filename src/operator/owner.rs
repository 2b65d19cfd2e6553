//! The workload that a pod belongs to: what its binding is named after.
//!
//! It is the controller that the pod names as its owner. Two kinds of controllers come and go with each change of what owns them in turn,
//! and stand for that: a ReplicaSet for its Deployment, whose name it has before the hash of its template, which is also a label of the
//! pod; and a Job for its CronJob, whose name it has before the minute of its schedule, eight digits or more. A Job that
//! somebody named so gets the binding of a CronJob, which does no harm: a binding's content follows from the pods' labels.

use serde_json::Value;

/// Hashes of pod templates: the label that holds it, and what owns the ReplicaSets.
const HASHED: [(&str, &str); 2] = [("pod-template-hash", "Deployment"), ("rollouts-pod-template-hash", "Rollout")];
/// The fewest digits of a schedule's minute since 1970.
const MINUTE_DIGITS: usize = 8;

/// What owns a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// The workload of a pod. A pod without a controller is its own; the name that it is to get is not known yet, where it is generated.
pub fn owner(pod: &Value) -> Owner {
    let metadata = &pod["metadata"];
    let references = metadata["ownerReferences"].as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let Some(controller) = references.iter().find(|reference| reference["controller"] == true) else {
        let generated = text(&metadata["generateName"]);
        let name = metadata["name"].as_str().filter(|name| !name.is_empty());
        let name = name.map_or_else(|| generated.trim_end_matches('-').to_owned(), str::to_owned);
        return Owner { kind: "Pod".to_owned(), name };
    };
    let (kind, name) = (text(&controller["kind"]), text(&controller["name"]));
    let parent = match kind.as_str() {
        "ReplicaSet" => HASHED.iter().find_map(|(label, kind)| {
            let hash = metadata["labels"][*label].as_str()?;
            Some((*kind, name.strip_suffix(hash)?.strip_suffix('-')?))
        }),
        "Job" => name.rsplit_once('-').and_then(|(parent, minute)| {
            let is_minute = minute.len() >= MINUTE_DIGITS && minute.bytes().all(|byte| byte.is_ascii_digit());
            is_minute.then_some(("CronJob", parent))
        }),
        _ => None,
    };
    match parent.filter(|(_, name)| !name.is_empty()) {
        Some((kind, name)) => Owner { kind: kind.to_owned(), name: name.to_owned() },
        None => Owner { kind, name },
    }
}

/// Whose a pod may be that stands: that of [`owner`]; and where nobody owns it and its name was generated, what it was before it had one.
pub fn owners(pod: &Value) -> Vec<Owner> {
    let first = owner(pod);
    let generated = pod["metadata"]["generateName"].as_str().filter(|name| first.kind == "Pod" && !name.is_empty());
    let generated = generated.map(|name| Owner { kind: first.kind.clone(), name: name.trim_end_matches('-').to_owned() });
    [first].into_iter().chain(generated).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(metadata: &Value, kind: &str, name: &str) {
        let expected = Owner { kind: kind.to_owned(), name: name.to_owned() };
        assert_eq!(owner(&json!({"metadata": metadata})), expected, "{metadata}");
    }

    fn owned(kind: &str, name: &str, labels: &Value) -> Value {
        json!({"labels": labels, "ownerReferences": [
            {"kind": "Other", "name": "other"}, {"kind": kind, "name": name, "controller": true},
        ]})
    }

    #[test]
    fn a_workload_outlives_what_it_makes_of_itself() {
        let hashed = json!({"pod-template-hash": "6f7c"});
        check(&owned("ReplicaSet", "shop-6f7c", &hashed), "Deployment", "shop");
        check(&owned("ReplicaSet", "shop-6f7c", &json!({})), "ReplicaSet", "shop-6f7c");
        check(&owned("ReplicaSet", "other", &hashed), "ReplicaSet", "other");
        check(&owned("ReplicaSet", "-6f7c", &hashed), "ReplicaSet", "-6f7c");
        check(&owned("ReplicaSet", "shop-77", &json!({"rollouts-pod-template-hash": "77"})), "Rollout", "shop");
        check(&owned("StatefulSet", "db-6f7c", &hashed), "StatefulSet", "db-6f7c");
        check(&owned("DaemonSet", "logs", &json!({})), "DaemonSet", "logs");
        check(&owned("Job", "report-28391040", &json!({})), "CronJob", "report");
        check(&owned("Job", "migrate-7", &json!({})), "Job", "migrate-7");
        check(&owned("Job", "28391040", &json!({})), "Job", "28391040");
    }

    #[test]
    fn a_pod_that_stands_may_have_been_named_later() {
        let names =
            |metadata: Value| owners(&json!({"metadata": metadata})).into_iter().map(|owner| owner.name).collect::<Vec<_>>();
        assert_eq!(names(json!({"name": "debug-x7k2p", "generateName": "debug-"})), ["debug-x7k2p", "debug"]);
        assert_eq!(names(json!({"name": "debug"})), ["debug"]);
        let mut owned = owned("StatefulSet", "db", &json!({}));
        owned["generateName"] = json!("db-");
        assert_eq!(names(owned), ["db"]);
    }

    #[test]
    fn a_pod_of_nobody_is_its_own() {
        check(&json!({"name": "debug", "generateName": "x-"}), "Pod", "debug");
        check(&json!({"generateName": "debug-"}), "Pod", "debug");
        check(&json!({"name": "mirror", "ownerReferences": [{"kind": "Node", "name": "n"}]}), "Pod", "mirror");
    }
}
