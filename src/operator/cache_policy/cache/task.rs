//! The task of one CacheCluster: it finds the primary, keeps there what is wanted, and hears what sidecars say.
//!
//! It has three connections at the most: to the primary one for commands and one that hears, and one to a sentinel; in a Cluster one that hears,
//! and one to each primary that keeps something. Where there is no binding it has none. Whatever fails, it begins anew with the search for the
//! primary, after a pause that grows.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::board::Board;
use super::hearing::{self, Asks, Hears, PING_EVERY};
use super::keepers::Keepers;
use super::primary::{self, PrimaryError};
use super::store::{self, Found, Tag, Verdict, Written};
use super::{Common, Wanted};
use crate::operator::admin::{Admin, AdminError};
use crate::operator::queue::Key;
use crate::policy::binding::BindingName;

/// The pauses between attempts to reach a primary.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How many failures in a row are nothing special: a failover has so many.
const QUIET_FAILURES: u32 = 5;
/// How long it may take to leave.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// How long sidecars that come are gathered before all are told how many they are.
const GATHER: Duration = Duration::from_millis(300);
/// The shortest time between two looks for the primary, however often they are asked for.
const LOOK_GAP: Duration = Duration::from_secs(1);
/// How much a script looks at: a server does nothing else meanwhile.
const LOOK_BINDINGS: usize = 50;
const LOOK_BYTES: usize = 256 * 1024;
/// How often a number of sidecars is written that has not changed, so that it does not expire.
const FLEET_EVERY: Duration = Duration::from_secs(3600);
/// How often a snapshot is tried to be written that somebody else writes as well.
const ATTEMPTS: usize = 4;

/// What is known of a binding's keys.
struct Stored {
    snapshot: Arc<str>,
    generation: u64,
    /// What is there, and of which generation that is, as far as is known.
    there: Tag,
    newest: Option<u64>,
    fleet_at: Option<Instant>,
}

/// What is read of a snapshot.
#[derive(Deserialize)]
struct Outline {
    generation: u64,
    #[serde(default)]
    rules: Vec<RuleOutline>,
}

#[derive(Deserialize)]
struct RuleOutline {
    name: String,
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Primary(#[from] PrimaryError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("heartbeats are heard no more: {0}")]
    Deaf(#[from] io::Error),
    #[error("the primary, or the way in, is another")]
    Moved,
    #[error("another leads")]
    Led,
}

/// How a CacheCluster's part in [`super::Caches`] is kept.
pub struct Task {
    cluster: Key,
    common: Arc<Common>,
    wanted: watch::Receiver<Option<Arc<Wanted>>>,
    board: Arc<Mutex<Board>>,
    stored: BTreeMap<BindingName, Stored>,
    /// What was wanted last: where there was something that is to be taken away.
    last: Option<Arc<Wanted>>,
    came: Arc<Notify>,
}

/// Connections that stand.
struct Line {
    keepers: Keepers,
    sentinel: Option<Admin>,
    asks: Asks,
    hearing: JoinHandle<io::Error>,
    looked_at: Instant,
    check_at: Instant,
    tick_at: Instant,
    ping_at: Instant,
    fleets_at: Option<Instant>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.hearing.abort();
    }
}

/// What happens next.
enum Event {
    Wanted,
    Check,
    Tick,
    Ping,
    Came,
    Fleets,
    Deaf(io::Error),
    Led,
}

/// How what is wanted has changed.
#[derive(Debug, Default)]
struct Changes {
    gone: Vec<BindingName>,
    new: Vec<BindingName>,
    changed: Vec<BindingName>,
}

impl Task {
    /// A task that follows what is wanted.
    pub fn new(
        cluster: Key,
        common: Arc<Common>,
        wanted: watch::Receiver<Option<Arc<Wanted>>>,
        board: Arc<Mutex<Board>>,
    ) -> Self {
        Self { cluster, common, wanted, board, stored: BTreeMap::new(), last: None, came: Arc::default() }
    }

