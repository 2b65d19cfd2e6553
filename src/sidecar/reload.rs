//! The policy and the keys in force, and how others come into force: by file and through the cache, while clients stay connected.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::access_files::{AccessError, open_access};
use super::delivery::bounds::{self, BoundsError};
use super::delivery::choice::{Offer, Offers, Way};
use super::delivery::link::{CacheLink, News};
use super::delivery::{Binding, Delivered, Refused};
use super::files::{FileError, LOOK_EVERY, WatchedFiles};
use super::policy::ActivePolicy;
use super::pulse::Pulse;
use super::upstream::access::{Access, ClusterAccess};
use super::upstream::discovery::{Discovery, Refresh};
use super::upstream::node::NodeAddrError;
use super::upstream::view::View;
use crate::origin::{Carriage, OriginError, Origins, check_rule_and_file};
use crate::policy::Mode;
use crate::policy::digest::digest;
use crate::policy::snapshot::{Cluster, MAX_BYTES, Snapshot, SnapshotError};
use crate::telemetry::background::Background;

/// How soon what could not come into force is tried again: a secret that it names may be on its way.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How many refused snapshots are remembered, so that each is told of once.
const MAX_REFUSED: usize = 256;

/// Why a snapshot cannot come into force.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Its file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is refused.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// An origin, or a rule's question to it, cannot be used.
    #[error("its origins: {0}")]
    Origin(#[from] OriginError),
    /// A password or a certificate cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// It came through the cache, and says what only the file may say.
    #[error(transparent)]
    Bounds(#[from] BoundsError),
    /// It names an address that is none.
    #[error("its cluster: {0}")]
    Address(#[from] NodeAddrError),
    /// What one worker must see to is spread over several.
    #[error(
        "rule `{rule}` has stampede, which holds with one worker only, and this sidecar has {workers}: a load and its SET may come \
         over connections of different workers, that know nothing of each other. Start it with --workers 1, or remove stampede \
         from the rule"
    )]
    Workers {
        /// The first such rule.
        rule: String,
        /// How many there are.
        workers: usize,
    },
}

/// What workers act under.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The policy.
    pub policy: Arc<ActivePolicy>,
    /// The keys for new connections to servers.
    pub access: Access,
    /// Where the policy's loads go.
    pub origins: Origins,
}

/// What is followed, and by whom.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The snapshot's file.
    pub snapshot: PathBuf,
    /// Under which binding snapshots come through the cache as well. `None`: the file alone counts, and is there.
    pub binding: Option<Binding>,
    /// How many sidecars share the origins, where no binding tells.
    pub sidecars: u32,
    /// How many act under each policy.
    pub workers: usize,
}

/// Where is told what there is.
#[derive(Debug)]
pub struct Board {
    /// Something from the first snapshot on.
    pub told: watch::Sender<Option<Told>>,
    /// What came, and what was refused.
    pub delivered: watch::Sender<Delivered>,
}

/// What is told of policies and servers.
#[derive(Debug, Clone)]
pub struct Told {
    /// What workers act under.
    pub in_force: watch::Receiver<InForce>,
    /// The servers.
    pub view: watch::Receiver<Arc<View>>,
    /// Asks for a fresh look at the servers.
    pub refresh: Refresh,
}

/// Follows snapshots, and the servers that they name.
pub struct Policies {
    setting: Setting,
    file: Option<WatchedFiles>,
    link: Option<CacheLink>,
    /// What heartbeats tell, until the line to the cache has it.
    pulse: Option<Pulse>,
    offers: Offers,
    refused: HashSet<u64>,
    /// Whether something that was refused may be tried again.
    is_unsettled: bool,
    /// How many sidecars share the origins.
    sidecars: u32,
    origins: Origins,
    active: Option<Active>,
    board: Board,
    counters: Arc<Background>,
}

/// What there is from the first snapshot on, or from the first one that could not come into force, but told where the cache is.
struct Active {
    discovery: Discovery,
    in_force: watch::Sender<InForce>,
    /// What workers are told once a policy is in force. Until then nobody but the line to the cache knows of the servers.
    untold: Option<Told>,
}

impl Active {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.in_force.borrow().policy.snapshot().clone()
    }
}

/// Where the cache is, and what logs in there where that is new.
struct Place {
    cluster: Cluster,
    access: Option<ClusterAccess>,
}

