//! A CacheCluster of the tests, and what can be seen of it without the operator's help.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, condition, eventually, get, kubectl, list, name, uid};
use super::console::Console;
use super::install::PLACE;
use super::nodes::closing_taint;

/// How long the slowest change of a tier may take: every pod is replaced, one after the other.
pub const SETTLES_WITHIN: Duration = Duration::from_secs(300);

/// A server program of some version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine {
    pub kind: &'static str,
    pub version: &'static str,
}

pub const REDIS_7_0: Engine = Engine { kind: "Redis", version: "7.0" };
pub const REDIS_8_0: Engine = Engine { kind: "Redis", version: "8.0" };
pub const VALKEY_8_1: Engine = Engine { kind: "Valkey", version: "8.1" };
pub const VALKEY_9_1: Engine = Engine { kind: "Valkey", version: "9.1" };

impl Engine {
    /// As in `spec.engine`. `LARDER_E2E_ENGINES` is put before the image's name; without it the engines' official images are used.
    pub fn spec(self) -> Value {
        match env::var("LARDER_E2E_ENGINES") {
            Ok(prefix) => {
                let image = format!("{prefix}{}:{}", self.kind.to_lowercase(), self.version);
                json!({"kind": self.kind, "version": self.version, "image": image})
            }
            Err(_) => json!({"kind": self.kind, "version": self.version}),
        }
    }

    /// The image: the one that a spec names, or the engine's own, as Larder has it.
    pub fn image(self) -> String {
        let of_spec = self.spec()["image"].as_str().map(str::to_owned);
        of_spec.unwrap_or_else(|| match self.kind {
            "Valkey" => format!("valkey/valkey:{}", self.version),
            _ => format!("redis:{}", self.version),
        })
    }

    /// The program's name.
    pub fn server(self) -> String {
        format!("{}-server", self.kind.to_lowercase())
    }

    pub fn cli(self) -> String {
        format!("{}-cli", self.kind.to_lowercase())
    }

    fn benchmark(self) -> String {
        format!("{}-benchmark", self.kind.to_lowercase())
    }

    /// Its place among the engines.
    fn number(self) -> usize {
        [REDIS_7_0, REDIS_8_0, VALKEY_8_1, VALKEY_9_1].iter().position(|engine| *engine == self).expect("one of them")
    }

    /// Whether a primary hands over by itself when a sentinel is asked for it, and loses nothing.
    pub fn has_coordinated_failover(self) -> bool {
        self == VALKEY_9_1
    }

    /// The newer one of the same kind that it can be upgraded to.
    pub fn newer(self) -> Option<Self> {
        match self {
            REDIS_7_0 => Some(REDIS_8_0),
            VALKEY_8_1 => Some(VALKEY_9_1),
            _ => None,
        }
    }
}

/// A CacheCluster.
pub struct Tier {
    pub name: String,
    pub engine: Engine,
    pub durable: bool,
    pub tls: bool,
    /// In how many shards; none: under Sentinel.
    pub shards: Option<u32>,
    /// Through which it is asked, once it has writers.
    pub console: Option<Arc<Mutex<Console>>>,
}

impl Tier {
    /// One in memory, without TLS, that is only described.
    pub fn of(name: &str, engine: Engine) -> Self {
        Self { name: name.to_owned(), engine, durable: false, tls: false, shards: None, console: None }
    }

    /// One without TLS that is made at once, see below.
    pub fn create(name: &str, engine: Engine, durable: bool) -> (Self, Duration) {
        Self { durable, ..Self::of(name, engine) }.make()
    }

    /// Creates it, with a login whose password is in a Secret, and waits until it serves. Says how long that took.
    pub fn make(self) -> (Self, Duration) {
        let tier = self;
        tier.set_password("first").expect("a Secret");
        let began = Instant::now();
        apply(&tier.manifest()).expect("applied");
        tier.settle("the first time");
        (tier, began.elapsed())
    }

