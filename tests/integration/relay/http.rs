//! A relay and a service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::json;
use tokio::sync::oneshot;

use super::{Scene, rule, sentinel};
use crate::support::web::serve_on_loopback;

#[derive(Debug, Default)]
struct State {
    resources: BTreeMap<String, String>,
    /// What came, by idempotency key.
    keys: BTreeMap<String, BTreeSet<String>>,
    /// How many requests are still to be answered 503.
    away: usize,
    /// How many are to be made, and answered 500.
    broken: usize,
}

fn serve(state: &Mutex<State>, method: &Method, uri: &Uri, headers: &HeaderMap, body: &Bytes) -> StatusCode {
    let mut state = state.lock().expect("no panic");
    let body = String::from_utf8_lossy(body).into_owned();
    let key = headers.get("idempotency-key").expect("a key").to_str().expect("a text").to_owned();
    state.keys.entry(key).or_default().insert(format!("{method} {uri} {body}"));
    if state.away > 0 {
        state.away -= 1;
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    if body == "poison" {
        return StatusCode::UNPROCESSABLE_ENTITY;
    }
    match *method {
        Method::PUT => state.resources.insert(uri.path().to_owned(), body),
        _ => state.resources.remove(uri.path()),
    };
    if state.broken > 0 {
        state.broken -= 1;
        return StatusCode::INTERNAL_SERVER_ERROR;
    }
    StatusCode::NO_CONTENT
}

fn service() -> (SocketAddr, Arc<Mutex<State>>, oneshot::Sender<()>) {
    let state = Arc::new(Mutex::new(State { away: 3, broken: 2, ..State::default() }));
    let shared = state.clone();
    let app = Router::new().fallback(move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
        let answer = serve(&shared, &method, &uri, &headers, &body);
        async move { answer }
    });
    let (address, stop) = serve_on_loopback(app);
    (address, state, stop)
}

#[test]
fn a_service_is_told_each_write_under_a_key_of_its_own() {
    let (address, state, _stop) = service();
    let kind = json!({"http": {"url": {"value": format!("http://{address}")}}});
    let origin = json!({"name": "api", "kind": kind, "maxConnections": 4, "connectTimeout": "5s", "timeout": "1s"});
    let rule = rule("users", "api", &json!({"http": {"path": "/users/{id}"}}), &json!({"http": {}}));
    let scene = Scene::new(sentinel(), &[origin], &[rule]);
    for n in 0..40 {
        scene.append(format!("users:{}", n % 10).as_bytes(), Some(&format!("name {n}")));
    }
    scene.append(b"users:../admin?x", Some("hostile"));
    scene.append(b"users:9", None);
    scene.append(b"users:3", Some("poison"));
    let relay = scene.relay();
    scene.wait_until_drained();
    let state = state.lock().expect("no panic");
    let mut expected: BTreeMap<String, String> = (0..9).map(|id| (format!("/users/{id}"), format!("name {}", 30 + id))).collect();
    expected.insert("/users/..%2Fadmin%3Fx".to_owned(), "hostile".to_owned());
    assert_eq!(state.resources, expected);
    assert!(state.keys.values().all(|told| told.len() == 1), "one key, one write: {:?}", state.keys);
    assert_eq!((scene.dead(), scene.dirty()), (1, 1), "{}", relay.log());
}
