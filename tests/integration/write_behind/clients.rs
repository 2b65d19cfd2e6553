//! What clients see of writes that are journalled.

use std::sync::Arc;
use std::time::Duration;

use larder::journal::{Entry, PARTITIONS, scripts};
use larder::sidecar::slots::Companion;
use serde_json::{Value as Json, json};

use super::{DURABLE, all_entries, durable, entries, held, partition, rule};
use crate::read_through::{Servers, policy, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_through::block;

const LIMIT: Duration = Duration::from_secs(60);
const TABLE: &str = "CREATE TABLE kv (id text PRIMARY KEY, v text NOT NULL)";

struct Shop {
    servers: Servers,
    postgres: Arc<Postgres>,
    database: String,
    sidecar: Sidecar,
}

impl Shop {
    fn open(servers: Servers, bounds: &Json) -> Self {
        let postgres = Postgres::shared();
        let url = block(postgres.database(&[TABLE, "INSERT INTO kv VALUES ('old', 'from the origin')"]));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let rules = [rule("kv", "db", "SELECT v FROM kv WHERE id = $id", bounds)];
        let sidecar = Sidecar::start(&policy(servers.topology(), 1, &[sql_origin("db", &url)], &rules));
        Self { servers, postgres, database, sidecar }
    }

    fn rows(&self) -> String {
        block(self.postgres.value(&self.database, "SELECT count(*)::text FROM kv"))
    }

    /// The server that has the partition of a key.
    fn journal_of(&self, key: &str) -> Client {
        match &self.servers {
            Servers::Sentinel(servers) => servers.primary().client(),
            Servers::Cluster(servers) => servers.owner(partition(key).slot()).client(),
        }
    }

    /// Has the cache forget a key, and that there was none.
    fn evict(&self, key: &str) {
        let absence = Companion::Negative.name(key.as_bytes());
        self.servers.holder_of(key).call(&[&b"DEL"[..], key.as_bytes(), &absence]);
    }
}

fn sentinel(engine: Engine) -> Servers {
    Servers::Sentinel(durable(engine, 1))
}

fn cluster(engine: Engine) -> Servers {
    Servers::Cluster(RedisCluster::start_with(engine, 3, 1, &DURABLE))
}

#[test]
fn an_acknowledged_write_is_journalled_and_read_before_the_origin_has_it() {
    for servers in [sentinel(Engine::Valkey9), sentinel(Engine::Redis7), cluster(Engine::Valkey9)] {
        let shop = Shop::open(servers, &json!({}));
        let mut client = shop.sidecar.client();
        assert_eq!(client.call(&["GET", "kv:old"]).text(), "from the origin");
        assert_eq!(client.call(&["SET", "kv:old", "new"]), Value::Simple("OK".to_owned()));
        assert_eq!(client.call(&["GET", "kv:old"]).text(), "new");
        assert_eq!(shop.servers.holder_of("kv:old").call(&["GET", "kv:old"]).text(), "new", "the cache has it");
        shop.evict("kv:old");
        assert_eq!(client.call(&["GET", "kv:old"]).text(), "new", "the journal has it");
        let [entry]: [Entry; 1] = entries(&mut shop.journal_of("kv:old"), &partition("kv:old")).try_into().expect("one entry");
        assert_eq!((&entry.change.key[..], entry.change.value.as_deref()), (&b"kv:old"[..], Some(&b"new"[..])));
        assert_eq!(held(&mut shop.journal_of("kv:old"), "kv:old").expect("dirty").version, entry.version);
        // A deletion is one as well.
        assert_eq!(client.call(&["DEL", "kv:old"]), Value::Int(1));
        assert_eq!(client.call(&["GET", "kv:old"]), Value::Nil);
        shop.evict("kv:old");
        assert_eq!(client.call(&["GET", "kv:old"]), Value::Nil, "the origin still has it, and is not asked");
        let hostile = "kv:a}b{c\r\n";
        assert_eq!(client.call(&["SETEX", hostile, "60", "\0\r\n"]), Value::Simple("OK".to_owned()));
        shop.evict(hostile);
        assert_eq!(client.call(&["GET", hostile]).text(), "\0\r\n");
        assert_eq!(shop.rows(), "1", "nothing has come to the origin");
        let Value::Error(text) = client.call(&["APPEND", "kv:old", "x"]) else { panic!("APPEND is refused") };
        assert!(text.starts_with("NOPERM APPEND"), "{text}");
    }
}

#[test]
fn keys_of_many_partitions_are_written_by_one_command() {
    for servers in [sentinel(Engine::Valkey9), cluster(Engine::Redis7)] {
        let shop = Shop::open(servers, &json!({}));
        let mut client = shop.sidecar.client();
        let keys: Vec<String> = (0..60).map(|id| format!("kv:{id}")).collect();
        let mut command = vec!["MSET"];
        keys.iter().for_each(|key| command.extend([key.as_str(), "x"]));
        assert_eq!(client.call(&command), Value::Simple("OK".to_owned()));
        keys.iter().for_each(|key| shop.evict(key));
        let mut command = vec!["MGET"];
        command.extend(keys.iter().map(String::as_str));
        assert!(client.call(&command).items().iter().all(|value| value.text() == "x"));
        let mut parts: Vec<u8> = keys.iter().map(|key| partition(key).number()).collect();
        parts.sort_unstable();
        parts.dedup();
        assert_eq!(parts.len(), usize::from(PARTITIONS), "all partitions have one");
        command[0] = "DEL";
        assert_eq!(client.call(&command), Value::Int(60));
        command[0] = "MGET";
        assert!(client.call(&command).items().iter().all(|value| *value == Value::Nil));
    }
}

#[test]
fn a_journal_over_its_bound_refuses_and_its_keys_stay_as_they_were() {
    let shop = Shop::open(sentinel(Engine::Valkey9), &json!({"maxDepth": 4096}));
    let mut client = shop.sidecar.client();
    let own = partition("kv:full").number();
    let same: Vec<String> = (0..).map(|id| format!("kv:{id}")).filter(|key| partition(key).number() == own).take(256).collect();
    let mut command = vec!["MSET"];
    same.iter().for_each(|key| command.extend([key.as_str(), "x"]));
    assert_eq!(client.call(&command), Value::Simple("OK".to_owned()));
    let Value::Error(text) = client.call(&["SET", "kv:full", "y"]) else { panic!("a full journal refuses") };
    assert!(text.starts_with("JOURNAL 256 writes") && text.ends_with("nothing was written"), "{text}");
    assert_eq!(client.call(&["GET", "kv:full"]), Value::Nil);
    assert_eq!(held(&mut shop.journal_of("kv:full"), "kv:full"), None);
    let other = (0..).map(|id| format!("kv:{id}")).find(|key| partition(key).number() != own).expect("another partition's");
    assert_eq!(client.call(&["SET", &other, "y"]), Value::Simple("OK".to_owned()));
    // What is old is no better.
    let shop = Shop::open(sentinel(Engine::Valkey9), &json!({"maxLag": "300ms"}));
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&["SET", "kv:1", "x"]), Value::Simple("OK".to_owned()));
    wait_for("the write to be too old", LIMIT, || match client.call(&["SET", "kv:1", "y"]) {
        Value::Error(text) => text.starts_with("JOURNAL a write has waited") && text.ends_with("nothing was written"),
        _ => false,
    });
    let last = held(&mut shop.journal_of("kv:1"), "kv:1").expect("dirty").value.expect("a value");
    assert_eq!(client.call(&["GET", "kv:1"]).text().into_bytes(), last);
}

