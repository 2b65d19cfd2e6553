//! Loads from a real Postgres.

use std::time::{Duration, Instant};

use larder::origin::{BreakerState, LoadError, Loaded, Origins};
use larder::policy::snapshot::{OriginKind, Sensitive};
use larder::policy::{ReplyForm, Span};

use crate::support::origin::{found, loader, reads, sql, with};
use crate::support::postgres::{Pooler, Postgres};

const USERS: [&str; 3] = [
    "CREATE TYPE mood AS ENUM ('sad', 'ok')",
    "CREATE TABLE users (id bigint PRIMARY KEY, small smallint, name text, tenant text, mood mood, born date, uid uuid, amount numeric)",
    "INSERT INTO users SELECT n, n, 'name ' || n, 'acme', 'ok', '2020-01-01', \
     ('00000000-0000-0000-0000-00000000000' || n)::uuid, n / 2.0 FROM generate_series(1, 9) AS n",
];

#[tokio::test]
async fn one_column_as_it_is_and_several_as_json() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&USERS).await);
    for (read, reply, value) in [
        ("SELECT name FROM users WHERE id = $id", None, "name 7"),
        ("SELECT id, name FROM users WHERE id = $id", None, r#"{"id":7,"name":"name 7"}"#),
        ("SELECT name, id FROM users WHERE id = $id;", None, r#"{"name":"name 7","id":7}"#),
        ("SELECT name FROM users WHERE id = $id -- a comment", Some(ReplyForm::Json), r#"{"name":"name 7"}"#),
        ("WITH u AS (SELECT * FROM users) SELECT name FROM u WHERE id = $id::int", Some(ReplyForm::String), "name 7"),
        ("SELECT count(*) AS n, '$id' AS \"a $id b\" FROM users WHERE id < $id", None, r#"{"n":6,"a $id b":"$id"}"#),
        ("SELECT name FROM users WHERE small = $id AND id = $id", None, "name 7"),
        ("SELECT name FROM users ORDER BY id LIMIT 1 OFFSET $id", None, "name 8"),
    ] {
        let loader = loader(&origin, "user:{id}", &reads(read, None, reply));
        assert_eq!(loader.load(b"user:7").await, Ok(found(value)), "{read}");
    }
    let absent = loader(&origin, "user:{id}", &reads("SELECT name FROM users WHERE id = $id", None, None));
    assert_eq!(absent.load(b"user:77").await, Ok(Loaded::NotFound));
    assert_eq!(absent.load(b"other:7").await, Ok(Loaded::NotFound), "not covered");
    let null = loader(&origin, "user:{id}", &reads("SELECT NULL FROM users WHERE id = $id", None, None));
    assert_eq!(null.load(b"user:7").await, Ok(Loaded::NotFound));
}

#[tokio::test]
async fn what_cannot_serve_a_rule_says_why() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&USERS).await);
    for (read, reply, word) in [
        ("SELECT name FROM users WHERE id < $id", None, "more than one row"),
        ("SELECT id, name FROM users WHERE id = $id", Some(ReplyForm::String), "one column"),
        ("SELECT id, id FROM users WHERE id = $id", None, "two columns"),
        ("SELECT nothing FROM users WHERE id = $id", None, "nothing"),
        ("SELECT name FROM nowhere WHERE id = $id", None, "nowhere"),
        ("SELECT name FROM users WHERE id = $id FOR UPDATE", None, "read-only"),
        ("WITH d AS (DELETE FROM users WHERE id = $id RETURNING name) SELECT name FROM d", None, "top level"),
        ("SELECT 1 / (id - 7) FROM users WHERE id = $id", None, "22012"),
    ] {
        let loader = loader(&origin, "user:{id}", &reads(read, None, reply));
        let error = loader.load(b"user:7").await.expect_err(read);
        assert!(matches!(error, LoadError::Unusable { .. }), "{read}: {error}");
        assert!(error.to_string().contains(word), "{read}: {error}");
    }
    assert_eq!(server.value("postgres", "SELECT 'still here'").await, "still here");
}

