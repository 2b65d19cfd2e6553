//! What clients see of writes that are carried to a database.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::{block, origin, rule, sidecar};
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value, encode};
use crate::support::saboteur::Change;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

/// Objects with a name of their own, plain texts with a version, bytes; what begins with `slow`, `stuck` or, at its end, `late` takes long.
const TABLES: [&str; 7] = [
    "CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL UNIQUE, age int CHECK (age < 200), tags jsonb)",
    "CREATE TABLE texts (id text PRIMARY KEY, v text NOT NULL, row_version bigint NOT NULL DEFAULT 1)",
    "CREATE TABLE blobs (id text PRIMARY KEY, v bytea NOT NULL)",
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     IF NEW.v LIKE 'slow%' THEN PERFORM pg_sleep(2); END IF; \
     IF NEW.v LIKE 'stuck%' THEN PERFORM pg_sleep(60); END IF; RETURN NEW; END $$",
    "CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON texts FOR EACH ROW EXECUTE FUNCTION slow()",
    "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     IF NEW.v LIKE 'late%' THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE ON texts DEFERRABLE INITIALLY DEFERRED \
     FOR EACH ROW EXECUTE FUNCTION late()",
];

struct Shop {
    servers: Servers,
    postgres: Arc<Postgres>,
    database: String,
    origins: Vec<Json>,
    rules: Vec<Json>,
    sidecar: Sidecar,
}

impl Shop {
    fn open(servers: Servers, timeout: &str) -> Self {
        let postgres = Postgres::shared();
        let url = block(postgres.database(&TABLES));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let origins = vec![origin("db", &url, timeout)];
        let user = json!({
            "write": "INSERT INTO users VALUES ($id, $value.name, $value.age, $value.tags) \
                      ON CONFLICT (id) DO UPDATE SET name = excluded.name, age = excluded.age, tags = excluded.tags",
            "delete": "DELETE FROM users WHERE id = $id",
        });
        let text = "INSERT INTO texts VALUES ($id, $value) \
                    ON CONFLICT (id) DO UPDATE SET v = excluded.v, row_version = texts.row_version + 1";
        let delete = "DELETE FROM texts WHERE id = $id";
        let rules = vec![
            rule("user", "db", "SELECT id, name, age, tags FROM users WHERE id = $id", &user),
            rule("text", "db", "SELECT v FROM texts WHERE id = $id", &json!({"write": text, "delete": delete})),
            rule(
                "versioned",
                "db",
                "SELECT v FROM texts WHERE id = $id",
                &json!({"write": format!("{text} RETURNING row_version"), "delete": delete, "version": "row_version"}),
            ),
            rule(
                "blob",
                "db",
                "SELECT v FROM blobs WHERE id = $id",
                &json!({"write": "INSERT INTO blobs VALUES ($id, $value) ON CONFLICT (id) DO UPDATE SET v = excluded.v"}),
            ),
            rule(
                "known",
                "db",
                "SELECT v FROM texts WHERE id = $id",
                &json!({"write": "UPDATE texts SET v = $value WHERE id = $id"}),
            ),
        ];
        let sidecar = sidecar(&servers, &origins, &rules);
        Self { servers, postgres, database, origins, rules, sidecar }
    }

    fn value(&self, query: &str) -> String {
        block(self.postgres.value(&self.database, query))
    }

    /// What the cache has, asked past Larder.
    fn cached(&self, key: &str) -> Value {
        self.servers.holder_of(key).call(&["GET", key])
    }

    fn another_sidecar(&self) -> Sidecar {
        sidecar(&self.servers, &self.origins, &self.rules)
    }
}

/// Whether the reply is an error with these words in it.
#[track_caller]
pub fn refused(reply: &Value, words: &[&str]) {
    let Value::Error(text) = reply else { panic!("{reply:?} is no error") };
    words.iter().for_each(|word| assert!(text.contains(word), "{word} in {text}"));
}

