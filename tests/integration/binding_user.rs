//! The user of a binding at real servers: under it a sidecar does all that its policies ask for, and nothing beyond their keys is let
//! through.

mod moving;
mod passwords;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use larder::api::CachePolicy;
use larder::operator::cache_cluster::users::{Access, Users};
use larder::operator::cache_policy::merge::{Merged, Namespace, merge};
use larder::operator::cache_policy::origins::KnownSecrets;
use larder::operator::cache_policy::passwords::Passwords;
use larder::operator::cache_policy::place::Place;
use larder::operator::cache_policy::user;
use larder::operator::cache_policy::workload::Workload;
use larder::policy::Snapshot;
use larder::policy::binding::{BindingName, SECRET_DIR};
use larder::policy::events::{state_key, turn_key};
use larder::policy::snapshot::Topology;
use larder::sidecar::slots::slot_of;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::origin_sqlite::database;
use crate::support::admin::{metric, rule_count};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, PRIMARY_NAME, Redis, RedisCluster, Sentinel, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const PASSWORD: &str = "binding-password";

enum Servers {
    Sentinel(SentinelCluster),
    Cluster(RedisCluster),
}

impl Servers {
    fn all(&self) -> &[Redis] {
        match self {
            Self::Sentinel(servers) => &servers.servers,
            Self::Cluster(servers) => &servers.servers,
        }
    }

    /// Every place at which a binding has a user, with what is listening there.
    fn admins(&self) -> Vec<Client> {
        let servers = self.all().iter().map(Redis::client);
        let Self::Sentinel(tier) = self else { return servers.collect() };
        servers.chain(tier.sentinels.iter().map(Sentinel::client)).collect()
    }

    fn place(&self) -> Place {
        let topology = match self {
            Self::Sentinel(servers) => Topology::Sentinel { master: PRIMARY_NAME.to_owned(), sentinels: servers.addresses() },
            Self::Cluster(servers) => Topology::Cluster { seeds: servers.addresses() },
        };
        Place { topology, tls: false, keeping: None }
    }

    /// The server that holds `key`, asked past Larder.
    fn holder_of(&self, key: &str) -> Client {
        match self {
            Self::Sentinel(servers) => servers.primary().client(),
            Self::Cluster(servers) => servers.owner(slot_of(key.as_bytes())).client(),
        }
    }

    fn expire(&self, key: &str) {
        let mut server = self.holder_of(key);
        assert_eq!(server.call(&["PEXPIRE", key, "1"]).int(), 1, "{key} is there");
        wait_for("the key to expire", LIMIT, || server.call(&["PTTL", key]).int() == -2);
    }
}

/// Leases with stale copies and early expiry, loads from a database, and keys that are left alone.
fn policy() -> CachePolicy {
    let spec = json!({
        "cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}, "defaults": {"ttlSweep": "10s"},
        "origins": [{"name": "db", "sql": {"url": {"secretKeyRef": {"name": "shop-db", "key": "url"}}}}],
        "rules": [
            {"name": "item", "keys": "item:{id}", "strategy": "CacheAside", "ttl": "1h", "stale": "10m",
                "stampede": {"lease": "20s", "wait": "19s", "earlyExpiry": 1.0}},
            {"name": "user", "keys": "user:{id}", "strategy": "ReadThrough", "ttl": "1h", "stale": "10m",
                "origin": {"name": "db", "read": "SELECT name FROM users WHERE id = $id"}},
            {"name": "odd", "keys": "odd \"{id}\" [{name}]*", "strategy": "CacheAside", "ttl": "1h"},
            {"name": "queue", "keys": "queue:{name…}", "strategy": "Bypass"},
            {"name": "page", "keys": "page:{group}:{id}", "strategy": "CacheAside", "invalidate": {"versioned": "Rule", "tags": ["group:{group}"]}},
            {"name": "doc", "keys": "doc:{id}", "strategy": "CacheAside", "invalidate": {"versioned": "Entity"}},
        ],
    });
    CachePolicy::new("shop", serde_json::from_value(spec).expect("a specification"))
}

fn merged(place: Place, url: &str) -> Merged {
    let workload = Workload {
        namespace: "default".to_owned(),
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        name: "shop".to_owned(),
        uid: "u".to_owned(),
        labels: BTreeMap::from([("app".to_owned(), "shop".to_owned())]),
    };
    let entries = BTreeMap::from([("url".to_owned(), url.as_bytes().to_vec())]);
    let namespace = Namespace {
        clusters: BTreeMap::from([("main".to_owned(), Some(place))]),
        secrets: KnownSecrets(BTreeMap::from([("shop-db".to_owned(), entries)])),
        ..Namespace::default()
    };
    let outcome = merge(&workload, &[&policy()], &namespace, 1).expect("it is followed");
    outcome.merged.expect("it is accepted")
}

