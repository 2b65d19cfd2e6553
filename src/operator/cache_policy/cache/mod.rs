//! Larder's own keys in the caches, and what sidecars say there.
//!
//! One task for each CacheCluster that has bindings. It keeps the newest snapshot of each binding at the primary, whichever server that
//! is, or in a Cluster at the owner of the key's slot, tells sidecars of it, hears their heartbeats, and tells them how many they are. The API server has no part in it.

mod board;
mod figures;
mod fleet;
mod heard;
mod hearing;
mod keepers;
mod primary;
mod room;
mod rules;
mod store;
mod task;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::board::Board;
use self::room::Room;
use self::task::Task;
use crate::operator::admin::Keys;
use crate::operator::election::Leadership;
use crate::operator::metrics::Metrics;
use crate::operator::queue::Key;
use crate::policy::binding::BindingName;

pub use figures::{Figures, MAX_GENERATIONS, MAX_NOTICES, Notice, Refusal};

/// What a CacheCluster's cache is to hold, and how it is reached. `Debug` does not show snapshots, which may hold URLs with passwords.
#[derive(Clone)]
pub struct Wanted {
    /// Where its servers and sentinels are.
    pub servers: Servers,
    /// How they let Larder in.
    pub keys: Keys,
    /// The snapshot of each binding, JSON.
    pub bindings: BTreeMap<BindingName, Arc<str>>,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { servers, keys, bindings } = self;
        let mut shown = f.debug_struct("Wanted");
        shown.field("servers", servers).field("keys", keys).field("bindings", &bindings.keys()).finish_non_exhaustive()
    }
}

/// Where the servers of a CacheCluster are, and who watches them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Servers {
    /// All servers, whichever is the primary.
    pub servers: Vec<SocketAddr>,
    /// All sentinels. None: the servers' own word counts.
    pub sentinels: Vec<SocketAddr>,
    /// The name under which sentinels know the primary.
    pub master: String,
    /// Whether they are a Cluster, of which each primary owns some of the keys.
    pub in_cluster: bool,
}

/// How often what is done.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often it is looked at whether all is still there, give or take a quarter.
    pub check: Duration,
    /// How often it is looked at who is gone, and what has changed.
    pub tick: Duration,
    /// For how long there have to be fewer sidecars before they are told of fewer.
    pub hold: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { check: Duration::from_secs(10), tick: Duration::from_secs(2), hold: fleet::HOLD }
    }
}

/// Hears that the figures of a binding are worth to be told anew.
type OnChange = Box<dyn Fn(&Key, &BindingName) + Send + Sync>;

/// All caches of this operator. A handle; the tasks end with the last one.
#[derive(Clone)]
pub struct Caches {
    inner: Arc<Inner>,
}

struct Inner {
    common: Arc<Common>,
    lines: Mutex<HashMap<Key, Line>>,
}

/// What all tasks share.
struct Common {
    leadership: Leadership,
    metrics: Arc<Metrics>,
    on_change: OnChange,
    room: Arc<Room>,
    pace: Pace,
}

/// The task of one CacheCluster.
struct Line {
    wanted: watch::Sender<Option<Arc<Wanted>>>,
    board: Arc<Mutex<Board>>,
    task: AbortHandle,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caches").finish_non_exhaustive()
    }
}

impl Caches {
    /// None yet. `on_change` is called when the figures of a binding changed enough to be told, for each every few seconds at the most; it
    /// has to return at once.
    pub fn new(
        leadership: Leadership,
        metrics: Arc<Metrics>,
        on_change: impl Fn(&Key, &BindingName) + Send + Sync + 'static,
    ) -> Self {
        Self::with_pace(leadership, metrics, Pace::default(), on_change)
    }

    /// [`Caches::new`], at another pace.
    pub fn with_pace(
        leadership: Leadership,
        metrics: Arc<Metrics>,
        pace: Pace,
        on_change: impl Fn(&Key, &BindingName) + Send + Sync + 'static,
    ) -> Self {
        let common = Common { leadership, metrics, on_change: Box::new(on_change), room: Arc::default(), pace };
        Self { inner: Arc::new(Inner { common: Arc::new(common), lines: Mutex::default() }) }
    }

