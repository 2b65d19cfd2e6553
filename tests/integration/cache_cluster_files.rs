//! The files that the operator writes for servers and sentinels, read by real ones.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use larder::agent::users;
use larder::api::CacheCluster;
use larder::operator::admin::Login;
use larder::operator::cache_cluster::objects::{Addresses, Credentials, Installation, Kept, Objects, objects};
use larder::operator::cache_cluster::plan::{SentinelId, ServerId};
use larder::operator::cache_cluster::users::{Access, SYSTEM_USER, Users};
use larder::operator::cache_cluster::validate::validate;
use larder::policy::agent::AgentConfig;
use tempfile::TempDir;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, free_port};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

/// A CacheCluster `shop` of one server and one sentinel that matter.
fn build() -> Objects {
    let spec = serde_json::json!({
        "engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "64Mi", "storage": {"size": "1Gi"},
        "auth": {"user": "shop", "password": {"value": "client"}}, "writes": {"minReplicas": 1, "maxLag": "3s"},
        "parameters": {"hz": "17", "notify-keyspace-events": "", "client-output-buffer-limit": "pubsub 32mb 8mb 60"},
    });
    let mut cluster = CacheCluster::new("shop", serde_json::from_value(spec).expect("a specification"));
    cluster.metadata.uid = Some("8d2c".to_owned());
    let wanted = validate(&cluster).expect("it is valid");
    let installation = Installation {
        larder_image: "larder:1".to_owned(),
        image_pull_policy: None,
        operator_namespace: "larder-system".to_owned(),
    };
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let addresses = Addresses {
        servers: BTreeMap::from([0, 1].map(|index| (ServerId { shard: 0, index }, loopback))),
        sentinels: BTreeMap::from([(SentinelId(0), loopback)]),
    };
    let system = Login { user: SYSTEM_USER.to_owned(), password: "system \"secret\"".to_owned() };
    let users = Users::next(None, &Access::user("shop", "client"), &system.password, None, SystemTime::UNIX_EPOCH);
    objects(&wanted, &installation, &addresses, &Credentials { system, users, client: None, pki: None }, &Kept::default())
}

/// The files of a pod below a directory, at their places, with another port.
struct Mounted {
    directory: TempDir,
    port: u16,
}

impl Mounted {
    fn new(objects: &Objects, config_map: usize, port: u16, usual_port: u16) -> Self {
        let mounted = Self { directory: TempDir::new().expect("a temporary directory"), port };
        let text = |secret: &Secret, key: &str| {
            let bytes = secret.data.as_ref().expect("it has data")[key].0.clone();
            String::from_utf8(bytes).expect("a text")
        };
        fs::create_dir_all(mounted.path("/data")).expect("writable");
        for (name, content) in objects.config_maps[config_map].data.as_ref().expect("it has data") {
            let content = content.replace("/etc/larder", &mounted.path("/etc/larder").to_string_lossy());
            let content = content.replace("/data", &mounted.path("/data").to_string_lossy());
            mounted.write(&format!("/etc/larder/config/{name}"), &content.replace(&usual_port.to_string(), &port.to_string()));
        }
        for (mount, secret) in ["system", "users"].into_iter().zip(&objects.secrets) {
            for key in secret.data.as_ref().expect("it has data").keys() {
                mounted.write(&format!("/etc/larder/{mount}/{key}"), &text(secret, key));
            }
        }
        mounted
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("it has one")).expect("writable");
        fs::write(path, text).expect("writable");
    }

    fn run(&self, program: &Path, arguments: &[String]) -> Running {
        let log = fs::File::create(self.path("/log")).expect("writable");
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(log).stderr(Stdio::inherit()).spawn();
        let mut running = Running(child.expect("it runs"));
        wait_for("an answer", LIMIT, || {
            let ended = running.0.try_wait().expect("it can be waited for");
            assert!(ended.is_none(), "{ended:?}\n{}", fs::read_to_string(self.path("/log")).unwrap_or_default());
            self.login("larder-system", "system \"secret\"").is_some()
        });
        running
    }

    fn login(&self, user: &str, password: &str) -> Option<Client> {
        let mut client = Client::connect(self.port).ok()?;
        let answer = client.try_call(&["AUTH", user, password]).ok()?;
        (answer == Value::Simple("OK".to_owned())).then_some(client)
    }
}

