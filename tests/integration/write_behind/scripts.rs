//! Random steps hold the scripts, on a real server, to the model with which the simulation plays.

use std::collections::BTreeMap;
use std::time::Duration;

use larder::journal::model::{self, Broken};
use larder::journal::scripts::{self, Appended, Bounds, Call, Claimed, Fenced, Left};
use larder::journal::{Change, Held, Partition, Version};

use super::{bytes, entries, journal};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis};

const STEPS: usize = 60;
const HISTORIES: u64 = 40;
const MOST_DEAD: u64 = 3;
/// What is never over within a test.
const LONG_MS: u64 = 600_000;

fn ask(client: &mut Client, call: &Call) -> Vec<Vec<u8>> {
    match client.call(&call.command()) {
        Value::Array(items) => items.iter().map(bytes).collect(),
        other => panic!("{other:?}"),
    }
}

fn words(answer: &[Vec<u8>]) -> Vec<&[u8]> {
    answer.iter().map(Vec::as_slice).collect()
}

fn clock(client: &mut Client) -> u64 {
    let time = client.call(&["TIME"]).items();
    let number = |at: usize| time[at].text().parse::<u64>().expect("a number");
    number(0) * 1_000_000 + number(1)
}

/// What the server has, in the model's terms; who has claimed it is the model's to know.
fn state(client: &mut Client, partition: &Partition, relay: Option<(String, u64)>) -> model::Partition {
    let hash = |client: &mut Client, name: Vec<u8>| -> BTreeMap<Vec<u8>, Vec<u8>> {
        let all = client.call(&[b"HGETALL".to_vec(), name]).items();
        all.chunks(2).map(|pair| (bytes(&pair[0]), bytes(&pair[1]))).collect()
    };
    let head = hash(client, partition.head());
    let number = |name: &str| head.get(name.as_bytes()).map_or(0, |digits| Version::parse(digits).expect("a number").get());
    let dirty = hash(client, partition.dirty());
    let parked = hash(client, partition.parked());
    let away = hash(client, partition.away());
    let passing = |text: Vec<u8>| {
        let text = String::from_utf8(text).expect("a text");
        let (until, version) = text.split_once(' ').expect("two numbers");
        (until.parse::<u64>().expect("a number"), Version::parse(version.as_bytes()).expect("a version"))
    };
    model::Partition {
        log: entries(client, partition),
        dirty: dirty.into_iter().map(|(key, held)| (key, Held::parse(&held).expect("a write"))).collect(),
        away: away.into_iter().map(|(key, text)| (key, passing(text))).collect(),
        last: Version::new(number("last")),
        position: Version::new(number("position")),
        bytes: (number("in"), number("out")),
        fence: number("fence"),
        relay,
        parked: parked.into_iter().map(|(key, version)| (key, Version::parse(&version).expect("a version"))).collect(),
        dead: letters(client, partition),
    }
}

/// The versions of the dead letters.
fn letters(client: &mut Client, partition: &Partition) -> Vec<Version> {
    let all = client.call(&[b"XRANGE".to_vec(), partition.dead(), b"-".to_vec(), b"+".to_vec()]).items();
    let version = |letter: &Value| Version::parse(&bytes(&letter.items()[1].items()[1])).expect("a version");
    all.iter().map(version).collect()
}

#[test]
fn the_scripts_do_what_the_model_says() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let server = Redis::start(engine);
        for seed in 0..HISTORIES {
            server.client().line("FLUSHALL");
            play(&mut server.client(), seed);
        }
    }
}

fn changes(random: &mut fastrand::Rng) -> Vec<Change> {
    let change = |random: &mut fastrand::Rng| Change {
        key: vec![b'k', 0, random.u8(..3)],
        value: (random.u8(..4) > 0).then(|| (0..random.usize(..40)).map(|_| random.u8(..)).collect()),
    };
    (0..random.usize(1..4)).map(|_| change(random)).collect()
}

