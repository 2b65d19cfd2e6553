//! Hashes that are loaded from a row's columns, and carried to them.

use std::sync::Arc;

use larder::sidecar::slots::Companion;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::sql::refused;
use super::{block, origin, rule, sidecar};
use crate::read_through;
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;

const USERS: &str = "CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL UNIQUE, age int CHECK (age < 200), \
                     photo bytea, tags jsonb, row_version bigint NOT NULL DEFAULT 1)";
const READ: &str = "SELECT name, age, photo, tags FROM users WHERE id = $id";
const WRITE: &str = "INSERT INTO users VALUES ($id, $value.name, $value.age, $value.photo, $value.tags) ON CONFLICT (id) DO UPDATE \
                     SET name = excluded.name, age = excluded.age, photo = excluded.photo, tags = excluded.tags, \
                     row_version = users.row_version + 1 RETURNING row_version";

/// The same rule, whose values are hashes.
fn of_hashes(mut rule: Json, strategy: &str) -> Json {
    let pointer = format!("/strategy/{strategy}/load/reply");
    *rule.pointer_mut(&pointer).expect("a rule that loads") = json!("Hash");
    rule
}

struct Shop {
    servers: Servers,
    postgres: Arc<Postgres>,
    database: String,
    sidecar: Sidecar,
}

impl Shop {
    fn open(servers: Servers) -> Self {
        let postgres = Postgres::shared();
        let url = block(postgres.database(&[USERS]));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let store = json!({"write": WRITE, "delete": "DELETE FROM users WHERE id = $id", "version": "row_version"});
        let query = json!({"sql": {"read": READ}});
        let rules = [
            of_hashes(rule("user", "db", READ, &store), "writeThrough/read"),
            of_hashes(read_through::rule("row", "db", query, json!({"stale": "1h"})), "readThrough"),
        ];
        let sidecar = sidecar(&servers, &[origin("db", &url, "10s")], &rules);
        Self { servers, postgres, database, sidecar }
    }

    fn value(&self, query: &str) -> String {
        block(self.postgres.value(&self.database, query))
    }

    fn run(&self, statements: &[&str]) {
        block(self.postgres.run(&self.database, statements));
    }

