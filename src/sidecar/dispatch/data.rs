//! Commands whose keys lie in one slot: they go to one server, on the shared connection.

use std::rc::Rc;

use super::{Flow, Request, refuse};
use crate::sidecar::commands::{Access, CommandSpec, Effect};
use crate::sidecar::engine::ttl::{self, Coverage, EXEC, MULTI, TtlPlan};
use crate::sidecar::patterns::cache_aside;
use crate::sidecar::patterns::cache_aside::writes::{self, Judged};
use crate::sidecar::patterns::observe;
use crate::sidecar::patterns::read_through::hash;
use crate::sidecar::policy::{Covered, UNMATCHED};
use crate::sidecar::resp::CommandArgs;
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{OnReply, Sink, Transaction};
use crate::sidecar::versions::written::guarded;
use crate::sidecar::worker::Worker;

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
    // A channel has a slot, as a key has, but no rule is about it.
    let is_channel = matches!(request.spec.keys, [part] if part.effect == Effect::Route);
    let on_reply = if policy.is_transparent() || is_channel {
        OnReply::Pass
    } else {
        let rule = policy.find(key);
        if rule == UNMATCHED && policy.refuses_unmatched() {
            return refuse_unmatched(session, key);
        }
        if request.spec.access == Access::Write {
            return write(session, request, slot);
        }
        match request.spec.name {
            "get" if policy.leases(rule) => cache_aside::before_get(session, &policy, rule, key, slot),
            "get" if policy.loads(rule) => OnReply::Fill(rule),
            "strlen" | "getrange" | "substr" if policy.loads(rule) => OnReply::FillZero(rule),
            name if policy.loads_hashes(rule) => {
                if let Some(text) = hash::refusal(name, policy.rule(rule).map_or("", |rule| rule.name.as_str())) {
                    return refuse(session, &text);
                }
                if hash::loads(name) { OnReply::FillHash(rule) } else { OnReply::Count(rule) }
            }
            "get" if policy.observes() && policy.observed(rule).is_some() => OnReply::Watch(rule),
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
        if let Some(refused) = refuse_if_unmatched(session, request) {
            return refused;
        }
        if request.spec.access == Access::Write {
            return write(session, request, slot);
        }
    }
    let retry = if request.spec.access == Access::Read { Retry::Safe } else { Retry::Never };
    let on_reply = match (request.spec.name, request.args.get(1)) {
        ("exists", Some(key)) if request.args.len() == 2 && policy.loads(policy.find(key)) => OnReply::FillZero(policy.find(key)),
        _ if fills(session, request) => OnReply::FillMany,
        ("mget", _) if policy.observes() => OnReply::WatchMany,
        _ => OnReply::Pass,
    };
    send(session, &[request.raw], slot, retry, on_reply)
}

/// Whether keys that an MGET or EXISTS does not find are to be loaded, or an MGET's by its client.
pub fn fills(session: &Session, request: &Request<'_>) -> bool {
    let policy = session.worker().policy();
    let mut keys = request.args.iter().skip(1).map(|key| policy.find(key));
    match request.spec.name {
        "mget" => keys.any(|rule| policy.loads(rule) || policy.leases(rule)),
        "exists" => keys.any(|rule| policy.loads(rule)),
        _ => false,
    }
}

/// A write on keys that may be covered.
fn write(session: &Rc<Session>, request: &Request<'_>, slot: u16) -> Flow {
    let sink = Sink::Client { session: session.clone(), sequence: session.take_place(), on_reply: OnReply::Pass };
    if submit_write(session, request, slot, guarded(session.worker(), sink)) { Flow::Continue } else { Flow::Wait }
}

