//! From a pod to what it is to be, and the steps between: pure.
//!
//! A second look at its own result changes nothing. One at a pod that others have changed since puts right what is Larder's, and leaves
//! what is theirs.

use std::collections::BTreeSet;

use json_patch::{Patch, diff};
use serde_json::{Value, json};

use super::annotations::{BINDING, CONTAINERS, INJECT, INJECTED, PORT, Record, Wishes, wishes};
use super::container::{NAME, container, repaired};
use super::environment::equip;
use super::volumes::{NAMES, volumes};
use crate::api::CachePolicy;
use crate::api::cache_policy::{EnvMode, InjectSpec};
use crate::api::compile::in_order;
use crate::operator::owner::owner;
use crate::operator::watches::CLUSTER_LABEL;
use crate::policy::binding::BindingName;

/// The port of Redis.
const REDIS_PORT: u16 = 6379;
/// The port of health and metrics.
const ADMIN_PORT: u16 = 9121;

/// What all pods share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The image with `larderd`.
    pub image: String,
    /// When it is pulled; `None`: as Kubernetes decides by its tag.
    pub image_pull_policy: Option<String>,
    /// Names of Secrets in the pod's namespace, by which it is pulled.
    pub pull_secrets: Vec<String>,
    /// The sidecar's user.
    pub uid: i64,
    /// The share of a processor that a sidecar asks for.
    pub cpu: String,
    /// The share that it asks for, and is held to, in a pod that is promised all that it may use.
    pub guaranteed_cpu: String,
    /// Its memory, asked for and held to.
    pub memory: String,
}

/// A pod that is about to be made.
#[derive(Clone, Copy)]
pub struct Occasion<'a> {
    /// The pod.
    pub pod: &'a Value,
    /// The policies that select it.
    pub policies: &'a [&'a CachePolicy],
    /// Whether the CacheCluster of this name is in the namespace.
    pub has_cluster: &'a dyn Fn(&str) -> bool,
    /// Whether the namespace has a Service named `redis`, which sets variables in its pods.
    pub has_redis_service: bool,
}

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It stays as it is.
    Unchanged {
        /// Why.
        why: &'static str,
        /// What a person should know.
        warnings: Vec<String>,
    },
    /// It is changed.
    Patched {
        /// How.
        steps: Patch,
        /// What a person should know.
        warnings: Vec<String>,
    },
    /// It must be written otherwise.
    Refused {
        /// What to write.
        message: String,
    },
}

/// What a pod is to get, all decided.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The binding.
    pub binding: BindingName,
    /// The CacheCluster.
    pub cluster: String,
    /// The sidecar's image.
    pub image: String,
    /// When it is pulled.
    pub image_pull_policy: Option<String>,
    /// The sidecar's user.
    pub uid: i64,
    /// Processor and memory; `None`: those of the whole pod.
    pub resources: Option<(String, String)>,
    /// Whether the pod is promised all that it may use.
    pub guaranteed: bool,
    /// The port on loopback.
    pub port: u16,
    /// The port of health and metrics.
    pub admin: u16,
    /// Whether there is a Unix socket.
    pub socket: bool,
    /// How variables are set.
    pub env: EnvMode,
    /// Whether a Service sets some of them.
    pub linked: bool,
    /// The containers that get them; `None`: all.
    pub containers: Option<BTreeSet<String>>,
    /// By which Secrets the image is pulled.
    pub pull_secrets: Vec<String>,
}

/// Decides what becomes of a pod.
pub fn inject(occasion: &Occasion<'_>, settings: &Settings) -> Outcome {
    let Occasion { pod, policies, .. } = occasion;
    let unchanged = |why| Outcome::Unchanged { why, warnings: Vec::new() };
    let warned = |why, warning: String| Outcome::Unchanged { why, warnings: vec![warning] };
    let ordered = in_order(policies);
    let Some(first) = ordered.first() else { return unchanged("no policy selects it") };
    if pod["metadata"]["labels"].get(CLUSTER_LABEL).is_some() {
        return unchanged("it is part of a cache");
    }
    let wishes = match wishes(pod) {
        Ok(wishes) => wishes,
        Err(message) => return Outcome::Refused { message },
    };
    if wishes.opted_out {
        return unchanged("it does not want one");
    }
    let named = policy_name(first);
    if pod["spec"]["hostNetwork"] == true {
        let why = format!(
            "no sidecar for CachePolicy {named}: a pod with hostNetwork would open its port on the node; remove hostNetwork, or write {INJECT}: \"false\" to keep it without"
        );
        return warned("it has the node's network", why);
    }
    if pod["spec"]["os"]["name"] == "windows" {
        return warned("it runs on Windows", format!("no sidecar for CachePolicy {named}: it runs on Linux only"));
    }
    let mut warnings = Vec::new();
    match plan(occasion, settings, &ordered, wishes, &mut warnings) {
        Ok(plan) => carried_out(pod, &plan, warnings),
        Err(message) => Outcome::Refused { message },
    }
}

