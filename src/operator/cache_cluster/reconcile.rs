//! One look at a CacheCluster, in five steps: fetch, validate, plan, apply, report.

mod bindings;
mod long_steps;

use self::bindings::Known;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::act::{self, ActError, Actor};
use super::apply::{self, Applied, Applier, ApplyError};
use super::build::TAKEOVER_AFTER;
use super::certify::{self, Shown};
use super::client_login::client_login;
use super::fetch::{self, CachedPassword, Heard, PasswordError, Question, Steady};
use super::handover;
use super::judge::{self, Seen};
use super::links;
use super::names::{Component, MANAGER, SENTINEL_PORT, SERVER_PORT};
use super::objects::{self, Credentials};
use super::pki::{IssueError, Pki};
use super::plan::{
    self, Action, Desired, Member, Observed, SentinelId, ServerId, ServerState, Starter, Tries, Why, plan, slots_to_move,
};
use super::report::{self, Verdict, Verdicts};
use super::resharding::Resharding;
use super::spin::{self, Spins};
use super::troubles::{self, Absences, Absent};
use super::users::{Access, SYSTEM_USER, Users};
use super::validate::{Wanted, validate};
use super::written::{Built, Writer};
use crate::api::cache_cluster::{CacheClusterStatus, CertificatesStatus, SentinelsStatus, ServersStatus, UsersStatus};
use crate::api::problem::Problems;
use crate::api::{CacheCluster, lint};
use crate::operator::admin::{Entry, Login, Trust, TrustError};
use crate::operator::cache_policy::ties::Claims;
use crate::operator::controller::Context;
use crate::operator::events::{self, Advised};
use crate::operator::queue::Key;
use crate::operator::switches::Listener;
use crate::operator::watches::{Cluster, Watches};

/// How often a CacheCluster is looked at without an occasion.
const EVERY: Duration = Duration::from_secs(10);
/// How soon it is looked at again while something is under way.
const IN_MOTION: Duration = Duration::from_millis(1500);
/// How often one that is refused is looked at: only a change of it, or of a Secret, makes a difference.
const REFUSED: Duration = Duration::from_secs(300);
/// How many random bytes make a password.
const PASSWORD_BYTES: usize = 32;
/// How long a handover may take until the sentinels act.
const HANDOVER_LIMIT: Duration = Duration::from_secs(15);

/// How long one look at a CacheCluster may take; a handover is the longest part of any.
pub const WITHIN: Duration = Duration::from_secs(90);
// Objects are written and servers are asked before it.
const _: () = assert!(handover::longest(HANDOVER_LIMIT).as_secs() + 15 <= WITHIN.as_secs());

/// How a CacheCluster was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Standing {
    /// Clients are not served, or nobody looked yet.
    #[default]
    NotReady,
    /// Clients are served.
    Ready,
    /// It cannot be carried out as it is written.
    Refused,
}

/// What is remembered of one CacheCluster between two looks. Without it a look does the same, with more effort.
#[derive(Debug, Default)]
pub struct Memory {
    /// How many looks in a row failed.
    pub failures: u32,
    /// How it was found.
    pub standing: Standing,
    applied: Applied,
    steady: Steady,
    password: Option<CachedPassword>,
    listener: Option<Listener>,
    /// The status as it was last written: the watch may still show an earlier one.
    status: Option<CacheClusterStatus>,
    handover_failed: Option<Instant>,
    /// How far slots of a Cluster have moved.
    resharding: Resharding,
    /// The servers at which no handover has left a preference behind.
    unpreferred: BTreeSet<ServerId>,
    spins: Spins,
    /// Which pods and nodes are away.
    absences: Absences,
    /// When a sentinel was last moved from a crowded node, and how that went.
    moved: Option<Instant>,
    tries: Tries,
    /// Which generation of users each sentinel was told, by the uid of its pod.
    told_users: BTreeMap<SentinelId, (String, u64)>,
    /// The same of servers that were told before their files came.
    told_servers: BTreeMap<ServerId, (String, u64)>,
    /// Users as they were last made: the watch may still show earlier ones, and no generation stands for two things.
    users: Option<Users>,
    /// What policies claimed when those were made.
    claims: Option<Arc<Claims>>,
    /// Certificates as they were last made: the watch may still show earlier ones, and none is made twice.
    pki: Option<Pki>,
    /// Who is trusted.
    trust: Option<Trust>,
    /// Whether every server and sentinel has shown those.
    certificates_shown: bool,
    /// What was told of its anti-patterns. `None`: it has not been looked at.
    advised: Option<Advised>,
}

