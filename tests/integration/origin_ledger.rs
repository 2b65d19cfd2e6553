//! What a database is told from a journal: in order, each change once, by the last to have taken the part.

use std::path::Path;

use larder::origin::{Carriage, Change, Entry, Hold, Ledger, LoadError, Origins, Verdict, Writer};
use larder::policy::snapshot::Origin;
use larder::policy::{RowVersion, Span, Store};
use sqlx::{AssertSqlSafe, Connection as _};

use crate::origin_sqlite;
use crate::support::origin::{reads, sql};
use crate::support::postgres::Postgres;

const TABLES: [&str; 2] = [
    "CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL CHECK (length(name) < 20), row_version bigint NOT NULL DEFAULT 0)",
    "CREATE TABLE told (value text)",
];
const WRITE: &str = "INSERT INTO users (id, name, row_version) VALUES ($id, $value.name, $version) \
     ON CONFLICT (id) DO UPDATE SET name = $value.name, row_version = $version WHERE users.row_version < $version";

fn store(write: &str, version: Option<&str>) -> Store {
    let delete = Some("DELETE FROM users WHERE id = $id".to_owned());
    Store::Sql {
        write: write.to_owned(),
        delete,
        version: version.map(|name| RowVersion::Column(name.to_owned())),
        increment: None,
    }
}

/// A part of a journal at a database, and a rule of it.
struct Part {
    ledger: Ledger,
    writer: Writer,
}

fn part(origin: &Origin, write: &str) -> Part {
    let origins = Origins::new(std::slice::from_ref(origin)).expect("a valid origin");
    let load = reads("SELECT name FROM users WHERE id = $id", None, None);
    let keys = "user:{id}".parse().expect("a valid pattern");
    let writer = origins.writer(&keys, &load, &store(write, None), Carriage::Behind).expect("valid statements");
    let ledger = origins.ledger("db", "shop/0").expect("it exists").expect("a database");
    Part { ledger, writer }
}

impl Part {
    fn entry(&self, seq: u64, key: &[u8], name: Option<&str>) -> Entry {
        let value = name.map(|name| serde_json::json!({"name": name}).to_string().into_bytes());
        let change = Change { key: key.to_vec(), value, tag: None };
        Entry { position: seq, version: seq, writer: self.writer.clone(), change }
    }

    async fn apply(&self, hold: Hold, upto: u64, entries: &[Entry]) -> Result<Verdict, LoadError> {
        self.ledger.apply(hold.fence, upto, entries).await
    }
}

/// Both kinds of database, each with the same tables and a way to ask it.
async fn with_each(test: impl AsyncFn(&str)) {
    let server = Postgres::shared();
    test(&server.database(&TABLES).await).await;
    let directory = tempfile::TempDir::new().expect("a directory");
    test(&origin_sqlite::database(directory.path(), &TABLES).await).await;
}

/// What a query gives as its column `x`, as text.
async fn asked(url: &str, query: &str) -> Vec<String> {
    let query = AssertSqlSafe(format!("SELECT CAST(x AS varchar(1000)) FROM ({query}) AS t"));
    if let Some(file) = url.strip_prefix("sqlite://") {
        let mut connection = origin_sqlite::write(Path::new(file)).await;
        return sqlx::query_scalar(query).fetch_all(&mut connection).await.expect("answers");
    }
    let mut connection = sqlx::PgConnection::connect(url).await.expect("connects");
    sqlx::query_scalar(query).fetch_all(&mut connection).await.expect("answers")
}

async fn names(url: &str) -> Vec<String> {
    asked(url, "SELECT name AS x FROM users ORDER BY id").await
}

#[tokio::test]
async fn what_is_told_twice_is_made_once_and_in_order() {
    with_each(async |url| {
        let part = part(&sql(url), "INSERT INTO users (id, name) VALUES ($id, $value.name)");
        let hold = part.ledger.take(1).await.expect("taken");
        assert_eq!(hold, Hold { fence: 1, position: 0 });
        let batch = [part.entry(1, b"user:1", Some("a")), part.entry(2, b"user:2", Some("b"))];
        for _ in 0..3 {
            // A second INSERT of the same id would be refused.
            assert_eq!(part.apply(hold, 2, &batch).await, Ok(Verdict::Applied));
        }
        let more = [batch[1].clone(), part.entry(3, b"user:1", None), part.entry(4, b"user:4", Some("d"))];
        assert_eq!(part.apply(hold, 4, &more).await, Ok(Verdict::Applied));
        assert_eq!(names(url).await, ["b", "d"]);
        assert_eq!(part.ledger.take(1).await, Ok(Hold { fence: 2, position: 4 }));
    })
    .await;
}

