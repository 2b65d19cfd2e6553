//! What a login needs to follow a database's changes, as docs/database-changes.md says it: with that it works, and what it lacks is named.

use std::time::Duration;

use larder::origin::LoadError;
use larder::origin::changes::pgoutput::Message;
use larder::origin::changes::{Database, Feed, Needs, Place, Ready, SlotOwner, Told};
use tokio::time::timeout;

use crate::support::origin::sql;
use crate::support::postgres::Postgres;

/// How long anything may take: test machines are busy.
const LONG: Duration = Duration::from_secs(60);
/// What there is beside the publications.
const SLOTS: &str = "SELECT count(*)::text FROM pg_replication_slots";
const PUBLICATIONS: &str = "SELECT coalesce(string_agg(pubname, ' '), '') FROM pg_publication";

/// A database with the tables of the documentation, which a superuser owns, and its name.
async fn database(server: &Postgres) -> (String, String) {
    let url = server
        .database(&[
            "CREATE TABLE users (id int PRIMARY KEY, name text)",
            "CREATE SCHEMA shop CREATE TABLE orders (id int PRIMARY KEY)",
        ])
        .await;
    let name = url.rsplit('/').next().expect("a name").to_owned();
    (url, name)
}

/// The same database for another login.
fn as_login(url: &str, login: &str) -> Database {
    Database::new(&sql(&url.replace("postgres:secret@", &format!("{login}:secret@")))).expect("a database")
}

async fn follow(url: &str, login: &str, place: &Place) -> Result<(Feed, Ready), LoadError> {
    let tables: Needs = ["users", "shop.orders"].iter().map(|name| (name.parse().expect("a name"), Default::default())).collect();
    as_login(url, login).feed(place, &tables, SlotOwner::Larder, false).await
}

/// Why a login cannot follow.
async fn refusal(url: &str, login: &str, place: &Place) -> String {
    follow(url, login, place).await.err().expect("no stream").to_string()
}

fn own(name: &str) -> Place {
    Place { slot: name.to_owned(), publication: name.to_owned(), given: false }
}

/// Waits until a row is told of that is inserted now.
async fn told(server: &Postgres, database: &str, feed: &mut Feed) {
    feed.start().await.expect("it begins");
    server.run(database, &["INSERT INTO users VALUES (7, 'Ann'); DELETE FROM users"]).await;
    let row = async {
        loop {
            if let Told::Message { message: Message::Insert { .. }, .. } = feed.next().await.expect("it goes on") {
                return;
            }
        }
    };
    timeout(LONG, row).await.expect("in time");
}

/// Right by right: what is missing still is named each time.
#[tokio::test]
async fn the_rights_that_are_documented_do_and_each_that_is_missing_is_named() {
    let server = Postgres::start_logical();
    let (url, name) = database(&server).await;
    server.run(&name, &["CREATE ROLE shop LOGIN PASSWORD 'secret'"]).await;
    let place = own("larder_rights");
    let steps = [
        ("ALTER ROLE shop REPLICATION".to_owned(), "ALTER ROLE shop REPLICATION"),
        (format!("GRANT CREATE ON DATABASE {name} TO shop"), "GRANT CREATE ON DATABASE"),
        ("ALTER TABLE users OWNER TO shop".to_owned(), "ALTER TABLE users OWNER TO shop"),
        ("ALTER TABLE shop.orders OWNER TO shop".to_owned(), "ALTER TABLE shop.orders OWNER TO shop"),
        ("GRANT USAGE ON SCHEMA shop TO shop".to_owned(), "GRANT USAGE ON SCHEMA shop TO shop"),
    ];
    for (right, sentence) in &steps {
        let why = refusal(&url, "shop", &place).await;
        assert!(why.contains(sentence) && !why.contains("secret"), "{why}");
        assert_eq!((server.value(&name, SLOTS).await, server.value(&name, PUBLICATIONS).await), ("0".to_owned(), String::new()));
        server.run(&name, &[right]).await;
    }
    let (mut feed, ready) = follow(&url, "shop", &place).await.expect("a stream");
    assert!(ready.is_new && ready.troubles.is_empty(), "{ready:?}");
    told(&server, &name, &mut feed).await;
    drop(feed);
    as_login(&url, "shop").remove(&place, SlotOwner::Larder).await.expect("it is taken away");
    assert_eq!((server.value(&name, SLOTS).await, server.value(&name, PUBLICATIONS).await), ("0".to_owned(), String::new()));
}

/// With a publication that somebody else has made, a login needs the right to replicate alone. What is somebody else's stays.
#[tokio::test]
async fn a_given_publication_takes_the_right_to_replicate_alone_and_is_left_as_it_is() {
    let server = Postgres::start_logical();
    let (url, name) = database(&server).await;
    let publish = "CREATE PUBLICATION theirs FOR TABLE users WITH (publish_via_partition_root = true)";
    server.run(&name, &["CREATE ROLE reader LOGIN PASSWORD 'secret'", publish]).await;
    let place = Place { slot: "larder_given".to_owned(), publication: "theirs".to_owned(), given: true };
    let why = refusal(&url, "reader", &place).await;
    assert!(why.contains("ALTER ROLE reader REPLICATION"), "{why}");
    server.run(&name, &["ALTER ROLE reader REPLICATION"]).await;
    // A slot that is there already is read on from where it was confirmed.
    server.run(&name, &["SELECT pg_create_logical_replication_slot('larder_given', 'pgoutput')"]).await;
    let confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots";
    let before = server.value(&name, confirmed).await;
    let (mut feed, ready) = follow(&url, "reader", &place).await.expect("a stream");
    assert_eq!((ready.is_new, ready.confirmed.to_string()), (false, before), "{ready:?}");
    let [trouble] = &ready.troubles[..] else { panic!("{ready:?}") };
    assert!(trouble.contains("ALTER PUBLICATION theirs ADD TABLE shop.orders"), "{trouble}");
    told(&server, &name, &mut feed).await;
    drop(feed);
    for (owner, slots) in [(SlotOwner::Other, "1"), (SlotOwner::Larder, "0")] {
        as_login(&url, "reader").remove(&place, owner).await.expect("what is Larder's is taken away");
        let left = (server.value(&name, SLOTS).await, server.value(&name, PUBLICATIONS).await);
        assert_eq!((left.0.as_str(), left.1.as_str()), (slots, "theirs"), "{owner:?}");
    }
    let tables = "SELECT string_agg(tablename, ' ') FROM pg_publication_tables";
    assert_eq!(server.value(&name, tables).await, "users");
}