/// Why a look broke off. The next one begins anew.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// An object could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The password could not be read.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// What is remembered of certificates cannot be read.
    #[error("Secret {0} is not as Larder wrote it: restore it, or delete it for a new authority, which clients must then trust")]
    Pki(String),
    /// A certificate could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The authorities' certificates cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A server or a sentinel did not do as it was told.
    #[error(transparent)]
    Act(#[from] ActError),
    /// The status could not be written.
    #[error("the status: {0}")]
    Status(Box<kube::Error>),
}

impl ReconcileError {
    /// The kind of error as a label of metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Apply(ApplyError::NotLeading) => "not_leading",
            Self::Apply(error) if error.is_refusal() => "refused",
            Self::Apply(_) => "apply",
            Self::Password(_) => "password",
            Self::Pki(_) | Self::Issue(_) | Self::Trust(_) => "certificates",
            Self::Act(_) => "act",
            Self::Status(_) => "status",
        }
    }
}

/// Does all that is due now. When to look again.
pub async fn reconcile(
    context: &Context,
    watches: &Watches,
    cluster: &Cluster,
    memory: &mut Memory,
) -> Result<Duration, ReconcileError> {
    let cluster = match &cluster.0 {
        Ok(cluster) => cluster,
        Err(invalid) => {
            let place = Place::of(&invalid.metadata, None);
            let field = fetch::unreadable_field(context, &place.key).await.unwrap_or_else(|| "the object".to_owned());
            let message = format!("{field} cannot be read: {}: correct it, or delete it", invalid.error);
            return refuse_unreadable(context, &place, message, memory).await;
        }
    };
    if cluster.metadata.deletion_timestamp.is_some() {
        // What belongs to it goes with it, by Kubernetes' own garbage collection.
        return Ok(REFUSED);
    }
    let place = Place::of(&cluster.metadata, cluster.status.as_ref());
    let wanted = match validate(cluster) {
        Ok(wanted) => wanted,
        Err(problems) => {
            return refuse(context, &place, "InvalidSpec", Problems(problems).to_string(), memory).await;
        }
    };
    advise(context, &place, cluster, memory).await;
    let look = Look { context, watches, wanted: &wanted, place, until: Instant::now() + WITHIN };
    match look.credentials(memory).await {
        Ok((credentials, stale_password)) => match look.bring_forward(credentials, stale_password, memory).await {
            // Nobody can be asked where nobody else knows the authorities either.
            Err(error @ ReconcileError::Pki(_)) => {
                refuse(context, &look.place, "SecretMalformed", error.to_string(), memory).await
            }
            outcome => outcome,
        },
        Err(error @ PasswordError::Missing { .. }) => {
            refuse(context, &look.place, "SecretMissing", error.to_string(), memory).await
        }
        Err(error @ PasswordError::Malformed { .. }) => {
            refuse(context, &look.place, "SecretMalformed", error.to_string(), memory).await
        }
        Err(error @ (PasswordError::Api(_) | PasswordError::NoRandomness)) => Err(error.into()),
    }
}

/// Which object, and what its status was.
#[derive(Debug, Clone)]
struct Place {
    key: Key,
    uid: String,
    generation: Option<i64>,
    status: Option<CacheClusterStatus>,
}

impl Place {
    fn of(metadata: &kube::core::ObjectMeta, status: Option<&CacheClusterStatus>) -> Self {
        let key = Key {
            namespace: metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
            name: metadata.name.clone().unwrap_or_default(),
        };
        let uid = metadata.uid.clone().unwrap_or_default();
        Self { key, uid, generation: metadata.generation, status: status.cloned() }
    }
}

