//! What there is: everything that is read before anything is decided.
//!
//! Kubernetes' objects come from the watches; servers are asked through their agents, sentinels directly, all at the same time and
//! each with a deadline.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::runtime::reflector::{Lookup, ObjectRef, Store};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::certify::Shown;
use super::links;
use super::names::{AGENT_PORT, BUS_PORT, SENTINEL_PORT, SERVER_PORT};
use super::nodes;
use super::objects::Addresses;
use super::observe;
use super::parts;
use super::plan::{
    Facts, Member, Node as PlanNode, Observed, Pod, Revision, Scale, Sentinel, SentinelId, Server, ServerId, ServerState,
};
use super::validate::Wanted;
use crate::api::CacheCluster;
use crate::api::cache_cluster::CacheClusterSpec;
use crate::api::sensitive::{SecretKeyRef, SensitiveSource};
use crate::operator::admin::{Admin, AdminError, Entry, Trust};
use crate::operator::controller::Context;
use crate::operator::held::Held;
use crate::operator::queue::Key;
use crate::operator::watches::Watches;
use crate::policy::agent::{MAX_BYTES, StateReport};

/// How long a server or a sentinel may take to answer everything that it is asked.
const ASK_WITHIN: Duration = Duration::from_millis(1500);
/// The longest password.
const MAX_PASSWORD_BYTES: usize = 512;

/// A password that was read from a Secret, and of which version.
#[derive(Clone)]
pub struct CachedPassword {
    source: SecretKeyRef,
    version: Option<String>,
    text: String,
}

impl std::fmt::Debug for CachedPassword {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedPassword").field("source", &self.source).field("version", &self.version).finish_non_exhaustive()
    }
}

/// Why there is no password.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// The Secret does not exist.
    #[error(
        "spec.auth.password.secretKeyRef: there is no Secret {name}: create it, such as with \
         `kubectl create secret generic {name} -n {namespace} --from-literal={key}=...`"
    )]
    Missing {
        /// Its name.
        name: String,
        /// The entry that is asked for.
        key: String,
        /// Its namespace.
        namespace: String,
    },
    /// The Secret has no usable entry.
    #[error("spec.auth.password.secretKeyRef: the entry {key} of Secret {name} {what}: correct the Secret")]
    Malformed {
        /// The Secret's name.
        name: String,
        /// The entry that is asked for.
        key: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The API server did not tell.
    #[error("the Secret of a password: {0}")]
    Api(#[from] kube::Error),
    /// No password could be made.
    #[error("the system gives no random numbers")]
    NoRandomness,
}

/// The password that `source` stands for. Secrets are read once for each version.
pub async fn password(
    context: &Context,
    watches: &Watches,
    namespace: &str,
    source: &SensitiveSource,
    cached: &mut Option<CachedPassword>,
) -> Result<String, PasswordError> {
    let Some(reference) = &source.secret_key_ref else { return Ok(source.value.clone().unwrap_or_default()) };
    let SecretKeyRef { name, key } = reference;
    let known = watches.secret_versions.get(&ObjectRef::new(name).within(namespace));
    let version = known.as_ref().and_then(|secret| secret.part.0.as_deref());
    if let Some(cached) =
        cached.as_ref().filter(|cached| cached.source == *reference && known.is_some() && cached.version.as_deref() == version)
    {
        return Ok(cached.text.clone());
    }
    let secret = Api::<Secret>::namespaced(context.client.clone(), namespace).get_opt(name).await?;
    let Some(secret) = secret else {
        return Err(PasswordError::Missing { name: name.clone(), key: key.clone(), namespace: namespace.to_owned() });
    };
    let malformed = |what| PasswordError::Malformed { name: name.clone(), key: key.clone(), what };
    let bytes = secret.data.unwrap_or_default().remove(key).ok_or_else(|| malformed("does not exist"))?.0;
    let text = String::from_utf8(bytes).map_err(|_| malformed("is not UTF-8"))?;
    match text.as_bytes() {
        [] => return Err(malformed("is empty")),
        bytes if bytes.len() > MAX_PASSWORD_BYTES => return Err(malformed("has more than 512 bytes")),
        bytes if bytes.iter().any(u8::is_ascii_control) => {
            return Err(malformed("holds a control character, such as the line feed that `echo` appends"));
        }
        _ => {}
    }
    *cached = Some(CachedPassword { source: reference.clone(), version: secret.metadata.resource_version, text: text.clone() });
    Ok(text)
}

/// The object of this name in a store.
pub fn find<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: Lookup<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

/// A Secret of Larder's own. What the watch does not know yet is asked for: a password must not be made twice.
pub async fn own_secret(
    context: &Context,
    watches: &Watches,
    namespace: &str,
    name: &str,
) -> Result<Option<Arc<Held<parts::Secret>>>, kube::Error> {
    match find(&watches.secrets, namespace, name) {
        Some(secret) => Ok(Some(secret)),
        None => Ok(Api::<Secret>::namespaced(context.client.clone(), namespace)
            .get_opt(name)
            .await?
            .map(|secret| Arc::new(Held::of(&secret)))),
    }
}

/// What [`hear`] needs to know beforehand.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What is wanted.
    pub wanted: &'a Wanted,
    /// Where servers and sentinels are.
    pub addresses: &'a Addresses,
    /// How they let Larder in.
    pub entry: Entry<'a>,
    /// How many pods the StatefulSets ask for, where they exist.
    pub scale: Option<Scale>,
    /// The same, shard by shard.
    pub sizes: &'a BTreeMap<u16, u16>,
}

