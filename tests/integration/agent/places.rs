//! In which place a server starts, and when it does not.

use std::fs;
use std::time::Duration;

use serde_json::json;

use super::tier::{Member, Tier, shipped, signal};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;

const KEYS: usize = 200;

fn write_keys(client: &mut Client) {
    for index in 0..KEYS {
        assert_eq!(client.line(&format!("SET key:{index} {index}")), Value::Simple("OK".to_owned()));
    }
}

fn keys_left(client: &mut Client) -> usize {
    (0..KEYS).filter(|index| client.line(&format!("GET key:{index}")) == Value::Bulk(index.to_string().into_bytes())).count()
}

#[test]
fn the_lowest_begins_and_the_others_wait_for_the_sentinels() {
    let tier = Tier::start(Engine::Redis7, 3, false);
    tier.wait("server 0 to become primary", || tier.members[0].phase() == json!("primary"));
    for member in &tier.members[1..] {
        tier.wait("the others to be held", || ["OthersTurn", "AnotherActs"].contains(&&*member.held_for()));
        assert!(member.is_closed());
        assert_eq!(member.get("/livez").0, 200);
        let (status, body) = member.get("/readyz");
        assert_eq!(status, 503);
        assert!(body.starts_with("held: "), "{body}");
        assert!(member.ask(&["probe", "start"]).status.success(), "held counts as started");
        assert!(!member.ask(&["probe", "ready"]).status.success());
        assert!(member.get("/metrics").1.contains("larder_agent_held{reason="));
    }
    tier.introduce();
    for member in &tier.members {
        assert_eq!(member.get("/readyz").0, 200);
        let metrics = member.get("/metrics").1;
        for name in ["redis_up 1", "redis_connected_clients ", "redis_memory_used_bytes ", "larder_agent_server_starts_total 1"] {
            assert!(metrics.contains(name), "{name}: {metrics}");
        }
    }
    assert!(tier.members[1].get("/metrics").1.contains("redis_master_link_up 1"));
    let state = tier.members[0].ask(&["state"]);
    assert!(state.status.success() && String::from_utf8_lossy(&state.stdout).contains("\"primary\""));
    assert_eq!(tier.members[0].get("/handover").0, 404, "nothing that changes anything is on the port");
}

#[test]
fn a_reborn_empty_primary_comes_back_as_a_replica_and_the_data_survives() {
    let tier = Tier::form(Engine::Redis7, 3, false);
    write_keys(&mut tier.members[0].client());
    assert_eq!(tier.members[0].client().line("WAIT 2 20000"), Value::Int(2));
    tier.members[0].kill_server();
    tier.wait("the reborn primary to be held", || tier.members[0].held_for() == "PeerAhead");
    assert!(tier.members[0].is_closed());
    let successor = tier.wait_for_successor(0);
    assert_eq!(keys_left(&mut tier.members[successor].client()), KEYS);
    assert_eq!(keys_left(&mut tier.members[0].client()), KEYS);
    // Once it has synchronised, it may lead again.
    tier.wait("it to be promotable", || {
        let mut client = tier.members[0].client();
        client.line("CONFIG GET replica-priority").items().get(1).is_some_and(|priority| priority.text() == "100")
    });
    assert!(tier.members[0].get("/metrics").1.contains("larder_agent_server_starts_total 2"));
}

#[test]
fn a_server_ends_with_its_agent_and_comes_back_as_a_replica() {
    let mut tier = Tier::form(Engine::Valkey9, 2, false);
    write_keys(&mut tier.members[0].client());
    assert_eq!(tier.members[0].client().line("WAIT 1 20000"), Value::Int(1));
    tier.members[0].kill_agent();
    tier.members[0].start_agent();
    let successor = tier.wait_for_successor(0);
    assert_eq!((successor, keys_left(&mut tier.members[1].client())), (1, KEYS));
}

/// A link is up before the replica has what was written while it was away: under a pause of writes a replica carries out nothing.
#[test]
fn a_server_that_follows_may_be_promoted_only_once_it_has_what_its_primary_had() {
    for engine in Engine::ALL {
        let tier = Tier::form(engine, 2, false);
        let (primary, replica) = (&tier.members[0], &tier.members[1]);
        let priority = || replica.client().line("CONFIG GET replica-priority").items()[1].text();
        tier.wait("it to be promotable", || priority() == "100");
        replica.kill_server();
        let paused = || Client::connect(replica.port)?.try_call(&["CLIENT", "PAUSE", "60000", "WRITE"]);
        tier.wait("its replication to stand still", || paused().is_ok_and(|answer| answer == Value::Simple("OK".to_owned())));
        let mut writer = primary.client();
        let follows = json!({"replica": {"of": primary.address(), "linkUp": true}});
        tier.wait("its link to be up", || {
            writer.line("INCR written");
            replica.phase() == follows
        });
        // Each is a look at the server.
        (0..4).for_each(|_| assert_eq!(replica.phase(), follows));
        assert_eq!(priority(), "0", "{engine:?}: it may be promoted without what was written");
        replica.client().line("CLIENT UNPAUSE");
        tier.wait("it to be promotable again", || priority() == "100");
    }
}

