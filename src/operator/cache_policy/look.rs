//! One look at the policies of a namespace: what there is, what policies make of it, what is written, and what is told.
//!
//! A namespace is looked at as a whole, since a workload may follow several policies, and a policy be about several workloads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::apply::{Applier, Kept};
use super::cache::{self, Figures};
use super::delivery::{Decision, Past, Standing, Wish, decide, kept_files};
use super::fetch::{self, Bound, ReadSecret, Seen, Tenant};
use super::judged::{Judged, Outcomes, judge};
use super::merge::Merged;
use super::objects::{Binding, Objects, objects};
use super::origins::Files;
use super::parts::{Keyring, Map};
use super::passwords::{Due, Passwords, Servers};
use super::relay::tend::{Minded, Tender};
use super::relay::{self, feeds, journals_of};
use super::report::Progress;
use super::tell::{self, Told};
use super::ties::{Claim, Claims, Offer};
use super::unreadable::Earlier;
use super::user;
use super::workload::Workload;
use crate::journal::Level;
use crate::operator::cache_cluster::apply::ApplyError;
use crate::operator::cache_cluster::fetch::PasswordError;
use crate::operator::cache_cluster::reconcile::random_password;
use crate::operator::controller::Context;
use crate::operator::held::Held;
use crate::operator::queue::Key;
use crate::operator::watches::Watches;
use crate::policy::Snapshot;
use crate::policy::binding::{BindingName, CA_FILE};
use crate::policy::digest::Digest;
use crate::policy::snapshot::{Cluster, Origin, Topology, VERSION};

/// How long one look may take.
pub const WITHIN: Duration = Duration::from_secs(60);
/// How often a namespace is looked at without an occasion: what sidecars told ages.
const EVERY: Duration = Duration::from_secs(60);
/// How soon it is looked at again while something it needs is not known yet; whoever learns of it says so earlier.
const NOT_YET: Duration = Duration::from_secs(5);
/// How soon it is looked at again where another took a generation.
const OVERTAKEN: Duration = Duration::from_millis(500);

/// How a cache is reached, and the snapshots that it is to hold.
type Filled = (Arc<Offer>, BTreeMap<BindingName, Arc<str>>);

/// What is remembered of a namespace between two looks. Without it a look does the same, with more effort.
#[derive(Debug, Default)]
pub struct Memory {
    /// How many looks in a row failed.
    pub failures: u32,
    secrets: HashMap<String, ReadSecret>,
    earlier: Earlier,
    outcomes: Outcomes,
    written: HashMap<BindingName, Written>,
    /// What each cache was said to hold last.
    caches: BTreeMap<String, Filled>,
    /// The relays of policies, by these' names.
    relays: HashMap<String, Minded>,
    /// The `metadata.uid` of policies whose deletion was made to wait for their journals: the watch may lag.
    held: BTreeSet<String>,
    /// What each policy's status says.
    pub(super) told: HashMap<String, Told>,
}

impl Memory {
    /// Forgets what caches were said to hold: they are held by another now.
    pub fn leave_caches(&mut self) {
        self.caches.clear();
    }

    /// Of a namespace with a relay of which this is known.
    #[cfg(test)]
    pub(super) fn with_relay(policy: &str, minded: Minded) -> Self {
        Self { relays: HashMap::from([(policy.to_owned(), minded)]), ..Self::default() }
    }

    /// What its journals hold together, as far as that is known.
    pub fn journals(&self) -> Level {
        self.relays.values().filter_map(|minded| minded.kept.level()).fold(Level::default(), Level::and)
    }

    /// How old the oldest change of a database may be that is not told, in milliseconds.
    pub fn behind_ms(&self) -> Option<u64> {
        self.relays.values().filter_map(|minded| minded.feeds.behind_ms()).max()
    }

    /// How many policies and bindings it is of.
    pub fn counts(&self) -> (usize, usize) {
        (self.told.len(), self.written.len())
    }
}

