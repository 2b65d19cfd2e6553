//! Writes that are carried to a service.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::header::{CONTENT_TYPE, ETAG, IF_MATCH};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value as Json, json};
use tokio::sync::oneshot;

use super::sidecar;
use crate::read_through::Servers;
use crate::support::resp::Value;
use crate::support::sidecar::Sidecar;
use crate::support::web::serve_on_loopback;

/// What befalls the next write.
#[derive(Debug, Clone, Copy)]
enum Mood {
    /// It is made, and answered 500.
    FailBehind,
    /// It is made, and never answered.
    Hang,
    /// It is refused.
    Refuse(u16, &'static str),
}

#[derive(Debug, Default)]
struct State {
    resources: HashMap<String, (Vec<u8>, u64)>,
    version: u64,
    moods: VecDeque<Mood>,
    /// How often each idempotency key came, and how often what came with it was made.
    keys: HashMap<String, (usize, usize)>,
    /// What each write had for a condition.
    conditions: Vec<Option<String>>,
    kinds: Vec<String>,
}

/// A service that makes what comes with one idempotency key once.
struct Service {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    _stop: oneshot::Sender<()>,
}

impl Service {
    fn start() -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        let app = Router::new().fallback(move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            serve(shared.clone(), method, uri.path().to_owned(), headers, body)
        });
        let (address, stop) = serve_on_loopback(app);
        Self { address, state, _stop: stop }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    fn text(&self, path: &str) -> Option<String> {
        self.state().resources.get(path).map(|(body, _)| String::from_utf8_lossy(body).into_owned())
    }

    fn next(&self, mood: Mood) {
        self.state().moods.push_back(mood);
    }
}

async fn serve(state: Arc<Mutex<State>>, method: Method, path: String, headers: HeaderMap, body: Bytes) -> Response {
    let text = |name: axum::http::HeaderName| headers.get(name).map(|value| value.to_str().expect("text").to_owned());
    let hang = {
        let mut state = state.lock().expect("no panic");
        if method == Method::GET {
            return match state.resources.get(&path) {
                Some((body, version)) => ([(ETAG, format!("\"{version}\""))], body.clone()).into_response(),
                None => StatusCode::NOT_FOUND.into_response(),
            };
        }
        let key = headers.get("idempotency-key").expect("each write has one").to_str().expect("text").to_owned();
        let known = state.keys.entry(key.clone()).or_default();
        known.0 += 1;
        if known.1 > 0 {
            return StatusCode::OK.into_response();
        }
        let (condition, kind) = (text(IF_MATCH), text(CONTENT_TYPE).unwrap_or_default());
        state.conditions.push(condition.clone());
        state.kinds.push(kind);
        let mood = state.moods.pop_front();
        if let Some(Mood::Refuse(status, words)) = mood {
            return (StatusCode::from_u16(status).expect("a status"), words).into_response();
        }
        let current = state.resources.get(&path).map(|(_, version)| format!("\"{version}\""));
        if condition.is_some() && condition != current {
            return (StatusCode::PRECONDITION_FAILED, "somebody else was faster\nmore").into_response();
        }
        state.version += 1;
        let version = state.version;
        let there = match method {
            Method::PUT => {
                state.resources.insert(path, (body.to_vec(), version));
                true
            }
            _ => state.resources.remove(&path).is_some(),
        };
        state.keys.entry(key).or_default().1 += 1;
        match mood {
            Some(Mood::FailBehind) => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            Some(Mood::Hang) => true,
            _ if there => return ([(ETAG, format!("\"{version}\""))], "").into_response(),
            _ => return StatusCode::NOT_FOUND.into_response(),
        }
    };
    if hang {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    StatusCode::OK.into_response()
}

fn rule(name: &str, reply: &Json, store: &Json) -> Json {
    let read = json!({
        "ttl": {"default": "1h", "max": "2h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "0s", "lease": "10s", "wait": "10s",
        "load": {"origin": "web", "query": {"http": {"path": format!("/{name}/{{id}}")}}, "reply": reply},
    });
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"writeThrough": {"read": read, "store": {"http": store}}}})
}

fn stage() -> (Servers, Service, Sidecar) {
    let (servers, service) = (Servers::sentinel(), Service::start());
    let kind = json!({"http": {"url": {"value": format!("http://{}", service.address)}}});
    let origin = json!({"name": "web", "kind": kind, "maxConnections": 4, "connectTimeout": "5s", "timeout": "3s"});
    let rules = [rule("item", &json!("Json"), &json!({})), rule("tagged", &json!(null), &json!({"ifMatch": true}))];
    let sidecar = sidecar(&servers, &[origin], &rules);
    (servers, service, sidecar)
}

#[track_caller]
fn refused(reply: &Value, words: &[&str]) {
    let Value::Error(text) = reply else { panic!("{reply:?} is no error") };
    words.iter().for_each(|word| assert!(text.contains(word), "{word} in {text}"));
}

