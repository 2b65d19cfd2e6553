//! The engine by itself: two servers and three sentinels on the same nodes, without Larder, as its documentation has it. What it takes to
//! serve again is what the bounds of the tests are relative to.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl};
use super::install::{self, PLACE};
use super::report::{self, Line};
use super::tier::Tier;
use super::writers::{self, Target, Writers};

/// Under which its sentinels watch the primary.
const MASTER: &str = "bare";
const SERVERS: usize = 2;
const SENTINELS: usize = 3;
const FORMS_WITHIN: Duration = Duration::from_secs(120);
/// What it is asked before its servers have names of their own, which are no users'.
const USER: [&str; 2] = ["default", ""];

/// How long clients of the bare engine had no acknowledgement.
#[derive(Clone, Copy, Debug)]
pub struct Floors {
    /// When a sentinel was told to fail over.
    pub ordered: Duration,
    /// When the primary ended without a word, and its sentinels had to notice.
    pub noticed: Duration,
}

impl Floors {
    /// The slower of each.
    pub fn max(self, other: Self) -> Self {
        Self { ordered: self.ordered.max(other.ordered), noticed: self.noticed.max(other.noticed) }
    }
}

/// Takes both, with the engine, the storage and the sentinels' settings of a tier.
pub fn floors(tier: &Tier) -> Floors {
    let _others = install::beside_others();
    let bare = Bare::start(tier);
    let ordered = bare.measure("floor: the bare engine is told to fail over", || bare.fail_over());
    let failed_over = Instant::now();
    // Sentinels begin no failover by themselves within this time of the last one.
    thread::sleep((2 * bare.failover_timeout).saturating_sub(failed_over.elapsed()));
    let noticed = bare.measure("floor: the bare engine's primary ends", || bare.end_primary());
    Floors { ordered, noticed }
}

/// The deployment, which goes with it.
struct Bare<'a> {
    tier: &'a Tier,
    name: String,
    writers: Writers,
    down_after: Duration,
    failover_timeout: Duration,
}

impl<'a> Bare<'a> {
    fn start(tier: &'a Tier) -> Self {
        let name = format!("{}-bare", tier.name);
        remove(&name);
        apply(&service(&name)).expect("applied");
        let found = get(PLACE, &format!("service/{name}")).unwrap_or_default();
        let sentinels = found["spec"]["clusterIP"].as_str().expect("an address").to_owned();
        let pods = (0..SERVERS).map(|number| server(&name, tier, number));
        let pods: Vec<Value> = pods.chain((0..SENTINELS).map(|number| sentinel(&name, tier, number))).collect();
        apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods})).expect("applied");
        let target = Target { pod: format!("{name}-writers"), sentinels, master: MASTER.to_owned(), login: None };
        let writers = Writers::of(&target);
        let bare = Self { tier, name, writers, down_after: tier.down_after(), failover_timeout: tier.failover_timeout() };
        bare.form();
        bare
    }

    /// One follows the other, and the sentinels watch it and know each other.
    fn form(&self) {
        let servers: Vec<String> = (0..SERVERS).map(|number| self.answering(&format!("{}-{number}", self.name), 6379)).collect();
        let (host, port) = servers[0].rsplit_once(':').expect("an address");
        self.ask(&servers[1], &["REPLICAOF", host, port]).expect("an answer");
        let (down_after, failover) = (self.down_after.as_millis().to_string(), self.failover_timeout.as_millis().to_string());
        for number in 0..SENTINELS {
            let sentinel = self.answering(&format!("{}-s{number}", self.name), 26379);
            self.ask(&sentinel, &["SENTINEL", "MONITOR", MASTER, host, port, "2"]).expect("an answer");
            let settings = ["SENTINEL", "SET", MASTER, "down-after-milliseconds", &down_after, "failover-timeout", &failover];
            self.ask(&sentinel, &settings).expect("an answer");
        }
        self.await_whole(servers.len() - 1);
    }

    /// Waits until every sentinel knows the others and so many replicas, and each of those has all data.
    fn await_whole(&self, replicas: usize) {
        eventually(&format!("{} is whole", self.name), FORMS_WITHIN, || {
            for number in 0..SENTINELS {
                let sentinel = self.answering(&format!("{}-s{number}", self.name), 26379);
                let said = self.ask(&sentinel, &["INFO", "sentinel"])?;
                let wanted = format!("slaves={replicas},sentinels={SENTINELS}");
                if !said.contains("status=ok") || !said.contains(&wanted) {
                    return Err(said);
                }
            }
            let said = self.ask(&self.primary()?, &["INFO", "replication"])?;
            if said.matches("state=online").count() == replicas { Ok(()) } else { Err(said) }
        });
    }

    /// Has something done while the writers write: how long they had no acknowledgement. What the engine acknowledges at a former primary,
    /// and then drops, was not served.
    fn measure(&self, what: &str, act: impl FnOnce()) -> Duration {
        let began = Instant::now();
        let before = self.primary().expect("a primary");
        self.writers.begin();
        act();
        eventually(&format!("{} has another primary", self.name), Duration::from_secs(90), || match self.primary()? {
            now if now == before => Err(format!("{now} still is")),
            _ => Ok(()),
        });
        let report = self.writers.finish();
        report::add(Line { report: Some(report.clone()), took: Some(began.elapsed()), ..Line::of(self.tier, what) });
        report.longest_gap + Duration::from_millis(report.lost * 1000 / writers::A_SECOND)
    }

    fn fail_over(&self) {
        self.await_whole(SERVERS - 1);
        let sentinel = self.answering(&format!("{}-s0", self.name), 26379);
        let mut command = vec!["SENTINEL", "FAILOVER", MASTER];
        if self.tier.engine.has_coordinated_failover() {
            command.push("COORDINATED");
        }
        assert_eq!(self.ask(&sentinel, &command).as_deref(), Ok("OK"));
    }

    /// At once, as by SIGKILL: nothing is written, and nobody is told.
    fn end_primary(&self) {
        self.await_whole(SERVERS - 1);
        let primary = self.primary().expect("a primary");
        // Its answer is that the connection ends.
        let _ = self.ask(&primary, &["SHUTDOWN", "NOSAVE", "NOW", "FORCE"]);
    }

    /// Where the sentinels say that the primary is.
    fn primary(&self) -> Result<String, String> {
        let sentinel = self.answering(&format!("{}-s0", self.name), 26379);
        let said = self.ask(&sentinel, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER])?;
        Ok(said.lines().collect::<Vec<_>>().join(":"))
    }

    /// The address of a pod, once what runs in it answers.
    fn answering(&self, pod: &str, port: u16) -> String {
        eventually(&format!("{pod} answers"), FORMS_WITHIN, || {
            let found = get(PLACE, &format!("pod/{pod}")).unwrap_or_default();
            let address = found["status"]["podIP"].as_str().ok_or_else(|| found["status"].to_string())?;
            let address = format!("{address}:{port}");
            self.ask(&address, &["PING"]).map(|_| address)
        })
    }

    fn ask(&self, address: &str, command: &[&str]) -> Result<String, String> {
        self.writers.call(address, USER, command)
    }
}

