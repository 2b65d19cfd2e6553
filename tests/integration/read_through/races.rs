//! Loads that race writes: what was loaded before a write is not stored over it, and not given to who asked after it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use super::{Servers, http_origin, web_rule};
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);
const GET: [&str; 2] = ["GET", "item:1"];

/// Two sidecars; a client of the first has asked for `item:1`, and its load, of the value `old`, is held.
struct Race {
    servers: Servers,
    web: Web,
    sidecars: [Sidecar; 2],
    early: Client,
}

impl Race {
    fn start(servers: Servers, resp3: bool) -> Self {
        let web = Web::start();
        let rules = [web_rule("item", json!({"stale": "1h", "lease": "30s", "wait": "30s"}))];
        let sidecars = [(); 2].map(|()| servers.sidecar(&[http_origin("web", &web, "30s")], &rules));
        web.put("/item/1", "old");
        web.hold("/item/1");
        let mut early = sidecars[0].client();
        if resp3 {
            early.line("HELLO 3");
        }
        early.send(&encode(&GET)).unwrap();
        wait_for("the load to begin", LIMIT, || web.visits("/item/1") == 1);
        web.put("/item/1", "new");
        Self { servers, web, sidecars, early }
    }

    /// New clients of both sidecars, who speak either protocol.
    fn clients(&self) -> Vec<Client> {
        let mut clients: Vec<Client> = self.sidecars.iter().flat_map(|sidecar| [sidecar.client(), sidecar.client()]).collect();
        clients.iter_mut().step_by(2).for_each(|client| drop(client.line("HELLO 3")));
        clients
    }

    fn stored(&self) -> Value {
        self.servers.holder_of("item:1").call(&GET)
    }
}

#[test]
fn a_load_that_races_a_deletion_is_not_stored() {
    for (servers, resp3) in [(Servers::cluster(), false), (Servers::sentinel(), true)] {
        let mut race = Race::start(servers, resp3);
        assert_eq!(race.sidecars[1].client().line("DEL item:1"), Value::Int(0));
        let mut late = race.clients();
        late.iter_mut().for_each(|client| client.send(&encode(&GET)).unwrap());
        wait_for("the second load", LIMIT, || race.web.visits("/item/1") == 2);
        race.web.release_one("/item/1");
        // It asked before the deletion.
        assert_eq!(race.early.read().unwrap().text(), "old");
        assert_eq!(race.stored(), Value::Nil);
        race.web.release("/item/1");
        late.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), "new"));
        assert_eq!(race.stored().text(), "new");
        race.clients().iter_mut().for_each(|client| assert_eq!(client.call(&GET).text(), "new"));
    }
}

#[test]
fn a_load_that_races_a_write_is_not_stored() {
    for write in ["SET item:1 written", "MSET item:1 written item:2 x", "APPEND item:1 written"] {
        let mut race = Race::start(Servers::sentinel(), false);
        assert!(!race.sidecars[1].client().line(write).is_error());
        race.clients().iter_mut().for_each(|client| assert_eq!(client.call(&GET).text(), "written", "{write}"));
        race.web.release("/item/1");
        assert_eq!(race.early.read().unwrap().text(), "old");
        assert_eq!(race.stored().text(), "written", "{write}");
        race.clients().iter_mut().for_each(|client| assert_eq!(client.call(&GET).text(), "written", "{write}"));
        assert_eq!(race.web.visits("/item/1"), 1);
    }
}

#[test]
fn a_read_is_not_answered_with_a_write_that_its_own_client_sent_behind_it() {
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let web = Web::start();
        let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &[web_rule("item", json!({"stale": "1h"}))]);
        let mut client = sidecar.client();
        for id in 0..20 {
            web.put(&format!("/item/{id}"), "of the origin");
            let (key, set) = (format!("item:{id}"), encode(&["SET", &format!("item:{id}"), "later"]));
            client.send(&[encode(&["GET", &key]), encode(&["MGET", &key, "item:x"]), set].concat()).unwrap();
            assert_eq!(client.read().unwrap().text(), "of the origin");
            assert_eq!(client.read().unwrap().items()[0].text(), "of the origin");
            assert_eq!(client.read().unwrap(), Value::Simple("OK".to_owned()));
            assert_eq!(client.call(&["GET", &key]).text(), "later");
        }
    }
}

