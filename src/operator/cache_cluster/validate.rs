//! A CacheCluster as its user wrote it becomes [`Wanted`], whose values need no further checks, or a list of problems. Pure.
//!
//! Most of what is refused here the API server has refused already by the definition's own rules: objects may be older than those.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource as _;

use super::names::Names;
use super::plan::{Layout, SentinelId, ServerId};
use super::users::SYSTEM_USER;
use crate::api::cache_cluster::{
    AuthSpec, EngineKind, Eviction, MAX_NAME_CHARS, Mode, NetworkPolicyOptions, PeerSpec, PodOptions, StorageSpec, TlsSpec,
    WritesSpec,
};
use crate::api::parameters::instead_of;
use crate::api::path::at;
use crate::api::{CacheCluster, CacheClusterSpec, FieldPath, ObjectRef, Problem};
use crate::policy::{ByteSize, told};

/// The least memory of a server on Kubernetes: the agent and the server itself, without data, take about 16 MiB of it.
pub const MIN_MEMORY: ByteSize = ByteSize::from_bytes(64 << 20);

/// A CacheCluster that can be carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// What its objects are called.
    pub names: Names,
    /// Its namespace.
    pub namespace: String,
    /// Its `metadata.uid`.
    pub uid: String,
    /// Its `metadata.generation`.
    pub generation: i64,
    /// The server program.
    pub engine: EngineKind,
    /// The container image of servers and sentinels.
    pub image: String,
    /// Who fails over, and over what.
    pub layout: Layout,
    /// Replicas beside each primary; at least one.
    pub replicas: u16,
    /// The memory limit of a server's container.
    pub memory: ByteSize,
    /// What a full server drops.
    pub eviction: Eviction,
    /// Further lines of the servers' configuration.
    pub parameters: BTreeMap<String, String>,
    /// The user that servers ask for. `None`: nobody is asked.
    pub auth: Option<AuthSpec>,
    /// How servers and sentinels speak TLS. `None`: they do not.
    pub tls: Option<Tls>,
    /// Where data is kept. `None`: in memory only.
    pub storage: Option<StorageSpec>,
    /// When a primary refuses writes. `None`: never.
    pub writes: Option<WritesSpec>,
    /// How pods are scheduled and marked.
    pub pod: PodOptions,
    /// Who may open connections. `None`: everybody.
    pub network: Option<Network>,
    /// Whether data may be given up that only servers hold that cannot be asked.
    pub accept_data_loss: bool,
    /// Whether everything is left as it is.
    pub paused: bool,
}

/// How servers and sentinels speak TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// A text whose change asks for new certificates.
    pub rotation: Option<String>,
}

/// Who may open connections, besides the servers, the sentinels and the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Who may use the cache. Empty: every pod of the namespace.
    pub from: Vec<PeerSpec>,
    /// Who else may read metrics.
    pub metrics_from: Vec<PeerSpec>,
}

impl Wanted {
    /// The number of shards; one under Sentinel.
    pub fn shards(&self) -> u16 {
        self.layout.shards()
    }

    /// The number of sentinels; none in a Cluster.
    pub fn sentinels(&self) -> u16 {
        self.layout.sentinels()
    }

    /// Whether it is a Cluster.
    pub fn is_cluster(&self) -> bool {
        matches!(self.layout, Layout::Cluster { .. })
    }

    /// Every server, by shard and index.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> + use<> {
        let replicas = self.replicas;
        (0..self.shards()).flat_map(move |shard| (0..=replicas).map(move |index| ServerId { shard, index }))
    }

    /// How many servers there are.
    pub fn server_count(&self) -> u16 {
        self.shards().saturating_mul(self.replicas + 1)
    }

    /// Every sentinel.
    pub fn sentinel_ids(&self) -> impl Iterator<Item = SentinelId> + use<> {
        (0..self.sentinels()).map(SentinelId)
    }

    /// The name under which sentinels watch the primary.
    pub fn master_name(&self) -> &str {
        self.names.cluster()
    }

    /// What marks an object as this CacheCluster's own.
    pub fn owner_reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: CacheCluster::api_version(&()).into_owned(),
            kind: CacheCluster::kind(&()).into_owned(),
            name: self.names.cluster().to_owned(),
            uid: self.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }
}