/// What was written of a binding: the watch may still show what was before.
#[derive(Debug, Clone, Default)]
struct Written {
    passwords: Option<Put>,
    text: Option<Arc<str>>,
    newest: Option<u64>,
    /// Whether the first snapshot was written before servers knew its user, who is still waited for.
    early: bool,
    /// A text that was read, and the snapshot in it.
    read: Option<(Arc<str>, Arc<Snapshot>)>,
}

/// Passwords that were put into a Secret.
#[derive(Debug, Clone)]
struct Put {
    passwords: Passwords,
    /// What the watch showed of the Secret then: as long as it does, it lags.
    over: Option<Digest>,
}

impl Written {
    /// The passwords that lie in a binding's Secret: as the watch shows it, but where that lags, or the Secret is gone.
    fn passwords(&self, secret: Option<&Held<Keyring>>) -> Passwords {
        let shown = secret.map(|secret| secret.part.tag.substance);
        match &self.passwords {
            Some(Put { passwords, over }) if shown.is_none() || shown == *over => passwords.clone(),
            _ => secret.map(|secret| Passwords::of(&secret.part)).unwrap_or_default(),
        }
    }

    /// The snapshot of a text; none where it cannot be read. The same text is read once.
    fn snapshot(&mut self, text: &Arc<str>) -> Option<Arc<Snapshot>> {
        if let Some((_, snapshot)) = self.read.as_ref().filter(|(known, _)| known == text) {
            return Some(snapshot.clone());
        }
        let snapshot = Snapshot::parse(text.as_bytes()).ok().map(Arc::new);
        self.read = snapshot.clone().map(|snapshot| (text.clone(), snapshot));
        snapshot
    }
}

/// Why a look broke off. The next one begins anew.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// Something could not be read.
    #[error("the objects of a binding: {0}")]
    Read(#[from] kube::Error),
    /// An object could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// No password could be made.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// A status could not be written.
    #[error("the status of CachePolicy {0}: {1}")]
    Status(String, Box<kube::Error>),
}

impl LookError {
    /// The kind of error as a label of metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Apply(ApplyError::NotLeading) => "not_leading",
            Self::Apply(error) if error.is_refusal() => "refused",
            Self::Apply(_) => "apply",
            Self::Read(_) => "read",
            Self::Password(_) => "password",
            Self::Status(..) => "status",
        }
    }
}

/// A binding on its way.
pub(super) struct Delivery<'a> {
    /// The CacheCluster.
    pub cluster: String,
    /// The workload. `None`: it is gone, and the binding's objects go with it.
    pub tenant: Option<&'a Tenant>,
    /// What lies there.
    pub bound: Bound,
    /// What is to be in force.
    pub decision: Option<Decision>,
    /// How far that has come.
    pub progress: Progress,
    /// The snapshot that lies there, and its text.
    pub stands: Option<(Arc<Snapshot>, Arc<str>)>,
    wish: Wish<'a>,
    objects: Option<Objects>,
    claim: Option<Claim>,
}

impl Delivery<'_> {
    /// Whether it is a relay's.
    pub fn is_relay(&self) -> bool {
        self.tenant.is_some_and(|tenant| tenant.is_relay)
    }

    /// What policies say together, as far as they have what they name.
    pub fn merged(&self) -> Option<&Snapshot> {
        match self.wish {
            Wish::Merged(merged) | Wish::Partial(merged) => merged.snapshot.as_ref(),
            Wish::Refused | Wish::Nobody => None,
        }
    }
}