    /// What a CacheCluster's cache is to hold from now on; whatever was said before is forgotten. `None`: nothing, and what Larder put
    /// there is taken away where it can be reached. Returns at once; to be called within a runtime. Without leadership nothing is written.
    ///
    /// Whoever says the same again has the primary looked for: to be done when sentinels told of another.
    pub fn set(&self, cluster: &Key, wanted: Option<Wanted>) {
        let mut lines = self.inner.lock();
        let wanted = wanted.map(Arc::new);
        match lines.get(cluster) {
            Some(line) => drop(line.wanted.send_replace(wanted)),
            None if wanted.is_none() => {}
            None => drop(lines.insert(cluster.clone(), self.start(cluster, wanted))),
        }
    }

    fn start(&self, cluster: &Key, wanted: Option<Arc<Wanted>>) -> Line {
        let common = &self.inner.common;
        let board = Arc::new(Mutex::new(Board::new(common.room.clone(), common.pace)));
        let (wanted, follow) = watch::channel(wanted);
        let inner = Arc::downgrade(&self.inner);
        let task = Task::new(cluster.clone(), common.clone(), follow, board.clone());
        let task = tokio::spawn(task.run(move |cluster| ends(&inner, cluster))).abort_handle();
        Line { wanted, board, task }
    }

    /// Lets go of every cache and leaves all as it is: another leads now.
    pub fn leave(&self) {
        self.inner.lock().clear();
    }

    /// What the sidecars of a binding have told. `None`: the binding is not known here.
    pub fn figures(&self, cluster: &Key, binding: &BindingName) -> Option<Figures> {
        let board = self.inner.lock().get(cluster)?.board.clone();
        board.lock().unwrap_or_else(PoisonError::into_inner).figures(Instant::now(), binding)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the task of a CacheCluster ends: nothing was wanted anew since it looked. From then on another may be started.
fn ends(inner: &Weak<Inner>, cluster: &Key) -> bool {
    let Some(inner) = inner.upgrade() else { return true };
    let mut lines = inner.lock();
    let ends = lines.get(cluster).is_none_or(|line| line.wanted.borrow().is_none());
    if ends {
        lines.remove(cluster);
    }
    ends
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;
    use crate::operator::admin::Entry;

    const SOON: Duration = Duration::from_millis(300);

    fn key() -> Key {
        Key { namespace: "store".to_owned(), name: "main".to_owned() }
    }

    #[tokio::test]
    async fn who_does_not_lead_goes_to_no_cache() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (lead, until) = watch::channel(None);
        let caches = Caches::new(Leadership::given(until), Arc::default(), |_, _| ());
        let (binding, snapshot) = (BindingName::parse("shop").unwrap(), Arc::from(r#"{"generation": 3, "rules": []}"#));
        let servers = Servers { servers: vec![server.local_addr().unwrap()], ..Servers::default() };
        let bindings = BTreeMap::from([(binding.clone(), snapshot)]);
        caches.set(&key(), Some(Wanted { servers, keys: Keys::from(Entry::default()), bindings }));
        assert!(timeout(SOON, server.accept()).await.is_err());
        let figures = caches.figures(&key(), &binding).unwrap();
        assert_eq!((figures.wanted, figures.listening), (3, false));

        lead.send_replace(Some(Instant::now() + Duration::from_secs(3600)));
        let (stream, _) = timeout(Duration::from_secs(30), server.accept()).await.unwrap().unwrap();
        drop(stream);
        // Another leads: all is left as it is, and nobody comes any more.
        lead.send_replace(None);
        caches.leave();
        assert_eq!(caches.figures(&key(), &binding), None);
        while let Ok(accepted) = timeout(SOON, server.accept()).await {
            drop(accepted);
        }
        caches.set(&key(), None);
        assert!(timeout(SOON, server.accept()).await.is_err());
    }

    #[tokio::test]
    async fn a_task_ends_with_what_is_wanted() {
        let caches = Caches::new(Leadership::for_good(), Arc::default(), |_, _| ());
        let wanted = || Wanted { servers: Servers::default(), keys: Keys::from(Entry::default()), bindings: BTreeMap::new() };
        caches.set(&key(), Some(wanted()));
        caches.set(&key(), None);
        let gone = async {
            while !caches.inner.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(30), gone).await.unwrap();
    }
}
