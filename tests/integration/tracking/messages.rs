//! Who is told of what, and in which form.

use std::collections::BTreeSet;

use serde_json::json;

use super::{LIMIT, Tiers, Tracker, all_changed, bulk, changed, ok};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, Redis, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};
use crate::support::wait_for;

#[test]
fn whoever_changes_a_key_its_readers_hear_of_it_once() {
    Tiers::start().each(|sidecar, other, direct| {
        let mut reader = Tracker::start(sidecar.client(), "");
        let (mut near, mut far) = (sidecar.client(), other.client());
        for key in ["{a}k", "{b}k", "{c}k"] {
            let mut direct = direct(key);
            for writer in [&mut near, &mut far, &mut direct] {
                for write in ["SET KEY v", "APPEND KEY w", "DEL KEY"] {
                    let before = reader.line(&format!("GET {key}"));
                    assert!(matches!(before, Value::Nil | Value::Bulk(_)));
                    assert!(!writer.line(&write.replace("KEY", key)).is_error());
                    reader.expect(&changed(&[key]));
                    // What has not been read since is not told of.
                    writer.line(&format!("SET {key} x"));
                    reader.expect_silence();
                }
            }
        }
        // Each way to read; keys of several slots; its own writes.
        for read in ["MGET {a}k {b}k {c}k", "EXISTS {a}k {c}k", "STRLEN {a}k", "TYPE {a}k", "XREAD STREAMS {a}none 0 {a}k"] {
            reader.line(read);
            assert!(!near.line("SET {a}k y").is_error());
            if !read.starts_with("XREAD") {
                reader.expect(&changed(&["{a}k"]));
            }
        }
        assert_eq!(reader.line("GET {b}k"), bulk("x"));
        assert_eq!(reader.line("SET {b}k z"), ok());
        reader.expect(&changed(&["{b}k"]));
        // What expires has changed.
        assert_eq!(near.line("SET {a}k v PX 200"), ok());
        assert_eq!(reader.line("GET {a}k"), bulk("v"));
        reader.expect(&changed(&["{a}k"]));
        nobody_else_hears(&mut reader, &mut near);
    });
}

fn nobody_else_hears(reader: &mut Tracker, near: &mut Client) {
    assert_eq!(near.line("SET {a}k v"), ok());
    assert_eq!(reader.line("GET {a}k"), bulk("v"));
    assert_eq!(reader.line("CLIENT TRACKING OFF"), ok());
    reader.pushes();
    assert_eq!(near.line("SET {a}k w"), ok());
    reader.expect_silence();
}

/// Within a transaction, by a script, or where it blocks: what was read is told of behind the reply, so that nobody keeps it.
#[test]
fn what_is_read_on_other_ways_is_not_kept() {
    Tiers::start().each(|sidecar, _, _| {
        let mut reader = Tracker::start(sidecar.client(), "");
        assert_eq!(reader.line("SET {a}k v"), ok());
        for (lines, key) in [
            (&["MULTI", "GET {a}k", "EXEC"][..], "{a}k"),
            (&["EVAL return{redis.call('get',KEYS[1])} 1 {a}s"], "{a}s"),
            (&["XREAD BLOCK 10 STREAMS {a}x $"], "{a}x"),
        ] {
            reader.pushes();
            lines.iter().for_each(|line| assert!(!reader.line(line).is_error(), "{line}"));
            reader.expect(&changed(&[key]));
        }
        // A long key is named where the command came whole; one that is too long is not.
        let long = vec![b'k'; 200_000];
        reader.client.send(&encode(&[&b"GET"[..], &long])).unwrap();
        assert_eq!(reader.reply(), Value::Nil);
        assert_eq!(sidecar.client().call(&[&b"SET"[..], &long, b"v"]), ok());
        let named = changed(&[std::str::from_utf8(&long).unwrap()]);
        expect_any(&mut reader, &[all_changed(), named]);
        let many = [b"MGET".to_vec(), vec![b'k'; 1_200_000], vec![b'l'; 1_200_000]];
        reader.client.send(&encode(&many)).unwrap();
        assert_eq!(reader.reply(), Value::Array(vec![Value::Nil, Value::Nil]));
        reader.expect(&all_changed());
    });
}

fn expect_any(reader: &mut Tracker, wanted: &[Value]) {
    let mut seen = Vec::new();
    wait_for("word of a long key", LIMIT, || {
        seen.extend(reader.pushes());
        seen.iter().any(|push| wanted.contains(push))
    });
}

