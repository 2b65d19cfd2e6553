//! Larder on the cluster, by its chart, once for all tests.

use std::env;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{apply, eventually, kubectl, run};

/// Where the operator runs.
pub const SYSTEM: &str = "larder-e2e-system";
/// Where the caches of the tests run: the namespace that the operator watches.
pub const PLACE: &str = "larder-e2e";
/// A namespace that it does not watch.
pub const ELSEWHERE: &str = "larder-e2e-elsewhere";
pub const RELEASE: &str = "larder-e2e";

/// With every engine in every way, on a slow machine.
const OTHERS_TAKE_AT_MOST: Duration = Duration::from_secs(3 * 3600);

static RELEASED: RwLock<()> = RwLock::new(());
static DISTURBED: RwLock<()> = RwLock::new(());
static OPERATED: RwLock<()> = RwLock::new(());
static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();

/// Hands the cluster, with the release installed, to a test among others.
pub fn cluster() -> RwLockReadGuard<'static, ()> {
    let guard = RELEASED.read().unwrap_or_else(PoisonError::into_inner);
    await_release();
    guard
}

/// The same to one that takes the release away, once no other has it: one that waited in line would keep others from beginning.
pub fn cluster_alone() -> RwLockWriteGuard<'static, ()> {
    let guard = eventually("no other test has the cluster", OTHERS_TAKE_AT_MOST, || match RELEASED.try_write() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err("one has it".to_owned()),
    });
    await_release();
    guard
}

fn await_release() {
    if let Err(error) = INSTALLED.get_or_init(install) {
        panic!("Larder is not installed: {error}");
    }
}

/// As long as this is held, no other test touches nodes, the operator or the namespace as a whole. None holds both of these at once.
pub fn beside_others() -> RwLockReadGuard<'static, ()> {
    DISTURBED.read().unwrap_or_else(PoisonError::into_inner)
}

/// As long as this is held, no other test measures anything.
pub fn without_others() -> RwLockWriteGuard<'static, ()> {
    DISTURBED.write().unwrap_or_else(PoisonError::into_inner)
}

/// As long as this is held, no other test ends the operator's pods. Asked for behind one of the two above.
pub fn with_operator() -> RwLockReadGuard<'static, ()> {
    OPERATED.read().unwrap_or_else(PoisonError::into_inner)
}

/// As long as this is held, the operator's pods may be away. Asked for behind one of the two above.
pub fn without_operator() -> RwLockWriteGuard<'static, ()> {
    OPERATED.write().unwrap_or_else(PoisonError::into_inner)
}

/// A tier of three sentinels, no two of which share a node, needs as many.
const LEAST_NODES: usize = 3;

/// Whether there are nodes enough that take pods.
fn has_nodes() -> Result<(), String> {
    let said = kubectl(&["get", "nodes", "-o", "json"])?;
    let nodes: Value = serde_json::from_str(&said).map_err(|error| error.to_string())?;
    let takes_pods = |node: &&Value| {
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        node["spec"]["unschedulable"] != true && taints.iter().all(|taint| taint["effect"] == "PreferNoSchedule")
    };
    match nodes["items"].as_array().map_or(0, |nodes| nodes.iter().filter(takes_pods).count()) {
        found if found >= LEAST_NODES => Ok(()),
        found => Err(format!(
            "the cluster has {found} nodes that take pods, and these tests need {LEAST_NODES}: add nodes, or uncordon them"
        )),
    }
}

/// Installs the release, or brings it to the present image and chart.
pub fn install() -> Result<(), String> {
    has_nodes()?;
    for namespace in [SYSTEM, PLACE, ELSEWHERE] {
        // All pods of the tests, the operator's and the caches', hold to the restricted profile.
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}))?;
    }
    let image = image("LARDER_E2E_IMAGE");
    let (repository, tag) = image.rsplit_once(':').ok_or("LARDER_E2E_IMAGE is REPOSITORY:TAG")?;
    let values = format!("image.repository={repository},watchNamespaces={{{PLACE}}},injector.enabled=true");
    let chart = format!("{}/charts/larder", env!("CARGO_MANIFEST_DIR"));
    // As text: a tag of digits alone would be taken for a number.
    let tag = format!("image.tag={tag}");
    let mut arguments =
        vec!["upgrade", "--install", RELEASE, &chart, "--namespace", SYSTEM, "--set", &values, "--set-string", &tag];
    arguments.extend(["--take-ownership", "--wait", "--timeout", "180s"]);
    let installed = run("helm", &arguments, "");
    installed.map(drop).map_err(|error| {
        let pods = kubectl(&["-n", SYSTEM, "get", "pods", "-o", "wide"]).unwrap_or_default();
        let log = kubectl(&["-n", SYSTEM, "logs", "-l", "app.kubernetes.io/component=operator", "--tail=20"]).unwrap_or_default();
        format!("{error}\n{pods}\n{log}")
    })
}

/// The image that `make e2e` names in a variable.
pub fn image(variable: &str) -> String {
    env::var(variable).unwrap_or_else(|_| panic!("{variable} names no image: run `make e2e`"))
}