#[test]
fn a_journal_without_room_overflows_to_the_origin_where_its_rule_says_so() {
    for servers in [sentinel(Engine::Valkey9), cluster(Engine::Redis7)] {
        let shop = Shop::open(servers, &json!({"maxDepth": 4096, "overflow": "writeThrough"}));
        let mut client = shop.sidecar.client();
        let own = partition("kv:full").number();
        let same: Vec<String> =
            (0..).map(|id| format!("kv:{id}")).filter(|key| partition(key).number() == own).take(256).collect();
        let mut command = vec!["MSET"];
        same.iter().for_each(|key| command.extend([key.as_str(), "x"]));
        assert_eq!(client.call(&command), Value::Simple("OK".to_owned()));
        assert_eq!(shop.rows(), "1", "there was room");
        assert_eq!(client.call(&["SET", "kv:full", "y"]), Value::Simple("OK".to_owned()));
        let row = || block(shop.postgres.value(&shop.database, "SELECT coalesce(max(v), '') FROM kv WHERE id = 'full'"));
        assert_eq!((row().as_str(), held(&mut shop.journal_of("kv:full"), "kv:full")), ("y", None));
        assert_eq!(client.call(&["GET", "kv:full"]).text(), "y");
        shop.evict("kv:full");
        assert_eq!(client.call(&["GET", "kv:full"]).text(), "y", "the origin has it");
        // What waits comes first.
        let Value::Error(text) = client.call(&["SET", &same[0], "z"]) else { panic!("an earlier write waits") };
        assert!(text.starts_with("JOURNAL") && text.contains("still waits") && text.ends_with("nothing was written"), "{text}");
        assert_eq!(client.call(&["GET", &same[0]]).text(), "x");
        // What the origin refuses is refused, and holds up nothing.
        let Value::Error(text) = client.call(&["SET", "kv:full", "again"]) else { panic!("there is such a row") };
        assert!(text.starts_with("ORIGIN") && text.contains("duplicate key"), "{text}");
        assert_eq!(client.call(&["DEL", "kv:full"]), Value::Int(1));
        assert_eq!((row().as_str(), client.call(&["GET", "kv:full"])), ("", Value::Nil));
        let away = [b"EXISTS".to_vec(), partition("kv:full").away()];
        assert_eq!(shop.journal_of("kv:full").call(&away), Value::Int(0), "nothing is past the journal any more");
    }
}

