//! Commands over many keys, split over the nodes that hold them, and their one reply.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::lane::Lane;
use super::sink::Answer;
use crate::sidecar::commands::{Gather, Join};
use crate::sidecar::dispatch::own_keys;
use crate::sidecar::exclusive::wait::{removal_text, wait_for_replicas};
use crate::sidecar::patterns::read_through;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;

/// Writes one reply, given those of all parts, errors among them.
pub type Compose = Box<dyn Fn(&[Vec<u8>], &mut Vec<u8>)>;

/// How parts become one reply.
pub enum Assembly {
    /// The parts of a command that was split by slot. For each part, the positions of its keys among the client's.
    Keys(Join, Vec<Vec<u32>>),
    /// The answers of all shards.
    Shards(Gather),
    /// What Larder asks for a client, and how it tells the answers.
    By(Compose),
}

impl fmt::Debug for Assembly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keys(join, _) => f.debug_tuple("Keys").field(join).finish_non_exhaustive(),
            Self::Shards(gather) => f.debug_tuple("Shards").field(gather).finish(),
            Self::By(_) => f.write_str("By"),
        }
    }
}

/// What has to be so before a write is told of.
#[derive(Debug, Clone)]
pub struct Confirm {
    /// Where the client's commands go.
    pub lane: Lane,
    /// The slots whose replicas must have what was done.
    pub slots: Vec<u16>,
    /// For how long other sidecars may go by what they were told before, where that is waited for.
    pub pause: Duration,
}

/// What came of a command's parts.
#[derive(Debug, Clone)]
pub struct Gathered {
    /// The one reply.
    pub whole: Vec<u8>,
    /// The parts' own.
    pub parts: Vec<Vec<u8>>,
}

/// The place where the parts of one client's command meet.
#[derive(Debug)]
pub struct Meeting {
    session: Rc<Session>,
    sequence: u32,
    assembly: Assembly,
    /// Whether a part may have changed something, which is said when another part failed.
    writes: bool,
    /// The client's command and where it was sent, where missing keys of its answer are loaded.
    fill: Option<(Lane, Vec<u8>)>,
    /// Who gets the reply, where that is not the client.
    receiver: RefCell<Option<oneshot::Sender<Gathered>>>,
    /// What is waited for once it was done.
    confirm: Option<Confirm>,
    parts: RefCell<Vec<Option<Vec<u8>>>>,
    left: Cell<usize>,
    /// Whether the session's task waits for each answer.
    watched: Cell<bool>,
}

impl Meeting {
    /// A place for `parts` answers, for the reply at `sequence` of `session`.
    pub fn new(session: Rc<Session>, sequence: u32, assembly: Assembly, writes: bool, parts: usize) -> Rc<Self> {
        Rc::new(Self::build(session, sequence, assembly, writes, None, parts))
    }

    /// As [`Meeting::new`], for writes that are told of when what `confirm` says is so.
    pub fn confirming(session: Rc<Session>, sequence: u32, join: Join, places: Vec<Vec<u32>>, confirm: Confirm) -> Rc<Self> {
        let parts = places.len();
        let meeting = Self::build(session, sequence, Assembly::Keys(join, places), true, None, parts);
        Rc::new(Self { confirm: Some(confirm), ..meeting })
    }

    /// As [`Meeting::new`], for an MGET, or an EXISTS with one key a part, some of whose missing keys are to be loaded;
    /// `command` is the whole of it.
    pub fn filling(session: Rc<Session>, sequence: u32, join: Join, places: Vec<Vec<u32>>, command: &[u8]) -> Rc<Self> {
        let parts = places.len();
        let assembly = Assembly::Keys(join, places);
        let fill = Some((session.lane(), command.to_vec()));
        Rc::new(Self::build(session, sequence, assembly, false, fill, parts))
    }

    fn build(
        session: Rc<Session>,
        sequence: u32,
        assembly: Assembly,
        writes: bool,
        fill: Option<(Lane, Vec<u8>)>,
        parts: usize,
    ) -> Self {
        let empty = (0..parts).map(|_| None).collect();
        Self {
            session,
            sequence,
            assembly,
            writes,
            fill,
            receiver: RefCell::new(None),
            confirm: None,
            parts: RefCell::new(empty),
            left: Cell::new(parts),
            watched: Cell::new(false),
        }
    }