    /// The least that says all a test needs.
    pub fn manifest(&self) -> Value {
        let mut spec = json!({
            "engine": self.engine.spec(),
            "mode": "Sentinel",
            "memory": "96Mi",
            // What is evicted cannot be told from what is lost: others' values go first, which live shorter.
            "eviction": "volatile-ttl",
            "auth": {"user": "app", "password": {"secretKeyRef": {"name": self.login(), "key": "password"}}},
            "pod": {"cpu": {"request": "20m"}, "tolerations": self.tolerations()},
        });
        if let Some(shards) = self.shards {
            (spec["mode"], spec["shards"]) = (json!("Cluster"), json!(shards));
        }
        if self.durable {
            spec["storage"] = json!({"size": "256Mi", "whenDeleted": "Delete"});
        }
        if self.tls {
            spec["tls"] = json!({"enabled": true});
        }
        json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster",
            "metadata": {"name": self.name, "namespace": PLACE}, "spec": spec,
        })
    }

    /// Only nodes that are closed to it are closed to its pods.
    pub fn tolerations(&self) -> Vec<Value> {
        let others = super::matrix::TIERS.iter().filter(|other| **other != self.name);
        others.map(|other| json!({"key": closing_taint(other), "operator": "Exists", "effect": "NoSchedule"})).collect()
    }

    /// Whether the operator is restarted in the midst of a case, by the case's number: see the matrix. An upgrade of it changes nothing
    /// about that, since the last case is the upgrade.
    pub fn restarts_operator(&self, case: usize) -> bool {
        // Of the Clusters each is of another engine.
        let by_engine = if self.is_cluster() { 0 } else { [0, 1, 0, 1][self.engine.number()] };
        (by_engine + usize::from(self.durable) + case).is_multiple_of(2)
    }

    pub fn is_cluster(&self) -> bool {
        self.shards.is_some()
    }

    /// The Secret with the login of clients.
    pub fn login(&self) -> String {
        format!("{}-login", self.name)
    }

    pub fn set_password(&self, password: &str) -> Result<String, String> {
        apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": self.login(), "namespace": PLACE},
            "stringData": {"username": "app", "password": password},
        }))
    }

    pub fn object(&self) -> Value {
        get(PLACE, &format!("cachecluster/{}", self.name)).unwrap_or_default()
    }

    /// Merges a change into the spec.
    pub fn patch(&self, spec: &Value) {
        let patch = json!({"spec": spec}).to_string();
        kubectl(&["-n", PLACE, "patch", "cachecluster", &self.name, "--type=merge", "-p", &patch]).expect("patched");
    }

    /// Waits until it serves and nothing is left to do, by its own conditions and by its pods.
    pub fn settle(&self, why: &str) {
        eventually(&format!("{} settles {why}", self.name), SETTLES_WITHIN, || self.settled());
    }

    pub fn settled(&self) -> Result<(), String> {
        let object = self.object();
        for (kind, wanted) in [("Accepted", "True"), ("Ready", "True"), ("Progressing", "False"), ("Degraded", "False")] {
            let found = condition(&object, kind).ok_or(format!("{kind} is not yet told of this generation"))?;
            if found["status"] != wanted {
                return Err(format!("{kind} is {}: {} {}", found["status"], found["reason"], found["message"]));
            }
        }
        let pods = self.pods();
        let unready: Vec<String> = pods.iter().filter(|pod| !is_ready(pod)).map(name).collect();
        if pods.is_empty() || !unready.is_empty() {
            Err(format!("of {} pods not ready: {unready:?}", pods.len()))
        } else {
            Ok(())
        }
    }

    /// All pods: of servers and of sentinels.
    pub fn pods(&self) -> Vec<Value> {
        list(PLACE, "pods", &format!("larder.dev/cluster={}", self.name))
    }

    pub fn servers(&self) -> Vec<Value> {
        self.component("server")
    }

    pub fn sentinels(&self) -> Vec<Value> {
        self.component("sentinel")
    }

    fn component(&self, component: &str) -> Vec<Value> {
        list(PLACE, "pods", &format!("larder.dev/cluster={},app.kubernetes.io/component={component}", self.name))
    }

    pub fn server_uids(&self) -> BTreeSet<String> {
        self.servers().iter().map(uid).collect()
    }

    /// How often the containers of each pod were restarted in place.
    pub fn restarts(&self) -> BTreeMap<String, u64> {
        let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
        self.pods().iter().map(|pod| (uid(pod), restarts(pod))).collect()
    }

    /// Asks a server or a sentinel as the user of the tests: from the writers' pod, or where there is none by the engine's client in the
    /// asked one's own pod.
    pub fn ask(&self, pod: &str, port: &str, command: &[&str]) -> Result<String, String> {
        self.ask_as("app", &self.password(), pod, port, command)
    }

    /// The same as Larder itself, which may do what clients may not.
    pub fn ask_as_larder(&self, pod: &str, port: &str, command: &[&str]) -> Result<String, String> {
        let system = get(PLACE, &format!("secret/{}-system", self.name)).ok_or("there is no login of Larder's own")?;
        let field = |name: &str| decode(system["data"][name].as_str().unwrap_or_default());
        self.ask_as(&field("username"), &field("password"), pod, port, command)
    }

    /// The password of clients, as it is by now.
    pub fn password(&self) -> String {
        let login = get(PLACE, &format!("secret/{}", self.login())).unwrap_or_default();
        decode(login["data"]["password"].as_str().unwrap_or_default())
    }

    /// What starts the engine's benchmark at a server in its pod, with so many of the command that follows.
    pub fn benchmark_line(&self, pod: &str, times: &str) -> Vec<String> {
        let (program, password) = (self.engine.benchmark(), self.password());
        let line = ["-n", PLACE, "exec", pod, "--", &program, "-p", "6379", "--user", "app", "-a", &password];
        let tls = ["--tls", "--cacert", "/etc/larder/tls/ca.crt"].into_iter().filter(|_| self.tls);
        let how = ["-q", "-n", times, "-r", "100000000", "-P", "32", "-c", "4"];
        line.into_iter().chain(tls).chain(how).map(str::to_owned).collect()
    }

    /// The same as another user.
    pub fn ask_as(&self, user: &str, password: &str, pod: &str, port: &str, command: &[&str]) -> Result<String, String> {
        if let Some(console) = &self.console {
            let found = get(PLACE, &format!("pod/{pod}")).unwrap_or_default();
            let address = found["status"]["podIP"].as_str().ok_or(format!("{pod} has no address"))?;
            let address = format!("{address}:{port}");
            let words = [&["call", &address, user, password][..], command].concat();
            return console.lock().unwrap_or_else(PoisonError::into_inner).ask(&words);
        }
        let line = self.client_line(user, password, pod, port);
        let arguments: Vec<&str> = line.iter().map(String::as_str).chain(command.iter().copied()).collect();
        kubectl(&arguments)
    }

    /// What starts the engine's client in a pod, as a user, before its command.
    pub fn client_line(&self, user: &str, password: &str, pod: &str, port: &str) -> Vec<String> {
        let cli = self.engine.cli();
        let line =
            ["-n", PLACE, "exec", "-q", pod, "--", &cli, "-p", port, "--user", user, "--pass", password, "--no-auth-warning"];
        let tls = ["--tls", "--cacert", "/etc/larder/tls/ca.crt"].into_iter().filter(|_| self.tls);
        line.into_iter().chain(tls).map(str::to_owned).collect()
    }

    /// Deletes it, and waits until its pods are gone.
    pub fn delete(&self) {
        let _ = kubectl(&["-n", PLACE, "delete", "cachecluster", &self.name, "--ignore-not-found"]);
        eventually(&format!("{} is gone", self.name), Duration::from_secs(120), || match self.pods().len() {
            0 => Ok(()),
            left => Err(format!("{left} pods are left")),
        });
        let _ = kubectl(&["-n", PLACE, "delete", "secret", &self.login(), "--ignore-not-found"]);
    }
}

/// The pods with these labels that are ready.
pub fn ready_pods(labels: &str) -> Vec<Value> {
    list(PLACE, "pods", labels).into_iter().filter(is_ready).collect()
}

pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    pod["metadata"]["deletionTimestamp"].is_null()
        && conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// Base64, as in a Secret.
pub fn decode(text: &str) -> String {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter_map(|byte| alphabet.iter().position(|digit| *digit == byte));
    let (mut bits, mut held, mut bytes) = (0usize, 0u32, Vec::new());
    for digit in digits {
        bits = (bits << 6) | digit;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from((bits >> held) & 0xff).expect("a byte"));
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