#[test]
fn a_write_is_at_the_origin_and_in_the_cache_when_it_is_acknowledged() {
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let shop = Shop::open(servers, "10s");
        let mut client = shop.sidecar.client();
        let ann = r#"{"name":"Ann","age":41,"tags":["a",{"b":null}]}"#;
        assert_eq!(client.call(&["SET", "user:1", ann]), Value::Simple("OK".to_owned()));
        assert_eq!(shop.value("SELECT name || age || tags::text FROM users WHERE id = 1"), r#"Ann41["a", {"b": null}]"#);
        assert_eq!(shop.cached("user:1").text(), ann);
        let ttl = shop.servers.holder_of("user:1").call(&["PTTL", "user:1"]).int();
        assert!((3_500_000..=3_600_000).contains(&ttl), "{ttl}");
        assert_eq!(client.call(&["GET", "user:1"]).text(), ann);
        shop.servers.expire("user:1");
        assert_eq!(client.call(&["GET", "user:1"]).text(), r#"{"id":1,"name":"Ann","age":41,"tags":["a", {"b": null}]}"#);
        // The TTL is the writer's, within the rule's bound.
        assert_eq!(client.call(&["SETEX", "text:1", "60", "one"]), Value::Simple("OK".to_owned()));
        let ttl = |key: &str| shop.servers.holder_of(key).call(&["PTTL", key]).int();
        assert!((1..=60_000).contains(&ttl("text:1")));
        assert_eq!(client.call(&["SET", "text:1", "two", "EX", "999999"]), Value::Simple("OK".to_owned()));
        assert!((7_000_000..=7_200_000).contains(&ttl("text:1")));
        let later = (std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 100).to_string();
        assert_eq!(client.call(&["SET", "text:1", "three", "EXAT", &later]), Value::Simple("OK".to_owned()));
        assert!((1..=101_000).contains(&ttl("text:1")));
        // A deletion tells how many rows went.
        assert_eq!(client.line("DEL text:1 text:none"), Value::Int(1));
        assert_eq!(client.line("UNLINK text:1"), Value::Int(0));
        assert_eq!((client.line("GET text:1"), shop.cached("text:1")), (Value::Nil, Value::Nil));
        assert_eq!(shop.value("SELECT count(*)::text FROM texts"), "0");
        // Nothing of the marks is left.
        let left = shop.servers.holder_of("text:1").call(&["KEYS", "larder:i:*"]);
        assert_eq!(left, Value::Array(Vec::new()));
        assert_eq!(rule_count(&shop.sidecar, "text", "writes"), 5);
    }
}

#[test]
fn several_keys_are_one_transaction() {
    let shop = Shop::open(Servers::cluster(), "10s");
    let mut client = shop.sidecar.client();
    let mset = |client: &mut Client, pairs: &[(&str, &str)]| {
        let mut command = vec!["MSET"];
        pairs.iter().for_each(|(key, value)| command.extend([*key, *value]));
        client.call(&command)
    };
    let (ann, bob) = (r#"{"name":"Ann"}"#, r#"{"name":"Bob"}"#);
    assert_eq!(mset(&mut client, &[("user:1", ann), ("user:2", bob)]), Value::Simple("OK".to_owned()));
    assert_eq!(shop.value("SELECT string_agg(name, ',' ORDER BY id) FROM users"), "Ann,Bob");
    assert_eq!([shop.cached("user:1").text(), shop.cached("user:2").text()], [ann, bob]);
    // The second name is taken: neither is written, and neither stays in the cache.
    let reply = mset(&mut client, &[("user:3", r#"{"name":"Cid"}"#), ("user:1", bob)]);
    refused(&reply, &["ORIGIN", "refused the write", "users_name_key", "nothing was written"]);
    assert_eq!(shop.value("SELECT string_agg(name, ',' ORDER BY id) FROM users"), "Ann,Bob");
    assert_eq!([shop.cached("user:3"), shop.cached("user:1")], [Value::Nil, Value::Nil]);
    assert_eq!(client.line("DEL user:1 user:2 user:3"), Value::Int(2));
}

#[test]
fn what_the_origin_refuses_is_told_in_its_words_and_leaves_no_value() {
    let shop = Shop::open(Servers::sentinel(), "10s");
    let mut client = shop.sidecar.client();
    let ann = r#"{"name":"Ann","age":41}"#;
    assert_eq!(client.call(&["SET", "user:1", ann]), Value::Simple("OK".to_owned()));
    for (value, words) in [
        (r#"{"name":"Ann","age":999}"#, &["violates check constraint", "SQLSTATE 23514"][..]),
        (r#"{"age":1}"#, &["null value in column", "23502"]),
        (r#"{"name":"Ann","age":"old"}"#, &["invalid input syntax for type integer", "22P02"]),
        ("no JSON", &["not a JSON object", "$value.name"]),
    ] {
        assert!(client.call(&["GET", "user:1"]).text().contains("Ann"));
        assert!(shop.cached("user:1") != Value::Nil);
        let reply = client.call(&["SET", "user:1", value]);
        refused(&reply, &[&["ORIGIN origin `db` refused the write", "nothing was written"], words].concat());
        assert_eq!(shop.cached("user:1"), Value::Nil, "{value}");
        assert_eq!(shop.value("SELECT name || age FROM users"), "Ann41");
    }
    // A statement that changes no row has not written.
    refused(&client.call(&["SET", "known:none", "x"]), &["changed no row"]);
    refused(&client.call(&["SET", "user:many", ann]), &["ORIGIN", "22P02"]);
    refused(&client.line("DEL blob:1"), &["does not say how its origin deletes"]);
    for line in ["APPEND text:1 x", "INCR text:1", "HSET user:1 name x", "SET text:1 x NX"] {
        let command = line.split(' ').next().expect("a command");
        refused(&client.line(line), &[command]);
    }
    refused(&client.line("MSET text:1 x other y"), &["several rules", "`text`"]);
    refused(
        &client.call(&["EVAL", "return redis.call('SET', KEYS[1], 'x')", "1", "text:1"]),
        &["EVAL of a key of the rule `text`"],
    );
    assert_eq!(client.line("EXPIRE text:1 10"), Value::Int(0));
    let counted = |name: &str| rule_count(&shop.sidecar, "user", name);
    assert_eq!((counted("writes"), counted("writes_rejected"), counted("writes_unknown")), (6, 5, 0));
}

#[test]
fn nothing_of_a_key_or_a_value_is_ever_part_of_a_statement() {
    let shop = Shop::open(Servers::sentinel(), "10s");
    let mut client = shop.sidecar.client();
    let hostile = [
        "'; DROP TABLE texts; --",
        "\\'; DROP TABLE texts; --",
        "$1",
        "$value",
        "$$",
        "$id",
        "?1",
        "%s",
        "\u{0}",
        "é\u{202e}",
        "1) OR (1=1",
        "",
        "'||(SELECT pg_sleep(100))||'",
        "\"",
        "E'\\x00'",
        "{\"name\":\"x\"}",
        "\r\n*1\r\n$8\r\nFLUSHALL\r\n",
        "NULL",
        "-1",
        "1e400",
    ];
    for (index, value) in hostile.iter().enumerate() {
        let key = format!("text:{index}");
        let reply = client.call(&["SET", &key, value]);
        if value.contains('\0') {
            refused(&reply, &["the value is no text", "bytea"]);
            continue;
        }
        assert_eq!(reply, Value::Simple("OK".to_owned()), "{value:?}");
        assert_eq!(shop.cached(&key).text(), *value);
        shop.servers.expire(&key);
        assert_eq!(client.call(&["GET", &key]).text(), *value);
        // As a key's part: a colon ends one.
        if !value.is_empty() && !value.contains(':') {
            let key = format!("text:{value}");
            assert_eq!(client.call(&["SET", &key, "as a key"]), Value::Simple("OK".to_owned()), "{value:?}");
            shop.servers.expire(&key);
            assert_eq!(client.call(&["GET", &key]).text(), "as a key", "{value:?}");
            assert_eq!(client.call(&["DEL", &key]), Value::Int(1), "{value:?}");
        }
        let object = json!({"name": value, "age": 1}).to_string();
        let reply = client.call(&["SET", &format!("user:{index}"), &object]);
        assert_eq!(reply, Value::Simple("OK".to_owned()), "{value:?}");
    }
    let names = shop.value("SELECT json_agg(name ORDER BY id)::text FROM users");
    let expected: Vec<&str> = hostile.iter().copied().filter(|value| !value.contains('\0')).collect();
    assert_eq!(serde_json::from_str::<Vec<String>>(&names).unwrap(), expected);
    refused(&client.call(&[&b"SET"[..], b"text:\xff", b"x"]), &["a part of the key cannot be one of its"]);
    // Any bytes are a bytea.
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(client.call(&[&b"SET"[..], b"blob:1", &bytes]), Value::Simple("OK".to_owned()));
    assert_eq!(shop.value("SELECT encode(v, 'hex') FROM blobs").len(), 512);
    shop.servers.expire("blob:1");
    assert_eq!(client.call(&["GET", "blob:1"]), Value::Bulk(bytes));
    // And so is a long value, which comes in pieces.
    let long = "x".repeat(600_000);
    assert_eq!(client.call(&["SET", "text:long", &long]), Value::Simple("OK".to_owned()));
    assert_eq!(shop.value("SELECT length(v)::text FROM texts WHERE id = 'long'"), "600000");
    assert_eq!(client.call(&["GET", "text:long"]).text().len(), 600_000);
    refused(
        &client.call(&["SET", "text:long", &"x".repeat(1_100_000)]),
        &["a command of more than 1048576 bytes cannot be carried"],
    );
    assert_eq!(shop.cached("text:long").text().len(), 600_000, "nothing was touched");
}

#[test]
fn a_client_s_commands_keep_their_order_and_others_do_not_wait() {
    let shop = Shop::open(Servers::sentinel(), "10s");
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&["SET", "text:1", "v0"]), Value::Simple("OK".to_owned()));
    shop.servers.expire("text:1");
    let mut pipeline = Vec::new();
    for line in ["GET text:1", "SET text:1 v1", "GET text:1", "SET text:1 v2", "GET text:1", "DEL text:1", "GET text:1", "PING"] {
        pipeline.extend(encode(&line.split(' ').collect::<Vec<_>>()));
    }
    client.send(&pipeline).unwrap();
    let replies: Vec<Value> = (0..8).map(|_| client.read().unwrap()).collect();
    let (ok, bulk) = (Value::Simple("OK".to_owned()), |text: &str| Value::Bulk(text.into()));
    let expected =
        [bulk("v0"), ok.clone(), bulk("v1"), ok.clone(), bulk("v2"), Value::Int(1), Value::Nil, Value::Simple("PONG".to_owned())];
    assert_eq!(replies, expected);
    // While one waits for its database, others read and write over the same connection to the server.
    client.send(&encode(&["SET", "text:2", "slow"])).unwrap();
    let mut other = shop.sidecar.client();
    let started = std::time::Instant::now();
    wait_for("the slow write to begin", LIMIT, || shop.servers.holder_of("text:2").call(&["EXISTS", &mark("text:2")]).int() == 1);
    let mut served = 0;
    while client.poll().is_none() {
        assert_eq!(other.call(&["SET", "text:3", "quick"]), ok);
        assert_eq!(other.call(&["GET", "text:3"]).text(), "quick");
        served += 1;
        assert!(started.elapsed() < LIMIT);
    }
    assert!(served >= 1, "nobody was served meanwhile");
    // Nothing is carried from within a transaction.
    assert_eq!(client.line("MULTI"), ok);
    refused(&client.line("SET text:1 x"), &["NOPERM SET", "send it by itself"]);
    refused(&client.line("EXEC"), &["EXECABORT"]);
    assert_eq!((client.line("MULTI"), client.line("GET text:3")), (ok, Value::Simple("QUEUED".to_owned())));
    assert_eq!(client.line("EXEC"), Value::Array(vec![Value::Bulk(b"quick".to_vec())]));
}

/// The name of what stands beside a key while writes of it are under way.
pub fn mark(key: &str) -> String {
    String::from_utf8(larder::sidecar::slots::Companion::Intent.name(key.as_bytes())).expect("text")
}

#[test]
fn of_writes_that_overlap_the_later_is_kept_or_none() {
    let shop = Shop::open(Servers::sentinel(), "10s");
    let second = shop.another_sidecar();
    for (rule, kept) in [("text", false), ("versioned", true)] {
        let key = format!("{rule}:{rule}");
        let (mut first, mut other) = (shop.sidecar.client(), second.client());
        first.send(&encode(&["SET", &key, "slow first"])).unwrap();
        wait_for("the first write to begin", LIMIT, || {
            shop.value(
                "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
            ) == "1"
        });
        // It begins while the first is under way; the first may well be the later of the two, as the database has them.
        other.send(&encode(&["SET", &key, "second"])).unwrap();
        assert_eq!(first.read().unwrap(), Value::Simple("OK".to_owned()));
        assert_eq!(other.read().unwrap(), Value::Simple("OK".to_owned()));
        let last = shop.value(&format!("SELECT v FROM texts WHERE id = '{rule}'"));
        assert_eq!(shop.cached(&key), if kept { Value::Bulk(last.clone().into_bytes()) } else { Value::Nil });
        assert_eq!(shop.servers.holder_of(&key).call(&["EXISTS", &mark(&key)]), Value::Int(0));
        assert_eq!(first.call(&["GET", &key]).text(), last);
    }
}

#[test]
fn what_was_loaded_before_a_write_is_not_stored_over_it() {
    let shop = Shop::open(Servers::sentinel(), "10s");
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&["SET", "text:1", "slow"]), Value::Simple("OK".to_owned()));
    shop.servers.expire("text:1");
    client.send(&encode(&["SET", "text:1", "slow too"])).unwrap();
    wait_for("the write to begin", LIMIT, || shop.servers.holder_of("text:1").call(&["EXISTS", &mark("text:1")]).int() == 1);
    // Whoever reads meanwhile is served by the origin, and stores nothing.
    let mut reader = shop.sidecar.client();
    assert_eq!(reader.call(&["GET", "text:1"]).text(), "slow");
    assert_eq!(shop.cached("text:1"), Value::Nil);
    assert_eq!(client.read().unwrap(), Value::Simple("OK".to_owned()));
    assert_eq!(
        (shop.cached("text:1").text(), reader.call(&["GET", "text:1"]).text()),
        ("slow too".to_owned(), "slow too".to_owned())
    );
}

#[test]
fn a_write_of_unknown_outcome_says_so_and_leaves_no_value() {
    let shop = Shop::open(Servers::sentinel(), "2s");
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&["SET", "text:1", "before"]), Value::Simple("OK".to_owned()));
    // What takes too long before its end is surely not made.
    refused(&client.call(&["SET", "text:1", "stuck"]), &["ORIGIN", "gave no answer within 2s", "nothing was written"]);
    assert_eq!((shop.cached("text:1"), client.call(&["GET", "text:1"]).text()), (Value::Nil, "before".to_owned()));
    assert_eq!(shop.cached("text:1").text(), "before");
    let reply = client.call(&["SET", "text:1", "late"]);
    refused(&reply, &["ORIGIN", "may have made the write or not", "read the key before you repeat it"]);
    assert_eq!(shop.cached("text:1"), Value::Nil);
    // Until the transaction can come to nothing any more, reads are served by the origin, and nothing is stored.
    assert_eq!(client.call(&["GET", "text:1"]).text(), "before");
    assert_eq!(shop.cached("text:1"), Value::Nil);
    assert_eq!(rule_count(&shop.sidecar, "text", "writes_unknown"), 1);
    wait_for("the mark to end", LIMIT, || {
        assert_eq!(client.call(&["GET", "text:1"]).text(), "before");
        shop.cached("text:1") != Value::Nil
    });
    assert_eq!(shop.cached("text:1").text(), "before");
}

/// As when a primary dies once it has the mark, and the next one, which never had it, is asked whether its replicas do.
#[test]
fn nothing_is_written_without_the_mark_at_the_server_that_confirms_it() {
    let shop = Shop::open(
        Servers::sabotaged(&[Change {
            from: "redis.call('HSET', KEYS[5], own, string.format('%.0f', now + tonumber(ARGV[2])))",
            to: "",
        }]),
        "5s",
    );
    let mut client = shop.sidecar.client();
    refused(
        &client.call(&["SET", "text:1", "one"]),
        &["NOREPLICAS", "nothing was written", "another server has taken the place"],
    );
    assert_eq!(shop.value("SELECT count(*)::text FROM texts"), "0");
    assert!(shop.servers.changed() > 1, "it is tried again");
}

/// As when sentinels have begun to promote the replica, and its primary, which is alive, does not know of it yet.
#[test]
fn nothing_is_written_while_a_replica_that_may_become_primary_follows_nobody() {
    let shop = Shop::open(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1)), "5s");
    let Servers::Sentinel(servers) = &shop.servers else { unreachable!() };
    let (replica, primary) = (&servers.servers[1], servers.primary_port().to_string());
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&["SET", "text:1", "one"]), Value::Simple("OK".to_owned()));
    wait_for("the replica to have the value", LIMIT, || replica.client().call(&["GET", "text:1"]).text() == "one");
    // Sentinels bring one back that follows another only after eight seconds.
    replica.client().call(&["REPLICAOF", "127.0.0.1", "1"]);
    wait_for("the primary to be alone", LIMIT, || {
        servers.servers[0].client().line("INFO replication").text().contains("connected_slaves:0")
    });
    refused(
        &client.call(&["SET", "text:1", "two"]),
        &["NOREPLICAS", "nothing was written", "may be promoted and does not follow"],
    );
    assert_eq!(shop.value("SELECT v FROM texts WHERE id = '1'"), "one");
    replica.client().call(&["REPLICAOF", "127.0.0.1", &primary]);
    wait_for("a write with the replica", LIMIT, || client.call(&["SET", "text:1", "three"]) == Value::Simple("OK".to_owned()));
    assert_eq!(shop.value("SELECT v FROM texts WHERE id = '1'"), "three");
}

