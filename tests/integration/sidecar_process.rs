//! The sidecar as a process: its policy's changes, its end, its admin port.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::read_through::{Servers, http_origin, policy, web_rule};
use crate::support::admin::{get, metric, rule_count};
use crate::support::certificates::swap_to;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

fn aside(name: &str, ttl: &str) -> Json {
    let ttl = json!({"default": ttl, "max": "10h", "jitter": "0%"});
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"cacheAside": {"ttl": ttl}}})
}

/// One client of many: writes and reads in pipelines until it is told to stop. Every reply is known.
fn pipeline_until(client: &mut Client, number: usize, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        let (cold, key) = (format!("item:{number}-{round}"), format!("aside:{number}"));
        let commands = [
            encode(&["SET", &key, "x"]),
            encode(&["GET", &key]),
            encode(&["GET", &cold]),
            encode(&["MGET", &key, &cold]),
            encode(&["PING"]),
        ];
        client.send(&commands.concat().repeat(4)).unwrap();
        let (x, page) = (Value::Bulk(b"x".to_vec()), Value::Bulk(b"page".to_vec()));
        for _ in 0..4 {
            assert_eq!(client.read().unwrap(), Value::Simple("OK".to_owned()));
            assert_eq!(client.read().unwrap(), x);
            assert_eq!(client.read().unwrap(), page);
            assert_eq!(client.read().unwrap(), Value::Array(vec![x.clone(), page.clone()]));
            assert_eq!(client.read().unwrap(), Value::Simple("PONG".to_owned()));
        }
        round = (round + 1) % 50;
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether a key written through `sidecar` now has a TTL of so many seconds, give or take a pause of this test.
fn writes_live_for(secs: i64, servers: &Servers, sidecar: &Sidecar) -> bool {
    assert_eq!(sidecar.client().line("SET aside:probe x"), Value::Simple("OK".to_owned()));
    let ttl = servers.holder_of("aside:probe").line("PTTL aside:probe").int();
    ((secs - 60) * 1000..=secs * 1000).contains(&ttl)
}

#[test]
fn a_policy_changes_under_load_without_an_error() {
    let (servers, web) = (Servers::cluster(), Web::start());
    (0..50).for_each(|number| (0..50).for_each(|round| web.put(&format!("/item/{number}-{round}"), "page")));
    let origins = [http_origin("web", &web, "20s")];
    // The rules' order changes too: what is under way when it does must not take one rule for another.
    let item = || web_rule("item", json!({"ttl": {"default": "200ms", "max": "1h", "jitter": "0%"}}));
    let of = |generation: u64, ttl: &str| {
        let mut rules = vec![aside("aside", ttl), item(), web_rule("decoy", json!({"negativeTtl": "1h"}))];
        rules.rotate_left(generation as usize % 3);
        policy(servers.topology(), generation, &origins, &rules)
    };
    let sidecar = Sidecar::start(&of(1, "100s"));
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..50)
            .map(|number| {
                let (mut client, stop, rounds) = (sidecar.client(), &stop, &rounds);
                scope.spawn(move || pipeline_until(&mut client, number, stop, rounds))
            })
            .collect();
        assert!(writes_live_for(100, &servers, &sidecar));
        for generation in 2..=6 {
            let ttl = i64::try_from(generation * 1000).unwrap();
            sidecar.replace_snapshot(&of(generation, &format!("{ttl}s")).to_string());
            // How soon it is seen is a matter of the watched files; nothing else waits.
            wait_for("the new TTL", LIMIT, || writes_live_for(ttl, &servers, &sidecar));
        }
        for (count, bad) in ["{", "{\"version\": 1}", &of(7, "0s").to_string()].iter().enumerate() {
            sidecar.replace_snapshot(bad);
            let rejected = || metric(&sidecar, "larder_policy_rejected_total") == count as u64 + 1;
            wait_for("the bad policy to be refused", LIMIT, rejected);
            let told = sidecar.log().matches("a new policy is refused, the last good one stays in force").count();
            assert_eq!(told, count + 1, "{}", sidecar.log());
            assert!(writes_live_for(6000, &servers, &sidecar));
        }
        assert_eq!(metric(&sidecar, "larder_policy_generation"), 6);
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
    assert!(rounds.load(Ordering::Relaxed) > 50, "the clients were busy");
}

