//! Reads that found nothing, or what will soon be gone, on their way to an answer.

use std::rc::Rc;

use smallvec::SmallVec;

use super::super::read_through::Table;
use super::tokens::{self, Fetch};
use super::{Aside, Element, rule_of};
use crate::sidecar::engine::early::{Advice, Life};
use crate::sidecar::engine::lease::{Answer, Asker, Millis, Missing, Name, Reader, Reply, Rule, Why, key_hash};
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::queue::{Pending, Recovered, Retry};
use crate::sidecar::upstream::sink::{self, OnReply, Sink};
use crate::sidecar::versions;
use crate::sidecar::worker::Worker;

/// A read that the desk keeps.
pub(super) struct Read {
    pub(super) session: Rc<Session>,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    /// GET of a missing key.
    One(RuleId),
    /// GET of a key that will soon be gone. With its value.
    Early(RuleId, Vec<u8>),
    /// LARDER.FETCH.
    Fetch(RuleId, Fetch),
    /// The missing keys of an MGET.
    Many(Rc<Table>, Vec<Wanted>),
}

/// A key that an MGET does not find.
pub struct Wanted {
    /// The key.
    pub key: Vec<u8>,
    /// Its rule.
    pub rule: RuleId,
    /// Where it stands among the command's keys: a key may be named twice.
    pub places: SmallVec<[usize; 1]>,
}

/// A GET of one key.
struct Get {
    session: Rc<Session>,
    sequence: u32,
    database: u32,
    key: Vec<u8>,
}

impl Get {
    /// `None` where nobody's GET is answered, which does not happen.
    fn parse(recovered: Recovered) -> Option<Self> {
        let Recovered { pending, bytes, .. } = recovered;
        let Sink::Client { session, sequence, .. } = pending.sink else { return None };
        let mut scanner = CommandScanner::default();
        let key = match scanner.scan(&bytes) {
            Ok(CommandScan::Complete { .. }) => CommandArgs::new(&bytes, scanner.ranges()).get(1).unwrap_or_default().to_vec(),
            _ => Vec::new(),
        };
        Some(Self { session, sequence, database: u32::from(pending.lane.database), key })
    }

    fn asker(&self) -> Asker {
        Asker { connection: self.session.id(), place: self.sequence }
    }

    fn reader(&self, overtaken: bool) -> Reader {
        Reader { asker: self.asker(), database: self.database, overtaken, shared: self.session.is_shared() }
    }
}

/// A GET did not find its key. `overtaken`: its client has sent more commands, not only the same again.
pub fn on_miss(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, found: &[u8], overtaken: bool) {
    worker.metrics().count_read(rule, true);
    let Some(get) = Get::parse(recovered) else { return };
    let overtaken = overtaken || get.session.is_leaving();
    miss(worker, get, found, |aside, id, get, rule| {
        let missing = Missing { key: &get.key, rule };
        aside.keep(get.asker(), Read { session: get.session.clone(), kind: Kind::One(id) });
        aside.run(worker, |desk, now, effects| desk.read_missed(now, get.reader(overtaken), &[missing], effects));
    });
}

/// A GET cannot be sent, or was lost with its connection: this pod decides alone who loads. `error` is for those whose keys have
/// no leases.
pub fn on_away(worker: &Rc<Worker>, recovered: Recovered, error: &[u8]) {
    let Some(get) = Get::parse(recovered) else { return };
    miss(worker, get, error, |aside, id, get, rule| {
        // Copies are in the cache, too.
        let missing = Missing { key: &get.key, rule: Rule { stale: false, ..rule } };
        let overtaken = get.session.is_leaving() || get.session.count_after(get.sequence) > 0;
        aside.keep(get.asker(), Read { session: get.session.clone(), kind: Kind::One(id) });
        aside.run(worker, |desk, now, effects| desk.cache_away(now, get.reader(overtaken), &[missing], effects));
    });
}