#[tokio::test]
async fn who_is_not_the_last_to_have_taken_a_part_changes_nothing() {
    with_each(async |url| {
        let old = part(&sql(url), WRITE);
        let new = part(&sql(url), WRITE);
        let before = old.ledger.take(5).await.expect("taken");
        assert_eq!(before.fence, 5);
        let after = new.ledger.take(3).await.expect("taken");
        assert_eq!(after.fence, 6, "a journal that lost its count does not bring an old fence back");
        assert_eq!(new.apply(after, 9, &[new.entry(9, b"user:1", Some("new"))]).await, Ok(Verdict::Applied));
        assert_eq!(old.apply(before, 8, &[old.entry(8, b"user:1", Some("old"))]).await, Ok(Verdict::Fenced));
        assert_eq!(names(url).await, ["new"]);
        let strange = old.ledger.apply(77, 12, &[old.entry(12, b"user:1", Some("odd"))]).await;
        assert_eq!(strange, Ok(Verdict::Fenced), "a fence that nobody was given");
    })
    .await;
}

#[tokio::test]
async fn a_batch_with_a_refused_entry_changes_nothing_and_may_be_told_in_parts() {
    with_each(async |url| {
        let part = part(&sql(url), WRITE);
        let hold = part.ledger.take(1).await.expect("taken");
        let batch = [
            part.entry(1, b"user:1", Some("good")),
            part.entry(2, b"user:2", Some("a name that is far too long")),
            part.entry(3, b"user:3", Some("fine")),
        ];
        let refused = part.apply(hold, 3, &batch).await;
        assert!(matches!(&refused, Err(LoadError::Rejected { why, .. }) if !why.is_empty()), "{refused:?}");
        assert_eq!(names(url).await, [""; 0]);
        assert_eq!(part.apply(hold, 1, &batch[..1]).await, Ok(Verdict::Applied));
        assert!(matches!(part.apply(hold, 2, &batch[1..2]).await, Err(LoadError::Rejected { .. })));
        assert_eq!(part.apply(hold, 3, &batch[2..]).await, Ok(Verdict::Applied));
        assert_eq!(names(url).await, ["good", "fine"]);
    })
    .await;
}

#[tokio::test]
async fn an_older_version_changes_nothing_and_is_no_refusal() {
    with_each(async |url| {
        let part = part(&sql(url), WRITE);
        let hold = part.ledger.take(1).await.expect("taken");
        let newer = Entry { version: 50, ..part.entry(1, b"user:1", Some("newer")) };
        let older = Entry { version: 49, ..part.entry(2, b"user:1", Some("older")) };
        assert_eq!(part.apply(hold, 2, &[newer, older]).await, Ok(Verdict::Applied));
        assert_eq!(names(url).await, ["newer"]);
    })
    .await;
}