#[test]
fn unmatched_keys_are_refused_wherever_they_lie() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let mut snapshot = policy(servers.topology(), 1, &[], &[aside("aside", "1h")]);
        snapshot["unmatched"] = json!({"refuse": {}});
        let sidecar = Sidecar::start(&snapshot);
        let mut client = sidecar.client();
        for command in [
            "GET plain",
            "SET plain x",
            "MGET aside:1 plain",
            "MSET aside:1 x plain x",
            "DEL aside:1 aside:2 plain",
            "EXISTS aside:1 plain",
            "RENAME {aside:1}:x plain{aside:1}",
        ] {
            let Value::Error(text) = client.line(command) else { panic!("{command} is refused") };
            assert!(text.starts_with("NOPERM no rule of the policy covers"), "{command}: {text}");
        }
        assert_eq!(client.line("MSET aside:1 x aside:2 y"), Value::Simple("OK".to_owned()));
        assert_eq!(client.line("MGET aside:1 aside:2").items().len(), 2);
        assert_eq!(servers.holder_of("plain").line("EXISTS plain"), Value::Int(0));
    }
}

#[test]
fn unmatched_keys_get_a_ttl_where_the_policy_says_so() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let bypassed = json!({"name": "queue", "keys": "queue:{id}", "strategy": {"bypass": {}}});
        let mut snapshot = policy(servers.topology(), 1, &[], &[aside("aside", "1h"), bypassed]);
        snapshot["unmatched"] = json!({"ttl": {"default": "100s", "max": "200s", "jitter": "0%"}});
        let sidecar = Sidecar::start(&snapshot);
        let mut client = sidecar.client();
        for command in ["SET plain x", "HSET hash field x", "SET long x EX 1000", "SET aside:1 x", "RPUSH queue:1 x"] {
            assert!(!client.line(command).is_error(), "{command}");
        }
        for (key, ttl) in
            [("plain", 90..=100), ("hash", 90..=100), ("long", 190..=200), ("aside:1", 3500..=3600), ("queue:1", -1..=-1)]
        {
            let left = servers.holder_of(key).line(&format!("TTL {key}")).int();
            assert!(ttl.contains(&left), "{key} lives for {left} s");
        }
    }
}

/// Kubernetes swaps a symbolic link above a mounted file.
#[test]
fn a_snapshot_behind_a_swapped_link_is_taken_up() {
    let (servers, dir) = (Servers::cluster(), tempfile::TempDir::new().unwrap());
    let of = |generation| policy(servers.topology(), generation, &[], &[aside("aside", &format!("{generation}000s"))]);
    for generation in 1..=3 {
        let version = dir.path().join(generation.to_string());
        std::fs::create_dir(&version).unwrap();
        std::fs::write(version.join("snapshot.json"), of(generation).to_string()).unwrap();
    }
    let sidecar = Sidecar::start(&of(1));
    swap_to(&dir, "1");
    // The file becomes a link of such a kind.
    let link = sidecar.snapshot_path().with_extension("link");
    std::os::unix::fs::symlink(dir.path().join("..data/snapshot.json"), &link).unwrap();
    std::fs::rename(link, sidecar.snapshot_path()).unwrap();
    for generation in 2..=3 {
        swap_to(&dir, &generation.to_string());
        wait_for("the policy behind the link", LIMIT, || metric(&sidecar, "larder_policy_generation") == generation);
        wait_for("its TTL", LIMIT, || writes_live_for(i64::try_from(generation * 1000).unwrap(), &servers, &sidecar));
    }
}