/// Asks the desk, where the rule now in force (it may have changed since the read was sent) has leases and its client watches no
/// keys: transactions have their own way to find out about writes.
fn miss(worker: &Rc<Worker>, get: Get, otherwise: &[u8], ask: impl FnOnce(&Aside, RuleId, &Get, Rule)) {
    if get.session.is_closed() {
        // Nobody would load: the lease is for somebody else.
        return;
    }
    let policy = worker.policy();
    let id = policy.find(&get.key);
    let Some(rule) = rule_of(&policy, id) else {
        return get.session.deliver(get.sequence, otherwise);
    };
    let aside = worker.aside();
    versions::note_missing(worker, get.database, &get.key);
    aside.protocol.set(get.session.protocol());
    if get.session.held().borrow().is_watching() {
        get.session.make_known_to_desk();
        let missing = Missing { key: &get.key, rule };
        aside.run(worker, |desk, now, effects| desk.told_nil(now, get.reader(true), &missing, effects));
        return get.session.deliver(get.sequence, otherwise);
    }
    ask(aside, id, &get, rule);
}

/// What becomes of the reply to a GET that is about to be sent: where its rule refreshes early, and the dice say so, a value asks
/// for the lease. Now and then a PTTL goes along, for keys that are read again and again.
#[inline]
pub fn before_get(session: &Rc<Session>, policy: &ActivePolicy, id: RuleId, key: &[u8], slot: u16) -> OnReply {
    match policy.early_expiry(id) {
        None => OnReply::Lease(id),
        Some(beta) => roll(session, beta, id, key, slot),
    }
}

#[inline]
fn roll(session: &Rc<Session>, beta: f64, id: RuleId, key: &[u8], slot: u16) -> OnReply {
    let worker = session.worker();
    let hash = key_hash(u32::from(session.lane().database), key);
    let reach = || beta * worker.aside().desk.borrow().load_ms(id);
    let advice = worker.aside().early.borrow_mut().advise(hash, worker.now(), reach, || worker.random());
    match advice {
        Advice::Pass => OnReply::Lease(id),
        Advice::Refresh { .. } => OnReply::Early(id),
        Advice::Probe => {
            probe(session, hash, key, slot);
            OnReply::Lease(id)
        }
    }
}

/// Asks how long a key has to live.
fn probe(session: &Session, hash: u64, key: &[u8], slot: u16) {
    let worker = session.worker();
    let mut wire = Vec::new();
    encode::command(&mut wire, &[b"PTTL", key]);
    let sink = Sink::Call(Box::new(move |worker, answer| {
        if let sink::Answer::Reply(bytes) = answer {
            let life = Life::from_pttl(reply::integer(bytes));
            worker.aside().early.borrow_mut().probed(hash, worker.now(), life);
        }
    }));
    worker.submit(&[&wire], Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now()));
}

/// A GET found a value which may soon be gone, or found by then that it is gone already.
pub fn on_early(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, found: &[u8], overtaken: bool) {
    if reply::is_null(found) {
        return on_miss(worker, rule, recovered, found, overtaken);
    }
    worker.metrics().count_read(rule, false);
    let Some(get) = Get::parse(recovered) else { return };
    let policy = worker.policy();
    let id = policy.find(&get.key);
    let hash = key_hash(get.database, &get.key);
    let left = worker.aside().early.borrow().left(hash, worker.now());
    let rule = rule_of(&policy, id).filter(|_| !overtaken && !get.session.has_parked());
    let held = rule.zip(left).is_some_and(|(rule, left)| {
        let (aside, asker) = (worker.aside(), get.asker());
        aside.protocol.set(get.session.protocol());
        aside.keep(asker, Read { session: get.session.clone(), kind: Kind::Early(id, found.to_vec()) });
        let missing = Missing { key: &get.key, rule };
        versions::note_missing(worker, get.database, &get.key);
        let held = aside.run(worker, |desk, now, effects| desk.expires_early(now, asker, get.database, &missing, left, effects));
        if !held {
            aside.let_go(asker);
        }
        aside.early.borrow_mut().silence(hash, worker.now() + rule.lease);
        held
    });
    if !held {
        get.session.deliver(get.sequence, found);
    }
}

