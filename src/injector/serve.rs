//! The webhooks: HTTPS for the API server.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::advice::advise;
use super::known::Known;
use super::patch::{Outcome, Settings};
use super::review::{Answer, Request, Review};
use crate::api::CachePolicy;
use crate::operator::metrics::Metrics;
use crate::sidecar::admin::BoundedListener;
use crate::sidecar::served_tls::{SecuredListener, Served};

/// Where pods are reviewed.
pub const PODS_PATH: &str = "/pods";
/// Where policies are.
pub const POLICIES_PATH: &str = "/policies";
/// How many policies are judged at once, each of which keeps a processor busy: pods are not to wait for them.
const MOST_JUDGED: usize = 1;
/// The largest question: the API server's own bound on an object, twice.
const MAX_BODY_BYTES: usize = 3 << 20;
/// The most connections: several API servers keep some dozens each.
const MAX_CONNECTIONS: usize = 1024;
/// How long a policy waits for its turn to be judged, and for how long it is judged. The API server waits for two seconds in all.
const TURN_WITHIN: Duration = Duration::from_millis(700);
const JUDGED_WITHIN: Duration = Duration::from_millis(800);
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
    /// Had by whoever judges a policy.
    pub judging: Arc<Semaphore>,
}

impl Desk {
    /// A desk that nobody sits at yet.
    pub fn new(known: Arc<Known>, ready: watch::Receiver<String>, settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self { known, ready, settings, metrics, judging: Arc::new(Semaphore::new(MOST_JUDGED)) }
    }
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, served: Served, desk: Desk) -> io::Result<()> {
    let secured = SecuredListener { listener, served };
    axum::serve(BoundedListener::new(secured, MAX_CONNECTIONS, IDLE_LIMIT), router(desk)).await
}

fn router(desk: Desk) -> Router {
    let routes = Router::new().route(PODS_PATH, post(review_pod)).route(POLICIES_PATH, post(review_policy));
    routes.layer(DefaultBodyLimit::max(MAX_BODY_BYTES)).with_state(Arc::new(desk))
}

/// What is asked, once it can be answered; otherwise what is said instead.
fn question(desk: &Desk, body: &[u8]) -> Result<Request, (StatusCode, String)> {
    if !desk.ready.borrow().is_empty() {
        return Err((StatusCode::SERVICE_UNAVAILABLE, "not everything that is watched is at hand yet\n".to_owned()));
    }
    let review = Review::parse(body).map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}\n")))?;
    Ok(review.request)
}

fn said(answer: &Answer) -> Response {
    match serde_json::to_string(answer) {
        Ok(answer) => ([(CONTENT_TYPE, "application/json")], answer).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn review_policy(State(desk): State<Arc<Desk>>, body: Bytes) -> Response {
    let request = match question(&desk, &body) {
        Ok(request) => request,
        Err(refusal) => return refusal.into_response(),
    };
    let warnings = if request.is_about_a_policy() { judge(&desk, &request).await } else { Vec::new() };
    desk.metrics.reviewed_policy(if warnings.is_empty() { "silent" } else { "warned" });
    said(&request.advise(&warnings))
}

/// What there is to say of a policy. Of one that cannot be read the API server has said so itself.
async fn judge(desk: &Desk, request: &Request) -> Vec<String> {
    let Ok(mut policy) = serde_json::from_value::<CachePolicy>(request.object.clone()) else { return Vec::new() };
    policy.metadata.namespace = Some(request.namespace.clone());
    let others = desk.known.policies(&request.namespace);
    // Where policies come in crowds some go without a word: the API server does not wait for long.
    let Ok(turn) = timeout(TURN_WITHIN, desk.judging.clone().acquire_owned()).await else { return Vec::new() };
    let judged = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let began = Instant::now();
        advise(&policy, &others, || began.elapsed() < JUDGED_WITHIN)
    });
    judged.await.unwrap_or_default()
}

async fn review_pod(State(desk): State<Arc<Desk>>, body: Bytes) -> Response {
    let request = match question(&desk, &body) {
        Ok(request) => request,
        Err(refusal) => return refusal.into_response(),
    };
    let outcome = if request.is_about_a_new_pod() {
        desk.known.admit(&request.namespace, &request.object, &desk.settings)
    } else {
        Outcome::Unchanged { why: "it is no new pod", warnings: Vec::new() }
    };
    tell(&desk, &request.namespace, &request.object["metadata"], &outcome);
    said(&request.answer(&outcome))
}

fn tell(desk: &Desk, namespace: &str, metadata: &Value, outcome: &Outcome) {
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

    async fn ask(path: &str, waiting: &str, body: Vec<u8>) -> (StatusCode, String) {
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (_, ready) = watch::channel(waiting.to_owned());
        let known = Arc::new(known(vec![policy(&json!({"app": "shop"}))]));
        let desk = Desk::new(known, ready, settings(), Arc::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}{path}", listener.local_addr().unwrap());
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
        let (status, text) = ask(PODS_PATH, "", question(&json!({"app": "shop"}))).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((status, &answer["response"]["allowed"]), (StatusCode::OK, &json!(true)));
        assert!(answer["response"]["patch"].is_string(), "{answer}");
        let (_, text) = ask(PODS_PATH, "", question(&json!({"app": "other"}))).await;
        assert!(!text.contains("patch"), "{text}");
        for path in [PODS_PATH, POLICIES_PATH] {
            let unready = ask(path, "the CachePolicies", question(&json!({}))).await;
            assert_eq!(unready.0, StatusCode::SERVICE_UNAVAILABLE, "{path}");
            assert_eq!(ask(path, "", b"{}".to_vec()).await.0, StatusCode::BAD_REQUEST, "{path}");
            assert_eq!(ask(path, "", vec![b' '; MAX_BODY_BYTES + 1]).await.0, StatusCode::PAYLOAD_TOO_LARGE, "{path}");
        }
    }

    #[tokio::test]
    async fn policies_are_let_be_and_told_of() {
        let answered = async |change: &Value| {
            let mut object = policy(&json!({"app": "shop"}));
            object["metadata"] = json!({"name": "young"});
            object["spec"]["rules"][0].as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let request = json!({
                "uid": "7", "operation": "CREATE", "namespace": "shop", "object": object,
                "resource": {"group": "larder.dev", "version": "v1alpha1", "resource": "cachepolicies"},
            });
            let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
            let (status, text) = ask(POLICIES_PATH, "", review.to_string().into_bytes()).await;
            let answer: Value = serde_json::from_str(&text).unwrap();
            assert_eq!((status, &answer["response"]["allowed"]), (StatusCode::OK, &json!(true)), "{text}");
            answer["response"]["warnings"].to_string()
        };
        assert!(answered(&json!({})).await.contains("both cover keys such as `user:x`"));
        assert_eq!(answered(&json!({"keys": "cart:{id}"})).await, "null");
        assert_eq!(answered(&json!({"keys": 7})).await, "null", "what cannot be read is the API server's to refuse");
    }
}
