//! Which lines of a server's configuration are the user's, and which are Larder's own.

use std::borrow::Cow;
use std::fmt::Write as _;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::text::MAX_PARAMETERS;

/// A group of configuration keys that Larder sets, and what to do instead of setting them.
struct Owned {
    /// Whole keys, or beginnings of keys that end in `-`.
    keys: &'static [&'static str],
    instead: &'static str,
}

const OWNED: &[Owned] = &[
    Owned { keys: &["maxmemory"], instead: "write spec.memory, from which Larder derives it" },
    Owned { keys: &["maxmemory-policy"], instead: "write spec.eviction" },
    Owned { keys: &["requirepass", "masterauth", "masteruser", "user", "aclfile", "acl-"], instead: "write spec.auth" },
    Owned {
        keys: &["appendonly", "appendfilename", "appenddirname", "appendfsync", "save", "dir", "dbfilename"],
        instead: "write spec.storage, which keeps an append-only file, and its fsync",
    },
    Owned {
        keys: &["replicaof", "slaveof", "replica-announce-", "slave-announce-", "replica-priority", "slave-priority"],
        instead: "remove it: Larder decides who replicates whom, and announces it",
    },
    Owned {
        keys: &["replica-read-only", "slave-read-only", "replica-serve-stale-data", "slave-serve-stale-data"],
        instead: "remove it: a replica that answered otherwise could lose or invent data at a failover",
    },
    Owned {
        keys: &["min-replicas-to-write", "min-replicas-max-lag", "min-slaves-to-write", "min-slaves-max-lag"],
        instead: "write spec.writes",
    },
    Owned { keys: &["cluster-"], instead: "write spec.mode and spec.shards" },
    Owned {
        keys: &["port", "tls-", "bind", "bind-source-addr", "protected-mode", "unixsocket", "unixsocketperm"],
        instead: "remove it: Larder decides where servers listen",
    },
    Owned {
        keys: &[
            "daemonize",
            "supervised",
            "pidfile",
            "logfile",
            "syslog-",
            "always-show-logo",
            "set-proc-title",
            "proc-title-template",
        ],
        instead: "remove it: Larder runs the process and collects its log",
    },
    Owned {
        keys: &["include", "loadmodule", "rename-command", "enable-"],
        instead: "remove it: servers are configured from this object alone, and Larder needs their commands by name",
    },
    Owned { keys: &["databases"], instead: "remove it: it cannot be changed while a server runs" },
];

/// What to do instead of setting a key that Larder sets itself; `None` where the key is the user's.
pub fn instead_of(key: &str) -> Option<&'static str> {
    let is_own = |own: &&str| if own.ends_with('-') { key.starts_with(*own) } else { key == *own };
    OWNED.iter().find(|group| group.keys.iter().any(is_own)).map(|group| group.instead)
}

/// The schema of `spec.parameters`; never built.
pub enum ParametersSchema {}

impl JsonSchema for ParametersSchema {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Parameters".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut rules = vec![serde_json::json!({
            "rule": "self.all(key, key.matches('^[a-z][-a-z0-9]{0,62}$'))",
            "message": "write parameters as in redis.conf, in lower case, such as hz or lazyfree-lazy-eviction",
        })];
        rules.extend(OWNED.iter().map(|group| {
            serde_json::json!({
                "rule": format!("!self.exists(key, key.matches('{}'))", owned_regex(group.keys)),
                "message": format!("Larder sets {} itself: {}", names(group.keys), group.instead),
            })
        }));
        json_schema!({
            "type": "object",
            "maxProperties": MAX_PARAMETERS,
            "additionalProperties": {
                "type": "string",
                "maxLength": 512,
                "x-kubernetes-validations": [{
                    "rule": "!self.contains('\\n') && !self.contains('\\r')",
                    "message": "write the value on one line",
                }],
            },
            "x-kubernetes-validations": rules,
        })
    }
}

fn owned_regex(keys: &[&str]) -> String {
    let mut alternatives = String::new();
    for key in keys {
        let separator = if alternatives.is_empty() { "" } else { "|" };
        let rest = if key.ends_with('-') { ".*" } else { "" };
        let _ = write!(alternatives, "{separator}{key}{rest}");
    }
    format!("^({alternatives})$")
}

fn names(keys: &[&str]) -> String {
    let shown: Vec<String> =
        keys.iter().map(|key| if key.ends_with('-') { format!("{key}*") } else { (*key).to_owned() }).collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_keys_are_matched_whole_or_by_their_beginning() {
        assert_eq!(owned_regex(&["port", "tls-"]), "^(port|tls-.*)$");
        assert_eq!(names(&["port", "tls-"]), "port, tls-*");
        assert!(instead_of("tls-port").is_some() && instead_of("port").is_some() && instead_of("port-x").is_none());
    }
}
