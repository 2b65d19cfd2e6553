//! The sidecar's own line to the cache: on the second thread, beside all that serves clients.
//!
//! One connection to the server that owns the binding's key. It hears of newer snapshots and reads them, asks again now and then
//! in case a message was lost, and carries the heartbeats. Messages between servers and subscribers may be lost at any time; what
//! is read from the key is what counts. After each connection the key is read behind the subscription, so that nothing that
//! happens in between is missed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, warn};

use crate::policy::binding::BindingName;
use crate::policy::heartbeat::{self, Fleet};
use crate::sidecar::pulse::Pulse;
use crate::sidecar::reload::{InForce, Told};
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::slots::slot_of;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::{ReplyError, Value, read_value};
use crate::sidecar::upstream::dial::{DialError, Link, dial, dial_primary};
use crate::sidecar::upstream::discovery::{Refresh, doubled, jittered};
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::view::{View, ViewKind};
use crate::telemetry::background::Background;

/// How often the keys are read without a message, give or take a quarter.
const READ_EVERY: Duration = Duration::from_secs(30);
/// How long a connection may take to come about, and a request to be taken.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How often a silent server is asked whether it is still there, and for how long silence is taken for life.
const PING_EVERY: Duration = Duration::from_secs(5);
const SILENCE_LIMIT: Duration = Duration::from_secs(12);
const FIRST_BACK_OFF: Duration = Duration::from_millis(200);
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// The shortest time between two reads, however many messages come.
const MIN_GAP: Duration = Duration::from_millis(20);
/// All sidecars hear of a snapshot at once: they read it over a time that grows with their number, up to a bound.
const READS_PER_SECOND: u32 = 10_000;
const MAX_SPREAD: Duration = Duration::from_secs(2);
/// Replies that are read and not yet looked at.
const REPLIES: usize = 16;
/// News that are not yet taken up.
const NEWS: usize = 16;

/// What the cache tells.
#[derive(Debug)]
pub enum News {
    /// The bytes at the binding's key; not twice the same.
    Snapshot(Vec<u8>),
    /// How many sidecars share the origins.
    Sidecars(u32),
}

/// A line to the cache. Dropping it ends it.
#[derive(Debug)]
pub struct CacheLink {
    news: mpsc::Receiver<News>,
    task: AbortHandle,
}

impl Drop for CacheLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl CacheLink {
    /// Begins to listen, and to tell what `pulse` says, at the servers that `told` tells of.
    pub fn start(binding: BindingName, told: Told, pulse: Pulse, counters: Arc<Background>) -> Self {
        let (sender, news) = mpsc::channel(NEWS);
        let Told { in_force, view, refresh } = told;
        let served = in_force.borrow().clone();
        let line = Line {
            keys: Keys::of(&binding),
            access: served.access.clone(),
            served,
            in_force,
            view,
            refresh,
            pulse,
            counters,
            news: sender,
            last: None,
            sidecars: 1,
            beat_at: Instant::now(),
            warned: false,
        };
        Self { news, task: tokio::spawn(line.run()).abort_handle() }
    }

    /// The next piece of news. Cancel-safe.
    pub async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }
}

/// The names in the cache.
#[derive(Debug)]
struct Keys {
    snapshot: String,
    fleet: String,
    heartbeats: String,
    slot: u16,
}

impl Keys {
    fn of(binding: &BindingName) -> Self {
        let snapshot = binding.snapshot_key();
        let slot = slot_of(snapshot.as_bytes());
        Self { snapshot, fleet: binding.fleet_key(), heartbeats: binding.heartbeat_channel(), slot }
    }
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Reply(#[from] ReplyError),
    #[error("the server said `{0}`")]
    Refused(String),
    #[error("the server takes no more requests")]
    Stuck,
    #[error("the servers or the login changed")]
    Moved,
}

/// What a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Subscription,
    Snapshot,
    Fleet,
    Anything,
}

struct Line {
    keys: Keys,
    access: Access,
    served: InForce,
    in_force: watch::Receiver<InForce>,
    view: watch::Receiver<Arc<View>>,
    refresh: Refresh,
    pulse: Pulse,
    counters: Arc<Background>,
    news: mpsc::Sender<News>,
    /// The snapshot that was told last.
    last: Option<Vec<u8>>,
    sidecars: u32,
    beat_at: Instant,
    /// Whether a lasting refusal has been logged.
    warned: bool,
}

