//! Which replies may differ from a bare server's, and what they must be instead.
//!
//! | command | on a key whose TTL the client never gave | here |
//! |---|---|---|
//! | `PERSIST` | 0: it has none | 1 where the key exists: the default is restored |
//! | `EXPIRE … NX` and its kin | 1, and it is set | as `LT`: 1 where it is shorter than the TTL that the key has |
//! | `EXPIRE … XX` | 0 | 1, as for any key with a TTL |
//! | `EXPIRE … GT` | 0: none counts as for ever | 1 where it is longer |
//! | `EXPIRE … LT` | 1: none counts as for ever | 1 where it is shorter |
//!
//! TTL, PTTL, EXPIRETIME and PEXPIRETIME tell the TTL that the key has. All else is equal.

use larder::sidecar::commands::{Ttl, resolve};

use super::templates::{Words, name_of};
use crate::command_table::Command;
use crate::support::resp::{Value, show};

/// Panics where `ours` is not what it must be, given a bare server's reply. `exists`: whether the bare server has the command's
/// first key afterwards; `None` where other commands came between.
pub fn check(words: &Words, theirs: &Value, ours: &Value, exists: Option<bool>) {
    let command = Command::new(words);
    let spec = resolve(&command.args()).expect("templates are well-formed");
    let conditional = matches!(spec.ttl, Ttl::Expire(_) | Ttl::ExpireAt) && words.len() > 3;
    if ours.is_error() || theirs.is_error() {
        assert_eq!(ours, theirs, "{}", show(words));
    } else if spec.ttl == Ttl::Persist {
        assert!(matches!(ours.int(), 0 | 1), "{}: {ours:?}", show(words));
        if words[1].starts_with(b"u:") {
            // It may have come by a TTL from a covered key.
            assert!(theirs.int() <= ours.int(), "{}: {ours:?}", show(words));
        } else if let Some(exists) = exists {
            assert_eq!(ours.int(), i64::from(exists), "{}", show(words));
        }
    } else if conditional {
        let fits = matches!(ours.int(), 0 | 1) && (ours.int() == 0 || exists != Some(false));
        assert!(fits, "{}: {ours:?}", show(words));
    } else if name_of(words) == "spop" {
        assert_eq!(sorted(ours), sorted(theirs), "{}", show(words));
    } else {
        assert_eq!(ours, theirs, "{}", show(words));
    }
}

/// The members that SPOP took: all of them, in any order.
fn sorted(reply: &Value) -> Vec<String> {
    let mut items: Vec<String> = reply.items().iter().map(|item| format!("{item:?}")).collect();
    items.sort();
    items
}
