//! Connections that carry more than one command at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

#[test]
fn two_hundred_reads_of_one_key_on_one_connection_make_one_load() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 3, &[item(json!({}))]);
    let mut clients: Vec<_> = sidecars.iter().map(|sidecar| sidecar.client()).collect();
    clients[1].line("HELLO 3");
    let reads = encode(&["GET", "item:1"]).repeat(200);
    clients.iter_mut().for_each(|client| client.send(&reads).unwrap());
    wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == 600);
    wait_for("one to be asked to load", LIMIT, || total(&sidecars, "leases") == 1);
    let (holder, reply) = super::first_answered(&mut clients);
    assert_eq!(reply, Value::Nil);
    // Its own fill passes although reads of the same connection wait.
    clients[holder].send(&encode(&["SET", "item:1", "v"])).unwrap();
    for (index, client) in clients.iter_mut().enumerate() {
        let waiting = if index == holder { 199 } else { 200 };
        (0..waiting).for_each(|read| assert_eq!(client.read().unwrap(), bulk("v"), "read {read} of client {index}"));
    }
    assert_eq!(clients[holder].read().unwrap(), ok());
    assert_eq!((total(&sidecars, "leases"), total(&sidecars, "woken"), total(&sidecars, "unparked")), (1, 599, 0));
}

#[test]
fn no_other_command_waits_behind_a_parked_read() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    let mut holder = sidecars[0].client();
    assert_eq!(holder.line("GET item:1"), Value::Nil);
    let others = ["GET item:2", "SET plain x", "PING", "GET plain", "MULTI", "SUBSCRIBE c", "BLPOP list 1", "EVAL return{1} 0"];
    for (count, other) in (1..).zip(others) {
        let mut client = sidecars[0].client();
        client.send(&encode(&["GET", "item:1"])).unwrap();
        wait_for("the read to be parked", LIMIT, || total(&sidecars, "misses") > count && client.poll().is_none());
        client.send(&encode(&other.split(' ').collect::<Vec<_>>())).unwrap();
        assert_eq!(client.read().unwrap(), Value::Nil, "before {other}");
        client.read().unwrap_or_else(|error| panic!("{other}: {error}"));
    }
    assert_eq!(total(&sidecars, "unparked"), others.len() as u64);
    // Of a connection's readers one is told of the miss, and those after it to try again.
    let mut client = sidecars[0].client();
    client.send(&[encode(&["GET", "item:1"]), encode(&["GET", "item:1"]), encode(&["PING"])].concat()).unwrap();
    assert_eq!(client.read().unwrap(), Value::Nil);
    let Value::Error(text) = client.read().unwrap() else { panic!("an error") };
    assert!(
        text.starts_with("TRYAGAIN the key `item:1` of rule `item` is being loaded, by a client of this connection too"),
        "{text}"
    );
    assert_eq!(client.read().unwrap(), Value::Simple("PONG".to_owned()));
    assert_eq!((total(&sidecars, "unparked"), total(&sidecars, "cut_short")), (others.len() as u64 + 1, 1));
    // Within one pipeline nobody waits either.
    let mut client = sidecars[0].client();
    client.send(&[encode(&["GET", "item:1"]), encode(&["PING"])].concat()).unwrap();
    assert_eq!((client.read().unwrap(), client.read().unwrap()), (Value::Nil, Value::Simple("PONG".to_owned())));
    // What was passed on was the same miss: its fill is as good as the holder's.
    assert_eq!(client.line("SET item:1 v"), ok());
    assert_eq!(servers.holder_of("item:1").line("GET item:1"), bulk("v"));
}

const READERS: usize = 200;
/// How long a load takes, and for how long commands are timed where nobody loads.
const LOAD: Duration = Duration::from_millis(500);
/// After this a reader that was told to try again does.
const RETRY: Duration = Duration::from_millis(100);

/// What was sent over a connection that many share, and waits for its reply.
enum Sent {
    /// A reader's GET.
    Read,
    /// What a reader loaded.
    Fill,
    /// Somebody else's command, and when it was sent.
    Other(Instant),
}

/// A connection that many readers of one key share with others, who send one command after the other.
struct Shared {
    client: Client,
    sent: VecDeque<Sent>,
    /// When readers read again, and when they have loaded. In order, as each list has one delay.
    retries: VecDeque<Instant>,
    loads: VecDeque<Instant>,
    /// How many readers have no value.
    left: usize,
    /// How long the others' commands took.
    took: Vec<Duration>,
}

impl Shared {
    fn new(client: Client) -> Self {
        let (sent, retries, loads) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Self { client, sent, retries, loads, left: READERS, took: Vec::new() }
    }

    fn send(&mut self, what: Sent, command: &[&str]) {
        self.client.send(&encode(command)).unwrap();
        self.sent.push_back(what);
    }

