//! Pods without the sidecar that they would be given if they were made now: those that were made while no webhook answered, or before
//! the policy that selects them. Nothing changes a pod that runs; whoever keeps the workload is told to make them anew.
//!
//! The leader asks for them: of each policy's pods for those without a binding, which are none as a rule. What becomes of each is what would
//! become of a new one, so that pods that opted out, or may have no sidecar, are not told of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, ObjectReference, Pod};
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::annotations::BINDING;
use super::container::NAME;
use super::known::Known;
use super::patch::{Outcome, Settings};
use crate::operator::api_error;
use crate::operator::election::Leadership;
use crate::operator::metrics::Metrics;
use crate::operator::owner::{Owner, owner};
use crate::operator::watches::CLUSTER_LABEL;

/// How often they are looked for. An Event is forgotten after an hour.
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// How many pods of one policy are looked at: who has more of them has been told of enough.
const MOST_PODS: u32 = 200;
/// How many workloads are told of in one turn; all are counted.
const MOST_EVENTS: usize = 50;
/// The namespaces whose pods get a sidecar.
const OPTED_IN: (&str, &str) = ("larder.dev/injection", "enabled");
/// A namespace whose pods never do, whatever its labels.
const NEVER: &str = "kube-system";

/// Whoever looks for them.
pub struct Missed {
    /// The API server.
    pub client: Client,
    /// What becomes of pods.
    pub known: Arc<Known>,
    /// What all pods share.
    pub settings: Settings,
    /// Where they are counted.
    pub metrics: Arc<Metrics>,
    /// Larder's own namespace, whose pods never get a sidecar.
    pub own_namespace: String,
}

/// The pods of one workload.
#[derive(Debug, PartialEq)]
struct Found {
    owner: Owner,
    /// What an Event is about. Of a Deployment the identity is not known yet.
    regarding: ObjectReference,
    /// Their names.
    pods: BTreeSet<String>,
}

/// Namespace, kind and name of a workload.
type Place = (String, String, String);

impl Missed {
    /// Looks again and again while this process leads, once everything is at hand. Never ends.
    pub async fn follow(self, mut leadership: Leadership, mut ready: watch::Receiver<String>) {
        if ready.wait_for(String::is_empty).await.is_err() {
            return;
        }
        let reporter = Reporter { controller: "larder.dev/injector".to_owned(), instance: None };
        let recorder = Recorder::new(self.client.clone(), reporter);
        loop {
            leadership.gained().await;
            self.look(&recorder, &leadership).await;
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = leadership.lost() => self.metrics.set_missed_pods(0),
            }
        }
    }

    /// One turn.
    async fn look(&self, recorder: &Recorder, leadership: &Leadership) {
        let mut found = BTreeMap::new();
        for (namespace, labels) in self.known.selectors() {
            if namespace == NEVER || namespace == self.own_namespace || !leadership.holds() {
                continue;
            }
            for pod in self.without_binding(&namespace, &labels).await {
                let admitted = self.known.admit(&namespace, &pod, &self.settings);
                add(&mut found, &namespace, &pod, &admitted);
            }
        }
        let namespaces: BTreeSet<String> = found.keys().map(|(namespace, _, _)| namespace.clone()).collect();
        for namespace in namespaces {
            if !self.opted_in(&namespace).await {
                found.retain(|(own, _, _), _| *own != namespace);
            }
        }
        // A look may end after others lead.
        if !leadership.holds() {
            return;
        }
        self.metrics.set_missed_pods(found.values().map(|found| found.pods.len()).sum());
        for ((namespace, _, _), found) in found.into_iter().take(MOST_EVENTS) {
            self.tell(recorder, &namespace, found).await;
        }
    }

    /// The pods with these labels, which may be without a sidecar.
    async fn without_binding(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Vec<Value> {
        let named = labels.iter().map(|(name, value)| format!("{name}={value}"));
        let selector: Vec<String> = named.chain([BINDING, CLUSTER_LABEL].map(|absent| format!("!{absent}"))).collect();
        let how = ListParams::default().labels(&selector.join(",")).limit(MOST_PODS);
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let Some(list) = answered("pods", namespace, pods.list(&how)).await else { return Vec::new() };
        list.items.iter().filter_map(|pod| serde_json::to_value(pod).ok()).collect()
    }

    async fn opted_in(&self, namespace: &str) -> bool {
        let api: Api<Namespace> = Api::all(self.client.clone());
        let Some(found) = answered("the namespace", namespace, api.get_metadata(namespace)).await else { return false };
        let (label, value) = OPTED_IN;
        found.metadata.labels.is_some_and(|labels| labels.get(label).is_some_and(|said| said == value))
    }

    async fn tell(&self, recorder: &Recorder, namespace: &str, found: Found) {
        let note = note(&found);
        let Found { owner, mut regarding, .. } = found;
        if regarding.uid.is_none() {
            let api: Api<Deployment> = Api::namespaced(self.client.clone(), namespace);
            let deployment = answered("the Deployment", namespace, api.get_metadata(&owner.name)).await;
            regarding.uid = deployment.and_then(|deployment| deployment.metadata.uid);
        }
        info!(namespace, kind = owner.kind, name = owner.name, "{note}");
        let event = Event {
            type_: EventType::Warning,
            reason: "SidecarMissing".to_owned(),
            note: Some(note),
            action: "Inject".to_owned(),
            secondary: None,
        };
        answered("an Event", namespace, recorder.publish(&event, &regarding)).await;
    }
}