/// Says that an object cannot be carried out. What runs already is left as it is.
async fn refuse(
    context: &Context,
    place: &Place,
    reason: &'static str,
    message: String,
    memory: &mut Memory,
) -> Result<Duration, ReconcileError> {
    memory.standing = Standing::Refused;
    let later = "it is left as it is until the specification can be carried out";
    let verdicts = Verdicts {
        accepted: Verdict::no(reason, message),
        ready: Verdict::no("Refused", later),
        progressing: Verdict::no("Refused", later),
        degraded: Verdict::no("Refused", later),
    };
    let before = memory.status.clone().or_else(|| place.status.clone()).unwrap_or_default();
    write_status(context, place, &verdicts, before, memory).await?;
    Ok(REFUSED)
}

/// Says that an object cannot be read. The API server takes no status for one whose fields are of another kind than its definition says:
/// then an event has to do, and no haste brings more.
async fn refuse_unreadable(
    context: &Context,
    place: &Place,
    message: String,
    memory: &mut Memory,
) -> Result<Duration, ReconcileError> {
    match refuse(context, place, "Unreadable", message.clone(), memory).await {
        Err(ReconcileError::Status(error)) if matches!(*error, kube::Error::Api(_)) => {
            debug!(key = %place.key, %error, "the status of an object that cannot be read cannot be written");
            let happening = report::Happening { warning: true, reason: "Unreadable".to_owned(), note: message };
            publish(context, place, "", &happening).await;
            Ok(REFUSED)
        }
        outcome => outcome,
    }
}

/// Completes a status by its conditions, and writes it if it differs from the one before.
async fn write_status(
    context: &Context,
    place: &Place,
    verdicts: &Verdicts,
    mut status: CacheClusterStatus,
    memory: &mut Memory,
) -> Result<(), ReconcileError> {
    let before = memory.status.as_ref().or(place.status.as_ref());
    let earlier = before.map(|before| before.conditions.as_slice()).unwrap_or_default();
    status.conditions = report::conditions(earlier, verdicts, place.generation, Timestamp::now());
    status.summary = Some(verdicts.summary().to_owned());
    status.observed_generation = place.generation;
    if before == Some(&status) {
        return Ok(());
    }
    apply::check_leads(context)?;
    let resource = ApiResource::erase::<CacheCluster>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &place.key.namespace, &resource);
    let document = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": place.key.name, "uid": place.uid},
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    let sent = api.patch_status(&place.key.name, &params, &Patch::Apply(&document)).await;
    match sent {
        Ok(_) => {}
        // Deleted in the meantime, or another of the same name.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return Ok(()),
        Err(error) => return Err(ReconcileError::Status(Box::new(error))),
    }
    context.metrics.wrote_status();
    for happening in report::happenings(before, &status) {
        publish(context, place, "", &happening).await;
    }
    memory.status = Some(status);
    Ok(())
}

/// Tells an event about a CacheCluster. `subject`: see [`events::publish`].
async fn publish(context: &Context, place: &Place, subject: &str, happening: &report::Happening) {
    let regarding = events::regarding::<CacheCluster>(&place.key.namespace, &place.key.name, Some(place.uid.clone()));
    events::publish(&context.recorder, &regarding, subject, happening).await;
}

/// Tells of the anti-patterns of a CacheCluster that were not told.
async fn advise(context: &Context, place: &Place, cluster: &CacheCluster, memory: &mut Memory) {
    let observed = place.status.as_ref().and_then(|status| status.observed_generation);
    let advised = memory.advised.get_or_insert_with(|| Advised::earlier(observed));
    for (code, happening) in advised.due(place.generation, || lint::of_cluster(&cluster.spec)) {
        publish(context, place, code, &happening).await;
    }
}

/// What came of writing everything.
struct Written {
    built: Built,
    /// What could not be written.
    refusal: Option<ApplyError>,
    /// What is wrong with what is remembered of certificates, while those that stand are left alone.
    spoiled_pki: Option<String>,
}

/// What servers and sentinels have proved.
struct Proved {
    /// The newest generation of users that every desired server has.
    users: Option<u64>,
    certificates: Shown,
}

/// One look at a CacheCluster that can be carried out.
struct Look<'a> {
    context: &'a Context,
    watches: &'a Watches,
    wanted: &'a Wanted,
    place: Place,
    /// When it is given up.
    until: Instant,
}

