//! The scripts themselves, on every kind of server.

use std::rc::Rc;

use larder::sidecar::engine::lease::{Begun, Doubt, Generation, Mode, Rule, Token, Verdict, Written};
use larder::sidecar::patterns::cache_aside::scripts::{Names, Part, begin, begun, fill, filled, release};
use larder::sidecar::slots::{self, Companion};

use crate::support::resp::{Client, Value, encode, read_value};
use crate::support::server::{Engine, Redis, RedisCluster};

const LEASE_MS: u64 = 60_000;
const AMBIGUOUS: Verdict = Verdict::Ambiguous(Doubt::Mixed);
const RULE: Rule = Rule { stale: true, ..Rule::new(0, LEASE_MS, 1_000) };

enum Server {
    Single(Redis),
    Cluster(RedisCluster),
}

/// One key on one server.
struct Desk {
    client: Client,
    names: Names,
    key: String,
}

fn run(server: &Server, check: impl Fn(&mut Desk)) {
    let key = "a}b{c}".to_owned();
    let client = match server {
        Server::Single(server) => server.client(),
        Server::Cluster(servers) => servers.owner(slots::slot_of(key.as_bytes())).client(),
    };
    check(&mut Desk { client, names: Names::of(key.as_bytes()), key });
}

/// Runs a check on each engine and topology.
fn everywhere(check: impl Fn(&mut Desk)) {
    run(&Server::Single(Redis::start(Engine::Redis7)), &check);
    run(&Server::Single(Redis::start(Engine::Valkey9)), &check);
    run(&Server::Cluster(RedisCluster::start(Engine::Redis7, 3, 0)), &check);
    run(&Server::Cluster(RedisCluster::start(Engine::Valkey9, 3, 0)), &check);
}

/// Runs a check on each engine.
fn on_both(check: impl Fn(&mut Desk)) {
    run(&Server::Single(Redis::start(Engine::Redis7)), &check);
    run(&Server::Single(Redis::start(Engine::Valkey9)), &check);
}

impl Desk {
    fn raw(&mut self, wire: &[u8]) -> Vec<u8> {
        self.client.send(wire).unwrap();
        // Reads a value and writes it again: the parsers under test read bytes.
        write(&self.client.read().unwrap())
    }

    fn begin(&mut self, taker: u64, mode: Mode) -> Begun<Rc<[u8]>> {
        self.begin_under(taker, mode, &RULE)
    }