#[test]
fn nothing_is_journalled_while_a_write_of_its_key_is_past_the_journal() {
    let shop = Shop::open(sentinel(Engine::Valkey9), &json!({}));
    let (mut client, mut server) = (shop.sidecar.client(), shop.journal_of("kv:1"));
    let leave = scripts::leave(&partition("kv:1"), 1 << 53, 60_000_000, &[b"kv:1".to_vec()]);
    let left = server.call(&leave.command()).items();
    assert_eq!(left[0].text(), "left");
    let Value::Error(text) = client.call(&["SET", "kv:1", "x"]) else { panic!("it is past the journal") };
    assert!(text.starts_with("TRYAGAIN another write of the key") && text.ends_with("nothing was written"), "{text}");
    let version = larder::journal::Version::parse(left[1].text().as_bytes()).expect("a version");
    let arrive = scripts::arrive(&partition("kv:1"), &[(b"kv:1".to_vec(), version)]);
    assert_eq!(server.call(&arrive.command()).items()[1].text(), "1");
    assert_eq!(client.call(&["SET", "kv:1", "x"]), Value::Simple("OK".to_owned()));
}

#[test]
fn what_the_relay_has_carried_there_is_read_from_the_origin() {
    let shop = Shop::open(sentinel(Engine::Valkey9), &json!({}));
    let (mut client, key) = (shop.sidecar.client(), "kv:1");
    assert_eq!(client.call(&["SET", key, "one"]), Value::Simple("OK".to_owned()));
    let mut server = shop.journal_of(key);
    let claim = server.call(&scripts::claim(&partition(key), "relay", 60_000).command()).items();
    let fence = claim[1].text().parse().expect("a fence");
    let first = entries(&mut server, &partition(key)).pop().expect("an entry");
    assert_eq!(client.call(&["SET", key, "two"]), Value::Simple("OK".to_owned()));
    let done = |server: &mut Client, entry: &Entry| {
        let cleared = [(key.as_bytes().to_vec(), entry.version)];
        server.call(&scripts::done(&partition(key), fence, entry.version, entry.through, &cleared).command()).items()[1].text()
    };
    block(shop.postgres.value(&shop.database, "INSERT INTO kv VALUES ('1', 'one') RETURNING v"));
    assert_eq!(done(&mut server, &first), "0", "a later write is on its way");
    shop.evict(key);
    assert_eq!(client.call(&["GET", key]).text(), "two");
    let second = entries(&mut server, &partition(key)).pop().expect("an entry");
    block(shop.postgres.value(&shop.database, "UPDATE kv SET v = 'two, by the relay' WHERE id = '1' RETURNING v"));
    assert_eq!(done(&mut server, &second), "1");
    shop.evict(key);
    assert_eq!(client.call(&["GET", key]).text(), "two, by the relay");
    assert!(all_entries(&mut server).is_empty());
}