#[test]
fn values_are_put_and_deleted() {
    let (servers, service, sidecar) = stage();
    let mut client = sidecar.client();
    let ok = Value::Simple("OK".to_owned());
    assert_eq!(client.call(&["SET", "item:a/b ?", r#"{"n":1}"#]), ok);
    assert_eq!(service.text("/item/a%2Fb%20%3F").as_deref(), Some(r#"{"n":1}"#));
    assert_eq!(servers.holder_of("item:a/b ?").call(&["GET", "item:a/b ?"]).text(), r#"{"n":1}"#);
    servers.expire("item:a/b ?");
    assert_eq!(client.call(&["GET", "item:a/b ?"]).text(), r#"{"n":1}"#);
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(client.call(&[&b"SET"[..], b"tagged:1", &bytes]), ok);
    assert_eq!(client.call(&["GET", "tagged:1"]), Value::Bulk(bytes));
    assert_eq!(
        (client.line("DEL tagged:1"), client.line("DEL tagged:1"), client.line("GET tagged:1")),
        (Value::Int(1), Value::Int(0), Value::Nil)
    );
    refused(&client.line("DEL item:1 item:2"), &["takes one change at a time"]);
    refused(&client.line("SET item:.. x"), &["ORIGIN", "cannot be one of its", "nothing was written"]);
    let state = service.state();
    assert_eq!(state.kinds, ["application/json", "application/octet-stream", "", ""]);
    // Each write had a key of its own.
    assert!(state.keys.len() == 4 && state.keys.values().all(|(came, _)| *came == 1), "{:?}", state.keys);
}

#[test]
fn a_service_s_refusal_is_told_and_leaves_no_value() {
    let (servers, service, sidecar) = stage();
    let mut client = sidecar.client();
    assert_eq!(client.line("SET item:1 1"), Value::Simple("OK".to_owned()));
    for (status, words, told) in [
        (409, "the name is taken\nand more", &["refused the write", "409: the name is taken", "nothing was written"][..]),
        (422, "", &["refused the write", "422", "nothing was written"]),
        (503, "away", &["failed", "503", "nothing was written"]),
    ] {
        assert_eq!(client.line("GET item:1").text(), "1");
        // One that is turned away is tried once more.
        (0..2).for_each(|_| service.next(Mood::Refuse(status, words)));
        refused(&client.line("SET item:1 2"), told);
        service.state().moods.clear();
        assert_eq!(servers.holder_of("item:1").line("GET item:1"), Value::Nil, "{status}");
        assert_eq!(service.text("/item/1").as_deref(), Some("1"));
    }
}

#[test]
fn a_write_is_made_once_however_often_it_is_told() {
    let (servers, service, sidecar) = stage();
    let mut client = sidecar.client();
    service.next(Mood::FailBehind);
    assert_eq!(client.line("SET item:1 1"), Value::Simple("OK".to_owned()));
    assert_eq!(service.state().version, 1);
    assert_eq!(service.state().keys.len(), 1);
    assert!(service.state().keys.values().all(|times| *times == (2, 1)), "{:?}", service.state().keys);
    // No answer: it may have been made.
    service.next(Mood::Hang);
    refused(&client.line("SET item:1 2"), &["ORIGIN", "may have made the write or not", "read the key before you repeat it"]);
    assert_eq!(servers.holder_of("item:1").line("GET item:1"), Value::Nil);
    assert_eq!((client.line("GET item:1").text(), service.state().version), ("2".to_owned(), 2));
    // While it may still come to something, nothing is stored.
    assert_eq!(servers.holder_of("item:1").line("GET item:1"), Value::Nil);
    assert!(service.state().keys.values().all(|(_, made)| *made == 1), "{:?}", service.state().keys);
}

#[test]
fn a_write_is_made_on_condition_of_what_was_last_seen() {
    let (servers, service, sidecar) = stage();
    let mut client = sidecar.client();
    let ok = Value::Simple("OK".to_owned());
    assert_eq!((client.line("SET tagged:1 a"), client.line("SET tagged:1 b")), (ok.clone(), ok.clone()));
    servers.expire("tagged:1");
    assert_eq!((client.line("GET tagged:1").text(), client.line("SET tagged:1 c")), ("b".to_owned(), ok.clone()));
    let condition = |version: &str| Some(format!("\"{version}\""));
    assert_eq!(service.state().conditions, [None, condition("1"), condition("2")]);
    // Somebody else changes it, past Larder.
    service.state().resources.insert("/tagged/1".to_owned(), (b"theirs".to_vec(), 77));
    refused(&client.line("SET tagged:1 d"), &["refused the write", "412: somebody else was faster", "nothing was written"]);
    assert_eq!(servers.holder_of("tagged:1").line("GET tagged:1"), Value::Nil);
    assert_eq!((client.line("GET tagged:1").text(), client.line("SET tagged:1 e")), ("theirs".to_owned(), ok.clone()));
    assert_eq!(service.state().conditions.last(), Some(&condition("77")));
    assert_eq!((client.line("DEL tagged:1"), service.text("/tagged/1")), (Value::Int(1), None));
    // Without the rule's leave there is no condition.
    assert_eq!((client.line("SET item:1 1"), client.line("SET item:1 2")), (ok.clone(), ok));
    assert_eq!(service.state().conditions[6..], [None::<String>, None]);
}
