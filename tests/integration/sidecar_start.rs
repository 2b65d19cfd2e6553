//! What a sidecar is started with: sockets, logs, and the checks that come before a port opens.

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::read_through::{Servers, http_origin, policy, sql_origin, web_rule};
use crate::support::resp::{Value, encode, read_value};
use crate::support::server::free_port;
use crate::support::sidecar::{Sidecar, bypass};
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

/// What the owner's socket answers.
pub fn ask_owner_socket(path: &Path, target: &str) -> String {
    let mut stream = UnixStream::connect(path).expect("the socket accepts");
    write!(stream, "GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn clients_and_the_owner_come_by_unix_socket() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let directory = TempDir::new().expect("a temporary directory");
    let (socket, owner) = (directory.path().join("redis.sock"), directory.path().join("admin.sock"));
    let snapshot = policy(servers.topology(), 7, &[http_origin("web", &web, "20s")], &[web_rule("item", json!({}))]);
    let [shown, owner_shown] = [&socket, &owner].map(|path| path.display().to_string());
    let second = format!("[::1]:{}", free_port());
    let addresses = ["--socket", &shown, "--socket-mode", "666", "--admin-socket", &owner_shown, "--listen", &second];
    let mut sidecar = Sidecar::start_with(&snapshot, &[&addresses[..], &["--workers", "2"]].concat());
    assert_eq!(fs::metadata(&socket).expect("a socket").permissions().mode() & 0o777, 0o666);
    if TcpListener::bind("[::1]:0").is_ok() {
        let mut stream = TcpStream::connect(&second).expect("the second address accepts");
        stream.write_all(b"PING\r\n").expect("the sidecar reads");
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).expect("the sidecar answers");
        assert_eq!(&answer, b"+PONG\r\n");
    }
    web.put("/item/1", "loaded");
    let stream = UnixStream::connect(&socket).expect("the socket accepts");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let lines = [encode(&["SET", "k", "v"]), b"GET k\r\n".to_vec(), encode(&["GET", "item:1"]), encode(&["HELLO", "3"])];
    (&stream).write_all(&lines.concat()).expect("the sidecar reads");
    assert_eq!(read_value(&mut reader).expect("a reply"), Value::Simple("OK".to_owned()));
    assert_eq!(read_value(&mut reader).expect("a reply").text(), "v");
    assert_eq!(read_value(&mut reader).expect("a reply").text(), "loaded");
    assert!(matches!(read_value(&mut reader).expect("a reply"), Value::Map(_)));
    // Both workers serve the port.
    for _ in 0..20 {
        assert_eq!(sidecar.client().line("GET k").text(), "v");
    }

    assert_eq!(fs::metadata(&owner).expect("a socket").permissions().mode() & 0o777, 0o600);
    let policy = ask_owner_socket(&owner, "/policy");
    assert!(policy.contains("\"generation\": 7") && !policy.contains(&web.url()), "{policy}");
    let explained = ask_owner_socket(&owner, "/explain?key=item:1");
    assert!(explained.starts_with("HTTP/1.1 200") && explained.contains("item"), "{explained}");

    sidecar.signal("TERM");
    assert_eq!(sidecar.wait_for_end(LIMIT).code(), Some(0), "{}", sidecar.log());
    assert!(!socket.exists() && !owner.exists(), "the sockets are left behind");
}

/// Starts `larderd sidecar` under a snapshot that cannot come into force: it ends by itself. What it said.
fn refusal(snapshot: &str) -> String {
    refusal_with(snapshot, &[])
}

