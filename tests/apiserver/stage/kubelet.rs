//! The StatefulSet controller and the kubelets in one: pods as the sets ask for them, made, run and ended through the API server.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, PodSpec, PodStatus, Secret, Service};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{self, ObjectRef, Store, store};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt as _};
use larder::operator::cache_cluster::names::{AGENT_PORT, CLUSTER_LABEL, Names, POD_INDEX_LABEL, POD_NAME_LABEL, SERVER_PORT};
use larder::operator::queue::{Key, Queue};
use larder::policy::agent::AgentConfig;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::AbortHandle;

use super::tier::{Member, Mounted, sentinel_address};
use super::tls::Pair;
use super::{NO_SUCH_IMAGE, Tiers, agent, listener, wire};
use crate::control_plane::client;

/// How many tiers are tended at the same time.
const CONCURRENCY: usize = 8;
/// How soon something is tried again that could not be done yet.
const AGAIN: Duration = Duration::from_millis(200);
/// What a scheduler says of a pod whose volume is not there yet.
const UNBOUND: &str = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.";
/// The nodes that pods are spread over.
pub const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// Why a tier is tended again.
#[derive(Debug)]
enum NotYet {
    Api(kube::Error),
    /// A pod waits for what it mounts, or for its address.
    Waits,
}

impl From<kube::Error> for NotYet {
    fn from(error: kube::Error) -> Self {
        Self::Api(error)
    }
}

struct Kubelet {
    client: Client,
    tiers: Tiers,
    queue: Queue,
    sets: Store<StatefulSet>,
    pods: Store<Pod>,
    services: Store<Service>,
    secrets: Store<Secret>,
    config_maps: Store<ConfigMap>,
    /// What runs, by the pod's uid.
    running: Mutex<HashMap<String, Running>>,
    pod_ips: AtomicU32,
}

struct Running {
    key: Key,
    pod: String,
    member: Member,
    tasks: Vec<AbortHandle>,
    /// Whether the pod's status says that it runs.
    told: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Plays until it is dropped.
pub async fn run(kubeconfig: PathBuf, tiers: Tiers) {
    let client = client(&kubeconfig).await;
    let queue = Queue::default();
    let kubelet = Arc::new(Kubelet {
        sets: watch(&client, &queue),
        pods: watch(&client, &queue),
        services: watch(&client, &queue),
        secrets: watch(&client, &queue),
        config_maps: watch(&client, &queue),
        client,
        tiers,
        queue,
        running: Mutex::default(),
        pod_ips: AtomicU32::new(u32::from(Ipv4Addr::new(10, 32, 0, 1))),
    });
    kubelet.ready().await;
    join_all((0..CONCURRENCY).map(|_| kubelet.clone().work())).await;
}

/// Keeps the objects of CacheClusters at hand, and has a tier tended when one of its own changes.
fn watch<K>(client: &Client, queue: &Queue) -> Store<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = store::<K>();
    let config = watcher::Config::default().labels(CLUSTER_LABEL);
    let events = watcher::watcher(Api::<K>::all(client.clone()), config).default_backoff().reflect(writer);
    let queue = queue.clone();
    tokio::spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            if let Ok(Event::Apply(object) | Event::InitApply(object) | Event::Delete(object)) = event
                && let (Some(namespace), Some(name)) = (object.namespace(), object.labels().get(CLUSTER_LABEL))
            {
                queue.add(Key { namespace, name: name.clone() });
            }
        }
    });
    reader
}

fn find<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: reflector::Lookup<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

fn text(secret: &Secret, entry: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(entry)?.0.clone()).ok()
}

impl Kubelet {
    async fn ready(&self) {
        let Self { sets, pods, services, secrets, config_maps, .. } = self;
        // A writer that is dropped ends with its runtime.
        let _ = tokio::join!(
            sets.wait_until_ready(),
            pods.wait_until_ready(),
            services.wait_until_ready(),
            secrets.wait_until_ready(),
            config_maps.wait_until_ready()
        );
    }

    async fn work(self: Arc<Self>) {
        loop {
            let turn = self.queue.next().await;
            match self.tend(turn.key()).await {
                Ok(()) => {}
                Err(NotYet::Waits) => self.queue.add_after(turn.key().clone(), AGAIN),
                Err(NotYet::Api(error)) => {
                    println!("stage: {}: {error}", turn.key());
                    self.queue.add_after(turn.key().clone(), AGAIN);
                }
            }
        }
    }

