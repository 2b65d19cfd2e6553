//! What SYNC promises: behind its reply no sidecar shows what was there before, be it one that hears of nothing any more.

use larder::sidecar::slots::slot_of;
use tempfile::TempDir;

use crate::cache_aside::{bulk, ok};
use crate::read_through::{Servers, policy};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis, RedisCluster};
use crate::support::sidecar::Sidecar;
use crate::support::trap::Trap;
use crate::support::wait_for;
use crate::versions::{LIMIT, VERSION_KEY, larder, rules, wait_until_shared};

/// What others believe of versions they believe for a second: with SYNC the reply comes when that is over.
#[test]
fn after_sync_nobody_shows_what_was_there_before() {
    let servers = Servers::sentinel();
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("admin.sock").display().to_string();
    let asked = Sidecar::start_with(&policy(servers.topology(), 1, &[], &rules()), &["--admin-socket", &socket]);
    let sidecars = [asked, servers.sidecar(&[], &rules()), servers.sidecar(&[], &rules())];
    wait_until_shared(&sidecars);
    let mut clients: Vec<Client> = sidecars.iter().map(Sidecar::client).collect();
    let mut server = servers.holder_of(VERSION_KEY);
    let version_key = server.line("KEYS larder:v:*").items()[0].text();
    for round in 0..6 {
        let key = format!("page:{round}");
        assert_eq!(clients[0].call(&["SET", &key, "old"]), ok());
        // Sidecars hear of the next version one by one.
        assert_eq!(server.call(&["SET", &version_key, &format!("{round:016x}")]), ok());
        if round % 2 == 0 {
            assert!(!clients[round % 3].call(&["LARDER.INVALIDATE", &key, "sync"]).is_error());
        } else {
            let told = larder(&["invalidate", &key, "--sync", "--deadline", "20s", "--socket", &socket]);
            assert!(told.contains("invalidated"), "{told}");
        }
        assert!(clients.iter_mut().all(|client| client.call(&["EXISTS", &key]) == Value::Int(0)), "{key}");
    }
    // A key may have the word's name where another stands behind it; alone it is a key.
    assert_eq!(clients[0].line("SET sync v"), ok());
    assert_eq!(clients[0].line("LARDER.INVALIDATE plain:1 SYNC"), Value::Int(0));
    assert_eq!(clients[0].line("LARDER.INVALIDATE sync"), Value::Int(1));
    assert_eq!(
        larder(&["invalidate", "--rule", "page", "--sync", "--socket", &socket]),
        "the keys of the rule `page`: invalidated\n"
    );
}

/// Two sidecars before a Cluster. Each key is in another shard than its version.
struct CutOff {
    servers: Servers,
    sidecars: [Sidecar; 2],
    trap: Trap,
    version: String,
    keys: Vec<String>,
}

impl CutOff {
    fn new() -> Self {
        let trap = Trap::default();
        let servers = Servers::Cluster(RedisCluster::start_trapped(Engine::Valkey9, 3, 0, &[], &trap));
        let sidecars = [(); 2].map(|()| servers.sidecar(&[], &rules()));
        wait_until_shared(&sidecars);
        let Servers::Cluster(cluster) = &servers else { unreachable!("just made") };
        let names = |server: &Redis| server.client().line("KEYS larder:v:*").items();
        let version = cluster.servers.iter().flat_map(names).next().expect("a version").text();
        let owner = |key: &str| cluster.owner(slot_of(key.as_bytes())).port();
        let elsewhere = |key: &String| {
            // The cache has it under a name of the same slot.
            owner(key) != owner(&version)
        };
        let keys = (0..100).map(|at| format!("page:{{{at}}}")).filter(elsewhere).collect();
        Self { servers, sidecars, trap, version, keys }
    }

    /// The second sidecar is cut off from the server that has the version, then another version counts, and the first invalidates a key with this
    /// word behind it: what the second shows of it then.
    fn round(&self, key: &str, word: &str, drawn: u64) -> Value {
        let [mut one, mut other] = [0, 1].map(|at| self.sidecars[at].client());
        wait_until_shared(&self.sidecars);
        assert_eq!(one.call(&["SET", key, "old"]), ok());
        assert_eq!(other.call(&["GET", key]), bulk("old"));
        let mut server = self.servers.holder_of(&self.version);
        let Servers::Cluster(cluster) = &self.servers else { unreachable!("it is a Cluster") };
        self.trap.cut(self.sidecars[1].pid(), cluster.owner(slot_of(self.version.as_bytes())).port());
        assert_eq!(server.call(&["SET", &self.version, &format!("{drawn:016x}")]), ok());
        wait_for("the first hears of the next version", LIMIT, || one.call(&["EXISTS", key]) == Value::Int(0));
        assert!(!one.call(&["LARDER.INVALIDATE", key, word]).is_error());
        let shown = other.call(&["GET", key]);
        self.trap.mend();
        shown
    }
}

#[test]
fn after_sync_who_is_cut_off_from_versions_does_not_show_what_was_there_before() {
    let scene = CutOff::new();
    for (drawn, key) in (1..).zip(&scene.keys[..4]) {
        assert_eq!(scene.round(key, "SYNC", drawn), Value::Nil, "{key}");
    }
}

/// The word that asks for it is lost on its way: it is a key's name then.
#[test]
fn without_that_wait_who_is_cut_off_would_show_it() {
    let scene = CutOff::new();
    // The second may have ceased to believe what it was told by chance.
    let shows = |(drawn, key): (u64, &String)| scene.round(key, "XYNC", drawn) == bulk("old");
    assert!((1..).zip(&scene.keys[..10]).any(shows), "it is not noticed");
}
