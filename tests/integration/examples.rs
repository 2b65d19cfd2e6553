//! Each folder of examples/ runs as it stands: `larder dev` brings it up, and a client sees what its comments promise.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::cache_aside::bulk;
use super::support::dev::Dev;
use super::support::postgres::Postgres;
use super::support::program::output_of;
use super::support::resp::{Client, Value, encode};
use super::support::server::Engine;
use super::support::wait_for;
use super::write_through::block;

/// One example, run from a copy in which `places` are put where this test has them.
fn run(example: &str, places: &[(&str, &str)]) -> (Dev, Client) {
    let (dev, client, _) = run_copy(example, places);
    (dev, client)
}

/// The same, with the copy.
fn run_copy(example: &str, places: &[(&str, &str)]) -> (Dev, Client, Arc<TempDir>) {
    let copy = TempDir::new().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(example);
    for file in fs::read_dir(source).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        let text = fs::read_to_string(file.path()).unwrap();
        let text = places.iter().fold(text, |text, (from, to)| text.replace(from, to));
        fs::write(copy.path().join(file.file_name()), text).unwrap();
    }
    let copy = Arc::new(copy);
    let mut dev = Dev::start_in(Engine::Redis7, &copy, &["--sidecars", "1"]);
    let port = dev.ready(1)[0];
    (dev, Client::connect(port).unwrap(), copy)
}

#[test]
fn the_first_policy_gives_carts_a_ttl_and_leaves_queues_alone() {
    let (dev, mut client) = run("first-policy", &[]);
    assert_eq!(client.call(&["SET", "cart:ann", "milk"]).text(), "OK");
    let ttl = client.call(&["TTL", "cart:ann"]).int();
    assert!((27 * 60 - 60..=30 * 60).contains(&ttl), "{ttl}");
    assert_eq!(client.call(&["SET", "cart:bob", "tea", "EX", "604800"]).text(), "OK");
    assert!(client.call(&["TTL", "cart:bob"]).int() <= 24 * 3600);
    client.call(&["LPUSH", "queue:mail", "job"]);
    assert_eq!(client.call(&["TTL", "queue:mail"]).int(), -1);
    dev.stop();
}