fn policy_name(policy: &CachePolicy) -> &str {
    policy.metadata.name.as_deref().unwrap_or_default()
}

/// Decides all that a pod gets. Of policies about several clusters the oldest decides which, and of what several say, the oldest one's.
fn plan(
    occasion: &Occasion<'_>,
    settings: &Settings,
    ordered: &[&CachePolicy],
    wishes: Wishes,
    warnings: &mut Vec<String>,
) -> Result<Plan, String> {
    let pod = occasion.pod;
    let cluster = ordered.first().map(|policy| policy.spec.cache_cluster.clone()).unwrap_or_default();
    let (about, others): (Vec<&CachePolicy>, Vec<&CachePolicy>) =
        ordered.iter().copied().partition(|policy| policy.spec.cache_cluster == cluster);
    for other in others {
        let name = policy_name(other);
        let named = &other.spec.cache_cluster;
        warnings.push(format!(
            "CachePolicy {name} has no effect here: it is about CacheCluster {named}, and an older one binds this workload to {cluster}; let all policies of a workload name one CacheCluster"
        ));
    }
    if !(occasion.has_cluster)(&cluster) {
        warnings.push(format!("there is no CacheCluster {cluster} yet: the sidecar answers with errors until it is there"));
    }
    if pod["spec"]["shareProcessNamespace"] == true {
        warnings.push(
            "shareProcessNamespace lets containers with the sidecar's user, or with root's rights, read its secrets".to_owned(),
        );
    }
    let said = |get: fn(&InjectSpec) -> Option<u16>| about.iter().find_map(|policy| get(policy.spec.inject.as_ref()?));
    let port = said(|inject| inject.port).unwrap_or(REDIS_PORT);
    let env = about.iter().find_map(|policy| policy.spec.inject?.env).unwrap_or_default();
    let socket = about.iter().find_map(|policy| policy.spec.inject?.socket).unwrap_or(false);
    let Wishes { opted_out: _, containers, env: own_env, port: own_port, socket: own_socket, uid, image, cpu, memory } = wishes;
    check_containers(pod, containers.as_ref())?;
    let (port, admin) = ports(pod, port, own_port)?;
    let guaranteed = is_guaranteed(pod);
    let usual_cpu = if guaranteed { &settings.guaranteed_cpu } else { &settings.cpu };
    let resources = (cpu.unwrap_or_else(|| usual_cpu.clone()), memory.unwrap_or_else(|| settings.memory.clone()));
    let owner = owner(pod);
    Ok(Plan {
        binding: BindingName::of(&owner.kind, &owner.name, &cluster),
        cluster,
        image: image.unwrap_or_else(|| settings.image.clone()),
        image_pull_policy: settings.image_pull_policy.clone(),
        uid: uid.unwrap_or(settings.uid),
        resources: pod["spec"]["resources"].as_object().is_none_or(serde_json::Map::is_empty).then_some(resources),
        guaranteed,
        port,
        admin,
        socket: own_socket.unwrap_or(socket),
        env: own_env.unwrap_or(env),
        linked: occasion.has_redis_service && pod["spec"]["enableServiceLinks"] != false,
        containers,
        pull_secrets: settings.pull_secrets.clone(),
    })
}

/// All containers but the sidecar.
fn others(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainers", "containers"].into_iter().filter_map(|list| pod["spec"][list].as_array());
    lists.flatten().filter(|container| container["name"] != NAME)
}

fn check_containers(pod: &Value, wanted: Option<&BTreeSet<String>>) -> Result<(), String> {
    let missing = wanted.into_iter().flatten().find(|name| others(pod).all(|container| container["name"] != name.as_str()));
    match missing {
        Some(name) => Err(format!("annotation {CONTAINERS}: the pod has no container {name}: write names of its containers")),
        None => Ok(()),
    }
}

/// The port on loopback, and that of health and metrics: the next ones that no container declares.
fn ports(pod: &Value, usual: u16, wished: Option<u16>) -> Result<(u16, u16), String> {
    let declared: BTreeSet<u64> = others(pod)
        .flat_map(|container| container["ports"].as_array().into_iter().flatten())
        .filter_map(|port| port["containerPort"].as_u64())
        .collect();
    if let Some(port) = wished.filter(|port| declared.contains(&u64::from(*port))) {
        return Err(format!("annotation {PORT}: a container declares port {port} itself: write another"));
    }
    let free = |from: u16, taken: Option<u16>| {
        let mut ports = (from..=u16::MAX).filter(|port| !declared.contains(&u64::from(*port)) && Some(*port) != taken);
        ports.next().ok_or_else(|| format!("all ports from {from} on are declared by containers: declare fewer"))
    };
    let admin = free(ADMIN_PORT, wished)?;
    let port = match wished {
        Some(port) => port,
        None => free(usual, Some(admin))?,
    };
    Ok((port, admin))
}

