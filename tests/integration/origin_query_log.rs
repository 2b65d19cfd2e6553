//! The query log: every query that reaches an origin is in it with its beginning and its end, however it ends; keys never are.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use larder::origin::query_log::{TARGET, fingerprint};
use larder::origin::{LoadError, Loaded, Loader, Origins};
use larder::policy::Span;
use larder::policy::snapshot::Origin;
use serde_json::Value;
use tracing_subscriber::fmt::MakeWriter;

use crate::origin_sqlite::database;
use crate::support::origin::{loader, reads, sql};
use crate::support::postgres::Postgres;
use crate::support::wait_for;

/// A log that the test reads.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Log {
    /// Logs what this thread does from now on as `larderd --log … --log-format json` would.
    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let filter = format!("info,{TARGET}=debug");
        let subscriber =
            tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(filter).with_writer(self.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn events(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// How the queries for a key ended, in their order.
    fn outcomes(&self, key: &str) -> Vec<String> {
        let wanted = format!("{:016x}", fingerprint(key.as_bytes()));
        let events = self.events();
        let of_key = events.iter().filter(|event| event["key"] == wanted.as_str());
        of_key.filter_map(|event| event["outcome"].as_str().map(str::to_owned)).collect()
    }
}

/// Answers with the key's part, unless it is `bad` (two rows) or `slow` (no end within a second).
const READ: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n \
    WHERE ($id = 'bad' AND i < 2) OR ($id = 'slow' AND i < 2000000000)) \
    SELECT CASE WHEN $id = 'slow' THEN max(i) ELSE $id END AS v FROM n WHERE $id <> 'none' \
    GROUP BY CASE WHEN $id = 'slow' THEN 0 ELSE i END";

async fn origins(directory: &tempfile::TempDir) -> (Origin, Origins, Loader) {
    let mut origin = sql(&database(directory.path(), &["CREATE TABLE t (id INTEGER)"]).await);
    origin.timeout = Span::from_millis(700);
    let origins = Origins::new(std::slice::from_ref(&origin)).expect("valid");
    let loader = origins.loader(&"secret:{id}".parse().expect("valid"), &reads(READ, None, None)).expect("valid");
    (origin, origins, loader)
}

#[tokio::test]
async fn every_query_is_logged_from_its_beginning_to_its_end() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let (_, origins, loader) = origins(&directory).await;
    let log = Log::default();
    let listening = log.listen();
    assert!(matches!(loader.load(b"secret:alice").await, Ok(Loaded::Found { .. })));
    assert_eq!(loader.load(b"secret:none").await, Ok(Loaded::NotFound));
    assert!(matches!(loader.load(b"secret:bad").await, Err(LoadError::Unusable { .. })));
    assert!(matches!(loader.load(b"secret:slow").await, Err(LoadError::Timeout { .. })));
    let given_up = tokio::time::timeout(Duration::from_millis(50), loader.load(b"secret:slow"));
    assert!(given_up.await.is_err());
    // Not covered, and so never asked for.
    assert_eq!(loader.load(b"other:1").await, Ok(Loaded::NotFound));
    drop(listening);
    loader.load(b"secret:unlogged").await.expect("answers");

    assert_eq!(log.outcomes("secret:alice"), ["answered"]);
    assert_eq!(log.outcomes("secret:none"), ["answered"]);
    assert_eq!(log.outcomes("secret:bad"), ["unusable"]);
    assert_eq!(log.outcomes("secret:slow"), ["timeout", "abandoned"]);
    let events = log.events();
    let begun: Vec<_> = events.iter().filter(|event| event["outcome"].is_null()).collect();
    assert_eq!(begun.len() as u64 + 1, origins.stats()[0].queries, "the log and the counter agree, but for the one not logged");
    assert_eq!(events.len(), 2 * begun.len());
    for begin in begun {
        let end = events.iter().find(|event| event["query"] == begin["query"] && !event["outcome"].is_null()).expect("an end");
        assert_eq!((&begin["key"], &begin["keys"], &begin["origin"]), (&end["key"], &"secret:{id}".into(), &"db".into()));
        assert!(end["at_us"].as_u64() >= begin["at_us"].as_u64(), "{begin} {end}");
    }
    let slow = events.iter().find(|event| event["outcome"] == "timeout").expect("one timed out");
    assert!(slow["took_us"].as_u64().unwrap() >= 600_000, "{slow}");
    for secret in ["alice", "bad", "shop.db"] {
        assert!(!log.text().contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn a_query_for_many_keys_is_one_query() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let rows = ["CREATE TABLE t (id TEXT)", "INSERT INTO t VALUES ('a'), ('b'), ('c')"];
    let origins = Origins::new(&[sql(&database(directory.path(), &rows).await)]).expect("valid");
    let many = "SELECT id FROM t WHERE id IN (SELECT value FROM json_each($id))";
    let load = reads("SELECT id FROM t WHERE id = $id", Some(many), None);
    let loader = origins.loader(&"k:{id}".parse().expect("valid"), &load).expect("valid");
    let log = Log::default();
    let listening = log.listen();
    let keys: Vec<Vec<u8>> = ["k:a", "k:b", "k:c"].map(|key| key.as_bytes().to_vec()).into();
    assert!(loader.load_many(&keys).await.iter().all(Result::is_ok));
    assert!(loader.load_many(&keys[..2]).await.iter().all(Result::is_ok));
    drop(listening);
    let counts: Vec<_> = log.events().iter().map(|event| (event["count"].as_u64().unwrap(), event["key"].clone())).collect();
    assert_eq!(counts.iter().map(|(count, _)| *count).collect::<Vec<_>>(), [3, 3, 2, 2]);
    assert_eq!(counts[0].1, counts[1].1);
    assert_ne!(counts[0].1, counts[2].1);
}

/// The server writes down every statement, which is a count that Larder has no part in.
#[tokio::test]
async fn postgres_counts_the_same_queries() {
    const MARK: &str = "counted by both";
    let server = Postgres::shared();
    let url = server.database(&["CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1, 1), (2, 0)"]).await;
    let read = format!("SELECT 10 / v AS \"{MARK}\" FROM t WHERE id = $id");
    let loader = loader(&sql(&url), "k:{id}", &reads(&read, None, None));
    let log = Log::default();
    let listening = log.listen();
    // Found, failed by the server, and not there.
    for round in 0..4 {
        let keys: Vec<String> = (1..=3).map(|id| format!("k:{id}")).collect();
        let loads = join_all(keys.iter().map(|key| loader.load(key.as_bytes()))).await;
        assert!(matches!(loads.as_slice(), [Ok(Loaded::Found { .. }), Err(_), Ok(Loaded::NotFound)]), "{round}: {loads:?}");
    }
    drop(listening);
    let begun = log.events().iter().filter(|event| event["outcome"].is_null()).count();
    assert_eq!(begun, 12);
    let executed = || {
        let log = server.log();
        let statements = log.split("execute <unnamed>: ").skip(1).map(|rest| rest.split("LOG: ").next().unwrap_or_default());
        statements.filter(|statement| statement.contains(MARK)).count()
    };
    wait_for("the server to write its log", Duration::from_secs(20), || executed() >= begun);
    assert_eq!(executed(), begun);
}