/// A topology whose servers and sentinels know the binding's user, with sidecars that log in as it.
struct Scene {
    servers: Servers,
    binding: BindingName,
    snapshot: Snapshot,
    users: Users,
    sidecars: Vec<Sidecar>,
    directory: TempDir,
}

impl Scene {
    async fn open(servers: Servers) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let users = ["CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)", "INSERT INTO users VALUES (1, 'Ann'), (2, 'Bob')"];
        let url = database(directory.path(), &users).await;
        let merged = merged(servers.place(), &url);
        let snapshot = merged.snapshot.expect("all is there");
        let binding = merged.binding;
        let users = users_of(&binding, &snapshot);
        (0..servers.admins().len()).for_each(|place| set_users_at(&servers, &binding, &users, place));
        let secret = directory.path().join("secret");
        fs::create_dir(&secret).expect("a directory");
        let (user, password) = (binding.user(), PASSWORD.to_owned());
        let login =
            [("username", &user), ("password", &password), ("sentinel-username", &user), ("sentinel-password", &password)];
        let files = login.into_iter().chain(merged.files.0.iter().map(|(entry, url)| (entry.as_str(), url)));
        files.for_each(|(entry, text)| fs::write(secret.join(entry), text).expect("it is written"));
        let json = serde_json::to_string(&snapshot).expect("it serialises");
        let json: Json = serde_json::from_str(&json.replace(SECRET_DIR, &secret.display().to_string())).expect("JSON");
        let arguments = ["--binding", binding.as_str(), "--secrets", &secret.display().to_string()];
        let sidecars = (0..2).map(|_| Sidecar::start_with(&json, &arguments)).collect();
        Self { servers, binding, snapshot, users, sidecars, directory }
    }

    /// Where the files are that sidecars read as their Secret.
    fn secret(&self) -> PathBuf {
        self.directory.path().join("secret")
    }

    /// What was refused so far, at any server.
    fn refusals(&self) -> Vec<Value> {
        self.servers.admins().iter_mut().flat_map(|admin| admin.line("ACL LOG").items()).collect()
    }
}

fn users_of(binding: &BindingName, snapshot: &Snapshot) -> Users {
    let now = SystemTime::UNIX_EPOCH;
    let wanted = BTreeMap::from([(
        binding.clone(),
        user::grant(snapshot, &Passwords { current: Some(PASSWORD.to_owned()), ..Passwords::default() }, None),
    )]);
    Users::next(None, &Access::Open, "system", None, now).bind(None, &wanted, None, now)
}

/// As agents and the operator make them known, at one of the servers or sentinels.
fn set_users_at(servers: &Servers, binding: &BindingName, users: &Users, place: usize) {
    let users = if place < servers.all().len() { users.on_servers() } else { users.on_sentinels() };
    let user = users.iter().find(|user| user.name == binding.user()).expect("it has a user");
    let mut command = vec!["ACL", "SETUSER", user.name.as_str(), "reset"];
    command.extend(user.rules.iter().map(String::as_str));
    assert_eq!(servers.admins()[place].call(&command), ok(), "{:?}", user.rules);
}

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

