//! The webhook: HTTPS for the API server.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::known::Known;
use super::patch::{Outcome, Settings};
use super::review::Review;
use crate::operator::metrics::Metrics;
use crate::sidecar::admin::BoundedListener;
use crate::sidecar::served_tls::{SecuredListener, Served};

/// Where pods are reviewed.
pub const PODS_PATH: &str = "/pods";
/// The largest question: the API server's own bound on an object, twice.
const MAX_BODY_BYTES: usize = 3 << 20;
/// The most connections: several API servers keep some dozens each.
const MAX_CONNECTIONS: usize = 1024;
/// How long a connection may be silent. Longer than the API server keeps an idle one, so that it is never closed under a question.
const IDLE_LIMIT: Duration = Duration::from_secs(120);

/// What answers are made of.
pub struct Desk {
    /// What the API server holds.
    pub known: Arc<Known>,
    /// Whether all of it is at hand.
    pub ready: watch::Receiver<String>,
    /// What all pods share.
    pub settings: Settings,
    /// Where answers are counted.
    pub metrics: Arc<Metrics>,
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, served: Served, desk: Desk) -> io::Result<()> {
    let secured = SecuredListener { listener, served };
    axum::serve(BoundedListener::new(secured, MAX_CONNECTIONS, IDLE_LIMIT), router(desk)).await
}

fn router(desk: Desk) -> Router {
    let routes = Router::new().route(PODS_PATH, post(review));
    routes.layer(DefaultBodyLimit::max(MAX_BODY_BYTES)).with_state(Arc::new(desk))
}

async fn review(State(desk): State<Arc<Desk>>, body: Bytes) -> Response {
    if !desk.ready.borrow().is_empty() {
        return (StatusCode::SERVICE_UNAVAILABLE, "not everything that is watched is at hand yet\n").into_response();
    }
    let request = match Review::parse(&body) {
        Ok(review) => review.request,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    };
    let outcome = if request.is_about_a_new_pod() {
        desk.known.admit(&request.namespace, &request.object, &desk.settings)
    } else {
        Outcome::Unchanged { why: "it is no new pod", warnings: Vec::new() }
    };
    tell(&desk, &request.namespace, &request.object["metadata"], &outcome);
    match serde_json::to_string(&request.answer(&outcome)) {
        Ok(answer) => ([(CONTENT_TYPE, "application/json")], answer).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn tell(desk: &Desk, namespace: &str, metadata: &serde_json::Value, outcome: &Outcome) {
    let name = ["name", "generateName"].into_iter().find_map(|field| metadata[field].as_str().filter(|name| !name.is_empty()));
    let pod = name.unwrap_or_default();
    let word = match outcome {
        Outcome::Unchanged { why, .. } => {
            debug!(namespace, pod, why, "a pod stays as it is");
            "unchanged"
        }
        Outcome::Patched { warnings, .. } => {
            info!(namespace, pod, ?warnings, "a pod gets its sidecar");
            "injected"
        }
        Outcome::Refused { message } => {
            warn!(namespace, pod, message, "a pod is refused");
            "refused"
        }
    };
    desk.metrics.reviewed_pod(word);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::known::tests::{known, policy};
    use super::super::tests::settings;
    use super::*;

    async fn ask(waiting: &str, body: Vec<u8>) -> (StatusCode, String) {
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (_, ready) = watch::channel(waiting.to_owned());
        let known = Arc::new(known(vec![policy(&json!({"app": "shop"}))]));
        let desk = Desk { known, ready, settings: settings(), metrics: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}{PODS_PATH}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move { axum::serve(listener, router(desk)).await });
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let answer = client.post(url).body(body).send().await.unwrap();
        let status = StatusCode::from_u16(answer.status().as_u16()).unwrap();
        let text = answer.text().await.unwrap();
        serving.abort();
        (status, text)
    }

    fn question(labels: &Value) -> Vec<u8> {
        let pod = json!({"metadata": {"name": "p", "labels": labels}, "spec": {"containers": [{"name": "app"}]}});
        let request = json!({
            "uid": "7", "operation": "CREATE", "namespace": "shop", "object": pod,
            "resource": {"group": "", "version": "v1", "resource": "pods"},
        });
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).to_string().into_bytes()
    }

    #[tokio::test]
    async fn questions_are_answered_once_all_is_known() {
        let (status, text) = ask("", question(&json!({"app": "shop"}))).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((status, &answer["response"]["allowed"]), (StatusCode::OK, &json!(true)));
        assert!(answer["response"]["patch"].is_string(), "{answer}");
        let (_, text) = ask("", question(&json!({"app": "other"}))).await;
        assert!(!text.contains("patch"), "{text}");
        assert_eq!(ask("the CachePolicies", question(&json!({}))).await.0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(ask("", b"{}".to_vec()).await.0, StatusCode::BAD_REQUEST);
        assert_eq!(ask("", vec![b' '; MAX_BODY_BYTES + 1]).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
