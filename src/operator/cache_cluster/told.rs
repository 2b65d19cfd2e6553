//! A server is told of workloads' users at once, and not by the file that its kubelet brings within two minutes. See [`crate::policy::told`]
//! for how its agent is kept from undoing that.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;

use redis::{FromRedisValue, Value};

use super::users::UserRules;
use crate::operator::admin::{Admin, AdminError, Entry};
use crate::policy::told;

/// What `ACL GETUSER` says of a user.
type Shown = HashMap<String, Value>;

/// Marks a server as one that is about to be told of users of this generation.
pub async fn mark(server: SocketAddr, entry: Entry<'_>, generation: u64) -> Result<(), AdminError> {
    let mut admin = Admin::connect(server, entry).await?;
    let rules = told::rules(generation);
    let arguments: Vec<&str> = [told::MARK].into_iter().chain(rules.iter().map(String::as_str)).collect();
    admin.ask("ACL SETUSER", &arguments).await
}

/// Makes a server that is marked with this generation know these users, and reads them back. Whether all are in place: not where the mark is
/// gone, as with the process that had it.
pub async fn tell(server: SocketAddr, entry: Entry<'_>, generation: u64, users: &[UserRules]) -> Result<bool, AdminError> {
    let mut admin = Admin::connect(server, entry).await?;
    let mark: Option<Shown> = admin.ask("ACL GETUSER", &[told::MARK]).await?;
    let keys: Option<String> = mark.and_then(|mut mark| field(&mut mark, "keys"));
    if keys.as_deref().and_then(told::generation) != Some(generation) {
        return Ok(false);
    }
    for UserRules { name, rules } in users {
        let arguments = [name.as_str(), "reset"].into_iter().chain(rules.iter().map(String::as_str));
        let _: () = admin.ask("ACL SETUSER", &arguments.collect::<Vec<_>>()).await?;
    }
    for user in users {
        let shown: Option<Shown> = admin.ask("ACL GETUSER", &[&user.name]).await?;
        if !shown.is_some_and(|shown| is_as_told(shown, user)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a user reads back as one that is on, with these passwords.
fn is_as_told(mut shown: Shown, user: &UserRules) -> bool {
    let flags: Vec<String> = field(&mut shown, "flags").unwrap_or_default();
    let passwords: Vec<String> = field(&mut shown, "passwords").unwrap_or_default();
    let wanted: BTreeSet<&str> = user.rules.iter().filter_map(|rule| rule.strip_prefix('#')).collect();
    flags.iter().any(|flag| flag == "on") && passwords.iter().map(String::as_str).collect::<BTreeSet<_>>() == wanted
}

fn field<T: FromRedisValue>(shown: &mut Shown, name: &str) -> Option<T> {
    redis::from_redis_value(shown.remove(name)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reads_back_as_something_else_is_not_in_place() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let shown = |flag: &str, passwords: &[&str]| {
            let passwords = passwords.iter().map(|hash| text(hash)).collect();
            HashMap::from([
                ("flags".to_owned(), Value::Array(vec![text(flag), text("sanitize-payload")])),
                ("passwords".to_owned(), Value::Array(passwords)),
            ])
        };
        let rules = ["on", "#aa", "#bb", "~user:*"].map(str::to_owned).into();
        let user = UserRules { name: "larder-b-shop-1".to_owned(), rules };
        assert!(is_as_told(shown("on", &["bb", "aa"]), &user));
        assert!(!is_as_told(shown("off", &["aa", "bb"]), &user) && !is_as_told(shown("on", &["aa"]), &user));
        assert!(!is_as_told(HashMap::new(), &user));
    }
}
