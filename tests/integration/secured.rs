//! The sidecar before servers that want TLS and a login, whose keys rotate while clients stay connected.

use std::fs;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::support::certificates::{swap_to, tls_arguments, write_certificates};
use super::support::resp::Value;
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