/// Checks a CacheCluster.
pub fn validate(cluster: &CacheCluster) -> Result<Wanted, Vec<Problem>> {
    let CacheClusterSpec {
        engine,
        mode,
        shards: _,
        replicas: _,
        sentinels: _,
        memory,
        eviction: _,
        parameters,
        auth,
        tls,
        storage,
        writes,
        pod,
        network_policy,
        recovery,
        paused,
    } = &cluster.spec;
    let mut problems = Problems { object: ObjectRef::new("CacheCluster", &cluster.metadata), found: Vec::new() };
    problems.check_name(cluster.metadata.name.as_deref().unwrap_or_default());
    if *memory < MIN_MEMORY {
        problems.add(at!("spec", "memory"), "the server and its agent would have no room", "write at least 64Mi");
    }
    let spec = &cluster.spec;
    if writes.is_some_and(|writes| writes.min_replicas > spec.replica_count()) {
        let path = at!("spec", "writes", "minReplicas");
        problems.add(path, "it is more than there are replicas", "lower it, or raise spec.replicas");
    }
    if auth.as_ref().is_some_and(|auth| [SYSTEM_USER, told::MARK].contains(&auth.user())) {
        problems.add(at!("spec", "auth", "user"), "it is the user of Larder itself", "choose another name");
    }
    let pod = pod.clone().unwrap_or_default();
    problems.check_cpu(&pod);
    problems.check_parameters(parameters);
    if !problems.found.is_empty() {
        return Err(problems.found);
    }
    let NetworkPolicyOptions { enabled, from, metrics_from } = network_policy.clone().unwrap_or_default();
    Ok(Wanted {
        names: Names::new(cluster.metadata.name.clone().unwrap_or_default()),
        namespace: cluster.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        uid: cluster.metadata.uid.clone().unwrap_or_default(),
        generation: cluster.metadata.generation.unwrap_or_default(),
        engine: engine.kind,
        image: engine.image.clone().unwrap_or_else(|| official_image(engine.kind, &engine.version)),
        layout: match mode {
            Mode::Sentinel => Layout::Sentinel { sentinels: count(spec.sentinel_count()) },
            Mode::Cluster => Layout::Cluster { shards: count(spec.shard_count()) },
        },
        replicas: count(spec.replica_count()),
        memory: *memory,
        eviction: spec.eviction(),
        parameters: parameters.clone(),
        auth: auth.clone(),
        tls: tls.clone().filter(|tls| tls.enabled).map(|TlsSpec { enabled: _, rotation }| Tls { rotation }),
        storage: storage.clone(),
        writes: *writes,
        pod,
        network: enabled.unwrap_or(true).then_some(Network { from, metrics_from }),
        accept_data_loss: recovery.is_some_and(|recovery| recovery.accept_data_loss),
        paused: *paused,
    })
}