impl Look<'_> {
    /// The passwords in force from now on, and what is wrong with the clients' new one where an earlier one stays in force.
    async fn credentials(&self, memory: &mut Memory) -> Result<(Credentials, Option<String>), PasswordError> {
        let names = &self.wanted.names;
        let pki = None;
        let password = self.own_entry(&names.system_secret(), objects::PASSWORD).await?;
        let password = password.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|password| !password.is_empty());
        let password = password.map_or_else(random_password, Ok)?;
        let system = Login { user: SYSTEM_USER.to_owned(), password };
        let stored = self.own_entry(&names.users_secret(), objects::USERS_STATE).await?;
        let stored = stored.and_then(|json| Users::parse(&json));
        let known = memory.users.take().filter(|_| stored.is_some());
        let previous = stored.into_iter().chain(known).max_by_key(|users| users.generation);
        let wanted = match &self.wanted.auth {
            None => None,
            Some(auth) => {
                let namespace = &self.wanted.namespace;
                let text = fetch::password(self.context, self.watches, namespace, &auth.password, &mut memory.password).await;
                match (text, &previous) {
                    (Ok(password), _) => Some(Login { user: auth.user().to_owned(), password }),
                    (Err(error @ (PasswordError::Missing { .. } | PasswordError::Malformed { .. })), Some(previous)) => {
                        let client = self.client_login(previous, None).await?;
                        let users = self.bound(previous.clone(), Some(previous), memory);
                        return Ok((Credentials { system, users, client, pki }, Some(error.to_string())));
                    }
                    (Err(error), _) => return Err(error),
                }
            }
        };
        let access = wanted.as_ref().map_or(Access::Open, |login| Access::user(&*login.user, &login.password));
        let users = Users::next(previous.as_ref(), &access, &system.password, self.proved(memory), SystemTime::now());
        let users = self.bound(users, previous.as_ref(), memory);
        let client = self.client_login(&users, wanted).await?;
        Ok((Credentials { system, users, client, pki }, None))
    }

    /// The login that clients are to be told.
    async fn client_login(&self, users: &Users, wanted: Option<Login>) -> Result<Option<Login>, PasswordError> {
        let login = client_login(users, wanted, None);
        if login.is_some() || *users.published() == Access::Open {
            return Ok(login);
        }
        let told = self.own_entry(&self.wanted.names.client_secret(), objects::PASSWORD).await?;
        Ok(client_login(users, None, told))
    }

    /// The certificates in force from now on. They are made anew only where they can be written.
    async fn certify(&self, built: &Built, memory: &mut Memory) -> Result<Option<Pki>, ReconcileError> {
        let Some(tls) = &self.wanted.tls else { return Ok(None) };
        let name = self.wanted.names.pki_secret();
        let json = self.own_entry(&name, objects::PKI_STATE).await.map_err(PasswordError::from)?;
        let stored = json.map(|json| Pki::parse(&json)).transpose().map_err(|_| ReconcileError::Pki(name))?;
        // What the API server has no more is not brought back; what it has may be shown late.
        let known = memory.pki.take().filter(|_| stored.is_some());
        let before = known.into_iter().chain(stored).max_by_key(Pki::generation).unwrap_or_default();
        let pki = match &built.configured {
            Some(addresses) if !self.wanted.paused => {
                let subjects = certify::subjects(self.wanted, tls, addresses);
                before.next(&subjects, memory.certificates_shown, SystemTime::now())?
            }
            _ => before,
        };
        memory.pki = Some(pki.clone());
        Ok(Some(pki))
    }

    /// An entry of one of Larder's own Secrets.
    async fn own_entry(&self, secret: &str, entry: &str) -> Result<Option<Vec<u8>>, kube::Error> {
        let secret = fetch::own_secret(self.context, self.watches, &self.wanted.namespace, secret).await?;
        Ok(secret.and_then(|secret| secret.part.entry(entry).map(<[u8]>::to_vec)))
    }

    /// Writes what is wanted, sees what there is, does what is due and tells of it.
    async fn bring_forward(
        &self,
        credentials: Credentials,
        stale_password: Option<String>,
        memory: &mut Memory,
    ) -> Result<Duration, ReconcileError> {
        let mut applied = std::mem::take(&mut memory.applied);
        let mut applier = Applier { context: self.context, wanted: self.wanted, applied: &mut applied };
        let mut writer = Writer { watches: self.watches, applier: &mut applier };
        let outcome = self.steps(&mut writer, credentials, stale_password, memory).await;
        memory.applied = applied;
        outcome
    }

    async fn steps(
        &self,
        writer: &mut Writer<'_, '_>,
        mut credentials: Credentials,
        stale_password: Option<String>,
        memory: &mut Memory,
    ) -> Result<Duration, ReconcileError> {
        // Nothing at all is changed while a person holds everything as it is; but there is something to look at.
        let Written { built, refusal, spoiled_pki } = self.write(writer, &mut credentials, memory).await?;
        let refusal = match refusal {
            Some(error) if !error.is_refusal() => return Err(error.into()),
            refusal => refusal.map(|error| error.to_string()),
        };
        let credentials = &credentials;
        let trust = self.trust(credentials.pki.as_ref(), memory.trust.take()).await?;
        memory.trust.clone_from(&trust);
        let entry = Entry { login: Some(&credentials.system), trust: trust.as_ref() };
        let (addresses, sizes) = (&built.addresses, &built.sizes);
        let question = Question { wanted: self.wanted, addresses, entry, scale: built.scale, sizes };
        let Heard { mut observed, proved_users, reports, certificates, used, patient } =
            fetch::hear(self.context, self.watches, question).await;
        if let Some(pki) = &credentials.pki {
            certify::age_sentinels(&mut observed, pki, &certificates);
            memory.certificates_shown = certify::is_settled(self.wanted, pki, &certificates);
        }
        observed.steady = memory.steady.note(&observed);
        observed.handover_failed = memory.handover_failed.map(|at| at.elapsed());
        memory.tries.note(&observed);
        observed.moved = memory.moved.map(|at| memory.tries.moved(at.elapsed()));
        observed.unaware = built.unaware(&reports);
        let desired = self.desired(&built);
        if let Some(told) = memory.resharding.tell(slots_to_move(&desired, &observed)) {
            info!(key = %self.place.key, "{told}");
        }
        let actions = if built.is_complete() || built.scale.is_some() { plan(&desired, &observed) } else { Vec::new() };
        self.listen(&built, entry, memory);
        let generations = built.agent_generations.iter().filter(|(id, _)| id.index <= self.wanted.replicas);
        let lags = judge::lags(generations, credentials.users.generation, &reports);
        let seen = Seen {
            wanted: self.wanted,
            desired: &desired,
            observed: &observed,
            actions: &actions,
            resharding: memory.resharding.account(),
            troubles: &self.troubles(&built, &observed, &mut memory.absences),
            lags: &lags,
            refusal,
            stale_password,
            spoiled_pki,
            initialized: self.status(memory).is_some_and(|status| status.initialized),
        };
        self.report(&seen, credentials, Proved { users: proved_users, certificates }, memory).await?;
        self.point_at_primary(writer, &seen).await?;
        let mut known = Known::default();
        if !self.wanted.paused {
            let is_told = self.tell_users(writer, &built, (credentials, entry), &observed, memory).await;
            known.proved = proved_users.filter(|_| is_told);
            let is_in_force = is_told && self.tell_servers(&built, (credentials, entry), (&observed, &reports), memory).await;
            known.in_force = if is_in_force { Some(credentials.users.generation) } else { known.proved };
            if !self.wanted.is_cluster() {
                self.end_preferences(&actor(writer, &built, entry), &observed, &mut memory.unpreferred).await;
            }
            self.hasten(&built, entry, patient).await;
            if let Some(sentinel) = memory.spins.note(&used, Instant::now()).filter(|_| self.context.leadership.holds()) {
                self.calm(&built, entry, sentinel).await;
            }
        }
        self.offer(&built, (credentials, entry), known, seen.acting().map(|acting| acting.address), memory);
        self.act(writer, (&built, entry), &actions, &observed, memory).await?;
        let moves = actions.iter().any(Action::moves_slots) && memory.resharding.may_begin();
        Ok(match (moves, seen.is_in_motion()) {
            (true, _) => Duration::ZERO,
            (false, true) => IN_MOTION,
            (false, false) => EVERY.mul_f64(0.9 + fastrand::f64() * 0.2),
        })
    }

    /// Writes all objects, the certificates among them once everybody has an address. What came of it, and what could not be written.
    async fn write(
        &self,
        writer: &mut Writer<'_, '_>,
        credentials: &mut Credentials,
        memory: &mut Memory,
    ) -> Result<Written, ReconcileError> {
        let (mut built, first) = writer.write_services().await;
        let spoiled_pki = match self.certify(&built, memory).await {
            Ok(pki) => {
                credentials.pki = pki;
                None
            }
            // What servers have is left as it is, and they go on with it.
            Err(error @ ReconcileError::Pki(_)) => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        let second = writer.write_rest(&mut built, credentials).await.err();
        Ok(Written { built, refusal: first.or(second), spoiled_pki })
    }

    /// Whom to trust: the authorities in force. Where those cannot be read, the ones that were trusted before, or that clients are told.
    async fn trust(&self, pki: Option<&Pki>, known: Option<Trust>) -> Result<Option<Trust>, ReconcileError> {
        let bundle = match (pki, &self.wanted.tls) {
            (_, None) => return Ok(None),
            (Some(pki), _) => pki.bundle(),
            (None, _) if known.is_some() => return Ok(known),
            (None, _) => self.published_authorities().await?,
        };
        if bundle.is_empty() {
            return Ok(None);
        }
        let known = known.filter(|trust| trust.is_of(&bundle));
        Ok(Some(known.map_or_else(|| Trust::parse(&bundle), Ok)?))
    }

    async fn published_authorities(&self) -> Result<String, ReconcileError> {
        let Wanted { names, namespace, .. } = self.wanted;
        let maps: Api<ConfigMap> = Api::namespaced(self.context.client.clone(), namespace);
        let found = maps.get_opt(&names.authority_map()).await;
        let map = found.map_err(|source| apply::refused("ConfigMap", &names.authority_map(), source))?;
        let bundle = map.and_then(|map| map.data?.remove(objects::AUTHORITIES));
        bundle.ok_or_else(|| ReconcileError::Pki(names.pki_secret()))
    }

    /// The status as it stands.
    fn status<'m>(&'m self, memory: &'m Memory) -> Option<&'m CacheClusterStatus> {
        memory.status.as_ref().or(self.place.status.as_ref())
    }

    fn desired(&self, built: &Built) -> Desired {
        let wanted = self.wanted;
        // Where not everything could be written, what there is, is kept alive.
        let replicas = match built.scale {
            Some(scale) if !built.is_complete() => wanted.replicas.min(scale.servers.saturating_sub(1)),
            _ => wanted.replicas,
        };
        Desired {
            layout: wanted.layout,
            replicas,
            takeover_after: TAKEOVER_AFTER,
            starter: Starter::Agent,
            durable: wanted.storage.is_some(),
            accept_data_loss: wanted.accept_data_loss,
            paused: wanted.paused,
            pods: built.pods.clone(),
        }
    }

    /// Keeps an ear on the sentinels.
    fn listen(&self, built: &Built, entry: Entry<'_>, memory: &mut Memory) {
        let sentinels = built.sentinels();
        let listens = memory.listener.as_ref().is_some_and(|listener| listener.is_for(&sentinels, entry));
        if !listens && !sentinels.is_empty() {
            let (queue, metrics) = (self.context.queues.clusters.clone(), self.context.metrics.clone());
            memory.listener = Some(Listener::start(sentinels, entry, self.place.key.clone(), queue, metrics));
        }
    }

    /// What keeps pods from running.
    fn troubles(&self, built: &Built, observed: &Observed, absences: &mut Absences) -> Vec<String> {
        let (names, namespace) = (&self.wanted.names, &self.wanted.namespace);
        let lost_node = |member| observed.pods.get(&member).and_then(plan::Pod::lost_node);
        let servers = built.addresses.servers.keys();
        let servers =
            servers.map(|id| (names.shard_set(id.shard), id.index, names.server_pod(*id), lost_node(Member::Server(*id))));
        let sentinels = built.addresses.sentinels.keys();
        let sentinels =
            sentinels.map(|id| (names.sentinel_set(), id.0, names.sentinel_pod(*id), lost_node(Member::Sentinel(*id))));
        let mut round = absences.round(TAKEOVER_AFTER);
        let trouble = |(set, ordinal, name, node): (String, u16, String, Option<&str>)| {
            let Some(pod) = fetch::find(&self.watches.pods, namespace, &name) else {
                let lasts = round.lasts(Absent::Pod(name.clone()));
                let set = fetch::find(&self.watches.stateful_sets, namespace, &set).filter(|_| lasts)?;
                return troubles::missing(&name, ordinal, &set);
            };
            let claim = fetch::find(&self.watches.claims, namespace, &format!("{}-{name}", objects::DATA_VOLUME));
            let Some(node) = node else { return troubles::trouble(&pod, claim.as_deref()) };
            round.lasts(Absent::Node(node.to_owned())).then(|| troubles::lost(&pod, node, claim.as_deref()))
        };
        servers.chain(sentinels).filter_map(trouble).collect()
    }

    /// Tells what was seen.
    async fn report(
        &self,
        seen: &Seen<'_>,
        credentials: &Credentials,
        Proved { users: proved_users, certificates }: Proved,
        memory: &mut Memory,
    ) -> Result<(), ReconcileError> {
        let verdicts = seen.verdicts();
        memory.standing = if verdicts.ready.holds { Standing::Ready } else { Standing::NotReady };
        let (names, before) = (&self.wanted.names, self.status(memory).cloned().unwrap_or_default());
        let acting = seen.acting();
        let (updated_servers, updated_sentinels) = seen.updated();
        let (servers, sentinels) = (self.wanted.server_count(), self.wanted.sentinels());
        let watching = acting.map_or(0, |acting| seen.watching(acting.address));
        let selector = names.selector(Some(Component::Server), None).match_labels.unwrap_or_default();
        let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let status = CacheClusterStatus {
            initialized: before.initialized || verdicts.ready.holds,
            servers: Some(ServersStatus {
                primary: acting.map(|acting| names.server_pod(acting.server)),
                primary_address: acting.map(|acting| acting.address.to_string()),
                ready: format!("{}/{servers}", seen.serving()),
                updated: format!("{updated_servers}/{servers}"),
            }),
            sentinels: (sentinels > 0).then(|| SentinelsStatus {
                ready: format!("{watching}/{sentinels}"),
                updated: format!("{updated_sentinels}/{sentinels}"),
            }),
            users: Some(UsersStatus {
                generation: credentials.users.generation,
                proved: proved_users.unwrap_or_default(),
                phase: credentials.users.phase(proved_users).as_str().to_owned(),
            }),
            certificates: match &credentials.pki {
                Some(pki) => self.certificates_status(pki, &certificates),
                None => before.certificates.filter(|_| self.wanted.tls.is_some()),
            },
            selector: Some(selector.join(",")),
            ..before
        };
        write_status(self.context, &self.place, &verdicts, status, memory).await
    }

    fn certificates_status(&self, pki: &Pki, shown: &Shown) -> Option<CertificatesStatus> {
        let (servers, sentinels) = (pki.servers()?, pki.sentinels()?);
        let (current_servers, current_sentinels) = certify::current(self.wanted, pki, shown);
        let expires = Timestamp::try_from(servers.expires().min(sentinels.expires())).ok()?;
        Some(CertificatesStatus {
            rotation: servers.rotation().map(str::to_owned),
            fingerprint: servers.fingerprint().to_owned(),
            expires: expires.to_string(),
            servers: format!("{current_servers}/{}", self.wanted.server_count()),
            sentinels: format!("{current_sentinels}/{}", self.wanted.sentinels()),
        })
    }

    /// Has the Service of the primary point at its pod. It trails a failover; clients that cannot wait ask the sentinels.
    async fn point_at_primary(&self, writer: &mut Writer<'_, '_>, seen: &Seen<'_>) -> Result<(), ReconcileError> {
        let Some(acting) = seen.acting() else { return Ok(()) };
        let name = self.wanted.names.server_pod(acting.server);
        let Some(pod) = fetch::find(&self.watches.pods, &self.wanted.namespace, &name) else { return Ok(()) };
        if let Some(ip) = pod.part.ip {
            let slice = objects::primary_endpoints(self.wanted, &name, ip, pod.part.node.as_deref());
            writer.applier.apply(&self.watches.endpoint_slices, slice).await?;
        }
        Ok(())
    }

    /// Sees once to what a handover may have left behind at servers, by whoever led before.
    async fn end_preferences(&self, actor: &Actor<'_, '_>, observed: &Observed, done: &mut BTreeSet<ServerId>) {
        let running = observed.servers.iter().filter(|(_, server)| matches!(server.state, ServerState::Running(_)));
        for (id, _) in running {
            if done.contains(id) {
                continue;
            }
            match actor.end_preference(*id).await {
                Ok(()) => drop(done.insert(*id)),
                Err(error) => debug!(key = %self.place.key, %error, "a server is not asked for its priority, and is asked again"),
            }
        }
    }

    /// Has sentinels give up connections that nobody answers: each that has started since.
    async fn hasten(&self, built: &Built, entry: Entry<'_>, patient: BTreeSet<SentinelId>) {
        for sentinel in patient.into_iter().take_while(|_| self.context.leadership.holds()) {
            let Some(ip) = built.addresses.sentinels.get(&sentinel) else { continue };
            match links::shorten(SocketAddr::new(*ip, SENTINEL_PORT), entry).await {
                Ok(()) => self.context.metrics.acted("hasten"),
                Err(error) => debug!(key = %self.place.key, %sentinel, %error, "a sentinel is not told, and is told again"),
            }
        }
    }

    /// Ends the connections of a sentinel that spins on one of them.
    async fn calm(&self, built: &Built, entry: Entry<'_>, sentinel: SentinelId) {
        let (servers, sentinels) = (built.addresses.servers.values(), built.addresses.sentinels.iter());
        let servers = servers.map(|ip| SocketAddr::new(*ip, SERVER_PORT));
        let others = sentinels.filter(|(id, _)| **id != sentinel).map(|(_, ip)| SocketAddr::new(*ip, SENTINEL_PORT));
        let identity = objects::sentinel_id(&self.wanted.uid, sentinel);
        let ended = spin::end_connections(&identity, &servers.chain(others).collect::<Vec<_>>(), entry).await;
        self.context.metrics.acted("calm");
        info!(key = %self.place.key, %sentinel, ended, "a sentinel used a processor for nothing; its connections are made anew");
    }

    /// Does what the planner says, in order. After a disruption that failed nothing else is done.
    async fn act(
        &self,
        writer: &mut Writer<'_, '_>,
        (built, entry): (&Built, Entry<'_>),
        actions: &[Action],
        observed: &Observed,
        memory: &mut Memory,
    ) -> Result<(), ReconcileError> {
        let mut outcome = Ok(());
        for action in actions.iter().filter(|action| !matches!(action, Action::Wait(_))) {
            debug!(key = %self.place.key, ?action, "is due");
            let done = match action {
                Action::SetReplicas { of, count } => writer.scale_to(built, *of, *count).await.map_err(ActError::from),
                Action::Handover { from, to } => self.hand_over(built, entry, (*from, *to), observed, memory).await,
                Action::MoveSlots { from, to, slots, way } => {
                    self.move_slots(built, entry, ([*from, *to], slots, *way), &mut memory.resharding).await
                }
                _ => actor(writer, built, entry).take(action).await,
            };
            if matches!(action, Action::ReplacePod { why: Why::Crowded, .. }) && done.is_ok() {
                memory.moved = Some(Instant::now());
                memory.tries.begin();
            }
            self.context.metrics.acted(act::word(action));
            if let Err(error) = done {
                warn!(key = %self.place.key, ?action, %error, "a step failed; it is taken again where it is still called for");
                outcome = outcome.and(Err(error.into()));
                if !act::goes_on(action) {
                    break;
                }
            }
        }
        outcome
    }
}

fn actor<'a, 'b>(writer: &'a Writer<'_, 'b>, built: &'a Built, entry: Entry<'a>) -> Actor<'a, 'b> {
    Actor { applier: writer.applier, addresses: &built.addresses, entry }
}

/// A password from the system's own generator, by way of the TLS provider: fastrand is no source of secrets.
pub fn random_password() -> Result<String, PasswordError> {
    let mut bytes = [0_u8; PASSWORD_BYTES];
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(&mut bytes).map_err(|_| PasswordError::NoRandomness)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
impl Memory {
    /// As if whoever is away had been for so much longer.
    pub fn age_absences(&mut self, by: Duration) {
        self.absences.age(by);
    }
}
