//! Leases whose tokens clients hold themselves: LARDER.FETCH and LARDER.FILL.

use std::rc::Rc;

use super::reads::{Kind, Read};
use super::{Element, rule_of, scripts};
use crate::policy::{CacheAside, KeyPattern, Span, Versioned};
use crate::sidecar::dispatch::Flow;
use crate::sidecar::engine::lease::{Answer, Asker, Generation, Millis, Missing, Reader, Reply, Rule, Why, Written};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{self, Sink};
use crate::sidecar::versions;
use crate::sidecar::versions::given::{self, Given};
use crate::sidecar::versions::moment::{self, Moment};
use crate::sidecar::worker::Worker;

/// What LARDER.FETCH gives whoever is to load: a lease's generation, and where its value may be given tags, how far the log of invalidated tags was.
#[derive(Debug, Clone)]
pub struct Token {
    generation: Generation,
    moment: Option<Moment>,
}

impl Token {
    /// Reads its text. `None`: it is none.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (generation, moment) = match text.split_at_checked(Generation::LEN) {
            Some((generation, [b'+', moment @ ..])) => (generation, Some(Moment::parse(moment)?)),
            _ => (text, None),
        };
        Some(Self { generation: Generation::parse(generation)?, moment })
    }
}

/// A value that a client brings with its token.
#[derive(Debug)]
pub struct Fill<'f> {
    /// The key, as the cache has it.
    pub key: &'f [u8],
    /// The token.
    pub token: Token,
    /// The value.
    pub value: &'f [u8],
    /// Its TTL in milliseconds, where the rule's is not meant.
    pub lifetime: Option<Millis>,
    /// Tags that it is given, each once.
    pub tags: Vec<Vec<u8>>,
}

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
            Some(Reply::Nil(Why::Passed | Why::Unparked | Why::WaitEnd)) => {
                answer_with(worker, session, place, "busy", fetch, token())
            }
            Some(Reply::Nil(Why::LocalLead | Why::Untracked)) | None => answer(session, place, "load", None, None),
            Some(Reply::Nil(Why::Lead | Why::Shared | Why::Again)) => answer_with(worker, session, place, "load", fetch, token()),
        },
        Answer::TimedOut { .. } | Answer::CutShort { .. } => answer_with(worker, session, place, "busy", fetch, token()),
    }
}

/// Answers with a token. Where the value may be given tags, it is asked first how far the log of invalidated ones is: nobody begins to load before.
fn answer_with(
    worker: &Rc<Worker>,
    session: &Rc<Session>,
    place: u32,
    word: &'static str,
    fetch: &Fetch,
    generation: Option<Generation>,
) {
    let Some((generation, keys)) = generation.zip(keys_with_tags(worker, &fetch.key)) else {
        return answer(session, place, word, None, generation.map(|generation| generation.to_string()));
    };
    let (worker, session) = (worker.clone(), session.clone());
    tokio::task::spawn_local(async move {
        // Who cannot be told stores without tags.
        let moment = moment::look(&worker, &keys).await.ok();
        let moment = moment.map(|moment| format!("+{moment}")).unwrap_or_default();
        answer(&session, place, word, None, Some(format!("{generation}{moment}")));
        worker.flush_dirty();
    });
}

/// The pattern of a key whose value may be given tags.
fn keys_with_tags(worker: &Worker, name: &[u8]) -> Option<KeyPattern> {
    let policy = worker.policy();
    let rule = policy.rule(policy.find(name)).filter(|rule| rule.versioned == Versioned::Entity)?;
    Some(rule.keys.clone())
}

/// What FETCH answers: a word, the value (a whole element), and the token.
fn answer(session: &Rc<Session>, place: u32, word: &str, value: Option<&[u8]>, token: Option<String>) {
    session.answer(place, |out| {
        encode::array(out, 3);
        encode::bulk(out, word.as_bytes());
        match value {
            Some(value) => out.extend_from_slice(value),
            None => encode::null(out, session.protocol()),
        }
        match token {
            Some(token) => encode::bulk(out, token.as_bytes()),
            None => encode::null(out, session.protocol()),
        }
    });
}