/// Does all that is due now in a namespace. When to look again.
pub async fn look(context: &Context, watches: &Watches, namespace: &str, memory: &mut Memory) -> Result<Duration, LookError> {
    let term = context.ties.term();
    let Some(seen) = fetch::see(context, watches, namespace, &mut memory.secrets, &mut memory.earlier).await? else {
        return Ok(NOT_YET);
    };
    let versions: HashMap<&str, Option<&str>> =
        memory.secrets.iter().map(|(name, secret)| (name.as_str(), secret.version())).collect();
    let (judged, merged) = judge(&seen, &versions, &mut memory.outcomes).await;
    context.metrics.merged(merged);
    let look = Look { context, namespace, seen: &seen, judged: &judged, now: SystemTime::now(), term };
    let mut next = EVERY.mul_f64(0.9 + fastrand::f64() * 0.2);
    look.hold(&mut memory.held).await?;
    let mut deliveries = deliveries(&seen, &judged);
    memory.written.retain(|binding, _| deliveries.contains_key(binding));
    let mut failed = None;
    for (binding, delivery) in &mut deliveries {
        // Hundreds of bindings take their time also where nothing is to be written.
        tokio::task::yield_now().await;
        match look.prepare(binding, delivery, memory).await {
            Ok(until) => next = next.min(until.unwrap_or(next)),
            Err(error) => failed = Some(note(namespace, binding, delivery, error)),
        }
    }
    look.claim(&deliveries);
    for (binding, delivery) in &mut deliveries {
        match look.deliver(binding, delivery, memory).await {
            Ok(Kept::Now) => {}
            Ok(Kept::Taken) => next = next.min(OVERTAKEN),
            Err(error) => failed = Some(note(namespace, binding, delivery, error)),
        }
    }
    look.fill_caches(&deliveries, memory);
    let figures = look.figures(&deliveries);
    let (deliveries, figures) = (&deliveries, &figures);
    let tender = Tender { context, watches, namespace, seen: &seen, judged: &judged, deliveries, figures };
    let tended = tender.tend(&mut memory.relays).await;
    (next, failed) = (next.min(tended.again.unwrap_or(next)), tended.failed.or(failed));
    let (carriages, feeds) = (&tended.carriages, &tended.feeds);
    let scene = tell::Scene { context, namespace, seen: &seen, judged: &judged, deliveries, figures, carriages, feeds };
    let told = scene.tell(memory).await;
    match (failed, told) {
        (Some(error), _) | (None, Err(error)) => Err(error),
        (None, Ok(again)) => Ok(next.min(again.unwrap_or(next))),
    }
}

/// Notes what kept a binding from being delivered; others are, all the same.
fn note(namespace: &str, binding: &BindingName, delivery: &mut Delivery<'_>, error: LookError) -> LookError {
    warn!(namespace, %binding, %error, "a binding could not be delivered");
    delivery.progress = Progress::NotWritten(error.to_string());
    delivery.objects = None;
    error
}

/// Every binding that is to be, or that something is left of.
fn deliveries<'a>(seen: &'a Seen, judged: &'a [Judged<'a>]) -> BTreeMap<BindingName, Delivery<'a>> {
    let mut all = BTreeMap::new();
    let delivery = |cluster: String, tenant: Option<&'a Tenant>, bound: &Bound, wish: Wish<'a>| Delivery {
        cluster,
        tenant,
        bound: bound.clone(),
        decision: None,
        progress: Progress::Nothing,
        stands: None,
        wish,
        objects: None,
        claim: None,
    };
    for judged in judged {
        if let Some(merged) = &judged.outcome().merged {
            let bound = seen.bound.get(&merged.binding).cloned().unwrap_or_default();
            let tenant = Some(judged.tenant);
            let is_whole = judged.tenant.is_relay || seen.unknown_to(&judged.tenant.workload).is_empty();
            let wish = if is_whole { Wish::Merged(merged) } else { Wish::Partial(merged) };
            all.insert(merged.binding.clone(), delivery(merged.cluster.clone(), tenant, &bound, wish));
        }
    }
    for (binding, bound) in &seen.bound {
        let Some(cluster) = bound.cluster() else { continue };
        if all.contains_key(binding) {
            continue;
        }
        let tenant = seen.tenants.iter().find(|tenant| is_of(binding, bound, tenant));
        if tenant.is_none() && bound.workload().is_some_and(relay::is_relay) {
            // It goes with its policy, and has nobody to say farewell to.
            continue;
        }
        let outcome = judged.iter().find(|judged| tenant.is_some_and(|tenant| std::ptr::eq(tenant, judged.tenant)));
        let is_refused = outcome.is_some_and(|judged| judged.outcome().merged.is_none());
        // Whom a policy may select that cannot be read is not told farewell meanwhile.
        let is_unsure = tenant.is_some_and(|tenant| !seen.unknown_to(&tenant.workload).is_empty());
        let wish = if is_refused || is_unsure { Wish::Refused } else { Wish::Nobody };
        all.insert(binding.clone(), delivery(cluster.to_owned(), tenant, bound, wish));
    }
    all
}