/// What cannot be a value of the parameter's type is not found, whether this side or the server finds out, and in neither case
/// part of a statement: the server logs all statements and no parameters.
#[tokio::test]
async fn hostile_parts_never_reach_sql_as_text() {
    let server = Postgres::start();
    let url = server.database(&USERS).await;
    let origin = sql(&url);
    let long = "hostile".repeat(150_000).into_bytes();
    let hostile: [&[u8]; 12] = [
        b"hostile' OR '1'='1",
        b"hostile'; DROP TABLE users; --",
        b"hostile\" $id $1 $$ \\ /* -- ",
        b"hostile\0",
        b"hostile\xff\xfe",
        &long,
        b"9223372036854775808",
        b"-99999999999999999999999999",
        b"7 OR 1=1",
        b"07",
        b"+7",
        "hostile٧".as_bytes(),
    ];
    for (column, ordinary) in [
        ("id", "7"),
        ("small", "7"),
        ("name", "name 7"),
        ("mood", "ok"),
        ("born", "2020-01-01"),
        ("uid", "00000000-0000-0000-0000-000000000007"),
    ] {
        let read = format!("SELECT max(name) FROM users WHERE {column} = $id HAVING count(*) > 0");
        let many = format!("SELECT {column} AS id, max(name) AS max FROM users WHERE {column} = ANY($id) GROUP BY {column}");
        let loader = loader(&origin, "user:{id…}", &reads(&read, Some(&many), None));
        let keys: Vec<Vec<u8>> = hostile.iter().map(|part| [b"user:", *part].concat()).collect();
        for key in &keys {
            assert_eq!(
                loader.load(key).await,
                Ok(Loaded::NotFound),
                "{column} = {}",
                String::from_utf8_lossy(&key[..key.len().min(40)])
            );
        }
        assert!(loader.load_many(&keys).await.iter().all(|answer| *answer == Ok(Loaded::NotFound)), "{column}");
        assert_ne!(loader.load(format!("user:{ordinary}").as_bytes()).await, Ok(Loaded::NotFound), "{column}");
    }
    let log = server.log();
    let statements: Vec<&str> = log.lines().filter(|line| line.contains("statement:") || line.contains("execute ")).collect();
    assert!(statements.len() > 100, "the log holds the statements");
    assert!(
        !statements.iter().any(|line| line.contains("hostile") || line.contains("DROP") || line.contains("9223372036854775808"))
    );
    assert_eq!(server.value(url.rsplit('/').next().expect("a name"), "SELECT count(*)::text FROM users").await, "9");
}

#[tokio::test]
async fn many_keys_share_a_query_and_give_the_same_bytes_as_one() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&USERS).await);
    let cases = [
        ("SELECT name FROM users WHERE id = $id", "SELECT id, name FROM users WHERE id = ANY($id)", "{id}"),
        ("SELECT id, name FROM users WHERE id = $id", "SELECT name, mood, id FROM users WHERE id = ANY($id)", "{id}"),
        ("SELECT amount FROM users WHERE uid = $id", "SELECT uid AS id, amount FROM users WHERE uid = ANY($id)", "{uid}"),
        ("SELECT name FROM users WHERE name = $id", "SELECT name, name AS id FROM users WHERE name = ANY($id)", "name {id}"),
        (
            "SELECT name FROM users WHERE id = $id",
            "SELECT u.name, a.id FROM unnest($id::int8[]) AS a(id) JOIN users u USING (id)",
            "{id}",
        ),
    ];
    for (read, many, part) in cases {
        let spell = |id: &str| part.replace("{uid}", &format!("00000000-0000-0000-0000-00000000000{id}")).replace("{id}", id);
        let keys: Vec<Vec<u8>> =
            ["7", "x", "3", "7", "88", "1"].iter().map(|id| format!("user:{}", spell(id)).into_bytes()).collect();
        let load = reads(read, Some(many), None);
        let origins = Origins::new(std::slice::from_ref(&origin)).expect("valid");
        let loader = origins.loader(&"user:{id…}".parse().expect("valid"), &load).expect("valid");
        assert!(loader.batches());
        let answers = loader.load_many(&keys).await;
        let queries = origins.stats()[0].queries;
        assert_eq!(queries, 1, "{many}");
        for (key, answer) in keys.iter().zip(answers) {
            assert_eq!(loader.load(key).await, answer, "{many}: {}", String::from_utf8_lossy(key));
        }
    }
}