/// Whether each container has limits of both kinds and asks for as much, so that the pod is promised all that it may use.
fn is_guaranteed(pod: &Value) -> bool {
    others(pod).all(|container| {
        ["cpu", "memory"].iter().all(|kind| {
            let resources = &container["resources"];
            let limit = &resources["limits"][*kind];
            let request = resources["requests"].get(*kind).unwrap_or(limit);
            !limit.is_null() && request == limit
        })
    })
}

/// Changes the pod, and tells how.
fn carried_out(pod: &Value, plan: &Plan, mut warnings: Vec<String>) -> Outcome {
    let record = Record::of(pod);
    if record.is_none()
        && let Some(taken) = taken_name(pod)
    {
        return Outcome::Refused { message: format!("the pod has {taken} of its own, a name of the sidecar's: choose another") };
    }
    let mut changed = pod.clone();
    let Some(spec) = changed["spec"].as_object_mut() else {
        return Outcome::Refused { message: "the pod has no specification: write one".to_owned() };
    };
    for list in ["initContainers", "containers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            if name != NAME && plan.containers.as_ref().is_none_or(|wanted| wanted.contains(name)) {
                equip(container, plan, record.as_ref().map(|record| record.port), &mut warnings);
            }
        }
    }
    put_first(list_in(spec, "initContainers"), plan);
    put_volumes(list_in(spec, "volumes"), plan);
    put_pull_secrets(spec, plan);
    mark(&mut changed, plan);
    match diff(pod, &changed) {
        steps if steps.is_empty() => Outcome::Unchanged { why: "it has its sidecar", warnings },
        steps => Outcome::Patched { steps, warnings },
    }
}

/// What in a pod that was never looked at has a name of the sidecar's.
fn taken_name(pod: &Value) -> Option<String> {
    let lists = ["initContainers", "containers"].into_iter().filter_map(|list| pod["spec"][list].as_array());
    if lists.flatten().any(|container| container["name"] == NAME) {
        return Some(format!("a container {NAME}"));
    }
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    let mut names = volumes.filter_map(|volume| volume["name"].as_str());
    names.find(|name| NAMES.contains(name)).map(|name| format!("a volume {name}"))
}

fn list_in<'a>(fields: &'a mut serde_json::Map<String, Value>, name: &str) -> &'a mut Value {
    let list = fields.entry(name).or_insert(Value::Null);
    if !list.is_array() {
        *list = json!([]);
    }
    list
}

/// The sidecar comes before all others, which may use it from their start.
fn put_first(list: &mut Value, plan: &Plan) {
    let Some(containers) = list.as_array_mut() else { return };
    let wanted = container(plan);
    let existing = containers.iter().position(|container| container["name"] == NAME).map(|index| containers.remove(index));
    let sidecar = existing.map_or(wanted.clone(), |existing| repaired(&existing, wanted));
    containers.insert(0, sidecar);
}

fn put_volumes(list: &mut Value, plan: &Plan) {
    let Some(present) = list.as_array_mut() else { return };
    for volume in volumes(plan) {
        match present.iter_mut().find(|found| found["name"] == volume["name"]) {
            Some(found) if contains(found, &volume) => {}
            Some(found) => *found = volume,
            None => present.push(volume),
        }
    }
}

fn put_pull_secrets(spec: &mut serde_json::Map<String, Value>, plan: &Plan) {
    if plan.pull_secrets.is_empty() {
        return;
    }
    let Some(present) = list_in(spec, "imagePullSecrets").as_array_mut() else { return };
    for name in &plan.pull_secrets {
        if !present.iter().any(|secret| secret["name"] == name.as_str()) {
            present.push(json!({"name": name}));
        }
    }
}

/// Writes on the pod which binding it has, for whoever selects by it, and what was done, for the next look.
fn mark(pod: &mut Value, plan: &Plan) {
    let record = Record { cluster: plan.cluster.clone(), port: plan.port, admin: plan.admin };
    let record = serde_json::to_string(&record).unwrap_or_default();
    for (map, name, text) in [("labels", BINDING, plan.binding.as_str()), ("annotations", INJECTED, record.as_str())] {
        let place = &mut pod["metadata"][map];
        if !place.is_object() {
            *place = json!({});
        }
        place[name] = text.into();
    }
}

/// Whether a value has all that another has: the API server fills in what was left out.
pub fn contains(value: &Value, part: &Value) -> bool {
    match (value, part) {
        (Value::Object(value), Value::Object(part)) => {
            part.iter().all(|(name, inner)| value.get(name).is_some_and(|found| contains(found, inner)))
        }
        (value, part) => value == part,
    }
}
