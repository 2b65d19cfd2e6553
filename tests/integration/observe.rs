//! Policies that only observe: no byte is changed, and what they would have done is counted.

use serde_json::{Value as Json, json};
use tempfile::NamedTempFile;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, sentinel_topology};

const CLIENTS: usize = 20;

/// One rule of each kind that could change something, over `a:`, `r:` and `t:`.
fn rules(mode: &str, database: &NamedTempFile) -> Json {
    let ttl = json!({"default": "10m", "max": "1h", "jitter": "10%"});
    let stampede = json!({"lease": "30s", "wait": "10s", "earlyExpiry": 1.0, "atWaitEnd": "error"});
    let aside = json!({"cacheAside": {"ttl": ttl, "stale": "1m", "stampede": stampede}});
    let through = json!({"readThrough": {
        "ttl": ttl, "stale": "1m", "negativeTtl": "1m", "lease": "3s", "wait": "1s",
        "load": {"origin": "db", "query": {"sql": {"read": "SELECT 'loaded' WHERE $id <> ''"}}, "reply": null},
    }});
    json!({
        "origins": [{"name": "db", "kind": {"sql": {"url": {"value": format!("sqlite://{}", database.path().display())}}},
            "maxConnections": 2, "connectTimeout": "5s", "timeout": "5s"}],
        "rules": [
            {"name": "a", "keys": "a:{id…}", "mode": mode, "strategy": aside},
            {"name": "r", "keys": "r:{id…}", "mode": mode, "strategy": through},
            {"name": "t", "keys": "t:{id…}", "mode": mode, "strategy": {"cacheAside": {"ttl": ttl}}},
        ],
    })
}

fn sidecar(servers: &SentinelCluster, mut policy: Json) -> Sidecar {
    let fields = json!({
        "version": 2, "requires": 2, "generation": 1, "cluster": sentinel_topology(servers), "unmatched": {"bypass": {}},
    });
    policy.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Sidecar::start(&policy)
}

/// Rules whose keys pass untouched.
fn bypass() -> Json {
    let rule = |name: &str| json!({"name": name, "keys": format!("{name}:{{id…}}"), "strategy": {"bypass": {}}});
    json!({"rules": [rule("a"), rule("r"), rule("t")]})
}

/// Commands of every kind that a rule would change, `K` being a key's beginning.
const COMMANDS: &[&str] = &[
    "GET K1",
    "SET K1 v",
    "set K1 w",
    "GET K1",
    "SET K1 v NX",
    "SET K1 v XX GET",
    "SET K1 v KEEPTTL",
    "SET K1 v EX 99999999",
    "SETEX K1 99999999 v",
    "PSETEX K1 5000 v",
    "SETNX K2 v",
    "GETSET K2 w",
    "MSET K1 a K2 b K3 c",
    "MGET K1 K2 K3 K4 x1",
    "MGET K5 K6",
    "PERSIST K1",
    "EXPIRE K1 100 NX",
    "EXPIRE K1 99999999",
    "EXPIREAT K1 99999999999",
    "GETEX K1 PERSIST",
    "GETEX K1 EX 99999999",
    "STRLEN K7",
    "EXISTS K7",
    "GETRANGE K7 0 1",
    "GET K7",
    "DEL K1 K7",
    "GET K1",
    "APPEND K1 x",
    "INCR K8",
    "RPUSH K9 a b",
    "GET K9",
    "LPOP K9 5",
    "HSET Kh f v",
    "RENAME Kh Ki",
    "COPY Ki Kh",
    "EVAL return(redis.call('SET',KEYS[1],ARGV[1])) 1 Ke v",
    "UNLINK Ke",
    "MULTI",
    "GET K1",
    "SET K1 v",
    "INCR K8",
    "EXEC",
    "GET K1",
];

/// What the server was sent by clients of `sidecar`, connections of its own left out, and what the clients were answered.
fn recorded(servers: &SentinelCluster, sidecar: &Sidecar) -> (Vec<String>, Vec<Value>) {
    let mut monitor = servers.primary().client();
    assert_eq!(monitor.line("MONITOR"), Value::Simple("OK".to_owned()));
    let (mut one, mut other) = (sidecar.client(), sidecar.client());
    let mut replies = Vec::new();
    for kind in ["a:", "r:", "t:"] {
        for line in COMMANDS {
            let line = line.replace('K', kind);
            let client = if line.starts_with("GET ") && !line.contains('8') { &mut other } else { &mut one };
            replies.push(client.line(&line));
        }
        let pipeline: Vec<u8> =
            COMMANDS.iter().flat_map(|line| encode(&line.replace('K', kind).split(' ').collect::<Vec<_>>())).collect();
        one.send(&pipeline).unwrap();
        replies.extend(COMMANDS.iter().map(|_| one.read().unwrap()));
        // A read that several have missed, in the hands of one that is gone.
        let mut gone = sidecar.client();
        replies.push(gone.line(&format!("GET {kind}gone")));
        drop(gone);
        replies.push(one.line(&format!("GET {kind}gone")));
    }
    one.line("SET the-end x");
    let mut lines = Vec::new();
    loop {
        let line = monitor.read().unwrap().text();
        let command = line.split_once("] ").expect("a command").1.to_owned();
        if command.contains("the-end") {
            servers.primary().client().line("FLUSHALL");
            return (lines, replies);
        }
        const OWN: [&str; 6] = ["\"PING\"", "\"ROLE\"", "\"INFO\"", "\"HELLO\"", "\"CLIENT\"", "\"PUBLISH\""];
        if !OWN.iter().any(|own| command.to_uppercase().starts_with(own)) {
            lines.push(command);
        }
    }
}