/// What was heard.
#[derive(Debug)]
pub struct Heard {
    /// What servers, sentinels and pods do. `steady`, `handover_failed` and `moved` are left at their defaults.
    pub observed: Observed,
    /// The newest generation of users that every desired server has proved.
    pub proved_users: Option<u64>,
    /// What each server's agent told that answered.
    pub reports: BTreeMap<ServerId, StateReport>,
    /// The certificates that were seen, by fingerprint.
    pub certificates: Shown,
    /// The processor time that each sentinel has used that told.
    pub used: BTreeMap<SentinelId, Duration>,
    /// The sentinels that wait for longer than need be on connections that nobody answers.
    pub patient: BTreeSet<SentinelId>,
}

/// Asks every server and sentinel.
pub async fn hear(context: &Context, watches: &Watches, question: Question<'_>) -> Heard {
    let Question { wanted, addresses, entry, scale, sizes } = question;
    let mut pods = pods(context, watches, wanted, addresses);
    pods.extend(scale.into_iter().flat_map(|scale| leaving(context, watches, wanted, (scale, sizes))));
    let sentinels = addresses.sentinels.iter().map(async |(id, ip)| {
        let exists = pods.contains_key(&Member::Sentinel(*id));
        let asked = if exists { Some(sentinel(SocketAddr::new(*ip, SENTINEL_PORT), entry).await) } else { None };
        (*id, asked.unwrap_or(SentinelAnswer { state: Sentinel::Stopped, ..SentinelAnswer::SILENT }))
    });
    let servers = addresses.servers.iter().map(async |(id, ip)| {
        let exists = pods.contains_key(&Member::Server(*id));
        let report = if exists { state_report(context, SocketAddr::new(*ip, AGENT_PORT), entry.trust).await } else { None };
        let state = match (&report, exists) {
            (Some(report), _) => ServerState::from(report),
            (None, true) => ServerState::Silent,
            (None, false) => ServerState::Absent,
        };
        let (address, bus_port) = (SocketAddr::new(*ip, SERVER_PORT), if wanted.is_cluster() { BUS_PORT } else { 0 });
        let state = match state {
            ServerState::Running(told) if wanted.is_cluster() => cluster_server(address, entry, told).await,
            state => state,
        };
        let server = Server { address, bus_port, state };
        (*id, server, report)
    });
    // Sentinels first: a promotion that they tell of has happened by the time that the servers are asked.
    let (mut sentinels_seen, mut moved, mut certificates) = (BTreeMap::new(), Vec::new(), Shown::default());
    let (mut used, mut patient) = (BTreeMap::new(), BTreeSet::new());
    for (id, SentinelAnswer { state, moved: has_moved, shown, used: has_used, reconnects_after }) in join_all(sentinels).await {
        used.extend(has_used.map(|used| (id, used)));
        patient.extend(reconnects_after.filter(|after| *after > links::RECONNECT_AFTER).map(|_| id));
        sentinels_seen.insert(id, state);
        moved.extend(has_moved.then_some(Member::Sentinel(id)));
        certificates.sentinels.extend(shown.map(|shown| (id, shown)));
    }
    let (mut seen, mut reports) = (BTreeMap::new(), BTreeMap::new());
    for (id, server, report) in join_all(servers).await {
        seen.insert(id, server);
        reports.extend(report.map(|report| (id, report)));
    }
    let shown = reports.iter().filter_map(|(id, report)| Some((*id, report.proved.certificate.clone()?)));
    certificates.servers.extend(shown);
    let moved = moved
        .into_iter()
        .chain(reports.iter().filter(|(id, report)| has_moved(&seen, id, report)).map(|(id, _)| Member::Server(*id)));
    // Their processes announce an address of an earlier Service as long as they run.
    for member in moved {
        pods.entry(member).and_modify(|pod| pod.revision = None);
    }
    let proved = |id: ServerId| reports.get(&id).and_then(|report| report.proved.users);
    // None of a missing one is less than any number: one that has proved nothing keeps all from being proved.
    let proved_users = wanted.servers().map(proved).min().flatten();
    let open_nodes = nodes::open(&context.nodes.state(), &wanted.pod);
    let sizes = sizes.clone();
    let observed = Observed { servers: seen, sentinels: sentinels_seen, pods, open_nodes, scale, sizes, ..Observed::default() };
    Heard { observed, proved_users, reports, certificates, used, patient }
}