/// Stores a loaded value, if nothing was written since its token was given: then the reply is OK, else nil.
///
/// # Errors
/// The key or its rule has no place for it; the text says what to do instead.
pub fn fill(session: &Rc<Session>, fill: &Fill<'_>) -> Result<Flow, String> {
    let worker = session.worker();
    let policy = worker.policy();
    let id = policy.find(fill.key);
    let cache_aside = policy.cache_aside(id).filter(|rule| rule.stampede.is_some());
    let cache_aside = cache_aside.ok_or("ERR no rule with leases covers the key: store the value with SET")?;
    let (ttl_ms, copy_ms) = lives(worker, cache_aside, fill.lifetime);
    if !fill.tags.is_empty() {
        if keys_with_tags(worker, fill.key).is_none() {
            let name = policy.rule(id).map_or("", |rule| rule.name.as_str());
            return Err(format!(
                "ERR TAGS stand with a version that is a key's own: write invalidate.versioned: Entity in the rule `{name}`"
            ));
        }
        return Ok(fill_with_tags(session, fill, rule_of(&policy, id).zip(fill.token.moment.clone()), ttl_ms, copy_ms));
    }
    let (token, mut wire) = (fill.token.generation, Vec::new());
    scripts::fill_if(&scripts::Names::of(fill.key), token, fill.value, ttl_ms, copy_ms, &mut wire);
    let (database, place) = (session.lane().database, session.take_place());
    let (waiting, name) = (session.clone(), fill.key.to_vec());
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
        if written == Written::Stored {
            worker.aside().note_end(database, &name, Some(ttl_ms), worker.now());
        }
        redeemed(worker, (waiting.id(), database), &name, token, written);
    }));
    Ok(submit(session, fill.key, &wire, sink, Retry::Never))
}

/// How long a value and its stale copy are kept, in milliseconds.
fn lives(worker: &Worker, rule: &CacheAside, lifetime: Option<Millis>) -> (u64, u64) {
    let ttl = match lifetime {
        Some(millis) => Span::from_millis(millis).min(rule.ttl.max).as_millis(),
        None => rule.ttl.jittered(worker.random()).as_millis(),
    };
    (ttl, if rule.stale.is_zero() { 0 } else { ttl + rule.stale.as_millis() })
}

/// Tells the desk what became of a token that came over a connection, for a key of a database.
fn redeemed(worker: &Rc<Worker>, (connection, database): (u64, u8), name: &[u8], token: Generation, written: Written) {
    if written == Written::Unchanged {
        worker.metrics().late_fill(worker.policy().find(name));
    }
    worker.aside().run(worker, |desk, now, effects| {
        desk.redeemed(now, connection, u32::from(database), name, token, written, effects);
    });
}

/// Takes several questions: the session's next command is read behind them. Without `known` the client's token does not tell which tags were
/// invalidated since.
fn fill_with_tags(session: &Rc<Session>, fill: &Fill<'_>, known: Option<(Rule, Moment)>, ttl_ms: u64, copy_ms: u64) -> Flow {
    let (generation, name) = (fill.token.generation, fill.key.to_vec());
    let given = known.map(|(lease, moment)| Given {
        name: name.clone(),
        generation,
        moment,
        value: fill.value.to_vec(),
        ttl_ms,
        copy_ms,
        tags: fill.tags.clone(),
        lease,
    });
    let (session, lane, place) = (session.clone(), session.lane(), session.take_place());
    session.hold();
    tokio::task::spawn_local(async move {
        let worker = session.worker();
        let stored = match &given {
            Some(given) => given::store(worker, lane, given).await,
            None => Ok(false),
        };
        let written = match stored {
            Ok(true) => Written::Stored,
            Ok(false) => Written::Unchanged,
            Err(_) => Written::Failed,
        };
        session.answer(place, |out| match &stored {
            Ok(true) => encode::status(out, "OK"),
            Ok(false) => encode::null(out, session.protocol()),
            Err(text) => encode::error(out, text),
        });
        redeemed(worker, (session.id(), lane.database), &name, generation, written);
        session.release();
        worker.flush_dirty();
    });
    Flow::Continue
}

fn submit(session: &Rc<Session>, key: &[u8], wire: &[u8], sink: Sink, retry: Retry) -> Flow {
    let worker = session.worker();
    let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
    let pending = Pending::new(sink, slot, retry, session.lane(), worker.now());
    if worker.submit(&[wire], pending) { Flow::Continue } else { Flow::Wait }
}