#[tokio::test]
async fn hostile_keys_and_values_are_bound() {
    with_each(async |url| {
        let write = "INSERT INTO told (value) SELECT $value WHERE $id <> ''";
        let origins = Origins::new(&[sql(url)]).expect("valid");
        let load = reads("SELECT value FROM told WHERE value = $id", None, None);
        let store = Store::Sql { write: write.to_owned(), delete: None, version: None, increment: None };
        let writer = origins.writer(&"k:{id…}".parse().expect("valid"), &load, &store, Carriage::Behind).expect("valid");
        let ledger = origins.ledger("db", "'; DROP TABLE told; --").expect("exists").expect("a database");
        let hold = ledger.take(1).await.expect("taken");
        let hostile = ["'); DROP TABLE told; --", "$1", "?1", "\\'; SELECT 1", "\"", "é\u{202e}", "%s {0}", "NULL"];
        let entries = hostile.iter().zip(1..).map(|(text, seq)| {
            let change = Change { key: format!("k:{text}").into_bytes(), value: Some(text.as_bytes().to_vec()), tag: None };
            Entry { position: seq, version: seq, writer: writer.clone(), change }
        });
        let entries: Vec<Entry> = entries.collect();
        assert_eq!(ledger.apply(hold.fence, 99, &entries).await, Ok(Verdict::Applied));
        let mut stored = asked(url, "SELECT value AS x FROM told").await;
        stored.sort();
        let mut expected = hostile.map(str::to_owned).to_vec();
        expected.sort();
        assert_eq!(stored, expected);
        for key in [&b"k:\xff"[..], b"k:\0", b"other"] {
            let change = Change { key: key.to_vec(), value: Some(b"x".to_vec()), tag: None };
            let entry = Entry { position: 200, version: 200, writer: writer.clone(), change };
            assert!(matches!(ledger.apply(hold.fence, 200, &[entry]).await, Err(LoadError::Rejected { .. })), "{key:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_stalled_consumer_s_transaction_delays_the_next_by_the_timeout_at_most() {
    let server = Postgres::shared();
    let url = server.database(&TABLES).await;
    let origin = Origin { timeout: Span::from_millis(500), ..sql(&url) };
    let part = part(&origin, WRITE);
    crate::support::poll("the first has the part", async || part.ledger.take(1).await.is_ok()).await;
    // As one that looked at its row and then stood still.
    let mut stalled = sqlx::PgConnection::connect(&url).await.expect("connects");
    for statement in [
        "BEGIN",
        "SET LOCAL idle_in_transaction_session_timeout = 500",
        "SELECT 1 FROM larder_journal WHERE part = 'shop/0' FOR UPDATE",
    ] {
        sqlx::raw_sql(statement).execute(&mut stalled).await.expect(statement);
    }
    crate::support::poll("the next consumer has the part", async || part.ledger.take(1).await.is_ok()).await;
}

#[tokio::test]
async fn a_login_that_cannot_make_the_table_is_told_what_to_run() {
    let server = Postgres::shared();
    let url = server.database(&["REVOKE ALL ON SCHEMA public FROM PUBLIC", TABLES[0], TABLES[1]]).await;
    let database = url.rsplit('/').next().expect("a name").to_owned();
    let login = format!("poor_{database}");
    server
        .run(
            &database,
            &[&format!("CREATE ROLE {login} LOGIN PASSWORD 'secret'"), &format!("GRANT USAGE ON SCHEMA public TO {login}")],
        )
        .await;
    let poor = url.replacen("postgres:secret", &format!("{login}:secret"), 1);
    let part = part(&sql(&poor), WRITE);
    let refused = part.ledger.take(1).await.expect_err("no table").to_string();
    assert!(refused.contains("CREATE TABLE IF NOT EXISTS larder_journal"), "{refused}");
    let create = &refused[refused.find("CREATE TABLE").expect("there")..refused.find(", and let").expect("there")];
    server.run(&database, &[create, &format!("GRANT SELECT, INSERT, UPDATE ON larder_journal TO {login}")]).await;
    assert_eq!(part.ledger.take(4).await, Ok(Hold { fence: 4, position: 0 }));
}

#[test]
fn a_rule_with_a_version_compares_it() {
    let origins = Origins::new(&[sql("sqlite:///nowhere")]).expect("valid");
    let load = reads("SELECT name FROM users WHERE id = $id", None, None);
    let keys = "user:{id}".parse().expect("valid");
    let blind = store("INSERT INTO users (id, name) VALUES ($id, $value)", Some("row_version"));
    let refused = origins.writer(&keys, &load, &blind, Carriage::Behind).expect_err("blind").to_string();
    assert!(refused.contains("row_version < $version"), "{refused}");
    assert!(origins.writer(&keys, &load, &store(WRITE, Some("row_version")), Carriage::Behind).is_ok());
    assert!(
        origins.writer(&keys, &load, &store(WRITE, None), Carriage::Through).is_err(),
        "written through, nothing is numbered"
    );
}
