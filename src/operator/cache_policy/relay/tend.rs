//! What is due about relays at a look at a namespace: they are run, it is asked how much their journals hold and how their feeds are, and
//! policies that wait for these are let go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use kube::Resource as _;
use kube::runtime::reflector::ObjectRef;
use serde_json::json;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::feeds::Feeds;
use super::kept::{Kept, Sighting};
use super::level;
use super::objects::{Relay, object_name, objects};
use super::{binding, is_abandoned, is_needed, journals_of, load_queues, workload};
use crate::api::CachePolicy;
use crate::journal::Level;
use crate::journal::feed::View;
use crate::operator::cache_cluster::report::Happening;
use crate::operator::cache_policy::apply::Applier;
use crate::operator::cache_policy::cache::Figures;
use crate::operator::cache_policy::fetch::{Bound, Seen};
use crate::operator::cache_policy::judged::Judged;
use crate::operator::cache_policy::look::{Delivery, LookError};
use crate::operator::cache_policy::report::Progress;
use crate::operator::cache_policy::ties::Offer;
use crate::operator::controller::Context;
use crate::operator::events;
use crate::operator::watches::Watches;
use crate::policy::binding::BindingName;
use crate::policy::digest::{Digest, digest};
use crate::policy::snapshot::Topology;
use crate::policy::{JournalName, Snapshot, Span};

/// How soon journals are asked again, while somebody waits for them and otherwise.
const SOON: Duration = Duration::from_secs(2);
const LATER: Duration = Duration::from_secs(10);
/// How long a watch may take to show what was written.
const SHOWN_WITHIN: Duration = Duration::from_secs(30);
/// After which time objects are written again, whatever others made of them.
const ANEW: Duration = Duration::from_secs(600);

/// What is remembered of one relay.
#[derive(Debug, Default)]
pub struct Minded {
    /// The journals.
    pub kept: Kept,
    /// The databases whose changes it reads.
    pub feeds: Feeds,
    /// The queues of loads that a relay has been seen to tend.
    pub tended: BTreeSet<JournalName>,
    /// The objects that were written last, and when.
    applied: Option<(Digest, Instant)>,
}

/// How far the journals of a policy are carried to their origins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carriage {
    /// What they hold. `None`: the cache does not say.
    pub level: Option<Level>,
    /// A journal whose oldest write is older than it may become, and how old that is.
    pub late: Option<(JournalName, Span)>,
    /// Whether the policy is being deleted, and waits for them.
    pub is_leaving: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Tended {
    /// For each policy with journals, by its name, and for each that is let go next.
    pub carriages: BTreeMap<String, Carriage>,
    /// For each policy whose relay reads databases' changes, or did.
    pub feeds: BTreeMap<String, Feeds>,
    /// How soon there is more to do.
    pub again: Option<Duration>,
    /// What failed.
    pub failed: Option<LookError>,
}

/// What there is to go by.
pub(in crate::operator::cache_policy) struct Tender<'a> {
    /// What the operator may use.
    pub context: &'a Context,
    /// What is watched.
    pub watches: &'a Watches,
    /// The namespace.
    pub namespace: &'a str,
    /// What there is.
    pub seen: &'a Seen,
    /// What came of policies.
    pub judged: &'a [Judged<'a>],
    /// What came of bindings.
    pub deliveries: &'a BTreeMap<BindingName, Delivery<'a>>,
    /// What their sidecars told.
    pub figures: &'a BTreeMap<BindingName, Figures>,
}

/// A policy with a relay.
struct Subject<'a> {
    policy: &'a CachePolicy,
    name: &'a str,
    binding: BindingName,
    delivery: Option<&'a Delivery<'a>>,
    /// Its journals, and how old a write may become there.
    journals: BTreeMap<JournalName, Span>,
    /// Those that its rules write to.
    wanted: BTreeSet<JournalName>,
    /// The queues by which it loads.
    queues: BTreeSet<JournalName>,
}