/// A transaction told its client that a key is missing: it is never leased, but its client may load now.
pub fn on_nil_told(session: &Rc<Session>, place: u32, key: &[u8]) {
    let worker = session.worker();
    let policy = worker.policy();
    let Some(rule) = rule_of(&policy, policy.find(key)) else { return };
    session.make_known_to_desk();
    let (asker, database) = (Asker { connection: session.id(), place }, u32::from(session.lane().database));
    let reader = Reader { asker, database, overtaken: true, shared: session.is_shared() };
    worker.aside().run(worker, |desk, now, effects| desk.told_nil(now, reader, &Missing { key, rule }, effects));
}

/// A GET found a value, while reads of its client are parked: those of the same key before it need wait no longer.
pub fn on_seen(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, found: &[u8]) {
    worker.metrics().count_read(rule, false);
    let Some(get) = Get::parse(recovered) else { return };
    let (connection, value) = (get.session.id(), Element::from(found));
    worker.aside().run(worker, |desk, now, effects| desk.seen(now, connection, get.database, &get.key, &value, effects));
    get.session.deliver(get.sequence, found);
}

/// Asks for the keys that an MGET does not find. Their replies go into `table`.
pub fn ask_many(worker: &Rc<Worker>, table: Rc<Table>, wanted: Vec<Wanted>) {
    let (place, aside, policy) = (table.place().clone(), worker.aside(), worker.policy());
    let (session, database) = (place.session.clone(), u32::from(place.lane.database));
    aside.protocol.set(session.protocol());
    let (known, unknown): (Vec<_>, Vec<_>) =
        wanted.into_iter().map(|wanted| (rule_of(&policy, wanted.rule), wanted)).partition(|(rule, _)| rule.is_some());
    unknown.iter().for_each(|(_, wanted)| wanted.places.iter().for_each(|place| table.decide(*place, None)));
    let (rules, wanted): (Vec<_>, Vec<Wanted>) = known.into_iter().filter_map(|(rule, wanted)| Some((rule?, wanted))).unzip();
    if wanted.is_empty() {
        return;
    }
    let missing: Vec<(Vec<u8>, _)> = wanted.iter().zip(rules).map(|(wanted, rule)| (wanted.key.clone(), rule)).collect();
    let missing: Vec<Missing<'_>> = missing.iter().map(|(key, rule)| Missing { key, rule: *rule }).collect();
    let asker = Asker { connection: session.id(), place: place.sequence };
    if session.is_closed() {
        return;
    }
    missing.iter().for_each(|missing| versions::note_missing(worker, database, missing.key));
    let overtaken = session.is_leaving() || session.count_after(place.sequence) > 0;
    let reader = Reader { asker, database, overtaken, shared: session.is_shared() };
    if session.held().borrow().is_watching() {
        session.make_known_to_desk();
        for missing in &missing {
            aside.run(worker, |desk, now, effects| desk.told_nil(now, reader, missing, effects));
        }
        return wanted.iter().flat_map(|wanted| &wanted.places).for_each(|place| table.decide(*place, None));
    }
    aside.keep(asker, Read { session, kind: Kind::Many(table, wanted) });
    aside.run(worker, |desk, now, effects| desk.read_missed(now, reader, &missing, effects));
}

impl Aside {
    pub(super) fn keep(&self, asker: Asker, read: Read) {
        read.session.park();
        self.reads.borrow_mut().insert(asker, read);
    }

    fn let_go(&self, asker: Asker) -> Option<Read> {
        let read = self.reads.borrow_mut().remove(&asker)?;
        read.session.unpark();
        Some(read)
    }