/// Whether a server announces another address than its Service has.
fn has_moved(seen: &BTreeMap<ServerId, Server>, id: &ServerId, report: &StateReport) -> bool {
    let announced = report.address.as_ref().and_then(|address| address.parse::<SocketAddr>().ok());
    announced.zip(seen.get(id)).is_some_and(|(announced, server)| announced != server.address)
}

/// What was learned of a sentinel.
struct SentinelAnswer {
    /// What it says of itself.
    state: Sentinel,
    /// Whether it announces another address than the one at which it was asked.
    moved: bool,
    /// The fingerprint of the certificate that it shows.
    shown: Option<String>,
    /// The processor time that it has used.
    used: Option<Duration>,
    /// How soon it gives up a connection that nobody answers.
    reconnects_after: Option<Duration>,
}

impl SentinelAnswer {
    /// Of one that does not answer.
    const SILENT: Self = Self { state: Sentinel::Silent, moved: false, shown: None, used: None, reconnects_after: None };
}

async fn sentinel(address: SocketAddr, entry: Entry<'_>) -> SentinelAnswer {
    let ask = async {
        let mut admin = Admin::connect(address, entry).await?;
        let shown = admin.shown_certificate().map(str::to_owned);
        let watch = observe::sentinel(&mut admin).await?;
        let announced = observe::announced_by_sentinel(&mut admin).await;
        let moved = announced.is_some_and(|announced| announced != address.ip());
        let used = observe::used_by_sentinel(&mut admin).await;
        let reconnects_after = links::reconnects_after(&mut admin).await;
        Ok::<_, AdminError>(SentinelAnswer { state: Sentinel::Running { watch }, moved, shown, used, reconnects_after })
    };
    match timeout(ASK_WITHIN, ask).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            debug!(%error, "a sentinel does not answer");
            SentinelAnswer::SILENT
        }
        Err(_) => SentinelAnswer::SILENT,
    }
}

/// What a server of a Cluster says that runs; of its copy's history what its agent `told`.
async fn cluster_server(address: SocketAddr, entry: Entry<'_>, told: Facts) -> ServerState {
    let ask = async {
        let mut admin = Admin::connect(address, entry).await?;
        observe::server(&mut admin, true).await
    };
    match timeout(ASK_WITHIN, ask).await {
        Ok(Ok(Some(facts))) => ServerState::Running(Facts { lineage: told.lineage, ..facts }),
        Ok(Err(error)) => {
            debug!(%error, "a server does not answer");
            ServerState::Silent
        }
        Ok(Ok(None)) | Err(_) => ServerState::Silent,
    }
}

/// What an agent tells of its server; `None` where it does not answer.
pub(super) async fn state_report(context: &Context, agent: SocketAddr, trust: Option<&Trust>) -> Option<StateReport> {
    let (scheme, http) = trust.map_or(("http", &context.http), |trust| ("https", trust.http()));
    let ask = async {
        let response = http.get(format!("{scheme}://{agent}/state")).send().await?.error_for_status()?;
        if response.content_length().is_some_and(|length| length > MAX_BYTES as u64) {
            return Ok(None);
        }
        response.bytes().await.map(Some)
    };
    let body: Result<_, reqwest::Error> = timeout(ASK_WITHIN, ask).await.ok()?;
    match body {
        Ok(Some(body)) if body.len() <= MAX_BYTES => serde_json::from_slice(&body).ok(),
        Ok(_) => None,
        Err(error) => {
            debug!(%agent, %error, "an agent does not answer");
            None
        }
    }
}

