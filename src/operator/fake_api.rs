//! An API server for tests: it hands out what it was given, and writes down what it is asked to change, without changing it.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use kube::Client;
use serde_json::{Value, json};

/// The largest body that is read.
const MAX_BODY_BYTES: usize = 1 << 20;

/// See the module.
#[derive(Clone, Default)]
pub struct FakeApi {
    objects: Arc<Vec<(&'static str, Value)>>,
    /// Cluster addresses that a Service may not have any more.
    taken: Arc<Vec<String>>,
    changes: Arc<Mutex<Vec<Change>>>,
}

/// A request that would change something.
#[derive(Debug, Clone)]
pub struct Change {
    pub method: Method,
    /// The resource, its name and a part of it, such as `services/shop-0-0` or `cacheclusters/shop/status`.
    pub what: String,
    pub body: Value,
}

impl FakeApi {
    /// It holds these objects, each by the name of its resource.
    pub fn new(objects: Vec<(&'static str, Value)>) -> Self {
        Self { objects: Arc::new(objects), ..Self::default() }
    }

    /// Refuses Services with these addresses.
    pub fn refusing(self, taken: &[&str]) -> Self {
        Self { taken: Arc::new(taken.iter().map(|address| (*address).to_owned()).collect()), ..self }
    }

    pub fn client(&self) -> Client {
        let api = self.clone();
        let answer = move |request: Request| {
            let api = api.clone();
            async move { api.answer(request).await }
        };
        Client::new(Router::new().fallback(answer), "default")
    }

    /// What it was asked to change, but for Events.
    pub fn changes(&self) -> Vec<Change> {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.iter().filter(|change| !change.what.starts_with("events")).cloned().collect()
    }

    /// The last body that was sent to it.
    pub fn last(&self, what: &str) -> Option<Value> {
        self.changes().into_iter().rev().find(|change| change.what == what).map(|change| change.body)
    }

    async fn answer(&self, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let path: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
        let rest = if path.first() == Some(&"api") { &path[2..] } else { &path[3..] };
        let rest = if rest.first() == Some(&"namespaces") && rest.len() > 2 { &rest[2..] } else { rest };
        let query = parts.uri.query().unwrap_or_default();
        let (resource, name) = (rest[0], rest.get(1).copied());
        if parts.method == Method::GET {
            return match name {
                Some(name) => self.find(resource, name).map_or_else(|| refusal(404, "not found"), reply),
                None if query.contains("watch=") => {
                    Response::new(Body::from_stream(stream::pending::<Result<Bytes, std::convert::Infallible>>()))
                }
                None => {
                    let items: Vec<&Value> =
                        self.objects.iter().filter(|(of, _)| *of == resource).map(|(_, object)| object).collect();
                    reply(json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}))
                }
            };
        }
        let body = to_bytes(body, MAX_BODY_BYTES).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let change = Change { method: parts.method.clone(), what: rest.join("/"), body: body.clone() };
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(change);
        if parts.method == Method::DELETE {
            return reply(json!({"apiVersion": "v1", "kind": "Status", "status": "Success"}));
        }
        self.written(resource, name.unwrap_or_default(), body)
    }

    fn find(&self, resource: &str, name: &str) -> Option<Value> {
        let found = self.objects.iter().find(|(of, object)| *of == resource && object["metadata"]["name"] == name);
        found.map(|(_, object)| object.clone())
    }

    /// What comes back: with an identity, and of a Service with an address.
    fn written(&self, resource: &str, name: &str, mut body: Value) -> Response {
        let before = self.find(resource, name).unwrap_or_default();
        body["metadata"]["uid"] = before["metadata"].get("uid").cloned().unwrap_or_else(|| json!(format!("uid of {name}")));
        if resource == "services" {
            let wanted = body["spec"]["clusterIP"].as_str().map(str::to_owned);
            if wanted.as_ref().is_some_and(|wanted| self.taken.contains(wanted)) {
                return refusal(422, "the provided IP is already allocated");
            }
            let fresh = || json!(format!("127.200.{}.{}", name.len(), name.bytes().last().unwrap_or_default()));
            let address = wanted.map(Value::from).or_else(|| before["spec"].get("clusterIP").cloned()).unwrap_or_else(fresh);
            body["spec"]["clusterIP"] = address;
        }
        reply(body)
    }
}

fn reply(body: Value) -> Response {
    ([("content-type", "application/json")], body.to_string()).into_response()
}

fn refusal(code: u16, message: &str) -> Response {
    let reason = if code == 404 { "NotFound" } else { "Invalid" };
    let body = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code,
    });
    (StatusCode::from_u16(code).unwrap(), [("content-type", "application/json")], body.to_string()).into_response()
}