impl Subject<'_> {
    fn is_leaving(&self) -> bool {
        self.policy.metadata.deletion_timestamp.is_some()
    }

    /// The snapshot that its relay has.
    fn stands(&self) -> Option<&Snapshot> {
        Some(&*self.delivery?.stands.as_ref()?.0)
    }

    /// Whether it needs its relay for nothing but what is left.
    fn is_ending(&self) -> bool {
        self.is_leaving() || (!is_needed(self.policy) && self.queues.is_empty())
    }

    /// Whether it writes nothing behind, and has no journal to drain, but has a relay that loads, or that did.
    fn only_loads(&self) -> bool {
        self.journals.is_empty() && !is_needed(self.policy) && !load_queues(self.policy).is_empty()
    }
}

/// Who may be asked for what lies in the cache.
fn servers_of(offer: &Offer) -> Vec<SocketAddr> {
    match offer.place.topology {
        Topology::Sentinel { .. } => offer.primary.into_iter().collect(),
        Topology::Cluster { .. } => offer.servers.clone(),
    }
}

impl Tender<'_> {
    /// Does all that is due.
    pub async fn tend(&self, minded: &mut HashMap<String, Minded>) -> Tended {
        let subjects: Vec<Subject<'_>> = self.seen.with_relays().filter_map(|policy| self.subject(policy)).collect();
        minded.retain(|name, _| subjects.iter().any(|subject| subject.name == name));
        let mut tended = Tended::default();
        for subject in &subjects {
            let minded = minded.entry(subject.name.to_owned()).or_default();
            let levels = self.levels(subject).await;
            let sighting = |journal: &JournalName| Sighting {
                is_written: subject.wanted.contains(journal) || self.may_be_written(subject, journal),
                level: levels.get(journal).copied(),
            };
            let sightings = subject.journals.keys().map(|journal| (journal.clone(), sighting(journal))).collect();
            minded.kept.note(&sightings, Instant::now());
            let late = minded.kept.late(&subject.journals).map(|(journal, bound)| (journal.clone(), bound));
            let carriage = Carriage { level: minded.kept.level(), late, is_leaving: subject.is_leaving() };
            let views = self.views(subject).await;
            minded.feeds.note(subject.stands(), views, Instant::now());
            self.note_tended(subject, minded).await;
            if !subject.journals.is_empty() || (minded.feeds.are_none() && !subject.only_loads()) {
                tended.carriages.insert(subject.name.to_owned(), carriage);
            }
            if !minded.feeds.are_none() {
                tended.feeds.insert(subject.name.to_owned(), minded.feeds.clone());
            }
            let is_waited_for = !subject.queues.is_subset(&minded.tended);
            let again = if subject.is_ending() || minded.feeds.are_ending() || is_waited_for { SOON } else { LATER };
            tended.again = tended.again.into_iter().chain([again]).min();
            if let Err(error) = self.carry_out(subject, minded).await {
                warn!(namespace = self.namespace, policy = subject.name, %error, "a relay could not be looked after");
                tended.failed = Some(error);
            }
        }
        tended
    }

    fn subject<'s>(&'s self, policy: &'s CachePolicy) -> Option<Subject<'s>> {
        let name = policy.metadata.name.as_deref()?;
        let binding = binding(policy);
        let delivery = self.deliveries.get(&binding);
        let judged = self.judged.iter().find(|judged| judged.tenant.is_relay && judged.tenant.workload.name == name);
        let merged = judged.and_then(|judged| judged.outcome().merged.as_ref()?.snapshot.as_ref());
        let mut journals = delivery.and_then(|delivery| delivery.stands.as_ref()).map(|(stands, _)| journals_of(stands));
        let wished = merged.map(journals_of).unwrap_or_default();
        journals.get_or_insert_default().extend(wished.clone());
        let is_leaving = policy.metadata.deletion_timestamp.is_some();
        let wanted = if is_leaving { BTreeSet::new() } else { wished.into_keys().collect() };
        let queues = self.seen.queues.get(name).filter(|_| !is_leaving).cloned().unwrap_or_default();
        Some(Subject { policy, name, binding, delivery, journals: journals.unwrap_or_default(), wanted, queues })
    }

    /// What the journals hold, as far as the cache says it.
    async fn levels(&self, subject: &Subject<'_>) -> BTreeMap<JournalName, Level> {
        let Some(offer) = self.seen.offers.get(&subject.policy.spec.cache_cluster) else { return BTreeMap::new() };
        let asked = level::ask(&servers_of(offer), offer.keys.entry(), subject.journals.keys()).await;
        asked.unwrap_or_else(|error| {
            debug!(namespace = self.namespace, policy = subject.name, %error, "journals could not be asked");
            BTreeMap::new()
        })
    }

    /// How the feeds are, as far as the cache says it.
    async fn views(&self, subject: &Subject<'_>) -> BTreeMap<String, View> {
        let feeds = subject.stands().map(|stands| &stands.feeds[..]).unwrap_or_default();
        let slots: Vec<String> = feeds.iter().map(|feed| feed.slot.clone()).collect();
        let offer = self.seen.offers.get(&subject.policy.spec.cache_cluster).filter(|_| !slots.is_empty());
        let Some(offer) = offer else { return BTreeMap::new() };
        // In a Cluster all is in one slot, and whoever has not got it says so.
        for server in servers_of(offer) {
            match level::ask_feeds(server, offer.keys.entry(), &slots).await {
                Ok(views) => return views,
                Err(error) => debug!(namespace = self.namespace, policy = subject.name, %error, "feeds could not be asked"),
            }
        }
        BTreeMap::new()
    }

    /// Takes note of the queues that a relay tends. One that did is not asked about again: sidecars wait for it, or for the next.
    async fn note_tended(&self, subject: &Subject<'_>, minded: &mut Minded) {
        minded.tended.retain(|queue| subject.queues.contains(queue));
        let open: BTreeSet<JournalName> = subject.queues.difference(&minded.tended).cloned().collect();
        let offer = self.seen.offers.get(&subject.policy.spec.cache_cluster).filter(|_| !open.is_empty());
        let Some(offer) = offer else { return };
        match level::ask_tended(&servers_of(offer), offer.keys.entry(), &open).await {
            Ok(tended) => minded.tended.extend(tended),
            Err(error) => debug!(namespace = self.namespace, policy = subject.name, %error, "queues of loads could not be asked"),
        }
    }

    /// Whether some sidecar may write to a journal: by the snapshot that it has, or since it has not heard yet of the one that forbids it.
    fn may_be_written(&self, subject: &Subject<'_>, journal: &JournalName) -> bool {
        let cluster = &subject.policy.spec.cache_cluster;
        let Some(offer) = self.seen.offers.get(cluster) else { return true };
        let reaches = |binding: &BindingName| offer.users.reaches_journal(binding, journal.as_str());
        let mut others = self.deliveries.iter().filter(|(_, other)| other.cluster == *cluster && !other.is_relay());
        let is_written = others.any(|(binding, other)| {
            let says = other.stands.as_ref().is_some_and(|(stands, _)| journals_of(stands).contains_key(journal));
            says || (reaches(binding) && !self.has_heard(binding, other))
        });
        // Pods whose workload is gone.
        let has_pods = |bound: &Bound| bound.sidecars + bound.leaving > 0;
        let mut left = self.seen.bound.iter().filter(|(binding, _)| !self.deliveries.contains_key(binding));
        is_written || left.any(|(binding, bound)| has_pods(bound) && reaches(binding))
    }

    /// Whether all sidecars of a binding, those of pods that are ending as well, have the snapshot in force that lies there.
    fn has_heard(&self, binding: &BindingName, delivery: &Delivery<'_>) -> bool {
        let Bound { sidecars, leaving, .. } = delivery.bound;
        let generation = delivery.stands.as_ref().map(|(stands, _)| stands.generation);
        let all_have = |figures: &Figures| {
            let has_all = figures.current >= sidecars && figures.live <= figures.current;
            figures.listening && Some(figures.wanted) == generation && has_all
        };
        sidecars + leaving == 0 || self.figures.get(binding).is_some_and(all_have)
    }

    async fn carry_out(&self, subject: &Subject<'_>, minded: &mut Minded) -> Result<(), LookError> {
        if !subject.is_ending() {
            return self.run(subject, minded).await;
        }
        let is_gone = !self.seen.clusters.contains(&subject.policy.spec.cache_cluster);
        let is_abandoned = subject.is_leaving() && is_abandoned(subject.policy);
        if is_gone || is_abandoned || minded.is_done() {
            return self.release(subject, minded, (is_gone, is_abandoned)).await;
        }
        self.run(subject, minded).await
    }

    /// Has the relay run, once there is a snapshot for it.
    async fn run(&self, subject: &Subject<'_>, minded: &mut Minded) -> Result<(), LookError> {
        let Some(delivery) = subject.delivery else { return Ok(()) };
        let Some((stands, _)) = delivery.stands.as_ref().filter(|_| !matches!(delivery.progress, Progress::NotWritten(_))) else {
            return Ok(());
        };
        let (workload, binding) = (workload(subject.policy), &subject.binding);
        let relay = Relay { workload: &workload, binding, cluster: &stands.cluster };
        let wanted = objects(&relay, &self.context.installation, &self.context.relays);
        let (budget, network, deployment) = (&wanted.disruption_budget, &wanted.network_policy, &wanted.deployment);
        let fingerprint = digest(json!([budget, network, deployment]).to_string().as_bytes());
        let shown = self.watches.deployments.get(&ObjectRef::new(&object_name(binding)).within(self.namespace));
        let most = if shown.is_some_and(|shown| !shown.is_deleting()) { ANEW } else { SHOWN_WITHIN };
        if minded.applied.is_some_and(|(known, at)| known == fingerprint && at.elapsed() < most) {
            return Ok(());
        }
        let applier = Applier { context: self.context, namespace: self.namespace };
        applier.of_relay(network).await?;
        applier.of_relay(budget).await?;
        applier.of_relay(deployment).await?;
        minded.applied = Some((fingerprint, Instant::now()));
        Ok(())
    }

    /// Lets the policy go; one that needs no relay goes on without.
    async fn release(
        &self,
        subject: &Subject<'_>,
        minded: &mut Minded,
        (is_gone, is_abandoned): (bool, bool),
    ) -> Result<(), LookError> {
        let applier = Applier { context: self.context, namespace: self.namespace };
        applier.delete_relay(&object_name(&subject.binding)).await?;
        applier.hold(subject.policy, false).await?;
        minded.applied = None;
        if subject.only_loads() && minded.feeds.are_none() {
            return Ok(());
        }
        let regarding = events::regarding::<CachePolicy>(self.namespace, subject.name, subject.policy.meta().uid.clone());
        for happening in farewells(minded, !subject.journals.is_empty(), is_gone, is_abandoned) {
            let reason = happening.reason.clone();
            info!(namespace = self.namespace, policy = subject.name, reason, "a policy no longer waits for its relay");
            events::publish(&self.context.recorder, &regarding, &reason, &happening).await;
        }
        Ok(())
    }
}

