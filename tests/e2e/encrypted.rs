//! Tiers that speak TLS: made, given new certificates under a client that stays connected, and failed over.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{eventually, get, kubectl, name, run, uid};
use super::counter::{Count, Counter, Counts, kept};
use super::disruptions::changed;
use super::install::{self, PLACE};
use super::operator::Quiet;
use super::primaries::{TAGS, Tag};
use super::report::{self, Line};
use super::tier::{Engine, REDIS_7_0, Tier, VALKEY_9_1};

/// Kubelets bring new files within a minute or two, and sentinels are replaced one after the other.
const ROTATES_WITHIN: Duration = Duration::from_secs(420);
/// How many count at once, how often each, and how many counts a rotation is judged by at least.
const COUNTERS: usize = 4;
const EVERY: Duration = Duration::from_millis(10);
const ENOUGH: usize = 10_000;

/// The number of shards of a Cluster.
const SHARDS: u32 = 3;

/// How many of the pods have shown the newest certificates.
fn certificates(tier: &Tier) -> Value {
    tier.object()["status"]["certificates"].clone()
}

fn await_certificates(tier: &Tier, rotation: &Value) -> Value {
    let of = |pods: Vec<Value>| json!(format!("{0}/{0}", pods.len()));
    eventually(&format!("{} shows its certificates", tier.name), ROTATES_WITHIN, || {
        let found = certificates(tier);
        let whole = found["servers"] == of(tier.servers())
            && found["sentinels"] == of(tier.sentinels())
            && &found["rotation"] == rotation;
        if whole { Ok(found) } else { Err(found.to_string()) }
    })
}

/// Clients in the primary's pod, in a Cluster in those of all primaries, each with one connection.
struct Counters(Vec<(Key, Counter)>);

/// What one of them counts in.
type Key = (Tag, String);

impl Counters {
    fn start(tier: &Tier) -> Self {
        let start = |number: usize| {
            let tag = TAGS[number % TAGS.len()];
            let key = tag.key(&format!("counter-{number}"));
            let counter = Counter::start(tier, &tier.primary_of(tag), &key, EVERY, 2 * ROTATES_WITHIN);
            ((tag, key), counter)
        };
        let counters = Self((0..COUNTERS).map(start).collect());
        counters.await_more(ENOUGH / 10);
        counters
    }

    /// Waits until they have counted so many more together.
    fn await_more(&self, counts: usize) {
        for (_, counter) in &self.0 {
            counter.await_more(counts / COUNTERS);
        }
    }

    /// Ends them. Each line must be the next number: an error, or a connection that was made anew and said so, is another line. Says how
    /// far each key came, and the longest time between two counts of one of them, before a moment and after it.
    fn unbroken(self, moment: Instant) -> (Vec<(Key, usize)>, (Duration, Duration)) {
        let mut gaps = (Duration::ZERO, Duration::ZERO);
        let counted = self.0.into_iter().map(|(key, counter)| {
            let heard = counter.finish();
            for (expected, (_, line)) in (1_u64..).zip(&heard) {
                assert_eq!(Count::of(line).map(|count| count.number), Some(expected), "{} said {line:?}", key.1);
            }
            let (before, after) = Counts::of(&heard, moment).gaps(moment);
            gaps = (gaps.0.max(before), gaps.1.max(after));
            (key, heard.len())
        });
        (counted.collect(), gaps)
    }
}

/// A port of this machine that leads to one of a pod, as long as this lives.
struct Forwarded {
    child: Child,
    address: String,
    /// Kept open: kubectl says a line for each connection, and ends when nobody could read it.
    _said: BufReader<ChildStdout>,
}

