//! The operator as a process: it watches, and while it leads it looks at each CacheCluster, and at the policies of each namespace, when
//! something about them changes, and regularly.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::Store;
use kube::{Client, Resource as _};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::cache_cluster::objects::Installation;
use super::cache_cluster::reconcile::{self, Memory, Standing};
use super::cache_policy::cache::Caches;
use super::cache_policy::look;
use super::cache_policy::relay::objects::RelayOptions;
use super::cache_policy::ties::Ties;
use super::election::{Election, Leadership};
use super::metrics::Metrics;
use super::queue::{Key, Queue, back_off};
use super::serve::{self, ListenError};
use super::watches::{Cluster, Queues, Watches, namespace_key, nodes};
use crate::journal::Level;
use crate::policy::binding::BindingName;

/// How many CacheClusters are worked on at the same time.
const CONCURRENCY: usize = 4;
/// How many namespaces' policies are.
const POLICY_CONCURRENCY: usize = 2;
/// How long work under way may go on after the signal to stop.
const FINISH_WITHIN: Duration = Duration::from_secs(20);
/// How long what sidecars told is gathered before it is told on.
const TOLD: Duration = Duration::from_secs(1);
/// The Lease that the operators of one installation compete for.
const LEASE: &str = "larder-operator";
/// How long what was learned is kept by a process that leads no more: it may get its Lease back, and nobody have led meanwhile.
const KEPT: Duration = Duration::from_secs(60);
/// How long a server's agent may take to answer.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// How the operator runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// The namespaces whose CacheClusters are kept. Empty: all.
    pub namespaces: Vec<String>,
    /// Where health and metrics are served.
    pub listen: SocketAddr,
    /// The namespace of the Lease.
    pub lease_namespace: String,
    /// A name that no other process has.
    pub identity: String,
    /// What all CacheClusters share.
    pub installation: Installation,
    /// How old the password of a workload's user may grow. `None`: it is replaced when somebody asks for it.
    pub password_age: Option<Duration>,
    /// What the relays of policies that write behind are given.
    pub relays: RelayOptions,
}