    /// What the cache has, asked past Larder.
    fn cached(&self, line: &str) -> Value {
        let key = line.split(' ').nth(1).expect("a key");
        self.servers.holder_of(key).line(line)
    }
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

fn bulks(texts: &[&str]) -> Value {
    Value::Array(texts.iter().map(|text| bulk(text)).collect())
}

/// Ann, as a client writes her.
const ANN: [&str; 10] = ["HSET", "user:1", "name", "Ann", "age", "41", "photo", "p", "tags", r#"["a"]"#];

#[test]
fn a_whole_hash_is_at_the_origin_and_in_the_cache_when_it_is_acknowledged() {
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let shop = Shop::open(servers);
        let mut client = shop.sidecar.client();
        assert_eq!(client.call(&ANN), Value::Int(4));
        assert_eq!(
            shop.value("SELECT name || age || encode(photo, 'escape') || tags::text FROM users WHERE id = 1"),
            r#"Ann41p["a"]"#
        );
        let hash = |value: Value| {
            let texts: Vec<String> = value.items().iter().map(Value::text).collect();
            let mut pairs: Vec<_> = texts.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
            pairs.sort();
            pairs
        };
        let expected = [("age", "41"), ("name", "Ann"), ("photo", "p"), ("tags", r#"["a"]"#)];
        let expected = expected.map(|(field, value)| (field.to_owned(), value.to_owned()));
        assert_eq!(hash(shop.cached("HGETALL user:1")), expected);
        let ttl = shop.cached("PTTL user:1").int();
        assert!((3_500_000..=3_600_000).contains(&ttl), "{ttl}");
        assert_eq!((client.line("HGET user:1 name"), hash(client.line("HGETALL user:1"))), (bulk("Ann"), expected.to_vec()));
        // What is loaded is the same.
        shop.servers.expire("user:1");
        assert_eq!(hash(client.line("HGETALL user:1")), expected);
        assert_eq!(hash(shop.cached("HGETALL user:1")), expected);
        assert!((3_500_000..=3_600_000).contains(&shop.cached("PTTL user:1").int()));
        // It is written anew as a whole, and deleted.
        assert_eq!(client.line("HMSET user:1 name Bob age 42 photo q tags {}"), Value::Simple("OK".to_owned()));
        assert_eq!(shop.value("SELECT name || age || row_version FROM users"), "Bob422");
        assert_eq!(client.line("HMGET user:1 name age"), bulks(&["Bob", "42"]));
        assert_eq!((client.line("DEL user:1 user:2"), client.line("UNLINK user:1")), (Value::Int(1), Value::Int(0)));
        assert_eq!((client.line("HGETALL user:1"), shop.cached("EXISTS user:1")), (bulks(&[]), Value::Int(0)));
        assert_eq!(shop.servers.holder_of("user:1").call(&["KEYS", "larder:i:*"]), bulks(&[]));
        assert_eq!(rule_count(&shop.sidecar, "user", "writes"), 4);
    }
}

#[test]
fn each_read_of_a_missing_hash_loads_it() {
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let shop = Shop::open(servers);
        shop.run(&["INSERT INTO users (id, name, age, photo) VALUES (1, 'Ann', NULL, '\\x00ff'), (2, 'Bob', 42, '')"]);
        let (mut resp2, mut resp3) = (shop.sidecar.client(), shop.sidecar.client());
        resp3.line("HELLO 3");
        let photo = Value::Bulk(vec![0, 255]);
        for (line, reply) in [
            ("HGET user:1 name", bulk("Ann")),
            ("HGET user:1 photo", photo.clone()),
            // NULL is no field.
            ("HGET user:1 age", Value::Nil),
            ("HMGET user:1 age name none", Value::Array(vec![Value::Nil, bulk("Ann"), Value::Nil])),
            ("HMGET user:1 age tags", Value::Array(vec![Value::Nil, Value::Nil])),
            ("HGETALL user:1", Value::Array(vec![bulk("name"), bulk("Ann"), bulk("photo"), photo.clone()])),
            ("HKEYS user:1", bulks(&["name", "photo"])),
            ("HVALS user:1", Value::Array(vec![bulk("Ann"), photo])),
            ("HLEN user:1", Value::Int(2)),
            ("HEXISTS user:1 name", Value::Int(1)),
            ("HEXISTS user:1 age", Value::Int(0)),
            ("HSTRLEN user:1 name", Value::Int(3)),
            ("HSTRLEN user:2 photo", Value::Int(0)),
            ("EXISTS user:1", Value::Int(1)),
            ("EXISTS user:1 user:2 user:3", Value::Int(2)),
            // There is none.
            ("HGET user:9 name", Value::Nil),
            ("HMGET user:9 name age", Value::Array(vec![Value::Nil, Value::Nil])),
            ("HGETALL user:9", bulks(&[])),
            ("HLEN user:9", Value::Int(0)),
            ("HEXISTS user:x name", Value::Int(0)),
        ] {
            let key = line.split(' ').nth(1).expect("a key");
            for _ in 0..2 {
                assert_eq!(resp2.line(line), reply, "{line}");
            }
            let is_there = shop.cached(&format!("EXISTS {key}")).int() == 1;
            assert_eq!(is_there, ["user:1", "user:2"].contains(&key), "{line}");
            if is_there {
                assert!(shop.cached(&format!("PTTL {key}")).int() > 0);
                shop.servers.expire(key);
            }
        }
        shop.servers.expire("user:2");
        let fields = resp3.line("HGETALL user:2");
        assert!(matches!(&fields, Value::Map(pairs) if pairs.len() == 3), "{fields:?}");
        assert_eq!(resp3.line("HGETALL user:2"), fields, "as the server says it");
        // What is no string is null to MGET, and wrong to GET, loaded or not.
        shop.servers.expire("user:2");
        for _ in 0..2 {
            refused(&resp2.line("GET user:2"), &["WRONGTYPE"]);
            assert_eq!(resp2.line("MGET user:2 user:9"), Value::Array(vec![Value::Nil, Value::Nil]));
            refused(&resp2.line("STRLEN user:2"), &["WRONGTYPE"]);
        }
        refused(&resp2.line("HSCAN user:2 0"), &["HSCAN of a key of the rule `user`", "HGETALL"]);
        // One load for all who ask at once.
        let before = rule_count(&shop.sidecar, "user", "loads");
        shop.servers.expire("user:2");
        let mut clients: Vec<Client> = (0..8).map(|_| shop.sidecar.client()).collect();
        clients.iter_mut().for_each(|client| client.send(b"*3\r\n$4\r\nHGET\r\n$6\r\nuser:2\r\n$4\r\nname\r\n").expect("sent"));
        assert!(clients.iter_mut().all(|client| client.read().expect("a reply") == bulk("Bob")));
        assert_eq!(rule_count(&shop.sidecar, "user", "loads") - before, 1);
    }
}

#[test]
fn part_of_a_hash_is_refused_by_name_and_nothing_is_touched() {
    let shop = Shop::open(Servers::sentinel());
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&ANN), Value::Int(4));
    for (line, words) in [
        ("HSET user:1 name Bob", "lacks `age`"),
        ("HSET user:1 name Bob age 1 photo p", "lacks `tags`"),
        ("HSET user:1 name Bob age 1 photo p tags [] mail x", "no field `mail`"),
        ("HSET user:1 name Bob age", "wrong number of arguments for 'hset'"),
        ("HDEL user:1 age", "HDEL of a key of the rule `user`"),
        ("HINCRBY user:1 age 1", "HSET and HMSET of all fields"),
        ("HSETNX user:1 age 1", "HSETNX"),
        ("SET user:1 Bob", "HSET and HMSET of all fields"),
        ("HSET row:1 name Bob", "some of its fields"),
    ] {
        refused(&client.line(line), &[words]);
        assert_eq!(client.line("MULTI"), Value::Simple("OK".to_owned()));
        assert!(client.line(line).is_error(), "{line} in a transaction");
        assert!(client.line("EXEC").is_error());
    }
    assert_eq!((shop.cached("HLEN user:1"), shop.cached("EXISTS row:1")), (Value::Int(4), Value::Int(0)));
    assert_eq!(shop.value("SELECT name || age FROM users"), "Ann41");
    // What the origin refuses is told in its words, and leaves no value.
    for (line, words) in [
        ("HSET user:1 name Ann age 999 photo p tags []", "23514"),
        ("HSET user:1 name Ann age old photo p tags []", "22P02"),
        ("HSET user:1 name Ann age 1 photo p tags [", "22P02"),
        ("HSET user:2 name Ann age 1 photo p tags []", "users_name_key"),
    ] {
        refused(&client.line(line), &["ORIGIN origin `db` refused the write", "nothing was written", words]);
        assert_eq!(shop.cached("EXISTS user:1 user:2"), Value::Int(if line.contains("user:2") { 1 } else { 0 }), "{line}");
        assert_eq!(
            (client.line("HGET user:1 age"), shop.value("SELECT name || age FROM users")),
            (bulk("41"), "Ann41".to_owned())
        );
    }
}