#[test]
fn modes_choose_what_is_told() {
    Tiers::start().each(|sidecar, other, _| {
        let mut writer = other.client();
        let mut all = Tracker::start(sidecar.client(), "BCAST");
        let mut some = Tracker::start(sidecar.client(), "BCAST PREFIX user: PREFIX {b}");
        let mut chosen = Tracker::start(sidecar.client(), "OPTIN");
        let mut spared = Tracker::start(sidecar.client(), "OPTOUT");
        all.pushes();
        for key in ["user:1", "{b}k", "order:1"] {
            assert_eq!(writer.line(&format!("SET {key} v")), ok());
            all.expect(&changed(&[key]));
            if key != "order:1" {
                some.expect(&changed(&[key]));
            }
        }
        some.expect_silence();
        // Another prefix, while it hears already.
        assert_eq!(some.line("CLIENT TRACKING ON BCAST PREFIX order:"), ok());
        assert_eq!(writer.line("SET order:1 w"), ok());
        some.expect(&changed(&["order:1"]));

        assert_eq!(chosen.line("GET order:1"), bulk("w"));
        assert_eq!(chosen.line("CLIENT CACHING YES"), ok());
        assert_eq!(chosen.line("GET user:1"), bulk("v"));
        assert_eq!(chosen.line("GET {b}k"), bulk("v"));
        assert_eq!(spared.line("GET order:1"), bulk("w"));
        assert_eq!(spared.line("CLIENT CACHING NO"), ok());
        assert_eq!(spared.line("GET user:1"), bulk("v"));
        for key in ["order:1", "user:1", "{b}k"] {
            assert_eq!(writer.line(&format!("SET {key} z")), ok());
        }
        chosen.expect(&changed(&["user:1"]));
        spared.expect(&changed(&["order:1"]));
        chosen.expect_silence();
        spared.expect_silence();
        assert_eq!(chosen.line("RESET"), Value::Simple("RESET".to_owned()));
        assert_eq!(chosen.line("CLIENT GETREDIR"), Value::Int(-1));
    });
}

/// Messages as a server sends them: the same is done at a bare server and through the sidecar.
#[test]
fn messages_have_the_servers_own_form() {
    for engine in Engine::ALL {
        let servers = SentinelCluster::start(engine, 1);
        let mut snapshot = bypass(sentinel_topology(&servers));
        snapshot["allow"] = json!({"flush": true});
        let sidecar = Sidecar::start_with(&snapshot, &["--workers", "2"]);
        let bare = Redis::start(engine);
        let told: Vec<Vec<Value>> =
            [&(|| bare.client()) as &dyn Fn() -> Client, &|| sidecar.client()].iter().map(|connect| tell(connect)).collect();
        assert_eq!(told[0], told[1]);
    }
}

/// The frames that clients of either protocol get, with numbers of connections left out.
fn tell(connect: &dyn Fn() -> Client) -> Vec<Value> {
    let mut frames = Vec::new();
    let mut writer = connect();
    let mut direct = Tracker::start(connect(), "");
    assert_eq!(writer.line("SET k v"), ok());
    for write in ["SET k w", "FLUSHALL"] {
        direct.line("GET k");
        direct.pushes();
        assert_eq!(writer.line(write), ok());
        wait_for("a push", LIMIT, || {
            frames.extend(direct.pushes());
            frames.iter().filter(|frame| matches!(frame, Value::Push(_))).count() > usize::from(write == "FLUSHALL")
        });
    }
    // Under RESP2 another connection hears, wherever it is.
    for _ in 0..4 {
        let (mut hearer, mut reader) = (connect(), connect());
        let id = hearer.line("CLIENT ID").int();
        assert!(!hearer.line("SUBSCRIBE __redis__:invalidate").is_error());
        assert_eq!(reader.line(&format!("CLIENT TRACKING ON REDIRECT {id}")), ok());
        assert_eq!(reader.line("CLIENT GETREDIR"), Value::Int(id));
        for write in ["SET k w", "FLUSHALL"] {
            reader.line("GET k");
            assert_eq!(writer.line(write), ok());
            frames.push(hearer.read().unwrap());
        }
        // Under RESP3 it hears that the other is gone.
        assert!(!reader.line("HELLO 3").is_error());
        drop(hearer);
        wait_for("the other to be gone", LIMIT, || {
            let list = writer.line("CLIENT LIST").text();
            !list.lines().any(|line| line.starts_with(&format!("id={id} ")))
        });
        reader.line("GET k");
        assert_eq!(writer.line("SET k x"), ok());
        let Value::Push(mut broken) = reader.read().unwrap() else { panic!("a push is expected") };
        assert_eq!(broken.pop(), Some(Value::Int(id)));
        frames.push(Value::Push(broken));
        frames.push(reader.line("CLIENT TRACKINGINFO").items()[1].clone());
        let nobody = reader.line("CLIENT TRACKING ON REDIRECT 123456789");
        assert!(nobody.is_error());
        frames.push(nobody);
        drop(reader);
    }
    frames
}

