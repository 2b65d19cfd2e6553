//! Servers and sentinels that speak TLS: found, followed through a failover, and reached again when certificates change.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::{Fault, LONG, Writes, lose_the_primary_of};
use crate::support::admin::{get, metric};
use crate::support::certificates::{swap_to, write_certificates};
use crate::support::resp::Value;
use crate::support::server::{Engine, Redis, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};
use crate::support::wait_for;

const PEM_FILES: [&str; 3] = ["ca.pem", "cert.pem", "key.pem"];

/// The files of the servers, of two authorities, and what a sidecar uses of either: its certificate, its logins.
struct Files {
    servers: TempDir,
    /// The versions `1` and `2`, the first of which is current.
    sidecar: TempDir,
}

impl Files {
    fn new() -> Self {
        let (servers, sidecar) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let mut authorities = String::new();
        for (version, password) in [("1", "first-secret"), ("2", "second-secret")] {
            let files = sidecar.path().join(version);
            fs::create_dir(&files).unwrap();
            write_certificates(&files);
            authorities += &fs::read_to_string(files.join("ca.pem")).unwrap();
            for (name, text) in [("user", "app"), ("watcher", "watcher"), ("password", password)] {
                fs::write(files.join(name), text).unwrap();
            }
        }
        swap_to(&sidecar, "1");
        let files = Self { servers, sidecar };
        files.give_servers("1");
        // The servers take the certificates of either; the sidecar trusts one at a time.
        fs::write(files.servers.path().join("ca.pem"), authorities).unwrap();
        files
    }

    /// Lets the servers find the certificate of another authority.
    fn give_servers(&self, version: &str) {
        for name in ["cert.pem", "key.pem"] {
            fs::copy(self.sidecar.path().join(version).join(name), self.servers.path().join(name)).unwrap();
        }
    }

    fn snapshot(&self, servers: &SentinelCluster) -> Json {
        let at = |name: &str| self.sidecar.path().join("..data").join(name);
        let mut topology = sentinel_topology(servers);
        topology["tls"] = json!({"caFile": at("ca.pem"), "certFile": at("cert.pem"), "keyFile": at("key.pem")});
        topology["auth"] = json!({"usernameFile": at("user"), "passwordFile": at("password")});
        topology["sentinelAuth"] = json!({"usernameFile": at("watcher"), "passwordFile": at("password")});
        bypass(topology)
    }
}

/// Has a server read its files again.
fn reload_certificates(server: &Redis, files: &Path) {
    let [ca, cert, key] = PEM_FILES.map(|name| files.join(name).display().to_string());
    let set = ["CONFIG", "SET", "tls-cert-file", &cert, "tls-key-file", &key, "tls-ca-cert-file", &ca];
    assert_eq!(server.client().call(&set), Value::Simple("OK".to_owned()));
}

/// The connections of `user`, as the peer sees them: all of them come by its TLS port.
#[track_caller]
fn assert_encrypted(user: &str, clients: &str, tls_port: u16) {
    let own: Vec<&str> = clients.lines().filter(|line| line.contains(&format!("user={user} "))).collect();
    assert!(!own.is_empty(), "nobody is logged in as {user}: {clients}");
    assert!(own.iter().all(|line| line.contains(&format!(" laddr=127.0.0.1:{tls_port} "))), "{own:?}");
}

#[test]
fn certificates_change_and_a_primary_dies_under_tls() {
    let files = Files::new();
    let mut cluster = SentinelCluster::start_secured(Engine::Redis7, 2, files.servers.path(), "yes");
    for server in &cluster.servers {
        let set_user = server.client().line("ACL SETUSER app on >first-secret >second-secret ~* &* +@all");
        assert_eq!(set_user, Value::Simple("OK".to_owned()));
    }
    let sidecar = Sidecar::start(&files.snapshot(&cluster));
    let mut client = sidecar.client();
    assert_eq!(client.line("SET key before"), Value::Simple("OK".to_owned()));
    assert_encrypted("app", &cluster.primary().client().line("CLIENT LIST").text(), cluster.primary().service_port());
    for sentinel in &cluster.sentinels {
        assert_encrypted("watcher", &sentinel.client().line("CLIENT LIST").text(), sentinel.service_port());
    }

    files.give_servers("2");
    cluster.servers.iter().for_each(|server| reload_certificates(server, files.servers.path()));
    cluster.sentinels.iter_mut().for_each(crate::support::server::Sentinel::restart);
    swap_to(&files.sidecar, "2");
    wait_for("the new certificates are taken up", LONG, || metric(&sidecar, "larder_secrets_renewed_total") > 0);
    // Every connection with the old ones ends, and the old password with them.
    for server in &cluster.servers {
        let mut admin = server.client();
        assert_eq!(admin.line("ACL SETUSER app <first-secret"), Value::Simple("OK".to_owned()));
    }
    assert!(cluster.primary().client().line("CLIENT KILL TYPE normal SKIPME yes").int() > 0);
    wait_for("the sidecar is back", LONG, || client.line("SET key after") == Value::Simple("OK".to_owned()));
    assert_encrypted("app", &cluster.primary().client().line("CLIENT LIST").text(), cluster.primary().service_port());

    wait_for("the sentinels to agree again", LONG, || cluster.sentinels.iter().all(|sentinel| sentinel.knows(2, 2)));
    lose_the_primary_of(&mut cluster, &sidecar, Fault::Kill, Writes::Plain);
    assert_eq!(client.line("GET key").text(), "after");
    assert_encrypted("app", &cluster.primary().client().line("CLIENT LIST").text(), cluster.primary().service_port());
    let log = sidecar.log();
    assert!(!log.contains("first-secret") && !log.contains("second-secret"), "{log}");
}

#[test]
fn an_authority_is_enough_where_clients_show_none_and_a_wrong_one_is_named() {
    let files = Files::new();
    let cluster = SentinelCluster::start_secured(Engine::Redis7, 1, files.servers.path(), "no");
    let mut topology = sentinel_topology(&cluster);
    let with_authority = |topology: &mut Json, version: &str| {
        topology["tls"] = json!({"caFile": files.sidecar.path().join(version).join("ca.pem"), "serverName": "cache.test"});
    };
    with_authority(&mut topology, "1");
    let sidecar = Sidecar::start(&bypass(topology.clone()));
    assert_eq!(sidecar.client().line("SET key value"), Value::Simple("OK".to_owned()));
    assert_eq!(cluster.primary().client().line("GET key").text(), "value");

    with_authority(&mut topology, "2");
    let stranger = Sidecar::start_alone(&bypass(topology.clone()));
    wait_for("the certificate to be refused", LONG, || stranger.log().contains("invalid peer certificate"));
    assert_eq!(get(&stranger, "/readyz").0, 503);
    with_authority(&mut topology, "1");
    topology["tls"]["serverName"] = json!("elsewhere.test");
    let misnamed = Sidecar::start_alone(&bypass(topology));
    wait_for("the name to be refused", LONG, || misnamed.log().contains("not valid for name"));
    assert_eq!(get(&misnamed, "/readyz").0, 503);
}