impl Minded {
    /// Whether nothing is left for a relay that is needed no more.
    fn is_done(&self) -> bool {
        self.kept.are_closed() && self.feeds.are_gone()
    }
}

/// What is told of a policy that no longer waits for its relay.
fn farewells(minded: &Minded, has_journals: bool, is_gone: bool, is_abandoned: bool) -> Vec<Happening> {
    let happening = |warning, reason: &str, note: String| Happening { warning, reason: reason.to_owned(), note };
    let mut all = Vec::new();
    if has_journals || minded.feeds.are_none() {
        all.push(match (minded.kept.are_closed(), is_gone, is_abandoned) {
            (true, ..) => happening(false, "JournalDrained", "origins have all that was written behind".to_owned()),
            (_, true, _) => {
                let note = "the CacheCluster is gone, and with it what was left in the journal";
                happening(true, "JournalLost", note.to_owned())
            }
            _ => {
                let note = format!("given up as larder.dev/abandon-journal says: {}", left(minded.kept.level()));
                happening(true, "JournalAbandoned", note)
            }
        });
    }
    if !minded.feeds.are_none() {
        all.push(match minded.feeds.left() {
            None => happening(false, "SlotsRemoved", "the replication slots are taken away".to_owned()),
            Some((origin, slot)) => {
                let note = format!(
                    "the slot `{slot}` of origin `{origin}` may be left, and keeps the database's log: SELECT pg_drop_replication_slot('{slot}')"
                );
                happening(true, "SlotLeft", note)
            }
        });
    }
    all
}

/// How much is left, for people.
pub fn left(level: Option<Level>) -> String {
    match level {
        None => "how much is left is not known, since the cache does not answer".to_owned(),
        Some(level) => format!("{} writes and {} dead letters are left", level.depth, level.dead),
    }
}