    fn api<K>(&self, key: &Key) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &key.namespace)
    }

    async fn tend(&self, key: &Key) -> Result<(), NotYet> {
        self.mount(key);
        self.end_what_has_no_pod(key);
        let of_tier = |labels: &BTreeMap<String, String>, namespace: Option<String>| {
            labels.get(CLUSTER_LABEL) == Some(&key.name) && namespace.as_deref() == Some(key.namespace.as_str())
        };
        let sets = self.sets.state_filter(|set| of_tier(set.labels(), set.namespace()));
        let pods = self.pods.state_filter(|pod| of_tier(pod.labels(), pod.namespace()));
        let mut outcome = Ok(());
        for set in &sets {
            let replicas = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            for ordinal in 0..u16::try_from(replicas).expect("few pods") {
                // One pod that waits is no reason for others to wait.
                outcome = outcome.and(self.tend_pod(key, set, ordinal).await);
            }
        }
        for pod in pods {
            let wanted = sets.iter().any(|set| {
                let ordinal =
                    pod.name_any().strip_prefix(&format!("{}-", set.name_any())).and_then(|rest| rest.parse::<i32>().ok());
                ordinal.is_some_and(|ordinal| ordinal < set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1))
            });
            if !wanted {
                outcome = outcome.and(self.end(key, &pod).await);
            }
        }
        outcome
    }

    async fn tend_pod(&self, key: &Key, set: &StatefulSet, ordinal: u16) -> Result<(), NotYet> {
        let name = format!("{}-{ordinal}", set.name_any());
        match find(&self.pods, &key.namespace, &name) {
            None => {
                self.claim(key, set, &name).await?;
                self.create(key, set, &name, ordinal).await
            }
            Some(pod) if pod.metadata.deletion_timestamp.is_some() => self.end(key, &pod).await,
            Some(pod) if pod.spec.as_ref().is_none_or(|spec| spec.node_name.is_none()) => {
                self.schedule(key, set, &pod, ordinal).await
            }
            Some(pod) if pod.status.as_ref().is_none_or(|status| status.pod_ip.is_none()) => self.begin(key, &pod).await,
            Some(_) => Ok(()),
        }
    }

    /// Makes the claims of a pod's volumes, which are bound at once where their class exists. Whether all are.
    async fn claim(&self, key: &Key, set: &StatefulSet, pod: &str) -> Result<bool, NotYet> {
        let templates = set.spec.as_ref().and_then(|spec| spec.volume_claim_templates.clone()).unwrap_or_default();
        let (api, classes) = (self.api::<PersistentVolumeClaim>(key), Api::<StorageClass>::all(self.client.clone()));
        let mut all_bound = true;
        for mut claim in templates {
            let name = format!("{}-{pod}", claim.name_any());
            claim.metadata.name = Some(name.clone());
            let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.clone());
            let is_new = unless_there(api.create(&PostParams::default(), &claim).await)?;
            let exists = match &class {
                Some(class) => classes.get_opt(class).await?.is_some(),
                None => true,
            };
            if exists && (is_new || class.is_some()) {
                let bound = json!({"status": {"phase": "Bound"}});
                api.patch_status(&name, &PatchParams::default(), &Patch::Merge(bound)).await?;
            }
            all_bound &= exists;
        }
        Ok(all_bound)
    }

    /// The node for a pod, as a scheduler would choose it: of those that it may go to, the one with the fewest of its set. Else why there
    /// is none.
    async fn place(&self, set: &StatefulSet, spec: &PodSpec, ordinal: u16) -> Result<Result<String, &'static str>, NotYet> {
        if spec.node_selector.as_ref().is_some_and(|labels| !labels.is_empty()) {
            return Ok(Err("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."));
        }
        let nodes = Api::<Node>::all(self.client.clone()).list(&Default::default()).await?;
        let is_open = |node: &Node| node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true));
        let open: Vec<String> = nodes.items.iter().filter(|node| is_open(node)).map(|node| node.name_any()).collect();
        let (uid, turn) = (set.uid(), usize::from(ordinal) % open.len().max(1));
        let of_set = self.pods.state_filter(|pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == uid.as_ref()));
        let carried = |node: &&String| {
            let on = |pod: &Arc<Pod>| pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_ref() == Some(*node));
            of_set.iter().filter(|pod| on(pod)).count()
        };
        let best = open.iter().cycle().skip(turn).take(open.len()).min_by_key(carried);
        Ok(best.cloned().ok_or("0/3 nodes are available: 3 node(s) were unschedulable."))
    }

    /// Gives a pod its node, or says why there is none.
    async fn schedule(&self, key: &Key, set: &StatefulSet, pod: &Pod, ordinal: u16) -> Result<(), NotYet> {
        let name = pod.name_any();
        let bound = self.claim(key, set, &name).await?;
        let spec = pod.spec.clone().unwrap_or_default();
        let place = if bound { self.place(set, &spec, ordinal).await? } else { Err(UNBOUND) };
        match place {
            Ok(node) => {
                let binding = json!({
                    "apiVersion": "v1",
                    "kind": "Binding",
                    "metadata": {"name": name, "namespace": key.namespace},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": node},
                });
                let bound = self.api::<Pod>(key).create_subresource("binding", &name, &PostParams::default(), &binding).await;
                bound.map(|_: Value| ()).map_err(NotYet::from)
            }
            Err(why) => {
                let told = pod.status.as_ref().and_then(|status| status.conditions.as_ref()).is_some_and(|told| !told.is_empty());
                if !told {
                    self.tell(key, &name, &unschedulable(why)).await?;
                }
                Err(NotYet::Waits)
            }
        }
    }

    async fn create(&self, key: &Key, set: &StatefulSet, name: &str, ordinal: u16) -> Result<(), NotYet> {
        let spec = set.spec.clone().expect("a set has a specification");
        let template = spec.template.metadata.unwrap_or_default();
        let mut pod = Pod { spec: spec.template.spec, ..Pod::default() };
        pod.metadata.name = Some(name.to_owned());
        pod.metadata.annotations = template.annotations;
        pod.metadata.owner_references = set.controller_owner_ref(&()).map(|owner| vec![owner]);
        let mut labels = template.labels.unwrap_or_default();
        labels.insert(POD_NAME_LABEL.to_owned(), name.to_owned());
        labels.insert(POD_INDEX_LABEL.to_owned(), ordinal.to_string());
        pod.metadata.labels = Some(labels);
        let bound = spec.volume_claim_templates.as_ref().is_none_or(Vec::is_empty);
        let pod_spec = pod.spec.as_mut().expect("a template has a specification");
        // A pod without claims has its node at once where there is one, which saves requests; others are looked at again.
        pod_spec.node_name = if bound { self.place(set, pod_spec, ordinal).await?.ok() } else { None };
        for claim in spec.volume_claim_templates.unwrap_or_default() {
            let volume =
                json!({"name": claim.name_any(), "persistentVolumeClaim": {"claimName": format!("{}-{name}", claim.name_any())}});
            let volume = serde_json::from_value(volume).expect("a volume");
            pod_spec.volumes.get_or_insert_default().push(volume);
        }
        unless_there(self.api::<Pod>(key).create(&PostParams::default(), &pod).await)?;
        Ok(())
    }

    /// Runs what a pod asks for, and says so in its status.
    async fn begin(&self, key: &Key, pod: &Pod) -> Result<(), NotYet> {
        let (name, uid) = (pod.name_any(), pod.uid().expect("a uid"));
        let image = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.image.clone()).unwrap_or_default();
        if image == NO_SUCH_IMAGE {
            return if waits_for_its_image(pod) { Ok(()) } else { self.tell(key, &name, &without_image()).await };
        }
        let names = Names::new(key.name.clone());
        let server = names.parse_server_pod(&name).map(|id| Member::Server(id.index));
        let member = server.or_else(|| names.parse_sentinel_pod(&name).map(|id| Member::Sentinel(id.0))).expect("a name of ours");
        let service = find(&self.services, &key.namespace, &name);
        let address = service.and_then(|service| service.spec.as_ref()?.cluster_ip.as_ref()?.parse::<IpAddr>().ok());
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
        let tls = volumes.is_some_and(|volumes| volumes.iter().any(|volume| volume.name == "tls"));
        let (Some(address), true) = (address, self.tiers.with(key, |tier| tier.is_mounted(member, tls))) else {
            return Err(NotYet::Waits);
        };
        match self.is_told(&uid) {
            Some(true) => return Ok(()),
            Some(false) => {}
            None => {
                let tasks = self.listen(key, member, address).await.map_err(|error| {
                    println!("stage: {key}: {name}: {error}");
                    NotYet::Waits
                })?;
                let running = Running { key: key.clone(), pod: name.clone(), member, tasks, told: false };
                self.running().insert(uid.clone(), running);
                self.tiers.with(key, |tier| tier.start(member, address));
            }
        }
        let ip = Ipv4Addr::from(self.pod_ips.fetch_add(1, Ordering::Relaxed));
        self.tell(key, &name, &running_status(ip)).await?;
        if let Some(running) = self.running().get_mut(&uid) {
            running.told = true;
        }
        Ok(())
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_told(&self, uid: &str) -> Option<bool> {
        self.running().get(uid).map(|running| running.told)
    }

    async fn listen(&self, key: &Key, member: Member, address: IpAddr) -> std::io::Result<Vec<AbortHandle>> {
        let (tiers, key) = (self.tiers.clone(), key.clone());
        Ok(match member {
            Member::Server(ordinal) => {
                let server = listener::listen(SocketAddr::new(address, SERVER_PORT)).await?;
                let agent = listener::listen(SocketAddr::new(address, AGENT_PORT)).await?;
                vec![
                    tokio::spawn(wire::serve(server, tiers.clone(), key.clone(), member)).abort_handle(),
                    tokio::spawn(agent::serve(agent, tiers, key, ordinal)).abort_handle(),
                ]
            }
            Member::Sentinel(_) => {
                let sentinel = listener::listen(sentinel_address(address)).await?;
                vec![tokio::spawn(wire::serve(sentinel, tiers, key, member)).abort_handle()]
            }
        })
    }

    async fn tell(&self, key: &Key, pod: &str, status: &Value) -> Result<(), NotYet> {
        let patch = Patch::Merge(json!({"status": status}));
        self.api::<Pod>(key).patch_status(pod, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Ends what runs in a pod, and lets go of it.
    async fn end(&self, key: &Key, pod: &Pod) -> Result<(), NotYet> {
        let uid = pod.uid().expect("a uid");
        self.end_containers(&uid);
        let same = Preconditions { uid: Some(uid), resource_version: None };
        let at_once = DeleteParams::default().grace_period(0).preconditions(same);
        match self.api::<Pod>(key).delete(&pod.name_any(), &at_once).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn end_containers(&self, uid: &str) {
        let ended = self.running().remove(uid);
        if let Some(ended) = ended {
            self.tiers.with(&ended.key, |tier| tier.stop(ended.member));
        }
    }

    /// A pod may be gone, or another by now, without having been seen to end.
    fn end_what_has_no_pod(&self, key: &Key) {
        let gone: Vec<String> = {
            let running = self.running();
            let of_tier = running.iter().filter(|(_, running)| running.key == *key);
            let is_gone =
                |uid: &str, pod: &str| find(&self.pods, &key.namespace, pod).is_none_or(|pod| pod.uid().as_deref() != Some(uid));
            of_tier.filter(|(uid, running)| is_gone(uid, &running.pod)).map(|(uid, _)| uid.clone()).collect()
        };
        gone.iter().for_each(|uid| self.end_containers(uid));
    }

    /// What the tier's volumes hold now.
    fn mount(&self, key: &Key) {
        let names = Names::new(key.name.clone());
        let secret = |name: String| find(&self.secrets, &key.namespace, &name);
        let system = secret(names.system_secret());
        let login = system.and_then(|secret| Some((text(&secret, "username")?, text(&secret, "password")?)));
        let users = secret(names.users_secret()).and_then(|secret| {
            let file = text(&secret, "users.acl")?;
            file.lines().next()?.strip_prefix("# generation ")?.parse().ok()
        });
        let config = find(&self.config_maps, &key.namespace, &names.shard_set(0));
        let files = config.and_then(|config| config.data.clone()).unwrap_or_default();
        let agents = files.iter().filter(|(name, _)| name.starts_with("agent-")).map(|(name, file)| {
            let config = AgentConfig::parse(file.as_bytes()).unwrap_or_else(|error| panic!("{key}: {name}: {error}"));
            (config.server.ordinal, config.generation)
        });
        let pair = |name: String| secret(name).as_deref().and_then(Pair::of);
        let certificates = pair(names.server_tls_secret()).zip(pair(names.sentinel_tls_secret()));
        let mounted = Mounted { login, users, agents: agents.collect(), certificates };
        self.tiers.with(key, |tier| tier.mount(mounted));
    }
}

/// Whether an object was made; false where it was there already.
fn unless_there<K>(created: Result<K, kube::Error>) -> Result<bool, NotYet> {
    match created {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn container(state: &Value, runs: bool) -> Value {
    json!({
        "name": "server", "ready": runs, "started": runs, "restartCount": 0, "image": "server", "imageID": "", "state": state,
    })
}

fn running_status(ip: Ipv4Addr) -> Value {
    let now = Timestamp::now().to_string();
    let now = now.split('.').next().map(|seconds| format!("{}Z", seconds.trim_end_matches('Z')));
    let condition = |kind| json!({"type": kind, "status": "True", "lastTransitionTime": now});
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    json!({
        "phase": "Running",
        "podIP": ip.to_string(),
        "podIPs": [{"ip": ip.to_string()}],
        "startTime": now,
        "conditions": conditions,
        "containerStatuses": [container(&json!({"running": {"startedAt": now}}), true)],
    })
}

fn unschedulable(why: &str) -> Value {
    let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why});
    json!({"phase": "Pending", "conditions": [condition]})
}

fn without_image() -> Value {
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}});
    json!({"phase": "Pending", "containerStatuses": [container(&waiting, false)]})
}

fn waits_for_its_image(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|PodStatus { container_statuses, .. }| container_statuses.clone());
    statuses.is_some_and(|statuses| !statuses.is_empty())
}