/// Why the operator cannot run. Each text ends in the remedy.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Nothing says where the API server is.
    #[error("the API server: {0}: run it as a pod with a ServiceAccount, or set KUBECONFIG")]
    Config(#[from] kube::config::InferConfigError),
    /// The client cannot be made.
    #[error("the API server's client: {0}: correct the kubeconfig")]
    Client(#[source] Box<kube::Error>),
    /// The port cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The port was lost.
    #[error("health and metrics are served no more: {0}: see that the system has file descriptors left")]
    Serve(#[from] io::Error),
    /// The client that asks agents cannot be made.
    #[error("the HTTP client: {0}: see that the system has file descriptors left")]
    Http(#[from] reqwest::Error),
}

/// What every reconciliation may use.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// For agents, which are asked over HTTP.
    pub http: reqwest::Client,
    /// Events of CacheClusters.
    pub recorder: Recorder,
    /// Whether this process may act.
    pub leadership: Leadership,
    /// The operator's own figures.
    pub metrics: Arc<Metrics>,
    /// What is to be looked at.
    pub queues: Queues,
    /// What the looks at CacheClusters and those at policies tell each other.
    pub ties: Ties,
    /// Larder's own keys in the caches.
    pub caches: Caches,
    /// What all CacheClusters share.
    pub installation: Installation,
    /// See [`Config::password_age`].
    pub password_age: Option<Duration>,
    /// See [`Config::relays`].
    pub relays: RelayOptions,
    /// The nodes, where this operator may see them.
    pub nodes: Store<Node>,
    watches: Vec<Watches>,
    known: Mutex<Known>,
}

/// What is known of CacheClusters.
#[derive(Default)]
struct Known {
    /// What was learned of each; of one that is being looked at, whoever looks has it.
    memories: HashMap<Key, Memory>,
    /// How each was found the last time.
    standings: HashMap<Key, Standing>,
    /// What was learned of the policies of each namespace; of one that is being looked at, whoever looks has it.
    policies: HashMap<String, look::Memory>,
}

/// What whoever runs in the same process shares with the operator.
pub struct Beside<'a> {
    /// The API server.
    pub client: &'a Client,
    /// Whether this process may act.
    pub leadership: &'a Leadership,
    /// The operator's own figures.
    pub metrics: &'a Arc<Metrics>,
    /// They end with the operator.
    pub tasks: &'a mut JoinSet<()>,
}

/// Runs until `stopped` is complete, then finishes what is under way and lets another lead. `beside` starts what else runs in this
/// process, and returns what that waits for until it is ready: texts, each empty in the end.
pub async fn run(
    config: Config,
    beside: impl FnOnce(Beside<'_>) -> Vec<watch::Receiver<String>>,
    stopped: impl Future<Output = ()>,
) -> Result<(), OperatorError> {
    let client = client().await?;
    let listener = serve::bind(config.listen).await?;
    info!(listen = %config.listen, identity = config.identity, "the operator starts");
    let metrics = Arc::new(Metrics::default());
    let (tell, waiting) = watch::channel("the first look at the API server".to_owned());
    let (stop, stopping) = watch::channel(false);
    let (end, ending) = watch::channel(false);
    let ready = waiting.clone();
    let mut tasks = JoinSet::new();
    let (election, leadership) = Election::new(client.clone(), &config.lease_namespace, LEASE, &config.identity);
    let shared = Beside { client: &client, leadership: &leadership, metrics: &metrics, tasks: &mut tasks };
    let mut all_waiting = beside(shared);
    all_waiting.push(waiting);
    let server = tokio::spawn(serve::serve(listener, metrics.clone(), all_waiting, told(ending.clone())));
    let election = tokio::spawn(election.run(told(ending)));

    let context = Arc::new(Context::new(client, &config, leadership, metrics, &mut tasks)?);
    tasks.spawn(announce_readiness(context.clone(), tell));
    let Queues { clusters, policies } = &context.queues;
    let worker = |queue: &Queue| Worker { context: context.clone(), queue: queue.clone(), ready: ready.clone() };
    let of_clusters = (0..CONCURRENCY).map(|_| tokio::spawn(worker(clusters).work(look_at, stopping.clone())));
    let of_policies = (0..POLICY_CONCURRENCY).map(|_| tokio::spawn(worker(policies).work(look_at_policies, stopping.clone())));
    let workers: Vec<_> = of_clusters.chain(of_policies).collect();
    tasks.spawn(follow_leadership(context.clone()));

    stopped.await;
    info!("the operator stops");
    stop.send_replace(true);
    let finish = async {
        for worker in workers {
            // A worker that failed has nothing left to finish.
            let _ = worker.await;
        }
    };
    if timeout(FINISH_WITHIN, finish).await.is_err() {
        warn!("work under way is given up; the next leader takes it up where it stands");
    }
    tasks.abort_all();
    end.send_replace(true);
    // The election's own requests have deadlines.
    let _ = election.await;
    match server.await {
        Ok(served) => Ok(served?),
        Err(_) => Ok(()),
    }
}

async fn client() -> Result<Client, OperatorError> {
    let mut config = kube::Config::infer().await?;
    // Longer than a watch lasts, so that it only ends connections that were lost.
    config.read_timeout = Some(Duration::from_secs(310));
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).map_err(|error| OperatorError::Client(Box::new(error)))
}

/// A client for agents, which are asked in the clear: it needs no certificate authorities, and an image without any is no obstacle.
/// Hundreds of agents are asked, each every ten seconds: connections that stand would take more memory than all else that is kept of them.
fn http_client() -> Result<reqwest::Client, reqwest::Error> {
    let builder = reqwest::Client::builder().connect_timeout(ASK_WITHIN).timeout(ASK_WITHIN).pool_max_idle_per_host(0);
    builder.tls_certs_only([]).no_proxy().build()
}

/// Returns once the flag is set, or nobody can set it any more.
async fn told(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

impl Context {
    fn new(
        client: Client,
        config: &Config,
        leadership: Leadership,
        metrics: Arc<Metrics>,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, OperatorError> {
        let queues = Queues::default();
        let of_policies = queues.policies.clone();
        let told = move |cluster: &Key, _: &BindingName| of_policies.add_after(namespace_key(&cluster.namespace), TOLD);
        let scopes: Vec<Option<&str>> = match &config.namespaces[..] {
            [] => vec![None],
            names => names.iter().map(|name| Some(name.as_str())).collect(),
        };
        let turn = Arc::new(Semaphore::new(1));
        let watches = scopes.into_iter().map(|namespace| Watches::start(&client, namespace, &queues, &turn, tasks)).collect();
        let reporter = Reporter { controller: "larder.dev/operator".to_owned(), instance: Some(config.identity.clone()) };
        Ok(Self {
            nodes: nodes(&client, tasks),
            http: http_client()?,
            recorder: Recorder::new(client.clone(), reporter),
            ties: Ties::default(),
            caches: Caches::new(leadership.clone(), metrics.clone(), told),
            client,
            leadership,
            metrics,
            queues,
            installation: config.installation.clone(),
            password_age: config.password_age,
            relays: config.relays.clone(),
            watches,
            known: Mutex::default(),
        })
    }

    fn watches_of(&self, namespace: &str) -> Option<&Watches> {
        self.watches.iter().find(|watches| watches.covers(namespace))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a look that began in this turn learned about a CacheCluster, and counts them all.
    fn remember(&self, turn: u64, key: Key, memory: Option<Memory>) {
        let mut known = self.known();
        // A look may end after others have led.
        match memory.filter(|_| self.leadership.turn() == turn) {
            Some(memory) => {
                known.standings.insert(key.clone(), memory.standing);
                known.memories.insert(key, memory);
            }
            None => {
                known.standings.remove(&key);
                known.memories.remove(&key);
            }
        }
        let count = |standing| known.standings.values().filter(|found| **found == standing).count();
        if self.leadership.holds() {
            self.metrics.set_clusters(known.standings.len(), count(Standing::Ready), count(Standing::Refused));
        }
    }

    /// Keeps what was learned about the policies of a namespace.
    fn remember_policies(&self, term: u64, namespace: &str, memory: Option<look::Memory>) {
        let mut known = self.known();
        if let Some(memory) = memory.filter(|_| self.leadership.holds() && self.ties.term() == term) {
            known.policies.insert(namespace.to_owned(), memory);
        }
        let (policies, bindings) =
            known.policies.values().map(look::Memory::counts).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.metrics.set_policies(policies, bindings);
        let journals = known.policies.values().map(look::Memory::journals).fold(Level::default(), Level::and);
        self.metrics.set_journals(&journals);
        self.metrics.set_changes_behind(known.policies.values().filter_map(look::Memory::behind_ms).max().unwrap_or_default());
    }

    /// Forgets everything: another may have changed it since.
    fn forget(&self) {
        *self.known() = Known::default();
    }

    /// Leaves to others what is under way.
    fn leave(&self) {
        self.known().policies.values_mut().for_each(look::Memory::leave_caches);
        self.ties.forget();
        self.caches.leave();
        self.metrics.set_clusters(0, 0, 0);
        self.metrics.set_policies(0, 0);
        self.metrics.set_journals(&Level::default());
        self.metrics.set_changes_behind(0);
    }
}

/// Says what the operator waits for until everything that is watched is at hand. Nobody else waits for the stores themselves: each wakes
/// only the last who asked.
async fn announce_readiness(context: Arc<Context>, tell: watch::Sender<String>) {
    for watches in &context.watches {
        watches.ready(|what| drop(tell.send_replace(what))).await;
    }
    tell.send_replace(String::new());
    info!("everything that is watched is at hand");
}

/// Has everything looked at when this process begins to lead, since nobody did so here before, or lately. What was learned is good for as long
/// as nobody else led: else each object would be written once more.
async fn follow_leadership(context: Arc<Context>) {
    let mut leadership = context.leadership.clone();
    let mut turn = None;
    loop {
        if timeout(KEPT, leadership.gained()).await.is_err() {
            context.forget();
            leadership.gained().await;
        }
        if turn.replace(leadership.turn()) != Some(leadership.turn()) {
            context.forget();
        }
        context.ties.forget();
        context.metrics.set_leads(true);
        let keys = context.watches.iter().flat_map(Watches::keys);
        keys.for_each(|key| context.queues.clusters.add(key));
        let namespaces = context.watches.iter().flat_map(Watches::namespaces);
        namespaces.for_each(|namespace| context.queues.policies.add(namespace_key(&namespace)));
        leadership.lost().await;
        context.metrics.set_leads(false);
        context.leave();
        context.queues.clusters.forget_failures();
    }
}

/// Works on one object of a queue after another, while this process leads.
struct Worker {
    context: Arc<Context>,
    queue: Queue,
    ready: watch::Receiver<String>,
}

impl Worker {
    async fn work<F>(self, look: impl Fn(Arc<Context>, Key) -> F + Send, stopping: watch::Receiver<bool>)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { context, queue, mut ready } = self;
        tokio::select! {
            known = ready.wait_for(String::is_empty) => if known.is_err() { return },
            () = told(stopping.clone()) => return,
        }
        let mut leadership = context.leadership.clone();
        loop {
            let next = async {
                leadership.gained().await;
                queue.next().await
            };
            let turn = tokio::select! {
                turn = next => turn,
                () = told(stopping.clone()) => return,
            };
            if context.leadership.holds() {
                // In a task of its own, so that an error of ours in one object is not the end of all work.
                let look = tokio::spawn(look(context.clone(), turn.key().clone()));
                if let Err(error) = look.await {
                    warn!(key = %turn.key(), %error, "a look broke off");
                    queue.add_after(turn.key().clone(), back_off(8));
                }
            } else {
                // Whoever leads does it; it may be this process again.
                queue.add_after(turn.key().clone(), Duration::from_secs(1));
            }
        }
    }
}

/// Looks at one CacheCluster, does what is due, and says when to look again.
async fn look_at(context: Arc<Context>, key: Key) {
    let Some(watches) = context.watches_of(&key.namespace) else { return };
    let turn = context.leadership.turn();
    let Some(cluster) = watches.cluster(&key) else {
        debug!(%key, "the CacheCluster is gone");
        context.ties.gone(&key);
        context.caches.set(&key, None);
        context.queues.policies.add(namespace_key(&key.namespace));
        context.queues.clusters.succeed(&key);
        return context.remember(turn, key, None);
    };
    let mut memory = context.known().memories.remove(&key).unwrap_or_default();
    let start = Instant::now();
    context.metrics.begun();
    let outcome = timeout(reconcile::WITHIN, reconcile::reconcile(&context, watches, &cluster, &mut memory)).await;
    let (word, next) = match outcome {
        Ok(Ok(next)) => {
            memory.failures = 0;
            ("ok", next)
        }
        Ok(Err(error)) => {
            memory.failures = memory.failures.saturating_add(1);
            let next = back_off(memory.failures);
            warn!(%key, %error, again_in_ms = next.as_millis(), "a CacheCluster could not be brought forward");
            (error.word(), next)
        }
        Err(_) => {
            memory.failures = memory.failures.saturating_add(1);
            warn!(%key, "a look at a CacheCluster took more than {} s", reconcile::WITHIN.as_secs());
            ("late", back_off(memory.failures))
        }
    };
    context.metrics.ended(word, start.elapsed());
    context.remember(turn, key.clone(), Some(memory));
    if context.leadership.holds() && context.ties.looked(&key) {
        context.queues.policies.add(namespace_key(&key.namespace));
    }
    let queue = &context.queues.clusters;
    let generation = |cluster: &Cluster| cluster.meta().generation;
    if word == "ok" {
        queue.succeed(&key);
        queue.add_after(key, next);
    } else if watches.cluster(&key).is_some_and(|now| generation(&now) != generation(&cluster)) {
        // It was corrected in the meantime.
        queue.add_urgent(key);
    } else {
        queue.fail(key, generation(&cluster), next);
    }
}

/// Looks at the policies of one namespace, does what is due, and says when to look again.
async fn look_at_policies(context: Arc<Context>, key: Key) {
    let namespace = &key.namespace;
    let Some(watches) = context.watches_of(namespace) else { return };
    let term = context.ties.term();
    let mut memory = context.known().policies.remove(namespace).unwrap_or_default();
    let start = Instant::now();
    let outcome = timeout(look::WITHIN, look::look(&context, watches, namespace, &mut memory)).await;
    let (word, next) = match outcome {
        Ok(Ok(next)) => {
            memory.failures = 0;
            ("ok", next)
        }
        Ok(Err(error)) => {
            memory.failures = memory.failures.saturating_add(1);
            let next = back_off(memory.failures);
            warn!(namespace, %error, again_in_ms = next.as_millis(), "policies could not be brought forward");
            (error.word(), next)
        }
        Err(_) => {
            memory.failures = memory.failures.saturating_add(1);
            warn!(namespace, "a look at policies took more than {} s", look::WITHIN.as_secs());
            ("late", back_off(memory.failures))
        }
    };
    context.metrics.looked_at_policies(word, start.elapsed());
    let is_over = memory.counts() == (0, 0) && word == "ok";
    context.remember_policies(term, namespace, (!is_over).then_some(memory));
    // Where nothing is, nothing ages.
    if !is_over {
        context.queues.policies.add_after(key, next);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::api::CacheCluster;
    use crate::operator::cache_cluster::reconcile::ReconcileError;

    /// One look at a CacheCluster, by an operator that leads.
    pub async fn look_once(client: Client, cluster: CacheCluster, memory: &mut Memory) {
        look_as(Leadership::for_good(), client, cluster, memory).await.unwrap();
    }

    /// One look at a CacheCluster, by an operator that leads for as long as this says. When the next is due.
    pub async fn look_as(
        leadership: Leadership,
        client: Client,
        cluster: CacheCluster,
        memory: &mut Memory,
    ) -> Result<Duration, ReconcileError> {
        let mut tasks = JoinSet::new();
        let context = context(leadership, client, &mut tasks).await;
        let watches = context.watches_of("store").unwrap();
        reconcile::reconcile(&context, watches, &kube::core::DeserializeGuard(Ok(cluster)), memory).await
    }

    /// One look at the policies of the namespace `store`, by an operator that leads; `begin` is given what it may use before.
    pub async fn look_at_policies_once(
        client: Client,
        memory: &mut look::Memory,
        begin: impl FnOnce(&Context),
    ) -> Result<Duration, look::LookError> {
        let mut tasks = JoinSet::new();
        let context = context(Leadership::for_good(), client, &mut tasks).await;
        begin(&context);
        look::look(&context, context.watches_of("store").unwrap(), "store", memory).await
    }

    /// What looks may use, with everything at hand. `tasks` are to live as long.
    async fn context(leadership: Leadership, client: Client, tasks: &mut JoinSet<()>) -> Context {
        let config = Config {
            namespaces: vec!["store".to_owned()],
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            lease_namespace: "larder-system".to_owned(),
            identity: "test".to_owned(),
            installation: Installation {
                larder_image: "larder:1".to_owned(),
                image_pull_policy: None,
                operator_namespace: "larder-system".to_owned(),
            },
            password_age: None,
            relays: RelayOptions::default(),
        };
        // An error means that another test was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let context = Context::new(client, &config, leadership, Arc::default(), tasks).unwrap();
        context.watches_of("store").unwrap().ready(|_| ()).await;
        context.nodes.wait_until_ready().await.unwrap();
        context
    }
}
