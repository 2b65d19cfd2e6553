//! What a server tells of itself in `INFO`.

use std::collections::BTreeMap;

/// The fields of `INFO`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Info(BTreeMap<String, String>);

/// A server's role, as it tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Primary,
    /// It follows another.
    Replica {
        /// The host it follows, as it was told.
        host: String,
        /// Its port.
        port: u16,
        /// Whether it follows in step.
        link_up: bool,
        /// Whether it is receiving a whole copy.
        syncing: bool,
    },
}

/// A replica, as its primary tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its host.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Whether it has its copy and follows.
    pub online: bool,
}

impl Info {
    /// Reads the text.
    pub fn parse(text: &str) -> Self {
        let fields = text.lines().filter_map(|line| line.trim_end().split_once(':'));
        Self(fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// A field as it stands.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A field that is a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.text(name)?.parse().ok()
    }

    fn count(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    fn is_set(&self, name: &str) -> bool {
        self.text(name) == Some("1")
    }

    /// Whether it reads its data and serves nothing yet.
    pub fn is_loading(&self) -> bool {
        self.is_set("loading") || self.is_set("async_loading")
    }

    /// Its role. `None` where the text is no server's.
    pub fn role(&self) -> Option<Role> {
        if self.text("role")? == "master" {
            return Some(Role::Primary);
        }
        Some(Role::Replica {
            host: self.text("master_host")?.to_owned(),
            port: self.text("master_port")?.parse().ok()?,
            link_up: self.text("master_link_status") == Some("up"),
            syncing: self.is_set("master_sync_in_progress"),
        })
    }

    /// The replication id.
    pub fn lineage(&self) -> Option<&str> {
        self.text("master_replid")
    }

    /// How far its data reaches, in bytes of replication.
    pub fn offset(&self) -> u64 {
        let of_replica = self.text("role").filter(|role| *role != "master").and_then(|_| self.count("slave_repl_offset"));
        of_replica.or_else(|| self.count("master_repl_offset")).unwrap_or(0)
    }

    /// Whether any database holds a key.
    pub fn holds_keys(&self) -> bool {
        self.databases().any(|(_, fields)| !fields.starts_with("keys=0,"))
    }

    /// The databases that hold something: number and fields, such as `keys=3,expires=1,avg_ttl=0`.
    pub fn databases(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(name, fields)| {
            let number = name.strip_prefix("db")?;
            let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then_some((name.as_str(), fields.as_str()))
        })
    }

    /// Whether what it holds in memory was written to the append-only file: nothing waits in its buffer, where changes stay for up to
    /// two seconds while the disk is slow, and no rewrite is under way that alone will hold it.
    pub fn is_on_disk(&self) -> bool {
        self.is_set("aof_enabled")
            && self.text("aof_buffer_length") == Some("0")
            && !self.is_set("aof_rewrite_in_progress")
            && !self.is_set("aof_rewrite_scheduled")
            && self.text("aof_last_write_status") != Some("err")
    }

    /// The replicas of a primary.
    pub fn attached(&self) -> Vec<Attached> {
        let lines = (0..).map_while(|index| self.text(&format!("slave{index}")));
        lines.filter_map(parse_attached).collect()
    }

    /// Whether it is Valkey, and its version: major and minor.
    pub fn version(&self) -> (bool, u32, u32) {
        let valkey = self.text("valkey_version");
        let mut numbers =
            valkey.or_else(|| self.text("redis_version")).unwrap_or_default().split('.').map(|n| n.parse().unwrap_or(0));
        (valkey.is_some(), numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }
}

/// Reads `ip=10.0.0.7,port=6379,state=online,offset=42,lag=0`.
fn parse_attached(line: &str) -> Option<Attached> {
    let field = |name: &str| line.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    Some(Attached { host: field("ip")?.to_owned(), port: field("port")?.parse().ok()?, online: field("state") == Some("online") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_with_its_replicas_is_read() {
        let info = Info::parse(
            "# Server\r\nredis_version:7.0.15\r\nrole:master\r\nmaster_replid:abc\r\nmaster_repl_offset:42\r\n\
             slave0:ip=127.0.0.1,port=7001,state=online,offset=42,lag=0\r\n\
             slave1:ip=fd00::7,port=7002,state=wait_bgsave,offset=0,lag=0\r\ndb0:keys=3,expires=1,avg_ttl=0\r\n",
        );
        assert_eq!(info.role(), Some(Role::Primary));
        assert_eq!((info.lineage(), info.offset(), info.holds_keys()), (Some("abc"), 42, true));
        let attached: Vec<(u16, bool)> = info.attached().iter().map(|replica| (replica.port, replica.online)).collect();
        assert_eq!(attached, [(7001, true), (7002, false)]);
        assert_eq!(info.version(), (false, 7, 0));
        assert_eq!(Info::parse("redis_version:7.2.4\r\nvalkey_version:9.1.2\r\n").version(), (true, 9, 1));
    }

    #[test]
    fn a_replica_is_read() {
        let info = Info::parse(
            "role:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\nmaster_link_status:down\r\nmaster_sync_in_progress:1\r\n\
             slave_repl_offset:7\r\nmaster_repl_offset:9\r\ndb0_distrib_strings_sizes:1=1\r\ndb0:keys=0,expires=0,avg_ttl=0\r\n",
        );
        let role = Role::Replica { host: "10.0.0.1".into(), port: 6379, link_up: false, syncing: true };
        assert_eq!((info.role(), info.offset(), info.holds_keys()), (Some(role), 7, false));
    }

    #[test]
    fn data_is_on_disk_when_no_rewrite_alone_will_hold_it() {
        let on_disk =
            "aof_enabled:1\naof_buffer_length:0\naof_rewrite_in_progress:0\naof_rewrite_scheduled:0\naof_last_write_status:ok\n";
        assert!(Info::parse(on_disk).is_on_disk());
        for (from, to) in
            [("enabled:1", "enabled:0"), ("progress:0", "progress:1"), ("scheduled:0", "scheduled:1"), ("ok", "err")]
        {
            assert!(!Info::parse(&on_disk.replace(from, to)).is_on_disk(), "{to}");
        }
    }
}