impl Policies {
    /// Without a binding: reads the snapshot, which has to be there and right, and the files it names, and starts to look for its
    /// servers. With one: does nothing yet.
    pub async fn open(
        setting: Setting,
        pulse: Option<Pulse>,
        board: Board,
        counters: Arc<Background>,
    ) -> Result<Self, PolicyError> {
        let is_bound = setting.binding.is_some();
        let mut policies = Self {
            file: None,
            link: None,
            pulse,
            offers: if is_bound { Offers::both_ways() } else { Offers::by_file() },
            refused: HashSet::new(),
            is_unsettled: false,
            // Under a binding, until their number is known: as few connections as there can be.
            sidecars: if is_bound { u32::MAX } else { setting.sidecars },
            setting,
            origins: Origins::new(&[])?,
            active: None,
            board,
            counters,
        };
        if !is_bound {
            policies.open_file().await?;
        }
        Ok(policies)
    }

    async fn open_file(&mut self) -> Result<(), PolicyError> {
        let file = WatchedFiles::open(vec![self.setting.snapshot.clone()], MAX_BYTES).await?;
        let json = json_of(&file);
        self.file = Some(file);
        let offer = parse(Way::File, &json)?;
        let snapshot = offer.snapshot.clone();
        self.prepare(snapshot.clone())?;
        check_origins(&snapshot).await?;
        let access = open_access(&snapshot.cluster, self.counters.clone()).await?;
        self.offers.add(offer.clone());
        self.take_up(&offer, &mut Place { cluster: snapshot.cluster.clone(), access: Some(access) })?;
        self.note_in_force(&offer);
        Ok(())
    }

    /// Takes up whatever comes. What cannot be used is refused: the last good one stays.
    pub async fn follow(mut self) {
        loop {
            let news = tokio::select! {
                json = next_of_file(&mut self.file, &self.setting.snapshot, self.setting.binding.is_some()) => Some((Way::File, json)),
                news = next_of_link(&mut self.link) => match news {
                    News::Snapshot(json) => Some((Way::Cache, json.into())),
                    News::Sidecars(sidecars) => {
                        self.share_among(sidecars);
                        continue;
                    }
                },
                () = tokio::time::sleep(TRY_AGAIN), if self.is_unsettled => None,
            };
            if let Some((way, json)) = news {
                match parse(way, &json) {
                    Ok(offer) => self.offers.add(offer),
                    Err(error) => {
                        self.refuse(way, Snapshot::claimed_generation(&json), fingerprint(&json), &error);
                        self.heed_place(way, &json);
                    }
                }
            }
            self.settle().await;
        }
    }

    fn share_among(&mut self, sidecars: u32) {
        self.sidecars = sidecars;
        self.counters.fleet.set(u64::from(sidecars));
        self.origins.share_among(sidecars);
        tracing::debug!(sidecars, "the origins are shared");
    }

    /// Puts the best of what was offered in force.
    async fn settle(&mut self) {
        self.is_unsettled = false;
        let Some(mut place) = self.choose_place().await else { return };
        for offer in self.offers.in_order() {
            match self.take_up(&offer, &mut place) {
                Ok(is_new) => {
                    self.offers.hold(&offer);
                    if is_new {
                        self.note_in_force(&offer);
                    }
                    return;
                }
                Err(error) => {
                    self.is_unsettled = self.setting.binding.is_some();
                    self.refuse(offer.way, Some(offer.snapshot.generation), offer.fingerprint, &error);
                }
            }
        }
        self.wait_at(place);
    }

    /// What is refused of the file tells at least where the cache is, which is enough as long as nothing is in force.
    fn heed_place(&mut self, way: Way, json: &[u8]) {
        let is_waiting = self.active.as_ref().is_none_or(|active| active.untold.is_some());
        if way == Way::File
            && is_waiting
            && let Some(place) = Snapshot::claimed_place(json)
        {
            // Another than that of the whole, so that what keeps it from being used is told as well.
            self.offers.add_place(Offer { way, snapshot: Arc::new(place), fingerprint: !fingerprint(json) });
        }
    }

    /// Nothing that came can come into force. The operator hears of it, and of what this sidecar understands: the next one may.
    fn wait_at(&mut self, place: Place) {
        let (Some(file), Some(access)) = (self.offers.file().cloned(), place.access) else { return };
        if let Err(error) = self.introduce(file.snapshot.generation, &place.cluster, access) {
            self.refuse(Way::File, Some(file.snapshot.generation), file.fingerprint, &error);
        }
    }

