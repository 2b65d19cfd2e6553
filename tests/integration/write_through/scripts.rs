//! Random steps hold the scripts, on a real server, to the model with which the simulation plays.

use std::collections::BTreeMap;
use std::time::Duration;

use larder::origin::fields::pack;
use larder::sidecar::patterns::content::{Content, Form};
use larder::sidecar::patterns::write_through::model::{Best, Broken, Key, Outcome, Token};
use larder::sidecar::patterns::write_through::scripts::{self, Names};
use larder::sidecar::slots::Companion;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis};

const KEY: &str = "user:7";
const STEPS: usize = 60;
const HISTORIES: u64 = 60;
/// What is never over within a test, and what is over at once.
const LONG_MS: u64 = 600_000;
const SHORT_MS: u64 = 1;

/// A server's answer to a script, as bytes.
fn ask(client: &mut Client, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut wire = Vec::new();
    write(&mut wire);
    client.send(&wire).expect("sent");
    match client.read().expect("an answer") {
        Value::Int(number) => format!(":{number}\r\n").into_bytes(),
        Value::Array(items) => {
            let text = items[0].text();
            format!("*1\r\n${}\r\n{text}\r\n", text.len()).into_bytes()
        }
        other => panic!("{other:?}"),
    }
}

fn companion(which: Companion) -> String {
    String::from_utf8(which.name(KEY.as_bytes())).expect("text")
}

/// What the server has, in the model's terms. `long`: whose marks are not over.
fn state(client: &mut Client, until: &BTreeMap<Token, u64>, form: Form) -> Key {
    let text = |value: Value| if value == Value::Nil { None } else { Some(value.text()) };
    let mark = client.call(&["HGETALL", &companion(Companion::Intent)]).items();
    let (mut key, mut best) = (Key::default(), None);
    for pair in mark.chunks(2) {
        match pair[0].text().as_str() {
            "m" => key.mixed = true,
            "v" => best = Some(pair[1].text()),
            token => {
                let token = token.strip_prefix("t:").expect("a token").parse().expect("a number");
                key.marks.insert(token, until[&token]);
            }
        }
    }
    key.best = match best.as_deref() {
        None => Best::None,
        Some("x") => Best::Unknown,
        Some(version) => Best::Version(version.parse().expect("a number")),
    };
    let command: &[&str] = match form {
        Form::Text => &["GET", KEY],
        Form::Hash => &["HGET", KEY, "v"],
    };
    key.value = text(client.call(command)).map(|value| value.parse().expect("a number"));
    key.lease = text(client.call(&["GET", &companion(Companion::Lease)])).map(|token| token.parse().expect("a number"));
    key
}

#[test]
fn the_scripts_do_what_the_model_says() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let server = Redis::start(engine);
        for seed in 0..HISTORIES {
            server.client().line("FLUSHALL");
            play(&mut server.client(), seed, if seed % 2 == 0 { Form::Text } else { Form::Hash });
        }
    }
}

/// A value in this form: of a hash, the one field of it.
fn content(form: Form, value: &str) -> Content<'static> {
    match form {
        Form::Text => Content::new(form, value.as_bytes().to_vec()),
        Form::Hash => Content::new(form, pack([(&b"v"[..], value.as_bytes())])),
    }
}

fn play(client: &mut Client, seed: u64, form: Form) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (names, mut model) = (Names::of(KEY.as_bytes(), false), Key::default());
    let (mut until, mut version, mut now) = (BTreeMap::new(), 8u64, 1u64);
    for step in 0..STEPS {
        let token = random.u64(1..6);
        let what = match random.u8(0..8) {
            0..=2 => {
                // Whoever is known begins again as one whose question is repeated: with the time that he had.
                let short = random.u8(0..4) == 0;
                let millis = if short { SHORT_MS } else { LONG_MS };
                until.insert(token, if short { now } else { u64::MAX });
                let begun = scripts::begun(&ask(client, |out| scripts::begin(&names, &token.to_string(), millis, out)));
                assert_eq!(begun, Ok(None));
                assert!(model.begin(token, now, until[&token], scripts::MOST_AT_ONCE, Broken::Nothing));
                if short {
                    // The server's clock has to pass it, too.
                    std::thread::sleep(Duration::from_millis(3));
                }
                now += 1;
                format!("{token} begins for {millis} ms")
            }
            3..=5 => {
                version += 1;
                let told = random.bool().then_some(version - random.u64(0..3));
                let content = content(form, &version.to_string());
                let (outcome, ours) = match random.u8(0..4) {
                    0 => (scripts::Outcome::Deleted, Outcome::Deleted),
                    1 => (scripts::Outcome::Refused(None), Outcome::Refused),
                    _ => {
                        let life = (60_000, false);
                        let value = &content;
                        let stored =
                            scripts::Outcome::Stored { version: told, value, life, most: 90_000, stale: 10_000, tag: None };
                        (stored, Outcome::Stored(version, told))
                    }
                };
                let kept = scripts::ended(&ask(client, |out| scripts::end(&names, &token.to_string(), outcome, out)));
                assert_eq!(kept, Ok(model.end(token, now, ours, Broken::Nothing)), "seed {seed}, step {step}: {token} {ours:?}");
                format!("{token} ends: {ours:?}")
            }
            6 => {
                (model.value, model.lease) = (None, None);
                client.call(&["DEL", KEY, &companion(Companion::Lease)]);
                "the key is evicted".to_owned()
            }
            _ => {
                model.lease = Some(token);
                client.call(&["SET", &companion(Companion::Lease), &token.to_string()]);
                format!("{token} has the lease")
            }
        };
        let seen = state(client, &until, form);
        assert_eq!(seen, model, "seed {seed}, step {step}: {what}");
        // The mark is never dropped by a full server, and the value and its copy have their time.
        assert!([-1, -2].contains(&client.call(&["PTTL", &companion(Companion::Intent)]).int()));
        if seen.value.is_some() {
            assert!((1..=60_000).contains(&client.call(&["PTTL", KEY]).int()));
        }
    }
}

#[test]
fn versions_of_any_length_are_compared_as_numbers() {
    let server = Redis::start(Engine::Valkey9);
    let mut client = server.client();
    let names = Names::of(KEY.as_bytes(), false);
    let content = content(Form::Text, "x");
    let stored = |version: u64| scripts::Outcome::Stored {
        version: Some(version),
        value: &content,
        life: (1_000, false),
        most: 1_000,
        stale: 0,
        tag: None,
    };
    for (first, second, kept) in
        [(9, 10, true), (10, 9, false), (u64::MAX - 1, u64::MAX, true), (1 << 53, (1 << 53) + 1, true), (7, 7, false)]
    {
        for token in ["1", "2"] {
            assert_eq!(scripts::begun(&ask(&mut client, |out| scripts::begin(&names, token, LONG_MS, out))), Ok(None));
        }
        assert_eq!(scripts::ended(&ask(&mut client, |out| scripts::end(&names, "1", stored(first), out))), Ok(false));
        assert_eq!(
            scripts::ended(&ask(&mut client, |out| scripts::end(&names, "2", stored(second), out))),
            Ok(kept),
            "{first} {second}"
        );
    }
    // So many and no more at once.
    for token in 0..scripts::MOST_AT_ONCE {
        assert_eq!(scripts::begun(&ask(&mut client, |out| scripts::begin(&names, &token.to_string(), LONG_MS, out))), Ok(None));
    }
    let more = scripts::begun(&ask(&mut client, |out| scripts::begin(&names, "more", LONG_MS, out)));
    assert!(more.is_err_and(|text| text.starts_with("TRYAGAIN 64 writes")));
}