/// What comes of a request in time. What keeps it from succeeding is logged.
async fn answered<T>(what: &str, namespace: &str, request: impl Future<Output = Result<T, kube::Error>>) -> Option<T> {
    match timeout(REQUEST_WITHIN, request).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            let (error, remedy) = (api_error::describe(&error), api_error::remedy(&error));
            warn!(what, namespace, error, "pods without a sidecar are not told of: {remedy}");
            None
        }
        Err(_) => {
            warn!(what, namespace, "pods without a sidecar are not told of: the API server does not answer in time");
            None
        }
    }
}

/// Adds a pod to those of its workload, if it runs, has no sidecar, and would be given one.
fn add(found: &mut BTreeMap<Place, Found>, namespace: &str, pod: &Value, admitted: &Outcome) {
    let has_one = pod["spec"]["initContainers"].as_array().is_some_and(|all| all.iter().any(|one| one["name"] == NAME));
    let is_over = ["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default());
    let goes = !pod["metadata"]["deletionTimestamp"].is_null();
    if has_one || is_over || goes || !matches!(admitted, Outcome::Patched { .. }) {
        return;
    }
    let owner = owner(pod);
    let place = (namespace.to_owned(), owner.kind.clone(), owner.name.clone());
    let regarding = regarding(namespace, pod, &owner);
    let entry = found.entry(place).or_insert(Found { owner, regarding, pods: BTreeSet::new() });
    entry.pods.extend(pod["metadata"]["name"].as_str().map(str::to_owned));
}

/// What an Event about a pod's workload is about: the controller that the pod names, its Deployment, or the pod itself.
fn regarding(namespace: &str, pod: &Value, owner: &Owner) -> ObjectReference {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let owners = pod["metadata"]["ownerReferences"].as_array().map_or(&[][..], Vec::as_slice);
    let (kind, name, api_version, uid) = match owners.iter().find(|reference| reference["controller"] == true) {
        Some(_) if owner.kind == "Deployment" => {
            (Some(owner.kind.clone()), Some(owner.name.clone()), Some("apps/v1".to_owned()), None)
        }
        Some(controller) => {
            (text(&controller["kind"]), text(&controller["name"]), text(&controller["apiVersion"]), text(&controller["uid"]))
        }
        None => {
            let metadata = &pod["metadata"];
            (Some("Pod".to_owned()), text(&metadata["name"]), Some("v1".to_owned()), text(&metadata["uid"]))
        }
    };
    ObjectReference { kind, name, api_version, uid, namespace: Some(namespace.to_owned()), ..ObjectReference::default() }
}

/// What a person is told.
fn note(found: &Found) -> String {
    let Found { owner: Owner { kind, name }, pods, .. } = found;
    let remedy = match kind.as_str() {
        "Deployment" | "StatefulSet" | "DaemonSet" => {
            format!("kubectl rollout restart {}/{name} makes them anew", kind.to_lowercase())
        }
        _ => "those that are made from now on get one".to_owned(),
    };
    let example = pods.first().map(String::as_str).unwrap_or_default();
    let (count, run) = if pods.len() == 1 { ("1 pod".to_owned(), "runs") } else { (format!("{} pods", pods.len()), "run") };
    format!(
        "{count} of {kind} {name}, such as {example}, {run} without the sidecar that a CachePolicy asks for, made before the policy or while \
         the webhook did not answer: {remedy}"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::known::tests::{known, policy};
    use super::super::tests::settings;
    use super::*;

    fn pod(name: &str, owner: &Value) -> Value {
        json!({
            "metadata": {"name": name, "uid": format!("uid of {name}"), "labels": {"app": "shop", "pod-template-hash": "6f7c"}, "ownerReferences": owner},
            "spec": {"containers": [{"name": "app"}]},
            "status": {"phase": "Running"},
        })
    }

    fn controller(kind: &str, name: &str) -> Value {
        json!([{"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": format!("uid of {name}"), "controller": true}])
    }

    /// What is found of these pods.
    fn found(pods: &[Value]) -> Vec<Found> {
        let known = known(vec![policy(&json!({"app": "shop"}))]);
        let mut found = BTreeMap::new();
        for pod in pods {
            add(&mut found, "shop", pod, &known.admit("shop", pod, &settings()));
        }
        found.into_values().collect()
    }

    #[test]
    fn pods_are_told_of_once_for_their_workload() {
        let of_deployment = controller("ReplicaSet", "shop-6f7c");
        let found = found(&[pod("a", &of_deployment), pod("b", &of_deployment), pod("b", &of_deployment)]);
        let [found] = &found[..] else { panic!("{found:?}") };
        assert_eq!((found.owner.kind.as_str(), found.owner.name.as_str(), found.pods.len()), ("Deployment", "shop", 2));
        assert_eq!(found.regarding.uid, None, "the ReplicaSet's is not its own");
        let note = note(found);
        assert!(note.starts_with("2 pods of Deployment shop, such as a, run without the sidecar"), "{note}");
        assert!(note.ends_with("kubectl rollout restart deployment/shop makes them anew"), "{note}");
    }

    #[test]
    fn events_are_about_what_can_be_named() {
        let of = |owner: &Value| found(&[pod("p", owner)]).remove(0);
        let set = of(&controller("StatefulSet", "db"));
        assert_eq!((set.regarding.kind.as_deref(), set.regarding.uid.as_deref()), (Some("StatefulSet"), Some("uid of db")));
        // A CronJob is not asked about: its Job is.
        let job = of(&controller("Job", "report-28391040"));
        assert_eq!((job.owner.kind.as_str(), job.regarding.kind.as_deref()), ("CronJob", Some("Job")));
        assert!(note(&job).ends_with("those that are made from now on get one"));
        let alone = of(&json!([]));
        assert_eq!((alone.regarding.kind.as_deref(), alone.regarding.uid.as_deref()), (Some("Pod"), Some("uid of p")));
        assert!(note(&alone).starts_with("1 pod of Pod p, such as p, runs"), "{}", note(&alone));
    }

    #[test]
    fn only_pods_that_would_get_one_now_are_missed() {
        let change = |pointer: &str, value: Value| {
            let mut pod = pod("p", &json!([]));
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[field] = value;
            found(&[pod]).len()
        };
        assert_eq!(change("/spec/x", json!(1)), 1);
        for (pointer, value) in [
            ("/spec/initContainers", json!([{"name": "larder-sidecar"}])),
            ("/spec/hostNetwork", json!(true)),
            ("/status/phase", json!("Succeeded")),
            ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            ("/metadata/annotations", json!({"larder.dev/inject": "false"})),
            ("/metadata/annotations", json!({"larder.dev/sidecar-uid": "0"})),
            ("/metadata/labels", json!({"app": "other"})),
        ] {
            assert_eq!(change(pointer, value.clone()), 0, "{pointer}: {value}");
        }
    }
}