/// [`refusal`] with more arguments.
fn refusal_with(snapshot: &str, arguments: &[&str]) -> String {
    let directory = TempDir::new().expect("a temporary directory");
    let path = directory.path().join("snapshot.json");
    fs::write(&path, snapshot).expect("the directory is writable");
    let [port, admin] = [free_port(), free_port()];
    let mut child = Command::new(env!("CARGO_BIN_EXE_larderd"))
        .args(["sidecar", "--snapshot", &path.display().to_string()])
        .args(["--listen", &format!("127.0.0.1:{port}"), "--admin", &format!("127.0.0.1:{admin}")])
        .args(arguments)
        .stderr(fs::File::create(directory.path().join("log")).expect("the directory is writable"))
        .spawn()
        .expect("larderd runs");
    let mut ended = None;
    wait_for("the sidecar to end", LIMIT, || {
        let open = [port, admin].into_iter().any(|port| TcpStream::connect(("127.0.0.1", port)).is_ok());
        assert!(!open, "a port opens under {snapshot}");
        ended = child.try_wait().expect("a child can be waited for");
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{snapshot}");
    fs::read_to_string(directory.path().join("log")).expect("a log")
}

#[test]
fn everything_is_checked_before_a_port_opens() {
    let topology = json!({"name": "main", "topology": {"cluster": {"seeds": ["127.0.0.1:1"]}}});
    let of = |change: fn(&mut Json)| {
        let rule = crate::read_through::rule("row", "db", json!({"sql": {"read": "SELECT x FROM t WHERE id = $id"}}), json!({}));
        let origin = sql_origin("db", "sqlite:///nowhere.db");
        let mut snapshot = policy(topology.clone(), 1, &[origin], &[rule]);
        change(&mut snapshot);
        snapshot.to_string()
    };
    let directory = TempDir::new().expect("a temporary directory");
    // The URL of the rule's origin stands in a file of its own.
    let in_file = |url: &str, directory: &TempDir| {
        let path = directory.path().join(format!("url.{}", url.len()));
        fs::write(&path, url).expect("the directory is writable");
        let mut snapshot: Json = serde_json::from_str(&of(|_| {})).expect("it was just written");
        snapshot["origins"][0]["kind"] = json!({"sql": {"url": {"file": path}}});
        snapshot.to_string()
    };
    for (snapshot, word) in [
        ("{".to_owned(), "snapshot.json"),
        (of(|snapshot| snapshot["surprise"] = json!(1)), "surprise"),
        (of(|snapshot| snapshot["requires"] = json!(99)), "99"),
        (of(|snapshot| snapshot["cluster"]["topology"]["cluster"]["seeds"][0] = json!("nowhere")), "nowhere"),
        (of(|snapshot| snapshot["cluster"]["auth"] = json!({"passwordFile": "/nowhere/password"})), "/nowhere/password"),
        (of(|snapshot| snapshot["cluster"]["tls"] = json!({"caFile": "/nowhere/ca.pem"})), "/nowhere/ca.pem"),
        (of(|snapshot| snapshot["origins"][0]["kind"] = json!({"sql": {"url": {"file": "/nowhere/url"}}})), "/nowhere/url"),
        (in_file("mysql://h/d", &directory), "url.11: write postgres://"),
        (in_file("", &directory), "url.0: write postgres://"),
        (of(|snapshot| snapshot["rules"][0]["keys"] = json!("row:{id")), "row:{id"),
        (of(|snapshot| snapshot["rules"][0]["strategy"]["readThrough"]["load"]["origin"] = json!("gone")), "gone"),
        (
            of(|snapshot| {
                snapshot["rules"][0]["strategy"]["readThrough"]["load"]["query"]["sql"]["read"] = json!("SELECT $other");
            }),
            "other",
        ),
    ] {
        let said = refusal(&snapshot);
        assert!(said.starts_with("error: ") && said.contains(word) && said.contains("next: "), "{snapshot}: {said}");
    }
}

/// What is missing or wrong there later fails that origin's loads, until it is corrected.
#[test]
fn an_origin_whose_file_a_later_policy_names_in_vain_fails_alone() {
    let (servers, web) = (Servers::sentinel(), Web::start());
    web.put("/item/1", "one");
    let other = crate::read_through::rule("row", "db", json!({"sql": {"read": "SELECT x FROM t WHERE id = $id"}}), json!({}));
    let mut origins = vec![http_origin("web", &web, "20s")];
    let sidecar = Sidecar::start(&policy(servers.topology(), 1, &origins, &[web_rule("item", json!({}))]));
    let mut client = sidecar.client();
    origins.push(sql_origin("db", "sqlite:///nowhere.db"));
    origins[1]["kind"] = json!({"sql": {"url": {"file": "/nowhere/url"}}});
    let later = policy(servers.topology(), 2, &origins, &[web_rule("item", json!({})), other]);
    sidecar.replace_snapshot(&later.to_string());
    wait_for(
        "the other rule to be in force",
        LIMIT,
        || matches!(client.line("GET row:1"), Value::Error(text) if text.starts_with("ORIGIN origin `db` ") && text.contains("/nowhere/url")),
    );
    assert_eq!(client.line("GET item:1").text(), "one");
    // An origin that no rule asks need not be known.
    let unasked = policy(servers.topology(), 1, &origins, &[web_rule("item", json!({}))]);
    assert_eq!(Sidecar::start(&unasked).client().line("GET item:1").text(), "one");
}

#[test]
fn leases_are_refused_to_more_than_one_worker() {
    let servers = Servers::sentinel();
    let ttl = json!({"default": "1h", "max": "2h", "jitter": "10%"});
    let stampede = json!({"lease": "3s", "wait": "1s", "atWaitEnd": "error"});
    let of = |generation, cache_aside: Json| {
        let rule = json!({"name": "item", "keys": "item:{id}", "strategy": {"cacheAside": cache_aside}});
        policy(servers.topology(), generation, &[], &[rule])
    };
    let (plain, leases) = (of(1, json!({"ttl": ttl})), of(2, json!({"ttl": ttl, "stampede": stampede})).to_string());
    let remedy = "Start it with --workers 1, or remove stampede";
    let said = refusal_with(&leases, &["--workers", "2"]);
    assert!(said.contains("rule `item`") && said.contains(remedy) && said.contains("next: "), "{said}");
    // A running one keeps the policy it has.
    let sidecar = Sidecar::start_with(&plain, &["--workers", "2"]);
    sidecar.replace_snapshot(&leases);
    wait_for("the policy to be refused", LIMIT, || sidecar.metric("larder_policy_rejected_total") == 1.0);
    assert!(sidecar.log().contains(remedy), "{}", sidecar.log());
    assert_eq!(sidecar.metric("larder_policy_generation"), 1.0);
    assert_eq!(sidecar.client().line("SET item:1 v"), Value::Simple("OK".to_owned()));
    sidecar.replace_snapshot(&of(3, json!({"ttl": ttl})).to_string());
    wait_for("the next policy", LIMIT, || sidecar.metric("larder_policy_generation") == 3.0);
}

#[test]
fn logs_are_text_or_json_and_name_slow_commands_but_few_and_no_keys() {
    let (servers, web) = (Servers::sentinel(), Web::start());
    let rules = [web_rule("item", json!({}))];
    let snapshot = policy(servers.topology(), 1, &[http_origin("web", &web, "20s")], &rules);
    let json_logs = Sidecar::start_with(&snapshot, &["--log-format", "json"]);
    let text_logs = Sidecar::start_with(&bypass(servers.topology()), &[]);
    for sidecar in [&json_logs, &text_logs] {
        // The server's thread is held, so that everything behind it is slow.
        let mut clients: Vec<_> = (0..60).map(|_| sidecar.client()).collect();
        wait_for("a slow command to be named", LIMIT, || {
            sidecar.log().contains("a slow command") || {
                let holder = std::thread::spawn({
                    let mut server = servers.holder_of("k");
                    move || server.line("DEBUG SLEEP 0.4")
                });
                std::thread::sleep(Duration::from_millis(50));
                clients
                    .iter_mut()
                    .for_each(|client| client.send(&encode(&["SET", "private-key", "private-value"])).expect("it reads"));
                clients.iter_mut().for_each(|client| drop(client.read().expect("a reply")));
                holder.join().expect("the server wakes");
                false
            }
        });
        let log = sidecar.log();
        let lines = log.lines().filter(|line| line.contains("a slow command")).count();
        assert!(lines < 60, "{lines} lines for so many slow commands");
        assert!(!log.contains("private-"), "{log}");
    }
    for line in json_logs.log().lines() {
        let line: Json = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
    }
    let slow = json_logs.log().lines().find(|line| line.contains("a slow command")).expect("found before").to_owned();
    assert!(slow.contains("\"command\":\"SET\"") || slow.contains("\"command\":\"set\""), "{slow}");
    assert!(serde_json::from_str::<Json>(text_logs.log().lines().next().unwrap_or_default()).is_err(), "text is no JSON");
    assert!(!text_logs.log().contains('\x1b'), "a file is no terminal: {}", text_logs.log());
}