/// What waits for another client is bounded: it hears of each change, or that all may have changed; where it does not read, it is closed.
#[test]
fn messages_for_another_client_are_bounded() {
    const FLOOD: usize = 200_000;
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start_with(&bypass(sentinel_topology(&servers)), &["--workers", "2"]);
    let mut direct = servers.primary().client();
    // Some of them are on one worker, some on two.
    for _ in 0..4 {
        let (mut hearer, mut reader) = (sidecar.client(), sidecar.client());
        assert!(!hearer.line("HELLO 3").is_error());
        let id = hearer.line("CLIENT ID").int();
        assert_eq!(reader.line(&format!("CLIENT TRACKING ON BCAST REDIRECT {id}")), ok());
        let name = |number: usize| format!("k{number:06}");
        let wire: Vec<u8> = (0..FLOOD).flat_map(|number| encode(&["SET", &name(number), "v"])).collect();
        let mut hears = Tracker { client: hearer, pushes: Vec::new() };
        let mut told = Vec::new();
        for part in wire.chunks(64 * 1024) {
            direct.send(part).unwrap();
            told.extend(hears.pushes());
        }
        (0..FLOOD).for_each(|_| assert_eq!(direct.read().unwrap(), ok()));
        wait_for("what is changed last", LIMIT, || {
            assert_eq!(direct.line("SET last v"), ok());
            told.extend(hears.pushes());
            told.iter().any(|push| format!("{push:?}").contains("\"last\""))
        });
        let all = told.contains(&all_changed());
        let named: BTreeSet<String> = told
            .iter()
            .filter_map(|push| push.items().pop())
            .filter(|keys| *keys != Value::Nil)
            .flat_map(|keys| keys.items())
            .map(|key| key.text())
            .collect();
        let missing = (0..FLOOD).filter(|number| !named.contains(&name(*number))).count();
        assert!(all || missing == 0, "{missing} changes were told neither by name nor with all others");
    }

    let mut hearer = sidecar.client();
    assert!(!hearer.line("HELLO 3").is_error());
    let id = hearer.line("CLIENT ID").int();
    let mut reader = Tracker::start(sidecar.client(), &format!("BCAST REDIRECT {id}"));
    let key = "k".repeat(50_000);
    let broken = Value::Push(vec![bulk("tracking-redir-broken"), Value::Int(id)]);
    wait_for("the client that does not read to be closed", 6 * LIMIT, || {
        (0..50).for_each(|number| assert_eq!(direct.line(&format!("SET {key}{number} v")), ok()));
        reader.pushes().contains(&broken)
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", sidecar.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB").parse::<u64>();
    assert!(peak.unwrap() < 400 * 1024, "{status}");
}

/// What a rule may answer with something else than the key's own value is not kept.
#[test]
fn keys_that_a_rule_may_answer_for_are_not_kept() {
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let mut snapshot = bypass(sentinel_topology(&servers));
    let lifetime = json!({"default": "10m", "max": "1h", "jitter": "10%"});
    let stampede = json!({"lease": "3s", "wait": "1s", "atWaitEnd": "error"});
    snapshot["rules"] = json!([
        {"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": lifetime, "stale": "1m", "stampede": stampede}}},
        {"name": "plain", "keys": "plain:{id}", "strategy": {"cacheAside": {"ttl": lifetime}}},
    ]);
    let sidecar = Sidecar::start(&snapshot);
    let mut reader = Tracker::start(sidecar.client(), "");
    assert_eq!(reader.line("SET user:1 v"), ok());
    assert_eq!(reader.line("GET user:1"), bulk("v"));
    reader.expect(&changed(&["user:1"]));
    assert_eq!(reader.line("SET plain:1 v"), ok());
    assert_eq!(reader.line("GET plain:1"), bulk("v"));
    reader.expect_silence();
    assert_eq!(sidecar.client().line("DEL plain:1"), Value::Int(1));
    reader.expect(&changed(&["plain:1"]));
    // Larder's own keys are nobody's business.
    let mut all = Tracker::start(sidecar.client(), "BCAST");
    all.pushes();
    assert_eq!(sidecar.client().line("SET user:2 v"), ok());
    all.expect(&changed(&["user:2"]));
    let told = all.pushes();
    assert!(!format!("{told:?}").contains("larder:"), "{told:?}");
}
