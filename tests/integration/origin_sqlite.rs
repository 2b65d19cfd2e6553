//! Loads from real SQLite files.

use std::path::Path;
use std::time::{Duration, Instant};

use larder::origin::{LoadError, Loaded, Origins};
use larder::policy::Span;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use crate::support::origin::{found, loader, reads, sql};

const SHOP: [&str; 3] = [
    "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, zip TEXT, price REAL, loose)",
    "INSERT INTO items VALUES (7, 'seven', '007', 1.5, 7), (8, 'eight', '8', 2.0, '8'), (9, 'Nine', '9', NULL, x'00')",
    "CREATE VIEW doubled AS SELECT id * 2 AS id, name FROM items",
];

/// A database in `directory` after `statements`, as a URL.
pub async fn database(directory: &Path, statements: &[&str]) -> String {
    let file = directory.join("shop.db");
    let mut connection = write(&file).await;
    for statement in statements {
        sqlx::raw_sql(AssertSqlSafe((*statement).to_owned())).execute(&mut connection).await.expect(statement);
    }
    connection.close().await.expect("closes");
    format!("sqlite://{}", file.display())
}

pub async fn write(file: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(file).create_if_missing(true).connect().await.expect("opens")
}

#[tokio::test]
async fn affinity_decides_how_parts_compare() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let origin = sql(&database(directory.path(), &SHOP).await);
    for (column, key, name) in [
        ("id", "k:7", Some("seven")),
        ("id", "k:77", None),
        ("id", "k:seven", None),
        ("zip", "k:007", Some("seven")),
        ("zip", "k:7", None),
        ("zip", "k:8", Some("eight")),
        ("price", "k:2", Some("eight")),
        ("price", "k:1.5", Some("seven")),
        ("loose", "k:7", Some("seven")),
        ("id + 0", "k:7", Some("seven")),
        ("name", "k:nine", None),
        ("name COLLATE NOCASE", "k:nine", Some("Nine")),
    ] {
        let read = format!("SELECT name FROM items WHERE {column} = $id");
        // The part's column is the key's own spelling where the statement says so; where not, keys are asked for one by one.
        let many = format!("SELECT name, {column} AS id FROM items WHERE {column} IN (SELECT value FROM json_each($id))");
        let loader = loader(&origin, "k:{id}", &reads(&read, Some(&many), None));
        let expected = name.map_or(Loaded::NotFound, found);
        assert_eq!(loader.load(key.as_bytes()).await.as_ref(), Ok(&expected), "{column} = {key}");
        let answers = loader.load_many(&[key.into(), b"k:none".to_vec(), key.into()]).await;
        assert_eq!(answers, [Ok(expected.clone()), Ok(Loaded::NotFound), Ok(expected)], "{column} in {key}");
    }
    let view = loader(&origin, "k:{id}", &reads("SELECT id, name FROM doubled WHERE id = $id", None, None));
    assert_eq!(view.load(b"k:14").await, Ok(found(r#"{"id":14,"name":"seven"}"#)));
}

#[tokio::test]
async fn many_keys_share_a_query() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let rows = "INSERT INTO items WITH n AS (SELECT 100 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 1299) SELECT i, 'n' || i, '', 0, 0 FROM n";
    let url = database(directory.path(), &[SHOP[0], rows]).await;
    let origins = Origins::new(&[sql(&url)]).expect("valid");
    let load = reads(
        "SELECT name FROM items WHERE id = $id",
        Some("SELECT id, name FROM items WHERE id IN (SELECT value FROM json_each($id))"),
        None,
    );
    let loader = origins.loader(&"k:{id}".parse().expect("valid"), &load).expect("valid");
    let keys: Vec<Vec<u8>> = (100..1400).map(|id| format!("k:{id}").into_bytes()).collect();
    let answers = loader.load_many(&keys).await;
    for (id, answer) in (100..1400).zip(answers) {
        let expected = if id < 1300 { found(format!("n{id}")) } else { Loaded::NotFound };
        assert_eq!(answer, Ok(expected), "{id}");
    }
    assert_eq!(origins.stats()[0].queries, 3 + 100, "1300 keys in queries of 500, and whole numbers without a row once more");
}

#[tokio::test]
async fn hostile_parts_are_data() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let origin = sql(&database(directory.path(), &SHOP).await);
    let long = vec![b'7'; 1 << 20];
    for column in ["id", "name", "loose"] {
        let read = format!("SELECT name FROM items WHERE {column} = $id");
        let many = format!("SELECT name, {column} AS id FROM items WHERE {column} IN (SELECT value FROM json_each($id))");
        let loader = loader(&origin, "k:{id…}", &reads(&read, Some(&many), None));
        let hostile: [&[u8]; 8] = [
            b"7' OR '1'='1",
            b"7; DROP TABLE items",
            b"7\"]} // $id ?1",
            b"7\0",
            b"\xff7",
            b"9223372036854775808",
            b"-9223372036854775809",
            &long,
        ];
        let keys: Vec<Vec<u8>> = hostile.iter().map(|part| [b"k:", *part].concat()).collect();
        for key in &keys {
            assert_eq!(loader.load(key).await, Ok(Loaded::NotFound));
        }
        assert!(loader.load_many(&keys).await.iter().all(|answer| *answer == Ok(Loaded::NotFound)));
    }
    let intact = loader(&origin, "k", &reads("SELECT count(*) FROM items", None, None));
    assert_eq!(intact.load(b"k").await, Ok(found("3")));
}