#[test]
fn rows_are_read_through_from_sql() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let tables = "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, mail TEXT);
        INSERT INTO users VALUES (42, 'Ann', 'ann@example.com');
        CREATE TABLE prices (product TEXT, currency TEXT, amount TEXT);
        INSERT INTO prices VALUES ('tea', 'EUR', '3.50');";
    let made = Command::new("sqlite3").arg(&database).arg(tables).status().expect("make setup installs sqlite3");
    assert!(made.success());
    let (dev, mut client) = run("read-through-sql", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    assert_eq!(client.call(&["GET", "user:42"]).text(), r#"{"name":"Ann","mail":"ann@example.com"}"#);
    assert_eq!(client.call(&["GET", "price:tea:EUR"]).text(), "3.50");
    assert_eq!(client.call(&["GET", "user:43"]), Value::Nil);
    assert!(client.call(&["TTL", "price:tea:EUR"]).int() <= 60);
    ordinary_clients_read(client.stream().peer_addr().unwrap().port(), "user:42", r#"{"name":"Ann","mail":"ann@example.com"}"#);
    dev.stop();
}

/// Runs a statement by the database's own program: what it prints.
fn sqlite(database: &Path, statement: &str) -> String {
    let output = Command::new("sqlite3").arg(database).arg(statement).output().expect("make setup installs sqlite3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn values_are_written_through_to_sql() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, mail TEXT UNIQUE, row_version INTEGER NOT NULL DEFAULT 1)");
    let (dev, mut client) = run("write-through-sql", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    let ann = r#"{"name":"Ann","mail":"ann@example.com"}"#;
    assert_eq!(client.call(&["SET", "user:42", ann]).text(), "OK");
    assert_eq!(sqlite("SELECT id || name || mail FROM users"), "42Annann@example.com");
    assert_eq!(client.call(&["GET", "user:42"]).text(), ann);
    assert!(client.call(&["TTL", "user:42"]).int() <= 600);
    let taken = client.call(&["SET", "user:43", ann]);
    assert!(matches!(&taken, Value::Error(text) if text.contains("UNIQUE constraint failed: users.mail")), "{taken:?}");
    assert_eq!((client.call(&["DEL", "user:42"]), client.call(&["GET", "user:42"])), (Value::Int(1), Value::Nil));
    assert_eq!(sqlite("SELECT count(*) FROM users"), "0");
    dev.stop();
}

#[test]
fn rows_are_hashes_and_the_database_counts() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, mail TEXT); CREATE TABLE visits (page TEXT PRIMARY KEY, n INTEGER); \
         INSERT INTO users VALUES (41, 'Bob', NULL)",
    );
    let (dev, mut client) = run("hashes-sql", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    assert_eq!(client.call(&["HGET", "user:41", "name"]).text(), "Bob");
    assert_eq!(client.call(&["HSET", "user:42", "name", "Ann", "mail", "ann@example.com"]), Value::Int(2));
    assert_eq!(sqlite("SELECT id || name || mail FROM users WHERE id = 42"), "42Annann@example.com");
    assert_eq!(client.call(&["HGET", "user:42", "mail"]).text(), "ann@example.com");
    let part = client.call(&["HSET", "user:42", "name", "Eve"]);
    assert!(part.is_error(), "nobody knows the rest: {part:?}");
    assert_eq!((client.call(&["DEL", "user:42"]), client.call(&["HGET", "user:42", "name"])), (Value::Int(1), Value::Nil));
    for n in 1..=3 {
        assert_eq!(client.call(&["INCR", "visits:home"]), Value::Int(n));
    }
    assert_eq!((sqlite("SELECT n FROM visits"), client.call(&["GET", "visits:home"]).text()), ("3".to_owned(), "3".to_owned()));
    assert_eq!(client.call(&["DECRBY", "visits:home", "2"]), Value::Int(1));
    dev.stop();
}

#[test]
fn values_are_written_behind_to_sql() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite(
        "PRAGMA journal_mode = WAL; CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, mail TEXT, row_version INTEGER NOT NULL)",
    );
    let (dev, mut client) = run("write-behind-sql", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    let limit = std::time::Duration::from_secs(60);
    let (ann, bob) = (r#"{"name":"Ann","mail":"ann@example.com"}"#, r#"{"name":"Bob","mail":"bob@example.com"}"#);
    assert_eq!(client.call(&["SET", "user:42", ann]).text(), "OK");
    assert_eq!(client.call(&["GET", "user:42"]).text(), ann);
    assert!(client.call(&["TTL", "user:42"]).int() <= 600);
    wait_for("the row", limit, || sqlite("SELECT id || name || mail FROM users") == "42Annann@example.com");
    assert_eq!(client.call(&["DEL", "user:42"]), Value::Int(1));
    assert_eq!(client.call(&["GET", "user:42"]), Value::Nil);
    assert_eq!(client.call(&["SET", "user:43", bob]).text(), "OK");
    let journal = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["journal", "drain", "--snapshot"])
        .arg(dev.directory().join("snapshot.json"))
        .output()
        .unwrap();
    assert!(journal.status.success(), "{}", String::from_utf8_lossy(&journal.stderr));
    assert_eq!(sqlite("SELECT group_concat(id || name) FROM users"), "43Bob");
    dev.stop();
}

/// With a TTL of seconds instead of half a minute.
#[test]
fn a_value_ends_by_its_ttl_and_nobody_says_so() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite("CREATE TABLE rates (currency TEXT PRIMARY KEY, rate TEXT); INSERT INTO rates VALUES ('EUR', '1.08')");
    let url = format!("sqlite://{}", database.display());
    let places = [("sqlite://shop.db", url.as_str()), ("ttl: 30s", "ttl: 3s"), ("negativeTtl: 5s", "negativeTtl: 2s")];
    let (dev, mut client) = run("ttl", &places);
    let limit = std::time::Duration::from_secs(60);
    let asked = std::time::Instant::now();
    assert_eq!((client.call(&["GET", "rate:EUR"]).text(), client.call(&["GET", "rate:CHF"])), ("1.08".to_owned(), Value::Nil));
    let left = client.call(&["PTTL", "rate:EUR"]).int();
    assert!((1..=3_000).contains(&left), "{left}");
    sqlite("UPDATE rates SET rate = '1.09'; INSERT INTO rates VALUES ('CHF', '0.95')");
    // Up to a fifth of three seconds less than these. What a busy machine took longer for is no old value.
    let old = client.call(&["GET", "rate:EUR"]);
    assert!(old == bulk("1.08") || asked.elapsed().as_millis() >= 2_400, "{old:?}");
    wait_for("the value to end, and the next to be loaded", limit, || client.call(&["GET", "rate:EUR"]) == bulk("1.09"));
    assert!(asked.elapsed().as_millis() >= 2_400, "before its time: {:?}", asked.elapsed());
    wait_for("what was missing to be asked for again", limit, || client.call(&["GET", "rate:CHF"]) == bulk("0.95"));
    dev.stop();
}

