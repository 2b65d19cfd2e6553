//! Write-through: a value reaches the origin first, then the cache, and is acknowledged when both have it.
//!
//! 1. A mark beside the key says that a write is under way; in the same script the key, its copies and the right to store what is loaded
//!    go. Replicas confirm it, so that no failover brings the old value back.
//! 2. The origin makes the change, in one transaction.
//! 3. The cache gets the value, unless another write of the key overlapped and may be the later one; the mark goes.
//!
//! So after the acknowledgement nobody reads an older value, and wherever a sidecar dies, its mark keeps loads from being stored for
//! as long as its transaction may still come to something: what is left is a miss, never an older value. The same holds where the origin
//! refuses, where nobody knows what it did, and where the cache is lost after the origin has made the change.
//!
//! A client's write begins when all that it sent before is answered, and what it sends behind waits: its commands keep their order, also
//! where they are about one key. Other clients, whose commands share the connections to the servers, do not wait.

mod flow;
mod hash;
pub mod model;
pub mod scripts;
#[cfg(test)]
mod tests;
mod wish;

use std::rc::Rc;

use super::super::commands::CommandSpec;
use super::super::dispatch::{Flow, Request};
use super::super::engine::ttl::changes;
use super::super::policy::{ActivePolicy, RuleId};
use super::super::resp::{CommandArgs, encode};
use super::super::session::Session;

pub use flow::{Untold, Writes};
pub use wish::refusal_apart;

use wish::Wish;

/// Takes a write of keys that are written through. `None`: it is none.
pub fn takes(session: &Rc<Session>, request: &Request<'_>) -> Option<Flow> {
    let policy = session.worker().policy();
    if !policy.minds_writes() {
        return None;
    }
    match wish::of(&policy, request.spec, &request.args) {
        Wish::Nothing => None,
        Wish::Refused(text) => {
            session.answer_now(|out| encode::error(out, &text));
            Some(Flow::Continue)
        }
        // A read before it must not see it, also where that read is still being loaded from the very origin.
        Wish::Carry(_) if session.outstanding() > 0 => Some(Flow::Quiet),
        Wish::Carry(order) => {
            flow::launch(session, &policy, order);
            Some(Flow::Continue)
        }
    }
}

/// Whether the write of this key, of which only the beginning has come, would be carried to an origin: then it is held whole. The error
/// for the case that it cannot be.
pub fn may_carry(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) -> Option<String> {
    let policy = session.worker().policy();
    if !policy.has_writers() || !spec.keys.iter().any(|part| changes(part.effect)) {
        return None;
    }
    let rule = policy.find(spec.only_key(args)?);
    policy.writes_through(rule).then(|| too_long_text(&policy, rule))
}

/// The error for a command that is too long to be carried to an origin.
pub fn too_long_text(policy: &ActivePolicy, rule: RuleId) -> String {
    let name = policy.rule(rule).map_or("", |rule| rule.name.as_str());
    format!("ERR a command of more than {} bytes cannot be carried to the origin of the rule `{name}`", wish::MOST_BYTES)
}
