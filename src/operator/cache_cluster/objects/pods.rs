//! The pod templates of servers and sentinels.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
    ExecAction, HTTPGetAction, KeyToPath, Lifecycle, LifecycleHandler, LocalObjectReference, ObjectFieldSelector,
    PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecretVolumeSource, SecurityContext, TCPSocketAction, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
    WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::ObjectMeta;

use super::config::{CONFIG_DIR, DATA_DIR, PASSWORD, SENTINEL_USERS_FILE, SYSTEM_DIR, TLS_DIR, USERNAME, USERS_DIR, USERS_FILE};
use super::{Installation, Revisions};
use crate::api::cache_cluster::{CpuOptions, PodOptions, Spread};
use crate::operator::cache_cluster::names::{
    AGENT_PORT, BUS_PORT, Component, POD_INDEX_LABEL, REVISION_ANNOTATION, SENTINEL_PORT, SERVER_PORT,
};
use crate::operator::cache_cluster::validate::Wanted;

/// The name of the servers' and sentinels' container.
pub const MAIN_CONTAINER: &str = "server";
/// The name of the init container that brings `larderd` along.
pub const LARDER_CONTAINER: &str = "larder";
/// The name of the volume with data.
pub const DATA_VOLUME: &str = "data";
/// How long a pod's end may take: a handover, the server's own end, and some room.
const GRACE_SECS: i64 = 40;
/// The user and group of the official images. Any other will do as well: everything that is written is on volumes.
const USER: i64 = 999;
/// The memory that a sentinel may take.
const SENTINEL_MEMORY: &str = "64Mi";
const LARDERD: &str = "/larder/larderd";

/// The template of a shard's servers.
pub fn server_template(wanted: &Wanted, installation: &Installation, revisions: &Revisions, shard: u16) -> PodTemplateSpec {
    let volumes = vec![
        empty_dir("larder"),
        empty_dir("run"),
        empty_dir("tmp"),
        config_volume(wanted.names.shard_set(shard)),
        secret_volume("system", wanted.names.system_secret(), None),
        secret_volume("users", wanted.names.users_secret(), Some(USERS_FILE)),
    ];
    let pod = PodSpec {
        containers: vec![server_container(wanted)],
        termination_grace_period_seconds: Some(GRACE_SECS),
        ..pod_spec(wanted, installation, (Component::Server, Some(shard)), volumes)
    };
    template(wanted, Component::Server, Some(shard), &revisions.servers, pod)
}

/// The template of sentinels.
pub fn sentinel_template(wanted: &Wanted, installation: &Installation, revisions: &Revisions) -> PodTemplateSpec {
    let volumes = vec![
        empty_dir("larder"),
        empty_dir("tmp"),
        config_volume(wanted.names.sentinel_set()),
        secret_volume("system", wanted.names.system_secret(), None),
        secret_volume("users", wanted.names.users_secret(), Some(SENTINEL_USERS_FILE)),
    ];
    let pod = PodSpec {
        containers: vec![sentinel_container(wanted)],
        termination_grace_period_seconds: Some(10),
        ..pod_spec(wanted, installation, (Component::Sentinel, None), volumes)
    };
    template(wanted, Component::Sentinel, None, &revisions.sentinels, pod)
}

fn template(wanted: &Wanted, component: Component, shard: Option<u16>, revision: &str, spec: PodSpec) -> PodTemplateSpec {
    let mut labels = wanted.pod.labels.clone();
    labels.extend(wanted.names.component_labels(component, shard));
    let mut annotations = wanted.pod.annotations.clone();
    annotations.insert(REVISION_ANNOTATION.to_owned(), revision.to_owned());
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), annotations: Some(annotations), ..ObjectMeta::default() }),
        spec: Some(spec),
    }
}