#[tokio::test]
async fn what_cannot_serve_a_rule_says_why() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let url = database(directory.path(), &SHOP).await;
    for (read, word) in [
        ("SELECT name FROM items WHERE id >= $id", "more than one row"),
        ("SELECT name FROM nowhere WHERE id = $id", "nowhere"),
        ("WITH x AS (SELECT 1) DELETE FROM items WHERE id = $id RETURNING name", "SQLite code 8"),
    ] {
        let error = loader(&sql(&url), "k:{id}", &reads(read, None, None)).load(b"k:7").await.expect_err(read);
        assert!(matches!(error, LoadError::Unusable { .. }) && error.to_string().contains(word), "{read}: {error}");
    }
    let missing = sql(&format!("{url}.missing"));
    let error = loader(&missing, "k:{id}", &reads("SELECT $id", None, None)).load(b"k:7").await.expect_err("no file");
    assert!(matches!(error, LoadError::Failed { .. }), "{error}");
    assert!(!directory.path().join("shop.db.missing").exists(), "reading creates nothing");
    assert!(Origins::new(&[sql("sqlite::memory:")]).is_err());
}

/// A query that is abandoned ends, so that its thread and its connection are free again; updates are seen.
#[tokio::test]
async fn endless_queries_are_interrupted() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let mut origin = sql(&database(directory.path(), &SHOP).await);
    origin.timeout = Span::from_millis(300);
    let endless = "WITH RECURSIVE n AS (SELECT $id AS i UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
    let loads = loader(&origin, "k:{id}", &reads(endless, None, None));
    let error = loads.load(b"k:7").await.expect_err("endless");
    assert!(matches!(error, LoadError::Timeout { .. }), "{error}");
    // The threads that SQLite runs on carry its name: none is busy after a while.
    let deadline = Instant::now() + Duration::from_secs(20);
    while sqlite_threads() > 0 {
        assert!(Instant::now() < deadline, "the query goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Running threads of this process whose name says that they serve an abandoned SQLite connection.
fn sqlite_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
    tasks.map(stat).filter(|stat| stat.contains("(sqlx-sqlite") && stat.contains(") R ")).count()
}

#[tokio::test]
async fn a_writer_is_seen_and_holds_nobody_up() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let url = database(directory.path(), &[&["PRAGMA journal_mode = WAL"], &SHOP[..]].concat()).await;
    let loads = loader(&sql(&url), "k:{id}", &reads("SELECT name FROM items WHERE id = $id", None, None));
    assert_eq!(loads.load(b"k:7").await, Ok(found("seven")));
    let mut writer = write(&directory.path().join("shop.db")).await;
    sqlx::raw_sql("BEGIN IMMEDIATE; UPDATE items SET name = 'changed'").execute(&mut writer).await.expect("writes");
    assert_eq!(loads.load(b"k:7").await, Ok(found("seven")));
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.expect("writes");
    assert_eq!(loads.load(b"k:7").await, Ok(found("changed")));
}
