//! What is seen becomes verdicts: whether clients are served, whether something is under way, and what a person has to do. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use k8s_openapi::api::core::v1::{ContainerStatus, PersistentVolumeClaim, Pod as KubePod, PodCondition};

use super::plan::{Action, Desired, Link, Member, Observed, Role, Sentinel, ServerId, ServerState, Waiting};
use super::report::{Verdict, Verdicts};
use super::validate::Wanted;

/// What keeps a container from starting however often it is tried, as the kubelet gives it.
const HOPELESS: [&str; 8] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
];

/// Everything that verdicts are made of.
#[derive(Debug)]
pub struct Seen<'a> {
    /// What is wanted.
    pub wanted: &'a Wanted,
    /// What the planner was told to want.
    pub desired: &'a Desired,
    /// What servers, sentinels and pods do.
    pub observed: &'a Observed,
    /// What the planner said.
    pub actions: &'a [Action],
    /// What keeps pods from running.
    pub troubles: &'a [String],
    /// What the API server refused, with what to do.
    pub refusal: Option<String>,
    /// What is wrong with the clients' password, with what to do, while an earlier one is in force.
    pub stale_password: Option<String>,
    /// Whether it ever served.
    pub initialized: bool,
}

/// A server that acts as primary, as most sentinels say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acting {
    /// Which.
    pub server: ServerId,
    /// Its announced address.
    pub address: SocketAddr,
}