    /// The reply goes to who waits here, who answers the client.
    pub fn divert(&self) -> oneshot::Receiver<Gathered> {
        let (sender, receiver) = oneshot::channel();
        self.receiver.replace(Some(sender));
        receiver
    }

    /// How many parts have no answer.
    pub fn left(&self) -> usize {
        self.left.get()
    }

    /// Has each answer wake the session's task.
    pub fn watch(&self) {
        self.watched.set(true);
    }

    /// The session that waits.
    pub fn session(&self) -> &Rc<Session> {
        &self.session
    }

    /// Takes the answer of the part at `index`; the last one completes the reply.
    pub fn deliver(&self, index: u32, answer: Answer<'_>) {
        let bytes = match answer {
            Answer::Reply(bytes) => bytes.to_vec(),
            Answer::Failed(text) => {
                let mut bytes = Vec::new();
                encode::error(&mut bytes, text);
                bytes
            }
        };
        if let Some(place) = self.parts.borrow_mut().get_mut(index as usize) {
            *place = Some(bytes);
        }
        self.left.set(self.left.get() - 1);
        if self.watched.get() {
            self.session.wake();
        }
        if self.left.get() == 0 {
            let parts: Vec<Vec<u8>> = self.parts.take().into_iter().flatten().collect();
            if let Some(receiver) = self.receiver.take() {
                let mut whole = Vec::new();
                self.compose(&parts, &mut whole);
                // The session may be over.
                return drop(receiver.send(Gathered { whole, parts }));
            }
            match (&self.fill, &self.confirm) {
                (None, None) => self.session.answer(self.sequence, |out| self.compose(&parts, out)),
                (None, Some(confirm)) => self.compose_and_confirm(&parts, confirm.clone()),
                (Some((lane, command)), _) => self.compose_and_fill(&parts, *lane, command),
            }
        }
    }

    fn compose_and_confirm(&self, parts: &[Vec<u8>], confirm: Confirm) {
        let mut whole = Vec::new();
        self.compose(parts, &mut whole);
        let (session, sequence) = (self.session.clone(), self.sequence);
        if whole.first() == Some(&b'-') {
            return session.deliver(sequence, &whole);
        }
        tokio::task::spawn_local(async move {
            match wait_for_replicas(session.worker(), confirm.lane, &confirm.slots).await {
                Ok(()) => {
                    sleep(confirm.pause).await;
                    session.deliver(sequence, &whole);
                }
                Err(why) => session.answer(sequence, |out| encode::error(out, &removal_text(&why))),
            }
            session.worker().flush_dirty();
        });
    }

    fn compose_and_fill(&self, parts: &[Vec<u8>], lane: Lane, command: &[u8]) {
        let mut whole = Vec::new();
        self.compose(parts, &mut whole);
        let (session, worker) = (self.session.clone(), self.session.worker());
        let place = read_through::Place { session, sequence: self.sequence, lane };
        match self.assembly {
            Assembly::Keys(Join::Sum, _) if whole.first() != Some(&b'-') => {
                read_through::complete_exists(worker, place, command, parts);
            }
            _ => read_through::complete_mget(worker, place, command, &whole),
        }
    }

    fn compose(&self, parts: &[Vec<u8>], out: &mut Vec<u8>) {
        if let Assembly::By(compose) = &self.assembly {
            return compose(parts, out);
        }
        let failed: Vec<&Vec<u8>> = parts.iter().filter(|part| part.first() == Some(&b'-')).collect();
        let any_success = matches!(self.assembly, Assembly::Shards(Gather::AnySuccess));
        if let Some(first) = failed.first()
            && !(any_success && failed.len() < parts.len())
        {
            return self.compose_failure(first, failed.len(), parts.len(), out);
        }
        match &self.assembly {
            Assembly::Keys(Join::Elements, positions) => scatter(parts, positions, out),
            Assembly::Keys(Join::Sum, _) | Assembly::Shards(Gather::Sum) => {
                encode::integer(out, parts.iter().filter_map(|part| reply::integer(part)).sum());
            }
            Assembly::Keys(Join::AllOk, _) => encode::status(out, "OK"),
            Assembly::Shards(gather) => combine(*gather, parts, out),
            Assembly::By(compose) => compose(parts, out),
        }
    }