#[test]
fn a_deletion_removes_the_stale_copy() {
    let mut race = Race::start(Servers::cluster(), false);
    race.web.release("/item/1");
    assert_eq!(race.early.read().unwrap().text(), "old");
    let mut client = race.sidecars[1].client();
    assert_eq!(client.line("DEL item:1"), Value::Int(1));
    assert_eq!(client.call(&GET).text(), "new");
}

/// How often each key is changed, and how many clients read it.
const CHANGES: u64 = 150;
const READERS: usize = 6;

/// One key whose value at the origin is a number that rises, each time followed by a deletion of the cached one.
#[derive(Default)]
struct Rising {
    /// The number whose deletion has been acknowledged.
    acknowledged: AtomicU64,
    over: AtomicBool,
}

fn path_of(key: &str) -> String {
    format!("/{}", key.replace(':', "/"))
}

/// Tells the readers that the changes are over, also where they fail.
struct Ending<'a>(&'a Rising);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

impl Rising {
    fn change(&self, web: &Web, key: &str, clients: &mut [Client]) {
        let _ending = Ending(self);
        for number in 1..=CHANGES {
            web.put_slow(&path_of(key), &number.to_string(), Duration::from_millis(number % 20));
            clients[number as usize % clients.len()].line(&format!("DEL {key}"));
            self.acknowledged.store(number, Ordering::SeqCst);
            // Readers may all be waiting for a load that is too old: here is one that asks now, of another sidecar.
            let seen = clients[(number as usize + 1) % clients.len()].line(&format!("GET {key}")).text();
            assert_eq!(seen, number.to_string(), "{key} after its deletion");
            std::thread::sleep(Duration::from_millis(number % 13));
        }
    }

    /// Reads until the changes are over. How many different numbers were seen.
    fn read(&self, key: &str, client: &mut Client) -> u64 {
        let (mut different, mut last) = (0, 0);
        while !self.over.load(Ordering::SeqCst) {
            let least = self.acknowledged.load(Ordering::SeqCst);
            let reply = client.line(&format!("GET {key}")).text();
            let number = reply.parse().unwrap();
            assert!(number >= least, "{key} was {number} after the deletion of everything before {least}");
            different += u64::from(number != last);
            last = number;
        }
        different
    }
}

#[test]
fn who_asks_after_a_deletion_gets_no_older_value() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let ttl = json!({"default": "20ms", "max": "1h", "jitter": "50%"});
    let rules = [
        web_rule("item", json!({"ttl": ttl, "lease": "1s", "wait": "50ms"})),
        web_rule("old", json!({"ttl": ttl, "stale": "1h", "lease": "1s", "wait": "50ms"})),
    ];
    let sidecars = [(); 3].map(|()| servers.sidecar(&[http_origin("web", &web, "20s")], &rules));
    let keys = ["item:1", "item:2", "old:1"].map(|name| (name, Rising::default()));
    keys.iter().for_each(|(key, _)| web.put(&path_of(key), "0"));
    std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for (number, (name, key)) in keys.iter().enumerate() {
            let web = &web;
            let mut clients: Vec<Client> = sidecars.iter().map(Sidecar::client).collect();
            scope.spawn(move || key.change(web, name, &mut clients));
            for reader in 0..READERS {
                let mut client = sidecars[(number + reader) % sidecars.len()].client();
                if reader % 2 == 0 {
                    client.line("HELLO 3");
                }
                readers.push(scope.spawn(move || key.read(name, &mut client)));
            }
        }
        let different: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert!(different > CHANGES, "the readers saw {different} numbers");
    });
}
