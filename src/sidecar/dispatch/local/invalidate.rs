//! LARDER.INVALIDATE: removes keys with all that Larder keeps beside them.

use std::rc::Rc;
use std::time::Duration;

use super::super::{Flow, Request, own_keys};
use crate::sidecar::commands::Join;
use crate::sidecar::patterns::observe;
use crate::sidecar::resp::{CommandArgs, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots::{self, Companion};
use crate::sidecar::upstream::gather::{Confirm, Meeting};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Sink, Transaction};
use crate::sidecar::versions::epoch::LEASE_MS;
use crate::sidecar::versions::written::guarded_key;
use crate::sidecar::worker::Worker;

/// What may stand beside a key: the right to store a load that is under way, the copy for bad times, the memory of its absence.
pub(super) const COMPANIONS: [Companion; 3] = [Companion::Lease, Companion::Stale, Companion::Negative];
/// MULTI, the key's DEL, its companions' DEL, EXEC.
const REPLIES: u32 = 4;

/// How many of the arguments are the command's name and its keys: all, but for the word SYNC behind the last key.
pub fn keys_end(args: &CommandArgs<'_>) -> usize {
    let last = args.len().saturating_sub(1);
    let syncs = last >= 2 && args.get(last).is_some_and(|word| word.eq_ignore_ascii_case(b"sync"));
    if syncs { last } else { args.len() }
}

/// `LARDER.INVALIDATE key [key …] [SYNC]`. Each key goes in one transaction with its companions. The reply is the number of keys that were
/// there, once all replicas that could become primaries have heard of it; with SYNC, once no sidecar can show what was there before.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let end = keys_end(&request.args);
    let keys: Vec<&[u8]> = request.args.iter().take(end).skip(1).collect();
    if let Some(key) = keys.iter().find(|key| slots::is_larder_key(key)) {
        return own_keys::refuse(session, key);
    }
    let places = (0..keys.len() as u32).map(|place| vec![place]).collect();
    // What has no version is in the cache that all share, and nowhere else.
    let policy = worker.policy();
    let waits = end < request.args.len() && keys.iter().any(|key| policy.is_versioned(policy.find(key)));
    let confirm = Confirm {
        lane: session.lane(),
        slots: keys.iter().map(|key| slot_of(worker, key)).collect(),
        pause: Duration::from_millis(if waits { LEASE_MS } else { 0 }),
    };
    let meeting = Meeting::confirming(session.clone(), session.take_place(), Join::Sum, places, confirm);
    let mut room = true;
    for (index, key) in keys.iter().enumerate() {
        let part = Sink::Part { meeting: meeting.clone(), index: index as u32 };
        room &= submit(worker, session.lane(), key, guarded_key(worker, key, part));
    }
    if room { Flow::Continue } else { Flow::Wait }
}

/// The slot of a key; [`ANY_SLOT`] where there are none.
pub fn slot_of(worker: &Worker, key: &[u8]) -> u16 {
    if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT }
}

/// Sends what invalidates one key; `sink` gets how many of it there were, before replicas have heard of it. `false`: who sends more
/// should pause.
pub fn submit(worker: &Rc<Worker>, lane: Lane, key: &[u8], sink: Sink) -> bool {
    observe::on_invalidation(worker, lane.database, key);
    worker.aside().note_end(lane.database, key, None, worker.now());
    let mut wire = Vec::new();
    write(key, &mut wire);
    let sink = Sink::Transaction(Box::new(Transaction { sink, expects: REPLIES, error: None }));
    // Covered keys may vanish at any moment, so they may be deleted twice; others not.
    let policy = worker.policy();
    let retry = if policy.lifetime_of(policy.find(key)).is_some() { Retry::Safe } else { Retry::Never };
    if retry == Retry::Safe {
        worker.aside().recent().note(worker.now(), lane.database, key);
    }
    worker.submit(&[&wire], Pending::new(sink, slot_of(worker, key), retry, lane, worker.now()))
}

/// What invalidates one key, in one transaction: its DEL is the first of the two.
pub fn write(key: &[u8], wire: &mut Vec<u8>) {
    wire.clear();
    encode::command(wire, &[b"MULTI"]);
    encode::command(wire, &[b"DEL", key]);
    let mut companions: Vec<Vec<u8>> = vec![b"DEL".to_vec()];
    companions.extend(COMPANIONS.into_iter().map(|companion| companion.name(key)));
    encode::command(wire, &companions);
    encode::command(wire, &[b"EXEC"]);
}