#[test]
fn nothing_of_a_field_is_ever_part_of_a_statement() {
    let shop = Shop::open(Servers::sentinel());
    let mut client = shop.sidecar.client();
    let bytes: Vec<u8> = (0..=255).collect();
    for (id, name) in ["'; DROP TABLE users; --", "$1", "$value.age", "NULL", "", "é\u{202e}", "\r\n*1\r\n$8\r\nFLUSHALL\r\n"]
        .iter()
        .enumerate()
    {
        let key = format!("user:{id}");
        let command: [&[u8]; 10] =
            [b"HSET", key.as_bytes(), b"name", name.as_bytes(), b"age", b"1", b"photo", &bytes, b"tags", b"{}"];
        assert_eq!(client.call(&command), Value::Int(4), "{name:?}");
        assert_eq!(shop.cached(&format!("HGET {key} photo")), Value::Bulk(bytes.clone()));
        shop.servers.expire(&key);
        assert_eq!(
            (client.call(&["HGET", &key, "name"]), client.call(&["HGET", &key, "photo"])),
            (bulk(name), Value::Bulk(bytes.clone()))
        );
    }
    let nul: [&[u8]; 10] = [b"HSET", b"user:1", b"name", b"a\0b", b"age", b"1", b"photo", b"p", b"tags", b"{}"];
    refused(&client.call(&nul), &["the value is no text, and $value.name is a text"]);
    refused(
        &client.call(&[&b"HSET"[..], b"user:\xff", b"name", b"x", b"age", b"1", b"photo", b"p", b"tags", b"{}"]),
        &["a part of the key"],
    );
    // Long ones come in pieces, and in many fields' worth of bytes.
    let long = "x".repeat(600_000);
    assert_eq!(client.call(&["HSET", "user:1", "name", "long", "age", "1", "photo", &long, "tags", "{}"]), Value::Int(4));
    assert_eq!(shop.value("SELECT length(photo)::text FROM users WHERE id = 1"), "600000");
    shop.servers.expire("user:1");
    assert_eq!(client.call(&["HMGET", "user:1", "age", "photo"]), bulks(&["1", &long]));
    let longer = "x".repeat(1_100_000);
    let reply = client.call(&["HSET", "user:1", "name", "long", "age", "1", "photo", &longer, "tags", "{}"]);
    refused(&reply, &["a command of more than 1048576 bytes cannot be carried"]);
}