/// What applications do under the policy, at two sidecars.
fn everything_works(scene: &Scene) {
    let [mut one, mut two] = [0, 1].map(|index| scene.sidecars[index].client());
    // A miss that one loads while the other sidecar's reader waits, and is woken.
    assert_eq!(one.line("GET item:1"), Value::Nil);
    two.send(b"*2\r\n$3\r\nGET\r\n$6\r\nitem:1\r\n").expect("it is sent");
    wait_for("the other to wait", LIMIT, || rule_count(&scene.sidecars[1], "item", "misses") == 1);
    assert_eq!(one.line("SET item:1 first"), ok());
    assert_eq!(two.read().expect("an answer"), bulk("first"));
    assert_eq!(rule_count(&scene.sidecars[1], "item", "woken"), 1);
    for client in [&mut one, &mut two] {
        (0..20).for_each(|_| assert_eq!(client.line("GET item:1"), bulk("first")));
    }
    // A stale copy while one loads it anew.
    scene.servers.expire("item:1");
    assert_eq!(one.line("GET item:1"), Value::Nil);
    assert_eq!(two.line("GET item:1"), bulk("first"));
    assert_eq!(one.line("SET item:1 second"), ok());
    assert_eq!(two.line("GET item:1"), bulk("second"));
    // Loads by the sidecar, of what there is and of what there is not.
    for client in [&mut one, &mut two] {
        assert_eq!((client.line("GET user:1"), client.line("GET user:9")), (bulk("Ann"), Value::Nil));
    }
    assert_eq!(one.line("MGET user:1 user:2 item:1"), Value::Array(vec![bulk("Ann"), bulk("Bob"), bulk("second")]));
    // Odd names have their companions as well.
    assert_eq!(one.call(&["GET", "odd \"7\" [x]*"]), Value::Nil);
    assert_eq!(one.call(&["SET", "odd \"7\" [x]*", "v"]), ok());
    assert_eq!(two.call(&["GET", "odd \"7\" [x]*"]), bulk("v"));
    transactions_and_queues_work(&mut one, &mut two);
    messages_work(&mut one, &scene.sidecars[1]);
    // Events, of keys, of rules, and of what others' rules cover.
    assert_eq!(one.line("SET item:8 x"), ok());
    assert!(!two.line("XADD larder:events * key item:8 key other:1 rule item").is_error());
    wait_for("the events", LIMIT, || {
        one.line("EXISTS item:8").int() == 0 && sum_of(scene, "larder_invalidation_walks_total") == 1
    });
    assert_eq!((sum_of(scene, "larder_events_total"), sum_of(scene, "larder_events_foreign_total")), (2, 1));
    // Versions of a rule and of a tag.
    for kind in ["rule page", "tag group:a"] {
        assert_eq!(one.line("SET page:a:1 x"), ok());
        assert_eq!(two.line("GET page:a:1"), bulk("x"));
        assert!(!two.line(&format!("XADD larder:events * {kind}")).is_error());
        wait_for("a new version", LIMIT, || {
            [&mut one, &mut two].iter_mut().all(|client| client.line("EXISTS page:a:1").int() == 0)
        });
    }
    // A value with a tag of its own.
    let token = one.line("LARDER.FETCH doc:1").items()[2].text();
    assert_eq!(one.call(&["LARDER.FILL", "doc:1", &token, "v", "TAGS", "author"]), ok());
    assert_eq!(two.line("GET doc:1"), bulk("v"));
    assert!(!two.line("XADD larder:events * tag author").is_error());
    wait_for("the tag's value to go", LIMIT, || {
        [&mut one, &mut two].iter_mut().all(|client| client.line("EXISTS doc:1").int() == 0)
    });
    // Newer snapshots would be heard of.
    let channel = scene.binding.snapshot_key();
    let mut server = scene.servers.holder_of(&channel);
    wait_for("both to listen", LIMIT, || server.call(&["PUBSUB", "NUMSUB", &channel]).items()[1] == Value::Int(2));
    // What somebody writes past the sidecars is given a TTL.
    assert_eq!(scene.servers.holder_of("item:77").line("SET item:77 x"), ok());
    wait_for("the sweep", LIMIT, || one.line("PTTL item:77").int() > 0);
}

fn sum_of(scene: &Scene, counter: &str) -> u64 {
    scene.sidecars.iter().map(|sidecar| metric(sidecar, counter)).sum()
}

fn transactions_and_queues_work(one: &mut Client, two: &mut Client) {
    assert_eq!(one.line("WATCH item:2"), ok());
    assert_eq!(one.line("MULTI"), ok());
    for command in ["SET item:2 x", "INCR item:2", "GET item:2"] {
        assert_eq!(one.line(command), Value::Simple("QUEUED".to_owned()));
    }
    let replies = one.line("EXEC").items();
    assert!(matches!(&replies[..], [set, Value::Error(_), get] if *set == ok() && *get == bulk("x")), "{replies:?}");
    assert_eq!(one.line("RPUSH queue:mail a b").int(), 2);
    assert_eq!(two.line("BLPOP queue:mail 5").items()[1], bulk("a"));
    assert_eq!(one.line("SORT queue:mail ALPHA"), Value::Array(vec![bulk("b")]));
    assert_eq!(one.line("SET queue:lock token NX PX 60000"), ok());
    let release = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";
    let sha = one.call(&["SCRIPT", "LOAD", release]).text();
    assert_eq!(two.call(&["EVALSHA", &sha, "1", "queue:lock", "token"]), Value::Int(1));
    for (command, expected) in [("INCR queue:count", 1), ("EXPIRE queue:count 60", 1), ("WAIT 0 10", 0)] {
        let reply = one.line(command);
        assert!(matches!(reply, Value::Int(number) if number >= expected), "{command}: {reply:?}");
    }
    assert_eq!(one.line("LARDER.INVALIDATE item:2 user:2").int(), 2);
    for command in
        ["LARDER.EXPLAIN item:1", "SCAN 0", "DBSIZE", "RANDOMKEY", "INFO", "TIME", "TYPE item:1", "OBJECT ENCODING item:1"]
    {
        let reply = one.line(command);
        assert!(!reply.is_error(), "{command}: {reply:?}");
    }
}

