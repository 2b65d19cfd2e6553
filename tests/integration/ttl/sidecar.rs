//! The rule through a real sidecar: for one client, who gets a bare server's replies, and under several at once.

use larder::sidecar::slots::slot_of;
use serde_json::{Value as Json, json};
use tempfile::NamedTempFile;

use super::templates::{self, Keys, Random, Words};
use super::{LIFETIME, Observer, STALE, Way, compare, copied_keys, copies, covered_keys, offenders};
use crate::command_table::server_commands;
use crate::support::resp::{Client, Value, encode, show};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, cluster_topology, sentinel_topology};

const CLIENTS: u64 = 4;
/// How often each client sends every template.
const ROUNDS: usize = 12;

/// The rules of [`super::Rules`]: `c:` and `b:` are covered, `r:` is loaded through, `s:` has stale copies,
/// `u:` is nobody's.
fn sidecar(topology: Json, database: &NamedTempFile) -> Sidecar {
    let ttl = json!({"default": LIFETIME.default, "max": LIFETIME.max, "jitter": "10%"});
    let aside = |name: &str| json!({"name": name, "keys": format!("{name}:{{id…}}"), "strategy": {"cacheAside": {"ttl": ttl}}});
    let through: Json = json!({"name": "r", "keys": "r:{id…}", "strategy": {"readThrough": {
        "ttl": ttl, "stale": "1m", "negativeTtl": "1m", "lease": "1s", "wait": "1s",
        "load": {"origin": "db", "query": {"sql": {"read": "SELECT 'loaded' WHERE $id <> ''"}}, "reply": null},
    }}});
    let copied: Json = json!({"name": "s", "keys": "s:{id…}", "strategy": {"cacheAside": {
        "ttl": ttl, "stale": STALE, "stampede": {"lease": "3s", "wait": "1s", "atWaitEnd": "error"},
    }}});
    Sidecar::start(&json!({
        "version": 2, "requires": 2, "generation": 1, "cluster": topology, "unmatched": {"bypass": {}},
        "origins": [{"name": "db", "kind": {"sql": {"url": {"value": format!("sqlite://{}", database.path().display())}}}, "maxConnections": 2,
            "connectTimeout": "5s", "timeout": "5s"}],
        "rules": [aside("c"), aside("b"), through, copied],
    }))
}

impl Way for Client {
    fn client(&mut self) -> &mut Client {
        self
    }

    fn call(&mut self, words: &Words) -> Value {
        Client::call(self, words)
    }

    fn transaction(&mut self, batch: &[Words]) -> Value {
        assert_eq!(self.line("MULTI"), Value::Simple("OK".to_owned()));
        for words in batch {
            assert_eq!(Client::call(self, words), Value::Simple("QUEUED".to_owned()), "{}", show(words));
        }
        self.line("EXEC")
    }
}

#[test]
fn a_client_of_a_sidecar_gets_a_bare_servers_replies_and_no_covered_key_is_without_a_ttl() {
    for (engine, resp3) in [(Engine::Redis7, false), (Engine::Valkey9, true)] {
        let servers = SentinelCluster::start(engine, 0);
        let database = NamedTempFile::new().unwrap();
        let sidecar = sidecar(sentinel_topology(&servers), &database);
        compare(&Redis::start(engine), servers.primary(), Keys::Plain, resp3, 21, sidecar.client());
    }
}

#[test]
fn a_client_of_a_sidecar_before_a_cluster_gets_a_bare_nodes_replies_and_no_covered_key_is_without_a_ttl() {
    for (engine, resp3) in [(Engine::Redis7, true), (Engine::Valkey9, false)] {
        let (servers, bare) = (RedisCluster::start(engine, 3, 0), RedisCluster::start(engine, 1, 0));
        let database = NamedTempFile::new().unwrap();
        let sidecar = sidecar(cluster_topology(&servers), &database);
        let owner = servers.owner(slot_of(b"{t}"));
        compare(bare.shard(0), owner, Keys::Tagged, resp3, 22, sidecar.client());
    }
}

