//! How those hear of a fill who wait for it in other pods: through the cache, and where that is refused by looking, seldom.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, first_answered, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const SIDECARS: usize = 5;
const GET: [&str; 2] = ["GET", "item:1"];
/// The shortest pause between two looks of a pod that has looked three times: 400 ms, less up to a quarter.
const LOOK: Duration = Duration::from_millis(300);
/// A pod's questions that are no looks in vain: for the lease, when it has begun to listen, and the first two looks, which come sooner.
const FIRST: u64 = 5;

/// Whether a pod may listen for the end of other pods' leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channels {
    Open,
    Refused,
}

fn scene(channels: Channels) -> (Servers, Vec<Sidecar>) {
    let servers = Servers::sentinel();
    if channels == Channels::Refused {
        assert_eq!(servers.holder_of("").line("ACL SETUSER default -ssubscribe"), ok());
    }
    let sidecars = sidecars(&servers, SIDECARS, &[item(json!({}))]);
    (servers, sidecars)
}

/// How many scripts a server has carried out. A pod asks for a lease, looks, and stores by one.
fn scripts(server: &mut Client) -> u64 {
    let stats = server.line("INFO commandstats").text();
    let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls=")?.split(',').next()?.parse().ok());
    calls.unwrap_or_default()
}

/// How long it takes from the storing of a value until it is known to who waits for it in other pods, in the order of length. By then
/// each pod has looked so often that it does so as seldom as ever.
fn delays(channels: Channels) -> Vec<Duration> {
    let (servers, sidecars) = scene(channels);
    let (mut server, mut delays) = (servers.holder_of(""), Vec::new());
    for round in 0..6 {
        let key = format!("item:{round}");
        let mut holder = sidecars[0].client();
        assert_eq!(holder.call(&["GET", &key]), Value::Nil);
        let before = scripts(&mut server);
        let mut waiting: Vec<Client> = sidecars[1..].iter().map(Sidecar::client).collect();
        waiting.iter_mut().for_each(|client| client.send(&encode(&["GET", &key])).unwrap());
        let pods = waiting.len() as u64;
        wait_for("all to look seldom", LIMIT, || scripts(&mut server) >= before + pods * (FIRST + 1));
        let before = scripts(&mut server);
        let began = Instant::now();
        holder.send(&encode(&["SET", &key, "v"])).unwrap();
        let mut answers: Vec<Option<Value>> = waiting.iter().map(|_| None).collect();
        while answers.contains(&None) {
            for (client, answer) in waiting.iter_mut().zip(&mut answers).filter(|(_, answer)| answer.is_none()) {
                *answer = client.poll();
                delays.extend(answer.is_some().then(|| began.elapsed()));
            }
            assert!(began.elapsed() < LIMIT, "{answers:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(answers.iter().all(|answer| *answer == Some(bulk("v"))), "{answers:?}");
        assert_eq!(holder.read().unwrap(), ok());
        // One to store it, one of each pod to find it, and one that was under way.
        let asked = scripts(&mut server) - before;
        assert!(asked <= 1 + 2 * pods, "{channels:?}: {asked} scripts for {pods} pods");
    }
    for sidecar in &sidecars[1..] {
        assert_eq!(sidecar.log().contains("sharded channels are refused"), channels == Channels::Refused, "{}", sidecar.log());
    }
    delays.sort_unstable();
    delays
}

#[test]
fn who_waits_in_another_pod_is_woken_and_where_that_is_refused_looks() {
    let (woken, looked) = (delays(Channels::Open), delays(Channels::Refused));
    println!("woken: {woken:?}\nlooked: {looked:?}");
    // Those who look come at any time within a pause of some 350 ms.
    let median = |delays: &[Duration]| delays[delays.len() / 2];
    assert!(median(&woken) * 3 < median(&looked), "{:?} where they are woken, {:?} where not", median(&woken), median(&looked));
}

#[test]
fn a_thousand_readers_ask_no_more_than_their_sidecars_do() {
    const READERS: usize = 1_000;
    for channels in [Channels::Open, Channels::Refused] {
        let (servers, sidecars) = scene(channels);
        let mut server = servers.holder_of("");
        let mut clients: Vec<Client> = (0..READERS).map(|index| sidecars[index % SIDECARS].client()).collect();
        let began = Instant::now();
        clients.iter_mut().for_each(|client| client.send(&encode(&GET)).unwrap());
        let (holder, reply) = first_answered(&mut clients);
        assert_eq!(reply, Value::Nil);
        wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == READERS as u64);
        // If readers asked, or pods as soon as they are answered, so many would come at once.
        let pods = SIDECARS as u64;
        wait_for("the pods to look", LIMIT, || scripts(&mut server) >= pods * (FIRST + 4));
        let (asked, took) = (scripts(&mut server), began.elapsed());
        let most = pods * (FIRST + (took.as_millis() / LOOK.as_millis()) as u64);
        println!("{channels:?}: {asked} scripts in {took:?}, of {most}");
        assert!(asked <= most, "{channels:?}: {asked} scripts in {took:?}, more than {most}");
        assert_eq!(clients[holder].line("SET item:1 v"), ok());
        for (index, client) in clients.iter_mut().enumerate().filter(|(index, _)| *index != holder) {
            assert_eq!(client.read().unwrap(), bulk("v"), "client {index}, {channels:?}");
        }
        let asked = scripts(&mut server) - asked;
        let waited = (began.elapsed() - took).as_millis() / LOOK.as_millis();
        assert!(asked <= 1 + pods * (2 + waited as u64), "{channels:?}: {asked} scripts to tell {READERS} readers");
        assert_eq!((total(&sidecars, "leases"), total(&sidecars, "woken")), (1, READERS as u64 - 1));
    }
}
