//! The engine by itself: two servers and three sentinels, or the least Cluster with a replica, on the same nodes, without Larder, as its
//! documentation has it. What it takes to serve again is what the bounds of the tests are relative to.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl};
use super::install::{self, PLACE};
use super::primaries::{ClusterNode, TAGS, nodes, owner};
use super::report::{self, Line};
use super::tier::Tier;
use super::writers::{self, Guide, Target, Writers};

/// Under which its sentinels watch the primary.
const MASTER: &str = "bare";
const SERVERS: usize = 2;
const SENTINELS: usize = 3;
/// The first and the last slot of each of a Cluster's three primaries. A fourth server is a replica of the last one.
const SHARES: [[&str; 2]; 3] = [["0", "5460"], ["5461", "10922"], ["10923", "16383"]];
const FORMS_WITHIN: Duration = Duration::from_secs(120);
/// What it is asked before its servers have names of their own, which are no users'.
const USER: [&str; 2] = ["default", ""];

/// How long clients of the bare engine had no acknowledgement.
#[derive(Clone, Copy, Debug)]
pub struct Floors {
    /// When a sentinel, or the replica in a Cluster, was told to fail over.
    pub ordered: Duration,
    /// When the primary ended without a word, and the others had to notice.
    pub noticed: Duration,
}

impl Floors {
    /// The slower of each.
    pub fn max(self, other: Self) -> Self {
        Self { ordered: self.ordered.max(other.ordered), noticed: self.noticed.max(other.noticed) }
    }
}

/// Takes both, with the engine, the storage and the settings of a tier.
pub fn floors(tier: &Tier) -> Floors {
    let _others = install::beside_others();
    let bare = Bare::start(tier);
    let ordered = bare.measure("floor: the bare engine is told to fail over", || bare.fail_over());
    let failed_over = Instant::now();
    // Nobody begins a failover by himself within this time of the last one.
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
        apply(&service(&name, tier)).expect("applied");
        let found = get(PLACE, &format!("service/{name}")).unwrap_or_default();
        let address = found["spec"]["clusterIP"].as_str().expect("an address").to_owned();
        let (down_after, failover_timeout) = (tier.down_after(), tier.failover_timeout());
        let (servers, sentinels) = if tier.is_cluster() { (SHARES.len() + 1, 0) } else { (SERVERS, SENTINELS) };
        let pods = (0..servers).map(|number| server(&name, tier, number, down_after));
        let pods: Vec<Value> = pods.chain((0..sentinels).map(|number| sentinel(&name, tier, number))).collect();
        apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods})).expect("applied");
        let guide = match tier.is_cluster() {
            true => Guide::Cluster { address },
            false => Guide::Sentinels { address, master: MASTER.to_owned() },
        };
        let writers = Writers::of(&Target { pod: format!("{name}-writers"), guide, login: None });
        let bare = Self { tier, name, writers, down_after, failover_timeout };
        if tier.is_cluster() {
            bare.form_cluster()
        } else {
            bare.form()
        }
        bare
    }

    /// The servers know each other, and the last one follows the one before it.
    fn form_cluster(&self) {
        let servers: Vec<String> = (0..=SHARES.len()).map(|number| self.server(number)).collect();
        for other in &servers[1..] {
            let (host, port) = other.rsplit_once(':').expect("an address");
            self.ask(&servers[0], &["CLUSTER", "MEET", host, port]).expect("an answer");
        }
        for (server, [first, last]) in servers.iter().zip(SHARES) {
            self.ask(server, &["CLUSTER", "ADDSLOTSRANGE", first, last]).expect("an answer");
        }
        let followed = self.ask(&servers[SHARES.len() - 1], &["CLUSTER", "MYID"]).expect("an id");
        // It knows that one a moment after they were introduced.
        eventually("the replica follows", FORMS_WITHIN, || {
            self.ask(&servers[SHARES.len()], &["CLUSTER", "REPLICATE", &followed]).map(drop)
        });
        self.await_whole_cluster();
    }

    fn server(&self, number: usize) -> String {
        self.answering(&format!("{}-{number}", self.name), 6379)
    }

    /// Waits until every server knows all others and all slots, and the replica has all data.
    fn await_whole_cluster(&self) {
        let known = format!("cluster_known_nodes:{}", SHARES.len() + 1);
        eventually(&format!("{} is whole", self.name), FORMS_WITHIN, || {
            for number in 0..=SHARES.len() {
                let said = self.ask(&self.server(number), &["CLUSTER", "INFO"])?;
                if !said.contains("cluster_state:ok") || !said.contains(&known) {
                    return Err(said);
                }
            }
            let said = self.ask(&self.primary()?, &["INFO", "replication"])?;
            if said.contains("state=online") { Ok(()) } else { Err(said) }
        });
    }

    /// Who owns the slot of the first tag, and who follows it, as the first server says, which keeps its place.
    fn last_shard(&self) -> Result<(ClusterNode, Option<ClusterNode>), String> {
        let said = self.ask(&self.server(0), &["CLUSTER", "NODES"])?;
        let owner = owner(&said, TAGS[0].slot).ok_or_else(|| said.clone())?;
        let replica = nodes(&said).into_iter().find(|node| node.follows.as_ref() == Some(&owner.id));
        Ok((owner, replica))
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
        if self.tier.is_cluster() {
            return self.await_whole_cluster();
        }
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
        if self.tier.is_cluster() {
            let (_, replica) = self.last_shard().expect("an answer");
            let replica = replica.expect("a replica").address;
            assert_eq!(self.ask(&replica, &["CLUSTER", "FAILOVER"]).as_deref(), Ok("OK"));
            return;
        }
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

    /// Where the sentinels, or a server of the Cluster, say that the primary is.
    fn primary(&self) -> Result<String, String> {
        if self.tier.is_cluster() {
            return self.last_shard().map(|(owner, _)| owner.address);
        }
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

/// In front of the sentinels, or of the servers of a Cluster.
fn service(name: &str, tier: &Tier) -> Value {
    let (role, port) = if tier.is_cluster() { ("server", 6379) } else { ("sentinel", 26379) };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": PLACE, "labels": {"app": name}},
        "spec": {"selector": {"app": name, "role": role}, "ports": [{"port": port}]},
    })
}

/// A server. Its pod stays where it ends, so that connections to it are refused as those to a program that was killed.
fn server(name: &str, tier: &Tier, number: usize, down_after: Duration) -> Value {
    let appends = if tier.durable { "yes" } else { "no" };
    let program = tier.engine.server();
    let settings = "--port 6379 --bind '*' --protected-mode no --save '' --repl-diskless-sync-delay 0 --dir /data";
    let cluster = match tier.is_cluster() {
        true => format!("--cluster-enabled yes --cluster-node-timeout {}", down_after.as_millis()),
        false => String::new(),
    };
    let script = format!("{program} {settings} {cluster} --appendonly {appends}; exec sleep 3600");
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
