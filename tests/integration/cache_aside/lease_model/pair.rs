//! A real server and the model beside it: each step is taken by both, and what they answer and hold is compared.
//!
//! Their clocks differ by what was passed over. The model's moment is the one before the step, so that its ends may be earlier than
//! the server's by as long as the step took; no step is taken within [`MARGIN_MS`] of any end, so that nothing is decided by that.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use larder::sidecar::dispatch::write_invalidation;
use larder::sidecar::engine::lease::model::{Condition, Kept, Lease, Set, Slot};
use larder::sidecar::engine::lease::{Begun, Doubt, Generation, Millis, Mode, Rule, Token, Verdict, Written};
use larder::sidecar::patterns::cache_aside::recent::Recent;
use larder::sidecar::patterns::cache_aside::scripts::{self, Names};
use larder::sidecar::resp::reply;
use larder::sidecar::slots::Companion;

use super::super::{ok, scripts::write as reply_bytes};
use super::commands::{self, COPY_MS, DEFAULT_MS, text};
use super::server::{Done, Found, Server, companion, of_another_run};
use super::steps::{Ask, Foreign, Form, KEYS, OTHER, Removal, Right, Step};
use crate::support::resp::{Value, encode, read_value};

const LEASE_MS: Millis = 60_000;
const MARGIN_MS: Millis = 20_000;
/// Clocks show whole milliseconds, and a reply may be read in the next.
const ROUNDING_MS: Millis = 2;

type Outcome = Result<(), String>;

pub struct Pair {
    server: Server,
    slots: [Slot<String>; KEYS.len()],
    /// By how much the model's clock is ahead of the server's.
    ahead: Millis,
    /// What the model calls a generation of the server's, and the other way round.
    models: HashMap<u64, u64>,
    servers: HashMap<u64, u64>,
    /// The generations of each key, oldest first: the server's and the model's.
    generations: [Vec<(Generation, Generation)>; KEYS.len()],
    /// What happened at all.
    pub met: BTreeSet<String>,
}

impl Pair {
    pub fn new(server: Server) -> Self {
        Self {
            server,
            slots: Default::default(),
            ahead: 0,
            models: HashMap::new(),
            servers: HashMap::new(),
            generations: Default::default(),
            met: BTreeSet::new(),
        }
    }