#[test]
fn who_changes_a_row_says_so_and_readers_see_it() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users VALUES (42, 'Ann')");
    let (dev, mut client) = run("events", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    let limit = std::time::Duration::from_secs(60);
    assert_eq!(client.call(&["GET", "user:42"]).text(), "Ann");
    assert_eq!(client.call(&["GET", "user:43"]), Value::Nil);
    sqlite("UPDATE users SET name = 'Anna' WHERE id = 42; INSERT INTO users VALUES (43, 'Bob')");
    assert_eq!((client.call(&["GET", "user:42"]).text(), client.call(&["GET", "user:43"])), ("Ann".to_owned(), Value::Nil));
    for key in ["user:42", "user:43"] {
        assert!(!client.call(&["XADD", "larder:events", "*", "key", key]).is_error());
    }
    wait_for("the new row", limit, || client.call(&["GET", "user:42"]).text() == "Anna");
    wait_for("the row that was missing", limit, || client.call(&["GET", "user:43"]) != Value::Nil);
    // In any language.
    let port = client.stream().peer_addr().unwrap().port();
    for (name, announce) in [("Anne", &PYTHON), ("Anja", &NODE), ("Aino", &GO)] {
        sqlite(&format!("UPDATE users SET name = '{name}' WHERE id = 42"));
        announce_by(announce, port, &["key", "user:42"]);
        wait_for(name, limit, || client.call(&["GET", "user:42"]) == bulk(name));
    }
    // Many rows at once, by hand.
    sqlite("UPDATE users SET name = 'Nobody'");
    let invalidate = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["invalidate", "--rule", "user", "--wait", "--run-dir"])
        .arg(dev.directory())
        .output()
        .unwrap();
    assert!(invalidate.status.success(), "{}", String::from_utf8_lossy(&invalidate.stderr));
    assert_eq!(client.call(&["GET", "user:42"]).text(), "Nobody");
    dev.stop();
}

#[test]
fn a_database_tells_of_its_changes_itself() {
    let server = Postgres::start_logical();
    let tables = [
        "CREATE TABLE users (id bigint PRIMARY KEY, name text)",
        "CREATE TABLE orders (id int PRIMARY KEY, user_id bigint, what text)",
        "ALTER TABLE orders REPLICA IDENTITY FULL",
        "INSERT INTO users VALUES (42, 'Ann')",
        "INSERT INTO orders VALUES (1, 42, 'tea')",
    ];
    let url = block(server.database(&tables));
    let database = url.rsplit('/').next().unwrap();
    let (dev, mut client) = run("database-changes", &[("postgres://shop:password@localhost/shop", &url)]);
    let limit = std::time::Duration::from_secs(60);
    let slots = || block(server.value("postgres", "SELECT count(*)::text FROM pg_replication_slots WHERE active"));
    wait_for("the relay to read the database", limit, || slots() == "1");
    let shown = Command::new(env!("CARGO_BIN_EXE_larder")).args(["changes", "--run-dir"]).arg(dev.directory()).output().unwrap();
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.status.success() && text.contains("larder_main_db_"), "{text}{}", String::from_utf8_lossy(&shown.stderr));
    assert_eq!(client.call(&["GET", "user:42"]).text(), "Ann");
    assert_eq!(client.call(&["GET", "user:43"]), Value::Nil);
    assert_eq!(client.call(&["GET", "orders:42"]).text(), "tea");
    assert_eq!(client.call(&["MGET", "letter:42:Dear", "letter:42:Hi"]), Value::Array(["Dear Ann", "Hi Ann"].map(bulk).to_vec()));
    block(server.run(database, &["UPDATE users SET name = 'Anna' WHERE id = 42", "INSERT INTO users VALUES (43, 'Bob')"]));
    wait_for("the new row", limit, || client.call(&["GET", "user:42"]).text() == "Anna");
    wait_for("the row that was missing", limit, || client.call(&["GET", "user:43"]) == bulk("Bob"));
    for (key, letter) in [("letter:42:Dear", "Dear Anna"), ("letter:42:Hi", "Hi Anna")] {
        wait_for("the letters to be new", limit, || client.call(&["GET", key]) == bulk(letter));
    }
    block(server.run(database, &["UPDATE orders SET user_id = 43 WHERE id = 1"]));
    wait_for("the order to be another's", limit, || client.call(&["GET", "orders:43"]) == Value::Bulk(b"tea".to_vec()));
    wait_for("the order to be no more the first's", limit, || client.call(&["GET", "orders:42"]) == Value::Nil);
    dev.stop();
    let left = "SELECT count(*)::text FROM pg_replication_slots";
    assert_eq!(block(server.value("postgres", left)), "0", "a run leaves nothing in the database");
}