#[tokio::test]
async fn a_read_many_that_gives_something_else_is_refused() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&USERS).await);
    for (many, word) in [
        ("SELECT uid AS id, name FROM users WHERE id = ANY($id)", "different types"),
        ("SELECT id FROM users WHERE id = ANY($id)", "no column `name`"),
        ("SELECT id, name FROM users WHERE id = $id", "ANY($id)"),
    ] {
        let load = reads("SELECT id, name FROM users WHERE id = $id", Some(many), None);
        let answers = loader(&origin, "user:{id}", &load).load_many(&[b"user:7".to_vec(), b"user:8".to_vec()]).await;
        let error = answers[0].as_ref().expect_err(many).to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[tokio::test]
async fn keys_of_several_parts_and_rows_in_another_spelling() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&USERS).await);
    let read = "SELECT name FROM users WHERE tenant = $tenant AND id = $id";
    let many = "SELECT u.name, u.tenant, u.id FROM users u JOIN unnest($tenant::text[], $id::int8[]) AS k(t, i) ON k.t = u.tenant AND k.i = u.id";
    let loads = loader(&origin, "{tenant}:user:{id}", &reads(read, Some(many), None));
    let keys = [b"acme:user:7".to_vec(), b"other:user:7".to_vec(), b"acme:user:8".to_vec()];
    assert_eq!(loads.load_many(&keys).await, [Ok(found("name 7")), Ok(Loaded::NotFound), Ok(found("name 8"))]);
    // The database compares without regard to case, this side does not know: such keys are asked for one by one.
    let read = "SELECT name FROM users WHERE lower(name) = lower($id)";
    let many = "SELECT name, name AS id FROM users WHERE lower(name) IN (SELECT lower(x) FROM unnest($id::text[]) AS x)";
    let loads = loader(&origin, "user:{id}", &reads(read, Some(many), None));
    let keys = [b"user:NAME 7".to_vec(), b"user:name 8".to_vec(), b"user:NAME 99".to_vec()];
    assert_eq!(loads.load_many(&keys).await, [Ok(found("name 7")), Ok(found("name 8")), Ok(Loaded::NotFound)]);
    // Two rows for one key harm no other key.
    let many =
        "SELECT name, small AS id FROM (SELECT * FROM users UNION ALL SELECT * FROM users WHERE id = 7) u WHERE small = ANY($id)";
    let loads = loader(&origin, "user:{id}", &reads("SELECT name FROM users WHERE small = $id", Some(many), None));
    let answers = loads.load_many(&[b"user:7".to_vec(), b"user:8".to_vec(), b"user:9".to_vec()]).await;
    assert!(matches!(answers[0], Err(LoadError::Unusable { .. })) || answers[0] == Ok(found("name 7")), "{answers:?}");
    assert_eq!(answers[1..], [Ok(found("name 8")), Ok(found("name 9"))]);
}

/// A pooler in transaction mode may give each transaction another server connection: nothing may outlive one.
#[tokio::test]
async fn nothing_outlives_a_transaction() {
    let server = Postgres::start();
    let origin = sql(&server.database(&USERS).await);
    let read = "SELECT id, name, mood FROM users WHERE id = $id";
    let loads = loader(&origin, "user:{id}", &reads(read, Some("SELECT id, name, mood FROM users WHERE id = ANY($id)"), None));
    let before = server.log().len();
    loads.load(b"user:7").await.expect("loads");
    loads.load_many(&[b"user:7".to_vec(), b"user:8".to_vec()]).await;
    let log = server.log()[before..].to_owned();
    assert!(!log.contains("sqlx_s_"), "named statements: {log}");
    let mut open = false;
    let mut executed = 0;
    for line in log.lines() {
        if line.contains("statement: BEGIN") {
            open = true;
        } else if line.contains("statement: COMMIT") {
            open = false;
        } else if line.contains("execute ") {
            executed += 1;
            assert!(open && line.contains("execute <unnamed>"), "{line}");
        }
    }
    assert!(executed == 2, "{log}");
    assert_eq!(log.matches("PREPARE larder_").count(), 2);
    assert_eq!(log.matches("DEALLOCATE larder_").count(), 2);
}