fn is_error(answer: &Value, word: &str) -> bool {
    answer.is_error() && format!("{answer:?}").contains(word)
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_reads_its_files_and_lets_everybody_do_what_is_theirs() {
    for engine in Engine::ALL {
        let pod = Mounted::new(&build(), 0, free_port(), 6379);
        let config = pod.path("/etc/larder/config/server-0.conf").to_string_lossy().into_owned();
        let _server = pod.run(&engine.binary(), &[config]);
        let mut system = pod.login("larder-system", "system \"secret\"").expect("Larder's own login");
        let mut setting = |name: &str| system.call(&["CONFIG", "GET", name]).items()[1].text();
        for (name, value) in [
            ("maxmemory", "27962026"),
            ("maxmemory-policy", "volatile-lfu"),
            ("appendonly", "yes"),
            ("aof-use-rdb-preamble", "yes"),
            ("appendfsync", "everysec"),
            ("min-replicas-to-write", "1"),
            ("min-replicas-max-lag", "2"),
            ("hz", "17"),
            ("notify-keyspace-events", ""),
            ("replica-announce-ip", "127.0.0.1"),
            // Half of what its memory leaves beside data, and the user's own words.
            ("client-output-buffer-limit", "normal 0 0 0 slave 6990507 3495253 60 pubsub 33554432 8388608 60"),
            ("masteruser", "larder-system"),
            ("masterauth", "system \"secret\""),
        ] {
            assert_eq!(setting(name), value, "{engine:?} {name}");
        }
        let files = fs::read_dir(pod.path("/data/appendonlydir")).expect("the append-only file");
        let names: Vec<_> = files.map(|file| file.expect("readable").file_name().to_string_lossy().into_owned()).collect();
        assert!(names.iter().any(|name| name.ends_with(".base.rdb")), "{engine:?} begins without a snapshot: {names:?}");
        assert_eq!(system.line("CONFIG SET min-replicas-to-write 0"), Value::Simple("OK".to_owned()));
        // As the agent does while it runs.
        let config = fs::read(pod.path("/etc/larder/config/agent-0.json")).expect("readable");
        let config = AgentConfig::parse(&config).expect("a configuration");
        let set = ["CONFIG", "SET", "client-output-buffer-limit", &config.settings["client-output-buffer-limit"]];
        assert_eq!(system.call(&set), Value::Simple("OK".to_owned()), "{engine:?}");
        assert!(pod.login("shop", "wrong").is_none());
        assert!(is_error(&Client::connect(pod.port).expect("it accepts").line("GET key"), "NOAUTH"));
        let mut client = pod.login("shop", "client").expect("the client's login");
        for allowed in ["SET key value EX 60", "INFO memory", "ACL WHOAMI", "CLIENT LIST", "SUBSCRIBE news"] {
            assert!(!client.line(allowed).is_error(), "{engine:?} {allowed}");
        }
        let mut client = pod.login("shop", "client").expect("the client's login");
        for refused in [
            "CONFIG SET appendonly no",
            "CONFIG GET masterauth",
            "ACL SETUSER larder-system off",
            "SHUTDOWN NOSAVE",
            "REPLICAOF NO ONE",
            "FAILOVER",
        ] {
            assert!(is_error(&client.line(refused), "NOPERM"), "{engine:?} {refused}");
        }
        let file = fs::read_to_string(pod.path("/etc/larder/users/users.acl")).expect("readable");
        assert_eq!(users::parse(&file, SYSTEM_USER).map(|read| (read.number, read.users.len())), Ok((1, 3)));
        // As the agent does: the same rules, one command a user.
        for line in file.lines().filter_map(|line| line.strip_prefix("user ")) {
            let (name, rules) = line.split_once(' ').expect("it has rules");
            assert_eq!(system.line(&format!("ACL SETUSER {name} reset {rules}")), Value::Simple("OK".to_owned()), "{line}");
        }
    }
}

#[test]
fn a_sentinel_started_by_larderd_keeps_its_memory_through_kills_and_knows_its_users() {
    for engine in Engine::ALL {
        let pod = Mounted::new(&build(), 1, free_port(), 26379);
        let larderd = pod.path("/larder/larderd");
        fs::create_dir_all(pod.path("/larder")).expect("writable");
        let installed = Command::new(env!("CARGO_BIN_EXE_larderd")).args(["agent", "install"]).arg(&larderd).status();
        assert!(installed.expect("it runs").success());
        let at = |path: &str| pod.path(path).to_string_lossy().into_owned();
        let mut arguments: Vec<String> = ["agent", "sentinel", "--template"].map(str::to_owned).into();
        arguments.extend([at("/etc/larder/config/sentinel-0.conf"), "--users".to_owned()]);
        arguments.extend([at("/etc/larder/users/sentinel-users.conf"), "--username-file".to_owned()]);
        arguments.extend([at("/etc/larder/system/username"), "--password-file".to_owned()]);
        arguments.extend([at("/etc/larder/system/password"), "--file".to_owned(), at("/data/sentinel.conf"), "--".to_owned()]);
        arguments.push(engine.binary().to_string_lossy().into_owned());

        let sentinel = pod.run(&larderd, &arguments);
        let mut system = pod.login("larder-system", "system \"secret\"").expect("Larder's own login");
        let id = system.line("SENTINEL MYID").text();
        assert_eq!(system.line("SENTINEL MONITOR shop 127.0.0.1 1 2"), Value::Simple("OK".to_owned()));
        assert_eq!(system.line("SENTINEL SET shop down-after-milliseconds 2000"), Value::Simple("OK".to_owned()));
        drop((system, sentinel));

        let _sentinel = pod.run(&larderd, &arguments);
        let mut client = pod.login("shop", "client").expect("the client's login");
        assert_eq!(client.line("SENTINEL MYID").text(), id);
        assert_eq!(id.len(), 40);
        let named = client.line("SENTINEL GET-MASTER-ADDR-BY-NAME shop").items();
        assert_eq!(named.iter().map(Value::text).collect::<Vec<_>>(), ["127.0.0.1", "1"]);
        let master = client.line("SENTINEL MASTER shop").items();
        let after = master.iter().position(|item| item.text() == "down-after-milliseconds").expect("it is told");
        assert_eq!(master[after + 1].text(), "2000");
        for allowed in
            ["PING", "SENTINEL REPLICAS shop", "SENTINEL SENTINELS shop", "CLIENT SETNAME app", "PSUBSCRIBE +switch-master"]
        {
            assert!(!client.line(allowed).is_error(), "{engine:?} {allowed}");
        }
        let mut client = pod.login("shop", "client").expect("the client's login");
        for refused in ["SENTINEL FAILOVER shop", "SENTINEL REMOVE shop", "SENTINEL SET shop quorum 1", "SHUTDOWN", "ACL LIST"] {
            assert!(is_error(&client.line(refused), "NOPERM"), "{engine:?} {refused}");
        }
        let file = fs::read_to_string(pod.path("/data/sentinel.conf")).expect("readable");
        assert!(file.contains("sentinel auth-user shop larder-system"), "{file}");
    }
}