fn count(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

fn official_image(kind: EngineKind, version: &str) -> String {
    match kind {
        EngineKind::Redis => format!("redis:{version}"),
        EngineKind::Valkey => format!("valkey/valkey:{version}"),
    }
}

/// Thousandths of a CPU, of a text that the definition's rules let pass.
fn millicpus(text: &str) -> Option<u64> {
    match text.strip_suffix('m') {
        Some(millis) => millis.parse().ok(),
        None => text.parse::<f64>().ok().filter(|cpus| (0.0..=1e6).contains(cpus)).map(|cpus| (cpus * 1000.0).round() as u64),
    }
}

struct Problems {
    object: ObjectRef,
    found: Vec<Problem>,
}

impl Problems {
    fn add(&mut self, path: FieldPath, what: impl Into<String>, remedy: impl Into<String>) {
        self.found.push(Problem { object: self.object.clone(), path, what: what.into(), remedy: remedy.into() });
    }

    fn check_name(&mut self, name: &str) {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let fits = name.starts_with(|first: char| first.is_ascii_lowercase()) && !name.ends_with('-') && name.bytes().all(inner);
        if !fits || name.len() > MAX_NAME_CHARS {
            let remedy = format!("use at most {MAX_NAME_CHARS} lower-case letters, digits and dashes, beginning with a letter");
            self.add(at!("metadata", "name"), "Services cannot be named after it", remedy);
        }
    }

    fn check_parameters(&mut self, parameters: &BTreeMap<String, String>) {
        for (name, instead) in parameters.keys().filter_map(|name| Some((name, instead_of(name)?))) {
            self.add(at!("spec", "parameters").key(name), "Larder sets it itself", instead);
        }
    }

    fn check_cpu(&mut self, pod: &PodOptions) {
        let Some(cpu) = &pod.cpu else { return };
        let path = at!("spec", "pod", "cpu");
        let read = |text: &Option<String>| text.as_deref().map(millicpus);
        match (read(&cpu.request), read(&cpu.limit)) {
            (Some(None), _) | (_, Some(None)) => self.add(path, "it is no amount of CPU", "write 2, 0.5 or 500m"),
            (request, Some(Some(limit))) if request.flatten().unwrap_or(100) > limit => {
                self.add(path, "the limit is below the request (default 100m)", "lower the request, or raise the limit");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
pub(in crate::operator) mod tests {
    use super::*;

    /// A CacheCluster `shop` of this specification, in JSON.
    pub fn cluster(spec: &serde_json::Value) -> CacheCluster {
        let mut full = serde_json::json!({"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi"});
        for (key, value) in spec.as_object().unwrap() {
            full[key] = value.clone();
        }
        let mut cluster = CacheCluster::new("shop", serde_json::from_value(full).unwrap());
        cluster.metadata.namespace = Some("store".to_owned());
        cluster.metadata.uid = Some("0b7a0ef3-52a4-4bde-a3f2-7d3a6f6a2f10".to_owned());
        cluster.metadata.generation = Some(3);
        cluster
    }

    /// What is wanted with it.
    pub fn cluster_wanted(spec: &serde_json::Value) -> Wanted {
        validate(&cluster(spec)).unwrap()
    }

    fn refused(spec: &serde_json::Value) -> String {
        validate(&cluster(spec)).unwrap_err().iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn what_is_not_written_has_defaults() {
        let wanted = validate(&cluster(&serde_json::json!({}))).unwrap();
        assert_eq!((wanted.replicas, wanted.sentinels(), wanted.image.as_str()), (1, 3, "valkey/valkey:8.1"));
        assert!(wanted.network.is_some() && wanted.auth.is_none());
        assert_eq!(wanted.servers().count(), 2);
    }

    #[test]
    fn problems_name_their_place() {
        for (spec, path) in [
            (serde_json::json!({"memory": "32Mi"}), "spec.memory"),
            (serde_json::json!({"writes": {"minReplicas": 2}}), "spec.writes.minReplicas"),
            (serde_json::json!({"auth": {"user": "larder-system", "password": {"value": "x"}}}), "spec.auth.user"),
            (serde_json::json!({"auth": {"user": "larder-told", "password": {"value": "x"}}}), "spec.auth.user"),
            (serde_json::json!({"pod": {"cpu": {"request": "2", "limit": "1500m"}}}), "spec.pod.cpu"),
            (serde_json::json!({"pod": {"cpu": {"limit": "50m"}}}), "spec.pod.cpu"),
            (serde_json::json!({"parameters": {"hz": "20", "port": "6380"}}), "spec.parameters.port"),
        ] {
            let text = refused(&spec);
            assert!(text.lines().count() == 1 && text.contains(&format!(": {path}: ")), "{text}");
        }
        let mut dotted = cluster(&serde_json::json!({}));
        dotted.metadata.name = Some("shop.eu".to_owned());
        assert_eq!(validate(&dotted).unwrap_err()[0].path, at!("metadata", "name"));
    }

    #[test]
    fn a_cluster_has_shards_and_no_sentinels() {
        let wanted = cluster_wanted(&serde_json::json!({"mode": "Cluster", "replicas": 2}));
        assert_eq!((wanted.shards(), wanted.sentinels(), wanted.server_count()), (3, 0, 9));
        assert_eq!(wanted.servers().last(), Some(ServerId { shard: 2, index: 2 }));
    }
}