/// A connection that stands, and what was asked over it.
struct Standing {
    writer: WriteHalf<Link>,
    replies: mpsc::Receiver<Result<Value, ReplyError>>,
    reading: AbortHandle,
    asked: VecDeque<Asked>,
    /// When the keys are read anew without a message, and when for the sake of one.
    read_all_at: Instant,
    read_at: Option<Instant>,
    ping_at: Instant,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// What happens next on a connection.
enum Event {
    Reply(Value),
    ReadAll,
    Read,
    Beat,
    Ping,
    Look,
    NewLogin,
}

impl Line {
    /// Listens for ever, over as many connections as it takes.
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let owner = owner_of(&self.view.borrow_and_update(), self.keys.slot);
            let Some(node) = owner else {
                self.wait_for_change(None).await;
                continue;
            };
            let since = Instant::now();
            let ended = self.converse(&node).await;
            failures = if since.elapsed() > SILENCE_LIMIT { 1 } else { failures + 1 };
            if let Err(error) = ended {
                debug!(%node, %error, "the line to the cache ended");
                if matches!(error, Ended::Moved) {
                    failures = 0;
                } else {
                    self.refresh.request();
                }
            }
            self.wait_for_change(Some(back_off(failures))).await;
        }
    }

    /// Waits until the servers may be others, or for so long.
    async fn wait_for_change(&mut self, most: Option<Duration>) {
        let pause = async {
            match most {
                Some(most) => tokio::time::sleep(most).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            changed = self.view.changed() => if changed.is_err() { std::future::pending::<()>().await },
            changed = self.in_force.changed() => {
                if changed.is_err() {
                    std::future::pending::<()>().await;
                }
                self.adopt_cluster();
            }
        }
    }

    /// Whether the servers are to be reached in another way from now on.
    fn adopt_cluster(&mut self) -> bool {
        let now = self.in_force.borrow_and_update().clone();
        let moved = !now.policy.snapshot().cluster.is_same_place(&self.served.policy.snapshot().cluster);
        if moved {
            self.access = now.access.clone();
            self.served = now;
        }
        moved
    }

    async fn converse(&mut self, node: &NodeAddr) -> Result<(), Ended> {
        let mut standing = self.connect(node).await?;
        self.schedule_beat();
        loop {
            match self.next_event(&mut standing, node).await? {
                Event::Reply(value) => self.on_reply(&mut standing, value).await?,
                Event::ReadAll => {
                    standing.read_all_at = Instant::now() + jittered(READ_EVERY);
                    self.read_all(&mut standing).await?;
                }
                Event::Read => {
                    standing.read_at = None;
                    self.read_all(&mut standing).await?;
                }
                Event::Beat => self.beat(&mut standing).await?,
                Event::Ping => {
                    standing.ping_at = Instant::now() + PING_EVERY;
                    standing.ask(Asked::Anything, &["PING"]).await?;
                }
                Event::Look => {
                    let moved =
                        self.adopt_cluster() | (owner_of(&self.view.borrow_and_update(), self.keys.slot).as_ref() != Some(node));
                    if moved {
                        return Err(Ended::Moved);
                    }
                }
                Event::NewLogin => return Err(Ended::Moved),
            }
        }
    }

    async fn connect(&mut self, node: &NodeAddr) -> Result<Standing, Ended> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let is_primary = matches!(self.view.borrow().kind, ViewKind::Primary { .. });
        let (link, _) = match is_primary {
            true => dial_primary(node, &self.access, Protocol::Resp3, deadline).await?,
            false => dial(node, &self.access, Protocol::Resp3, deadline).await?,
        };
        let (read_half, writer) = tokio::io::split(link);
        let (sender, replies) = mpsc::channel(REPLIES);
        let reading = tokio::spawn(read_on(read_half, sender)).abort_handle();
        let now = Instant::now();
        let mut standing = Standing {
            writer,
            replies,
            reading,
            asked: VecDeque::new(),
            read_all_at: now + jittered(READ_EVERY),
            read_at: None,
            ping_at: now + PING_EVERY,
        };
        standing.ask(Asked::Subscription, &["SUBSCRIBE", &self.keys.snapshot]).await?;
        self.read_all(&mut standing).await?;
        Ok(standing)
    }

    async fn read_all(&self, standing: &mut Standing) -> Result<(), Ended> {
        standing.ask(Asked::Snapshot, &["GET", &self.keys.snapshot]).await?;
        standing.ask(Asked::Fleet, &["GET", &self.keys.fleet]).await
    }

    async fn next_event(&mut self, standing: &mut Standing, node: &NodeAddr) -> Result<Event, Ended> {
        let read_at = standing.read_at;
        let reading = async {
            match read_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reply = standing.replies.recv() => match reply {
                Some(Ok(value)) => Ok(Event::Reply(value)),
                Some(Err(error)) => Err(error.into()),
                None => Err(Ended::Stuck),
            },
            () = sleep_until(standing.read_all_at) => Ok(Event::ReadAll),
            () = reading => Ok(Event::Read),
            () = sleep_until(self.beat_at) => Ok(Event::Beat),
            () = sleep_until(standing.ping_at) => Ok(Event::Ping),
            Ok(()) = self.view.changed() => Ok(Event::Look),
            Ok(()) = self.in_force.changed() => Ok(Event::Look),
            _ = self.access.changed() => {
                debug!(%node, "the login was renewed");
                Ok(Event::NewLogin)
            }
        }
    }

    async fn on_reply(&mut self, standing: &mut Standing, value: Value) -> Result<(), Ended> {
        if let Some([kind, ..]) = value.as_list() {
            // A push: nothing else that is asked here is answered by a list.
            match kind.as_str() {
                Some("message") => self.on_message(standing),
                Some("subscribe") => {
                    standing.asked.pop_front();
                }
                _ => {}
            }
            return Ok(());
        }
        match (standing.asked.pop_front(), value) {
            (Some(Asked::Snapshot), Value::Text(bytes)) => self.tell_snapshot(bytes).await,
            (Some(Asked::Fleet), Value::Text(bytes)) => self.tell_fleet(&bytes).await,
            // No operator counts them.
            (Some(Asked::Fleet), Value::Nil) => self.tell_sidecars(1).await,
            (Some(asked), Value::Error(text)) => return self.on_error(asked, text),
            _ => {}
        }
        Ok(())
    }

    fn on_message(&self, standing: &mut Standing) {
        let spread = MAX_SPREAD.min(Duration::from_secs(1) * self.sidecars / READS_PER_SECOND);
        let at = Instant::now() + MIN_GAP + spread.mul_f64(fastrand::f64());
        standing.read_at.get_or_insert(at);
    }

    /// What a login does not allow is gone without: the keys are read now and then in any case, and the file comes as well.
    fn on_error(&mut self, asked: Asked, text: String) -> Result<(), Ended> {
        if !text.starts_with("NOPERM") {
            return Err(Ended::Refused(text));
        }
        if !self.warned {
            self.warned = true;
            warn!(?asked, error = %text, "the login may not use what brings snapshots through the cache");
        }
        Ok(())
    }

    async fn tell_snapshot(&mut self, bytes: Vec<u8>) {
        if self.last.as_ref() != Some(&bytes) {
            self.last = Some(bytes.clone());
            let _ = self.news.send(News::Snapshot(bytes)).await;
        }
    }

    async fn tell_fleet(&mut self, bytes: &[u8]) {
        match Fleet::parse(bytes) {
            Ok(fleet) => self.tell_sidecars(fleet.sidecars.max(1)).await,
            Err(error) => debug!(%error, "the number of sidecars cannot be read; the last one stays in use"),
        }
    }

    async fn tell_sidecars(&mut self, sidecars: u32) {
        if self.sidecars != sidecars || self.counters.fleet.get() == 0 {
            self.sidecars = sidecars;
            let _ = self.news.send(News::Sidecars(sidecars)).await;
        }
    }

    async fn beat(&mut self, standing: &mut Standing) -> Result<(), Ended> {
        self.beat_at = Instant::now() + heartbeat::interval(self.sidecars);
        let message = self.pulse.heartbeat().to_json();
        self.counters.heartbeats.inc();
        standing.ask(Asked::Anything, &[b"PUBLISH".as_slice(), self.keys.heartbeats.as_bytes(), &message]).await
    }

    /// In a random phase, at the beginning and after each time without a connection: all sidecars lose theirs at once.
    fn schedule_beat(&mut self) {
        if self.beat_at <= Instant::now() {
            self.beat_at = Instant::now() + heartbeat::phase(self.sidecars, fastrand::f64());
        }
    }
}