/// Sends random templates, some in transactions.
fn send(client: &mut Client, templates: &mut [&str], random: &mut Random) -> u64 {
    let mut succeeded = 0;
    for _ in 0..ROUNDS {
        random.shuffle(templates);
        let mut rest = &*templates;
        while !rest.is_empty() {
            let (batch, tail) = rest.split_at(random.batch().min(rest.len()));
            rest = tail;
            let wrapped = batch.len() > 1;
            if wrapped {
                assert_eq!(client.line("MULTI"), Value::Simple("OK".to_owned()));
            }
            for line in batch {
                let words = random.fill(line);
                let reply = client.try_call(&words).unwrap_or_else(|error| panic!("{}: {error}", show(&words)));
                succeeded += u64::from(!reply.is_error());
            }
            if wrapped {
                client.line("EXEC");
            }
        }
    }
    succeeded
}

#[test]
fn no_covered_key_is_without_a_ttl_behind_a_sidecar() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let database = NamedTempFile::new().unwrap();
    let (sidecar, primary) = (sidecar(sentinel_topology(&servers), &database), servers.primary());
    assert!(!primary.client().call(&["FUNCTION", "LOAD", "REPLACE", templates::LIBRARY]).is_error());
    assert_eq!(primary.client().call(&["SCRIPT", "LOAD", templates::SCRIPT]).text(), templates::SCRIPT_SHA);
    let names: Vec<String> = server_commands(&mut primary.client()).into_iter().map(|command| command.name).collect();
    let known: Vec<&str> = templates::ALL.iter().copied().filter(|line| names.contains(&templates::name(line))).collect();
    let observer = Observer::start(primary, Keys::Plain);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..CLIENTS)
            .map(|seed| {
                let (mut client, mut random, mut known) =
                    (sidecar.client(), Random::new(seed, Keys::Plain, &mut primary.client()), known.clone());
                scope.spawn(move || send(&mut client, &mut known, &mut random))
            })
            .collect();
        let succeeded: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
        assert!(succeeded > CLIENTS * known.len() as u64 * ROUNDS as u64 / 2, "only {succeeded} commands succeeded");
    });
    observer.finish();
    let bad = offenders(&mut primary.client(), &covered_keys(Keys::Plain));
    assert!(bad.is_empty(), "{bad:?}");
    assert_eq!(sidecar.client().line("SET s:str1 v"), Value::Simple("OK".to_owned()));
    let (seen, wrong) = copies(&mut primary.client(), &copied_keys(Keys::Plain));
    assert!(seen > 0 && wrong.is_empty(), "of {seen} stale copies {wrong:?} are not right");
    assert!(primary.client().line("DBSIZE").int() > 20);
}

/// What MONITOR shows until `last`, without the times and addresses.
fn monitored(monitor: &mut Client, last: &str) -> Vec<String> {
    let mut shown = Vec::new();
    loop {
        let line = monitor.read().unwrap().text();
        let command = line.split_once("] ").expect("a command").1.to_owned();
        if command.contains(last) {
            return shown;
        }
        if command.contains("\"u:") || command.contains("MULTI") {
            shown.push(command);
        }
    }
}

#[test]
fn bypassed_keys_pass_untouched() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let database = NamedTempFile::new().unwrap();
    let sidecar = sidecar(sentinel_topology(&servers), &database);
    let mut monitor = servers.primary().client();
    assert_eq!(monitor.line("MONITOR"), Value::Simple("OK".to_owned()));
    let commands = [
        "SET u:1 v",
        "set u:1 v KEEPTTL",
        "SETEX u:1 99999999 v",
        "PERSIST u:1",
        "MSET u:1 a u:2 b",
        "rpush u:3 a b",
        "RENAME u:3 u:4",
        "EXPIRE u:4 99999999 NX",
        "GETEX u:1 PERSIST",
        "DEL u:2 u:4",
    ];
    let mut client = sidecar.client();
    client.send(&commands.map(|line| encode(&line.split(' ').collect::<Vec<_>>())).concat()).unwrap();
    commands.iter().for_each(|line| assert!(!client.read().unwrap().is_error(), "{line}"));
    client.line("SET end x");
    let quoted = |line: &str| line.split(' ').map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" ");
    assert_eq!(monitored(&mut monitor, "\"end\""), commands.map(quoted));
    assert_eq!(servers.primary().client().line("PTTL u:1"), Value::Int(-1));
}