    /// Takes steps, from nothing. An error says where the two differ.
    pub fn play(&mut self, steps: &[Step]) -> Outcome {
        self.server.clear();
        (self.slots, self.ahead, self.generations) = Default::default();
        self.models.clear();
        self.servers.clear();
        for (at, step) in steps.iter().enumerate() {
            let before = self.slots.clone();
            self.step(step).map_err(|text| format!("step {at}, {step:?}, after {before:#?}:\n{text}"))?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Outcome {
        self.keep_clear_of_ends()?;
        let before = self.slots.clone();
        let done = match *step {
            Step::Begin { key, taker, ask, copy } => self.begin(key, taker, ask, copy)?,
            Step::Write { key, form, value, span, right } => self.write(key, form, value, span, right)?,
            Step::Many { only_missing, other, values, rights } => self.many(only_missing, other, values, rights)?,
            Step::FillIf { key, older, value, span, copy } => self.fill_if(key, older, value, span, copy)?,
            Step::Release { key, taker } => self.release(key, taker)?,
            Step::Remove { key, by } => self.remove(key, by)?,
            Step::Foreign { key, what } => self.foreign(key, what),
            Step::Pass { span } => self.pass(span),
        };
        for (slot, before) in self.slots.iter_mut().zip(&before) {
            self.server.broken.in_the_model(step, before, slot);
        }
        self.note(step, &before);
        self.compare(step, &done)
    }

    /// Lets time pass until nothing ends soon.
    fn keep_clear_of_ends(&mut self) -> Outcome {
        for _ in 0..100 {
            let now = self.server.now + self.ahead;
            let mut ends = self.slots.iter().flat_map(|slot| {
                let kept = [&slot.value, &slot.stale].map(|kept| kept.as_ref().map(|kept| kept.until));
                let lease = slot.lease.as_ref().map(|lease| [lease.until, lease.record_until]);
                kept.into_iter().flatten().chain(lease.into_iter().flatten())
            });
            if !ends.any(|end| (now..now + MARGIN_MS).contains(&end)) {
                return Ok(());
            }
            let done = self.pass(MARGIN_MS + 5_000);
            self.compare(&Step::Pass { span: 0 }, &done)?;
        }
        panic!("something always ends: {:#?}", self.slots);
    }

    fn pass(&mut self, span: Millis) -> Done {
        self.ahead += span;
        self.server.pass(span)
    }

    fn begin(&mut self, key: usize, taker: u64, ask: Ask, copy: bool) -> Result<Done, String> {
        let rule = Rule { stale: copy, ..Rule::new(0, LEASE_MS, 1_000) };
        let now = self.server.now + self.ahead;
        let left = self.slots[key].value.as_ref().map_or(0, |kept| kept.until.saturating_sub(now));
        let mode = match ask {
            Ask::Miss => Mode::Miss,
            Ask::Early => Mode::Early { left: left + MARGIN_MS / 2 },
            Ask::TooEarly => Mode::Early { left: left.saturating_sub(MARGIN_MS / 2) },
        };
        // The model makes a generation of the taker and the time in milliseconds, the script of one in microseconds.
        self.server.wait_for_the_next_moment();
        let mut wire = Vec::new();
        scripts::begin(&names(key), taker, mode, &rule, &mut wire);
        let done = self.server.run(&wire, 1);
        let by_model = self.slots[key].begin(done.before + self.ahead, self.server.run, taker, mode, &rule);
        let by_server = readable(scripts::begun(&reply_bytes(&done.replies[0]), taker)?);
        self.met.insert(format!("{} {}", word(&by_model), if mode == Mode::Miss { "at a miss" } else { "early" }));
        let time = done.after - done.before + ROUNDING_MS;
        self.compare_begun(key, by_server, by_model, time)?;
        Ok(done)
    }

    fn write(&mut self, key: usize, form: Form, value: u8, span: Millis, right: Right) -> Result<Done, String> {
        let words = form.words(KEYS[key], value, span);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (by_server, by_model) = self.verdicts(key, right);
        let (wire, replies) = commands::sent(&words, &[(1, form.value_at(&words), by_server)]);
        let done = self.server.run(&wire, replies);
        let (now, run, slot) = (done.before + self.ahead, self.server.run, &mut self.slots[key]);
        let before = slot.value.clone().filter(|kept| now < kept.until);
        let set = form.set(value, span, before.as_ref().map(|kept| kept.until - now));
        let is_met = is_met(set.condition, before.is_some());
        let answer = if right == Right::Update {
            slot.update(now, &set);
            executed(&done.replies)?
        } else {
            let by_model = slot.fill(now, run, by_model, &set);
            let (answer, by_server) = filled(&done.replies[0], 1)?;
            same("written", by_server[0], by_model)?;
            self.met.insert(format!(
                "{by_model:?} {}",
                if set.condition == Condition::Always { "as a SET" } else { "on a condition" }
            ));
            answer
        };
        let before = before.map(|kept| kept.value);
        if !form.is_answer(&answer, before.as_deref(), is_met) {
            return Err(format!("{words:?} is answered {answer:?}"));
        }
        Ok(done)
    }

    fn many(&mut self, only_missing: bool, other: bool, values: [u8; 2], rights: [Right; 2]) -> Result<Done, String> {
        let values = values.map(text);
        let name = if only_missing { "MSETNX" } else { "MSET" };
        let words = [name, KEYS[0], values[0].as_str(), KEYS[1], values[1].as_str(), OTHER, "by the way"];
        let verdicts = [0, 1].map(|key| self.verdicts(key, rights[key]));
        let (sent, replies) = commands::sent(&words, &[(1, 2, verdicts[0].0), (3, 4, verdicts[1].0)]);
        let first = if other { encode(&["SET", OTHER, "there"]) } else { encode(&["DEL", OTHER]) };
        let done = self.server.run(&[first, sent].concat(), replies + 1);
        let (now, run) = (done.before + self.ahead, self.server.run);
        self.slots.iter_mut().for_each(|slot| slot.expire(now));
        let is_there = [0, 1].map(|key| self.slots[key].value.is_some());
        let is_met = !only_missing || is_there == [false, false] && !other;
        let sets = [0, 1].map(|key| Set {
            value: values[key].clone(),
            condition: if is_met { Condition::Always } else { commands::unmet(is_there[key]) },
            ttl: DEFAULT_MS,
            stale_ttl: 0,
        });
        let answer = if rights == [Right::Update; 2] {
            for (slot, set) in self.slots.iter_mut().zip(&sets) {
                slot.update(now, set);
            }
            executed(&done.replies[1..])?
        } else {
            let by_model = [0, 1].map(|key| self.slots[key].fill(now, run, verdicts[key].1, &sets[key]));
            let (answer, by_server) = filled(&done.replies[1], 2)?;
            same("written", &by_server[..], &by_model[..])?;
            self.met.insert(format!("many, {}", if is_met { "stored" } else { "refused" }));
            answer
        };
        let expected = if only_missing { Value::Int(i64::from(is_met)) } else { ok() };
        same("the answer", answer, expected)?;
        Ok(done)
    }

    fn fill_if(&mut self, key: usize, older: usize, value: u8, span: Millis, copy: bool) -> Result<Done, String> {
        let (by_server, by_model) = self.generation(key, older);
        let (value, mut wire) = (text(value), Vec::new());
        let copy_ms = if copy { span + COPY_MS } else { 0 };
        scripts::fill_if(&names(key), by_server, value.as_bytes(), span, copy_ms, &mut wire);
        let done = self.server.run(&wire, 1);
        let stale_ttl = if copy { COPY_MS } else { 0 };
        let set = Set { value, condition: Condition::Always, ttl: span, stale_ttl };
        let stored = self.slots[key].fill_if(done.before + self.ahead, self.server.run, by_model, &set);
        self.met.insert(format!("FILL_IF: {stored}"));
        same("the answer", &done.replies[0], &if stored { ok() } else { Value::Nil })?;
        Ok(done)
    }

    fn release(&mut self, key: usize, taker: u64) -> Result<Done, String> {
        // Of the token the taker alone counts.
        let token = Token { generation: Generation { random: 0, run: 0 }, taker };
        let mut wire = Vec::new();
        scripts::release(&names(key), &token, &mut wire);
        let done = self.server.run(&wire, 1);
        let released = self.slots[key].release(done.before + self.ahead, token);
        self.met.insert(format!("RELEASE: {released}"));
        same("the answer", &done.replies[0], &Value::Int(i64::from(released)))?;
        Ok(done)
    }

    fn remove(&mut self, key: usize, by: Removal) -> Result<Done, String> {
        let name = KEYS[key];
        let (wire, replies) = match by {
            Removal::Del => commands::sent(&["DEL", name], &[]),
            Removal::Unlink => commands::sent(&["UNLINK", name], &[]),
            Removal::Invalidate => {
                let mut wire = Vec::new();
                write_invalidation(name.as_bytes(), &mut wire);
                (wire, 4)
            }
            Removal::Failover => {
                let recent = Recent::default();
                recent.note(0, 0, name.as_bytes());
                (recent.deletions(false, |_| true).remove(0).wire, 1)
            }
        };
        let done = self.server.run(&wire, replies);
        let was_there = self.slots[key].delete(done.before + self.ahead);
        if by != Removal::Failover {
            same("the answer", executed(&done.replies)?, Value::Int(i64::from(was_there)))?;
        }
        Ok(done)
    }

    fn foreign(&mut self, key: usize, what: Foreign) -> Done {
        let name = |companion_of| companion(companion_of, key);
        let lease = self.server.keys[key].lease.clone().map(|(text, _)| of_another_run(&text));
        let wire = match what {
            Foreign::Set { value, span } => encode(&["SET", KEYS[key], &text(value), "PX", &span.to_string()]),
            Foreign::Del => encode(&["DEL", KEYS[key]]),
            Foreign::LeaveCopy { value } => {
                let set = [
                    b"SET".to_vec(),
                    name(Companion::Stale),
                    text(value).into_bytes(),
                    b"PX".to_vec(),
                    (2 * DEFAULT_MS).to_string().into_bytes(),
                ];
                [encode(&["DEL", KEYS[key]]), encode(&set)].concat()
            }
            Foreign::LoseLease => encode(&[b"DEL".to_vec(), name(Companion::Lease)]),
            Foreign::LoseCopy => encode(&[b"DEL".to_vec(), name(Companion::Stale)]),
            Foreign::NoteAbsence => encode(&[b"SET".to_vec(), name(Companion::Negative), Vec::new()]),
            Foreign::LoseAbsence => encode(&[b"DEL".to_vec(), name(Companion::Negative)]),
            Foreign::OtherRun => {
                let text = lease.unwrap_or_default().into_bytes();
                encode(&[b"SET".to_vec(), name(Companion::Lease), text, b"XX".to_vec(), b"KEEPTTL".to_vec()])
            }
        };
        let done = self.server.run(&wire, if matches!(what, Foreign::LeaveCopy { .. }) { 2 } else { 1 });
        let slot = &mut self.slots[key];
        match what {
            Foreign::Set { value, span } => {
                let until = done.before + self.ahead + span;
                slot.value = Some(Kept { value: text(value), until });
            }
            Foreign::Del => slot.value = None,
            Foreign::LeaveCopy { value } => {
                slot.value = None;
                slot.stale = Some(Kept { value: text(value), until: done.before + self.ahead + 2 * DEFAULT_MS });
            }
            Foreign::LoseLease => slot.lease = None,
            Foreign::LoseCopy => slot.stale = None,
            Foreign::NoteAbsence => slot.negative = true,
            Foreign::LoseAbsence => slot.negative = false,
            Foreign::OtherRun => {
                if let Some(lease) = &mut slot.lease {
                    lease.generation.run = !lease.generation.run;
                }
            }
        }
        done
    }

    /// A generation of the server's, and what the model calls it.
    fn generation(&self, key: usize, older: usize) -> (Generation, Generation) {
        let never = Generation { random: 0xdead, run: self.server.run };
        self.generations[key].iter().rev().nth(older).copied().unwrap_or((never, never))
    }

    fn verdicts(&self, key: usize, right: Right) -> (Verdict, Verdict) {
        match right {
            Right::Update => (Verdict::Update, Verdict::Update),
            Right::Ambiguous => (Verdict::Ambiguous(Doubt::Mixed), Verdict::Ambiguous(Doubt::Mixed)),
            Right::Under(older) => {
                let (by_server, by_model) = self.generation(key, older);
                (Verdict::Fill(by_server), Verdict::Fill(by_model))
            }
        }
    }

    /// Whether both mean the same generation. What neither has seen yet is noted.
    fn compare_generations(&mut self, key: usize, by_server: Generation, by_model: Generation) -> Outcome {
        same("the run", by_server.run, by_model.run)?;
        let model = *self.models.entry(by_server.random).or_insert(by_model.random);
        let server = *self.servers.entry(by_model.random).or_insert(by_server.random);
        if (model, server) != (by_model.random, by_server.random) {
            return Err(format!("the server goes on under {by_server}, the model under {by_model}"));
        }
        if !self.generations[key].contains(&(by_server, by_model)) {
            self.generations[key].push((by_server, by_model));
        }
        Ok(())
    }

    fn compare_begun(&mut self, key: usize, by_server: Begun<String>, by_model: Begun<String>, time: Millis) -> Outcome {
        let differ = format!("the server says {by_server:?}, the model {by_model:?}");
        let generations = match (by_server, by_model) {
            (Begun::Leased { token, stale }, Begun::Leased { token: other, stale: other_copy })
                if (token.taker, &stale) == (other.taker, &other_copy) =>
            {
                (token.generation, other.generation)
            }
            (Begun::Shared { generation }, Begun::Shared { generation: other }) => (generation, other),
            (
                Begun::Busy { generation, taker, stale, remaining },
                Begun::Busy { generation: other, taker: other_taker, stale: other_copy, remaining: longer },
            ) if (taker, &stale) == (other_taker, &other_copy) && is_within(remaining, longer, time) => (generation, other),
            (by_server, by_model) if by_server == by_model => return Ok(()),
            _ => return Err(differ),
        };
        self.compare_generations(key, generations.0, generations.1)
    }

    /// Whether both hold the same, and have told the same.
    fn compare(&mut self, step: &Step, done: &Done) -> Outcome {
        for (key, name) in KEYS.iter().enumerate() {
            self.slots[key].expire(done.after + self.ahead);
            let announced = std::mem::take(&mut self.slots[key].announced);
            if announced {
                self.met.insert(format!("an end announced by {}", step.kind()));
            }
            same("announced", done.announced.contains(&key), announced)?;
            let found = self.server.keys[key].clone();
            let differ = |text: String| format!("the server has {found:#?}\n{name}: {text}");
            self.compare_slot(key, &found, done.after - done.before + ROUNDING_MS).map_err(differ)?;
        }
        Ok(())
    }

    fn compare_slot(&mut self, key: usize, found: &Found, time: Millis) -> Outcome {
        let (ahead, slot) = (self.ahead, &mut self.slots[key]);
        same("a negative entry", found.negative, slot.negative)?;
        compare_kept("the value", found.value.as_ref(), slot.value.as_mut(), ahead, time)?;
        compare_kept("the stale copy", found.copy.as_ref(), slot.stale.as_mut(), ahead, time)?;
        same("a lease", found.lease.is_some(), slot.lease.is_some())?;
        let (Some((text, end)), Some(lease)) = (&found.lease, &mut slot.lease) else { return Ok(()) };
        let words: Vec<&str> = text.split(' ').collect();
        let [generation, held, leads, state, taker, awaited] = words[..] else { return Err(format!("no lease: {text}")) };
        same("leads", leads, lease.leads.to_string())?;
        same("the state", state, if lease.hit_for_miss { "s" } else { "l" })?;
        same("the taker", taker, format!("{:016x}", lease.taker))?;
        same("waited for", awaited, if lease.waited_for { "1" } else { "0" })?;
        compare_end("the lease's record", *end + ahead, &mut lease.record_until, time)?;
        let held: Millis = held.parse().map_err(|_| format!("no lease: {text}"))?;
        compare_end("the lease", if held == 0 { 0 } else { held + ahead }, &mut lease.until, time)?;
        let by_model = lease.generation;
        let by_server = Generation::parse(generation.as_bytes()).ok_or("no generation")?;
        self.compare_generations(key, by_server, by_model)
    }

    /// Notes what became of leases.
    fn note(&mut self, step: &Step, before: &[Slot<String>]) {
        for (slot, before) in self.slots.iter().zip(before) {
            let (Some(lease), Some(before)) = (&slot.lease, &before.lease) else { continue };
            let is_of = |kind: &str| step.kind() == kind;
            let goes_on = |other: &Lease| other.generation == lease.generation && other.taker != lease.taker;
            if is_of("BEGIN") && goes_on(before) {
                self.met.insert(if before.until == 0 { "taken once given back" } else { "taken once over" }.to_owned());
            }
            if is_of("FILL") && before.generation != lease.generation {
                self.met.insert("held on under another generation".to_owned());
            }
        }
    }
}

fn names(key: usize) -> Names {
    Names::of(KEYS[key].as_bytes())
}

fn is_met(condition: Condition, is_there: bool) -> bool {
    match condition {
        Condition::Always => true,
        Condition::Missing => !is_there,
        Condition::Present => is_there,
    }
}

/// What a client gets from a transaction: the first element of EXEC's reply.
fn executed(replies: &[Value]) -> Result<Value, String> {
    match replies.last() {
        Some(Value::Array(items)) => Ok(items[0].clone()),
        other => Err(format!("no transaction's reply: {other:?}")),
    }
}

/// What a client gets from a script, and what was written. An error is the client's.
fn filled(reply: &Value, keys: usize) -> Result<(Value, Vec<Written>), String> {
    if reply.is_error() {
        return Ok((reply.clone(), vec![Written::Unchanged; keys]));
    }
    let bytes = reply_bytes(reply);
    let (own, written) = scripts::filled(&bytes).ok_or_else(|| format!("no fill's answer: {reply:?}"))?;
    Ok((read_value(&mut &own[..]).map_err(|error| error.to_string())?, written.to_vec()))
}

/// A BEGIN's answer, with the texts of values in it.
fn readable(begun: Begun<Rc<[u8]>>) -> Begun<String> {
    let text = |element: Rc<[u8]>| String::from_utf8_lossy(reply::text(&element).unwrap_or(&element)).into_owned();
    match begun {
        Begun::Value(value) => Begun::Value(text(value)),
        Begun::Other => Begun::Other,
        Begun::Fresh => Begun::Fresh,
        Begun::Leased { token, stale } => Begun::Leased { token, stale: stale.map(text) },
        Begun::Shared { generation } => Begun::Shared { generation },
        Begun::Busy { generation, taker, stale, remaining } => {
            Begun::Busy { generation, taker, stale: stale.map(text), remaining }
        }
        Begun::Failed => Begun::Failed,
    }
}

fn word(begun: &Begun<String>) -> &'static str {
    match begun {
        Begun::Value(_) => "a value",
        Begun::Other | Begun::Failed => "what is never met",
        Begun::Fresh => "fresh",
        Begun::Leased { stale: Some(_), .. } => "leased, with a copy,",
        Begun::Leased { .. } => "leased",
        Begun::Shared { .. } => "shared",
        Begun::Busy { stale: Some(_), .. } => "busy, with a copy,",
        Begun::Busy { .. } => "busy",
    }
}

fn compare_kept(
    what: &str,
    found: Option<&(String, Millis)>,
    kept: Option<&mut Kept<String>>,
    ahead: Millis,
    time: Millis,
) -> Outcome {
    same(what, found.map(|(value, _)| value), kept.as_ref().map(|kept| &kept.value))?;
    let (Some((_, end)), Some(kept)) = (found, kept) else { return Ok(()) };
    compare_end(what, end + ahead, &mut kept.until, time)
}

/// Whether two ends are the same but for how long the step took. The model takes the server's.
fn compare_end(what: &str, by_server: Millis, by_model: &mut Millis, time: Millis) -> Outcome {
    if !is_within(*by_model, by_server, time) {
        return Err(format!("{what} ends at {by_server} with the server, at {by_model} with the model"));
    }
    *by_model = by_server;
    Ok(())
}

/// Whether `later` is that, by `time` at most, or the same but for rounding.
fn is_within(earlier: Millis, later: Millis, time: Millis) -> bool {
    earlier <= later + ROUNDING_MS && later <= earlier + time
}

fn same<A: PartialEq<B> + std::fmt::Debug, B: std::fmt::Debug>(what: &str, by_server: A, by_model: B) -> Outcome {
    if by_server == by_model { Ok(()) } else { Err(format!("{what}: the server has {by_server:?}, the model {by_model:?}")) }
}
