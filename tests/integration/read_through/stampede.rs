//! Many ask for one key at once: one load.

use std::path::Path;
use std::time::{Duration, Instant};

use larder::api::{Manifests, Reach, SecretKeyRef, compile};
use larder::policy::Span;
use larder::policy::snapshot::Sensitive;
use serde_json::{Value as Json, json};

use super::{Servers, http_origin, web_rule};
use crate::support::admin::{metric, rule_count};
use crate::support::resp::{Client, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

fn total(sidecars: &[Sidecar], counter: &str) -> u64 {
    sidecars.iter().map(|sidecar| rule_count(sidecar, "item", counter)).sum()
}

#[test]
fn a_thousand_connections_over_five_sidecars_make_one_load() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let web = Web::start();
        let rules = [web_rule("item", json!({"lease": "30s", "wait": "30s"}))];
        let sidecars: Vec<Sidecar> = (0..5).map(|_| servers.sidecar(&[http_origin("web", &web, "30s")], &rules)).collect();
        let mut clients: Vec<Client> = (0..1000).map(|index| sidecars[index % 5].client()).collect();
        for round in 1..=2 {
            let value = format!("value {round}");
            web.put("/item/7", &value);
            web.hold("/item/7");
            clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:7"])).unwrap());
            wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == 1000 * round);
            wait_for("the load to have reached the origin", LIMIT, || web.under_way("/item/7") >= 1);
            assert_eq!(web.under_way("/item/7"), 1);
            web.release("/item/7");
            clients.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), value));
            assert_eq!(web.visits("/item/7") as u64, round);
            assert_eq!(total(&sidecars, "loads"), round);
            assert_eq!(total(&sidecars, "coalesced"), 999 * round);
            clients.iter_mut().take(10).for_each(|client| assert_eq!(client.line("GET item:7").text(), value));
            assert_eq!((total(&sidecars, "hits"), total(&sidecars, "loads_saved")), (10 * round, 999 * round), "hits are hits");
            let ttl = servers.holder_of("item:7").line("PTTL item:7").int();
            assert!((1..=3_600_000).contains(&ttl), "{ttl}");
            servers.expire("item:7");
        }
    }
}

/// The snapshot of a policy that leaves `stampede` to its defaults.
fn by_default(servers: &Servers, web: &Web) -> Json {
    let manifests = format!(
        r#"apiVersion: larder.dev/v1alpha1
kind: CacheCluster
metadata: {{name: main}}
spec: {{engine: {{kind: Redis, version: "7.0"}}, mode: Cluster, shards: 3, memory: 256Mi}}
---
apiVersion: larder.dev/v1alpha1
kind: CachePolicy
metadata: {{name: shop}}
spec:
  cacheCluster: main
  workloads: {{matchLabels: {{app: shop}}}}
  origins: [{{name: web, http: {{url: {{value: "{}"}}, timeout: 30s}}}}]
  rules:
    - {{name: item, keys: "item:{{id}}", strategy: ReadThrough, origin: {{name: web, path: "/item/{{id}}"}}}}
"#,
        web.url()
    );
    let manifests = Manifests::parse(Path::new("shop.yaml"), &manifests).expect("valid manifests");
    let topology = serde_json::from_value(servers.topology()["topology"].clone()).expect("a topology");
    let reach = Reach { topology, tls: None, auth: None, sentinel_auth: None, patience: Span::from_secs(2) };
    let cluster = &manifests.clusters[0].object;
    let secrets = |_: &str, _: &SecretKeyRef| -> Result<Sensitive, String> { Err("there are no Secrets".to_owned()) };
    let snapshot = compile(cluster, &manifests.policies_for(cluster), 1, reach, &secrets).expect("a valid policy");
    serde_json::to_value(snapshot).expect("it can be written")
}

#[test]
fn a_load_of_two_seconds_is_made_once_with_the_default_settings() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let snapshot = by_default(&servers, &web);
    let sidecars: Vec<Sidecar> = (0..4).map(|_| Sidecar::start(&snapshot)).collect();
    web.put_slow("/item/7", "seven", Duration::from_secs(2));
    web.hold("/item/7");
    let mut clients: Vec<Client> = (0..40).map(|index| sidecars[index % 4].client()).collect();
    clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:7"])).unwrap());
    wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == 40);
    web.release("/item/7");
    clients.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), "seven"));
    assert_eq!((web.visits("/item/7"), total(&sidecars, "loads")), (1, 1));
}