#[tokio::test]
async fn a_slow_query_ends_at_the_server_and_holds_nobody_else() {
    let server = Postgres::shared();
    let mut slow = sql(&server.database(&USERS).await);
    let well = slow.clone();
    slow.name = "slow".to_owned();
    slow.max_connections = 1;
    slow.timeout = Span::from_secs(3);
    let origins = Origins::new(&[slow, well]).expect("valid");
    let keys = "user:{id}".parse().expect("valid");
    let load = |origin: &str, read: &str| larder::policy::Load { origin: origin.to_owned(), ..reads(read, None, None) };
    let sleeps = "SELECT name FROM users, pg_sleep(3600) WHERE id = $id";
    let hangs = origins.loader(&keys, &load("slow", sleeps)).expect("valid");
    let works = origins.loader(&keys, &load("db", "SELECT name FROM users WHERE id = $id")).expect("valid");
    works.load(b"user:1").await.expect("loads");
    let hanging: Vec<_> = (1..9)
        .map(|id| {
            let hangs = hangs.clone();
            tokio::spawn(async move { hangs.load(format!("user:{id}").as_bytes()).await })
        })
        .collect();
    let started = Instant::now();
    let mut loaded = 0;
    while !hanging.iter().all(tokio::task::JoinHandle::is_finished) {
        works.load(b"user:1").await.expect("the other origin is not held");
        loaded += 1;
        assert!(started.elapsed() < Duration::from_secs(60));
    }
    assert!(loaded > 1);
    let mut timeouts = 0;
    for load in hanging {
        match load.await.expect("no panic").expect_err("hangs") {
            LoadError::Timeout { .. } => timeouts += 1,
            error => assert!(matches!(error, LoadError::Busy { .. } | LoadError::Refused { .. }), "{error}"),
        }
    }
    assert!(timeouts >= 1);
    let active = "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%pg_sleep(3600)%' AND query NOT LIKE '%pg_stat_activity%' AND state = 'active'";
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.value("postgres", active).await != "0" {
        assert!(Instant::now() < deadline, "the query goes on at the server");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn passwords_rotate_and_stay_secret() {
    let server = Postgres::start();
    let url = server.database(&USERS).await;
    let directory = tempfile::TempDir::new().expect("a directory");
    let file = directory.path().join("url");
    std::fs::write(&file, url.replace("secret", "wrong-password") + "\n").expect("writes");
    let origin = with(OriginKind::Sql { url: Sensitive::File(file.clone()) });
    let loads = loader(&origin, "user:{id}", &reads("SELECT name FROM users WHERE id = $id", None, None));
    let error = loads.load(b"user:7").await.expect_err("the password is wrong");
    assert!(error.to_string().contains("28P01"), "{error}");
    assert!(!format!("{error} {error:?} {loads:?}").contains("wrong-password"));
    std::fs::write(&file, &url).expect("writes");
    assert_eq!(loads.load(b"user:7").await, Ok(found("name 7")));
    server
        .run(
            "postgres",
            &[
                "ALTER USER postgres PASSWORD 'renewed'",
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'larder'",
            ],
        )
        .await;
    std::fs::write(&file, url.replace("secret", "renewed")).expect("writes");
    // The idle connection is gone; the one retry finds the new password.
    assert_eq!(loads.load(b"user:8").await, Ok(found("name 8")));
}

#[tokio::test]
async fn an_origin_that_is_away_is_left_alone_and_comes_back() {
    let server = Postgres::shared();
    let url = server.database(&USERS).await;
    let away = url.replace(&format!(":{}", server.port()), &format!(":{}", crate::support::server::free_port()));
    let directory = tempfile::TempDir::new().expect("a directory");
    let file = directory.path().join("url");
    std::fs::write(&file, &away).expect("writes");
    let origins = Origins::new(&[with(OriginKind::Sql { url: Sensitive::File(file.clone()) })]).expect("valid");
    let keys = "user:{id}".parse().expect("valid");
    let loads = origins.loader(&keys, &reads("SELECT name FROM users WHERE id = $id", None, None)).expect("valid");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !matches!(loads.load(b"user:7").await.expect_err("away"), LoadError::Refused { .. }) {
        assert!(Instant::now() < deadline, "the breaker opens");
    }
    assert_eq!(origins.stats()[0].breaker, BreakerState::Open);
    let asked = origins.stats()[0].queries;
    std::fs::write(&file, &url).expect("writes");
    while loads.load(b"user:7").await != Ok(found("name 7")) {
        assert!(Instant::now() < deadline, "the breaker closes");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stats = &origins.stats()[0];
    assert_eq!((stats.breaker, stats.in_flight, stats.waiting), (BreakerState::Closed, 0, 0));
    assert!(stats.queries > asked && stats.refused > 0 && stats.errors >= stats.refused, "{stats:?}");
}

/// The time to connect is bounded by itself, however long a query may take.
#[tokio::test]
async fn a_server_that_only_accepts_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("postgres://postgres@{}/shop", silent.local_addr().expect("an address"));
    let mut origin = sql(&url);
    origin.connect_timeout = "300ms".parse().expect("a duration");
    origin.timeout = Span::from_secs(3600);
    let loads = loader(&origin, "user:{id}", &reads("SELECT name FROM users WHERE id = $id", None, None));
    let error = tokio::time::timeout(Duration::from_secs(60), loads.load(b"user:7")).await.expect("it ends by itself");
    assert!(matches!(&error, Err(LoadError::Unreachable { why, .. }) if why.contains("no connection in time")), "{error:?}");
}

#[tokio::test]
async fn changed_tables_are_described_anew() {
    let server = Postgres::shared();
    let url = server.database(&USERS).await;
    let database = url.rsplit('/').next().expect("a name").to_owned();
    let loads = loader(&sql(&url), "user:{id}", &reads("SELECT * FROM users WHERE id = $id", None, None));
    assert!(matches!(loads.load(b"user:7").await, Ok(Loaded::Found { .. })));
    server.run(&database, &["ALTER TABLE users DROP COLUMN born, DROP COLUMN uid, DROP COLUMN mood, DROP COLUMN amount"]).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while loads.load(b"user:7").await != Ok(found(r#"{"id":7,"small":7,"name":"name 7","tenant":"acme"}"#)) {
        assert!(Instant::now() < deadline);
    }
}

/// Eight connections to the pooler share one to the server.
#[tokio::test]
async fn a_pooler_in_transaction_mode_serves() {
    let server = Postgres::shared();
    let url = server.database(&USERS).await;
    let pooler = Pooler::start(&server);
    let mut origin = sql(&pooler.url(&url));
    origin.max_connections = 8;
    let many = "SELECT id, name, mood FROM users WHERE id = ANY($id)";
    let loads = loader(&origin, "user:{id}", &reads("SELECT id, name, mood FROM users WHERE id = $id", Some(many), None));
    let value = |id: u32| found(format!(r#"{{"id":{id},"name":"name {id}","mood":"ok"}}"#));
    let tasks: Vec<_> = (0..80)
        .map(|n| {
            let loads = loads.clone();
            tokio::spawn(async move {
                let id = n % 9 + 1;
                let keys = [format!("user:{id}").into_bytes(), b"user:1".to_vec()];
                (id, loads.load(&keys[0]).await, loads.load_many(&keys).await)
            })
        })
        .collect();
    for task in tasks {
        let (id, one, both) = task.await.expect("no panic");
        assert_eq!(one, Ok(value(id)));
        assert_eq!(both, [Ok(value(id)), Ok(value(1))]);
    }
}
