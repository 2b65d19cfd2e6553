//! When the applications of a pod may start: under a policy and a login that work, and after a while in any case.

use std::fs;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::read_through::Servers;
use crate::support::admin::get;
use crate::support::resp::Value;
use crate::support::server::Redis;
use crate::support::sidecar::{Sidecar, bypass};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
/// Longer than any test: what opens the gate is not the time.
const HELD: [&str; 4] = ["--binding", "shop", "--start-hold", "1h"];
/// What is logged where the time opens it.
const IN_VAIN: &str = "applications start all the same";

/// A login, in files.
struct Login(TempDir);

impl Login {
    fn new() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        for (name, text) in [("username", "shop"), ("password", "hush")] {
            fs::write(directory.path().join(name), text).expect("the directory is writable");
        }
        Self(directory)
    }

    /// A snapshot that has sidecars log in with it.
    fn snapshot(&self, mut topology: Json) -> Json {
        let file = |name: &str| self.0.path().join(name);
        topology["auth"] = json!({"usernameFile": file("username"), "passwordFile": file("password")});
        bypass(topology)
    }
}

/// What the startup probe is told.
fn asked(sidecar: &Sidecar) -> (u16, String) {
    let (status, body) = get(sidecar, "/livez?started");
    assert_eq!(get(sidecar, "/livez").0, 200, "it is alive all the time");
    (status, body.trim_end().to_owned())
}

fn let_in(server: &Redis) {
    let user = ["ACL", "SETUSER", "shop", "on", ">hush", "~*", "&*", "+@all"];
    assert_eq!(server.client().call(&user), Value::Simple("OK".to_owned()));
}

fn nodes(servers: &Servers) -> &[Redis] {
    match servers {
        Servers::Sentinel(sentinel) => &sentinel.servers,
        Servers::Cluster(cluster) => &cluster.servers,
    }
}

#[test]
fn applications_start_once_their_policy_and_their_user_are_in_force() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let login = Login::new();
        let sidecar = Sidecar::start_before(None, &HELD);
        assert_eq!(asked(&sidecar), (503, "not started: no policy has arrived yet".to_owned()));
        let snapshot = login.snapshot(servers.topology());
        sidecar.replace_snapshot(&snapshot.to_string());
        let (last, others) = nodes(&servers).split_last().expect("servers");
        others.iter().for_each(let_in);
        // The policy is there, and a server does not know its user.
        wait_for("the policy", LIMIT, || asked(&sidecar).1 != "not started: no policy has arrived yet");
        wait_for("the login to be tried", LIMIT, || last.client().line("ACL LOG").items().iter().any(is_of_the_user));
        let (status, told) = asked(&sidecar);
        assert!(status == 503 && (told.contains("login failed") || told.contains("no server")), "{told}");
        let_in(last);
        wait_for("applications to start", LIMIT, || asked(&sidecar) == (200, "ok".to_owned()));
        let mut client = sidecar.client();
        for number in 0..50 {
            assert_eq!(client.line(&format!("SET key:{number} x")), Value::Simple("OK".to_owned()), "the first commands succeed");
        }
        assert_eq!(get(&sidecar, "/readyz").0, 200);

        // Where all is there, nothing is waited for.
        let again = Sidecar::start_before(Some(&snapshot), &HELD);
        wait_for("applications to start", LIMIT, || asked(&again).0 == 200);
        for sidecar in [&sidecar, &again] {
            let log = sidecar.log();
            assert!(!log.contains(IN_VAIN) && !log.contains("hush"), "{log}");
        }
    }
}

/// Whether an entry of the servers' log of refusals is about the sidecar's login.
fn is_of_the_user(entry: &Value) -> bool {
    let fields: Vec<String> = entry.items().iter().filter(|field| matches!(field, Value::Bulk(_))).map(Value::text).collect();
    fields.windows(2).any(|pair| pair == ["reason", "auth"]) && fields.windows(2).any(|pair| pair == ["username", "shop"])
}

#[test]
fn a_cache_that_is_away_keeps_no_application_from_starting() {
    let nowhere = json!({"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["127.0.0.1:1"]}}});
    let of_a_while = ["--binding", "shop", "--start-hold", "300ms"];
    for (snapshot, missing) in [(None, "no policy has arrived yet"), (Some(bypass(nowhere)), "no server of the cluster")] {
        let sidecar = Sidecar::start_before(snapshot.as_ref(), &of_a_while);
        wait_for("applications to start", LIMIT, || asked(&sidecar).0 == 200);
        let log = sidecar.log();
        let told: Vec<&str> = log.lines().filter(|line| line.contains(IN_VAIN)).collect();
        assert!(told.len() == 1 && told[0].contains(missing), "{log}");
        assert_eq!(get(&sidecar, "/readyz").0, 503, "it is not ready for all that");
    }
}