#[test]
fn a_value_of_another_type_harms_nobody() {
    let shop = Shop::open(Servers::sentinel());
    let mut client = shop.sidecar.client();
    assert_eq!(client.call(&ANN), Value::Int(4));
    // As it was cached before the rule said so, or written past Larder.
    for key in ["user:1", "row:1"] {
        assert_eq!(shop.servers.holder_of(key).call(&["SET", key, "text", "PX", "600000"]), Value::Simple("OK".to_owned()));
        for line in ["HGETALL", "HLEN", "HKEYS"] {
            refused(&client.line(&format!("{line} {key}")), &["WRONGTYPE"]);
        }
        refused(&client.line(&format!("HGET {key} name")), &["WRONGTYPE"]);
        assert_eq!(client.line(&format!("GET {key}")), bulk("text"));
    }
    assert_eq!(client.call(&ANN), Value::Int(4));
    assert_eq!((shop.cached("TYPE user:1").text(), client.line("HGET user:1 name")), ("hash".to_owned(), bulk("Ann")));
    // So is a stale copy.
    let stale = String::from_utf8(Companion::Stale.name(b"row:1")).expect("text");
    shop.servers.expire("row:1");
    shop.servers.holder_of("row:1").call(&["SET", &stale, "text", "PX", "600000"]);
    assert_eq!(client.line("HGET row:1 name"), bulk("Ann"));
    assert_eq!(shop.servers.holder_of("row:1").call(&["HGET", &stale, "name"]), bulk("Ann"));
    // And a copy serves while the origin cannot.
    shop.servers.expire("row:1");
    shop.run(&["ALTER TABLE users RENAME TO elsewhere"]);
    assert_eq!(client.line("HMGET row:1 age name"), bulks(&["41", "Ann"]));
    assert!(client.line("HGETALL row:2").is_error());
}

#[test]
fn sqlite_has_hashes_as_well() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = format!("sqlite://{}", directory.path().join("shop.db").display());
    block(async {
        use sqlx::{ConnectOptions as _, Connection as _};
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().expect("a URL");
        let mut connection = options.create_if_missing(true).connect().await.expect("a database");
        let table = "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT UNIQUE, age INTEGER, n REAL, photo BLOB)";
        sqlx::raw_sql(table).execute(&mut connection).await.expect("a table");
        connection.close().await.expect("closes");
    });
    let servers = Servers::sentinel();
    let store = json!({
        "write": "REPLACE INTO users VALUES ($id, $value.name, $value.age, NULLIF($value.n, ''), $value.photo)",
        "delete": "DELETE FROM users WHERE id = $id",
    });
    let rules = [
        of_hashes(rule("user", "db", "SELECT name, age, n, photo FROM users WHERE id = $id", &store), "writeThrough/read"),
        of_hashes(rule("adult", "db", "SELECT name FROM users WHERE id = $id AND age > 17", &store), "writeThrough/read"),
    ];
    let sidecar = sidecar(&servers, &[origin("db", &url, "10s")], &rules);
    let mut client = sidecar.client();
    let ann: [&[u8]; 10] =
        [b"HSET", b"user:1", b"name", b"'); DROP TABLE users; --", b"age", b"41", b"n", b"1.5", b"photo", b"\0\xff"];
    assert_eq!(client.call(&ann), Value::Int(4));
    servers.expire("user:1");
    assert_eq!(client.line("HMGET user:1 name age n"), bulks(&["'); DROP TABLE users; --", "41", "1.5"]));
    assert_eq!(client.line("HGET user:1 photo"), Value::Bulk(vec![0, 255]));
    assert_eq!(client.line("HGET adult:1 name"), bulk("'); DROP TABLE users; --"), "the age is a number");
    let bob: [&[u8]; 10] = [b"HSET", b"user:2", b"name", b"Bob", b"age", b"7", b"n", b"", b"photo", b"p"];
    assert_eq!(client.call(&bob), Value::Int(4));
    servers.expire("user:2");
    assert_eq!((client.line("HGET user:2 n"), client.line("HLEN user:2")), (Value::Nil, Value::Int(3)));
    assert_eq!((client.line("DEL user:2"), client.line("HGETALL user:2")), (Value::Int(1), bulks(&[])));
}