/// A language of examples/clients: its directory and its program, with the arguments that run what reads keys, and what announces changes.
struct Language {
    directory: &'static str,
    program: &'static str,
    reads: &'static [&'static str],
    announces: &'static [&'static str],
}

const PYTHON: Language = Language { directory: "python", program: "python3", reads: &["get.py"], announces: &["announce.py"] };
const NODE: Language = Language { directory: "node", program: "node", reads: &["get.js"], announces: &["announce.js"] };
const GO: Language = Language { directory: "go", program: "go", reads: &["run", "."], announces: &["run", "./announce"] };

impl Language {
    /// What such a client prints, with the packages that `make setup` has installed for tests/clients.
    #[track_caller]
    fn run(&self, program: &[&str], arguments: &[&str], port: u16) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let Self { directory, program: interpreter, .. } = self;
        let mut command = Command::new(interpreter);
        command.args(program).args(arguments).current_dir(root.join("examples/clients").join(directory));
        command.env("NODE_PATH", root.join("tests/clients/node/node_modules"));
        command.env("REDIS_URL", format!("redis://127.0.0.1:{port}"));
        let output = output_of(&mut command);
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{directory}: {out}{errors}");
        out.into_owned()
    }
}

fn ordinary_clients_read(port: u16, key: &str, value: &str) {
    for language in [PYTHON, NODE, GO] {
        let out = language.run(language.reads, &[key, "user:none"], port);
        assert!(out.lines().count() == 2 && out.starts_with(&format!("{key} = {value} (")), "{}: {out}", language.directory);
    }
}

#[track_caller]
fn announce_by(language: &Language, port: u16, event: &[&str]) {
    let out = language.run(language.announces, event, port);
    assert!(out.contains('-'), "{}: {out} is no entry's id", language.directory);
}

#[test]
fn a_new_price_list_makes_all_pages_outdated_by_one_write() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("shop.db");
    let sqlite = |statement: &str| sqlite(&database, statement);
    sqlite(
        "CREATE TABLE prices (product TEXT PRIMARY KEY, cents INTEGER); INSERT INTO prices VALUES ('tea', 350), ('milk', 120)",
    );
    let (dev, mut client) = run("versions", &[("sqlite://shop.db", &format!("sqlite://{}", database.display()))]);
    let mut pages = || ["page:tea", "page:milk"].map(|key| client.call(&["GET", key]).text());
    assert_eq!(pages(), ["tea costs 350", "milk costs 120"]);
    sqlite("UPDATE prices SET cents = cents + 10");
    let invalidate = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["invalidate", "--rule", "page", "--wait", "--run-dir"])
        .arg(dev.directory())
        .output()
        .unwrap();
    assert!(invalidate.status.success(), "{}", String::from_utf8_lossy(&invalidate.stderr));
    assert_eq!(pages(), ["tea costs 360", "milk costs 130"]);
    dev.stop();
}

