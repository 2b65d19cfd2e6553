//! Configuration files of servers and sentinels. Pure: the text only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::plan::Start;
use crate::operator::admin::Login;
use crate::policy::ByteSize;

/// How long a server may be silent before Sentinel or the Cluster bus takes it for dead.
pub const DOWN_AFTER: Duration = Duration::from_secs(2);
/// How long one failover attempt by Sentinel may take; the next begins after twice that.
pub const FAILOVER_TIMEOUT: Duration = Duration::from_secs(6);

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
    /// Whether data survives the process.
    pub durable: bool,
    /// How much data it may hold.
    pub max_memory: ByteSize,
    /// The value of `maxmemory-policy`.
    pub eviction: &'a str,
    /// Lines of the user's own.
    pub parameters: &'a BTreeMap<String, String>,
    /// The only user, where the servers ask for one.
    pub login: Option<&'a Login>,
}

/// A file that grows by lines of a keyword and quoted values.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, keyword: &str, values: &[&str]) {
        self.0.push_str(keyword);
        for value in values {
            self.0.push(' ');
            self.0.push_str(&quoted(value));
        }
        self.0.push('\n');
    }

    /// The only user. A password stands in a file that its owner alone reads; never among arguments.
    fn users(&mut self, login: &Login) {
        self.add("user", &["default", "off"]);
        self.add("user", &[&login.user, "on", &format!(">{}", login.password), "~*", "&*", "+@all"]);
    }
}

/// A value as the servers' configuration parser reads it back.
fn quoted(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/*&+@~%".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    let mut text = String::from("\"");
    for byte in value.bytes() {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(byte)]),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => {
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
    }
    text.push('"');
    text
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
    lines.add("appendonly", &[if config.durable { "yes" } else { "no" }]);
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
        cluster_lines(&mut lines, &host, bus_port);
    }
    if let Some(login) = config.login {
        lines.users(login);
        lines.add("masteruser", &[&login.user]);
        lines.add("masterauth", &[&login.password]);
    }
    for (keyword, value) in config.parameters {
        // A value may be several words, as in `client-output-buffer-limit`.
        lines.add(keyword, &value.split_ascii_whitespace().collect::<Vec<_>>());
    }
    lines.0
}

fn cluster_lines(lines: &mut Lines, host: &str, bus_port: u16) {
    lines.add("cluster-enabled", &["yes"]);
    lines.add("cluster-config-file", &["nodes.conf"]);
    lines.add("cluster-port", &[&bus_port.to_string()]);
    lines.add("cluster-announce-ip", &[host]);
    lines.add("cluster-node-timeout", &[&DOWN_AFTER.as_millis().to_string()]);
    // One shard's trouble is not the others'.
    lines.add("cluster-require-full-coverage", &["no"]);
    // A shard's servers stay its own.
    lines.add("cluster-allow-replica-migration", &["no"]);
    // Whether a replica may be promoted is decided by whether it ever synchronised, not by when it last heard of its primary.
    lines.add("cluster-replica-validity-factor", &["0"]);
}

/// The keywords of what a sentinel remembers. The rest of its file is Larder's, and written anew.
const MEMORY: [&str; 10] = [
    "myid",
    "current-epoch",
    "monitor",
    "down-after-milliseconds",
    "failover-timeout",
    "config-epoch",
    "leader-epoch",
    "known-replica",
    "known-sentinel",
    "known-slave",
];

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
        lines.users(login);
        lines.add("sentinel", &["sentinel-user", &login.user]);
        lines.add("sentinel", &["sentinel-pass", &login.password]);
    }
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let memory = previous.lines().map(words).filter(|words| {
        let [sentinel, keyword, ..] = &words[..] else { return false };
        sentinel == "sentinel" && MEMORY.contains(&keyword.as_str())
    });
    for words in memory {
        lines.0.push_str(&words.join(" "));
        lines.0.push('\n');
        if let ([_, keyword, master, ..], Some(login)) = (&words[..], login)
            && keyword == "monitor"
        {
            lines.add("sentinel", &["auth-user", master, &login.user]);
            lines.add("sentinel", &["auth-pass", master, &login.password]);
        }
    }
    lines.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_quoted(value: &str, expected: &str) {
        assert_eq!(quoted(value), expected);
    }

    #[test]
    fn values_are_quoted_where_they_must_be() {
        check_quoted("yes", "yes");
        check_quoted("", "\"\"");
        check_quoted("two words", "\"two words\"");
        check_quoted("a\"b\\c", r#""a\"b\\c""#);
        check_quoted("line\nuser x on", r#""line\x0auser x on""#);
        check_quoted("é", r#""\xc3\xa9""#);
        check_quoted("#", "\"#\"");
    }

    #[test]
    fn a_sentinel_keeps_its_memory_and_takes_a_new_password() {
        let address = SocketAddr::from(([127, 0, 0, 1], 7000));
        let previous = "port 1\nsentinel myid abc\nsentinel monitor main 127.0.0.1 7001 2\nsentinel auth-pass main old\n\
                        user larder on >old ~*\nsentinel known-replica main 127.0.0.1 7002\n";
        let login = Login { user: "larder".to_owned(), password: "new".to_owned() };
        let text = sentinel(address, Path::new("/run"), Some(&login), previous);
        for kept in ["sentinel myid abc", "sentinel monitor main 127.0.0.1 7001 2", "sentinel known-replica main 127.0.0.1 7002"]
        {
            assert!(text.lines().any(|line| line == kept), "{kept}: {text}");
        }
        assert!(text.contains("sentinel auth-pass main new") && !text.contains("old") && !text.contains("port 1\n"), "{text}");
    }

    #[test]
    fn a_restarted_replica_may_not_be_promoted() {
        let primary = SocketAddr::from(([127, 0, 0, 1], 7001));
        let config = ServerConfig {
            address: SocketAddr::from(([127, 0, 0, 1], 7000)),
            bus_port: None,
            directory: Path::new("/run/server 0"),
            start: Start::ReplicaOf(primary),
            durable: false,
            max_memory: ByteSize::from_bytes(1 << 20),
            eviction: "volatile-lfu",
            parameters: &BTreeMap::from([("client-output-buffer-limit".to_owned(), "replica 1 2 3".to_owned())]),
            login: None,
        };
        let text = server(&config);
        assert!(text.contains("replicaof 127.0.0.1 7001\nreplica-priority 0\n"), "{text}");
        assert!(text.contains("dir \"/run/server 0\"\n"), "{text}");
        assert!(text.contains("client-output-buffer-limit replica 1 2 3\n"), "{text}");
    }
}
