//! The sidecar before servers that want TLS and a login, whose keys rotate while clients stay connected.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::support::certificates::{swap_to, tls_arguments, write_certificates};
use super::support::resp::{Client, Value, encode};
use super::support::server::{Engine, Redis, free_port};
use super::support::sidecar::Sidecar;
use super::support::wait_for;

const LONG: Duration = Duration::from_secs(30);

#[test]
fn passwords_and_certificates_rotate_under_connected_clients() {
    let dir = TempDir::new().unwrap();
    for (version, password) in [("1", "first-secret"), ("2", "second-secret")] {
        let files = dir.path().join(version);
        fs::create_dir(&files).unwrap();
        write_certificates(&files);
        fs::write(files.join("user"), "app").unwrap();
        fs::write(files.join("password"), password).unwrap();
    }
    swap_to(&dir, "1");
    let mut arguments = tls_arguments(&dir.path().join("1"));
    let tls_port = free_port();
    let port = tls_port.to_string();
    arguments.extend(["--cluster-enabled", "yes", "--tls-cluster", "yes", "--tls-port", &port].map(str::to_owned));
    let server = Redis::start_with(Engine::Redis7, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut admin = server.client();
    for line in ["CLUSTER ADDSLOTSRANGE 0 16383", "ACL SETUSER app on >first-secret ~app:* +@all", "ACL SETUSER default ~* +@all"]
    {
        assert_eq!(admin.line(line), Value::Simple("OK".to_owned()), "{line}");
    }
    let at = |name: &str| dir.path().join("..data").join(name);
    let snapshot = json!({"version": 1, "requires": 1, "generation": 1, "unmatched": {"bypass": {}}, "cluster": {
        "name": "main", "topology": {"cluster": {"seeds": [format!("127.0.0.1:{tls_port}")]}},
        "tls": {"caFile": at("ca.pem"), "certFile": at("cert.pem"), "keyFile": at("key.pem")},
        "auth": {"usernameFile": at("user"), "passwordFile": at("password")},
    }});
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    assert_eq!(client.line("SET app:1 before"), Value::Simple("OK".to_owned()));
    let foreign = client.line("SET other:1 x");
    assert!(matches!(&foreign, Value::Error(text) if text.contains("NOPERM")), "the login is the workload's own: {foreign:?}");

    // Both passwords hold while the files change; then the old one goes, and every connection with it.
    admin.line("ACL SETUSER app >second-secret");
    let file = |name: &str| dir.path().join("2").join(name).display().to_string();
    let set = [
        "CONFIG",
        "SET",
        "tls-cert-file",
        &file("cert.pem"),
        "tls-key-file",
        &file("key.pem"),
        "tls-ca-cert-file",
        &file("ca.pem"),
    ];
    assert_eq!(admin.call(&set), Value::Simple("OK".to_owned()));
    swap_to(&dir, "2");
    wait_for("the new keys are taken up", LONG, || sidecar.metric("larder_secrets_renewed_total") > 0.0);
    admin.line("ACL SETUSER app <first-secret");
    admin.line("CLIENT KILL TYPE normal SKIPME yes");
    wait_for("the sidecar is back with its new keys", LONG, || admin.line("CLIENT LIST").text().contains("user=app"));
    for number in 0..50 {
        let set = client.line(&format!("SET app:{number} after"));
        assert_eq!(set, Value::Simple("OK".to_owned()));
    }
    assert_eq!(client.line("GET app:1").text(), "after");
    let log = sidecar.log();
    assert!(!log.contains("first-secret") && !log.contains("second-secret"), "{log}");
}

/// Passwords rotate, and then the user itself: connections that stand log in anew, so that the old user has none left when it is
/// removed. No command fails and no reply is mistaken, in either protocol, on shared connections and on those of one client.
#[test]
fn logins_rotate_under_load_without_a_failed_command() {
    let dir = TempDir::new().unwrap();
    let logins = [("1", "app", "first-secret"), ("2", "app", "second-secret"), ("3", "app-2", "third-secret")];
    for (version, user, password) in logins {
        let files = dir.path().join(version);
        fs::create_dir(&files).unwrap();
        fs::write(files.join("user"), user).unwrap();
        fs::write(files.join("password"), password).unwrap();
    }
    swap_to(&dir, "1");
    let server = Redis::start_with(Engine::Redis7, &["--cluster-enabled", "yes"]);
    let mut admin = server.client();
    let mut set_up = |line: &str| assert!(!admin.line(line).is_error(), "{line}");
    set_up("CLUSTER ADDSLOTSRANGE 0 16383");
    set_up("ACL SETUSER app on >first-secret ~* +@all");
    set_up("ACL SETUSER app-2 on >third-secret ~* +@all");
    wait_for("the slots are served", LONG, || server.client().line("CLUSTER INFO").text().contains("cluster_state:ok"));
    let sidecar = behind_login(&server, dir.path());
    let (stop, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let more_rounds = |wanted: usize| {
        let from = rounds.load(Ordering::Relaxed);
        wait_for("the load to go on", LONG, || rounds.load(Ordering::Relaxed) >= from + wanted);
    };
    let connections = |user: &str| {
        let list = server.client().line("CLIENT LIST").text();
        list.lines().filter(|line| line.contains(&format!(" user={user} "))).count()
    };
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (client, stop, rounds) = (sidecar.client(), &stop, &rounds);
            scope.spawn(move || load(client, number, stop, rounds));
        }
        let _end = StopOnDrop(&stop);
        more_rounds(50);
        set_up("ACL SETUSER app >second-secret");
        swap_to(&dir, "2");
        wait_for("the new password is taken up", LONG, || sidecar.metric("larder_secrets_renewed_total") >= 1.0);
        more_rounds(50);
        set_up("ACL SETUSER app <first-secret");
        more_rounds(50);
        swap_to(&dir, "3");
        wait_for("no connection of the old user is left", LONG, || connections("app") == 0);
        set_up("ACL DELUSER app");
        more_rounds(50);
    });
    assert!(connections("app-2") > 0);
    let log = sidecar.log();
    assert!(!log.contains("-secret") && !log.contains("lost a server connection"), "{log}");
}