    fn introduce(&mut self, generation: u64, cluster: &Cluster, access: ClusterAccess) -> Result<(), PolicyError> {
        let (origins, policy) = self.prepare(Arc::new(Snapshot::waiting(generation, cluster.clone())))?;
        let waiting = InForce { policy, access: access.servers.clone(), origins };
        match &self.active {
            None => self.start(waiting, cluster, access),
            Some(active) if active.untold.is_some() => {
                active.discovery.replace(cluster, access)?;
                active.in_force.send_replace(waiting);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    /// Where the file says that the cache is, or, where that cannot be used, where it was before.
    async fn choose_place(&mut self) -> Option<Place> {
        let file = self.offers.file()?.clone();
        let before = self.active.as_ref().map(|active| active.snapshot().cluster.clone());
        let cluster = &file.snapshot.cluster;
        if before.as_ref().is_some_and(|before| before.is_same_place(cluster)) {
            return Some(Place { cluster: cluster.clone(), access: None });
        }
        match open_access(cluster, self.counters.clone()).await {
            Ok(access) => Some(Place { cluster: cluster.clone(), access: Some(access) }),
            Err(error) => {
                self.is_unsettled = self.setting.binding.is_some();
                self.refuse(Way::File, Some(file.snapshot.generation), file.fingerprint, &PolicyError::from(error));
                before.map(|cluster| Place { cluster, access: None })
            }
        }
    }

    /// Puts `offer` in force, unless it is already. Whether it was not.
    fn take_up(&mut self, offer: &Offer, place: &mut Place) -> Result<bool, PolicyError> {
        if let (Way::Cache, Some(binding), Some(file)) = (offer.way, &self.setting.binding, self.offers.file()) {
            bounds::check(&offer.snapshot, &file.snapshot, &binding.secrets, |path| path.is_file())?;
        }
        let snapshot = bounds::placed(&offer.snapshot, &place.cluster);
        if self.active.as_ref().is_some_and(|active| active.untold.is_none() && *active.snapshot() == snapshot) {
            return Ok(false);
        }
        let (origins, policy) = self.prepare(Arc::new(snapshot))?;
        let access = match (&self.active, &place.access) {
            (None, None) => return Ok(false),
            (None, Some(access)) => {
                let servers = access.servers.clone();
                self.start(InForce { policy, access: servers, origins: origins.clone() }, &place.cluster, access.clone())?;
                self.origins = origins;
                self.tell();
                return Ok(true);
            }
            (Some(active), None) => active.in_force.borrow().access.clone(),
            (Some(active), Some(access)) => {
                active.discovery.replace(&place.cluster, access.clone())?;
                access.servers.clone()
            }
        };
        self.origins = origins.clone();
        if let Some(active) = &self.active {
            active.in_force.send_replace(InForce { policy, access, origins });
        }
        self.tell();
        Ok(true)
    }

    /// A policy is in force: workers may know.
    fn tell(&mut self) {
        if let Some(told) = self.active.as_mut().and_then(|active| active.untold.take()) {
            self.board.told.send_replace(Some(told));
        }
    }

    fn prepare(&self, snapshot: Arc<Snapshot>) -> Result<(Origins, Arc<ActivePolicy>), PolicyError> {
        let origins = self.origins.updated(&snapshot.origins)?;
        origins.share_among(self.sidecars);
        let policy = Arc::new(ActivePolicy::new(snapshot, &origins)?);
        check_workers(&policy, self.setting.workers)?;
        Ok((origins, policy))
    }

    /// The first policy, or place: from now on there are servers to find, and a cache to listen to.
    fn start(&mut self, first: InForce, cluster: &Cluster, access: ClusterAccess) -> Result<(), PolicyError> {
        let (discovery, view, refresh) = Discovery::start(cluster, access, self.counters.clone())?;
        let (in_force, receiver) = watch::channel(first);
        let told = Told { in_force: receiver, view, refresh };
        self.active = Some(Active { discovery, in_force, untold: Some(told.clone()) });
        if let (Some(binding), Some(pulse)) = (&self.setting.binding, self.pulse.take()) {
            self.link = Some(CacheLink::start(binding.name.clone(), told, pulse, self.counters.clone()));
        }
        Ok(())
    }

    fn note_in_force(&self, offer: &Offer) {
        let generation = offer.snapshot.generation;
        self.counters.policy_generation.set(generation);
        self.board.delivered.send_modify(|delivered| {
            let is_over = |refused: &Refused| refused.generation.is_none_or(|refused| refused <= generation);
            let refused = delivered.refused.take().filter(|refused| !is_over(refused));
            *delivered = Delivered { generation: Some(generation), way: Some(offer.way), refused };
        });
        tracing::info!(generation, way = offer.way.name(), "a new policy is in force");
    }

    /// Tells of it once, however often it comes.
    fn refuse(&mut self, way: Way, generation: Option<u64>, fingerprint: u64, error: &dyn std::fmt::Display) {
        if self.refused.len() >= MAX_REFUSED {
            self.refused.clear();
        }
        if !self.refused.insert(fingerprint) {
            return;
        }
        self.counters.policy_rejected.inc();
        self.counters.policy_refused_generation.set(generation.unwrap_or_default());
        let reason = without_values(error.to_string());
        tracing::error!(
            error = reason,
            generation,
            way = way.name(),
            "a new policy is refused, the last good one stays in force"
        );
        self.board.delivered.send_modify(|delivered| delivered.refused = Some(Refused { generation, way, reason }));
    }
}

/// The snapshot's file as it is from now on. Where it may come later, waits for it.
async fn next_of_file(file: &mut Option<WatchedFiles>, path: &std::path::Path, may_come_later: bool) -> Arc<[u8]> {
    if let Some(file) = file {
        file.changed().await;
        return json_of(file);
    }
    if !may_come_later {
        std::future::pending::<()>().await;
    }
    let mut is_told = false;
    loop {
        match WatchedFiles::open(vec![path.to_owned()], MAX_BYTES).await {
            Ok(opened) => return json_of(file.insert(opened)),
            Err(error) if !is_told => {
                is_told = true;
                tracing::warn!(%error, "waiting for the snapshot");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn next_of_link(link: &mut Option<CacheLink>) -> News {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}

/// An error of the JSON reader without the value that it repeats, which may be anything: a password, too.
fn without_values(text: String) -> String {
    let starts = ["invalid type: ", "invalid value: "];
    let found = starts.iter().find_map(|start| Some((text.find(start)? + start.len(), text.rfind(", expected ")?)));
    match found {
        Some((from, to)) if from <= to => format!("{}(not shown){}", &text[..from], &text[to..]),
        _ => text,
    }
}

fn parse(way: Way, json: &[u8]) -> Result<Offer, SnapshotError> {
    Ok(Offer { way, snapshot: Arc::new(Snapshot::parse(json)?), fingerprint: fingerprint(json) })
}

/// Tells contents apart.
fn fingerprint(bytes: &[u8]) -> u64 {
    digest(bytes).first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

/// Checks the origins that are asked, also where their URLs stand in files. Only at the start: what is wrong with a file of a later
/// policy fails the loads from that origin, and nothing else.
async fn check_origins(snapshot: &Snapshot) -> Result<(), OriginError> {
    for rule in snapshot.rules.iter().filter(|rule| rule.mode == Mode::Enforce) {
        let Some(read_through) = rule.strategy.loads() else { continue };
        if let Some(origin) = snapshot.origins.iter().find(|origin| origin.name == read_through.load.origin) {
            let store = rule.strategy.writes().map(|(_, store)| (store, Carriage::of(&rule.strategy)));
            check_rule_and_file(origin, &rule.keys, &read_through.load, store).await?;
        }
    }
    Ok(())
}

/// Outstanding misses are a worker's own: a SET over another's connection would pass for an update, however old what it brings is.
fn check_workers(policy: &ActivePolicy, workers: usize) -> Result<(), PolicyError> {
    match policy.first_with_leases().filter(|_| workers > 1) {
        Some(rule) => Err(PolicyError::Workers { rule: rule.name.clone(), workers }),
        None => Ok(()),
    }
}

fn json_of(files: &WatchedFiles) -> Arc<[u8]> {
    files.current().first().cloned().unwrap_or_else(|| Arc::from([].as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_repeat_no_value() {
        let json = r#"{"version":3,"requires":1,"generation":1,"unmatched":{"bypass":{}},
            "cluster":{"name":"main","topology":{"cluster":{"seeds":["127.0.0.1:7000"]}}},
            "origins":[{"name":"db","kind":{"sql":{"url":{"file":7}}},"maxConnections":"postgres://u:hush, expected@h/d"}]}"#;
        for (from, to) in [("7}", "7}"), ("{\"file\":7}", "{\"value\":\"x\"}")] {
            let error = Snapshot::parse(json.replace(from, to).as_bytes()).expect_err("wrong types");
            let told = without_values(error.to_string());
            assert!(told.contains("(not shown), expected ") && !told.contains("hush"), "{told}");
        }
        let unknown = Snapshot::parse(json.replace("version\":3", "version\":3,\"novel\":1").as_bytes()).expect_err("unknown");
        assert!(without_values(unknown.to_string()).contains("`novel`"));
    }
}