#[test]
fn a_stop_answers_what_is_under_way() {
    let (servers, web) = (Servers::cluster(), Web::start());
    web.put("/item/1", "loaded");
    web.hold("/item/1");
    let mut sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &[web_rule("item", json!({}))]);
    let mut idle = sidecar.client();
    assert_eq!(idle.line("PING"), Value::Simple("PONG".to_owned()));
    let mut busy = sidecar.client();
    let sets: Vec<Vec<u8>> = (0..100).map(|index| encode(&["SET", &format!("plain:{index}"), "x"])).collect();
    busy.send(&[sets.concat(), encode(&["GET", "item:1"]), encode(&["GET", "plain:1"])].concat()).unwrap();
    wait_for("the load to begin", LIMIT, || web.under_way("/item/1") == 1);
    sidecar.signal("TERM");
    wait_for("new clients to be turned away", LIMIT, || Client::connect(sidecar.port()).is_err());
    assert!(idle.read().is_err(), "an idle connection ends");
    web.release("/item/1");
    for _ in 0..100 {
        assert_eq!(busy.read().unwrap(), Value::Simple("OK".to_owned()));
    }
    assert_eq!(busy.read().unwrap().text(), "loaded");
    assert_eq!(busy.read().unwrap().text(), "x");
    assert!(busy.read().is_err(), "then the connection ends");
    let status = sidecar.wait_for_end(LIMIT);
    assert_eq!(status.code(), Some(0), "{}", sidecar.log());
}

#[test]
fn a_stop_ends_within_its_bound_whatever_hangs() {
    let (servers, web) = (Servers::sentinel(), Web::start());
    web.hold("/item/1");
    let snapshot = policy(servers.topology(), 1, &[http_origin("web", &web, "1h")], &[web_rule("item", json!({"wait": "1h"}))]);
    let mut sidecar = Sidecar::start_with(&snapshot, &["--drain", "1s"]);
    let mut client = sidecar.client();
    client.send(&encode(&["GET", "item:1"])).unwrap();
    wait_for("the load to hang", LIMIT, || web.under_way("/item/1") == 1);
    sidecar.signal("TERM");
    let status = sidecar.wait_for_end(Duration::from_secs(1) * 10);
    assert_eq!(status.code(), Some(0), "{}", sidecar.log());
    assert!(client.read().is_err());
}

#[test]
fn the_admin_port_tells_what_happened() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let rules = [web_rule("item", json!({"negativeTtl": "1h"})), aside("aside", "1h")];
    let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &rules);
    for path in ["/livez", "/readyz"] {
        assert_eq!(get(&sidecar, path).0, 200, "{path}");
    }
    for private in ["/policy", "/explain?key=item:1"] {
        assert_eq!(get(&sidecar, private).0, 404, "policy and keys are for the Unix socket");
    }
    web.put("/item/1", "one");
    let mut client = sidecar.client();
    for _ in 0..10 {
        assert_eq!(client.line("GET item:1").text(), "one");
    }
    for _ in 0..4 {
        assert_eq!(client.line("GET item:2"), Value::Nil);
    }
    client.line("SET aside:1 x");
    client.line("GET aside:1");
    client.line("GET aside:2");
    client.line("MGET item:1 item:2 aside:1 plain");
    let counts = ["hits", "misses", "loads", "loads_saved", "coalesced", "stale", "negative", "load_errors", "ttl_added"];
    let counted = |rule: &str| counts.map(|count| rule_count(&sidecar, rule, count));
    assert_eq!(counted("item"), [10, 6, 2, 4, 0, 0, 4, 0, 0]);
    assert_eq!(counted("aside"), [2, 1, 0, 0, 0, 0, 0, 0, 1]);
    let (_, metrics) = get(&sidecar, "/metrics");
    assert!(metrics.ends_with("# EOF\n"));
    assert!(!metrics.contains("item:1"), "keys are no labels");
    assert!(metric(&sidecar, "larder_clients") >= 1);
    // One command in 64 is timed.
    (0..500).for_each(|number| drop(client.line(&format!("GET plain:{number}"))));
    let Servers::Cluster(cluster) = &servers else { panic!("a Cluster was started") };
    for server in &cluster.servers {
        let asked = metric(&sidecar, &format!("larder_node_requests_total{{node=\"{}\"}}", server.address()));
        assert!(asked > 100, "{asked} commands are counted at {}", server.address());
    }
    for part in ["proxy", "upstream"] {
        let timed = metric(&sidecar, &format!("larder_request_duration_seconds_count{{part=\"{part}\"}}"));
        assert!((1..500).contains(&timed), "{timed} timed on the part of the {part}");
    }
}
