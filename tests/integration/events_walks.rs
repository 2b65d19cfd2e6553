//! Patterns by hand: walks that go on where their sidecar died, that say how far they are, and that ask servers for pages of names alone; and the
//! patterns that take none.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::cache_aside::{ok, rule};
use crate::read_through::{Servers, policy};
use crate::support::admin::metric;
use crate::support::resp::Value;
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
/// How many keys there are: enough for a walk of some seconds.
const KEYS: usize = 40_000;

/// Two sidecars, and a socket of each.
struct Scene {
    servers: Servers,
    sidecars: Vec<(Sidecar, String)>,
    _directory: TempDir,
}

impl Scene {
    fn open(servers: Servers, rules: &[Json]) -> Self {
        let directory = TempDir::new().unwrap();
        let start = |number: usize| {
            let socket = directory.path().join(format!("{number}.sock")).display().to_string();
            let sidecar = Sidecar::start_with(&policy(servers.topology(), 1, &[], rules), &["--admin-socket", &socket]);
            (sidecar, socket)
        };
        let sidecars = (0..2).map(start).collect();
        Self { servers, sidecars, _directory: directory }
    }

    /// Takes out the sidecar that reads the stream of events. Where there never was one, nobody does.
    fn take_reader(&mut self) -> Sidecar {
        let event = self.servers.holder_of("larder:events").line("XADD larder:events * key item:none");
        assert!(!event.is_error(), "{event:?}");
        let reads = |(sidecar, _): &(Sidecar, String)| metric(sidecar, "larder_events_reading") == 1;
        wait_for("one to read the stream", LIMIT, || self.sidecars.iter().any(reads));
        let at = self.sidecars.iter().position(reads).expect("one reads");
        self.sidecars.remove(at).0
    }

    /// A command of a person's, of the last sidecar.
    fn begin(&self, arguments: &[&str]) -> Child {
        let (_, socket) = self.sidecars.last().expect("a sidecar");
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_larder")));
        command.arg("invalidate").args(arguments).args(["--socket", socket]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("larder runs")
    }

    fn run(&self, arguments: &[&str]) -> (String, String) {
        said(self.begin(arguments).wait_with_output().expect("it ends"))
    }

    /// Stores so many keys of each of these names past Larder.
    fn fill(&self, names: &[&str]) {
        let store = "for i = 1, tonumber(ARGV[2]) do redis.call('SET', ARGV[1] .. ':' .. i, 'v') end return 'OK'";
        for name in names {
            assert_eq!(
                self.servers.holder_of(name).call(&["EVAL", store, "0", name, &KEYS.to_string()]),
                Value::Bulk(b"OK".to_vec())
            );
        }
    }

    fn size(&self) -> i64 {
        self.servers.holder_of("item:1").line("DBSIZE").int()
    }

    /// How many keys the walk under way has removed, as it is written down for whoever goes on with it.
    fn noted(&self) -> i64 {
        let jobs = self.servers.holder_of("larder:events").line("HGET larder:es:{larder:events} jobs");
        let Value::Bulk(jobs) = jobs else { return 0 };
        let jobs: Json = serde_json::from_slice(&jobs).expect("JSON");
        jobs["current"]["removed"].as_i64().unwrap_or_default()
    }

    /// How often a command was carried out since [`Scene::forget_calls`].
    fn calls(&self, command: &str) -> u64 {
        let stats = self.servers.holder_of("item:1").line("INFO commandstats").text();
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or_default()
    }

    fn forget_calls(&self) {
        assert_eq!(self.servers.holder_of("item:1").line("CONFIG RESETSTAT"), ok());
    }
}

#[track_caller]
fn said(output: Output) -> (String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{out}{err}");
    (out, err)
}

/// Under one server, so that its statistics tell all that was asked of it.
#[test]
fn a_pattern_s_walk_is_resumed_says_how_far_it_is_and_never_sends_keys() {
    let rules = ["item", "other"].map(|name| rule(name, json!({}), json!({})));
    let mut scene = Scene::open(Servers::sentinel(), &rules);
    scene.fill(&["item", "other"]);
    // A trial counts, and takes nothing away.
    let tried = scene.run(&["--pattern", "item:{id}", "--dry-run"]).0;
    let counted: usize = tried.split(' ').rev().nth(2).and_then(|number| number.parse().ok()).unwrap_or_default();
    assert!(tried.ends_with("would go\n") && (KEYS..=KEYS + KEYS / 10).contains(&counted), "{tried}: SCAN may name a key twice");
    let all = scene.size();
    assert!(all >= 2 * KEYS as i64, "{all}");

    scene.forget_calls();
    let reader = scene.take_reader();
    let asking = scene.begin(&["--pattern", "item:{id}", "--wait"]);
    wait_for("it to be written down that keys are gone", LIMIT, || scene.noted() > 1_000);
    drop(reader);
    let left = scene.size() - KEYS as i64;
    assert!(left > 1_000, "it had not ended yet: {left}");
    let (out, err) = said(asking.wait_with_output().expect("it ends"));
    // What the first had removed when it was last written down is counted, which it would not be had the walk begun anew.
    let count: i64 = out.split(' ').find_map(|word| word.parse().ok()).unwrap_or_default();
    assert!(out.contains("the keys of the pattern `item:{id}`: invalidated") && count > left, "{out}: {left} were left");
    assert!(["walk 1 of 2", "walk 2 of 2", "keys removed"].iter().all(|words| err.contains(words)), "{err}");
    let (survivor, _) = &scene.sidecars[0];
    assert_eq!(metric(survivor, "larder_invalidation_walks_total"), 1);
    assert!((KEYS as i64..KEYS as i64 + 100).contains(&scene.size()), "the other rule's keys stay: {}", scene.size());
    assert_eq!(scene.calls("keys"), 0);
    assert!(scene.calls("scan") > 100 && scene.calls("unlink") > 0, "{} pages", scene.calls("scan"));
}

/// The pattern of a versioned rule, or one that has all of its keys and nobody else's: one write, and no name is looked at.
#[test]
fn a_pattern_that_has_all_keys_of_a_versioned_rule_takes_one_write() {
    let mut page = rule("page", json!({}), json!({}));
    page["versioned"] = json!(true);
    let scene = Scene::open(Servers::sentinel(), &[page, rule("item", json!({}), json!({}))]);
    let mut clients: Vec<_> = scene.sidecars.iter().map(|(sidecar, _)| sidecar.client()).collect();
    for pattern in ["page:{id}", "page:{anything}", "page:{path…}"] {
        let keys: Vec<String> = (0..200).map(|number| format!("page:{number}")).collect();
        wait_for("both to have the keys by one version", LIMIT, || {
            keys.iter().for_each(|key| assert_eq!(clients[0].call(&["SET", key, "v"]), ok()));
            clients.iter_mut().all(|client| keys.iter().all(|key| client.call(&["EXISTS", key]) == Value::Int(1)))
        });
        scene.forget_calls();
        let (out, _) = scene.run(&["--pattern", pattern, "--sync"]);
        assert_eq!(out, format!("the keys of the pattern `{pattern}`: invalidated\n"));
        for client in &mut clients {
            assert!(keys.iter().all(|key| client.call(&["EXISTS", key]) == Value::Int(0)), "{pattern}");
        }
        assert_eq!((scene.calls("keys"), scene.calls("unlink")), (0, 0), "{pattern}");
    }
    let seen: u64 = scene.sidecars.iter().map(|(sidecar, _)| metric(sidecar, "larder_invalidation_walk_seen_total")).sum();
    assert_eq!(seen, 0, "no name was looked at");
}