#[test]
fn sqlite_is_written_to_as_well() {
    let directory = TempDir::new().expect("a temporary directory");
    let file = directory.path().join("shop.db");
    let url = format!("sqlite://{}", file.display());
    block(async {
        use sqlx::{ConnectOptions as _, Connection as _};
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().expect("a URL");
        let mut connection = options.create_if_missing(true).connect().await.expect("a database");
        let tables = "CREATE TABLE texts (id TEXT PRIMARY KEY, v TEXT NOT NULL, n REAL, row_version INTEGER NOT NULL DEFAULT 1); \
                      CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT UNIQUE)";
        sqlx::raw_sql(tables).execute(&mut connection).await.expect("tables");
        connection.close().await.expect("closes");
    });
    let servers = Servers::sentinel();
    let text = "INSERT INTO texts (id, v, n) VALUES ($id, $value.v, $value.n) ON CONFLICT (id) DO UPDATE \
                SET v = excluded.v, n = excluded.n, row_version = row_version + 1 RETURNING row_version";
    let rules = [
        rule(
            "text",
            "db",
            "SELECT v, n, row_version FROM texts WHERE id = $id",
            &json!({
                "write": text, "delete": "DELETE FROM texts WHERE id = $id", "version": "row_version"
            }),
        ),
        rule("name", "db", "SELECT name FROM names WHERE id = $id", &json!({"write": "REPLACE INTO names VALUES ($id, $value)"})),
        rule("new", "db", "SELECT name FROM names WHERE id = $id", &json!({"write": "INSERT INTO names VALUES ($id, $value)"})),
    ];
    let sidecar = sidecar(&servers, &[origin("db", &url, "10s")], &rules);
    let mut client = sidecar.client();
    let ok = Value::Simple("OK".to_owned());
    for n in 1..=3 {
        assert_eq!(client.call(&["SET", "text:7", &format!(r#"{{"v":"'); DROP TABLE texts; --","n":{n}.5}}"#)]), ok);
    }
    servers.expire("text:7");
    assert_eq!(client.call(&["GET", "text:7"]).text(), r#"{"v":"'); DROP TABLE texts; --","n":3.5,"row_version":3}"#);
    assert_eq!(
        (client.line("DEL text:7"), client.line("DEL text:7"), client.line("GET text:7")),
        (Value::Int(1), Value::Int(0), Value::Nil)
    );
    assert_eq!(client.line("SET name:1 Ann"), ok);
    refused(
        &client.line("SET new:1 Bob"),
        &["ORIGIN origin `db` refused the write", "UNIQUE constraint failed", "nothing was written"],
    );
    refused(&client.line("SET new:2 Ann"), &["UNIQUE constraint failed: names.name"]);
    assert_eq!(client.line("GET name:1").text(), "Ann");
    assert_eq!(
        (client.line("GET new:2"), client.line("SET new:2 Bob"), client.line("GET name:2").text()),
        (Value::Nil, ok, "Bob".to_owned())
    );
}
