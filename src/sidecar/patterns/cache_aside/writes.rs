//! Writes that may be fills: SET and its kin.

use std::rc::Rc;

use smallvec::SmallVec;

use super::{Element, scripts};
use crate::sidecar::commands::{CommandSpec, Effect as Change, Ttl};
use crate::sidecar::dispatch::Request;
use crate::sidecar::engine::lease::{Effect, Millis, Verdict, Written};
use crate::sidecar::engine::ttl;
use crate::sidecar::resp::{CommandArgs, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots::Companion;
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

/// A script takes an MSET of so many keys; a larger one is never a fill.
const MOST_KEYS: usize = 1000;

/// Options of SET whose answer depends on what was there before.
const ASKING_OPTIONS: [&[u8]; 4] = [b"NX", b"XX", b"GET", b"KEEPTTL"];

/// Where the value is among the arguments of a command that may fill its one key.
pub fn value_at(name: &str) -> Option<usize> {
    match name {
        "set" | "setnx" | "getset" => Some(2),
        "setex" | "psetex" => Some(3),
        _ => None,
    }
}

/// What a write is, key by key.
pub struct Judged {
    /// For each key that has companions: where it is among the arguments, where its value is, and its verdict.
    keys: SmallVec<[(usize, usize, Verdict); 1]>,
    /// Whether a script can carry it out, which tells what became of it.
    scripted: bool,
    /// For after it has been sent.
    effects: Vec<Effect<Element>>,
}

/// Judges a write of keys that may be outstanding. `None`: it is an update, and nobody waits for it.
#[inline]
pub fn judge(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) -> Option<Judged> {
    weigh(session, spec, args, Carried::Out)
}

/// Whether a write that is judged is about to be carried out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Carried {
    /// It is: one load is over.
    Out,
    /// It may never be (a transaction may be given up), or it will not be known: the misses that it meets stay outstanding.
    Perhaps,
}

fn weigh(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>, carried: Carried) -> Option<Judged> {
    let single = value_at(spec.name);
    if single.is_none() && !matches!(spec.name, "mset" | "msetnx") {
        return None;
    }
    let worker = session.worker();
    let policy = worker.policy();
    if !policy.has_leases() {
        return None;
    }
    let database = u32::from(session.lane().database);
    // Nor is there a script for an MSET that lacks a value.
    let scripted = single.is_some() || (args.len() % 2 == 1 && args.len() / 2 <= MOST_KEYS);
    let carried = if scripted { carried } else { Carried::Perhaps };
    let mut judged = Judged { keys: SmallVec::new(), scripted, effects: Vec::new() };
    let (step, value_at) = single.map_or((2, 2), |at| (usize::MAX, at));
    for at in (1..args.len()).step_by(step) {
        let Some(key) = args.get(at) else { break };
        let rule = policy.find(key);
        if policy.leases(rule) {
            let mut desk = worker.aside().desk.borrow_mut();
            let verdict = match carried {
                Carried::Out => desk.write(worker.now(), session.id(), database, key, &mut judged.effects),
                Carried::Perhaps => desk.weigh(worker.now(), session.id(), database, key),
            };
            judged.keys.push((at, at + value_at - 1, verdict));
        } else if policy.loads(rule) {
            judged.keys.push((at, at + value_at - 1, Verdict::Update));
        }
    }
    let is_plain = judged.effects.is_empty() && judged.keys.iter().all(|(.., verdict)| *verdict == Verdict::Update);
    (!is_plain).then_some(judged)
}

impl Judged {
    /// Whether it goes as a script.
    pub fn is_fill(&self) -> bool {
        self.scripted && self.needs_care()
    }

    /// Whether any key may not simply keep what is written.
    pub fn needs_care(&self) -> bool {
        self.keys.iter().any(|(.., verdict)| *verdict != Verdict::Update)
    }

    /// Whether the script may be sent twice. A fill that comes late removes its key, whoever has written it since; once the first has been
    /// carried out, so does the second. Only what tells in its answer what was there before could be answered otherwise.
    pub fn may_be_repeated(&self, spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
        let answers_ok = match spec.name {
            "set" => args.iter().skip(3).all(|arg| !ASKING_OPTIONS.iter().any(|option| arg.eq_ignore_ascii_case(option))),
            "setex" | "psetex" => true,
            _ => false,
        };
        answers_ok && self.is_fill() && self.keys.iter().all(|(.., verdict)| *verdict != Verdict::Update)
    }