    fn begin_under(&mut self, taker: u64, mode: Mode, rule: &Rule) -> Begun<Rc<[u8]>> {
        let mut wire = Vec::new();
        begin(&self.names, taker, mode, rule, &mut wire);
        let answer = self.raw(&wire);
        begun(&answer, taker).unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    fn leased(&mut self, taker: u64) -> Token {
        self.leased_with_copy(taker).0
    }

    #[track_caller]
    fn leased_with_copy(&mut self, taker: u64) -> (Token, Option<Rc<[u8]>>) {
        match self.begin(taker, Mode::Miss) {
            Begun::Leased { token, stale } => (token, stale),
            other => panic!("{other:?} is no lease"),
        }
    }

    #[track_caller]
    fn busy(&mut self, taker: u64) -> Generation {
        match self.begin(taker, Mode::Miss) {
            Begun::Busy { generation, .. } => generation,
            other => panic!("{other:?} is not busy"),
        }
    }

    /// A fill by `commands`, the first being the client's, which stores `value`.
    fn fill(&mut self, verdict: Verdict, value: &str, commands: &[&[&str]]) -> Result<(Value, Written), String> {
        let queued: Vec<u8> = commands.iter().flat_map(|command| encode(command)).collect();
        let mut wire = Vec::new();
        fill(&[Part { names: self.names.clone(), verdict, value: value.as_bytes() }], &queued, &mut wire)
            .expect("whole commands");
        let answer = self.raw(&wire);
        match filled(&answer) {
            Some((reply, written)) => Ok((read_value(&mut &reply[..]).unwrap(), written[0])),
            None => Err(String::from_utf8_lossy(&answer).trim_end().to_owned()),
        }
    }

    #[track_caller]
    fn set(&mut self, verdict: Verdict, value: &str) -> Written {
        let key = self.key.clone();
        let (reply, written) = self.fill(verdict, value, &[&["SET", &key, value, "PX", "100000"]]).unwrap();
        assert_eq!(reply, ok());
        written
    }

    fn release(&mut self, token: &Token) -> Value {
        let mut wire = Vec::new();
        release(&self.names, token, &mut wire);
        let answer = self.raw(&wire);
        read_value(&mut &answer[..]).unwrap()
    }

    fn get(&mut self) -> Value {
        let key = self.key.clone();
        self.client.call(&["GET", &key])
    }

    fn companion(&mut self, companion: Companion) -> Value {
        self.client.call(&[&b"GET"[..], &companion.name(self.key.as_bytes())])
    }

    /// What a covered write does beside the key.
    fn write(&mut self, value: &str) {
        let key = self.key.clone();
        self.client.call(&["SET", &key, value, "PX", "100000"]);
        self.revoke();
    }

    fn revoke(&mut self) {
        let key = self.key.clone().into_bytes();
        let names = [Companion::Lease, Companion::Stale, Companion::Negative].map(|companion| companion.name(&key));
        self.client.call(&[b"UNLINK".to_vec(), names[0].clone(), names[1].clone(), names[2].clone()]);
    }

    fn remove(&mut self) {
        let key = self.key.clone();
        self.client.call(&["DEL", &key]);
    }
}

/// A reply as a RESP2 server writes it.
pub fn write(value: &Value) -> Vec<u8> {
    match value {
        Value::Simple(text) => format!("+{text}\r\n").into_bytes(),
        Value::Error(text) => format!("-{text}\r\n").into_bytes(),
        Value::Int(number) => format!(":{number}\r\n").into_bytes(),
        Value::Nil => b"$-1\r\n".to_vec(),
        Value::Bulk(bytes) => [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat(),
        Value::Array(items) => {
            let items: Vec<u8> = items.iter().flat_map(write).collect();
            [format!("*{}\r\n", value.items().len()).into_bytes(), items].concat()
        }
        other => panic!("{other:?} is not RESP2"),
    }
}

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn under(token: &Token) -> Verdict {
    Verdict::Fill(token.generation)
}

fn element(text: &str) -> Rc<[u8]> {
    format!("${}\r\n{text}\r\n", text.len()).into_bytes().into()
}

#[test]
fn one_is_leased_and_the_others_find_it_busy() {
    everywhere(|desk| {
        let (first, stale) = desk.leased_with_copy(1);
        assert_eq!((first.taker, stale), (1, None));
        assert_ne!(first.generation.run, 0, "the server told its run id");
        // Asked again, as after a lost connection.
        assert_eq!(desk.leased(1), first);
        let Begun::Busy { generation, taker, stale: None, remaining } = desk.begin(2, Mode::Miss) else { panic!("busy") };
        assert_eq!((generation, taker), (first.generation, 1));
        assert!((1..=LEASE_MS).contains(&remaining));
        let Begun::Busy { .. } = desk.begin(2, Mode::Early { left: 3_600_000 }) else { panic!("busy") };
        let memory = desk.client.call(&[&b"PTTL"[..], &Companion::Lease.name(desk.key.as_bytes())]).int();
        assert!(((LEASE_MS * 9) as i64..=(LEASE_MS * 10) as i64).contains(&memory), "{memory}");
        assert_eq!(desk.set(under(&first), "v"), Written::Stored);
        assert_eq!(desk.begin(3, Mode::Miss), Begun::Value(element("v")));
        let Begun::Leased { .. } = desk.begin(3, Mode::Early { left: 3_600_000 }) else { panic!("leased before its end") };
        desk.remove();
        let key = desk.key.clone();
        desk.client.call(&["HSET", &key, "f", "v"]);
        assert_eq!(desk.begin(4, Mode::Miss), Begun::Other);
    });
}

#[test]
fn a_fill_is_stored_while_nothing_was_written_since_its_miss() {
    on_both(|desk| {
        let key = desk.key.clone();
        let copy = String::from_utf8(Companion::Stale.name(key.as_bytes())).unwrap();
        let token = desk.leased(1);
        let set: &[&str] = &["SET", &key, "v", "PX", "100000"];
        let with_copy: &[&[&str]] = &[set, &["SET", &copy, "v", "PX", "200000"]];
        assert_eq!(desk.fill(under(&token), "v", with_copy), Ok((ok(), Written::Stored)));
        assert_eq!((desk.get().text(), desk.companion(Companion::Stale).text()), ("v".to_owned(), "v".to_owned()));
        assert!(desk.client.call(&["PTTL", &copy]).int() > 100_000);
        assert_eq!(desk.companion(Companion::Lease), Value::Nil);
        // The copy is served while another loads.
        desk.remove();
        let (token, stale) = desk.leased_with_copy(2);
        assert_eq!(stale, Some(element("v")));
        let Begun::Busy { stale: None, .. } = desk.begin_under(3, Mode::Miss, &Rule { stale: false, ..RULE }) else {
            panic!("busy, and no copy")
        };
        // Without a lifetime for it, a fill removes the copy.
        assert_eq!(desk.set(under(&token), "w"), Written::Stored);
        assert_eq!(desk.companion(Companion::Stale), Value::Nil);
        // Of a doubtful one no copy stays either.
        assert_eq!(desk.fill(AMBIGUOUS, "v", with_copy), Ok((ok(), Written::Removed)));
        assert_eq!((desk.get(), desk.companion(Companion::Stale)), (Value::Nil, Value::Nil));
    });
}

#[test]
fn a_fill_from_before_a_write_or_without_a_generation_leaves_a_miss() {
    on_both(|desk| {
        let late = desk.leased(1);
        desk.write("newer");
        assert_eq!(desk.set(under(&late), "older"), Written::Removed);
        assert_eq!((desk.get(), desk.companion(Companion::Lease)), (Value::Nil, Value::Nil));
        // Revoked by a deletion, and taken by another since: that one's is refused too, for the key was written.
        let late = desk.leased(2);
        desk.revoke();
        let other = desk.leased(3);
        assert_ne!(other.generation, late.generation);
        assert_eq!(desk.set(under(&late), "older"), Written::Removed);
        assert_eq!(desk.get(), Value::Nil);
        assert_eq!(desk.set(under(&other), "v"), Written::Removed);
        desk.release(&other);
        // Asked for again, it is not begun again under the generation that has ended.
        let again = desk.leased(3);
        assert_ne!(again.generation, other.generation);
        desk.revoke();
        assert_ne!(desk.leased(3).generation, again.generation);
        desk.revoke();
        // Lost by eviction.
        let lost = desk.leased(4);
        desk.client.call(&[&b"DEL"[..], &Companion::Lease.name(desk.key.as_bytes())]);
        assert_eq!(desk.set(under(&lost), "v"), Written::Removed);
        let token = desk.leased(5);
        assert_eq!(desk.set(AMBIGUOUS, "v"), Written::Removed);
        assert_eq!(desk.get(), Value::Nil);
        desk.release(&token);
        // A fill ends its generation: it may have been an update. What was there already may stay.
        let token = desk.leased(6);
        assert_eq!(desk.set(under(&token), "v"), Written::Stored);
        assert_eq!(desk.set(under(&token), "v"), Written::Stored);
        assert_eq!(desk.set(under(&token), "w"), Written::Removed);
        // An update is stored in any case, and ends it too.
        let late = desk.leased(7);
        assert_eq!(desk.set(Verdict::Update, "v"), Written::Stored);
        assert_eq!(desk.set(under(&late), "w"), Written::Removed);
    });
}

#[test]
fn what_is_refused_ends_the_generation_and_not_the_lease() {
    on_both(|desk| {
        let late = desk.leased(1);
        desk.revoke();
        let mut held = desk.leased(2).generation;
        let key = desk.key.clone();
        let refused: [(Verdict, &[&str]); 4] = [
            (under(&late), &["SET", &key, "v", "PX", "100000"]),
            (AMBIGUOUS, &["SETEX", &key, "100", "v"]),
            (AMBIGUOUS, &["SET", &key, "v", "XX"]),
            (under(&late), &["SET", &key, "v", "EX", "0"]),
        ];
        for (verdict, command) in refused {
            let filled = desk.fill(verdict, "v", &[command]);
            assert!(!matches!(filled, Ok((_, Written::Stored))), "{command:?}: {filled:?}");
            let Begun::Busy { generation, taker: 2, remaining, .. } = desk.begin(3, Mode::Miss) else {
                panic!("{command:?}: busy")
            };
            assert_ne!(std::mem::replace(&mut held, generation), generation, "{command:?}");
            assert!((1..=LEASE_MS).contains(&remaining));
        }
        assert_eq!(desk.set(Verdict::Fill(held), "v"), Written::Stored, "what is loaded since the last refusal is new");
        // Its holder gives it back, whatever its generation has become, and the next goes on under that.
        desk.remove();
        let holder = desk.leased(4);
        assert_eq!(desk.set(AMBIGUOUS, "v"), Written::Removed);
        let held = desk.busy(5);
        assert_eq!((desk.release(&holder), desk.leased(5).generation), (Value::Int(1), held));
        // A lease that nobody holds any more goes.
        let given_back = Token { generation: held, taker: 5 };
        desk.release(&given_back);
        assert_eq!(desk.set(AMBIGUOUS, "v"), Written::Removed);
        assert_eq!(desk.companion(Companion::Lease), Value::Nil);
    });
}

#[test]
fn another_primary_or_a_restarted_one_ends_the_lease() {
    on_both(|desk| {
        let token = desk.leased(1);
        let name = Companion::Lease.name(desk.key.as_bytes());
        let text = desk.companion(Companion::Lease).text();
        let foreign = Generation { run: !token.generation.run, ..token.generation };
        let text = text.replace(&token.generation.to_string(), &foreign.to_string());
        desk.client.call(&[&b"SET"[..], &name, text.as_bytes(), b"PX", b"100000"]);
        assert_eq!(desk.set(Verdict::Fill(foreign), "v"), Written::Removed);
        desk.client.call(&[&b"SET"[..], &name, text.as_bytes(), b"PX", b"100000"]);
        let next = desk.leased(2);
        assert_eq!((next.generation.run, next.taker), (token.generation.run, 2));
        assert_ne!(next.generation.random, token.generation.random);
    });
}

#[test]
fn a_lease_given_back_goes_to_the_next_who_continues_its_generation() {
    on_both(|desk| {
        let first = desk.leased(1);
        assert_eq!(desk.busy(2), first.generation);
        assert_eq!(desk.release(&first), Value::Int(1));
        assert_eq!(desk.release(&first), Value::Int(0));
        let second = desk.leased(2);
        assert_eq!((second.generation, second.taker), (first.generation, 2));
        assert_eq!(desk.release(&first), Value::Int(0), "it is not the first one's any more");
        // Nobody wrote in between: the first one's late fill is as good as any.
        assert_eq!(desk.set(under(&first), "a"), Written::Stored);
        assert_eq!((desk.get().text(), desk.companion(Companion::Lease)), ("a".to_owned(), Value::Nil));
    });
}

#[test]
fn a_key_that_nobody_fills_is_everybodys() {
    on_both(|desk| {
        for taker in 1..=3 {
            let token = desk.leased(taker);
            desk.release(&token);
        }
        let Begun::Shared { generation } = desk.begin(4, Mode::Miss) else { panic!("shared") };
        assert_eq!(desk.begin(5, Mode::Miss), Begun::Shared { generation });
        let ttl = desk.client.call(&[&b"PTTL"[..], &Companion::Lease.name(desk.key.as_bytes())]).int();
        assert!((1..=30_000).contains(&ttl), "{ttl}");
        assert_eq!(desk.set(Verdict::Fill(generation), "a"), Written::Stored);
        // A fill ends it.
        desk.remove();
        desk.leased(6);
    });
}

#[test]
fn who_refreshes_a_key_or_loads_beside_a_stale_copy_never_makes_it_everybodys() {
    on_both(|desk| {
        // By NX nothing is stored while the key is there. When it is gone, one loads nevertheless.
        let key = desk.key.clone();
        desk.write("v");
        for taker in 1..=5 {
            let Begun::Leased { token, .. } = desk.begin(taker, Mode::Early { left: 3_600_000 }) else { panic!("leased") };
            let refused = desk.fill(under(&token), "w", &[&["SET", &key, "w", "NX"]]);
            assert_eq!(refused, Ok((Value::Nil, Written::Unchanged)));
            desk.release(&token);
        }
        desk.remove();
        let token = desk.leased(6);
        desk.busy(7);
        desk.release(&token);
        // Whoever does not load is given the copy: nobody waits for one that never comes.
        desk.client.call(&[&b"SET"[..], &Companion::Stale.name(key.as_bytes()), b"old", b"PX", b"100000"]);
        for taker in 8..=12 {
            let (token, copy) = desk.leased_with_copy(taker);
            assert_eq!(copy, Some(element("old")));
            desk.release(&token);
        }
        let Begun::Shared { .. } = desk.begin_under(13, Mode::Miss, &Rule { stale: false, ..RULE }) else { panic!("shared") };
    });
}

#[test]
fn a_condition_that_fails_changes_nothing_whatever_the_value() {
    on_both(|desk| {
        let (key, other) = (desk.key.clone(), format!("other{}", desk.key));
        let token = desk.leased(1);
        desk.client.call(&["SET", &key, "v", "PX", "100000"]);
        desk.client.call(&[&b"SET"[..], &Companion::Stale.name(key.as_bytes()), b"v", b"PX", b"200000"]);
        let refused: [(&[&str], Value); 4] = [
            (&["SET", &key, "v", "NX"], Value::Nil),
            (&["set", &key, "v", "PX", "5000", "nx", "GET"], Value::Bulk(b"v".to_vec())),
            (&["SETNX", &key, "v"], Value::Int(0)),
            (&["MSETNX", &key, "v", &other, "w"], Value::Int(0)),
        ];
        for (command, reply) in refused {
            assert_eq!(desk.fill(under(&token), "v", &[command]), Ok((reply, Written::Unchanged)), "{command:?}");
        }
        assert!(desk.client.call(&["PTTL", &key]).int() > 5000);
        assert_eq!(desk.companion(Companion::Stale).text(), "v");
        desk.remove();
        // Of several keys another is there.
        desk.client.call(&["SET", &other, "w", "PX", "100000"]);
        let refused = desk.fill(under(&token), "v", &[&["MSETNX", &key, "v", &other, "w"]]);
        assert_eq!(refused, Ok((Value::Int(0), Written::Unchanged)));
        assert_eq!(desk.busy(2), token.generation, "the lease stands, under its generation");
        assert_eq!(desk.set(under(&token), "v"), Written::Stored);
    });
}

#[test]
fn a_fill_gets_its_own_commands_reply() {
    on_both(|desk| {
        let key = desk.key.clone();
        let guard: &[&str] = &["PEXPIRE", &key, "5000", "NX"];
        let mut taker = 10;
        let mut fill = |desk: &mut Desk, value: &str, commands: &[&[&str]]| {
            taker += 1;
            let Begun::Leased { token, .. } = desk.begin(taker, Mode::Early { left: 3_600_000 }) else { panic!("leased") };
            let filled = desk.fill(under(&token), value, commands);
            desk.release(&token);
            filled
        };
        let stored = |value: Value| Ok((value, Written::Stored));
        let refused = |value: Value| Ok((value, Written::Unchanged));
        assert_eq!(fill(desk, "a", &[&["SETNX", &key, "a"], guard]), stored(Value::Int(1)));
        assert!((1..=5000).contains(&desk.client.call(&["PTTL", &key]).int()));
        assert_eq!(fill(desk, "b", &[&["SETNX", &key, "b"], guard]), refused(Value::Int(0)));
        assert_ne!(desk.companion(Companion::Lease), Value::Nil, "it goes on");
        assert_eq!(fill(desk, "b", &[&["SET", &key, "b", "NX"]]), refused(Value::Nil));
        assert_eq!(fill(desk, "b", &[&["SET", &key, "b", "GET"], guard]), stored(Value::Bulk(b"a".to_vec())));
        assert_eq!(fill(desk, "c", &[&["SETEX", &key, "100", "c"]]), stored(ok()));
        assert_eq!(fill(desk, "d", &[&["PSETEX", &key, "100000", "d"]]), stored(ok()));
        assert_eq!(fill(desk, "e", &[&["GETSET", &key, "e"], guard]), stored(Value::Bulk(b"d".to_vec())));
        let error = fill(desk, "f", &[&["SET", &key, "f", "EX", "0"]]).unwrap_err();
        assert!(error.starts_with("-ERR invalid expire time in 'set' command"), "{error}");
        assert_eq!(desk.get().text(), "e");
        assert_eq!(fill(desk, "g", &[&["SET", &key, "g", "PXAT", "1"]]), Ok((ok(), Written::Removed)));
        assert_eq!((desk.get(), desk.companion(Companion::Lease)), (Value::Nil, Value::Nil));
        // A refused write is nobody's change, whatever it was made under.
        desk.write("h");
        assert_eq!(desk.fill(AMBIGUOUS, "i", &[&["SET", &key, "i", "NX"]]), refused(Value::Nil));
        assert_eq!(desk.get().text(), "h");
    });
}

#[test]
fn many_keys_are_filled_at_once_each_by_its_own_right() {
    let server = Redis::start(Engine::Redis7);
    let mut client = server.client();
    let keys = ["valid", "late", "new"];
    let names = keys.map(|key| Names::of(key.as_bytes()));
    let mut wire = Vec::new();
    let mut take = |client: &mut Client, names: &Names, taker| {
        wire.clear();
        begin(names, taker, Mode::Miss, &RULE, &mut wire);
        client.send(&wire).unwrap();
        match begun(&write(&client.read().unwrap()), taker) {
            Ok(Begun::Leased { token, .. }) => Verdict::Fill(token.generation),
            other => panic!("{other:?}"),
        }
    };
    let verdicts = [take(&mut client, &names[0], 1), take(&mut client, &names[1], 2), Verdict::Update];
    client.call(&[&b"UNLINK"[..], &Companion::Lease.name(b"late")]);
    let parts: Vec<Part<'_>> = names
        .into_iter()
        .zip(verdicts)
        .zip(["1", "2", "3"])
        .map(|((names, verdict), value)| Part { names, verdict, value: value.as_bytes() })
        .collect();
    let queued = [encode(&["MSET", "valid", "1", "late", "2", "new", "3"]), encode(&["PEXPIRE", "valid", "5000", "NX"])].concat();
    let mut wire = Vec::new();
    fill(&parts, &queued, &mut wire).unwrap();
    client.send(&wire).unwrap();
    let answer = write(&client.read().unwrap());
    let (reply, written) = filled(&answer).unwrap();
    assert_eq!((reply, &written[..]), (&b"+OK\r\n"[..], &[Written::Stored, Written::Removed, Written::Stored][..]));
    let values = client.line("MGET valid late new").items();
    assert_eq!(values, [Value::Bulk(b"1".to_vec()), Value::Nil, Value::Bulk(b"3".to_vec())]);
    assert!(client.line("PTTL valid").int() > 0);
}

#[test]
fn the_end_of_an_awaited_lease_is_announced() {
    everywhere(|desk| {
        let mut listener = Client::connect(desk.client.stream().peer_addr().unwrap().port()).unwrap();
        listener.call(&[&b"SSUBSCRIBE"[..], desk.names.lease()]);
        let name = desk.names.lease().to_vec();
        let mut hears = |what: &str| {
            let message = listener.read().unwrap_or_else(|error| panic!("{what}: {error}")).items();
            assert_eq!((message[0].text().as_str(), message[1].text().as_bytes()), ("smessage", &name[..]), "{what}");
        };
        let token = desk.leased(1);
        desk.busy(2);
        assert_eq!(desk.release(&token), Value::Int(1));
        hears("a lease that was given back");
        let token = desk.leased(2);
        desk.busy(3);
        assert_eq!(desk.set(under(&token), "v"), Written::Stored);
        hears("a fill");
    });
}
