//! The continuous client, in a pod of its own, and what it reports.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl};
use super::console::Console;
use super::install::{PLACE, image};
use super::tier::{Tier, is_ready};

/// How many acknowledged values a disruption is judged by, at least.
pub const ENOUGH: u64 = 10_000;

/// How many write at once, at least.
const WRITERS: u64 = 4;
/// How many values they write a second.
pub const A_SECOND: u64 = 1000;
/// After how many values each connects anew.
const RECONNECT: u64 = 100;

/// The pod that writes to a tier.
pub struct Writers {
    pod: String,
    /// How many write at once.
    count: u64,
    console: Arc<Mutex<Console>>,
}

/// Whom they ask for the primary.
pub enum Guide {
    /// Any sentinel, at an address that leads to all of them, by the name under which they watch the primary.
    Sentinels { address: String, master: String },
    /// Any server of a Cluster, likewise.
    Cluster { address: String },
}

/// What is written to.
pub struct Target {
    /// The pod of the writers.
    pub pod: String,
    pub guide: Guide,
    /// The Secret with the login, where there is one.
    pub login: Option<String>,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Report {
    pub acknowledged: u64,
    pub failed: u64,
    /// How many of those were attempts that nobody answered in time, which the longest gap tells as well.
    pub timed_out: u64,
    pub faults: String,
    pub lost: u64,
    pub lost_examples: String,
    /// When the first and the last of those were acknowledged, by the clock of the pod's node, since 1970.
    pub lost_between: Option<(Duration, Duration)>,
    /// The longest time in which one of the writers had no acknowledgement.
    pub longest_gap: Duration,
}

impl Guide {
    /// In a Cluster two for each of three shards: each keeps to a slot, and they are spread evenly.
    fn writers(&self) -> u64 {
        match self {
            Self::Sentinels { .. } => WRITERS,
            Self::Cluster { .. } => 6,
        }
    }
}

impl Writers {
    /// Starts the pod for a tier. What that is asked goes through it from then on.
    pub fn start(tier: &mut Tier) -> Self {
        let writers = Self::of(&Target {
            pod: format!("{}-writers", tier.name),
            guide: tier.guide(),
            login: Some(format!("{}-client", tier.name)),
        });
        tier.console = Some(Arc::clone(&writers.console));
        writers
    }

    /// Starts the pod. It keeps off the nodes that tests disturb where there is another.
    pub fn of(target: &Target) -> Self {
        let console = Arc::new(Mutex::new(Console::of(&target.pod)));
        let writers = Self { pod: target.pod.clone(), count: target.guide.writers(), console };
        writers.remove();
        apply(&manifest(target)).expect("applied");
        eventually(&writers.pod, Duration::from_secs(60), || match get(PLACE, &format!("pod/{}", writers.pod)) {
            Some(pod) if is_ready(&pod) => Ok(()),
            pod => Err(format!("{}", pod.unwrap_or_default()["status"])),
        });
        writers
    }

    /// Asks a server or a sentinel from the pod.
    pub fn call(&self, address: &str, [user, password]: [&str; 2], command: &[&str]) -> Result<String, String> {
        self.ask(&[&["call", address, user, password][..], command].concat())
    }

    fn ask(&self, words: &[&str]) -> Result<String, String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).ask(words)
    }

    fn say(&self, word: &str) -> Value {
        let said = self.ask(&["control", word]).unwrap_or_else(|error| panic!("{error}"));
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{said}: {error}"))
    }

    /// Begins a run, and waits until it is under way.
    pub fn begin(&self) {
        // One that a failed test left is of no interest.
        let _ = self.ask(&["control", "stop"]);
        self.say("start");
        self.await_acknowledged(ENOUGH / 5);
    }

    pub fn acknowledged(&self) -> u64 {
        self.say("status")["acknowledged"].as_u64().expect("a number")
    }

    pub fn await_acknowledged(&self, least: u64) {
        eventually(&format!("{} has {least} acknowledged values", self.pod), Duration::from_secs(120), || {
            let now = self.acknowledged();
            if now >= least { Ok(()) } else { Err(format!("{now}, {}", self.say("status"))) }
        });
    }

    /// Waits for as many as show that the run goes on.
    pub fn await_more(&self) {
        self.await_acknowledged(self.acknowledged() + ENOUGH / 10);
    }

    /// Waits for the first after so many.
    pub fn await_acknowledged_beyond(&self, before: u64, within: Duration) {
        eventually(&format!("{} is served again", self.pod), within, || match self.acknowledged() {
            // One for each writer may have been counted late.
            now if now > before + self.count => Ok(()),
            now => Err(format!("{now} acknowledged values as before")),
        });
    }

    /// Waits until each writer has connected anew, which it does every so many values.
    pub fn await_reconnected(&self) {
        self.await_acknowledged(self.acknowledged() + 2 * self.count * RECONNECT);
    }

    /// The password that the kubelet has brought to the pod.
    pub fn password(&self) -> String {
        self.ask(&["password"]).unwrap_or_else(|error| error)
    }

    /// Ends the run once it has enough to be judged by, and reads every value back.
    pub fn finish(&self) -> Report {
        self.await_acknowledged(ENOUGH.max(self.acknowledged() + ENOUGH / 5));
        let report = self.say("stop");
        assert!(report["notReadBack"].is_null(), "the values were not read back: {report}");
        let number = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("{field} of {report}"));
        let lost_at = |field: &str| Duration::from_millis(number(field));
        Report {
            acknowledged: number("acknowledged"),
            failed: number("failed"),
            timed_out: report["faults"]["timeout"].as_u64().unwrap_or_default(),
            faults: report["faults"].to_string(),
            lost: number("lost"),
            lost_examples: report["lostExamples"].to_string(),
            lost_between: (number("lost") > 0).then(|| (lost_at("firstLostMillis"), lost_at("lastLostMillis"))),
            longest_gap: Duration::from_millis(number("longestGapMillis")),
        }
    }

    pub fn remove(&self) {
        let _ = kubectl(&["-n", PLACE, "delete", "pod", &self.pod, "--ignore-not-found", "--wait"]);
    }
}

fn manifest(target: &Target) -> Value {
    let variable = |name: &str, value: String| json!({"name": name, "value": value});
    let writers = target.guide.writers();
    // By address: no failover depends on names.
    let mut environment = match &target.guide {
        Guide::Sentinels { address, master } => {
            vec![variable("SENTINELS", format!("{address}:26379")), variable("MASTER", master.clone())]
        }
        Guide::Cluster { address } => vec![variable("CLUSTER", format!("{address}:6379"))],
    };
    environment.extend([
        variable("WRITERS", writers.to_string()),
        variable("RATE", (A_SECOND / writers).to_string()),
        variable("RECONNECT", RECONNECT.to_string()),
    ]);
    let (mut volumes, mut mounts) = (Vec::new(), Vec::new());
    if let Some(secret) = &target.login {
        environment.push(variable("LOGIN", "/login".to_owned()));
        volumes.push(json!({"name": "login", "secret": {"secretName": secret}}));
        mounts.push(json!({"name": "login", "mountPath": "/login"}));
    }
    let term = json!({"matchExpressions": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]});
    let affinity = json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": target.pod, "namespace": PLACE, "labels": {"app": "e2e-client"}},
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "affinity": {"nodeAffinity": affinity},
            "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}],
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": volumes,
            "containers": [{
                "name": "client",
                "image": image("LARDER_E2E_CLIENT_IMAGE"),
                "args": ["serve"],
                "env": environment,
                "volumeMounts": mounts,
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    })
}
