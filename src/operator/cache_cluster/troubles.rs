//! What keeps pods from running, in words that end with what to do. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::parts::{Claim, Pod, StatefulSet, Trouble};
use crate::operator::held::Held;

/// How schedulers say that a volume cannot be had where there is room: before Kubernetes 1.34, since, and of one that was deleted itself.
const ELSEWHERE: [&str; 3] = ["volume node affinity conflict", "PersistentVolume's node affinity", "non-existent pv"];

/// What can be away for a moment, and be back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Absent {
    /// A pod that does not exist, as while it is replaced.
    Pod(String),
    /// A node that does not answer, or is no more.
    Node(String),
}

/// Since when pods and nodes have been away.
#[derive(Debug, Default)]
pub struct Absences(BTreeMap<Absent, Instant>);

impl Absences {
    /// Begins another look. Whoever is not named in it is back.
    pub fn round(&mut self, patience: Duration) -> Round<'_> {
        Round { before: std::mem::take(&mut self.0), now: &mut self.0, patience }
    }

    /// As if whoever is away had been for so much longer.
    #[cfg(test)]
    pub fn age(&mut self, by: Duration) {
        self.0.values_mut().for_each(|since| *since -= by);
    }
}

/// One look at who is away.
#[derive(Debug)]
pub struct Round<'a> {
    before: BTreeMap<Absent, Instant>,
    now: &'a mut BTreeMap<Absent, Instant>,
    patience: Duration,
}

impl Round<'_> {
    /// Notes that one is away, and says whether that lasts for too long to be told of as nothing.
    pub fn lasts(&mut self, absent: Absent) -> bool {
        let since = self.before.get(&absent).copied().unwrap_or_else(Instant::now);
        self.now.insert(absent, since);
        since.elapsed() >= self.patience
    }
}

/// Why there is no pod of a set that asks for one, as far as can be told from outside.
pub fn missing(pod: &str, ordinal: u16, set: &Held<StatefulSet>) -> Option<String> {
    let (name, namespace) = (set.name(), set.namespace());
    let asks = set.part.replicas.is_some_and(|replicas| replicas > i32::from(ordinal));
    asks.then(|| {
        format!(
            "pod {pod} is not made: see `kubectl describe statefulset {name} -n {namespace}` for who refuses it; where a quota is used up, \
             raise the ResourceQuota, or lower spec.replicas, spec.memory or spec.pod.cpu"
        )
    })
}

/// That the node of a pod does not answer. Nobody but a person can know whether its processes are gone, so nothing is deleted by force.
pub fn lost(pod: &Held<Pod>, node: &str, claim: Option<&Held<Claim>>) -> String {
    let name = pod.name();
    let volume = claim.map_or_else(String::new, |claim| {
        format!(
            "; then, where the volume was local to it, {} has the pod made anew elsewhere, without its data",
            give_up(pod, claim)
        )
    });
    format!(
        "node {node} of pod {name} does not answer: where it is gone for good, `kubectl delete node {node}`, or, once it is switched off, \
         `kubectl taint node {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute`{volume}"
    )
}

/// What keeps a pod from running; `None` where time is all that it needs.
pub fn trouble(pod: &Held<Pod>, claim: Option<&Held<Claim>>) -> Option<String> {
    let (name, namespace) = (pod.name(), pod.namespace());
    let describe = format!("see `kubectl describe pod {name} -n {namespace}`");
    let (container, reason, message) = match pod.part.trouble.as_deref()? {
        Trouble::Unschedulable(message) => {
            let why = message.as_deref().unwrap_or("no node takes it").trim_end_matches('.');
            let remedy = scheduling(pod, claim, why);
            return Some(format!("pod {name} cannot be scheduled: {why}; {remedy}; {describe}"));
        }
        Trouble::Hopeless { container, reason, message } => (container, *reason, message),
    };
    let remedy = match reason {
        "ImagePullBackOff" | "ErrImagePull" | "InvalidImageName" | "ErrImageNeverPull" => {
            "correct spec.engine.version or spec.engine.image, or let the nodes pull it".to_owned()
        }
        "CrashLoopBackOff" => {
            format!("see `kubectl logs {name} -c {container} -n {namespace} --previous`, and correct spec.parameters")
        }
        _ => describe,
    };
    let said = message.as_ref().map_or_else(String::new, |message| format!(" ({message})"));
    Some(format!("pod {name}: container {container} does not start: {reason}{said}; {remedy}"))
}