impl Seen<'_> {
    /// The server that acts as primary and that most sentinels name.
    pub fn acting(&self) -> Option<Acting> {
        let primaries = self.observed.servers.iter().filter(|(_, server)| is_primary(&server.state));
        let named = |address| self.watching(address) > usize::from(self.wanted.sentinels / 2);
        let mut named = primaries.filter(|(_, server)| named(server.address));
        named.next().map(|(id, server)| Acting { server: *id, address: server.address })
    }

    /// How many sentinels name this address.
    pub fn watching(&self, address: SocketAddr) -> usize {
        let names =
            |sentinel: &&Sentinel| matches!(sentinel, Sentinel::Running { watch: Some(watch) } if watch.primary == address);
        self.observed.sentinels.values().filter(names).count()
    }

    /// How many replicas of the primary follow it in step.
    pub fn in_step(&self) -> usize {
        let Some(Acting { address, .. }) = self.acting() else { return 0 };
        let follows = |state: &ServerState| match state {
            ServerState::Running(facts) => facts.role == Role::Replica { of: address, link: Link::Up },
            _ => false,
        };
        self.observed.servers.values().filter(|server| follows(&server.state)).count()
    }

    /// How many pods of servers, and of sentinels, are of the wanted revision.
    pub fn updated(&self) -> (usize, usize) {
        let Some(pods) = &self.desired.pods else { return (0, 0) };
        let current = |(member, pod): &(&Member, &super::plan::Pod)| {
            pod.revision.as_ref() == Some(pods.revision(**member)) && !pod.deleting
        };
        let current: Vec<&Member> = self.observed.pods.iter().filter(current).map(|(member, _)| member).collect();
        let servers = current.iter().filter(|member| matches!(member, Member::Server(_))).count();
        (servers, current.len() - servers)
    }

    /// The verdicts.
    pub fn verdicts(&self) -> Verdicts {
        Verdicts {
            accepted: Verdict::yes("Accepted", "the specification can be carried out"),
            ready: self.ready(),
            progressing: self.progressing(),
            degraded: self.degraded(),
        }
    }

    fn ready(&self) -> Verdict {
        let names = &self.wanted.names;
        if let Some(Acting { server, address }) = self.acting() {
            let pod = names.server_pod(server);
            return Verdict::yes("Serving", format!("{pod} at {address} is the primary"));
        }
        if !self.initialized {
            return Verdict::no("Forming", self.waits());
        }
        let held = self.observed.servers.iter().find_map(|(id, server)| match &server.state {
            ServerState::Held(held) => Some(format!("{} is held: {}", names.server_pod(*id), held.message)),
            _ => None,
        });
        let primary = self.observed.servers.values().find(|server| is_primary(&server.state));
        match (primary, held) {
            (Some(server), _) => {
                let (count, of) = (self.watching(server.address), self.wanted.sentinels);
                let message = format!("only {count} of {of} sentinels name the primary at {}: {}", server.address, self.waits());
                Verdict::no("NoMajority", message)
            }
            (None, Some(held)) => Verdict::no("Held", held),
            (None, None) => Verdict::no("NoPrimary", self.waits()),
        }
    }

    /// What is waited for, in words.
    fn waits(&self) -> String {
        if let Some(trouble) = self.refusal.as_ref().or(self.troubles.first()) {
            return trouble.clone();
        }
        let waiting = self.actions.iter().find_map(|action| match action {
            Action::Wait(waiting) => Some(waiting),
            _ => None,
        });
        waiting.map_or_else(|| "the operator brings it up".to_owned(), |waiting| format!("waits for {waiting}"))
    }

    fn progressing(&self) -> Verdict {
        if self.wanted.paused {
            return Verdict::no("Paused", "spec.paused is true and nothing is changed or repaired: remove it to go on");
        }
        if let Some(refusal) = &self.refusal {
            return Verdict::no("Blocked", refusal.clone());
        }
        if let Some(trouble) = self.troubles.first() {
            return Verdict::no("Blocked", trouble.clone());
        }
        let reason = self.movement();
        if self.actions.is_empty() && reason != "Rolling" {
            return Verdict::no("Settled", "everything is as it is written");
        }
        let message = match reason {
            "Rolling" => {
                let (servers, sentinels) = self.updated();
                let (all_servers, all_sentinels) = (self.wanted.replicas + 1, self.wanted.sentinels);
                let updated =
                    format!("{servers} of {all_servers} servers and {sentinels} of {all_sentinels} sentinels are updated");
                format!("{updated}; {}", self.waits())
            }
            _ => self.waits(),
        };
        Verdict::yes(reason, message)
    }

    /// What kind of work is under way.
    fn movement(&self) -> &'static str {
        let any = |is: fn(&Action) -> bool| self.actions.iter().any(is);
        if !self.initialized {
            "Forming"
        } else if any(|action| matches!(action, Action::SetReplicas { .. } | Action::Forget { .. } | Action::PruneGhosts { .. }))
            || self.observed.scale.is_some_and(|scale| scale.servers != self.wanted.replicas + 1)
        {
            "Scaling"
        } else if any(|action| matches!(action, Action::ReplacePod { .. } | Action::Handover { .. })) || self.has_stale_pods() {
            "Rolling"
        } else {
            "Repairing"
        }
    }

    fn has_stale_pods(&self) -> bool {
        let Some(pods) = &self.desired.pods else { return false };
        self.observed.pods.iter().any(|(member, pod)| pod.revision.as_ref() != Some(pods.revision(*member)))
    }

    fn degraded(&self) -> Verdict {
        let names = &self.wanted.names;
        if let Some(problem) = &self.stale_password {
            return Verdict::yes("PasswordNotChanged", format!("the earlier password stays in force: {problem}"));
        }
        let (in_step, replicas) = (self.in_step(), usize::from(self.wanted.replicas));
        if in_step < replicas {
            let message = format!("{in_step} of {replicas} replicas follow in step; {}", self.waits());
            return Verdict::yes("ReplicasNotInStep", message);
        }
        let answer = |sentinel: &&Sentinel| matches!(sentinel, Sentinel::Running { watch: Some(_) });
        let watching = self.observed.sentinels.values().filter(answer).count();
        if watching < usize::from(self.wanted.sentinels) {
            let message = format!("{watching} of {} sentinels watch; {}", self.wanted.sentinels, self.waits());
            return Verdict::yes("SentinelsMissing", message);
        }
        match self.crowded() {
            Some((node, count)) => {
                let of = self.wanted.sentinels;
                let message = format!(
                    "node {node} holds {count} of {of} sentinels, and without it nobody can fail over: add nodes, or let pods of {} be \
                     scheduled on more of them",
                    names.sentinel_set()
                );
                Verdict::yes("TooFewNodes", message)
            }
            None => Verdict::no("Healthy", "the loss of any one node is survived"),
        }
    }

    /// A node whose loss takes the majority of the sentinels with it.
    fn crowded(&self) -> Option<(&str, usize)> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for (member, pod) in &self.observed.pods {
            if let (Member::Sentinel(_), Some(node)) = (member, &pod.node) {
                *counts.entry(&node.name).or_default() += 1;
            }
        }
        let tolerated = usize::from(self.wanted.sentinels) - usize::from(self.wanted.sentinels / 2 + 1);
        counts.into_iter().find(|(_, count)| *count > tolerated)
    }

    /// Whether something is to be looked at again soon.
    pub fn is_in_motion(&self) -> bool {
        let waits_for_a_person = |action: &Action| matches!(action, Action::Wait(Waiting::Choice | Waiting::Node { .. }));
        self.refusal.is_none() && !self.wanted.paused && self.actions.iter().any(|action| !waits_for_a_person(action))
    }
}