/// A sidecar whose load of `item:7` is held, and three others, whose thirty clients wait for it.
struct Held {
    servers: Servers,
    web: Web,
    loader: Sidecar,
    others: Vec<Sidecar>,
    clients: Vec<Client>,
    /// Between these the clients of the others asked.
    asked: (Instant, Instant),
}

impl Held {
    fn start(settings: Json) -> Self {
        let (servers, web) = (Servers::cluster(), Web::start());
        let rules = [web_rule("item", settings)];
        let mut others: Vec<Sidecar> = (0..4).map(|_| servers.sidecar(&[http_origin("web", &web, "30s")], &rules)).collect();
        web.put("/item/7", "seven");
        web.hold("/item/7");
        let loader = others.remove(0);
        loader.client().send(&encode(&["GET", "item:7"])).unwrap();
        wait_for("the load to begin", LIMIT, || web.visits("/item/7") == 1);
        let mut clients: Vec<Client> = (0..30).map(|index| others[index % 3].client()).collect();
        let first = Instant::now();
        clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:7"])).unwrap());
        wait_for("the others to wait", LIMIT, || total(&others, "misses") == 30);
        Self { servers, web, loader, others, clients, asked: (first, Instant::now()) }
    }

    fn kill_the_loader(&self) {
        self.loader.signal("KILL");
        wait_for("a successor", LIMIT, || self.web.visits("/item/7") > 1);
    }

    /// Lets the successor's load end, which must be the only one.
    fn finish(mut self) {
        self.web.release("/item/7");
        self.clients.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), "seven"));
        assert_eq!(self.web.visits("/item/7"), 2);
        assert_eq!(total(&self.others, "loads"), 1);
        let queries = self.others.iter().map(|sidecar| metric(sidecar, "larder_origin_queries_total{origin=\"web\"}"));
        assert_eq!(queries.sum::<u64>(), 1);
        assert_eq!(self.servers.holder_of("item:7").line("GET item:7").text(), "seven");
    }
}

#[test]
fn a_killed_loader_has_one_successor() {
    let lease = Duration::from_secs(60);
    let held = Held::start(json!({"lease": "60s", "wait": "59s"}));
    let killed = Instant::now();
    held.kill_the_loader();
    let took = held.web.visited_at("/item/7")[1].saturating_duration_since(killed);
    held.finish();
    // However long a load may take, who makes it shows all the time that he lives.
    assert!(took < lease / 6, "the successor came after {took:?}");
}

/// When `wait` ends, nobody knows of the death yet. Whoever waits asks on until the lease has ended, and one of them gets it.
#[test]
fn a_loader_that_dies_late_has_one_successor_too() {
    let wait = Duration::from_secs(2);
    for _ in 0..10 {
        let held = Held::start(json!({"lease": "30s", "wait": "2s"}));
        let (first, last) = held.asked;
        // The lease is renewed for half a second at a time: one that is renewed shortly before its end outlives the wait.
        std::thread::sleep((last + wait - Duration::from_millis(250)).saturating_duration_since(Instant::now()));
        held.loader.signal("KILL");
        if first + wait <= Instant::now() {
            continue;
        }
        wait_for("a successor", LIMIT, || held.web.visits("/item/7") > 1);
        if held.web.visited_at("/item/7")[1] <= last + wait {
            continue;
        }
        // The others' wait is over, and they wait for the successor.
        std::thread::sleep(wait / 4);
        return held.finish();
    }
    panic!("the loader never died shortly before the others' wait was over: the test shows nothing");
}

#[test]
fn a_load_longer_than_its_lease_is_made_by_the_next_too() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let rules = [web_rule("item", json!({"lease": "300ms", "wait": "20s"}))];
    let sidecars: Vec<Sidecar> = (0..2).map(|_| servers.sidecar(&[http_origin("web", &web, "20s")], &rules)).collect();
    web.put("/item/7", "old");
    web.hold("/item/7");
    let mut clients: Vec<Client> = sidecars.iter().map(Sidecar::client).collect();
    clients[0].send(&encode(&["GET", "item:7"])).unwrap();
    wait_for("the first load", LIMIT, || web.visits("/item/7") == 1);
    clients[1].send(&encode(&["GET", "item:7"])).unwrap();
    wait_for("the second load", LIMIT, || web.visits("/item/7") == 2);
    web.put("/item/7", "new");
    web.release("/item/7");
    clients.iter_mut().for_each(|client| assert!(["old", "new"].contains(&client.read().unwrap().text().as_str())));
}