/// Sends a write, with whatever keeps its covered keys within their TTLs. `false`: the session should pause.
pub fn submit_write(session: &Rc<Session>, request: &Request<'_>, slot: u16, sink: Sink) -> bool {
    let worker = session.worker();
    let policy = worker.policy();
    let coverage = Covered { policy: &policy, database: session.lane().database };
    observe::on_write(session, request.spec, &request.args);
    let retry = if is_covered_delete(request, &coverage) { Retry::Safe } else { Retry::Never };
    let mut pending = Pending::new(sink, slot, retry, session.lane(), worker.now());
    let judged = writes::judge(session, request.spec, &request.args);
    let room = worker.with_drafts(|planned, wire| {
        let mut gives_default = false;
        let mut random = || {
            gives_default = true;
            worker.random()
        };
        let (plan, life) = ttl::plan_and_life(&request.args, request.spec, &coverage, &mut random, planned);
        if policy.has_early_expiry() {
            cache_aside::note_life(worker, coverage.database, request.spec, &request.args, life);
        }
        if plan == TtlPlan::Forward {
            return worker.submit(&[request.raw], pending);
        }
        if gives_default && let Some(key) = request.spec.first_key(&request.args) {
            worker.metrics().ttl_added(policy.find(key));
        }
        note_written(worker, request.spec, &request.args, &coverage);
        wire.clear();
        if let Some(judged) = judged.as_ref().filter(|judged| judged.needs_care()) {
            pending.sink = write_with_care(session, request, judged, (plan, planned), pending.sink, wire);
            if matches!(pending.sink, Sink::Fill(_)) && judged.may_be_repeated(request.spec, &request.args) {
                pending.retry = Retry::Safe;
            }
            return worker.submit(&[wire], pending);
        }
        let expects = plan.write(request.raw, request.args.len(), planned, wire);
        if expects > 1 {
            pending.sink = Sink::Transaction(Box::new(Transaction { sink: pending.sink, expects, error: None }));
        }
        worker.submit(&[wire], pending)
    });
    if let Some(judged) = judged {
        judged.sent(worker);
    }
    room
}

/// Remembers the covered keys that a command writes, for the case that a new primary has not heard of it.
pub fn note_written(worker: &Worker, spec: &CommandSpec, args: &CommandArgs<'_>, coverage: &Covered<'_>) {
    let recent = worker.aside().recent();
    match spec.only_key(args) {
        Some(key) => recent.note(worker.now(), coverage.database, key),
        None => {
            let keys = spec.keys(args).unwrap_or_default();
            let keys = keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| args.get(at.index as usize));
            keys.filter(|key| coverage.cover(key).is_some()).for_each(|key| recent.note(worker.now(), coverage.database, key));
        }
    }
}

/// Writes a command that may be a fill, or is doubtful: as a script, or where it is too large for one, as a transaction that leaves
/// nothing doubtful. Who waits for its answer then.
fn write_with_care(
    session: &Rc<Session>,
    request: &Request<'_>,
    judged: &Judged,
    (plan, planned): (TtlPlan, &[u8]),
    sink: Sink,
    wire: &mut Vec<u8>,
) -> Sink {
    let mut queued = Vec::with_capacity(request.raw.len() + planned.len());
    let extra = plan.write_queued(request.raw, request.args.len(), planned, &mut queued);
    if judged.is_fill() && judged.write(&request.args, &queued, wire).is_some() {
        return judged.sink(session, &request.args, sink);
    }
    wire.clear();
    wire.extend_from_slice(MULTI);
    wire.extend_from_slice(&queued);
    let removals = judged.write_removal(&request.args, wire);
    wire.extend_from_slice(EXEC);
    Sink::Transaction(Box::new(Transaction { sink, expects: extra + removals + 3, error: None }))
}

/// A key that may vanish at any moment may also be deleted twice.
fn is_covered_delete(request: &Request<'_>, coverage: &Covered<'_>) -> bool {
    matches!(request.spec.name, "del" | "unlink") && request.args.iter().skip(1).all(|key| coverage.cover(key).is_some())
}

/// Refuses a command that names a key that no rule covers, where the policy says so.
pub fn refuse_if_unmatched(session: &Rc<Session>, request: &Request<'_>) -> Option<Flow> {
    let policy = session.worker().policy();
    if !policy.refuses_unmatched() {
        return None;
    }
    let keys = request.spec.keys(&request.args).unwrap_or_default();
    let mut keys = keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| request.args.get(at.index as usize));
    keys.find(|key| policy.find(key) == UNMATCHED).map(|key| refuse_unmatched(session, key))
}

fn refuse_unmatched(session: &Rc<Session>, key: &[u8]) -> Flow {
    refuse(session, &unmatched_text(key))
}

/// The error for a key that the policy refuses.
pub fn unmatched_text(key: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&key[..key.len().min(64)]).into_owned();
    format!("NOPERM no rule of the policy covers the key `{shown}`, and the policy refuses such keys")
}