    /// The next of the others' commands.
    fn send_other(&mut self) {
        let commands: [&[&str]; 3] = [&["GET", "plain"], &["SET", "plain", "x"], &["PING"]];
        self.send(Sent::Other(Instant::now()), commands[self.took.len() % commands.len()]);
    }

    fn send_what_is_due(&mut self, key: &str) {
        let is_due = |at: &mut Instant| *at <= Instant::now();
        while self.retries.pop_front_if(is_due).is_some() {
            self.send(Sent::Read, &["GET", key]);
        }
        while self.loads.pop_front_if(is_due).is_some() {
            self.send(Sent::Fill, &["SET", key, "v"]);
        }
    }

    /// Plays until each reader has its value. Where the key is there they read it over and over for as long as a load takes. Returns how
    /// long the others' commands took.
    fn play(mut self, key: &str, loads: &AtomicU64) -> Vec<Duration> {
        let begun = Instant::now();
        (0..READERS).for_each(|_| self.send(Sent::Read, &["GET", key]));
        self.send_other();
        while self.left > 0 {
            let reply = self.client.read().unwrap();
            match (self.sent.pop_front().expect("a reply to something"), reply) {
                (Sent::Other(at), reply) => {
                    assert!(!reply.is_error(), "{reply:?}");
                    self.took.push(at.elapsed());
                    self.send_other();
                }
                (Sent::Read, Value::Nil) => {
                    loads.fetch_add(1, Ordering::SeqCst);
                    self.loads.push_back(Instant::now() + LOAD);
                }
                (Sent::Read, Value::Error(text)) => {
                    assert!(text.starts_with("TRYAGAIN "), "{text}");
                    self.retries.push_back(Instant::now() + RETRY);
                }
                (Sent::Read, value) => {
                    assert_eq!(value, bulk("v"));
                    self.left -= 1;
                }
                (Sent::Fill, reply) => {
                    assert_eq!(reply, ok());
                    self.left -= 1;
                }
            }
            if self.left == 0 && begun.elapsed() < LOAD {
                self.left = READERS;
                self.retries.extend([Instant::now() + RETRY; READERS]);
            }
            self.send_what_is_due(key);
        }
        self.took
    }
}

/// What readers over one connection to each of five sidecars make: how many loads, and of what others send meanwhile the time that all
/// but a tenth keep within.
fn share(sidecars: &[Sidecar], key: &str) -> (u64, Duration) {
    let loads = AtomicU64::new(0);
    let mut took: Vec<Duration> = std::thread::scope(|scope| {
        let play = |sidecar: &Sidecar| {
            let (shared, loads) = (Shared::new(sidecar.client()), &loads);
            scope.spawn(move || shared.play(key, loads))
        };
        let threads: Vec<_> = sidecars.iter().map(play).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    took.sort_unstable();
    (loads.into_inner(), took[took.len() * 9 / 10])
}

#[test]
fn a_connection_that_is_never_quiet_makes_one_load_and_holds_nobody_up() {
    let servers = Servers::sentinel();
    let mut rules = [item(json!({})), super::rule("miss", json!({}), json!({}))];
    rules[1]["strategy"]["cacheAside"]["stampede"]["atWaitEnd"] = json!("miss");
    let sidecars = sidecars(&servers, 5, &rules);
    assert_eq!(sidecars[0].client().line("SET item:there v"), ok());
    let (loads, usual) = share(&sidecars, "item:there");
    assert_eq!(loads, 0);
    let (loads, took) = share(&sidecars, "item:cold");
    assert!((1..=5).contains(&loads), "{loads} loads over five connections");
    assert!(total(&sidecars, "cut_short") > 0);
    // A load takes far longer than that.
    assert!(
        took < usual * 20,
        "others' commands took {took:?} beside reads that wait, and {usual:?} beside those that find a value"
    );
    // Where the rule has misses passed on, all load.
    let (loads, _) = share(&sidecars, "miss:cold");
    assert!(loads > 5, "{loads} loads");
}

#[test]
fn a_pipeline_of_misses_is_filled_by_a_pipeline() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        let mut client = sidecars[0].client();
        let all = |command: &dyn Fn(u32) -> Vec<u8>| (0..100).flat_map(command).collect::<Vec<u8>>();
        client.send(&all(&|id| encode(&["GET", &format!("item:{id}")]))).unwrap();
        (0..100).for_each(|_| assert_eq!(client.read().unwrap(), Value::Nil));
        assert_eq!(total(&sidecars, "leases"), 100);
        client.send(&all(&|id| encode(&["SETEX", &format!("item:{id}"), "100", &id.to_string()]))).unwrap();
        (0..100).for_each(|_| assert_eq!(client.read().unwrap(), ok()));
        let mut other = sidecars[1].client();
        (0..100).for_each(|id| assert_eq!(other.line(&format!("GET item:{id}")), bulk(&id.to_string())));
        assert_eq!((total(&sidecars, "ambiguous_fills"), total(&sidecars, "late_fills")), (0, 0));
    }
}
