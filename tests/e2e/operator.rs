//! The operator's own pods: restarted in the midst of a change, or away for a while.

use std::collections::BTreeSet;
use std::sync::RwLockWriteGuard;
use std::time::Duration;

use serde_json::Value;

use super::cluster::{condition, eventually, kubectl, list, name, uid};
use super::install::{self, SYSTEM};
use super::tier::{Tier, is_ready};

const LABELS: &str = "app.kubernetes.io/component=operator";

/// Ends every pod of the operator; others take their place.
pub fn restart() {
    let _away = install::without_operator();
    kubectl(&["-n", SYSTEM, "delete", "pods", "-l", LABELS, "--wait=false"]).expect("deleted");
    await_ready();
}

/// Waits until as many of its pods are ready as there are to be, so that each pod that is made meets the injector.
pub fn await_ready() {
    eventually("the operator is ready", Duration::from_secs(120), || {
        let pods = list(SYSTEM, "pods", LABELS);
        let ready = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && is_ready(pod)).count() as u64;
        match deployment()["spec"]["replicas"].as_u64() {
            Some(wanted) if ready == wanted && pods.len() as u64 == wanted => Ok(()),
            wanted => Err(format!("{ready} of {wanted:?} are ready")),
        }
    });
}

fn deployment() -> Value {
    list(SYSTEM, "deployments", LABELS).into_iter().next().expect("the operator's Deployment")
}

/// What shows that a change of a tier has begun.
#[derive(PartialEq, Eq)]
pub struct Quiet {
    users: Value,
    certificates: Value,
    pods: BTreeSet<String>,
    progressing: bool,
}

impl Quiet {
    pub fn of(tier: &Tier) -> Self {
        let object = tier.object();
        let progressing = condition(&object, "Progressing");
        let steady = tier.pods().into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Self {
            users: object["status"]["users"]["generation"].clone(),
            certificates: object["status"]["certificates"]["fingerprint"].clone(),
            pods: steady.map(|pod| uid(&pod)).collect(),
            progressing: progressing.is_some_and(|found| found["status"] == "True"),
        }
    }

    /// Restarts the operator as soon as the change has begun.
    pub fn restart_once_begun(&self, tier: &Tier) {
        eventually("the change begins", Duration::from_secs(60), || {
            if Self::of(tier) == *self { Err("nothing is under way".to_owned()) } else { Ok(()) }
        });
        restart();
    }
}

/// The operator, as long as none runs. It is called back when this is dropped.
pub struct Away {
    deployment: String,
    replicas: String,
    _guard: RwLockWriteGuard<'static, ()>,
}

impl Away {
    pub fn begin() -> Self {
        let (guard, deployment) = (install::without_operator(), deployment());
        let replicas = deployment["spec"]["replicas"].as_u64().expect("a number").to_string();
        let away = Self { deployment: name(&deployment), replicas, _guard: guard };
        away.scale("0").expect("scaled");
        eventually("the operator is away", Duration::from_secs(60), || match list(SYSTEM, "pods", LABELS).len() {
            0 => Ok(()),
            left => Err(format!("{left} pods are left")),
        });
        away
    }

    fn scale(&self, count: &str) -> Result<String, String> {
        kubectl(&["-n", SYSTEM, "scale", "deployment", &self.deployment, &format!("--replicas={count}")])
    }

    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        if let Err(error) = self.scale(&self.replicas) {
            eprintln!("the operator stays away: {error}");
        }
    }
}
