//! What is refused is administration, and nothing else: the servers themselves say what that is.

use super::differences::{rows, text};
use crate::support::resp::Value;
use crate::support::server::{Engine, Redis};

/// The families of commands that are administration by design, with those of each that no server files under `@admin`.
const FAMILIES: &[(&str, &[&str])] = &[
    (
        "ACL",
        &["acl|cat", "acl|dryrun", "acl|genpass", "acl|getuser", "acl|help", "acl|whoami", "acl|users", "acl|list", "acl|log"],
    ),
    ("DEBUG", &["script|debug"]),
    ("MIGRATE", &["migrate", "restore-asking"]),
];

/// Whether a server says of a command that it is administration. `None`: it does not know it.
fn is_administration(server: &Redis, name: &str) -> Option<bool> {
    let told = server.client().line(&format!("COMMAND INFO {name}"));
    let [Value::Array(about)] = &told.items()[..] else { return None };
    Some(about[6].items().contains(&Value::Simple("@admin".to_owned())))
}

#[test]
fn only_administration_is_refused() {
    let servers = Engine::ALL.map(Redis::start);
    let (mut refused, mut wrong) = (0, Vec::new());
    for row in rows() {
        if !row.what.contains("refused") || row.what.contains("in the words of Redis") {
            continue;
        }
        assert_eq!(row.what, "refused", "a part of a command is refused, which is not administration: {:?}", row.commands);
        for name in row.commands {
            refused += 1;
            let told: Vec<bool> = servers.iter().filter_map(|server| is_administration(server, &name)).collect();
            assert!(!told.is_empty(), "no server knows {name}");
            let in_family = FAMILIES.iter().any(|(_, members)| members.contains(&name.as_str()));
            if !told.contains(&true) && !in_family {
                wrong.push(name);
            }
        }
    }
    assert!(refused > 40, "{refused} rows");
    assert!(wrong.is_empty(), "refused, but no administration: {wrong:?}");
    for (family, _) in FAMILIES {
        assert!(text().contains(&format!("`{family}`")), "docs/differences.md does not name the family {family}");
    }
}