    pub(super) fn answer(&self, worker: &Rc<Worker>, asker: Asker, answer: &Answer<Element>) {
        let Some(Read { session, kind }) = self.let_go(asker) else { return };
        match (answer, kind) {
            (answer, Kind::Fetch(rule, fetch)) => {
                match answer {
                    Answer::Replies(replies) => replies.iter().for_each(|reply| count(worker, rule, reply)),
                    Answer::TimedOut { .. } => worker.metrics().wait_timed_out(rule),
                    Answer::CutShort { .. } => worker.metrics().cut_short(rule),
                }
                tokens::decided(worker, &session, asker.place, &fetch, answer);
            }
            (Answer::Replies(replies), Kind::One(rule) | Kind::Early(rule, _)) => {
                replies.iter().for_each(|reply| count(worker, rule, reply));
                match replies.first().and_then(value_of) {
                    Some(value) => session.deliver(asker.place, value),
                    None => session.answer(asker.place, |out| encode::null(out, session.protocol())),
                }
            }
            (Answer::Replies(replies), Kind::Many(table, wanted)) => {
                for (reply, wanted) in replies.iter().zip(wanted) {
                    count(worker, wanted.rule, reply);
                    wanted.places.iter().for_each(|place| table.decide(*place, value_of(reply)));
                }
            }
            (Answer::TimedOut { name, rule, waited }, kind) => {
                worker.metrics().wait_timed_out(*rule);
                fail(&session, asker, kind, &timed_out(worker, name, *rule, *waited));
            }
            (Answer::CutShort { name, rule }, kind) => {
                worker.metrics().cut_short(*rule);
                fail(&session, asker, kind, &cut_short(worker, name, *rule));
            }
        }
    }

    pub(super) fn answer_early(&self, worker: &Rc<Worker>, asker: Asker, refresh: bool) {
        let Some(Read { session, kind: Kind::Early(rule, value) }) = self.let_go(asker) else { return };
        if refresh {
            worker.metrics().early_refresh(rule);
            session.answer(asker.place, |out| encode::null(out, session.protocol()));
        } else {
            session.deliver(asker.place, &value);
        }
    }
}

fn fail(session: &Rc<Session>, asker: Asker, kind: Kind, text: &str) {
    match kind {
        Kind::One(_) | Kind::Early(..) | Kind::Fetch(..) => session.answer(asker.place, |out| encode::error(out, text)),
        Kind::Many(table, wanted) => wanted.iter().flat_map(|wanted| &wanted.places).for_each(|_| table.fail(text)),
    }
}

fn value_of(reply: &Reply<Element>) -> Option<&[u8]> {
    match reply {
        Reply::Nil(_) => None,
        Reply::Value(value) | Reply::Stale(value) => Some(value),
    }
}

fn count(worker: &Rc<Worker>, rule: RuleId, reply: &Reply<Element>) {
    let metrics = worker.metrics();
    if let Reply::Value(_) | Reply::Stale(_) = reply {
        metrics.load_saved(rule);
    }
    match reply {
        Reply::Value(_) => metrics.woken(rule),
        Reply::Stale(_) => metrics.stale(rule),
        Reply::Nil(Why::Lead | Why::LocalLead) => metrics.lease_granted(rule),
        Reply::Nil(Why::Shared) => metrics.hit_for_miss(rule),
        Reply::Nil(Why::Unparked | Why::Passed) => metrics.unparked(rule),
        Reply::Nil(Why::WaitEnd) => metrics.wait_timed_out(rule),
        Reply::Nil(Why::Again | Why::Untracked) => {}
    }
}

/// The error for a read whose wait is over.
fn timed_out(worker: &Worker, name: &Name, rule: RuleId, waited: Millis) -> String {
    let subject = subject(worker, name, rule);
    format!(
        "TRYAGAIN {subject} is being loaded by another client, and {waited} ms were not enough: repeat the read, or raise \
         `stampede.wait`, or have misses passed on then (`atWaitEnd: Miss`)"
    )
}

/// The error for a read that must not wait, and whose connection has its load.
fn cut_short(worker: &Worker, name: &Name, rule: RuleId) -> String {
    let subject = subject(worker, name, rule);
    format!(
        "TRYAGAIN {subject} is being loaded, by a client of this connection too, and other commands were sent behind the read, which must \
         not wait: repeat it, or read over other connections, or have misses passed on then (`atWaitEnd: Miss`)"
    )
}

fn subject(worker: &Worker, name: &Name, rule: RuleId) -> String {
    const SHOWN: usize = 64;
    let key = name.key[..name.key.len().min(SHOWN)].escape_ascii();
    let policy = worker.policy();
    let rule = policy.rule(rule).map_or("", |rule| &rule.name);
    format!("the key `{key}` of rule `{rule}`")
}
