//! The stream of a real Postgres' changes: what it tells, what it goes on with, and what is said of what it lacks.

use std::collections::BTreeMap;
use std::time::Duration;

use larder::origin::changes::pgoutput::{Lsn, Message};
use larder::origin::changes::{Database, Feed, Needs, Place, Ready, SlotOwner, Told};
use tokio::time::timeout;

use crate::support::origin::sql;
use crate::support::postgres::Postgres;

/// How long anything may take: test machines are busy.
const LONG: Duration = Duration::from_secs(60);
/// The names of tables by their numbers.
type Tables = BTreeMap<u32, String>;
const USERS: &str = "CREATE TABLE users (id bigint PRIMARY KEY, name text)";

fn database(url: &str) -> Database {
    Database::new(&sql(url)).expect("a database")
}

fn place(url: &str) -> Place {
    let name = format!("larder_{}", name_of(url));
    Place { slot: name.clone(), publication: name, given: false }
}

fn name_of(url: &str) -> &str {
    url.split('?').next().and_then(|url| url.rsplit('/').next()).expect("a name")
}

/// Tables of which no column is needed.
fn tables(names: &[&str]) -> Needs {
    names.iter().map(|name| (name.parse().expect("a name"), Default::default())).collect()
}

/// Tables with the columns that are needed, as `TABLE COLUMN…`.
fn needs(lines: &[&str]) -> Needs {
    let need = |line: &&str| {
        let mut words = line.split(' ');
        let table = words.next().expect("a table").parse().expect("a name");
        (table, words.map(str::to_owned).collect())
    };
    lines.iter().map(need).collect()
}

async fn open(url: &str, names: &[&str]) -> (Feed, Ready, Tables) {
    let (mut feed, ready) = database(url).feed(&place(url), &tables(names), SlotOwner::Larder, false).await.expect("a stream");
    feed.start().await.expect("it begins");
    (feed, ready, Tables::new())
}

/// What is said where the changes of `users` cannot be followed.
async fn refusal(url: &str, place: &Place) -> String {
    let refused = database(url).feed(place, &tables(&["users"]), SlotOwner::Larder, false).await;
    refused.err().expect("no stream").to_string()
}

/// The rows of the next transaction that changed some, as short texts, its number, and where it ends.
async fn transaction(feed: &mut Feed, tables: &mut Tables) -> (Vec<String>, u32, Lsn) {
    let (mut said, mut number) = (Vec::new(), 0);
    loop {
        let told = timeout(LONG, feed.next()).await.expect("in time").expect("it goes on");
        let Told::Message { message, .. } = told else { continue };
        match message {
            Message::Begin { xid, .. } => number = xid,
            Message::Commit { .. } if said.is_empty() => {}
            Message::Commit { end, .. } => return (said, number, end),
            Message::Relation(relation) => drop(tables.insert(relation.id, relation.name)),
            Message::Insert { table, new } => said.push(format!("insert {} {new:?}", tables[&table])),
            Message::Update { table, old, new } => said.push(format!("update {} {old:?} {new:?}", tables[&table])),
            Message::Delete { table, old } => said.push(format!("delete {} {old:?}", tables[&table])),
            Message::Truncate(all) => said.extend(all.iter().map(|table| format!("truncate {}", tables[table]))),
            Message::Origin | Message::Type | Message::Note { .. } => {}
        }
    }
}

fn includes(said: &[String], words: &[&str]) {
    assert_eq!(said.len(), words.len(), "{said:?}");
    assert!(said.iter().zip(words).all(|(said, word)| said.starts_with(word)), "{said:?}");
}