    /// Appends the script. `queued` is the command, and behind it what sees to its TTLs. `None`: there is no such script.
    pub fn write(&self, args: &CommandArgs<'_>, queued: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let part = |(key, value, verdict): &(usize, usize, Verdict)| {
            Some(scripts::Part { names: scripts::Names::of(args.get(*key)?), verdict: *verdict, value: args.get(*value)? })
        };
        let parts: Vec<scripts::Part<'_>> = self.keys.iter().map(part).collect::<Option<_>>()?;
        scripts::fill(&parts, queued, out)
    }

    /// Appends what removes the keys that may not keep what is written, behind a write that is no script. How many commands.
    pub fn write_removal(&self, args: &CommandArgs<'_>, out: &mut Vec<u8>) -> u32 {
        let is_doubtful = |(.., verdict): &&(usize, usize, Verdict)| *verdict != Verdict::Update;
        let doubtful: Vec<&[u8]> = self.keys.iter().filter(is_doubtful).filter_map(|(key, ..)| args.get(*key)).collect();
        if doubtful.is_empty() {
            return 0;
        }
        encode::array(out, 1 + 2 * doubtful.len());
        encode::bulk(out, b"UNLINK");
        for key in doubtful {
            encode::bulk(out, key);
            // The copy that was written beside it, too: it would be served at the next miss.
            encode::bulk(out, &Companion::Stale.name(key));
        }
        1
    }

    /// Who waits for the script's answer.
    pub fn sink(&self, session: &Rc<Session>, args: &CommandArgs<'_>, sink: Sink) -> Sink {
        let key = |(key, _, verdict): &(usize, usize, Verdict)| Some((args.get(*key)?.to_vec(), *verdict));
        let keys = self.keys.iter().filter_map(key).collect();
        Sink::Fill(Box::new(Fill { sink, connection: session.id(), database: u32::from(session.lane().database), keys }))
    }

    /// The write has been sent.
    pub fn sent(self, worker: &Rc<Worker>) {
        worker.aside().carry_out(worker, self.effects);
    }
}

/// A write that went as a script: the first element of its answer is the client's.
#[derive(Debug)]
pub struct Fill {
    /// Who waits for it.
    pub sink: Sink,
    connection: u64,
    database: u32,
    keys: SmallVec<[(Vec<u8>, Verdict); 1]>,
}

impl Fill {
    /// Hands over the answer.
    pub fn finish(self, worker: &Rc<Worker>, answer: Answer<'_>) {
        let parsed = match answer {
            Answer::Reply(bytes) => scripts::filled(bytes),
            Answer::Failed(_) => None,
        };
        let written = match parsed {
            Some((own, written)) => {
                self.sink.deliver(worker, Answer::Reply(own));
                written
            }
            None => {
                self.sink.deliver(worker, answer);
                // An error reply says that nothing was written; without a reply nobody knows.
                let written = if matches!(answer, Answer::Reply(_)) { Written::Unchanged } else { Written::Failed };
                SmallVec::from_elem(written, self.keys.len())
            }
        };
        let policy = worker.policy();
        for ((key, verdict), written) in self.keys.iter().zip(written) {
            if *verdict == Verdict::Update {
                continue;
            }
            if written == Written::Removed {
                let (rule, metrics) = (policy.find(key), worker.metrics());
                match verdict {
                    Verdict::Ambiguous(doubt) => metrics.ambiguous_fill(rule, *doubt),
                    _ => metrics.late_fill(rule),
                }
            }
            worker.aside().run(worker, |desk, now, effects| {
                desk.wrote(now, self.connection, self.database, key, written, effects);
            });
        }
    }
}

/// Judges a write that is no command of its own: one in a client's transaction, or too long to be held. Appends what must follow
/// it, so that nothing doubtful stays. How many commands.
pub fn guard(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>, out: &mut Vec<u8>) -> u32 {
    weigh(session, spec, args, Carried::Perhaps).map_or(0, |judged| judged.write_removal(args, out))
}

/// A write of covered keys is on its way: what it says of when they expire, for those that are loaded anew before. `life`: of its
/// only key, where that is known.
pub fn note_life(worker: &Worker, database: u8, spec: &CommandSpec, args: &CommandArgs<'_>, life: Option<Millis>) {
    let (policy, keeps) = (worker.policy(), matches!(spec.ttl, Ttl::Keeps | Ttl::Creates));
    for at in spec.keys(args).unwrap_or_default() {
        let ends = ttl::changes(at.effect) && !(keeps && at.effect != Change::Delete);
        let Some(key) = args.get(at.index as usize).filter(|_| ends) else { continue };
        if policy.early_expiry(policy.find(key)).is_some() {
            worker.aside().note_end(database, key, life, worker.now());
        }
    }
}

/// Whether a write of this request's key would be a fill, or doubtful: then it is better held whole.
pub fn may_fill(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
    let (worker, database) = (session.worker(), u32::from(session.lane().database));
    let key = value_at(spec.name).and_then(|_| args.get(1));
    key.is_some_and(|key| worker.aside().desk.borrow_mut().is_outstanding(worker.now(), database, key))
}

/// Whether a SET of the key may be something else than an update.
pub fn is_outstanding(worker: &Worker, database: u32, key: &[u8]) -> bool {
    worker.aside().desk.borrow_mut().is_outstanding(worker.now(), database, key)
}

/// As [`judge`], of a request.
pub fn judge_request(session: &Rc<Session>, request: &Request<'_>) -> Option<Judged> {
    judge(session, request.spec, &request.args)
}