fn is_of(binding: &BindingName, bound: &Bound, tenant: &Tenant) -> bool {
    let Workload { kind, name, .. } = &tenant.workload;
    tenant.mounted.contains(binding) || bound.workload() == Some(&format!("{kind}/{name}"))
}

struct Look<'a> {
    context: &'a Context,
    namespace: &'a str,
    seen: &'a Seen,
    judged: &'a [Judged<'a>],
    now: SystemTime,
    term: u64,
}

impl Look<'_> {
    fn applier(&self) -> Applier<'_> {
        Applier { context: self.context, namespace: self.namespace }
    }

    /// Has the deletion of policies wait for their relays, before these have anything to do.
    async fn hold(&self, held: &mut BTreeSet<String>) -> Result<(), LookError> {
        let readable = self.seen.policies.iter().filter_map(|policy| policy.0.as_ref().ok());
        let (mut still, mut due) = (BTreeSet::new(), Vec::new());
        for policy in readable.filter(|policy| self.seen.needs_relay(policy)) {
            let uid = policy.metadata.uid.clone().unwrap_or_default();
            if !relay::is_held(policy) && !held.contains(&uid) {
                due.push(policy);
            }
            still.insert(uid);
        }
        for policy in due {
            self.applier().hold(policy, true).await?;
        }
        *held = still;
        Ok(())
    }

    /// A relay goes on with what it has until every journal is drained that it would forget.
    fn keeps_its_rules(delivery: &Delivery<'_>, standing: &Standing, minded: Option<&Minded>) -> bool {
        let stands = standing.snapshot.as_deref();
        let is_needed = delivery.merged().is_some_and(Snapshot::needs_relay);
        if !is_needed && stands.is_none_or(|stands| stands.feeds.is_empty()) {
            return true;
        }
        let wished = delivery.merged().map(journals_of).unwrap_or_default();
        let before = stands.map(journals_of).unwrap_or_default();
        let is_open = |journal: &_| minded.is_none_or(|minded| !minded.kept.is_closed(journal));
        before.keys().any(|journal| !wished.contains_key(journal) && is_open(journal))
    }

    /// What a relay is to have: what its policy says now, with what of its feeds is left to be taken away. `None`: what it has, or will as any
    /// workload.
    fn wish_of_relay(
        &self,
        delivery: &Delivery<'_>,
        standing: &Standing,
        place: Option<&Cluster>,
        relays: &HashMap<String, Minded>,
    ) -> Option<Merged> {
        let policy = self.seen.policy_of(&delivery.tenant?.workload)?;
        let (name, is_leaving) = (policy.metadata.name.as_deref()?, policy.metadata.deletion_timestamp.is_some());
        let before = standing.snapshot.as_deref();
        let Wish::Merged(merged) = delivery.wish else { return None };
        let wished = match (&merged.snapshot, before) {
            (Some(wished), _) if merged.is_complete => wished.clone(),
            // What it lacks must not keep what it has made from being taken away.
            (_, Some(before)) if is_leaving => {
                let cluster = place.unwrap_or(&before.cluster).clone();
                Snapshot { cluster: Cluster { patience: before.cluster.patience, ..cluster }, ..before.clone() }
            }
            _ if is_leaving => return Some(Merged { snapshot: None, ..merged.clone() }),
            _ => return None,
        };
        let minded = relays.get(name);
        let is_over = |slot: &str| minded.is_some_and(|minded| minded.feeds.is_over(slot, Instant::now()));
        let snapshot = Some(feeds::with_feeds(wished, before, name, is_leaving, is_over));
        Some(Merged { snapshot, is_complete: true, ..merged.clone() })
    }

    /// What sidecars are to have where origins have queues: those that are needed, and that a relay has been seen to tend. `None`: what their
    /// policies say.
    fn wish_with_queues(&self, delivery: &Delivery<'_>, standing: &Standing, relays: &HashMap<String, Minded>) -> Option<Merged> {
        let (Wish::Merged(merged) | Wish::Partial(merged)) = delivery.wish else { return None };
        let wished = merged.snapshot.as_ref().filter(|_| !delivery.is_relay())?;
        if wished.origins.iter().all(|origin| origin.load_queue.is_none()) {
            return None;
        }
        let before =
            || standing.snapshot.iter().flat_map(|before| &before.origins).filter_map(|origin| origin.load_queue.as_ref());
        let stays = |origin: &Origin| {
            origin.load_queue.as_ref().is_some_and(|queue| {
                let is_needed = self.seen.queues.values().any(|queues| queues.contains(queue));
                // A relay that is away is waited for: it is not for sidecars to take its place.
                is_needed && (relays.values().any(|minded| minded.tended.contains(queue)) || before().any(|known| known == queue))
            })
        };
        Some(Merged { snapshot: Some(wished.clone().with_queues(stays)), ..merged.clone() })
    }

    fn key(&self, cluster: &str) -> Key {
        Key { namespace: self.namespace.to_owned(), name: cluster.to_owned() }
    }

    /// Decides over a binding, and writes its Secret: the password is kept before anybody is told of it. When fewer files are to be in it.
    async fn prepare(
        &self,
        binding: &BindingName,
        delivery: &mut Delivery<'_>,
        memory: &mut Memory,
    ) -> Result<Option<Duration>, LookError> {
        let written = memory.written.entry(binding.clone()).or_default();
        let mut standing = self.standing(binding, delivery, written).await?;
        if let Some(tenant) = delivery.tenant.filter(|tenant| tenant.is_relay) {
            if Self::keeps_its_rules(delivery, &standing, memory.relays.get(&tenant.workload.name)) {
                delivery.wish = Wish::Refused;
            }
            // It is of this operator's version, or will be in a moment.
            standing.understood = Some(VERSION);
        }
        delivery.stands = standing.snapshot.clone().zip(standing.text.clone());
        let offer = self.seen.offers.get(&delivery.cluster);
        let place: Option<Cluster> = offer.map(|offer| offer.place.cluster(&delivery.cluster));
        let relays = &memory.relays;
        let of_relay = delivery.is_relay().then(|| self.wish_of_relay(delivery, &standing, place.as_ref(), relays)).flatten();
        let queued = self.wish_with_queues(delivery, &standing, relays);
        let wish = match (&of_relay, &queued, delivery.wish) {
            (Some(merged), ..) => Wish::Merged(merged),
            (None, Some(merged), Wish::Partial(_)) => Wish::Partial(merged),
            (None, Some(merged), _) => Wish::Merged(merged),
            (None, None, wish) => wish,
        };
        delivery.decision = decide(&standing, wish, place.as_ref(), self.now);
        let Some(decision) = delivery.decision.clone() else { return Ok(None) };
        let passwords = self.passwords(binding, delivery, written).await?;
        if passwords.are_missing() {
            // Whoever they were of is gone.
            return Ok(None);
        }
        let known = offer.and_then(|offer| offer.users.grant_of(binding));
        let of = if delivery.is_relay() { user::relay_grant } else { user::grant };
        let grant = of(&decision.snapshot, &passwords, known.as_ref());
        delivery.claim = Some(if decision.is_wished { Claim::Exactly(grant) } else { Claim::AsItIs(grant) });
        let Some(tenant) = delivery.tenant else { return Ok(None) };
        let (files, until) = self.files(delivery);
        let merged =
            Merged { cluster: delivery.cluster.clone(), binding: binding.clone(), snapshot: None, is_complete: false, files };
        let entry = |name: &str| Some(&**delivery.bound.secret.as_ref()?.part.entries.get(name)?);
        let authorities = offer.map_or_else(|| entry(CA_FILE), |offer| offer.authorities.as_deref());
        let (workload, owners, snapshot) = (&tenant.workload, &tenant.owners(), &decision.snapshot);
        let secret_owners = delivery.bound.secret.as_ref().map_or(&owners[..], |secret| &secret.part.tag.owners[..]);
        let binding = Binding { workload, owners, secret_owners, merged: &merged, snapshot, passwords: &passwords, authorities };
        let objects = objects(&binding);
        self.applier().secret(&objects.secret, &delivery.bound).await?;
        delivery.objects = Some(objects);
        Ok(until.and_then(|until| until.duration_since(self.now).ok()))
    }

    /// What stands of a binding: what the watch shows, or what was written since.
    async fn standing(
        &self,
        binding: &BindingName,
        delivery: &Delivery<'_>,
        written: &mut Written,
    ) -> Result<Standing, LookError> {
        let bound = &delivery.bound;
        let shown = bound.map.as_ref().and_then(|map| map.part.text.clone());
        let generation = |text: &Arc<str>| Snapshot::claimed_generation(text.as_bytes());
        let known = shown.into_iter().chain(written.text.clone()).max_by_key(generation);
        let text = match known {
            Some(text) => Some(text),
            None => fetch::restored(self.context, self.namespace, bound).await?,
        };
        let kept = bound.past.iter().chain(&bound.map).filter_map(|map| map.part.generation);
        let newest = kept.chain(written.newest).chain(text.as_ref().and_then(generation)).max();
        let figures = self.context.caches.figures(&self.key(&delivery.cluster), binding);
        let (in_cache, understood) = figures.map_or((None, None), |figures| (figures.newer_in_cache, figures.understands));
        let snapshot = text.as_ref().and_then(|text| written.snapshot(text));
        let durable = self.seen.offers.get(&delivery.cluster).map(|offer| offer.place.is_durable());
        Ok(Standing { text, snapshot, newest, in_cache, understood, durable })
    }

    /// The passwords of a binding's user as they are to lie in its Secret now.
    async fn passwords(
        &self,
        binding: &BindingName,
        delivery: &mut Delivery<'_>,
        written: &mut Written,
    ) -> Result<Passwords, LookError> {
        let mut before = written.passwords(delivery.bound.secret.as_deref());
        if delivery.tenant.is_none() {
            return Ok(before);
        }
        if before.are_missing() && delivery.bound.secret.is_none() {
            delivery.bound.secret = fetch::own_secret(self.context, self.namespace, binding).await?;
            before = written.passwords(delivery.bound.secret.as_deref());
        }
        let secret = delivery.bound.secret.as_ref().map(|secret| &secret.part);
        let due = Due {
            now: self.now,
            age: self.context.password_age,
            binding,
            created: secret.and_then(|secret| secret.created),
            asked: secret.and_then(|secret| secret.asked.as_deref()),
        };
        let servers = AtServers { offer: self.seen.offers.get(&delivery.cluster), binding };
        let passwords = before.next(due, &servers, random_password)?;
        if passwords != before {
            let (namespace, is_on_its_way) = (self.namespace, passwords.next.is_some());
            info!(namespace, %binding, is_on_its_way, "the password of a workload's user changes");
        }
        written.passwords = Some(Put { passwords: passwords.clone(), over: secret.map(|secret| secret.tag.substance) });
        Ok(passwords)
    }

    /// The files of origins: those of the policies, and those that sidecars may still read.
    fn files(&self, delivery: &Delivery<'_>) -> (Files, Option<SystemTime>) {
        let past = |map: &Held<Map>| {
            let files = map.part.files.iter().map(|file| file.to_string()).collect();
            Some(Past { generation: map.part.generation?, since: map.part.created, files })
        };
        // Of one generation both say the same; only what keeps it tells when it came.
        let mut all: BTreeMap<u64, Past> = BTreeMap::new();
        let maps = delivery.bound.map.iter().chain(&delivery.bound.past);
        for past in maps.filter_map(|map| past(map)) {
            all.insert(past.generation, past);
        }
        let (kept, until) = kept_files(&all.into_values().collect::<Vec<_>>(), self.now);
        let there = delivery.bound.secret.iter().flat_map(|secret| &secret.part.entries);
        let kept = there.filter(|(name, _)| kept.contains(&***name)).map(|(name, url)| (name.to_string(), url.to_string()));
        let mut files: BTreeMap<String, String> = kept.collect();
        if let Wish::Merged(merged) | Wish::Partial(merged) = delivery.wish {
            files.extend(merged.files.0.clone());
        }
        (Files(files), until)
    }

    /// Says which users each CacheCluster of the namespace is to have.
    fn claim(&self, deliveries: &BTreeMap<BindingName, Delivery<'_>>) {
        for cluster in &self.seen.clusters {
            let of_it = deliveries.iter().filter(|(_, delivery)| delivery.cluster == *cluster);
            let claims: Claims =
                of_it.filter_map(|(binding, delivery)| Some((binding.clone(), delivery.claim.clone()?))).collect();
            let key = self.key(cluster);
            if self.context.ties.claim(self.term, &key, claims) {
                debug!(%key, "its users for bindings change");
                self.context.queues.clusters.add_urgent(key);
            }
        }
    }

    /// Brings what is decided to where sidecars find it, once servers know their user.
    async fn deliver(&self, binding: &BindingName, delivery: &mut Delivery<'_>, memory: &mut Memory) -> Result<Kept, LookError> {
        let (Some(decision), Some(objects)) = (delivery.decision.take(), delivery.objects.take()) else { return Ok(Kept::Now) };
        let written = memory.written.entry(binding.clone()).or_default();
        let waits = decision.is_wished && (decision.is_new || written.early) && !self.is_in_force(binding, delivery);
        let progress = if waits { self.waits_for_user(binding, &delivery.cluster) } else { Progress::Delivered };
        let is_first = delivery.bound.map.is_none() && delivery.bound.past.is_empty() && written.newest.is_none();
        if waits && decision.is_new && !is_first {
            delivery.progress = progress;
            return Ok(Kept::Now);
        }
        // The first is written at once: a kubelet that mounts nothing looks again a minute later. Sidecars hold applications up until they are
        // let in, and nobody acts under anything else meanwhile.
        written.early = waits;
        if decision.is_new {
            let generation = decision.snapshot.generation;
            written.newest = written.newest.max(Some(generation));
            if self.applier().history(&objects.history).await? == Kept::Taken {
                return Ok(Kept::Taken);
            }
        }
        self.applier().config_map(&objects.config_map, &delivery.bound).await?;
        let text = objects.config_map.data.as_ref().and_then(|data| data.values().next());
        let text: Option<Arc<str>> = text.map(|text| text.as_str().into());
        written.text.clone_from(&text);
        delivery.progress = match delivery.wish {
            Wish::Merged(_) | Wish::Partial(_) if !decision.is_wished => Progress::WaitsForPolicies(self.lacking(delivery)),
            _ => progress,
        };
        self.applier().delete_outlived(binding, &delivery.bound, &decision.snapshot).await?;
        delivery.stands = Some(Arc::new(decision.snapshot)).zip(text);
        Ok(Kept::Now)
    }

    fn waits_for_user(&self, binding: &BindingName, cluster: &str) -> Progress {
        let cluster = cluster.to_owned();
        if self.has_room(binding, &cluster) { Progress::WaitsForUser { cluster } } else { Progress::NoRoom { cluster } }
    }

    /// The policies of a workload that keep its earlier snapshot in force, since they lack something.
    fn lacking(&self, delivery: &Delivery<'_>) -> Vec<String> {
        let is_of_it = |judged: &&Judged<'_>| delivery.tenant.is_some_and(|tenant| std::ptr::eq(tenant, judged.tenant));
        let judgements = self.judged.iter().find(is_of_it).map(|judged| &judged.outcome().judgements);
        let lacking = judgements.into_iter().flatten().filter(|judgement| judgement.accepted.is_ok() && !judgement.has_part());
        let lacking = lacking.map(|judgement| judgement.policy.clone());
        let unknown = delivery.tenant.map(|tenant| self.seen.unknown_to(&tenant.workload)).unwrap_or_default();
        lacking.chain(unknown).collect()
    }

    fn is_in_force(&self, binding: &BindingName, delivery: &Delivery<'_>) -> bool {
        let (Some(offer), Some(Claim::Exactly(grant))) = (self.seen.offers.get(&delivery.cluster), &delivery.claim) else {
            return false;
        };
        offer.users.is_in_force(binding, grant, offer.in_force)
    }

    /// Whether a CacheCluster had room for a binding's user, as far as that is known.
    fn has_room(&self, binding: &BindingName, cluster: &str) -> bool {
        let Some(offer) = self.seen.offers.get(cluster) else { return true };
        let is_answered = offer.claims.is_some() && offer.claims == self.context.ties.claims(&self.key(cluster));
        !is_answered || offer.users.grant_of(binding).is_some()
    }

    /// Says what each cache is to hold.
    fn fill_caches(&self, deliveries: &BTreeMap<BindingName, Delivery<'_>>, memory: &mut Memory) {
        memory.caches.retain(|cluster, _| {
            let stays = self.seen.clusters.contains(cluster);
            if !stays {
                self.context.caches.set(&self.key(cluster), None);
            }
            stays
        });
        for (cluster, offer) in &self.seen.offers {
            // Relays read their files alone, and tell nothing.
            let of_it = deliveries.iter().filter(|(_, delivery)| delivery.cluster == *cluster && !delivery.is_relay());
            let bindings: BTreeMap<BindingName, Arc<str>> =
                of_it.filter_map(|(binding, delivery)| Some((binding.clone(), delivery.stands.as_ref()?.1.clone()))).collect();
            let is_known = |(before, texts): &(Arc<Offer>, BTreeMap<BindingName, Arc<str>>)| {
                is_same_place(before, offer) && *texts == bindings
            };
            let before = memory.caches.get(cluster);
            if before.is_some_and(is_known) || (before.is_none() && bindings.is_empty()) {
                continue;
            }
            let servers = cache::Servers {
                servers: offer.servers.clone(),
                sentinels: offer.sentinels.clone(),
                master: offer.master.clone(),
                in_cluster: matches!(offer.place.topology, Topology::Cluster { .. }),
            };
            let wanted =
                (!bindings.is_empty()).then(|| cache::Wanted { servers, keys: offer.keys.clone(), bindings: bindings.clone() });
            let holds = wanted.is_some();
            self.context.caches.set(&self.key(cluster), wanted);
            if holds {
                memory.caches.insert(cluster.clone(), (offer.clone(), bindings));
            } else {
                memory.caches.remove(cluster);
            }
        }
    }

    /// What the sidecars of each binding told.
    fn figures(&self, deliveries: &BTreeMap<BindingName, Delivery<'_>>) -> BTreeMap<BindingName, Figures> {
        let told = deliveries.iter().filter_map(|(binding, delivery)| {
            Some((binding.clone(), self.context.caches.figures(&self.key(&delivery.cluster), binding)?))
        });
        told.collect()
    }
}

/// Whether a cache is where it was, as far as its own task minds.
fn is_same_place(before: &Offer, now: &Offer) -> bool {
    let of = |offer: &Offer| (offer.servers.clone(), offer.sentinels.clone(), offer.master.clone(), offer.primary);
    before.keys == now.keys && of(before) == of(now)
}

/// What is known of a binding's user at servers and sentinels.
struct AtServers<'a> {
    offer: Option<&'a Arc<Offer>>,
    binding: &'a BindingName,
}

impl Servers for AtServers<'_> {
    fn know_the_user(&self) -> bool {
        self.offer.is_none_or(|offer| offer.users.grant_of(self.binding).is_some())
    }

    fn take(&self, password: &str) -> bool {
        self.offer.is_some_and(|offer| offer.users.takes(self.binding, password, offer.proved))
    }
}