    /// Runs until nothing is wanted any more, and `ends` agrees.
    pub async fn run(mut self, ends: impl Fn(&Key) -> bool) {
        let mut failures = 0;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let Some(wanted) = wanted else {
                self.leave().await;
                if ends(&self.cluster) {
                    return;
                }
                continue;
            };
            let since = Instant::now();
            let ended = self.serve(&wanted).await;
            self.lock().deaf(Instant::now());
            self.tell_changes();
            if since.elapsed() > LONGEST_PAUSE {
                failures = 0;
            }
            match ended {
                // What is wanted has changed.
                Ok(()) => failures = 0,
                Err(Ended::Led) => self.rest(FIRST_PAUSE).await,
                Err(error) => {
                    failures += 1;
                    self.complain(&error, failures);
                    self.rest(pause(failures)).await;
                }
            }
        }
    }

    /// Waits for so long, or until something else is wanted.
    async fn rest(&mut self, most: Duration) {
        tokio::select! {
            () = sleep(most) => {}
            _ = self.wanted.changed() => {}
        }
    }

    fn complain(&self, error: &Ended, failures: u32) {
        match failures {
            QUIET_FAILURES => warn!(cluster = %self.cluster, %error, "snapshots and heartbeats do not pass through the cache"),
            _ => debug!(cluster = %self.cluster, %error, failures, "the line to the cache ended"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the cache as it is wanted, over connections that stand. Returns when something else is wanted that needs others.
    async fn serve(&mut self, wanted: &Arc<Wanted>) -> Result<(), Ended> {
        self.adopt(wanted);
        let mut leadership = self.common.leadership.clone();
        tokio::select! {
            () = leadership.gained() => {}
            _ = self.wanted.changed() => return Ok(()),
        }
        let mut keepers = Keepers::find(&wanted.servers, wanted.keys.entry()).await?;
        let address = keepers.address();
        self.clean(&mut keepers).await?;
        if wanted.bindings.is_empty() {
            drop(keepers);
            tokio::select! {
                () = leadership.lost() => return Err(Ended::Led),
                _ = self.wanted.changed() => return Ok(()),
            }
        }
        let mut line = self.open(keepers, wanted).await?;
        self.check_all(&mut line).await?;
        debug!(cluster = %self.cluster, %address, bindings = wanted.bindings.len(), "snapshots and heartbeats pass through the cache");
        loop {
            let event = tokio::select! {
                _ = self.wanted.changed() => Event::Wanted,
                error = &mut line.hearing => Event::Deaf(error.unwrap_or_else(|_| io::ErrorKind::Interrupted.into())),
                () = leadership.lost() => Event::Led,
                () = self.came.notified(), if line.fleets_at.is_none() => Event::Came,
                () = sleep_until(line.fleets_at.unwrap_or(line.tick_at)), if line.fleets_at.is_some() => Event::Fleets,
                () = sleep_until(line.check_at) => Event::Check,
                () = sleep_until(line.tick_at) => Event::Tick,
                () = sleep_until(line.ping_at) => Event::Ping,
            };
            if let Event::Wanted = event {
                let now = self.wanted.borrow_and_update().clone();
                let Some(now) = now.filter(|now| !now.bindings.is_empty() && line.is_for(wanted, now)) else { return Ok(()) };
                self.change(&mut line, &now).await?;
                continue;
            }
            self.act(event, &mut line).await?;
        }
    }

    async fn act(&mut self, event: Event, line: &mut Line) -> Result<(), Ended> {
        match event {
            Event::Check => {
                line.check_at = Instant::now() + jittered(self.common.pace.check);
                self.check_primary(line).await?;
                self.check_all(line).await
            }
            Event::Tick => {
                line.tick_at = Instant::now() + self.common.pace.tick;
                self.tell_changes();
                self.tell_fleets(line).await
            }
            Event::Ping => {
                line.ping_at = Instant::now() + PING_EVERY;
                Ok(line.asks.ping().await?)
            }
            Event::Came => {
                line.fleets_at = Some(Instant::now() + GATHER);
                Ok(())
            }
            Event::Fleets => {
                line.fleets_at = None;
                self.tell_fleets(line).await
            }
            Event::Deaf(error) => Err(error.into()),
            Event::Led => Err(Ended::Led),
            Event::Wanted => Ok(()),
        }
    }

    fn tell_changes(&self) {
        let changed = self.lock().tick(Instant::now());
        changed.iter().for_each(|binding| (self.common.on_change)(&self.cluster, binding));
    }

    async fn open(&self, keepers: Keepers, wanted: &Wanted) -> Result<Line, Ended> {
        let (asks, hears) = hearing::open(keepers.address(), wanted.keys.entry(), &channels(wanted.bindings.keys())).await?;
        let now = Instant::now();
        self.lock().listen(now, wanted.bindings.keys());
        Ok(Line {
            keepers,
            sentinel: None,
            asks,
            hearing: self.hear(hears),
            looked_at: now,
            check_at: now + jittered(self.common.pace.check),
            tick_at: now + self.common.pace.tick,
            ping_at: now + PING_EVERY,
            fleets_at: None,
        })
    }

    /// Heartbeats are taken beside all else, so that they wait for no answer.
    fn hear(&self, hears: Hears) -> JoinHandle<io::Error> {
        use super::heard::Taken;
        let (board, came, metrics) = (self.board.clone(), self.came.clone(), self.common.metrics.clone());
        tokio::spawn(hears.run(move |channel, message| {
            let taken = board.lock().unwrap_or_else(PoisonError::into_inner).beat(Instant::now(), channel, message);
            if matches!(taken, Some(Taken::New | Taken::Crowded)) {
                came.notify_one();
            }
            metrics.heard(taken.map_or("stranger", Taken::as_str));
        }))
    }

    /// Takes up what is wanted, here alone.
    fn adopt(&mut self, wanted: &Arc<Wanted>) -> Changes {
        let mut changes = Changes::default();
        let gone = self.stored.keys().filter(|binding| !wanted.bindings.contains_key(*binding)).cloned();
        changes.gone = gone.collect();
        for binding in &changes.gone {
            self.stored.remove(binding);
            self.lock().remove(binding);
        }
        for (binding, snapshot) in &wanted.bindings {
            let known = self.stored.get(binding);
            if known.is_some_and(|known| known.snapshot == *snapshot) {
                continue;
            }
            let outline: Outline = match serde_json::from_str(snapshot) {
                Ok(outline) => outline,
                Err(error) => {
                    warn!(cluster = %self.cluster, %binding, %error, "a snapshot cannot be read, and is not written");
                    continue;
                }
            };
            let rules = outline.rules.iter().map(|rule| rule.name.as_str());
            self.lock().expect(Instant::now(), binding, outline.generation, rules);
            let (snapshot, generation) = (snapshot.clone(), outline.generation);
            match self.stored.get_mut(binding) {
                Some(stored) => {
                    (stored.snapshot, stored.generation) = (snapshot, generation);
                    changes.changed.push(binding.clone());
                }
                None => {
                    let stored = Stored { snapshot, generation, there: Tag::nothing(), newest: None, fleet_at: None };
                    self.stored.insert(binding.clone(), stored);
                    changes.new.push(binding.clone());
                }
            }
        }
        self.last = Some(wanted.clone());
        changes
    }

    /// Takes up what is wanted, in the cache as well.
    async fn change(&mut self, line: &mut Line, wanted: &Arc<Wanted>) -> Result<(), Ended> {
        let Changes { gone, new, changed } = self.adopt(wanted);
        for binding in new.iter().chain(&changed) {
            self.put(&mut line.keepers, binding).await?;
        }
        line.asks.unsubscribe(&channels(gone.iter())).await?;
        line.asks.subscribe(&channels(new.iter())).await?;
        self.lock().listen(Instant::now(), new.iter());
        for binding in &gone {
            self.remove(&mut line.keepers, binding).await?;
        }
        if line.looked_at.elapsed() >= LOOK_GAP { self.check_primary(line).await } else { Ok(()) }
    }

    /// Takes away what earlier leaders, or this one, left there of bindings that are gone.
    async fn clean(&self, keepers: &mut Keepers) -> Result<(), Ended> {
        let is_wanted = |binding: &BindingName| self.last.as_ref().is_some_and(|wanted| wanted.bindings.contains_key(binding));
        let names = store::names(keepers.of(store::INDEX).await?).await?;
        for binding in names.iter().filter(|binding| !is_wanted(binding)) {
            self.remove(keepers, binding).await?;
        }
        Ok(())
    }

    async fn remove(&self, keepers: &mut Keepers, binding: &BindingName) -> Result<(), Ended> {
        self.may_write()?;
        self.common.metrics.acted("RemoveSnapshot");
        suffered(store::remove(keepers.of(&binding.snapshot_key()).await?, binding).await)?;
        suffered(store::forget(keepers.of(store::INDEX).await?, binding).await)
    }

    /// Asks before each write: it is a step that another leader's could collide with.
    fn may_write(&self) -> Result<(), Ended> {
        if self.common.leadership.holds() { Ok(()) } else { Err(Ended::Led) }
    }

    /// Whether the server at the other end is still the primary.
    async fn check_primary(&mut self, line: &mut Line) -> Result<(), Ended> {
        line.looked_at = Instant::now();
        if line.keepers.in_cluster() {
            return Ok(line.keepers.learn_owners().await?);
        }
        let Some(wanted) = self.last.clone() else { return Ok(()) };
        let address = line.keepers.address();
        if !primary::is_primary(line.keepers.first()).await? {
            return Err(Ended::Moved);
        }
        let named = line.ask_sentinel(&wanted).await;
        // One sentinel may have an old story to tell; most of them have not.
        if named.is_some_and(|named| named != address)
            && let Some(named) = primary::by_majority(&wanted.servers, wanted.keys.entry()).await
            && named != address
        {
            return Err(Ended::Moved);
        }
        Ok(())
    }

    /// Looks whether all that is wanted is there, and puts there what is not.
    async fn check_all(&mut self, line: &mut Line) -> Result<(), Ended> {
        let bindings: Vec<(BindingName, usize)> =
            self.stored.iter().map(|(binding, stored)| (binding.clone(), stored.snapshot.len())).collect();
        let most = if line.keepers.in_cluster() { 1 } else { LOOK_BINDINGS };
        let mut rest = &bindings[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take(most).take_while(|(_, length)| {
                bytes += length;
                bytes <= LOOK_BYTES
            });
            let (some, others) = rest.split_at(fits.count().max(1));
            rest = others;
            let names: Vec<&BindingName> = some.iter().map(|(binding, _)| binding).collect();
            let Some(key) = names.first().map(|first| first.snapshot_key()) else { return Ok(()) };
            let found = store::look(line.keepers.of(&key).await?, &names).await?;
            for (binding, found) in names.into_iter().zip(found) {
                self.compare(&mut line.keepers, binding, found).await?;
            }
        }
        Ok(())
    }

    async fn compare(&mut self, keepers: &mut Keepers, binding: &BindingName, found: Found) -> Result<(), Ended> {
        if let Some(stored) = self.stored.get_mut(binding)
            && (stored.there != found.snapshot || stored.newest.is_none_or(|newest| newest < stored.generation))
        {
            if stored.there != found.snapshot {
                (stored.there, stored.newest) = (found.snapshot, None);
            }
            self.put(keepers, binding).await?;
        }
        let now = Instant::now();
        let lost = self.lock().fleet_found(now, binding, found.fleet);
        let fleet_at = self.stored.get(binding).and_then(|stored| stored.fleet_at);
        let told = self.lock().fleet(binding);
        let is_old = fleet_at.is_none_or(|at| now.duration_since(at) > FLEET_EVERY);
        match lost.or(told.filter(|_| is_old)) {
            Some(sidecars) => self.tell_fleet(keepers, binding, sidecars, false).await,
            None => Ok(()),
        }
    }

    /// Writes a binding's snapshot, unless what is there is newer.
    async fn put(&mut self, keepers: &mut Keepers, binding: &BindingName) -> Result<(), Ended> {
        let key = binding.snapshot_key();
        for _ in 0..ATTEMPTS {
            self.may_write()?;
            let Some(stored) = self.stored.get_mut(binding) else { return Ok(()) };
            let (snapshot, generation) = (stored.snapshot.clone(), stored.generation);
            if !stored.there.is_no_snapshot() && stored.newest.is_none() {
                // Somebody else wrote it.
                let found = store::read(keepers.of(&key).await?, binding).await?;
                match store::judge(&found, &snapshot, generation) {
                    Verdict::Same => {
                        stored.newest = Some(generation);
                        self.lock().newer(binding, None);
                        return Ok(());
                    }
                    Verdict::Keep(newer) => stored.newest = Some(newer),
                    Verdict::Replace => {}
                }
            }
            if let Some(newer) = stored.newest.filter(|newest| *newest > generation) {
                info!(cluster = %self.cluster, %binding, generation, newer, "the cache holds a newer snapshot, which stays");
                self.lock().newer(binding, Some(newer));
                return Ok(());
            }
            if let Err(error) = store::remember(keepers.of(store::INDEX).await?, binding).await {
                return suffered(Err(error));
            }
            match store::write(keepers.of(&key).await?, binding, &stored.there, &snapshot, generation).await {
                Ok(Written::Done(tag)) => {
                    (stored.there, stored.newest) = (tag, Some(generation));
                    self.common.metrics.acted("WriteSnapshot");
                    self.lock().newer(binding, None);
                    return Ok(());
                }
                Ok(Written::Other(tag)) => (stored.there, stored.newest) = (tag, None),
                Err(error) => return suffered(Err(error)),
            }
        }
        debug!(cluster = %self.cluster, %binding, "somebody else writes the snapshot as well; it is looked at again");
        Ok(())
    }

    /// Tells sidecars of numbers that have changed.
    async fn tell_fleets(&mut self, line: &mut Line) -> Result<(), Ended> {
        let due = self.lock().fleets_due(Instant::now());
        for due in due {
            self.tell_fleet(&mut line.keepers, &due.binding, due.sidecars, due.rises).await?;
        }
        Ok(())
    }

    async fn tell_fleet(
        &mut self,
        keepers: &mut Keepers,
        binding: &BindingName,
        sidecars: u32,
        wakes: bool,
    ) -> Result<(), Ended> {
        self.may_write()?;
        let Some(stored) = self.stored.get_mut(binding) else { return Ok(()) };
        let server = keepers.of(&binding.fleet_key()).await?;
        match store::write_fleet(server, binding, sidecars, wakes.then_some(stored.generation)).await {
            Ok(()) => {
                stored.fleet_at = Some(Instant::now());
                self.common.metrics.acted("WriteFleet");
                self.lock().fleet_told(Instant::now(), binding, sidecars);
                Ok(())
            }
            Err(error) => suffered(Err(error)),
        }
    }

    /// Takes everything away that is Larder's, where that can be done.
    async fn leave(&mut self) {
        let Some(last) = self.last.take() else { return };
        let bindings: Vec<BindingName> = std::mem::take(&mut self.stored).into_keys().collect();
        bindings.iter().for_each(|binding| self.lock().remove(binding));
        let leave = async {
            let mut keepers = Keepers::find(&last.servers, last.keys.entry()).await?;
            self.clean(&mut keepers).await
        };
        match timeout(LEAVE_WITHIN, leave).await {
            Ok(Ok(())) => debug!(cluster = %self.cluster, "nothing of bindings is left in the cache"),
            Ok(Err(error)) => debug!(cluster = %self.cluster, %error, "what bindings had in the cache stays there"),
            Err(_) => debug!(cluster = %self.cluster, "what bindings had in the cache stays there: it does not answer in time"),
        }
    }
}

impl Line {
    /// Whether what is wanted now is reached as what was wanted when these connections were made.
    fn is_for(&self, then: &Wanted, now: &Wanted) -> bool {
        let same_way = then.keys.entry() == now.keys.entry();
        same_way && (then.servers == now.servers || now.servers.servers.contains(&self.keepers.address()))
    }

    /// The primary that a sentinel names, over a connection that stands where there is one.
    async fn ask_sentinel(&mut self, wanted: &Wanted) -> Option<SocketAddr> {
        let mut sentinel = match self.sentinel.take() {
            Some(sentinel) => sentinel,
            None => {
                let address = *fastrand::choice(&wanted.servers.sentinels)?;
                Admin::connect(address, wanted.keys.entry()).await.ok()?
            }
        };
        let named = primary::named(&mut sentinel, &wanted.servers.master).await.ok()?;
        self.sentinel = Some(sentinel);
        named
    }
}

fn channels<'a>(bindings: impl Iterator<Item = &'a BindingName>) -> Vec<String> {
    bindings.map(BindingName::heartbeat_channel).collect()
}

/// A write that the primary cannot take now is tried again with the next look; what says that it is none, ends the connection.
fn suffered(outcome: Result<(), AdminError>) -> Result<(), Ended> {
    match outcome {
        Err(error) if matches!(error.code(), Some("OOM" | "NOREPLICAS" | "MISCONF")) => {
            warn!(%error, "the cache takes no writes");
            Ok(())
        }
        Err(error) if matches!(error.code(), Some("READONLY" | "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN")) => {
            Err(Ended::Moved)
        }
        outcome => Ok(outcome?),
    }
}

/// How long to wait after so many failures in a row.
fn pause(failures: u32) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10));
    jittered(whole.min(LONGEST_PAUSE))
}

/// Give or take a quarter.
fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + fastrand::f64() / 2.0)
}
