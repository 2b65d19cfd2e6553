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
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::advice::advise;
use super::journals::{Verdict, judge_cluster, judge_policy};
use super::known::Known;
use super::patch::{Outcome, Settings};
use super::review::{Answer, Request, Review};
use crate::api::{CacheCluster, CachePolicy};
use crate::operator::metrics::Metrics;
use crate::sidecar::admin::BoundedListener;
use crate::sidecar::served_tls::{SecuredListener, Served};

/// Where pods are reviewed.
pub const PODS_PATH: &str = "/pods";
/// Where policies are.
pub const POLICIES_PATH: &str = "/policies";
/// Where CacheClusters are.
pub const CLUSTERS_PATH: &str = "/clusters";
/// How many policies are judged at once, each of which keeps a processor busy: pods are not to wait for them.
const MOST_JUDGED: usize = 1;
/// The largest question: the API server's own bound on an object, twice.
const MAX_BODY_BYTES: usize = 3 << 20;
/// The most connections: several API servers keep some dozens each.
const MAX_CONNECTIONS: usize = 1024;
/// How long a refusal is thought over: what it rests on may have been written a moment ago, as by one `kubectl apply` of a directory, and
/// watches hear of it later.
const SETTLED_WITHIN: Duration = Duration::from_millis(300);
/// How often it is looked again meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a policy then waits for its turn to be judged beside others, and for how long it is. With the time to think it over that is a second
/// and a half of the two that the API server waits in all.
const TURN_WITHIN: Duration = Duration::from_millis(400);
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
    let routes = Router::new()
        .route(PODS_PATH, post(review_pod))
        .route(POLICIES_PATH, post(review_policy))
        .route(CLUSTERS_PATH, post(review_cluster));
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
    let outcome = match request.object_as::<CachePolicy>().filter(|_| request.is_about_a_policy()) {
        Some(policy) => judge(&desk, &request, policy).await,
        None => let_be(),
    };
    desk.metrics.reviewed_policy(word_of(&outcome));
    said(&request.answer(&outcome))
}

async fn review_cluster(State(desk): State<Arc<Desk>>, body: Bytes) -> Response {
    let request = match question(&desk, &body) {
        Ok(request) => request,
        Err(refusal) => return refusal.into_response(),
    };
    let outcome = match request.object_as::<CacheCluster>().filter(|_| request.is_about_a_cluster()) {
        Some(cluster) => judge_tier(&desk, &request, &cluster).await,
        None => let_be(),
    };
    desk.metrics.reviewed_cluster(word_of(&outcome));
    said(&request.answer(&outcome))
}

/// Of an object that cannot be read the API server has said so itself.
const fn let_be() -> Outcome {
    Outcome::Unchanged { why: "nothing is to be said of it", warnings: Vec::new() }
}

/// What became of an object that is looked at and not changed, for the figures.
const fn word_of(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Refused { .. } => "refused",
        Outcome::Unchanged { warnings, .. } | Outcome::Patched { warnings, .. } => {
            if warnings.is_empty() {
                "silent"
            } else {
                "warned"
            }
        }
    }
}

/// What becomes of a policy: refused where its CacheCluster cannot carry its journals, told of where it has no effect beside others.
async fn judge(desk: &Desk, request: &Request, policy: CachePolicy) -> Outcome {
    let (namespace, cluster) = (&request.namespace, &policy.spec.cache_cluster);
    let verdict = match request.before() {
        Ok(old) => settled(|| judge_policy(old.as_ref(), &policy, desk.known.cluster(namespace, cluster).as_ref())).await,
        // Whether it is worse than it was cannot be told.
        Err(_) => Verdict::Taken,
    };
    match verdict {
        Verdict::Refused(message) => refused(namespace, "CachePolicy", policy.metadata.name.as_deref(), message),
        Verdict::Doubted(doubt) => {
            let advice = advice_of(desk, namespace, policy).await;
            Outcome::Unchanged { why: "it is told of", warnings: [vec![doubt], advice].concat() }
        }
        Verdict::Taken => Outcome::Unchanged { why: "it is told of", warnings: advice_of(desk, namespace, policy).await },
    }
}

/// What becomes of a CacheCluster: refused where it takes away what a policy writes behind by.
async fn judge_tier(desk: &Desk, request: &Request, cluster: &CacheCluster) -> Outcome {
    let (namespace, name) = (&request.namespace, cluster.metadata.name.as_deref());
    let policies = || desk.known.policies_about(namespace, name.unwrap_or_default());
    let verdict = match request.before() {
        Ok(old) => settled(|| judge_cluster(old.as_ref(), cluster, &policies())).await,
        Err(_) => Verdict::Taken,
    };
    match verdict {
        Verdict::Refused(message) => refused(namespace, "CacheCluster", name, message),
        Verdict::Doubted(doubt) => Outcome::Unchanged { why: "it is told of", warnings: vec![doubt] },
        Verdict::Taken => let_be(),
    }
}

fn refused(namespace: &str, kind: &str, name: Option<&str>, message: String) -> Outcome {
    info!(namespace, kind, name, message, "a change is refused");
    Outcome::Refused { message }
}

