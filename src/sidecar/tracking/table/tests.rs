//! The table against a server that forgets, connections that are slow each in its own way, and clients that keep what they read.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

const KEYS: usize = 3;
const CLIENTS: u64 = 3;

fn key(index: usize) -> Vec<u8> {
    format!("key:{index}").into_bytes()
}

/// What a client waits for, or gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    Reply { place: u32, key: usize, version: u32 },
    Invalid(usize),
    All,
}

#[derive(Debug, Default)]
struct Client {
    next: u32,
    head: u32,
    /// Read, and not handed on: it waits for its key.
    parked: Option<usize>,
    /// What was handed on; the server answers in this order.
    reads: VecDeque<(u32, usize)>,
    /// On the way from the server.
    replies: VecDeque<Wire>,
    /// Told when what is under way is answered.
    later: Vec<(u32, Option<usize>)>,
    /// On the way to the client, in order.
    output: VecDeque<Wire>,
    cache: BTreeMap<usize, u32>,
}

/// What the tracker's connection carries, to the server and back.
#[derive(Debug, Clone, Copy)]
enum Signal {
    Answer(usize),
    Invalid(usize),
}

#[derive(Debug, Default)]
struct World {
    table: Table,
    clients: BTreeMap<ClientId, Client>,
    versions: [u32; KEYS],
    registered: [bool; KEYS],
    tracker: TrackerId,
    questions: VecDeque<usize>,
    signals: VecDeque<Signal>,
}

impl World {
    fn new() -> Self {
        Self { clients: (0..CLIENTS).map(|id| (id, Client::default())).collect(), ..Self::default() }
    }

    fn read(&mut self, id: ClientId, index: usize) {
        if self.clients[&id].parked.is_some() {
            return;
        }
        match self.table.ask(&key(index), self.tracker, id) {
            Asked::Tracked => self.hand_on(id, index),
            Asked::Waits(first) => {
                if first {
                    self.questions.push_back(index);
                }
                self.clients.get_mut(&id).expect("known").parked = Some(index);
            }
        }
    }

    /// As the client's task does, once nothing holds the read up.
    fn hand_on(&mut self, id: ClientId, index: usize) {
        let client = self.clients.get_mut(&id).expect("known");
        let place = client.next;
        client.next += 1;
        client.reads.push_back((place, index));
        if !self.table.hold(&key(index), id, place) {
            client.later.push((place, Some(index)));
        }
    }

    fn release(&mut self, waiters: impl IntoIterator<Item = ClientId>) {
        for id in waiters {
            if let Some(index) = self.clients.get_mut(&id).expect("known").parked.take() {
                self.hand_on(id, index);
            }
        }
    }

    fn tell(&mut self, id: ClientId, what: Option<usize>, place: Option<u32>) {
        let client = self.clients.get_mut(&id).expect("known");
        client.output.push_back(what.map_or(Wire::All, Wire::Invalid));
        let under_way = place.map_or(client.next > client.head, |place| place >= client.head);
        if under_way {
            client.later.push((place.unwrap_or(client.next - 1), what));
        }
    }

    fn write(&mut self, index: usize) {
        self.versions[index] += 1;
        if std::mem::take(&mut self.registered[index]) {
            self.signals.push_back(Signal::Invalid(index));
        }
    }

    /// The server takes a question.
    fn register(&mut self) {
        if let Some(index) = self.questions.pop_front() {
            self.registered[index] = true;
            self.signals.push_back(Signal::Answer(index));
        }
    }

    fn hear(&mut self) {
        match self.signals.pop_front() {
            None => {}
            Some(Signal::Answer(index)) => {
                let waiters = self.table.answered(&key(index), self.tracker, true);
                self.release(waiters);
            }
            Some(Signal::Invalid(index)) => {
                for (id, place) in self.table.invalidated(&key(index), self.tracker) {
                    self.tell(id, Some(index), Some(place));
                }
            }
        }
    }

    /// The tracker's connection is lost, and another takes its place.
    fn lose(&mut self) {
        self.questions.clear();
        self.signals.clear();
        self.registered = [false; KEYS];
        self.tracker += 1;
        self.forget_all(true);
    }

    /// As where the table is overfull, too: but then the server goes on telling.
    fn forget_all(&mut self, asked_too: bool) {
        let (waiters, holders) = self.table.forget(|_, _, asked| asked_too || !asked);
        holders.into_iter().for_each(|id| self.tell(id, None, None));
        self.release(waiters);
    }

    fn serve(&mut self, id: ClientId) {
        let client = self.clients.get_mut(&id).expect("known");
        if let Some((place, key)) = client.reads.pop_front() {
            client.replies.push_back(Wire::Reply { place, key, version: self.versions[key] });
        }
    }

