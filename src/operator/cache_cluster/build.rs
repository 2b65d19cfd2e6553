//! Configuration files of servers and sentinels. Pure: the text only.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::plan::Start;
use crate::api::cache_cluster::{Fsync, WritesSpec};
use crate::operator::admin::Login;
use crate::policy::config_file::{self, Lines, SentinelLogin};
use crate::policy::{ByteSize, Span};

/// How long a server may be silent before Sentinel or the Cluster bus takes it for dead.
pub const DOWN_AFTER: Duration = Duration::from_secs(2);
/// How long one failover attempt by Sentinel may take; the next begins after twice that.
pub const FAILOVER_TIMEOUT: Duration = Duration::from_secs(6);
/// For how long sidecars try a command where no policy says: until the first attempt at a failover has succeeded, or is given up. One that
/// succeeds takes some four seconds, and up to six: [`DOWN_AFTER`], half a second until a majority thinks so, a second each for its
/// agreement, for the delay that chance adds, and for the promotion to be seen, and half a second until sidecars know. A second attempt
/// begins twelve seconds after the first, which is longer than those wait who wait for an application.
pub const PATIENCE: Span = Span::from_millis((DOWN_AFTER.as_millis() + FAILOVER_TIMEOUT.as_millis()) as u64);
/// How long nothing may change before the planner acts where Sentinel or the bus should have: two failover attempts and more.
pub const TAKEOVER_AFTER: Duration = Duration::from_secs(20);

/// What one server's configuration depends on.
#[derive(Debug)]
pub struct ServerConfig<'a> {
    /// Where it listens, and what it announces.
    pub address: SocketAddr,
    /// The port of its Cluster bus; `None` outside a Cluster.
    pub bus_port: Option<u16>,
    /// Where its data is.
    pub directory: &'a Path,
    /// In which role it starts.
    pub start: Start,
    /// When a write is on the disk. `None`: never, data is lost with the process.
    pub fsync: Option<Fsync>,
    /// How much data it may hold.
    pub max_memory: ByteSize,
    /// The value of `maxmemory-policy`.
    pub eviction: &'a str,
    /// When a primary refuses writes.
    pub writes: Option<WritesSpec>,
    /// Lines of the user's own.
    pub parameters: &'a BTreeMap<String, String>,
    /// The user of Larder and of clients, where the servers ask for one.
    pub login: Option<&'a Login>,
    /// The user of relays beside it, where there is one.
    pub relay: Option<&'a Login>,
}

/// What the user of a relay can do at a server: look after journals, write what it waits for to be on disk, and see how servers write
/// to disk and who follows them.
pub const RELAY_RULES: &str = "resetchannels ~larder:j:* ~larder:w:* ~larder:events ~larder:cs:* ~larder:cr:* -@all +@read +@write \
                               +@connection +@transaction -@admin -@dangerous +eval +time +wait +role +info +config|get +cluster|info +cluster|slots +cluster|shards \
                               +cluster|nodes";

/// The users. A password stands in a file that its owner alone reads; never among arguments.
fn add_users(lines: &mut Lines, login: &Login, relay: Option<&Login>) {
    lines.add("user", &["default", "off"]);
    let mut add = |Login { user, password }: &Login, rules: &str| {
        let password = format!(">{password}");
        let words: Vec<&str> = [user, "on", &password].into_iter().chain(rules.split_ascii_whitespace()).collect();
        lines.add("user", &words);
    };
    add(login, "~* &* +@all");
    if let Some(relay) = relay {
        add(relay, RELAY_RULES);
    }
}

/// The whole configuration of a server.
pub fn server(config: &ServerConfig<'_>) -> String {
    let (host, port) = (config.address.ip().to_string(), config.address.port().to_string());
    let mut lines = Lines::default();
    lines.add("bind", &[&host]);
    lines.add("port", &[&port]);
    lines.add("dir", &[&config.directory.to_string_lossy()]);
    lines.add("daemonize", &["no"]);
    lines.add("save", &[""]);
    lines.add("appendonly", &[if config.fsync.is_some() { "yes" } else { "no" }]);
    if let Some(fsync) = config.fsync {
        lines.add("appendfsync", &[fsync.as_str()]);
    }
    lines.add("maxmemory", &[&config.max_memory.as_bytes().to_string()]);
    lines.add("maxmemory-policy", &[config.eviction]);
    lines.add("replica-announce-ip", &[&host]);
    lines.add("replica-announce-port", &[&port]);
    // A replica that returns is wanted at once, not after waiting for others that might.
    lines.add("repl-diskless-sync-delay", &["0"]);
    match config.start {
        Start::Primary => {}
        Start::ReplicaOf(primary) => {
            lines.add("replicaof", &[&primary.ip().to_string(), &primary.port().to_string()]);
            lines.add("replica-priority", &["0"]);
        }
        Start::ClusterNode => lines.add("cluster-replica-no-failover", &["yes"]),
    }
    if let Some(bus_port) = config.bus_port {
        add_cluster_lines(&mut lines, bus_port);
        lines.add("cluster-announce-ip", &[&host]);
    }
    if let Some(login) = config.login {
        add_users(&mut lines, login, config.relay);
        lines.add("masteruser", &[&login.user]);
        lines.add("masterauth", &[&login.password]);
    }
    if let Some(writes) = config.writes {
        lines.add("min-replicas-to-write", &[&writes.min_replicas.to_string()]);
        lines.add("min-replicas-max-lag", &[&writes.max_lag_secs().to_string()]);
    }
    add_parameters(&mut lines, config.parameters);
    lines.into_text()
}

