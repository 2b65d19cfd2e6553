//! Larder's own keys in the caches, and what sidecars say there.
//!
//! One task for each CacheCluster that has bindings. It keeps the newest snapshot of each binding at the primary, whichever server that
//! is, tells sidecars of it, hears their heartbeats, and tells them how many they are. The API server has no part in it.

mod figures;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::operator::admin::Keys;
use crate::operator::election::Leadership;
use crate::operator::metrics::Metrics;
use crate::operator::queue::Key;
use crate::policy::binding::BindingName;

pub use figures::{Figures, MAX_GENERATIONS, MAX_NOTICES, Notice, Refusal};

/// What a CacheCluster's cache is to hold, and how it is reached.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where its servers and sentinels are.
    pub servers: Servers,
    /// How they let Larder in.
    pub keys: Keys,
    /// The snapshot of each binding, JSON.
    pub bindings: BTreeMap<BindingName, Arc<str>>,
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
}

/// Hears that the figures of a binding are worth to be told anew.
type OnChange = Arc<dyn Fn(&Key, &BindingName) + Send + Sync>;

/// All caches of this operator. A handle; the tasks end with the last one.
#[derive(Clone)]
pub struct Caches {
    shared: Arc<Shared>,
}

struct Shared {
    leadership: Leadership,
    metrics: Arc<Metrics>,
    on_change: OnChange,
    wanted: Mutex<HashMap<Key, Arc<Wanted>>>,
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
        Self { shared: Arc::new(Shared { leadership, metrics, on_change: Arc::new(on_change), wanted: Mutex::default() }) }
    }

    /// What a CacheCluster's cache is to hold from now on; whatever was said before is forgotten. `None`: nothing, and what Larder put
    /// there is taken away where it can be reached. Returns at once. Without leadership nothing is written.
    ///
    /// Whoever says the same again has the primary looked for: to be done when sentinels told of another.
    pub fn set(&self, cluster: &Key, wanted: Option<Wanted>) {
        let mut all = self.shared.lock();
        match wanted {
            Some(wanted) => drop(all.insert(cluster.clone(), Arc::new(wanted))),
            None => drop(all.remove(cluster)),
        }
    }

    /// Lets go of every cache and leaves all as it is: another leads now.
    pub fn leave(&self) {
        self.shared.lock().clear();
    }

    /// What the sidecars of a binding have told. `None`: the binding is not known here.
    pub fn figures(&self, cluster: &Key, binding: &BindingName) -> Option<Figures> {
        self.shared.lock().get(cluster)?.bindings.contains_key(binding).then(Figures::default)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Wanted>>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