impl Standing {
    async fn ask<A: AsRef<[u8]>>(&mut self, asked: Asked, command: &[A]) -> Result<(), Ended> {
        let mut wire = Vec::new();
        encode::command(&mut wire, command);
        self.asked.push_back(asked);
        let written = async {
            self.writer.write_all(&wire).await?;
            self.writer.flush().await
        };
        match timeout(ANSWER_LIMIT, written).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ReplyError::from(error).into()),
            Err(_) => Err(Ended::Stuck),
        }
    }
}

/// Reads replies until the connection fails or falls silent.
async fn read_on(link: ReadHalf<Link>, replies: mpsc::Sender<Result<Value, ReplyError>>) {
    let mut reader = BufReader::with_capacity(4096, link);
    loop {
        let silence = || ReplyError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
        let reply = timeout(SILENCE_LIMIT, read_value(&mut reader)).await.unwrap_or_else(|_| Err(silence()));
        let failed = reply.is_err();
        if replies.send(reply).await.is_err() || failed {
            return;
        }
    }
}

fn owner_of(view: &View, slot: u16) -> Option<NodeAddr> {
    match &view.kind {
        ViewKind::Unknown => None,
        ViewKind::Primary { node, .. } => Some(node.clone()),
        ViewKind::Cluster(map) => map.owner(slot).cloned(),
    }
}

fn back_off(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    jittered(doubled(FIRST_BACK_OFF, failures - 1, MAX_BACK_OFF))
}