/// What pods of servers and sentinels have in common.
fn pod_spec(
    wanted: &Wanted,
    installation: &Installation,
    (component, shard): (Component, Option<u16>),
    mut volumes: Vec<Volume>,
) -> PodSpec {
    let PodOptions {
        labels: _,
        annotations: _,
        cpu: _,
        node_selector,
        tolerations,
        spread: _,
        priority_class_name,
        image_pull_secrets,
    } = &wanted.pod;
    if wanted.storage.is_none() {
        volumes.push(empty_dir(DATA_VOLUME));
    }
    if wanted.tls.is_some() {
        let secret = match component {
            Component::Server => wanted.names.server_tls_secret(),
            Component::Sentinel => wanted.names.sentinel_tls_secret(),
        };
        volumes.push(secret_volume("tls", secret, None));
    }
    let tolerations = tolerations.iter().map(|toleration| Toleration {
        key: toleration.key.clone(),
        operator: toleration.operator.map(|operator| operator.as_str().to_owned()),
        value: toleration.value.clone(),
        effect: toleration.effect.map(|effect| effect.as_str().to_owned()),
        toleration_seconds: toleration.toleration_seconds,
    });
    PodSpec {
        init_containers: Some(vec![larder_container(installation)]),
        volumes: Some(volumes),
        service_account_name: Some(wanted.names.cluster().to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        node_selector: (!node_selector.is_empty()).then(|| node_selector.clone()),
        tolerations: some_unless_empty(tolerations.collect()),
        priority_class_name: priority_class_name.clone(),
        image_pull_secrets: some_unless_empty(
            image_pull_secrets.iter().map(|secret| LocalObjectReference { name: secret.name.clone() }).collect(),
        ),
        affinity: Some(apart(wanted, component, shard.filter(|_| wanted.is_cluster()))),
        topology_spread_constraints: Some(vec![spread(wanted, component, HOSTNAME), spread(wanted, component, ZONE)]),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

fn some_unless_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

/// Keeps pods of one kind on nodes of their own: always, or where there are enough. Of a Cluster's servers those of one `shard`, so that no
/// replica is where its primary is, and less so all of them.
fn apart(wanted: &Wanted, component: Component, shard: Option<u16>) -> Affinity {
    let from = |shard: Option<u16>| PodAffinityTerm {
        label_selector: Some(wanted.names.selector(Some(component), shard)),
        topology_key: HOSTNAME.to_owned(),
        ..PodAffinityTerm::default()
    };
    let (mut required, mut preferred) = (Vec::new(), Vec::new());
    match wanted.pod.spread.unwrap_or_default() {
        Spread::Require => required.push(from(shard)),
        Spread::Prefer => preferred.push(WeightedPodAffinityTerm { pod_affinity_term: from(shard), weight: 100 }),
    }
    // Schedulers leave the constraints of `spread` out of account on nodes that lack the label of a zone.
    preferred.extend(shard.map(|_| WeightedPodAffinityTerm { pod_affinity_term: from(None), weight: 20 }));
    let rules = PodAntiAffinity {
        required_during_scheduling_ignored_during_execution: some_unless_empty(required),
        preferred_during_scheduling_ignored_during_execution: some_unless_empty(preferred),
    };
    Affinity { pod_anti_affinity: Some(rules), ..Affinity::default() }
}

/// Evens pods of one kind out, also where there are more of them than nodes or zones.
fn spread(wanted: &Wanted, component: Component, topology_key: &str) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        label_selector: Some(wanted.names.selector(Some(component), None)),
        max_skew: 1,
        topology_key: topology_key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        node_taints_policy: Some("Honor".to_owned()),
        ..TopologySpreadConstraint::default()
    }
}

/// Brings `larderd` along: the engine's image does not have it.
fn larder_container(installation: &Installation) -> Container {
    Container {
        name: LARDER_CONTAINER.to_owned(),
        image: Some(installation.larder_image.clone()),
        image_pull_policy: installation.image_pull_policy.clone(),
        command: Some(words(["/larderd", "agent", "install", LARDERD])),
        resources: Some(resources("10m", None, "32Mi")),
        security_context: Some(restricted()),
        volume_mounts: Some(vec![mount("larder", "/larder", false)]),
        ..Container::default()
    }
}

fn server_container(wanted: &Wanted) -> Container {
    let program = wanted.engine.server_program();
    let CpuOptions { request, limit } = wanted.pod.cpu.clone().unwrap_or_default();
    let mut command = words([LARDERD, "agent", "exec", "--config"]);
    command.push(format!("{CONFIG_DIR}/agent-$(ORDINAL).json"));
    command.extend(["--listen".to_owned(), format!("0.0.0.0:{AGENT_PORT}"), "--".to_owned(), program.to_owned()]);
    command.push(format!("{CONFIG_DIR}/server-$(ORDINAL).conf"));
    let mut ports = vec![port("redis", SERVER_PORT), port("agent", AGENT_PORT)];
    if wanted.is_cluster() {
        ports.push(port("bus", BUS_PORT));
    }
    let probe = |path: &str, period, failures| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            scheme: wanted.tls.as_ref().map(|_| "HTTPS".to_owned()),
            port: IntOrString::String("agent".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    Container {
        name: MAIN_CONTAINER.to_owned(),
        image: Some(wanted.image.clone()),
        command: Some(command),
        env: Some(environment()),
        ports: Some(ports),
        resources: Some(resources(request.as_deref().unwrap_or("100m"), limit.as_deref(), &wanted.memory.as_bytes().to_string())),
        security_context: Some(restricted()),
        // Two hours: a server that loads its data is started, and never killed for it.
        startup_probe: Some(probe("/startupz", 2, 3600)),
        liveness_probe: Some(probe("/livez", 5, 6)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        lifecycle: Some(Lifecycle {
            pre_stop: Some(LifecycleHandler {
                exec: Some(ExecAction { command: Some(words([LARDERD, "agent", "handover", "--limit", "15s"])) }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        volume_mounts: Some(mounts(wanted, Some(mount("run", "/run/larder", false)))),
        ..Container::default()
    }
}

fn sentinel_container(wanted: &Wanted) -> Container {
    let program = wanted.engine.server_program();
    let mut command = words([LARDERD, "agent", "sentinel", "--template"]);
    command.extend([
        format!("{CONFIG_DIR}/sentinel-$(ORDINAL).conf"),
        "--users".to_owned(),
        format!("{USERS_DIR}/{SENTINEL_USERS_FILE}"),
        "--username-file".to_owned(),
        format!("{SYSTEM_DIR}/{USERNAME}"),
        "--password-file".to_owned(),
        format!("{SYSTEM_DIR}/{PASSWORD}"),
        "--file".to_owned(),
        format!("{DATA_DIR}/sentinel.conf"),
        "--".to_owned(),
        program.to_owned(),
    ]);
    let probe = |period, failures| Probe {
        tcp_socket: Some(TCPSocketAction { port: IntOrString::String("sentinel".to_owned()), host: None }),
        period_seconds: Some(period),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    Container {
        name: MAIN_CONTAINER.to_owned(),
        image: Some(wanted.image.clone()),
        command: Some(command),
        env: Some(environment()),
        ports: Some(vec![port("sentinel", SENTINEL_PORT)]),
        resources: Some(resources("25m", None, SENTINEL_MEMORY)),
        security_context: Some(restricted()),
        liveness_probe: Some(probe(10, 6)),
        readiness_probe: Some(probe(2, 2)),
        volume_mounts: Some(mounts(wanted, None)),
        ..Container::default()
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

fn environment() -> Vec<EnvVar> {
    let field = ObjectFieldSelector { field_path: format!("metadata.labels['{POD_INDEX_LABEL}']"), api_version: None };
    vec![
        EnvVar {
            name: "ORDINAL".to_owned(),
            value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
            value: None,
        },
        EnvVar { name: "TMPDIR".to_owned(), value: Some("/tmp".to_owned()), value_from: None },
    ]
}

fn port(name: &str, port: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(port),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

/// Of memory as much is kept free as may be taken: what a node promised twice, the kernel takes back from whoever it likes.
fn resources(cpu: &str, cpu_limit: Option<&str>, memory: &str) -> ResourceRequirements {
    let quantity = |text: &str| Quantity(text.to_owned());
    let mut limits = BTreeMap::from([("memory".to_owned(), quantity(memory))]);
    if let Some(limit) = cpu_limit {
        limits.insert("cpu".to_owned(), quantity(limit));
    }
    let requests = BTreeMap::from([("cpu".to_owned(), quantity(cpu)), ("memory".to_owned(), quantity(memory))]);
    ResourceRequirements { limits: Some(limits), requests: Some(requests), claims: None }
}

fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// What containers of servers and sentinels see, `own` besides.
fn mounts(wanted: &Wanted, own: Option<VolumeMount>) -> Vec<VolumeMount> {
    let mut mounts = vec![mount("larder", "/larder", true)];
    mounts.extend(own);
    mounts.extend([
        mount("tmp", "/tmp", false),
        mount("config", CONFIG_DIR, true),
        mount("system", SYSTEM_DIR, true),
        mount("users", USERS_DIR, true),
        mount(DATA_VOLUME, DATA_DIR, false),
    ]);
    mounts.extend(wanted.tls.as_ref().map(|_| mount("tls", TLS_DIR, true)));
    mounts
}

fn empty_dir(name: &str) -> Volume {
    Volume { name: name.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }
}

fn config_volume(config_map: String) -> Volume {
    let source = ConfigMapVolumeSource { name: config_map, ..ConfigMapVolumeSource::default() };
    Volume { name: "config".to_owned(), config_map: Some(source), ..Volume::default() }
}

/// A Secret's entries, or one of them, as files that the group alone may read.
fn secret_volume(name: &str, secret: String, only: Option<&str>) -> Volume {
    let items = only.map(|key| vec![KeyToPath { key: key.to_owned(), path: key.to_owned(), mode: None }]);
    let source = SecretVolumeSource { secret_name: Some(secret), items, default_mode: Some(0o440), optional: None };
    Volume { name: name.to_owned(), secret: Some(source), ..Volume::default() }
}