impl Drop for Bare<'_> {
    fn drop(&mut self) {
        self.writers.remove();
        remove(&self.name);
    }
}

fn remove(name: &str) {
    let _ = kubectl(&["-n", PLACE, "delete", "pod,service", "-l", &format!("app={name}"), "--ignore-not-found", "--wait"]);
}

/// In front of the sentinels.
fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": PLACE, "labels": {"app": name}},
        "spec": {"selector": {"app": name, "role": "sentinel"}, "ports": [{"port": 26379}]},
    })
}

/// A server. Its pod stays where it ends, so that connections to it are refused as those to a program that was killed.
fn server(name: &str, tier: &Tier, number: usize) -> Value {
    let appends = if tier.durable { "yes" } else { "no" };
    let program = tier.engine.server();
    let settings = "--port 6379 --bind '*' --protected-mode no --save '' --repl-diskless-sync-delay 0 --dir /data";
    let script = format!("{program} {settings} --appendonly {appends}; exec sleep 3600");
    pod(&format!("{name}-{number}"), name, "server", tier, &script)
}

fn sentinel(name: &str, tier: &Tier, number: usize) -> Value {
    let program = tier.engine.server();
    let script = format!("echo protected-mode no > /data/s.conf && exec {program} /data/s.conf --sentinel");
    pod(&format!("{name}-s{number}"), name, "sentinel", tier, &script)
}

/// A pod that keeps off its like.
fn pod(name: &str, app: &str, role: &str, tier: &Tier, script: &str) -> Value {
    let like = json!({"labelSelector": {"matchLabels": {"app": app, "role": role}}, "topologyKey": "kubernetes.io/hostname"});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": PLACE, "labels": {"app": app, "role": role}},
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "restartPolicy": "Never",
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "podAffinityTerm": like},
            ]}},
            "tolerations": tier.tolerations(),
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 10001, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": [{"name": "data", "emptyDir": {}}],
            "containers": [{
                "name": "engine",
                "image": tier.engine.image(),
                "command": ["sh", "-c", script],
                // As a tier's.
                "resources": {"requests": {"cpu": "20m"}},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    })
}