fn messages_work(one: &mut Client, sidecar: &Sidecar) {
    let mut listener = sidecar.client();
    assert_eq!(listener.line("SUBSCRIBE item:news").items()[2], Value::Int(1));
    assert!(!one.line("PUBLISH item:news hello").is_error());
    assert_eq!(listener.read().expect("a message").items()[2], bulk("hello"));
    let mut tracking = sidecar.client();
    assert!(!tracking.line("HELLO 3").is_error());
    assert_eq!(tracking.line("CLIENT TRACKING ON"), ok());
    assert_eq!(tracking.line("GET queue:count"), bulk("1"));
    assert_eq!(one.line("INCR queue:count").int(), 2);
    let told = tracking.read().expect("a message");
    assert!(matches!(&told, Value::Push(parts) if parts[0] == bulk("invalidate")), "{told:?}");
}

/// What a sidecar passes on, or what its password opens to anyone.
fn the_rest_is_refused(scene: &Scene) {
    let mut client = scene.sidecars[0].client();
    let foreign = [
        vec!["GET", "other:1"],
        vec!["SET", "other:1", "x"],
        vec!["GET", "items:1"],
        vec!["EVAL", "return redis.call('GET', KEYS[1])", "1", "other:1"],
        vec!["EVAL", "return redis.call('GET', 'other:1')", "1", "item:1"],
        vec!["PUBLISH", "other", "x"],
        vec!["CONFIG", "GET", "masterauth"],
        vec!["FUNCTION", "FLUSH"],
    ];
    for command in foreign {
        let reply = client.call(&command);
        let refused = |text: &str| text.contains("NOPERM") || text.contains("can't access") || text.contains("ACL failure");
        assert!(matches!(&reply, Value::Error(text) if refused(text)), "{command:?}: {reply:?}");
    }
    // Whoever reads the password may ask the servers themselves.
    let mut admin = scene.servers.holder_of("item:1");
    let (name, own, fleet) = (scene.binding.user(), scene.binding.snapshot_key(), scene.binding.fleet_key());
    let mut tried = |command: &str| {
        let command = command.replace("@own", &own).replace("@fleet", &fleet).replace("@sweep", &scene.binding.sweep_key());
        let command =
            command.replace("@turn", &turn_key(Some(&scene.binding))).replace("@state", &state_key(Some(&scene.binding)));
        let words: Vec<&str> = ["ACL", "DRYRUN", &name].into_iter().chain(command.split(' ')).collect();
        admin.call(&words).text()
    };
    for command in ALLOWED {
        assert_eq!(tried(command), "OK", "{command}");
    }
    for command in DENIED {
        let answer = tried(command);
        assert!(answer.contains("no permissions"), "{command}: {answer}");
    }
    // What only the command itself finds out.
    let mut direct = scene.servers.holder_of("queue:mail");
    assert_eq!(direct.call(&["AUTH", &name, PASSWORD]), ok());
    let sorted = direct.line("SORT queue:mail BY other:*");
    assert!(matches!(&sorted, Value::Error(text) if text.contains("BY option of SORT denied")), "{sorted:?}");
}

const ALLOWED: [&str; 16] = [
    "XREAD STREAMS larder:events 0",
    "XINFO STREAM larder:events",
    "XADD larder:events * key item:1",
    "XTRIM larder:events MAXLEN 10",
    "SET @turn 1",
    "HSET @state position x",
    "GET @own",
    "GET @fleet",
    "SUBSCRIBE @own",
    "SET @sweep 1 NX PX 10",
    "SET larder:sweeps 1 NX PX 10",
    "UNLINK larder:w:{abc}",
    "SET larder:n:{abc}item:1 x",
    "SSUBSCRIBE larder:l:{abc}item:1",
    "CLUSTER SHARDS",
    "CLIENT TRACKING ON",
];

