//! Commands whose keys lie in one slot: they go to one server, on the shared connection.

use std::rc::Rc;

use super::{Flow, Request, refuse};
use crate::sidecar::commands::{Access, Effect};
use crate::sidecar::policy::{ActivePolicy, UNMATCHED};
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{OnReply, Sink};

/// Redis Cluster's own words.
pub const CROSS_SLOT: &str = "CROSSSLOT Keys in request don't hash to the same slot";

/// Forwards a command.
#[inline]
pub fn forward(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let Some(key) = request.spec.only_key(&request.args) else {
        return forward_many(session, request);
    };
    let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
    let policy = worker.policy();
    let on_reply = if policy.is_transparent() {
        OnReply::Pass
    } else {
        let rule = policy.find(key);
        if rule == UNMATCHED && policy.refuses_unmatched() {
            return refuse_unmatched(session, key);
        }
        if request.spec.access == Access::Write {
            return write(session, request, &policy, slot);
        }
        match (request.spec.name, policy.loads(rule)) {
            ("get", true) => OnReply::Fill(rule),
            _ => OnReply::Count(rule),
        }
    };
    let retry = if request.spec.access == Access::Read { Retry::Safe } else { Retry::Never };
    send(session, &[request.raw], slot, retry, on_reply)
}

/// Sends bytes that bring one reply.
#[inline]
pub fn send(session: &Rc<Session>, parts: &[&[u8]], slot: u16, retry: Retry, on_reply: OnReply) -> Flow {
    let worker = session.worker();
    let sink = Sink::Client { session: session.clone(), sequence: session.take_place(), on_reply };
    let pending = Pending::new(sink, slot, retry, session.lane(), worker.now());
    if worker.submit(parts, pending) { Flow::Continue } else { Flow::Wait }
}

/// Commands with several keys, or with keys that have to be looked for.
fn forward_many(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    // Where the arguments contradict themselves any server answers with the error that fits.
    let keys = request.spec.keys(&request.args).unwrap_or_default();
    let mut keys = keys.iter().filter_map(|at| Some((request.args.get(at.index as usize)?, at.effect)));
    let Some((first, _)) = keys.next() else {
        return send(session, &[request.raw], ANY_SLOT, Retry::Never, OnReply::Pass);
    };
    let slot = if worker.is_cluster() { slots::slot_of(first) } else { ANY_SLOT };
    if slot != ANY_SLOT && keys.clone().any(|(key, _)| slots::slot_of(key) != slot) {
        return refuse(session, CROSS_SLOT);
    }
    let policy = worker.policy();
    if !policy.is_transparent() {
        if policy.refuses_unmatched() {
            let all = request.spec.keys(&request.args).unwrap_or_default();
            let mut names =
                all.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| request.args.get(at.index as usize));
            if let Some(key) = names.find(|key| policy.find(key) == UNMATCHED) {
                return refuse_unmatched(session, key);
            }
        }
        if request.spec.access == Access::Write {
            return write(session, request, &policy, slot);
        }
    }
    let retry = if request.spec.access == Access::Read { Retry::Safe } else { Retry::Never };
    send(session, &[request.raw], slot, retry, OnReply::Pass)
}

/// A write on keys that may be covered.
fn write(session: &Rc<Session>, request: &Request<'_>, _policy: &ActivePolicy, slot: u16) -> Flow {
    send(session, &[request.raw], slot, Retry::Never, OnReply::Pass)
}

fn refuse_unmatched(session: &Rc<Session>, key: &[u8]) -> Flow {
    let shown = String::from_utf8_lossy(&key[..key.len().min(64)]).into_owned();
    refuse(session, &format!("NOPERM no rule of the policy covers the key `{shown}`, and the policy refuses such keys"))
}
