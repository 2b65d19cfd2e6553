//! Settings, users and certificates of a running server: changed live, and proved.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use larder::policy::binding::BindingName;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tempfile::TempDir;

use super::tier::Tier;
use crate::support::certificates::{swap_to, tls_arguments, write_certificates};
use crate::support::resp::Value;
use crate::support::server::{Engine, free_port};

/// The SHA-256 of `one` and of `two`.
const ONE: &str = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
const TWO: &str = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3";

fn write_whole(path: &Path, text: &str) {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).expect("writable");
    fs::rename(fresh, path).expect("writable");
}

#[test]
fn settings_and_users_change_live_and_are_read_back() {
    for engine in Engine::ALL {
        let directory = TempDir::new().expect("a temporary directory");
        let users = directory.path().join("users.acl");
        let text = |number: u32, shop: &str| {
            format!(
                "# generation {number}\nuser default on nopass ~* &* +@all\nuser repl1 on #{ONE} ~* &* +psync +replconf +ping\nuser {shop}\n"
            )
        };
        fs::write(&users, text(1, &format!("shop1 on #{ONE} ~s:* +@all"))).expect("writable");
        let (name, password) = (directory.path().join("name"), directory.path().join("password"));
        write_whole(&name, "repl1\n");
        write_whole(&password, "one\n");
        let replication = json!({"usernameFile": name, "passwordFile": password});
        let extra = json!({"settings": {"maxmemory": "100mb"}, "users": {"file": users}, "server": {"replication": replication}});
        let mut tier = Tier::start_with(engine, 2, false, extra, &[]);
        tier.introduce();
        let generation = tier.generation();
        let proved = |generation: u64, users: u64| {
            tier.wait("the configuration to be proved", || {
                tier.members.iter().all(|member| {
                    let proved = member.state()["proved"].clone();
                    proved["settings"] == json!(generation) && proved["users"] == json!(users)
                })
            });
        };
        proved(generation, 1);
        let mut client = tier.members[0].client();
        assert_eq!(client.line("CONFIG GET maxmemory").items()[1].text(), "104857600");
        assert_eq!(client.line("AUTH shop1 one"), Value::Simple("OK".to_owned()));
        // The replica follows with the login of its own.
        tier.wait("the login to be proved", || tier.members[1].state()["proved"]["replication"] == json!("repl1"));
        assert_eq!(client.line("CLIENT KILL TYPE replica"), Value::Int(1));
        tier.wait("the replica to log in anew", || {
            tier.members[0].client().line("CLIENT LIST TYPE replica").text().contains("user=repl1")
        });
        // A connection of the older generation lives until its user goes.
        write_whole(&users, &text(2, &format!("shop1 on #{ONE} ~s:* +@all\nuser shop2 on #{TWO} ~s:* +@all")));
        tier.configure(json!({"settings": {"maxmemory": "200mb"}, "users": {"file": users}}));
        let generation = tier.generation();
        tier.wait("the new generation", || {
            tier.members.iter().all(|member| {
                let proved = member.state()["proved"].clone();
                proved["settings"] == json!(generation) && proved["users"] == json!(2)
            })
        });
        assert_eq!(client.line("SET s:1 x"), Value::Simple("OK".to_owned()), "an older connection is not disturbed");
        for member in &tier.members {
            assert_eq!(member.client().line("AUTH shop2 two"), Value::Simple("OK".to_owned()));
        }
        // What the server refuses is told, and hampers nothing else.
        tier.configure(json!({"settings": {"maxmemory": "300mb", "maxclients": "many"}}));
        tier.wait("the refusal to be told", || {
            let problems = tier.members[0].state()["proved"]["problems"].clone();
            problems.as_array().is_some_and(|problems| {
                problems.iter().any(|text| text.as_str().is_some_and(|text| text.starts_with("maxclients")))
            })
        });
        assert_eq!(tier.members[0].client().line("CONFIG GET maxmemory").items()[1].text(), "314572800");
    }
}