/// Ends every pod, by `end`, and brings all back in the other order.
fn check_durable(appendfsync: &str, end: fn(&mut Member)) {
    let arguments = ["--appendfsync".to_owned(), appendfsync.to_owned()];
    let mut tier = Tier::start_with(Engine::Redis7, 3, true, json!({}), &arguments);
    tier.introduce();
    write_keys(&mut tier.members[0].client());
    assert_eq!(tier.members[0].client().line("WAIT 2 20000"), Value::Int(2));
    tier.members.iter_mut().rev().for_each(end);
    tier.members.iter_mut().rev().for_each(Member::start_agent);
    tier.wait("a primary with everything", || {
        let primary = tier.members.iter().find(|member| member.phase() == json!("primary"));
        primary.is_some_and(|primary| keys_left(&mut primary.client()) == KEYS)
    });
    let named = tier.sentinels[0].names().expect("a primary is named");
    let primary = tier.members.iter().position(|member| member.port == named).expect("one of ours");
    tier.wait_until_whole(primary);
}

#[test]
fn all_pods_killed_at_once_come_back_with_all_that_was_on_their_disks() {
    check_durable("always", Member::kill_agent);
}

#[test]
fn all_pods_stopped_at_once_come_back_with_everything() {
    check_durable("everysec", |member| assert!(member.stop_agent().success()));
}

/// What `appendfsync everysec` had not written is gone where all die at once; nobody waits for ever all the same.
#[test]
fn all_pods_killed_at_once_with_writes_under_way_serve_again() {
    let mut tier = Tier::form(Engine::Redis7, 3, true);
    write_keys(&mut tier.members[0].client());
    tier.members.iter_mut().for_each(Member::kill_agent);
    tier.members.iter_mut().for_each(Member::start_agent);
    tier.wait("a primary that all follow", || {
        let count = |wanted: fn(&Member) -> bool| tier.members.iter().filter(|member| wanted(member)).count();
        count(|member| member.phase() == json!("primary")) == 1
            && count(|member| member.phase()["replica"]["linkUp"] == json!(true)) == 2
    });
}

#[test]
fn all_pods_at_once_with_ephemeral_data_give_an_empty_working_tier() {
    let mut tier = Tier::form(Engine::Redis7, 3, false);
    write_keys(&mut tier.members[0].client());
    for member in &mut tier.members {
        member.kill_agent();
    }
    // What a replica may have left on its disk must not be taken for data.
    fs::write(tier.members[0].data().join("dump.rdb"), "old").expect("writable");
    for member in &mut tier.members {
        member.start_agent();
    }
    tier.wait("a primary", || tier.members.iter().any(|member| member.phase() == json!("primary")));
    let primary = tier.members.iter().position(|member| member.phase() == json!("primary")).expect("a primary");
    tier.wait_until_whole(primary);
    let mut client = tier.members[primary].client();
    assert_eq!(client.line("DBSIZE"), Value::Int(0));
    write_keys(&mut client);
}

#[test]
fn only_a_person_ends_the_wait_for_peers_that_are_gone() {
    let mut tier = Tier::form(Engine::Redis7, 2, false);
    write_keys(&mut tier.members[0].client());
    tier.members[1].kill_agent();
    tier.members[0].kill_server();
    tier.wait("server 0 to be held", || tier.members[0].held_for() == "PeersUnknown");
    let state = tier.members[0].state();
    let message = state["server"]["held"]["message"].as_str().unwrap_or_default();
    assert!(message.contains(&tier.members[1].address()) && message.contains("recovery.acceptDataLoss"), "{message}");
    // It goes on waiting: several decisions later it is still held.
    std::thread::sleep(Duration::from_secs(3));
    assert!(tier.members[0].is_closed() && tier.members[0].held_for() == "PeersUnknown");
    tier.configure(json!({"recovery": {"acceptDataLoss": true}}));
    tier.wait("server 0 to serve", || tier.members[0].phase() == json!("primary"));
}

#[test]
fn it_ends_within_its_bound_and_takes_little_memory() {
    let mut tier = Tier::form(Engine::Redis7, 2, true);
    let status = fs::read_to_string(format!("/proc/{}/status", tier.members[0].agent_pid())).expect("the process lives");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the kernel counts");
    println!("the agent's resident memory:{resident}");
    let kib = |text: &str| text.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
    if shipped().is_some() {
        assert!(kib(resident) * 1024 <= 10_000_000, "{resident}");
    }
    let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel counts");
    assert!(kib(anonymous) * 1024 <= 10_000_000, "{anonymous}");
    assert!(tier.members[1].stop_agent().success());
    let record = fs::read_to_string(tier.members[1].data().join("larder-agent.json")).expect("a record");
    assert!(record.contains("\"clean\":true"), "{record}");
    // A server that does not react is killed when its time is over.
    tier.configure(json!({"shutdown": "1s"}));
    tier.wait("the configuration to be taken up", || tier.members[0].state()["generation"] == json!(tier.generation()));
    let pid = tier.members[0].server_pid();
    signal("STOP", pid);
    assert!(tier.members[0].stop_agent().success());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}
