//! Events: what a person should know of an object. Its anti-patterns are told once for each content of it.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use kube::runtime::events::{Event, Recorder};
use tracing::{info, warn};

use super::cache_cluster::report::Happening;
use crate::api::lint::AntiPattern;

/// The reason of all events about anti-patterns.
const ANTI_PATTERN: &str = "AntiPattern";
/// The longest note and the longest action that the API server takes.
const MAX_NOTE_BYTES: usize = 1024;
const MAX_ACTION_BYTES: usize = 128;
/// The most places that one event names.
const MAX_PLACES: usize = 5;

/// What an event is about.
pub fn regarding<K: Resource<DynamicType = ()>>(namespace: &str, name: &str, uid: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()),
        uid,
        ..ObjectReference::default()
    }
}

/// Tells an event. One that cannot be told is no reason to break off. `subject`: what of the object it is about, where there may be several
/// events of one reason at a time: the recorder takes events for one that differ by their note alone, and keeps the first.
pub async fn publish(recorder: &Recorder, regarding: &ObjectReference, subject: &str, happening: &Happening) {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (kind, namespace, name) = (text(&regarding.kind), text(&regarding.namespace), text(&regarding.name));
    info!(kind, namespace, name, reason = happening.reason, "{}", happening.note);
    if let Err(error) = recorder.publish(&event(subject, happening), regarding).await {
        warn!(kind, namespace, name, %error, "an event could not be told");
    }
}

fn event(subject: &str, happening: &Happening) -> Event {
    let action = if subject.is_empty() { "Reconcile".to_owned() } else { format!("Reconcile {subject}") };
    let cut = |text: &str, most: usize| text[..text.floor_char_boundary(most)].to_owned();
    Event {
        type_: happening.event_type(),
        reason: happening.reason.clone(),
        note: Some(cut(&happening.note, MAX_NOTE_BYTES)),
        action: cut(&action, MAX_ACTION_BYTES),
        secondary: None,
    }
}

/// Which anti-patterns of an object were told, so that each is told once for a content of it, whatever operator leads.
#[derive(Debug, Default)]
pub struct Advised {
    generation: Option<i64>,
    told: BTreeSet<String>,
}

impl Advised {
    /// Of an object that is seen for the first time. `observed`: the generation that its status is about, whose writer has told of it.
    pub fn earlier(observed: Option<i64>) -> Self {
        Self { generation: observed, told: BTreeSet::new() }
    }

    /// What is to be told now, each with its subject: nothing, while the object's generation is the same. A kind of anti-pattern is told
    /// once for all its places, and again when these are others.
    pub fn due(&mut self, generation: Option<i64>, found: impl FnOnce() -> Vec<AntiPattern>) -> Vec<(&'static str, Happening)> {
        if self.generation == generation {
            return Vec::new();
        }
        let mut kinds: BTreeMap<&'static str, Vec<AntiPattern>> = BTreeMap::new();
        for found in found() {
            kinds.entry(found.code).or_default().push(found);
        }
        let before = std::mem::take(&mut self.told);
        let mut due = Vec::new();
        for (code, places) in kinds {
            let note = note(code, &places);
            if !before.contains(&note) {
                due.push((code, Happening { warning: true, reason: ANTI_PATTERN.to_owned(), note: note.clone() }));
            }
            self.told.insert(note);
        }
        self.generation = generation;
        due
    }
}

/// One kind of anti-pattern in words: its first place, and where else it is.
fn note(code: &str, places: &[AntiPattern]) -> String {
    let Some(AntiPattern { path, what, why, remedy, .. }) = places.first() else { return String::new() };
    let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
    let mut note = format!("{code}: {path}: {what}{why}; {remedy}");
    let others: Vec<String> = places.iter().skip(1).map(|place| place.path.to_string()).collect();
    if !others.is_empty() {
        let more = others.len().saturating_sub(MAX_PLACES);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        note.push_str(&format!("; likewise {}{more}", others.iter().take(MAX_PLACES).cloned().collect::<Vec<_>>().join(", ")));
    }
    note
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::CachePolicy;
    use crate::api::lint;

    /// The anti-patterns of a policy with rules of these TTLs, and of one that nobody jitters.
    fn found(ttls: &[&str]) -> Vec<AntiPattern> {
        let rule = |(index, ttl): (usize, &&str)| json!({"name": format!("r{index}"), "keys": format!("k{index}:{{id}}"), "strategy": "CacheAside", "ttl": ttl});
        let rules: Vec<Value> = ttls.iter().enumerate().map(rule).collect();
        let policy: CachePolicy = serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "shop"},
            "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}, "defaults": {"jitter": "0%"}, "rules": rules},
        }))
        .unwrap();
        lint::of_policy(&policy.spec)
    }

    fn notes(due: &[(&'static str, Happening)]) -> Vec<String> {
        due.iter().map(|(_, happening)| happening.note.clone()).collect()
    }

    #[test]
    fn an_anti_pattern_is_told_once_for_a_content() {
        let mut advised = Advised::earlier(None);
        let first = advised.due(Some(1), || found(&["48h", "1m", "72h"]));
        assert!(first.iter().all(|(_, happening)| happening.warning && happening.reason == "AntiPattern"));
        let words = notes(&first);
        assert_eq!(words.len(), 2, "{words:?}");
        assert!(
            words[0].starts_with("long-ttl: spec.rules[0].ttl: a default TTL of 48h keeps values for days ("),
            "{}",
            words[0]
        );
        assert!(words[0].ends_with("; write minutes, or at most a few hours; likewise spec.rules[2].ttl"), "{}", words[0]);
        assert!(words[1].starts_with("no-jitter: spec.defaults.jitter: "), "{}", words[1]);
        assert!(advised.due(Some(1), || panic!("the same content is not looked at again")).is_empty());
        assert!(advised.due(Some(2), || found(&["48h", "2m", "72h"])).is_empty(), "what was not mended is known");
        let third = notes(&advised.due(Some(3), || found(&["48h", "2m", "3m"])));
        assert!(third.len() == 1 && third[0].ends_with("at most a few hours"), "{third:?}");
        assert!(advised.due(Some(4), || found(&["1m"])).is_empty());
        assert_eq!(notes(&advised.due(Some(5), || found(&["48h"]))).len(), 1, "what comes back is told again");
    }

    #[test]
    fn another_operator_tells_of_what_changed_since() {
        let mut advised = Advised::earlier(Some(7));
        assert!(advised.due(Some(7), || panic!("the one before has told of it")).is_empty());
        assert_eq!(advised.due(Some(8), || found(&["48h"])).len(), 2);
    }

    #[test]
    fn events_are_bounded_and_told_apart() {
        let ttls = vec!["48h"; 200];
        let due = Advised::default().due(Some(1), || found(&ttls));
        let words = notes(&due);
        assert!(words[0].ends_with(
            "likewise spec.rules[1].ttl, spec.rules[2].ttl, spec.rules[3].ttl, spec.rules[4].ttl, spec.rules[5].ttl and 194 more"
        ));
        let actions: BTreeSet<String> = due.iter().map(|(code, happening)| event(code, happening).action).collect();
        assert_eq!(actions.into_iter().collect::<Vec<_>>(), ["Reconcile long-ttl", "Reconcile no-jitter"]);
        let long = Happening { warning: false, reason: "R".to_owned(), note: "é".repeat(5000) };
        let event = event(&"é".repeat(200), &long);
        assert!(event.action.len() <= MAX_ACTION_BYTES && event.note.is_some_and(|note| note.len() == MAX_NOTE_BYTES));
    }
}