/// The pods that exist, of members that have an address.
fn pods(context: &Context, watches: &Watches, wanted: &Wanted, addresses: &Addresses) -> BTreeMap<Member, Pod> {
    let names = &wanted.names;
    let servers = addresses.servers.keys().map(|id| (Member::Server(*id), names.server_pod(*id)));
    let sentinels = addresses.sentinels.keys().map(|id| (Member::Sentinel(*id), names.sentinel_pod(*id)));
    let existing = servers.chain(sentinels).filter_map(|(member, name)| {
        let pod = find(&watches.pods, &wanted.namespace, &name)?;
        Some((member, read_pod(context, &pod)))
    });
    existing.collect()
}

/// The pods that no set asks for any more and that are still there, which may be before they are deleted: the one that left last, or
/// several of a set that somebody else made smaller.
fn leaving(
    context: &Context,
    watches: &Watches,
    wanted: &Wanted,
    (scale, sizes): (Scale, &BTreeMap<u16, u16>),
) -> Vec<(Member, Pod)> {
    let there = |member: Member| {
        let name = match member {
            Member::Server(id) => wanted.names.server_pod(id),
            Member::Sentinel(id) => wanted.names.sentinel_pod(id),
        };
        let pod = find(&watches.pods, &wanted.namespace, &name)?;
        Some((member, Pod { deleting: true, ..read_pod(context, &pod) }))
    };
    let beyond = |(shard, size): (&u16, &u16)| {
        let shard = *shard;
        (*size..).map(move |index| Member::Server(ServerId { shard, index })).map_while(&there).collect::<Vec<_>>()
    };
    let servers = sizes.iter().flat_map(beyond);
    let sentinels = (scale.sentinels..).map(|index| Member::Sentinel(SentinelId(index))).map_while(&there);
    servers.chain(sentinels).collect()
}

fn read_pod(context: &Context, pod: &Held<parts::Pod>) -> Pod {
    let parts::Pod { revision, node, started, ready, .. } = &pod.part;
    let node = node.as_deref().map(|name| PlanNode { ready: is_ready_node(context, name), name: name.to_owned() });
    Pod {
        uid: pod.uid().to_owned(),
        revision: revision.as_deref().map(|revision| Revision(revision.to_owned())),
        node,
        started: *started,
        ready: *ready,
        deleting: pod.is_deleting(),
    }
}

/// Whether a node is there and ready; taken for so where this operator may not see nodes.
fn is_ready_node(context: &Context, name: &str) -> bool {
    if context.nodes.is_empty() {
        return true;
    }
    context.nodes.get(&ObjectRef::new(name)).is_some_and(|node| nodes::is_ready(&node))
}

/// For how long what is seen has been the same: kept by whoever observes.
#[derive(Debug, Default)]
pub struct Steady {
    last: Option<(Observed, Instant)>,
}

impl Steady {
    /// Notes what is seen, and for how long it has been so.
    pub fn note(&mut self, observed: &Observed) -> Duration {
        let shape = observed.shape();
        match &self.last {
            Some((last, since)) if *last == shape => since.elapsed(),
            _ => {
                self.last = Some((shape, Instant::now()));
                Duration::ZERO
            }
        }
    }
}

/// The field of a CacheCluster's specification that cannot be read; `None` where that cannot be told.
pub async fn unreadable_field(context: &Context, key: &Key) -> Option<String> {
    let resource = ApiResource::erase::<CacheCluster>(&());
    let api = Api::<DynamicObject>::namespaced_with(context.client.clone(), &key.namespace, &resource);
    // Who may list need not have the right to get.
    let listed = api.list(&ListParams::default().fields(&format!("metadata.name={}", key.name))).await.ok()?;
    field_that_breaks(listed.items.first()?.data.get("spec")?).map(|field| format!("spec.{field}"))
}

/// The field without which a specification breaks at another place, or at none.
fn field_that_breaks(spec: &Value) -> Option<String> {
    let read = |spec: Value| serde_json::from_value::<CacheClusterSpec>(spec).map(drop).map_err(|error| error.to_string());
    let whole = read(spec.clone()).err()?;
    let breaks = |field: &&String| {
        let mut less = spec.clone();
        less.as_object_mut().is_some_and(|fields| fields.remove(*field).is_some()) && read(less).err().as_ref() != Some(&whole)
    };
    spec.as_object()?.keys().find(breaks).cloned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_field_that_breaks_is_found() {
        let mut spec =
            json!({"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "1Gi", "replicas": 1});
        assert_eq!(field_that_breaks(&spec), None);
        spec["memory"] = json!({"much": true});
        assert_eq!(field_that_breaks(&spec).as_deref(), Some("memory"));
        spec["memory"] = json!("1Gi");
        spec["engine"] = json!([]);
        assert_eq!(field_that_breaks(&spec).as_deref(), Some("engine"));
    }
}