fn play(client: &mut Client, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (partition, mut model) = (Partition::new(&journal(), 3), model::Partition::default());
    for step in 0..STEPS {
        let now = clock(client);
        let what = match random.u8(..10) {
            0..4 => {
                let changes = changes(&mut random);
                let until = if random.u8(..8) == 0 { now - 1 } else { now + LONG_MS * 1_000 };
                let age_ms = if random.u8(..8) == 0 { 0 } else { LONG_MS };
                let bounds = Bounds { depth: random.u64(3..20), bytes: random.u64(500..4_000), age_ms };
                let answer = ask(client, &scripts::append(&partition, until, bounds, &changes));
                let appended = scripts::appended(&words(&answer)).expect("an answer");
                // The first version is the time at which the server took it.
                let then = if let Appended::Done(versions) = &appended { versions[0].get() } else { clock(client) };
                assert!(then >= now, "versions are the server's time");
                let expected = model.append(then, if until < now { 0 } else { until }, bounds, &changes, Broken::Nothing);
                assert_eq!(appended, expected, "seed {seed}, step {step}");
                format!("{changes:?}: {appended:?}")
            }
            4 => {
                let (token, short) = (format!("relay{}", random.u8(..2)), random.bool());
                let millis = if short { 1 } else { LONG_MS };
                let answer = ask(client, &scripts::claim(&partition, &token, millis));
                let claimed = scripts::claimed(&words(&answer)).expect("an answer");
                let then = match claimed {
                    Claimed::Yes { fence, .. } if fence != model.fence => fence,
                    _ => now,
                };
                assert_eq!(claimed, model.claim(then, &token, millis), "seed {seed}, step {step}");
                // The server's clock has to pass it, too.
                std::thread::sleep(Duration::from_millis(if short { 3 } else { 0 }));
                format!("{token} claims for {millis} ms: {claimed:?}")
            }
            5 | 6 => {
                let fence = if random.u8(..8) == 0 { 7 } else { model.fence };
                let Some(last) = random.choice(&model.log).cloned() else { continue };
                let applied: Vec<(Vec<u8>, Version)> = model
                    .log
                    .iter()
                    .filter(|entry| entry.version <= last.version && !model.parked.contains_key(&entry.change.key))
                    .map(|entry| (entry.change.key.clone(), entry.version))
                    .collect();
                let answer = ask(client, &scripts::done(&partition, fence, last.version, last.through, &applied));
                let done = scripts::done_answer(&words(&answer)).expect("an answer");
                let expected = model.done(fence, last.version, last.through, &applied, Broken::Nothing);
                assert_eq!(done, expected, "seed {seed}, step {step}");
                format!("done up to {:?}: {done:?}", last.version)
            }
            7 => {
                let first = random.u8(..3);
                let keys: Vec<Vec<u8>> = (0..random.u8(1..3)).map(|at| vec![b'k', 0, (first + at) % 3]).collect();
                let (short, until) = (random.bool(), if random.u8(..8) == 0 { now - 1 } else { now + LONG_MS * 1_000 });
                let micros = if short { 1 } else { LONG_MS * 1_000 };
                let answer = ask(client, &scripts::leave(&partition, until, micros, &keys));
                let left = scripts::left(&words(&answer)).expect("an answer");
                let then = if let Left::Done(versions) = &left { versions[0].get() } else { clock(client) };
                let expected = model.leave(then, if until < now { 0 } else { until }, micros, &keys, Broken::Nothing);
                assert_eq!(left, expected, "seed {seed}, step {step}");
                std::thread::sleep(Duration::from_millis(if short { 2 } else { 0 }));
                format!("{keys:?} leave for {micros} us: {left:?}")
            }
            8 => {
                let Some((key, (_, version))) = random.choice(&model.away).map(|(key, away)| (key.clone(), *away)) else {
                    continue;
                };
                let version = if random.u8(..4) == 0 { Version::new(version.get() + 1) } else { version };
                let answer = ask(client, &scripts::arrive(&partition, &[(key.clone(), version)]));
                let arrived = scripts::arrived(&words(&answer)).expect("an answer");
                assert_eq!(arrived, model.arrive(&[(key.clone(), version)]), "seed {seed}, step {step}");
                format!("{key:?} arrives with {version}: {arrived}")
            }
            _ => {
                let Some(entry) = random.choice(&model.log).cloned() else { continue };
                let fence = if random.u8(..8) == 0 { 7 } else { model.fence };
                let answer = ask(client, &scripts::park(&partition, fence, MOST_DEAD, entry.version, &entry.change, "no"));
                let parked = scripts::parked(&words(&answer)).expect("an answer");
                assert_eq!(parked, model.park(fence, MOST_DEAD, entry.version, &entry.change.key), "seed {seed}, step {step}");
                format!("{:?} is parked: {parked:?}", entry.version)
            }
        };
        let seen = state(client, &partition, model.relay.clone());
        assert_eq!(seen, model, "seed {seed}, step {step}: {what}");
    }
    let answer = ask(client, &scripts::status(&partition));
    let status = scripts::status_answer(&words(&answer)).expect("an answer");
    assert_eq!(status.depth, model.log.len() as u64);
    assert_eq!(status.bytes, model.bytes.0 - model.bytes.1);
    assert_eq!(status.oldest, model.log.first().map(|entry| entry.version));
    assert_eq!((status.last, status.position, status.fence), (model.last, model.position, model.fence));
    assert_eq!(
        (status.dirty, status.dead, status.parked),
        (model.dirty.len() as u64, model.dead.len() as u64, model.parked.len() as u64)
    );
}

#[test]
fn a_server_that_is_full_appends_nothing_and_trims_all_the_same() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let server = Redis::start_with(engine, &["--maxmemory-policy", "volatile-lfu"]);
        let (mut client, partition) = (server.client(), Partition::new(&journal(), 0));
        let bounds = Bounds { depth: 100, bytes: 1 << 20, age_ms: LONG_MS };
        let until = clock(&mut client) + LONG_MS * 1_000;
        let changes = [Change { key: b"k".to_vec(), value: Some(b"v".to_vec()) }];
        let append = scripts::append(&partition, until, bounds, &changes);
        let answer = ask(&mut client, &append);
        let Ok(Appended::Done(versions)) = scripts::appended(&words(&answer)) else { panic!("{answer:?}") };
        let answer = ask(&mut client, &scripts::claim(&partition, "relay", LONG_MS));
        let Ok(Claimed::Yes { fence, .. }) = scripts::claimed(&words(&answer)) else { panic!("{answer:?}") };
        client.line("CONFIG SET maxmemory 1");
        assert!(client.call(&append.command()).is_error(), "a full server appends nothing");
        let through = entries(&mut client, &partition)[0].through;
        let done = scripts::done(&partition, fence, versions[0], through, &[(b"k".to_vec(), versions[0])]);
        assert_eq!(scripts::done_answer(&words(&ask(&mut client, &done))), Ok(Fenced::Done(1)));
        assert_eq!(entries(&mut client, &partition), []);
    }
}