#[tokio::test]
async fn what_is_not_confirmed_is_told_again_also_after_a_restart() {
    let mut server = Postgres::start_logical();
    let url = server.database(&[USERS]).await;
    let (mut feed, ready, mut known) = open(&url, &["users"]).await;
    assert!(ready.is_new && ready.troubles.is_empty(), "{ready:?}");
    server.run(name_of(&url), &["INSERT INTO users VALUES (7, 'Ann')"]).await;
    let (said, xid, end) = transaction(&mut feed, &mut known).await;
    includes(&said, &["insert users"]);
    feed.seen(&[xid]).await.expect("it is committed");
    feed.confirm(end).await.expect("it is heard");
    let both = "BEGIN; UPDATE users SET id = 8; DELETE FROM users; COMMIT";
    server.run(name_of(&url), &[both, "TRUNCATE users"]).await;
    includes(&transaction(&mut feed, &mut known).await.0, &["update users Some(Key", "delete users"]);
    // Another takes over, and then the server dies: what was not confirmed comes again.
    for restart in [false, true] {
        if restart {
            server.restart();
        }
        let (mut next, ready, mut known) = open(&url, &["users"]).await;
        assert!(!ready.is_new && ready.added.is_empty(), "{ready:?}");
        // What was confirmed is on disk some time later: it may come again after the death of a server, and then only.
        assert!(ready.confirmed == end || (restart && ready.confirmed < end), "{ready:?}");
        let mut said = transaction(&mut next, &mut known).await.0;
        if ready.confirmed < end {
            includes(&said, &["insert users"]);
            said = transaction(&mut next, &mut known).await.0;
        }
        includes(&said, &["update users", "delete users"]);
        includes(&transaction(&mut next, &mut known).await.0, &["truncate users"]);
    }
    assert!(timeout(LONG, async { while feed.next().await.is_ok() {} }).await.is_ok(), "the first reader was ended");
    database(&url).remove(&place(&url), SlotOwner::Larder).await.expect("it is taken away");
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots) || ' ' || (SELECT count(*) FROM pg_publication)";
    assert_eq!(server.value(name_of(&url), left).await, "0 0");
}

#[tokio::test]
async fn passwords_are_proved_and_connections_encrypted_as_for_loads() {
    let server = Postgres::start_secured();
    let url = server.database(&[USERS]).await;
    let at = |name: &str| server.directory().join(name).display().to_string();
    let secured = |mode: &str| {
        let (ca, cert, key) = (at("ca.pem"), at("cert.pem"), at("key.pem"));
        format!("{url}?sslmode={mode}&sslrootcert={ca}&sslcert={cert}&sslkey={key}")
    };
    for mode in ["require", "verify-ca", "verify-full"] {
        let (mut feed, _, mut known) = open(&secured(mode), &["users"]).await;
        server.run(name_of(&url), &[&format!("INSERT INTO users VALUES ({}, '')", fastrand::u32(..))]).await;
        let (_, _, end) = transaction(&mut feed, &mut known).await;
        feed.confirm(end).await.expect("it is heard");
        let encrypted = "SELECT count(*)::text FROM pg_stat_ssl JOIN pg_stat_replication USING (pid) WHERE ssl";
        assert_eq!(server.value(name_of(&url), encrypted).await, "1", "{mode}");
    }
    let elsewhere = secured("verify-full").replace("127.0.0.1", "localhost");
    for (wrong, word) in [
        (elsewhere, "not valid for name"),
        (secured("require").replace(":secret@", ":guess@"), "password authentication failed"),
        (secured("require").replace(":secret@", "@"), "it wants a password"),
        (secured("disable"), "no encryption"),
    ] {
        let error = refusal(&wrong, &place(&url)).await;
        assert!(error.contains(word) && !error.contains("guess"), "{error}");
    }
}

#[tokio::test]
async fn what_a_database_lacks_is_said() {
    let plain = Postgres::shared();
    let url = plain.database(&[USERS]).await;
    let refused = refusal(&url, &place(&url)).await;
    assert!(refused.contains("set wal_level = logical"), "{refused}");

    let server = Postgres::start_logical();
    let url = server
        .database(&[
            USERS,
            "CREATE TABLE bare (id int)",
            "CREATE TABLE whole (id int)",
            "ALTER TABLE whole REPLICA IDENTITY FULL",
            "CREATE UNLOGGED TABLE loose (id int PRIMARY KEY)",
            "CREATE VIEW seen AS SELECT * FROM users",
            "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
            "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (100)",
            "CREATE SCHEMA shop CREATE TABLE \"Orders\" (id int PRIMARY KEY)",
            "CREATE ROLE reader LOGIN PASSWORD 'secret'",
        ])
        .await;
    let names = ["users", "bare", "whole", "loose", "seen", "none", "parted", "shop.Orders"];
    let (mut feed, ready, mut known) = open(&url, &names).await;
    for word in ["`bare` has no primary key", "`loose` is unlogged", "`seen` is no table", "no table `none`"] {
        assert!(ready.troubles.iter().any(|trouble| trouble.contains(word)), "{word}: {:?}", ready.troubles);
    }
    assert_eq!((ready.troubles.len(), ready.added.len()), (4, 4), "{ready:?}");
    // Partitions are told as the table that they are of.
    let rows = ["INSERT INTO parted VALUES (1)", "INSERT INTO shop.\"Orders\" VALUES (1)", "UPDATE bare SET id = 1"];
    server.run(name_of(&url), &rows).await;
    includes(&transaction(&mut feed, &mut known).await.0, &["insert parted [Text([49])]"]);
    includes(&transaction(&mut feed, &mut known).await.0, &["insert Orders"]);
    // What is made or mended later is told from then on.
    server.run(name_of(&url), &["ALTER TABLE bare ADD PRIMARY KEY (id)", "DROP TABLE whole"]).await;
    let again = feed.look_after(&tables(&names)).await.expect("an answer");
    assert_eq!((again.added, again.is_new), (vec!["bare".parse().expect("a name")], false));
    assert!(again.troubles.iter().any(|trouble| trouble.contains("no table `whole`")), "{:?}", again.troubles);
    server.run(name_of(&url), &[&format!("DROP PUBLICATION {}", place(&url).publication)]).await;
    assert!(feed.look_after(&tables(&names)).await.expect("an answer").is_new);
    drop(feed);

    let stranger = url.replace("postgres:secret", "reader:secret");
    let refused = refusal(&stranger, &place(&url)).await;
    assert!(refused.contains("REPLICATION") || refused.contains("replication"), "{refused}");
    let given = Place { given: true, publication: "theirs".to_owned(), ..place(&url) };
    let refused = refusal(&url, &given).await;
    assert!(refused.contains("CREATE PUBLICATION theirs"), "{refused}");
}