    fn reply(&mut self, id: ClientId) {
        let client = self.clients.get_mut(&id).expect("known");
        if let Some(reply) = client.replies.pop_front() {
            client.output.push_back(reply);
            client.head += 1;
        }
        let head = client.head;
        let (due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut client.later).into_iter().partition(|(place, _)| *place < head);
        client.later = rest;
        due.into_iter().for_each(|(_, what)| client.output.push_back(what.map_or(Wire::All, Wire::Invalid)));
    }

    fn deliver(&mut self, id: ClientId) {
        let client = self.clients.get_mut(&id).expect("known");
        match client.output.pop_front() {
            None => {}
            Some(Wire::Reply { key, version, .. }) => {
                client.cache.insert(key, version);
            }
            Some(Wire::Invalid(key)) => {
                client.cache.remove(&key);
            }
            Some(Wire::All) => client.cache.clear(),
        }
    }

    fn is_idle(&self) -> bool {
        let quiet = |client: &Client| {
            client.parked.is_none()
                && client.reads.is_empty()
                && client.replies.is_empty()
                && client.later.is_empty()
                && client.output.is_empty()
        };
        self.questions.is_empty() && self.signals.is_empty() && self.clients.values().all(quiet)
    }

    fn step(&mut self, action: u8, id: ClientId, index: usize) {
        match action {
            0..=3 => self.read(id, index),
            4 | 5 => self.write(index),
            6..=8 => self.register(),
            9..=11 => self.hear(),
            12..=14 => self.serve(id),
            15..=17 => self.reply(id),
            18..=20 => self.deliver(id),
            21 => self.lose(),
            22 => self.forget_all(index == 0),
            _ => {
                // It stops and starts to track: what it had kept, it keeps no more.
                if self.clients[&id].parked.is_none() {
                    self.table.leave(id);
                    self.tell(id, None, None);
                }
            }
        }
    }

    fn settle(&mut self) {
        while !self.is_idle() {
            self.register();
            self.hear();
            for id in 0..CLIENTS {
                self.serve(id);
                self.reply(id);
                self.deliver(id);
            }
        }
    }

    fn check(&self) {
        for (id, client) in &self.clients {
            for (key, version) in &client.cache {
                assert_eq!(*version, self.versions[*key], "client {id} keeps an old value of key {key}");
            }
        }
        let counted: usize = self.table.entries.values().map(|entry| entry.holders.len()).sum();
        assert_eq!(self.table.held.values().sum::<usize>(), counted);
        assert_eq!(self.table.bytes, self.table.entries.keys().map(|key| key.len()).sum::<usize>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever comes in whatever order: when all is delivered, nobody keeps what the server no longer has.
    #[test]
    fn nobody_keeps_what_has_changed(steps in proptest::collection::vec((0u8..24, 0..CLIENTS, 0..KEYS), 1..120)) {
        let mut world = World::new();
        for (action, id, index) in steps {
            world.step(action, id, index);
        }
        world.settle();
        world.check();
    }
}

#[test]
fn a_key_is_asked_for_once_and_told_of_once() {
    let mut table = Table::default();
    assert_eq!(table.ask(b"k", 1, 7), Asked::Waits(true));
    assert_eq!(table.ask(b"k", 1, 8), Asked::Waits(false));
    assert!(!table.hold(b"k", 7, 0), "not before the server has answered");
    assert!(table.invalidated(b"k", 1).is_empty(), "what changed before is no business of who asks now");
    assert_eq!(table.answered(b"k", 1, true).as_slice(), [7, 8]);
    assert_eq!(table.ask(b"k", 1, 9), Asked::Tracked);
    assert!(table.hold(b"k", 7, 4) && table.hold(b"k", 7, 5) && table.hold(b"k", 8, 0));
    assert_eq!((table.held_by(7), table.held_by(9)), (1, 0));
    assert!(table.invalidated(b"k", 2).is_empty(), "another server's word");
    assert_eq!(table.invalidated(b"k", 1).as_slice(), [(7, 5), (8, 0)]);
    assert!(table.invalidated(b"k", 1).is_empty() && table.held_by(7) == 0);
    // A refusal, a client that leaves, a server that is lost.
    assert_eq!(table.ask(b"k", 1, 7), Asked::Waits(true));
    assert_eq!(table.answered(b"k", 1, false).as_slice(), [7]);
    assert!(!table.hold(b"k", 7, 6));
    table.ask(b"k", 1, 7);
    table.ask(b"l", 1, 9);
    table.answered(b"k", 1, true);
    table.hold(b"k", 7, 6);
    assert_eq!(table.forget(|_, tracker, _| tracker == 2), (vec![], vec![]));
    assert_eq!(table.forget(|_, tracker, _| tracker == 1), (vec![9], vec![7]));
    assert_eq!((table.entries.len(), table.bytes, table.held.len()), (0, 0, 0));
}
