//! The scripts themselves, on every kind of server.

use larder::sidecar::patterns::cache_aside::scripts::{Begun, Filled, Generation, Lease, Mode, Names, Under};
use larder::sidecar::patterns::cache_aside::scripts::{begin, fill, filled, release};
use larder::sidecar::slots::{self, Companion};

use crate::support::resp::{Client, Value, encode, read_value};
use crate::support::server::{Engine, Redis, RedisCluster};

const LEASE_MS: u64 = 60_000;
const MISS: Mode = Mode::Miss { stale: true };

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

    fn begin(&mut self, nonce: u64, mode: Mode) -> Begun {
        let mut wire = Vec::new();
        begin(&self.names, nonce, LEASE_MS, mode, &mut wire);
        let answer = self.raw(&wire);
        Begun::parse(&answer).unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    fn leased(&mut self, nonce: u64) -> Lease {
        match self.begin(nonce, MISS) {
            Begun::Leased(lease) => lease,
            other => panic!("{other:?} is no lease"),
        }
    }

    /// A fill by `commands`, the first being the client's.
    fn fill(&mut self, under: Under, value_at: usize, commands: &[&[&str]]) -> Result<(Value, Filled), String> {
        let queued: Vec<u8> = commands.iter().flat_map(|command| encode(command)).collect();
        let mut wire = Vec::new();
        fill(&self.names, &under, value_at, &queued, &mut wire).expect("whole commands");
        let answer = self.raw(&wire);
        match filled(&answer) {
            Some((reply, outcome)) => Ok((read_value(&mut &reply[..]).unwrap(), outcome)),
            None => Err(String::from_utf8_lossy(&answer).trim_end().to_owned()),
        }
    }

    #[track_caller]
    fn set(&mut self, under: Under, value: &str) -> Filled {
        let key = self.key.clone();
        let (reply, outcome) = self.fill(under, 2, &[&["SET", &key, value, "PX", "100000"]]).unwrap();
        assert_eq!(reply, ok());
        outcome
    }

    fn release(&mut self, lease: &Lease) -> Value {
        let mut wire = Vec::new();
        release(&self.names, lease.generation, lease.sequence, &mut wire);
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

fn write(value: &Value) -> Vec<u8> {
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

fn under(lease: &Lease) -> Under {
    Under { generation: Some(lease.generation), sequence: lease.sequence, keep: false, stale_ms: 0 }
}

const NOTHING: Under = Under { generation: None, sequence: 0, keep: false, stale_ms: 0 };

#[test]
fn one_is_leased_and_the_others_find_it_busy() {
    on_both(|desk| {
        let first = desk.leased(1);
        assert_eq!((first.sequence, first.left_ms, &first.stale), (1, LEASE_MS, &None));
        assert_ne!(first.generation.run, 0, "the server told its run id");
        // Asked again, as after a lost connection.
        assert_eq!(desk.leased(1).sequence, 1);
        let Begun::Busy(seen) = desk.begin(2, MISS) else { panic!("busy") };
        assert_eq!((seen.generation, seen.sequence), (first.generation, 1));
        assert!((1..=LEASE_MS).contains(&seen.left_ms));
        let Begun::Busy(_) = desk.begin(2, Mode::Early) else { panic!("busy") };
        let memory = desk.client.call(&[&b"PTTL"[..], &Companion::Lease.name(desk.key.as_bytes())]).int();
        assert!(((LEASE_MS * 9) as i64..=(LEASE_MS * 10) as i64).contains(&memory), "{memory}");
        assert_eq!(desk.set(under(&first), "v"), Filled::Stored);
        assert_eq!(desk.begin(3, MISS), Begun::Value(b"$1\r\nv\r\n".to_vec()));
        desk.remove();
        let key = desk.key.clone();
        desk.client.call(&["HSET", &key, "f", "v"]);
        assert_eq!(desk.begin(4, MISS), Begun::Other);
    });
}

#[test]
fn a_fill_is_stored_while_nothing_was_written_since_its_miss() {
    everywhere(|desk| {
        let lease = desk.leased(1);
        assert_eq!(desk.set(Under { stale_ms: 200_000, ..under(&lease) }, "v"), Filled::Stored);
        assert_eq!((desk.get().text(), desk.companion(Companion::Stale).text()), ("v".to_owned(), "v".to_owned()));
        assert_eq!(desk.companion(Companion::Lease), Value::Nil);
        // The copy is served while another loads.
        desk.remove();
        let lease = desk.leased(2);
        assert_eq!(lease.stale, Some(b"$1\r\nv\r\n".to_vec()));
        let Begun::Busy(seen) = desk.begin(3, Mode::Miss { stale: false }) else { panic!("busy") };
        assert_eq!(seen.stale, None);
        // Without a lifetime for it, a fill removes the copy.
        assert_eq!(desk.set(under(&lease), "w"), Filled::Stored);
        assert_eq!(desk.companion(Companion::Stale), Value::Nil);
    });
}

#[test]
fn a_fill_from_before_a_write_or_without_a_generation_leaves_a_miss() {
    on_both(|desk| {
        let late = desk.leased(1);
        desk.write("newer");
        assert_eq!(desk.set(under(&late), "older"), Filled::Ambiguous);
        assert_eq!((desk.get(), desk.companion(Companion::Lease)), (Value::Nil, Value::Nil));
        // Revoked by a deletion, and taken by another since: that one's is refused too, for the key was written.
        let late = desk.leased(2);
        desk.revoke();
        let other = desk.leased(3);
        assert_ne!(other.generation, late.generation);
        assert_eq!(desk.set(under(&late), "older"), Filled::Ambiguous);
        assert_eq!(desk.get(), Value::Nil);
        assert_eq!(desk.set(under(&other), "v"), Filled::Ambiguous);
        // Lost by eviction.
        let lost = desk.leased(4);
        desk.client.call(&[&b"DEL"[..], &Companion::Lease.name(desk.key.as_bytes())]);
        assert_eq!(desk.set(under(&lost), "v"), Filled::Ambiguous);
        desk.leased(5);
        assert_eq!(desk.set(NOTHING, "v"), Filled::Ambiguous);
        assert_eq!((desk.get(), desk.companion(Companion::Lease)), (Value::Nil, Value::Nil));
    });
}

#[test]
fn another_primary_or_a_restarted_one_ends_the_lease() {
    on_both(|desk| {
        let lease = desk.leased(1);
        let name = Companion::Lease.name(desk.key.as_bytes());
        let text = desk.companion(Companion::Lease).text();
        let foreign = Generation { run: !lease.generation.run, ..lease.generation };
        let text = text.replace(&lease.generation.to_string(), &foreign.to_string());
        desk.client.call(&[&b"SET"[..], &name, text.as_bytes(), b"PX", b"100000"]);
        let of_old = Under { generation: Some(foreign), ..under(&lease) };
        assert_eq!(desk.set(of_old, "v"), Filled::Ambiguous);
        desk.client.call(&[&b"SET"[..], &name, text.as_bytes(), b"PX", b"100000"]);
        let next = desk.leased(2);
        assert_eq!((next.sequence, next.generation.run), (1, lease.generation.run));
        assert_ne!(next.generation.random, lease.generation.random);
    });
}

#[test]
fn a_lease_given_back_goes_to_the_next_who_continues_its_generation() {
    on_both(|desk| {
        let first = desk.leased(1);
        let Begun::Busy(_) = desk.begin(2, MISS) else { panic!("busy") };
        assert_eq!(desk.release(&first), Value::Int(1));
        assert_eq!(desk.release(&first), Value::Int(0));
        let second = desk.leased(2);
        assert_eq!((second.generation, second.sequence), (first.generation, 2));
        assert_eq!(desk.release(&first), Value::Int(0), "it is not the first one's any more");
        // Nobody wrote in between: the first one's late fill is as good as any, and so is the second one's.
        assert_eq!(desk.set(under(&first), "a"), Filled::Stored);
        assert_eq!(desk.set(under(&second), "b"), Filled::Stored);
        assert_eq!((desk.get().text(), desk.companion(Companion::Lease)), ("b".to_owned(), Value::Nil));
    });
}

#[test]
fn others_of_one_generation_may_fill_after_the_first() {
    on_both(|desk| {
        let lease = desk.leased(1);
        assert_eq!(desk.set(Under { keep: true, ..under(&lease) }, "a"), Filled::Stored);
        assert_eq!(desk.set(under(&lease), "b"), Filled::Stored);
        // In the next miss a new generation begins.
        desk.remove();
        let next = desk.leased(2);
        assert_ne!(next.generation, lease.generation);
        // One in another pod was told that it is busy, and may have passed the miss on.
        let Begun::Busy(seen) = desk.begin(3, MISS) else { panic!("busy") };
        assert_eq!(desk.set(under(&next), "c"), Filled::Stored);
        assert_eq!(desk.set(Under { sequence: 0, ..under(&seen) }, "d"), Filled::Stored);
        desk.write("newer");
        assert_eq!(desk.set(Under { sequence: 0, ..under(&seen) }, "e"), Filled::Ambiguous);
    });
}

#[test]
fn a_key_that_nobody_fills_is_everybodys() {
    on_both(|desk| {
        for nonce in 1..=3 {
            let lease = desk.leased(nonce);
            assert_eq!(u64::from(lease.sequence), nonce);
            desk.release(&lease);
        }
        let Begun::Shared(first) = desk.begin(4, MISS) else { panic!("shared") };
        let Begun::Shared(second) = desk.begin(5, MISS) else { panic!("shared") };
        assert_eq!(first.generation, second.generation);
        assert_eq!(desk.set(Under { sequence: 0, ..under(&first) }, "a"), Filled::Stored);
        assert_eq!(desk.set(Under { sequence: 0, ..under(&second) }, "b"), Filled::Stored);
        // A fill ends it.
        desk.remove();
        desk.leased(6);
    });
}

#[test]
fn a_fill_gets_its_own_commands_reply() {
    on_both(|desk| {
        let key = desk.key.clone();
        let lease = desk.leased(1);
        let fill =
            |desk: &mut Desk, at: usize, commands: &[&[&str]]| desk.fill(Under { keep: true, ..under(&lease) }, at, commands);
        let stored = |value: Value| Ok((value, Filled::Stored));
        let refused = |value: Value| Ok((value, Filled::Refused));
        let guard: &[&str] = &["PEXPIRE", &key, "5000", "NX"];
        assert_eq!(fill(desk, 2, &[&["SETNX", &key, "a"], guard]), stored(Value::Int(1)));
        assert!((1..=5000).contains(&desk.client.call(&["PTTL", &key]).int()));
        assert_eq!(fill(desk, 2, &[&["SETNX", &key, "b"], guard]), refused(Value::Int(0)));
        assert_eq!(fill(desk, 2, &[&["SET", &key, "b", "NX"]]), refused(Value::Nil));
        assert_eq!(fill(desk, 2, &[&["SET", &key, "b", "GET"], guard]), stored(Value::Bulk(b"a".to_vec())));
        assert_eq!(fill(desk, 3, &[&["SETEX", &key, "100", "c"]]), stored(ok()));
        assert_eq!(fill(desk, 3, &[&["PSETEX", &key, "100000", "d"]]), stored(ok()));
        assert_eq!(fill(desk, 2, &[&["GETSET", &key, "e"], guard]), stored(Value::Bulk(b"d".to_vec())));
        let error = fill(desk, 2, &[&["SET", &key, "f", "EX", "0"]]).unwrap_err();
        assert!(error.starts_with("-ERR invalid expire time in 'set' command"), "{error}");
        assert_eq!(desk.get().text(), "e");
        assert_eq!(fill(desk, 2, &[&["SET", &key, "g", "PXAT", "1"]]), Ok((ok(), Filled::Deleted)));
        assert_eq!((desk.get(), desk.companion(Companion::Lease)), (Value::Nil, Value::Nil));
        // A refused write is nobody's change, whatever it was made under.
        desk.write("h");
        let own: &[&str] = &["SET", &key, "i", "NX"];
        assert_eq!(desk.fill(NOTHING, 2, &[own]), Ok((Value::Nil, Filled::Refused)));
        assert_eq!(desk.get().text(), "h");
    });
}

#[test]
fn the_end_of_an_awaited_lease_is_announced() {
    everywhere(|desk| {
        let mut listener = Client::connect(desk.client.stream().peer_addr().unwrap().port()).unwrap();
        listener.call(&[&b"SSUBSCRIBE"[..], desk.names.lease()]);
        let mut hears = |what: &str| {
            let message = listener.read().unwrap_or_else(|error| panic!("{what}: {error}")).items();
            assert_eq!((message[0].text().as_str(), message[1].text().as_bytes()), ("smessage", desk.names.lease()), "{what}");
        };
        let mut wire = Vec::new();
        let mut ask = |client: &mut Client, nonce: u64| {
            wire.clear();
            begin(&desk.names, nonce, LEASE_MS, MISS, &mut wire);
            client.send(&wire).unwrap();
            Begun::parse(&write(&client.read().unwrap())).unwrap()
        };
        let Begun::Leased(lease) = ask(&mut desk.client, 1) else { panic!("leased") };
        let Begun::Busy(_) = ask(&mut desk.client, 2) else { panic!("busy") };
        let mut wire = Vec::new();
        release(&desk.names, lease.generation, lease.sequence, &mut wire);
        desk.client.send(&wire).unwrap();
        assert_eq!(desk.client.read().unwrap(), Value::Int(1));
        hears("a lease that was given back");
        let Begun::Leased(lease) = ask(&mut desk.client, 2) else { panic!("leased") };
        let Begun::Busy(_) = ask(&mut desk.client, 3) else { panic!("busy") };
        let mut wire = Vec::new();
        let queued = encode(&["SET", &desk.key, "v"]);
        fill(&desk.names, &under(&lease), 2, &queued, &mut wire).unwrap();
        desk.client.send(&wire).unwrap();
        desk.client.read().unwrap();
        hears("a fill");
    });
}