impl Forwarded {
    fn to(pod: &str, port: &str) -> Self {
        let mut command = Command::new("kubectl");
        command.args(["-n", PLACE, "port-forward", &format!("pod/{pod}"), &format!(":{port}")]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kubectl runs");
        let mut said = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        said.read_line(&mut line).expect("a line");
        let address = line.split_ascii_whitespace().nth(2).unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Self { child, address, _said: said }
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The SHA-256 of the certificate that each server presents to whoever connects, also on its agent's port, once it has been verified by
/// what clients are told to trust.
fn shaken(tier: &Tier) -> Vec<String> {
    let authorities = std::env::temp_dir().join(format!("larder-e2e-{}-{}.crt", tier.name, std::process::id()));
    let map = get(PLACE, &format!("configmap/{}-ca", tier.name)).expect("a ConfigMap");
    fs::write(&authorities, map["data"]["ca.crt"].as_str().expect("ca.crt")).expect("a file");
    let file = authorities.to_string_lossy();
    let print = |pod: &str, port: &str| {
        let forwarded = Forwarded::to(pod, port);
        let name = format!("{pod}.{PLACE}.svc");
        let arguments = ["s_client", "-connect", &forwarded.address, "-CAfile", &file, "-verify_return_error"];
        let arguments = [&arguments[..], &["-verify_hostname", &name, "-servername", &name]].concat();
        let shown = run("openssl", &arguments, "").unwrap_or_else(|error| panic!("{pod}:{port}: {error}"));
        let said = run("openssl", &["x509", "-noout", "-fingerprint", "-sha256"], &shown).expect("a certificate");
        said.rsplit('=').next().expect("a fingerprint").replace(':', "").to_lowercase()
    };
    let servers: Vec<String> = tier.servers().iter().map(name).collect();
    let prints = servers.iter().flat_map(|pod| [print(pod, "6379"), print(pod, "9121")]).collect();
    let _ = fs::remove_file(&authorities);
    prints
}

/// The same as the status has it.
fn presented(tier: &Tier, certificates: &Value) -> Vec<String> {
    let fingerprint = certificates["fingerprint"].as_str().expect("a fingerprint").to_owned();
    vec![fingerprint; 2 * tier.servers().len()]
}

/// The operator is restarted while the certificates change.
fn check(title: &str, engine: Engine, shards: Option<u32>) {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let (tier, took) = Tier { tls: true, shards, ..Tier::of(title, engine) }.make();
    report::add(Line { took: Some(took), ..Line::of(&tier, "made and ready") });
    let before = await_certificates(&tier, &Value::Null);
    let primary = tier.primary();
    // Nobody is served without TLS.
    let plain = Tier { shards, ..Tier::of(&tier.name, engine) };
    assert_ne!(plain.ask(&primary, "6379", &["ping"]).as_deref(), Ok("PONG"));
    published(&tier);
    assert_eq!(shaken(&tier), presented(&tier, &before), "what is presented in a handshake");

    let (servers, sentinels) = (tier.server_uids(), tier.sentinels().iter().map(uid).collect::<Vec<_>>());
    let counters = Counters::start(&tier);
    let (quiet, begun) = (Quiet::of(&tier), Instant::now());
    tier.patch(&json!({"tls": {"enabled": true, "rotation": "again"}}));
    quiet.restart_once_begun(&tier);
    let after = await_certificates(&tier, &json!("again"));
    tier.settle("with new certificates");
    counters.await_more(ENOUGH);
    let (counted, (floor, gap)) = counters.unbroken(begun);
    assert_ne!(after["fingerprint"], before["fingerprint"]);
    assert_eq!(shaken(&tier), presented(&tier, &after), "what is presented in a handshake after the rotation");
    assert_eq!(tier.server_uids(), servers, "servers take certificates up while they run");
    let kept = tier.sentinels().iter().map(uid).filter(|uid| sentinels.contains(uid)).count();
    assert_eq!(kept, 0, "sentinels read theirs when they start");
    assert_eq!(tier.primary(), primary, "nothing was failed over");
    let whole: usize = counted.iter().map(|(_, count)| count).sum();
    let (floor_ms, gap_ms) = (floor.as_millis(), gap.as_millis());
    let case = format!(
        "certificates rotated, operator restarted; {whole} values over {COUNTERS} connections without an error; longest gap {gap_ms} ms, {floor_ms} before"
    );
    report::add(Line::of(&tier, &case));
    assert!(whole >= ENOUGH, "{whole} are too few to judge by");
    assert!(
        gap <= 3 * floor + Duration::from_secs(1),
        "nothing was acknowledged for {gap:?}, and for {floor:?} before the rotation"
    );
    assert_kept(&tier, &counted, "after the rotation");

    let reign = tier.reign();
    kubectl(&["-n", PLACE, "delete", "pod", &reign.pod, "--wait=false"]).expect("deleted");
    changed(&tier, &reign);
    assert_kept(&tier, &counted, "after the failover");
    tier.delete();
}

/// Each value that was acknowledged is there.
fn assert_kept(tier: &Tier, counted: &[(Key, usize)], when: &str) {
    for ((tag, key), count) in counted {
        assert_eq!(kept(tier, &tier.primary_of(*tag), key, *count), *count, "values of {key} {when}");
    }
}

/// Clients find whom to trust, and no key stands beside it.
fn published(tier: &Tier) {
    let map = get(PLACE, &format!("configmap/{}-ca", tier.name)).expect("a ConfigMap");
    let authorities = map["data"]["ca.crt"].as_str().expect("ca.crt");
    assert!(authorities.starts_with("-----BEGIN CERTIFICATE-----"), "{authorities}");
    let maps = kubectl(&["-n", PLACE, "get", "configmaps", "-o", "yaml"]).expect("an answer");
    assert!(!maps.contains("PRIVATE KEY"), "a ConfigMap of {} holds a key", tier.name);
    let pods = tier.pods().iter().map(name).collect::<Vec<_>>();
    for pod in pods {
        let log = run("kubectl", &["-n", PLACE, "logs", &pod, "--all-containers"], "").unwrap_or_default();
        assert!(!log.contains("PRIVATE KEY"), "the log of {pod} holds a key");
    }
}

#[test]
fn redis_7_0_encrypted() {
    check("redis-7-0-tls", REDIS_7_0, None);
}

#[test]
fn valkey_9_1_encrypted() {
    check("valkey-9-1-tls", VALKEY_9_1, None);
}

#[test]
fn clusters_valkey_9_1_encrypted() {
    check("cluster-tls", VALKEY_9_1, Some(SHARDS));
}