fn is_primary(state: &ServerState) -> bool {
    matches!(state, ServerState::Running(facts) if facts.role == Role::Primary)
}

/// What keeps a pod from running, with what to do; `None` where time is all that it needs.
pub fn trouble(pod: &KubePod, claim: Option<&PersistentVolumeClaim>) -> Option<String> {
    let (name, namespace) = (pod.metadata.name.as_deref()?, pod.metadata.namespace.as_deref()?);
    let status = pod.status.as_ref()?;
    let describe = format!("see `kubectl describe pod {name} -n {namespace}`");
    let mut conditions = status.conditions.iter().flatten();
    let unschedulable = |condition: &&PodCondition| {
        condition.type_ == "PodScheduled" && condition.status == "False" && condition.reason.as_deref() == Some("Unschedulable")
    };
    if let Some(condition) = conditions.find(unschedulable) {
        let why = condition.message.as_deref().unwrap_or("no node takes it").trim_end_matches('.');
        let pending = claim.filter(|claim| claim.status.as_ref().is_some_and(|status| status.phase.as_deref() != Some("Bound")));
        let volume = pending.and_then(|claim| claim.metadata.name.as_deref());
        let volume = volume.map_or_else(String::new, |claim| {
            format!("; its volume is not bound: see `kubectl describe pvc {claim} -n {namespace}`, and whether spec.storage.class exists")
        });
        return Some(format!(
            "pod {name} cannot be scheduled: {why}{volume}; add nodes, or lower spec.memory or spec.pod; {describe}"
        ));
    }
    let containers = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    let mut hopeless = containers.filter_map(hopeless);
    let (container, reason, message) = hopeless.next()?;
    let remedy = match reason {
        "ImagePullBackOff" | "ErrImagePull" | "InvalidImageName" | "ErrImageNeverPull" => {
            "correct spec.engine.version or spec.engine.image, or let the nodes pull it".to_owned()
        }
        "CrashLoopBackOff" => {
            format!("see `kubectl logs {name} -c {container} -n {namespace} --previous`, and correct spec.parameters")
        }
        _ => describe,
    };
    let said = message.map_or_else(String::new, |message| format!(" ({message})"));
    Some(format!("pod {name}: container {container} does not start: {reason}{said}; {remedy}"))
}

fn hopeless(container: &ContainerStatus) -> Option<(&str, &str, Option<&str>)> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = HOPELESS.into_iter().find(|reason| waiting.reason.as_deref() == Some(reason))?;
    Some((&container.name, reason, waiting.message.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: serde_json::Value) -> KubePod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "shop-0-1", "namespace": "store"}, "status": status}))
            .unwrap()
    }

    #[test]
    fn troubles_name_the_pod_and_the_next_step() {
        let waiting = |reason| serde_json::json!({"containerStatuses": [{"name": "server", "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": {"waiting": {"reason": reason}}}]});
        let text = trouble(&pod(waiting("ImagePullBackOff")), None).unwrap();
        assert!(text.contains("shop-0-1") && text.contains("spec.engine.image"), "{text}");
        assert_eq!(trouble(&pod(waiting("ContainerCreating")), None), None);
        let unschedulable = serde_json::json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available."}]});
        let claim =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "data-shop-0-1"}, "status": {"phase": "Pending"}}))
                .unwrap();
        let text = trouble(&pod(unschedulable), Some(&claim)).unwrap();
        assert!(
            text.contains("0/3 nodes are available;") && text.contains("data-shop-0-1") && text.contains("spec.storage.class"),
            "{text}"
        );
    }
}