#[test]
fn of_all_who_miss_a_key_one_loads_and_the_others_wait_for_what_it_stores() {
    let (dev, mut first) = run("cache-aside", &[]);
    let mut second = Client::connect(first.stream().peer_addr().unwrap().port()).unwrap();
    assert_eq!(first.call(&["GET", "user:1"]), Value::Nil);
    second.send(&encode(&["GET", "user:1"])).unwrap();
    assert_eq!(second.poll(), None, "it waits");
    assert_eq!(first.call(&["SET", "user:1", "Ann"]).text(), "OK");
    assert_eq!(second.read().unwrap().text(), "Ann");
    assert!((500..=600).contains(&first.call(&["TTL", "user:1"]).int()));
    assert!(first.call(&["KEYS", "*"]).is_error());
    dev.stop();
}

/// How many of these clients had to load a key that all of them want: each that misses takes a while to.
fn loads(port: u16, key: &str) -> i64 {
    let client = || {
        let mut client = Client::connect(port).unwrap();
        let missed = client.call(&["GET", key]) == Value::Nil;
        if missed {
            std::thread::sleep(std::time::Duration::from_millis(300));
            client.call(&["SET", key, "loaded"]);
        }
        i64::from(missed)
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..10).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    })
}

#[test]
fn what_observing_predicts_enforcing_brings() {
    let (dev, mut client, copy) = run_copy("observe-to-enforce", &[]);
    let port = client.stream().peer_addr().unwrap().port();
    let mut count = |counter: &str| {
        let stats = client.call(&["LARDER.STATS", "user"]);
        let counts = stats.items()[1].items();
        let at = counts.iter().position(|name| *name == Value::Bulk(counter.as_bytes().to_vec()));
        counts[at.unwrap_or_else(|| panic!("no {counter}")) + 1].int()
    };
    let observed = loads(port, "user:1");
    assert!(observed > 1, "they come one after another");
    assert_eq!((count("predicted_loads_saved"), count("loads_saved")), (observed - 1, 0));
    assert_eq!(Client::connect(port).unwrap().call(&["TTL", "user:1"]).int(), -1);

    let enforce = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/observe-to-enforce/enforce/policy.yaml");
    let text = fs::read_to_string(&enforce).unwrap();
    let observe = fs::read_to_string(copy.path().join("policy.yaml")).unwrap();
    let spec = |text: &str| {
        text.lines()
            .filter(|line| !line.contains("mode: "))
            .map(|line| line.split('#').next().unwrap().trim_end().to_owned())
            .filter(|line| !line.is_empty())
            .collect::<Vec<_>>()
    };
    assert_eq!(spec(&text), spec(&observe), "they differ in more than their mode");
    fs::write(copy.path().join("policy.yaml"), text).unwrap();
    wait_for("the policy to be enforced", std::time::Duration::from_secs(60), || {
        let mut other = Client::connect(port).unwrap();
        other.call(&["SET", "user:probe", "x"]);
        other.call(&["TTL", "user:probe"]).int() > 0
    });
    assert_eq!(loads(port, "user:2"), 1);
    assert!(count("loads_saved") > 0);
    assert_eq!(count("leases"), 1);
    dev.stop();
}

#[test]
fn answers_are_read_through_from_http() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    std::thread::spawn({
        let asked = asked.clone();
        move || serve(&listener, &asked)
    });
    let (dev, mut client) = run("read-through-http", &[("http://127.0.0.1:8000", &address)]);
    for _ in 0..3 {
        assert_eq!(client.call(&["GET", "product:7:en"]).text(), "/products/7?lang=en");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!(client.call(&["GET", "product:none:en"]), Value::Nil);
    dev.stop();
}

/// A service that answers each path with itself, and knows no product `none`.
fn serve(listener: &TcpListener, asked: &AtomicUsize) {
    for mut stream in listener.incoming().flatten() {
        let mut request = [0; 4096];
        let length = stream.read(&mut request).unwrap_or(0);
        let text = String::from_utf8_lossy(&request[..length]).into_owned();
        let path = text.split(' ').nth(1).unwrap_or_default();
        asked.fetch_add(1, Ordering::Relaxed);
        let status = if path.contains("/none") { "404 Not Found" } else { "200 OK" };
        let body = if path.contains("/none") { "" } else { path };
        let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    }
}