/// Lines of the user's own.
pub(super) fn add_parameters(lines: &mut Lines, parameters: &BTreeMap<String, String>) {
    for (keyword, value) in parameters {
        // A value may be several words, as in `client-output-buffer-limit`.
        let words: Vec<&str> = value.split_ascii_whitespace().collect();
        lines.add(keyword, if words.is_empty() { &[""] } else { &words });
    }
}

/// What the servers of a Cluster have in common.
pub(super) fn add_cluster_lines(lines: &mut Lines, bus_port: u16) {
    lines.add("cluster-enabled", &["yes"]);
    lines.add("cluster-config-file", &["nodes.conf"]);
    lines.add("cluster-port", &[&bus_port.to_string()]);
    lines.add("cluster-node-timeout", &[&DOWN_AFTER.as_millis().to_string()]);
    // One shard's trouble is not the others'.
    lines.add("cluster-require-full-coverage", &["no"]);
    // A shard's servers stay its own.
    lines.add("cluster-allow-replica-migration", &["no"]);
    // Whether a replica may be promoted is decided by whether it ever synchronised, not by when it last heard of its primary.
    lines.add("cluster-replica-validity-factor", &["0"]);
}

/// The configuration of a sentinel. It keeps its memory in the same file: `previous` is what the file holds now, if anything.
pub fn sentinel(address: SocketAddr, directory: &Path, login: Option<&Login>, previous: &str) -> String {
    let mut lines = Lines::default();
    let host = address.ip().to_string();
    lines.add("bind", &[&host]);
    lines.add("port", &[&address.port().to_string()]);
    lines.add("dir", &[&directory.to_string_lossy()]);
    lines.add("daemonize", &["no"]);
    lines.add("sentinel", &["announce-ip", &host]);
    lines.add("sentinel", &["announce-port", &address.port().to_string()]);
    if let Some(login) = login {
        add_users(&mut lines, login, None);
    }
    let login = login.map(|Login { user, password }| SentinelLogin { user, password });
    config_file::sentinel(&lines.into_text(), login, previous)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    #[test]
    fn a_sentinel_logs_in_and_lets_log_in() {
        let address = SocketAddr::from(([127, 0, 0, 1], 7000));
        let login = Login { user: "larder".to_owned(), password: "new".to_owned() };
        let text = sentinel(address, Path::new("/run"), Some(&login), "sentinel monitor main 127.0.0.1 7001 2\n");
        for line in ["user larder on \">new\" ~* &* +@all", "sentinel sentinel-pass new", "sentinel auth-pass main new"] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }

    #[test]
    fn a_relay_can_do_what_its_documentation_says() {
        let text = include_str!("../../../docs/relay.md");
        let line =
            text.lines().find(|line| line.trim_start().starts_with("ACL SETUSER relay")).expect("it says what a login needs");
        let rules = line.trim_start().strip_prefix("ACL SETUSER relay on >PASSWORD ").expect("a user with a password");
        assert_eq!(rules, RELAY_RULES);
    }

    #[test]
    fn a_restarted_replica_may_not_be_promoted() {
        let primary = SocketAddr::from(([127, 0, 0, 1], 7001));
        let config = ServerConfig {
            address: SocketAddr::from(([127, 0, 0, 1], 7000)),
            bus_port: None,
            directory: Path::new("/run/server 0"),
            start: Start::ReplicaOf(primary),
            fsync: None,
            max_memory: ByteSize::from_bytes(1 << 20),
            eviction: "volatile-lfu",
            writes: None,
            parameters: &BTreeMap::from([("client-output-buffer-limit".to_owned(), "replica 1 2 3".to_owned())]),
            login: None,
            relay: None,
        };
        let text = server(&config);
        assert!(text.contains("replicaof 127.0.0.1 7001\nreplica-priority 0\n"), "{text}");
        assert!(text.contains("dir \"/run/server 0\"\n"), "{text}");
        assert!(text.contains("client-output-buffer-limit replica 1 2 3\n"), "{text}");
        assert!(text.contains("appendonly no\n") && !text.contains("appendfsync"), "{text}");
        let text = server(&ServerConfig { fsync: Some(Fsync::Always), ..config });
        assert!(text.contains("appendonly yes\nappendfsync always\n"), "{text}");
    }
}