/// Somebody tells a server of workloads' users before its file comes: until the file is as new the agent leaves them alone, and says so.
#[test]
fn users_that_a_server_is_told_of_stay_until_the_file_is_as_new() {
    for engine in Engine::ALL {
        let directory = TempDir::new().expect("a temporary directory");
        let users = directory.path().join("users.acl");
        let (web, new) = (BindingName::of("Deployment", "web", "main").user(), BindingName::of("Job", "new", "main").user());
        let text = |number: u32, keys: &str, more: &str| {
            format!("# generation {number}\nuser default on nopass ~* &* +@all\nuser {web} on #{ONE} {keys} +@all\n{more}")
        };
        fs::write(&users, text(1, "~a:*", "")).expect("writable");
        let tier = Tier::start_with(engine, 2, false, json!({"users": {"file": users}}), &[]);
        tier.introduce();
        let wait_for = |users: u32, told: u32| {
            tier.wait("a report about users", || {
                tier.members.iter().all(|member| {
                    let proved = member.state()["proved"].clone();
                    proved["users"] == json!(users) && proved["usersTold"] == json!(told)
                })
            });
        };
        wait_for(1, 0);
        let ok = Value::Simple("OK".to_owned());
        for member in &tier.members {
            let mut client = member.client();
            assert_eq!(client.line("ACL SETUSER larder-told reset off ~users:3"), ok);
            assert_eq!(client.line(&format!("ACL SETUSER {web} reset on #{ONE} ~a:* ~b:* +@all")), ok);
            assert_eq!(client.line(&format!("ACL SETUSER {new} reset on #{TWO} ~c:* +@all")), ok);
        }
        wait_for(1, 3);
        let keys = |member: usize, user: &str| {
            let shown = tier.members[member].client().line(&format!("ACL GETUSER {user}"));
            match shown {
                Value::Nil => None,
                shown => Some(shown.items()[7].text()),
            }
        };
        // Files that are older come and are held, but for those users.
        write_whole(&users, &text(2, "~z:*", "user other on nopass ~o:* +@all\n"));
        wait_for(2, 3);
        for member in 0..2 {
            assert_eq!((keys(member, &web).as_deref(), keys(member, &new).as_deref()), (Some("~a:* ~b:*"), Some("~c:*")));
            assert_eq!(keys(member, "other").as_deref(), Some("~o:*"));
        }
        // What the server's process was told goes with it: the file counts, and the agent says that nobody tells anything.
        tier.members[1].kill_server();
        tier.wait("the server to know no more than its file", || {
            let proved = tier.members[1].state()["proved"].clone();
            proved["users"] == json!(2) && proved["usersTold"] == json!(0) && !tier.members[1].is_closed()
        });
        tier.wait("the file's users", || keys(1, &web).as_deref() == Some("~z:*") && keys(1, &new).is_none());
        // The file is as new, and all is as it says; the mark is gone, too.
        write_whole(&users, &text(3, "~a:* ~b:*", ""));
        wait_for(3, 0);
        for member in 0..2 {
            assert_eq!((keys(member, &web).as_deref(), keys(member, &new)), (Some("~a:* ~b:*"), None));
            assert_eq!((keys(member, "other"), keys(member, "larder-told")), (None, None));
        }
    }
}

#[test]
fn a_new_certificate_is_served_and_proved_by_a_handshake() {
    let files = TempDir::new().expect("a temporary directory");
    for version in ["1", "2"] {
        let directory = files.path().join(version);
        fs::create_dir(&directory).expect("writable");
        write_certificates(&directory);
    }
    // Both authorities are trusted meanwhile, as in a rotation.
    let both =
        ["1", "2"].map(|version| fs::read_to_string(files.path().join(version).join("ca.pem")).expect("readable")).concat();
    for version in ["1", "2"] {
        fs::write(files.path().join(version).join("ca.pem"), &both).expect("writable");
    }
    std::os::unix::fs::symlink("1", files.path().join("..data")).expect("writable");
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        std::os::unix::fs::symlink(format!("..data/{name}"), files.path().join(name)).expect("writable");
    }
    let at = |name: &str| files.path().join(name);
    let tls_port = free_port();
    let mut arguments = tls_arguments(files.path());
    arguments.extend(["--tls-port", &tls_port.to_string(), "--tls-auth-clients", "no"].map(str::to_owned));
    let extra = json!({"server": {
        "tls": {"caFile": at("ca.pem")},
        "serves": {"certFile": at("cert.pem"), "keyFile": at("key.pem"), "caFile": at("ca.pem")},
    }});
    // The sentinels of this test speak no TLS, so that one server alone is asked about: without a majority and with its peer's word.
    let mut tier = Tier::start_with(Engine::Redis7, 2, false, extra, &arguments);
    for ordinal in 0..2 {
        tier.members[ordinal].kill_agent();
    }
    tier.configure(json!({"server": {"dial": format!("127.0.0.1:{tls_port}")}}));
    tier.members[0].start_agent();
    tier.members[1].start_agent();
    let fingerprint = || tier.members[0].state()["proved"]["certificate"].clone();
    tier.wait("the first certificate to be proved", || fingerprint().is_string());
    let before = fingerprint();
    assert!(tier.members[0].get("/metrics").1.contains("redis_up 1"));
    let [first, second] = ["1", "2"].map(|version| fs::read(files.path().join(version).join("cert.pem")).expect("readable"));
    assert_eq!(presented(tls_port, &both), leaf(&first));
    swap_to(&files, "2");
    tier.wait("the new certificate to be served", || presented(tls_port, &both) == leaf(&second));
    tier.wait("the new certificate to be proved", || fingerprint().is_string() && fingerprint() != before);
    assert_eq!(tier.members[0].state()["proved"]["problems"], json!([]));
}

fn leaf(pem: &[u8]) -> Vec<u8> {
    CertificateDer::pem_slice_iter(pem).next().expect("a certificate").expect("PEM").to_vec()
}

/// The certificate that a handshake shows, as a client sees it.
fn presented(port: u16, authorities: &str) -> Vec<u8> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
        roots.add(authority.expect("PEM")).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let name = "127.0.0.1".try_into().expect("a name");
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).expect("a connection");
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the server accepts");
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).expect("a handshake");
    }
    connection.peer_certificates().expect("certificates")[0].to_vec()
}