    fn compose_failure(&self, first: &[u8], failed: usize, all: usize, out: &mut Vec<u8>) {
        if !self.writes || failed == all {
            return out.extend_from_slice(first);
        }
        let cause = String::from_utf8_lossy(&first[1..first.len() - 2]).into_owned();
        let done = all - failed;
        encode::error(
            out,
            &format!("PARTIAL the command was split into {all} parts and {done} of them were carried out: {cause}"),
        );
    }
}

fn combine(gather: Gather, parts: &[Vec<u8>], out: &mut Vec<u8>) {
    let no_error = |part: &&Vec<u8>| part.first() != Some(&b'-');
    let pick = |part: Option<&Vec<u8>>| part.or(parts.first()).map_or(&[][..], Vec::as_slice).to_vec();
    match gather {
        Gather::First | Gather::Sum => out.extend_from_slice(&pick(None)),
        Gather::AnySuccess => out.extend_from_slice(&pick(parts.iter().find(no_error))),
        Gather::Concat => {
            let items: Vec<&[u8]> = parts.iter().filter_map(|part| reply::elements(part)).flatten().collect();
            let mut all = Vec::new();
            array_of(&items, &mut all);
            own_keys::hide(&all, out);
        }
        Gather::Union => {
            let mut seen = HashSet::new();
            let items = parts.iter().filter_map(|part| reply::elements(part)).flatten();
            let items: Vec<&[u8]> = items.filter(|item| seen.insert(*item)).collect();
            array_of(&items, out);
        }
        Gather::SumPairs => sum_pairs(parts, out),
        Gather::Least => least(parts, out),
    }
}

fn array_of(items: &[&[u8]], out: &mut Vec<u8>) {
    encode::array(out, items.len());
    items.iter().for_each(|item| out.extend_from_slice(item));
}

/// All shards name the same things in the same order, as often as they were asked for them.
fn sum_pairs(parts: &[Vec<u8>], out: &mut Vec<u8>) {
    let parts: Vec<Vec<&[u8]>> = parts.iter().map(|part| reply::elements(part).unwrap_or_default()).collect();
    let length = parts.iter().map(Vec::len).min().unwrap_or(0);
    encode::array(out, length);
    for place in 0..length {
        let sum: Option<i64> = parts.iter().map(|part| reply::integer(part[place])).sum();
        match sum {
            Some(sum) => encode::integer(out, sum),
            None => out.extend_from_slice(parts[0][place]),
        }
    }
}

fn scatter(parts: &[Vec<u8>], positions: &[Vec<u32>], out: &mut Vec<u8>) {
    let total = positions.iter().map(Vec::len).sum();
    let mut values: Vec<&[u8]> = vec![b"$-1\r\n"; total];
    for (part, places) in parts.iter().zip(positions) {
        for (value, place) in reply::elements(part).unwrap_or_default().into_iter().zip(places) {
            values[*place as usize] = value;
        }
    }
    encode::array(out, total);
    values.iter().for_each(|value| out.extend_from_slice(value));
}

fn least(parts: &[Vec<u8>], out: &mut Vec<u8>) {
    if let Some(numbers) = parts.iter().map(|part| reply::integer(part)).collect::<Option<Vec<i64>>>() {
        return encode::integer(out, numbers.into_iter().min().unwrap_or(0));
    }
    let columns: Vec<Vec<i64>> = parts
        .iter()
        .map(|part| reply::elements(part).unwrap_or_default().into_iter().filter_map(reply::integer).collect())
        .collect();
    let width = columns.iter().map(Vec::len).min().unwrap_or(0);
    encode::array(out, width);
    for column in 0..width {
        encode::integer(out, columns.iter().map(|part| part[column]).min().unwrap_or(0));
    }
}
