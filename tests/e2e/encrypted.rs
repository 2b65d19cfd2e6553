//! Tiers that speak TLS: made, given new certificates under a client that stays connected, and failed over.

use std::env;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{eventually, get, kubectl, name, run, uid};
use super::install::{self, PLACE};
use super::report::{self, Line};
use super::tier::{Engine, REDIS_7_0, Tier, VALKEY_9_1};

/// Kubelets bring new files within a minute or two, and sentinels are replaced one after the other.
const ROTATES_WITHIN: Duration = Duration::from_secs(420);

/// A client with one connection, which counts up twenty times a second.
struct Counter {
    child: Child,
    output: PathBuf,
}

impl Counter {
    fn start(tier: &Tier, pod: &str) -> Self {
        let output = env::temp_dir().join(format!("larder-e2e-{}-{}.counter", tier.name, std::process::id()));
        let file = File::create(&output).expect("a file");
        let mut line = tier.client_line("app", "first", pod, "6379");
        line.extend(["-r", "100000", "-i", "0.05", "INCR", "counter"].map(str::to_owned));
        let mut command = Command::new("kubectl");
        command.args(line).stdin(Stdio::null()).stdout(file.try_clone().expect("a file")).stderr(file);
        Self { child: command.spawn().expect("kubectl runs"), output }
    }

    fn said(&self) -> Vec<String> {
        fs::read_to_string(&self.output).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn await_more(&self) {
        let before = self.said().len();
        eventually("the counter goes on", Duration::from_secs(60), || match self.said().len() {
            now if now >= before + 20 => Ok(()),
            now => Err(format!("{now} lines: {:?}", self.said().last())),
        });
    }

    /// Ends it. Each line must be the next number: an error, or a connection that was made anew and said so, is another line.
    fn finish(mut self) -> usize {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.said();
        let _ = fs::remove_file(&self.output);
        let mut expected = 0_u64;
        // The last line may have been cut off.
        for line in said.iter().take(said.len().saturating_sub(1)) {
            expected += 1;
            let number = line.trim_start_matches("(integer) ").trim();
            assert_eq!(number.parse(), Ok(expected), "the counter said {line:?}");
        }
        said.len()
    }
}

/// How many of the pods have shown the newest certificates.
fn certificates(tier: &Tier) -> Value {
    tier.object()["status"]["certificates"].clone()
}

fn await_certificates(tier: &Tier, rotation: &Value) -> Value {
    let of = |count: usize| json!(format!("{count}/{count}"));
    eventually(&format!("{} shows its certificates", tier.name), ROTATES_WITHIN, || {
        let found = certificates(tier);
        let whole = found["servers"] == of(2) && found["sentinels"] == of(3) && &found["rotation"] == rotation;
        if whole { Ok(found) } else { Err(found.to_string()) }
    })
}

fn check(title: &str, engine: Engine) {
    let _cluster = install::cluster();
    let (tier, took) = Tier { name: title.to_owned(), engine, durable: false, tls: true }.make();
    let made = format!("made and ready within {} s", took.as_secs());
    report::add(Line { tier: tier.name.clone(), case: made, report: None, problem: None });
    let before = await_certificates(&tier, &Value::Null);
    let primary = tier.primary();
    // Nobody is served without TLS.
    let plain = Tier { name: tier.name.clone(), engine, durable: false, tls: false };
    assert_ne!(plain.ask(&primary, "6379", &["ping"]).as_deref(), Ok("PONG"));
    published(&tier);

    let (servers, sentinels) = (tier.server_uids(), tier.sentinels().iter().map(uid).collect::<Vec<_>>());
    let counter = Counter::start(&tier, &primary);
    counter.await_more();
    tier.patch(&json!({"tls": {"enabled": true, "rotation": "again"}}));
    let after = await_certificates(&tier, &json!("again"));
    tier.settle("with new certificates");
    counter.await_more();
    let count = counter.finish();
    assert_ne!(after["fingerprint"], before["fingerprint"]);
    assert_eq!(tier.server_uids(), servers, "servers take certificates up while they run");
    let kept = tier.sentinels().iter().map(uid).filter(|uid| sentinels.contains(uid)).count();
    assert_eq!(kept, 0, "sentinels read theirs when they start");
    assert_eq!(tier.primary(), primary, "nothing was failed over");
    let case = format!("certificates rotated; {count} commands over one connection without an error");
    report::add(Line { tier: tier.name.clone(), case, report: None, problem: None });

    kubectl(&["-n", PLACE, "delete", "pod", &primary, "--wait=false"]).expect("deleted");
    eventually("another primary", Duration::from_secs(120), || {
        let now = tier.primary();
        if now == primary { Err(format!("{now} still is")) } else { Ok(()) }
    });
    tier.settle("after its primary's pod was deleted");
    let counted = tier.ask(&tier.primary(), "6379", &["get", "counter"]).expect("an answer");
    assert!(counted.parse::<usize>().is_ok_and(|counted| counted + 1 >= count), "{counted} of {count}");
    tier.delete();
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
    check("redis-7-0-tls", REDIS_7_0);
}

#[test]
fn valkey_9_1_encrypted() {
    check("valkey-9-1-tls", VALKEY_9_1);
}
