//! Leases whose tokens clients hold themselves: LARDER.FETCH and LARDER.FILL.

use std::rc::Rc;

use super::reads::{Kind, Read};
use super::{Element, rule_of, scripts};
use crate::policy::Span;
use crate::sidecar::dispatch::Flow;
use crate::sidecar::engine::lease::{Answer, Asker, Generation, Millis, Missing, Reader, Reply, Rule, Why, Written};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{self, Sink};
use crate::sidecar::versions;
use crate::sidecar::worker::Worker;

/// A FETCH on its way.
pub(super) struct Fetch {
    database: u32,
    key: Vec<u8>,
}

/// Reads a key, and where it is missing asks for the right to load it. `wait`: for how long another's load is waited for, where the
/// rule's own wait is not meant.
pub fn fetch(session: &Rc<Session>, key: &[u8], wait: Option<Millis>) -> Flow {
    let (asker, lane) = (Asker { connection: session.id(), place: session.take_place() }, session.lane());
    let fetch = Fetch { database: u32::from(lane.database), key: key.to_vec() };
    let mut wire = Vec::new();
    encode::command(&mut wire, &[b"GET", key]);
    let waiting = session.clone();
    let sink = Sink::Call(Box::new(move |worker, answer| match answer {
        sink::Answer::Failed(text) => waiting.answer(asker.place, |out| encode::error(out, text)),
        sink::Answer::Reply(bytes) if bytes.first() == Some(&b'-') => waiting.deliver(asker.place, bytes),
        sink::Answer::Reply(bytes) => found(worker, &waiting, asker, fetch, wait, bytes),
    }));
    submit(session, key, &wire, sink, Retry::Safe)
}

fn found(worker: &Rc<Worker>, session: &Rc<Session>, asker: Asker, fetch: Fetch, wait: Option<Millis>, bytes: &[u8]) {
    let policy = worker.policy();
    let id = policy.find(&fetch.key);
    worker.metrics().count_read(id, reply::is_null(bytes));
    if !reply::is_null(bytes) {
        return answer(session, asker.place, "value", Some(bytes), None);
    }
    let Some(rule) = rule_of(&policy, id) else {
        return answer(session, asker.place, "load", None, None);
    };
    if session.is_closed() {
        return;
    }
    let rule = wait.map_or(rule, |wait| Rule { wait, wait_follows: false, ..rule });
    let overtaken = session.is_leaving() || session.count_after(asker.place) > 0;
    let reader = Reader { asker, database: fetch.database, overtaken, shared: session.is_shared() };
    let (aside, key) = (worker.aside(), fetch.key.clone());
    versions::note_missing(worker, fetch.database, &key);
    aside.protocol.set(session.protocol());
    aside.keep(asker, Read { session: session.clone(), kind: Kind::Fetch(id, fetch) });
    aside.run(worker, |desk, now, effects| desk.read_missed(now, reader, &[Missing { key: &key, rule }], effects));
}

/// Answers a FETCH as the desk decided.
pub(super) fn decided(worker: &Rc<Worker>, session: &Rc<Session>, place: u32, fetch: &Fetch, decided: &Answer<Element>) {
    let token = || worker.aside().desk.borrow_mut().generation(fetch.database, &fetch.key);
    match decided {
        Answer::Replies(replies) => match replies.first() {
            Some(Reply::Value(value)) => answer(session, place, "value", Some(value), None),
            Some(Reply::Stale(value)) => answer(session, place, "stale", Some(value), None),
            Some(Reply::Nil(Why::Passed | Why::Unparked | Why::WaitEnd)) => answer(session, place, "busy", None, token()),
            Some(Reply::Nil(Why::LocalLead | Why::Untracked)) | None => answer(session, place, "load", None, None),
            Some(Reply::Nil(Why::Lead | Why::Shared | Why::Again)) => answer(session, place, "load", None, token()),
        },
        Answer::TimedOut { .. } | Answer::CutShort { .. } => answer(session, place, "busy", None, token()),
    }
}

/// What FETCH answers: a word, the value (a whole element), and the token.
fn answer(session: &Rc<Session>, place: u32, word: &str, value: Option<&[u8]>, token: Option<Generation>) {
    session.answer(place, |out| {
        encode::array(out, 3);
        encode::bulk(out, word.as_bytes());
        match value {
            Some(value) => out.extend_from_slice(value),
            None => encode::null(out, session.protocol()),
        }
        match token {
            Some(token) => encode::bulk(out, token.to_string().as_bytes()),
            None => encode::null(out, session.protocol()),
        }
    });
}

/// Stores a loaded value, if nothing was written since its token was given: then the reply is OK, else nil. `None`: no rule with
/// leases covers the key.
pub fn fill(session: &Rc<Session>, key: &[u8], token: Generation, value: &[u8], lifetime: Option<Millis>) -> Option<Flow> {
    let worker = session.worker();
    let policy = worker.policy();
    let id = policy.find(key);
    let cache_aside = policy.cache_aside(id).filter(|rule| rule.stampede.is_some())?;
    let ttl = match lifetime {
        Some(millis) => Span::from_millis(millis).min(cache_aside.ttl.max),
        None => cache_aside.ttl.jittered(worker.random()),
    };
    let copy = if cache_aside.stale.is_zero() { 0 } else { ttl.as_millis() + cache_aside.stale.as_millis() };
    let mut wire = Vec::new();
    scripts::fill_if(&scripts::Names::of(key), token, value, ttl.as_millis(), copy, &mut wire);
    let (database, connection, place) = (session.lane().database, session.id(), session.take_place());
    let (waiting, name) = (session.clone(), key.to_vec());
    let sink = Sink::Call(Box::new(move |worker, answer| {
        let written = match answer {
            sink::Answer::Reply(bytes) if reply::is_null(bytes) => Written::Unchanged,
            sink::Answer::Reply(bytes) if bytes.first() != Some(&b'-') => Written::Stored,
            _ => Written::Failed,
        };
        match answer {
            sink::Answer::Reply(bytes) => waiting.deliver(place, bytes),
            sink::Answer::Failed(text) => waiting.answer(place, |out| encode::error(out, text)),
        }
        if written == Written::Unchanged {
            worker.metrics().late_fill(worker.policy().find(&name));
        }
        let aside = worker.aside();
        if written == Written::Stored {
            aside.note_end(database, &name, Some(ttl.as_millis()), worker.now());
        }
        aside.run(worker, |desk, now, effects| {
            desk.redeemed(now, connection, u32::from(database), &name, token, written, effects);
        });
    }));
    Some(submit(session, key, &wire, sink, Retry::Never))
}

fn submit(session: &Rc<Session>, key: &[u8], wire: &[u8], sink: Sink, retry: Retry) -> Flow {
    let worker = session.worker();
    let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
    let pending = Pending::new(sink, slot, retry, session.lane(), worker.now());
    if worker.submit(&[wire], pending) { Flow::Continue } else { Flow::Wait }
}
