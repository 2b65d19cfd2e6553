//! What stands behind a real API server, played: the StatefulSet controller, the kubelets, and what runs in the pods.
//!
//! Pods are made from the StatefulSets' templates, through the API server's own admission. Servers, sentinels and agents listen on the
//! addresses of the pods' Services, as far as the operator can tell from outside; what they hold stands in [`tier`].

mod agent;
mod keeper;
mod kubelet;
mod listener;
mod tier;
mod tls;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use larder::operator::queue::Key;
use tokio::sync::oneshot;

pub use kubelet::NODES;
pub use tier::Tier;

/// The image of an engine that no registry has.
pub const NO_SUCH_IMAGE: &str = "registry.example/nobody/has-this:1";

/// Every cache tier, by its CacheCluster.
#[derive(Clone, Default)]
struct Tiers(Arc<Mutex<BTreeMap<Key, Tier>>>);

impl Tiers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Tier>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on one tier, which is there from the first time that it is asked for.
    fn with<T>(&self, key: &Key, work: impl FnOnce(&mut Tier) -> T) -> T {
        work(self.lock().entry(key.clone()).or_default())
    }
}

/// The stage, on a thread of its own.
pub struct Stage {
    tiers: Tiers,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Stage {
    /// Begins to play, with the rights of an administrator.
    pub fn start(kubeconfig: PathBuf) -> Self {
        let tiers = Tiers::default();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn({
            let tiers = tiers.clone();
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    tokio::select! {
                        () = kubelet::run(kubeconfig, tiers) => {}
                        _ = stopped => {}
                    }
                });
            }
        });
        Self { tiers, stop: Some(stop), thread: Some(thread) }
    }

    /// Looks at a tier, or changes something in it.
    pub fn with<T>(&self, namespace: &str, name: &str, work: impl FnOnce(&mut Tier) -> T) -> T {
        self.tiers.with(&Key { namespace: namespace.to_owned(), name: name.to_owned() }, work)
    }

    /// What servers and sentinels were asked that they do not know: the stage lacks it, or the operator should not ask it.
    pub fn unknown_commands(&self) -> Vec<String> {
        self.tiers.lock().values().flat_map(|tier| tier.unknown.iter().cloned()).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