/// What lets a pod be scheduled that no node takes, for this reason.
fn scheduling(pod: &Held<Pod>, claim: Option<&Held<Claim>>, why: &str) -> String {
    let room = "add nodes, or lower spec.memory or spec.pod";
    match claim {
        Some(claim) if claim.part.is_pending => format!(
            "its volume is not bound: see `kubectl describe pvc {} -n {}`, and whether spec.storage.class exists; {room}",
            claim.name(),
            claim.namespace()
        ),
        Some(claim) if ELSEWHERE.iter().any(|words| why.contains(words)) => format!(
            "its volume keeps it from where there is room: where the volume's node is gone for good, {} has the pod made anew elsewhere, \
             without its data; else make room there",
            give_up(pod, claim)
        ),
        _ => room.to_owned(),
    }
}

/// The command after which a pod's set makes its claim anew, and the pod.
fn give_up(pod: &Held<Pod>, claim: &Held<Claim>) -> String {
    format!("`kubectl delete pvc/{} pod/{} -n {}`", claim.name(), pod.name(), pod.namespace())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: &Value) -> Held<Pod> {
        Held::of(
            &serde_json::from_value(json!({"metadata": {"name": "shop-0-1", "namespace": "store"}, "status": status})).unwrap(),
        )
    }

    fn claim(phase: &str) -> Held<Claim> {
        let metadata = json!({"name": "data-shop-0-1", "namespace": "store"});
        Held::of(&serde_json::from_value(json!({"metadata": metadata, "status": {"phase": phase}})).unwrap())
    }

    fn unschedulable(message: &str) -> Held<Pod> {
        pod(&json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}))
    }

    const GIVE_UP: &str = "`kubectl delete pvc/data-shop-0-1 pod/shop-0-1 -n store`";

    #[test]
    fn a_pod_that_nobody_makes_is_told_of_where_a_set_asks_for_it() {
        let set = json!({
            "metadata": {"name": "shop-0", "namespace": "store"},
            "spec": {"replicas": 2, "selector": {}, "serviceName": "", "template": {}},
        });
        let set: Held<StatefulSet> = Held::of(&serde_json::from_value(set).unwrap());
        let text = missing("shop-0-1", 1, &set).unwrap();
        assert!(text.contains("pod shop-0-1") && text.contains("kubectl describe statefulset shop-0 -n store"), "{text}");
        assert_eq!(missing("shop-0-2", 2, &set), None, "it is on its way out");
    }

    #[test]
    fn troubles_name_the_pod_and_the_next_step() {
        let waiting = |reason| {
            let container = json!({"name": "server", "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": {"waiting": {"reason": reason}}});
            pod(&json!({"containerStatuses": [container]}))
        };
        let text = trouble(&waiting("ImagePullBackOff"), None).unwrap();
        assert!(text.contains("shop-0-1") && text.contains("spec.engine.image"), "{text}");
        assert_eq!(trouble(&waiting("ContainerCreating"), None), None);
        let text = trouble(&unschedulable("0/3 nodes are available."), Some(&claim("Pending"))).unwrap();
        assert!(
            text.contains("0/3 nodes are available;") && text.contains("data-shop-0-1") && text.contains("spec.storage.class"),
            "{text}"
        );
    }

    #[test]
    fn a_volume_that_went_with_its_node_is_named_with_the_command_that_gives_it_up() {
        for words in [
            "2 node(s) had volume node affinity conflict",
            "2 node(s) didn't match PersistentVolume's node affinity",
            "2 node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)",
        ] {
            let text = trouble(&unschedulable(&format!("0/2 nodes are available: {words}.")), Some(&claim("Bound"))).unwrap();
            assert!(text.contains(words) && text.contains(GIVE_UP) && !text.contains("add nodes"), "{text}");
        }
        let text = trouble(&unschedulable("0/2 nodes are available: 2 Insufficient memory."), Some(&claim("Bound"))).unwrap();
        assert!(text.contains("add nodes") && !text.contains("delete"), "{text}");
    }

    #[test]
    fn a_node_that_does_not_answer_is_named_with_the_commands_that_give_it_up() {
        let running = pod(&json!({}));
        let text = lost(&running, "a", None);
        for words in ["shop-0-1", "`kubectl delete node a`", "`kubectl taint node a node.kubernetes.io/out-of-service="] {
            assert!(text.contains(words), "{text}");
        }
        assert!(!text.contains("pvc"), "{text}");
        assert!(lost(&running, "a", Some(&claim("Bound"))).contains(GIVE_UP));
    }

    #[test]
    fn only_what_lasts_is_told_of() {
        let (mut absences, patience) = (Absences::default(), Duration::from_secs(20));
        let node = || Absent::Node("a".to_owned());
        assert!(!absences.round(patience).lasts(node()));
        absences.age(patience);
        assert!(!absences.round(patience).lasts(Absent::Pod("a".to_owned())), "the node was back");
        assert!(!absences.round(patience).lasts(node()));
        absences.age(patience);
        let mut round = absences.round(patience);
        assert!(round.lasts(node()) && round.lasts(node()), "each of its pods tells of it");
    }
}