/// What is judged in the end, while what it rests on may still be on its way here.
async fn settled(judge: impl Fn() -> Verdict) -> Verdict {
    let began = Instant::now();
    loop {
        let verdict = judge();
        if verdict == Verdict::Taken || began.elapsed() >= SETTLED_WITHIN {
            return verdict;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// What there is to say of a policy beside others.
async fn advice_of(desk: &Desk, namespace: &str, policy: CachePolicy) -> Vec<String> {
    let others = desk.known.policies(namespace);
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
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::super::known::tests::{cluster, known, known_with, policy};
    use super::super::tests::settings;
    use super::*;

    async fn ask(path: &str, waiting: &str, body: Vec<u8>) -> (StatusCode, String) {
        ask_with(known(vec![policy(&json!({"app": "shop"}))]), path, waiting, body).await
    }

    async fn ask_with(known: Known, path: &str, waiting: &str, body: Vec<u8>) -> (StatusCode, String) {
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (_, ready) = watch::channel(waiting.to_owned());
        let desk = Desk::new(Arc::new(known), ready, settings(), Arc::default());
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

    /// What is answered about a change of an object of ours.
    async fn reviewed(known: Known, path: &str, resource: &str, old: Option<&Value>, object: &Value) -> Value {
        let request = json!({
            "uid": "7", "operation": if old.is_some() { "UPDATE" } else { "CREATE" }, "namespace": "shop", "object": object, "oldObject": old,
            "resource": {"group": "larder.dev", "version": "v1alpha1", "resource": resource},
        });
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
        let (status, text) = ask_with(known, path, "", review.to_string().into_bytes()).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()["response"].clone()
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
        for path in [PODS_PATH, POLICIES_PATH, CLUSTERS_PATH] {
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
            let known = known(vec![policy(&json!({"app": "shop"}))]);
            let answer = reviewed(known, POLICIES_PATH, "cachepolicies", None, &object).await;
            assert_eq!(answer["allowed"], true, "{answer}");
            answer["warnings"].to_string()
        };
        assert!(answered(&json!({})).await.contains("both cover keys such as `user:x`"));
        assert_eq!(answered(&json!({"keys": "cart:{id}"})).await, "null");
        assert_eq!(answered(&json!({"keys": 7})).await, "null", "what cannot be read is the API server's to refuse");
    }

    fn behind() -> Value {
        let mut policy = policy(&json!({"app": "shop"}));
        policy["spec"]["rules"][0]["strategy"] = "WriteBehind".into();
        policy
    }

    fn durable() -> Value {
        let mut cluster = cluster();
        cluster["spec"]["storage"] = json!({"size": "1Gi", "fsync": "Always"});
        cluster
    }

    #[tokio::test]
    async fn what_writes_behind_is_refused_where_its_journal_cannot_be_kept() {
        let answer = reviewed(known(vec![]), POLICIES_PATH, "cachepolicies", None, &behind()).await;
        assert_eq!((&answer["allowed"], &answer["status"]["code"]), (&json!(false), &json!(422)), "{answer}");
        let why = answer["status"]["message"].as_str().unwrap();
        assert!(why.starts_with("larder: spec.rules[0].strategy: the CacheCluster keeps its data in memory only"), "{why}");
        for (known, old) in [(known_with(vec![], &durable()).0, None), (known(vec![behind()]), Some(behind()))] {
            let answer = reviewed(known, POLICIES_PATH, "cachepolicies", old.as_ref(), &behind()).await;
            assert_eq!(answer["allowed"], true, "{answer}");
        }
        let mut elsewhere = behind();
        elsewhere["spec"]["cacheCluster"] = "later".into();
        let answer = reviewed(known(vec![]), POLICIES_PATH, "cachepolicies", None, &elsewhere).await;
        assert_eq!(answer["allowed"], true, "{answer}");
        assert!(answer["warnings"][0].as_str().unwrap().contains("no CacheCluster `later` yet"), "{answer}");
    }

    #[tokio::test]
    async fn a_cluster_is_refused_what_its_policies_need() {
        let known = || known_with(vec![behind()], &durable()).0;
        let mut lowered = durable();
        lowered["spec"]["storage"]["fsync"] = "EverySecond".into();
        let answer = reviewed(known(), CLUSTERS_PATH, "cacheclusters", Some(&durable()), &lowered).await;
        let why = answer["status"]["message"].as_str().unwrap_or_default();
        assert!(answer["allowed"] == false && why.contains("the CachePolicy `a`"), "{answer}");
        let mut more = durable();
        more["spec"]["replicas"] = 2.into();
        for (old, new) in [(durable(), more), (lowered.clone(), durable()), (lowered.clone(), lowered)] {
            let answer = reviewed(known(), CLUSTERS_PATH, "cacheclusters", Some(&old), &new).await;
            assert_eq!((&answer["allowed"], &answer["warnings"]), (&json!(true), &Value::Null), "{answer}");
        }
        let answer = reviewed(known(), CLUSTERS_PATH, "cacheclusters", None, &cluster()).await;
        assert!(answer["allowed"] == true && answer["warnings"][0].is_string(), "{answer}");
    }

    #[tokio::test]
    async fn what_was_written_a_moment_ago_counts() {
        let (known, mut writer) = known_with(vec![], &cluster());
        let policy: CachePolicy = serde_json::from_value(behind()).unwrap();
        let looks = std::cell::Cell::new(0);
        let verdict = settled(|| {
            looks.set(looks.get() + 1);
            judge_policy(None, &policy, known.cluster("shop", "main").as_ref())
        });
        let hears = async {
            sleep(LOOK_EVERY).await;
            writer.apply_watcher_event(&Event::Apply(serde_json::from_value(durable()).unwrap()));
        };
        let (verdict, ()) = tokio::join!(verdict, hears);
        assert_eq!(verdict, Verdict::Taken);
        assert!(looks.get() > 1, "it was unfit at first");
    }
}