/// Ends the load also where an assertion fails, so that the test does not hang.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn behind_login(server: &Redis, files: &Path) -> Sidecar {
    let at = |name: &str| files.join("..data").join(name);
    Sidecar::start(&json!({"version": 1, "requires": 1, "generation": 1, "unmatched": {"bypass": {}}, "cluster": {
        "name": "main", "topology": {"cluster": {"seeds": [format!("127.0.0.1:{}", server.port())]}},
        "auth": {"usernameFile": at("user"), "passwordFile": at("password")},
    }}))
}

/// Commands whose replies are known, pipelined and not, until `stop`.
fn load(mut client: Client, number: usize, stop: &AtomicBool, rounds: &AtomicUsize) {
    if number % 2 == 1 {
        assert!(!client.line("HELLO 3").is_error());
    }
    let ok = Value::Simple("OK".to_owned());
    let key = format!("key:{number}");
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let value = format!("{number}-{round}");
        let wire: Vec<u8> = (0..20).flat_map(|_| [encode(&["SET", &key, &value]), encode(&["GET", &key])].concat()).collect();
        client.send(&wire).unwrap();
        for _ in 0..20 {
            assert_eq!([client.read().unwrap(), client.read().unwrap()], [ok.clone(), Value::Bulk(value.clone().into_bytes())]);
        }
        assert_eq!(client.line("MULTI"), ok);
        assert_eq!(client.call(&["GET", &key]), Value::Simple("QUEUED".to_owned()));
        assert_eq!(client.line("EXEC"), Value::Array(vec![Value::Bulk(value.into_bytes())]));
        assert_eq!(client.line(&format!("BLPOP none:{number} 0.001")), Value::Nil);
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}