/// Of a row as it was Postgres tells the columns of the replica identity alone: which are missing is said before a row comes.
#[tokio::test]
async fn columns_whose_old_values_are_not_told_are_said_beforehand() {
    let server = Postgres::start_logical();
    let url = server
        .database(&[
            "CREATE TABLE orders (id int PRIMARY KEY, user_id int NOT NULL, what text)",
            "CREATE TABLE indexed (id int PRIMARY KEY, user_id int NOT NULL)",
            "CREATE UNIQUE INDEX by_user ON indexed (id, user_id)",
            "ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_user",
            "CREATE TABLE whole (id int, user_id int)",
            "ALTER TABLE whole REPLICA IDENTITY FULL",
            "CREATE TABLE parted (id int PRIMARY KEY, user_id int) PARTITION BY RANGE (id)",
            "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (100)",
            "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (100) TO (200)",
            "ALTER TABLE parted_1 REPLICA IDENTITY FULL",
        ])
        .await;
    let needs = needs(&["indexed id user_id", "orders id user_id", "parted id user_id", "whole id user_id gone"]);
    let (mut feed, ready) = database(&url).feed(&place(&url), &needs, SlotOwner::Larder, false).await.expect("a stream");
    for (trouble, words) in ready.troubles.iter().zip([
        ["the old value of `user_id`", "ALTER TABLE orders REPLICA IDENTITY FULL"],
        ["the old value of `user_id`", "ALTER TABLE each of its partitions REPLICA IDENTITY FULL"],
        ["the table `whole` has no column `gone`", "columns"],
    ]) {
        assert!(words.iter().all(|word| trouble.contains(word)), "{trouble}");
    }
    assert_eq!((ready.troubles.len(), ready.added.len()), (3, 4), "{ready:?}");
    let mend = ["orders", "parted_2"].map(|table| format!("ALTER TABLE {table} REPLICA IDENTITY FULL"));
    let statements: Vec<&str> = mend.iter().map(String::as_str).chain(["ALTER TABLE whole ADD COLUMN gone int"]).collect();
    server.run(name_of(&url), &statements).await;
    let mended = feed.look_after(&needs).await.expect("an answer");
    assert!(mended.troubles.is_empty() && mended.added.is_empty(), "{mended:?}");
}

/// A commit that waits for a replica is in the log, and told of, before anybody sees it.
#[tokio::test]
async fn what_nobody_sees_yet_is_waited_for() {
    let server = Postgres::start_logical();
    let url = server.database(&[USERS]).await;
    let (mut feed, _, mut known) = open(&url, &["users"]).await;
    server.run("postgres", &["ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()"]).await;
    let name = name_of(&url);
    let writing = server.run(name, &["SELECT pg_sleep(0.5)", "INSERT INTO users VALUES (7, 'Ann')"]);
    let watching = async {
        let (said, xid, end) = transaction(&mut feed, &mut known).await;
        includes(&said, &["insert users"]);
        assert_eq!(server.value(name, "SELECT count(*)::text FROM users").await, "0", "nobody sees it");
        assert!(timeout(Duration::from_secs(1), feed.seen(&[xid])).await.is_err(), "it is waited for");
        server.run("postgres", &["ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"]).await;
        timeout(LONG, feed.seen(&[xid])).await.expect("in time").expect("an answer");
        assert_eq!(server.value(name, "SELECT count(*)::text FROM users").await, "1");
        feed.confirm(end).await.expect("it is heard");
    };
    tokio::join!(writing, watching);
}
