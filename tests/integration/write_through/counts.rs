//! Numbers that are raised at the origin.

use std::collections::BTreeSet;

use serde_json::json;
use tempfile::TempDir;

use super::sql::refused;
use super::{block, origin, rule, sidecar};
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::postgres::Postgres;
use crate::support::resp::Value;

const TABLE: &str = "CREATE TABLE counts (id bigint PRIMARY KEY, n int CHECK (n < 1000), row_version bigint NOT NULL DEFAULT 1)";
const READ: &str = "SELECT n FROM counts WHERE id = $id";
const CLIENTS: usize = 6;
const EACH: usize = 20;

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

#[test]
fn what_is_raised_is_answered_and_kept_as_the_origin_has_it() {
    let postgres = Postgres::shared();
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let url = block(postgres.database(&[TABLE]));
        let database = url.rsplit('/').next().expect("a name");
        let value = |query: &str| block(postgres.value(database, query));
        let write = "INSERT INTO counts VALUES ($id, $value::int) ON CONFLICT (id) DO UPDATE SET n = excluded.n";
        let increment = "UPDATE counts SET n = n + $by, row_version = row_version + 1 WHERE id = $id";
        let upsert = "INSERT INTO counts VALUES ($id, $by) ON CONFLICT (id) DO UPDATE SET n = counts.n + $by, row_version = counts.row_version + 1";
        let rules = [
            rule("known", "db", READ, &json!({"write": write, "increment": format!("{increment} RETURNING n")})),
            rule(
                "count",
                "db",
                READ,
                &json!({
                    "write": format!("{write}, row_version = counts.row_version + 1 RETURNING row_version"),
                    "increment": format!("{upsert} RETURNING n, row_version"),
                    "version": "row_version", "delete": "DELETE FROM counts WHERE id = $id",
                }),
            ),
            rule("wrong", "db", READ, &json!({"write": write, "increment": format!("{increment} RETURNING n, id")})),
        ];
        let origins = [origin("db", &url, "20s")];
        let sidecar_one = sidecar(&servers, &origins, &rules);
        let mut client = sidecar_one.client();
        for (line, number) in [
            ("INCR count:1", 1),
            ("INCRBY count:1 41", 42),
            ("DECR count:1", 41),
            ("DECRBY count:1 -9", 50),
            ("INCRBY count:1 -8", 42),
        ] {
            assert_eq!(client.line(line), Value::Int(number), "{line}");
            assert_eq!(value("SELECT n::text FROM counts WHERE id = 1"), number.to_string());
            assert_eq!(servers.holder_of("count:1").line("GET count:1"), bulk(&number.to_string()), "{line}");
            let ttl = servers.holder_of("count:1").line("PTTL count:1").int();
            assert!((3_500_000..=3_600_000).contains(&ttl), "{ttl}");
        }
        assert_eq!(client.line("GET count:1"), bulk("42"));
        assert_eq!((client.line("SET count:1 7"), client.line("INCR count:1")), (Value::Simple("OK".to_owned()), Value::Int(8)));
        // What the origin refuses is told in its words, and leaves no value.
        refused(&client.line("INCRBY count:1 5000"), &["ORIGIN", "nothing was written", "23514"]);
        assert_eq!((servers.holder_of("count:1").line("EXISTS count:1"), client.line("GET count:1")), (Value::Int(0), bulk("8")));
        refused(&client.line("INCRBY count:1 9223372036854775807"), &["ORIGIN", "nothing was written", "22003"]);
        refused(&client.line("INCR known:9"), &["changed no row", "nothing was written"]);
        refused(&client.line("INCR wrong:1"), &["ORIGIN", "`increment` does not return one column", "nothing was written"]);
        block(postgres.run(database, &["INSERT INTO counts VALUES (5, NULL)"]));
        refused(&client.line("INCR known:5"), &["no whole number", "nothing was written"]);
        assert_eq!(value("SELECT n::text FROM counts WHERE id = 1"), "8");
        for (line, words) in
            [("INCRBY count:1 x", "not an integer"), ("INCRBYFLOAT count:1 1.5", "INCRBYFLOAT"), ("APPEND count:1 0", "APPEND")]
        {
            refused(&client.line(line), &[words]);
        }
        client.line("MULTI");
        refused(&client.line("INCR count:1"), &["send it by itself"]);
        assert!(client.line("EXEC").is_error());
        assert_eq!(rule_count(&sidecar_one, "count", "writes"), 9);
        // None is lost or made twice, whoever raises it at once, and what the cache keeps is the last.
        let other = sidecar(&servers, &origins, &rules);
        let numbers = std::thread::scope(|scope| {
            let raise = |at: usize| {
                let mut client = if at.is_multiple_of(2) { sidecar_one.client() } else { other.client() };
                (0..EACH).map(|_| client.line("INCR count:2").int()).collect::<Vec<_>>()
            };
            let clients: Vec<_> = (0..CLIENTS).map(|at| scope.spawn(move || raise(at))).collect();
            clients.into_iter().flat_map(|client| client.join().expect("a client")).collect::<Vec<_>>()
        });
        let all = (CLIENTS * EACH) as i64;
        assert_eq!(numbers.iter().copied().collect::<BTreeSet<_>>(), (1..=all).collect(), "{numbers:?}");
        let cached = servers.holder_of("count:2").line("GET count:2");
        assert!(cached == Value::Nil || cached == bulk(&all.to_string()), "{cached:?}");
        assert_eq!((client.line("GET count:2"), client.line("DEL count:2")), (bulk(&all.to_string()), Value::Int(1)));
        assert_eq!(servers.holder_of("count:2").call(&["KEYS", "larder:i:*"]), Value::Array(Vec::new()));
    }
}

#[test]
fn sqlite_raises_numbers_as_well() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = format!("sqlite://{}", directory.path().join("shop.db").display());
    block(async {
        use sqlx::{ConnectOptions as _, Connection as _};
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().expect("a URL");
        let mut connection = options.create_if_missing(true).connect().await.expect("a database");
        let table = "CREATE TABLE counts (id INTEGER PRIMARY KEY, n INTEGER CHECK (n < 1000))";
        sqlx::raw_sql(table).execute(&mut connection).await.expect("a table");
        connection.close().await.expect("closes");
    });
    let servers = Servers::sentinel();
    let store = json!({
        "write": "REPLACE INTO counts VALUES ($id, $value)",
        "increment": "INSERT INTO counts VALUES ($id, $by) ON CONFLICT (id) DO UPDATE SET n = n + $by RETURNING n",
    });
    let sidecar = sidecar(&servers, &[origin("db", &url, "10s")], &[rule("count", "db", READ, &store)]);
    let mut client = sidecar.client();
    assert_eq!((client.line("INCRBY count:1 41"), client.line("INCR count:1")), (Value::Int(41), Value::Int(42)));
    assert_eq!(servers.holder_of("count:1").line("GET count:1"), bulk("42"));
    servers.expire("count:1");
    assert_eq!((client.line("GET count:1"), client.line("DECRBY count:1 2")), (bulk("42"), Value::Int(40)));
    refused(&client.line("INCRBY count:1 999"), &["ORIGIN", "CHECK constraint failed", "nothing was written"]);
    assert_eq!(client.line("GET count:1"), bulk("40"));
}