#[test]
fn the_server_cannot_tell_observing_from_bypassing() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let database = NamedTempFile::new().unwrap();
    let (sent, answered) = recorded(&servers, &sidecar(&servers, bypass()));
    let observing = sidecar(&servers, rules("observe", &database));
    assert_eq!(recorded(&servers, &observing), (sent.clone(), answered.clone()));
    assert!(sent.len() >= 2 * 3 * COMMANDS.len(), "{} commands were recorded", sent.len());
    assert_eq!(answered.len(), 3 * (2 * COMMANDS.len() + 2));
    // The same under Enforce is something else: the comparison can fail.
    let enforcing = recorded(&servers, &sidecar(&servers, rules("enforce", &database)));
    assert!(enforcing.0 != sent && enforcing.1 != answered);
    assert!(count(&observing, "t", "predicted_ttl_added") > 10);
}

fn count(sidecar: &Sidecar, rule: &str, counter: &str) -> i64 {
    let stats = sidecar.client().call(&["LARDER.STATS", rule]);
    let counts = stats.items()[1].items();
    let at = counts.iter().position(|name| *name == Value::Bulk(counter.as_bytes().to_vec()));
    counts[at.unwrap_or_else(|| panic!("no {counter}")) + 1].int()
}

/// A stampede on one key, and a load that outlasts a deletion.
fn stampede(sidecar: &Sidecar) {
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| sidecar.client()).collect();
    clients.iter_mut().for_each(|client| assert_eq!(client.line("GET a:hot"), Value::Nil));
    clients.iter_mut().for_each(|client| assert_eq!(client.line("SET a:hot loaded"), Value::Simple("OK".to_owned())));
    let [slow, quick, ..] = &mut clients[..] else { panic!("clients") };
    assert_eq!(slow.line("GET a:late"), Value::Nil);
    assert_eq!(quick.line("DEL a:late").int(), 0);
    slow.line("SET a:late old");
}

#[test]
fn what_leases_would_have_done_is_counted() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let database = NamedTempFile::new().unwrap();
    let sidecar = sidecar(&servers, rules("observe", &database));
    stampede(&sidecar);
    let predicted = |counter: &str| count(&sidecar, "a", counter);
    assert_eq!(predicted("misses"), CLIENTS as i64 + 1);
    assert_eq!(predicted("predicted_loads_saved"), CLIENTS as i64 - 1);
    assert_eq!(predicted("predicted_stampede"), CLIENTS as i64);
    // Those who would have waited would not have stored anything.
    assert_eq!(predicted("predicted_ttl_added"), 2);
    assert_eq!(predicted("predicted_ambiguous_fills"), 1);
    let explained = sidecar.client().line("LARDER.EXPLAIN a:hot");
    let texts: Vec<String> = explained.items().iter().filter(|item| matches!(item, Value::Bulk(_))).map(Value::text).collect();
    assert!(texts.iter().any(|text| text.starts_with("Observe: nothing is changed")), "{texts:?}");
    assert!(texts.iter().any(|text| text == "atWaitEnd"), "{texts:?}");
    assert_eq!(servers.primary().client().line("PTTL a:hot").int(), -1);
}

/// What an application does with a key that all its threads want: those that miss load for a while, and store.
fn run(sidecar: &Sidecar) {
    for key in ["a:1", "a:2", "a:3"] {
        std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut client = sidecar.client();
                    if client.call(&["GET", key]) == Value::Nil {
                        std::thread::sleep(std::time::Duration::from_secs(1));
                        assert_eq!(client.call(&["SET", key, "loaded"]), Value::Simple("OK".to_owned()));
                    }
                });
            }
        });
    }
    let (mut slow, mut quick) = (sidecar.client(), sidecar.client());
    assert_eq!(slow.line("GET a:late"), Value::Nil);
    quick.line("DEL a:late");
    slow.line("SET a:late old");
}

/// The same application under Observe, then under Enforce: what was predicted is what is got, up to the few clients that a busy
/// machine starts only when the first have loaded.
#[test]
fn predictions_come_true() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let database = NamedTempFile::new().unwrap();
    let observing = sidecar(&servers, rules("observe", &database));
    run(&observing);
    drop(servers.primary().client().line("FLUSHALL"));
    let enforcing = sidecar(&servers, rules("enforce", &database));
    run(&enforcing);
    let (wanted, most) = (3 * (CLIENTS as i64 - 1), 3 * CLIENTS as i64 / 10);
    let (predicted, got) = (count(&observing, "a", "predicted_loads_saved"), count(&enforcing, "a", "loads_saved"));
    assert!(predicted <= wanted && predicted >= wanted - most, "{predicted} of {wanted} loads were predicted to be saved");
    assert!((predicted - got).abs() <= most, "{predicted} loads were predicted to be saved, and {got} were");
    assert_eq!(count(&enforcing, "a", "leases"), 4);
    let refused = count(&enforcing, "a", "ambiguous_fills") + count(&enforcing, "a", "late_fills");
    assert_eq!((count(&observing, "a", "predicted_ambiguous_fills"), refused), (1, 1));
    assert_eq!(count(&observing, "a", "predicted_ttl_added"), count(&enforcing, "a", "ttl_added"));
}