const DENIED: [&str; 57] = [
    "DEL larder:events",
    "XDEL larder:events 1-0",
    "XGROUP CREATE larder:events g 0",
    "SET larder:er:{larder:events}other 1",
    "HGET larder:es:{larder:events}other position",
    "SET @own x",
    "SET @fleet x",
    "DEL @own",
    "GET larder:p:other",
    "SUBSCRIBE larder:p:other",
    "PUBLISH larder:hb:other x",
    "GET @sweep",
    "SET larder:sweep:other 1 NX PX 10",
    "SET larder:l:{abc}other:1 x",
    "GET larder:d:{abc}item:1",
    "SSUBSCRIBE larder:l:{abc}other:1",
    "PSUBSCRIBE *",
    "COPY item:1 other:1",
    "RENAME other:1 item:1",
    "WATCH other:1",
    "ACL LIST",
    "ACL SETUSER x",
    "ACL WHOAMI",
    "BGREWRITEAOF",
    "BGSAVE",
    "CLIENT KILL ID 1",
    "CLIENT LIST",
    "CLIENT PAUSE 1",
    "CLUSTER FAILOVER",
    "CLUSTER FORGET x",
    "CLUSTER RESET",
    "CONFIG GET masterauth",
    "CONFIG SET maxmemory 1",
    "DEBUG SLEEP 0",
    "FAILOVER",
    "FCALL f 0",
    "FLUSHALL",
    "FLUSHDB",
    "FUNCTION DELETE x",
    "FUNCTION FLUSH",
    "FUNCTION LIST",
    "FUNCTION LOAD x",
    "KEYS *",
    "LATENCY LATEST",
    "MIGRATE h 1 item:1 0 1",
    "MODULE LIST",
    "MONITOR",
    "REPLICAOF NO ONE",
    "RESTORE item:1 0 x",
    "SAVE",
    "SCRIPT FLUSH",
    "SCRIPT KILL",
    "SHUTDOWN NOSAVE",
    "SLOWLOG GET",
    "SWAPDB 0 1",
    "SYNC",
    "GET x",
];

async fn judge(servers: Servers) {
    let scene = Scene::open(servers).await;
    everything_works(&scene);
    assert_eq!(scene.refusals(), []);
    for sidecar in &scene.sidecars {
        let log = sidecar.log();
        assert!(!log.contains("NOPERM") && !log.contains("refused") && !log.contains(PASSWORD), "{log}");
    }
    the_rest_is_refused(&scene);
    assert!(!scene.refusals().is_empty(), "the log would have shown refusals");
}

#[tokio::test]
async fn redis_under_sentinel() {
    judge(Servers::Sentinel(SentinelCluster::start(Engine::Redis7, 1))).await;
}

#[tokio::test]
async fn valkey_under_sentinel() {
    judge(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1))).await;
}

#[tokio::test]
async fn redis_in_a_cluster() {
    judge(Servers::Cluster(RedisCluster::start(Engine::Redis7, 3, 0))).await;
}

#[tokio::test]
async fn valkey_in_a_cluster() {
    judge(Servers::Cluster(RedisCluster::start(Engine::Valkey9, 3, 0))).await;
}

/// A file is split into words by the server, where a command is not.
#[test]
fn servers_read_the_file_of_users_as_they_take_the_commands() {
    let place = Place {
        topology: Topology::Cluster { seeds: vec![SocketAddr::from(([127, 0, 0, 1], 1)).to_string()] },
        tls: false,
        keeping: None,
    };
    let merged = merged(place, "sqlite://x.db");
    let users = users_of(&merged.binding, &merged.snapshot.expect("all is there"));
    let name = merged.binding.user();
    for engine in Engine::ALL {
        let directory = TempDir::new().expect("a temporary directory");
        let file = directory.path().join("users.acl");
        // A file of users takes no remarks.
        let text = users.server_file();
        fs::write(&file, text.split_once('\n').expect("a first line").1).expect("it is written");
        let server = Redis::start_with(engine, &["--aclfile", &file.display().to_string()]);
        let mut admin = server.client();
        assert_eq!(admin.line("AUTH larder-system system"), ok(), "{}", server.log());
        // Behind the flags, of which only a command sets the one that RESTORE heeds.
        let known = |admin: &mut Client| admin.call(&["ACL", "GETUSER", &name]).items()[2..].to_vec();
        let read = known(&mut admin);
        let rules = users.on_servers().into_iter().find(|user| user.name == name).expect("it has a user").rules;
        let command: Vec<&str> = ["ACL", "SETUSER", &name, "reset"].into_iter().chain(rules.iter().map(String::as_str)).collect();
        assert_eq!(admin.call(&command), ok());
        assert_eq!(known(&mut admin), read, "{engine:?}");
    }
}
