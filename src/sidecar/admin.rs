//! Health and metrics for machines, on a port; policy and keys for the operator of the pod, on a Unix socket that only its owner opens.

mod invalidate;

use std::fs::{self, DirBuilder, Permissions};
use std::future::IntoFuture as _;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, timeout};

use crate::origin::{BreakerState, OriginStats};
use crate::policy::Snapshot;
use crate::policy::snapshot::{OriginKind, Sensitive};
use crate::sidecar::delivery::Delivered;
use crate::sidecar::events::request::{Refusal, Request};
use crate::sidecar::served_tls::{SecuredListener, Served};
use crate::telemetry::hot_keys::Hottest;
use crate::telemetry::metrics::MetricsHub;
use crate::telemetry::readings::{Reading, ReadingKind};

/// The most connections on each listener; more wait in the system's queue.
const MAX_CONNECTIONS: usize = 32;
/// How long a connection may be silent: longer than it takes to send a request, shorter than a forgotten connection stays.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How long an explanation may take.
const EXPLAIN_LIMIT: Duration = Duration::from_secs(2);
/// The longest watch of keys: shorter than a connection may be silent.
const MAX_HOT_SECONDS: u64 = 20;
/// The longest key that can be asked about: what fits a request line.
const MAX_KEY_BYTES: usize = 4096;
/// The type of what [`MetricsHub::render`] and its like return.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is known of one key, as JSON, when it is known. `None`: nobody answered.
pub type Explanation = Pin<Box<dyn Future<Output = Option<serde_json::Value>> + Send>>;

/// What came of a request to invalidate something, as JSON, when it is known.
pub type Invalidation = Pin<Box<dyn Future<Output = Result<serde_json::Value, Refusal>> + Send>>;

/// What the admin server asks the sidecar.
pub trait Introspect: Send + Sync + 'static {
    /// Whether applications may start, or what is missing. Once they may, they always may.
    fn started(&self) -> Result<(), String>;
    /// Whether commands can be served, or what is missing.
    fn readiness(&self) -> Result<(), String>;
    /// The policy in force. `None`: there is none yet.
    fn policy(&self) -> Option<Arc<Snapshot>>;
    /// The binding that is served, and what has been delivered.
    fn delivered(&self) -> (Option<&str>, Delivered);
    /// What the policy's origins were asked, and how they answered.
    fn origins(&self) -> Vec<OriginStats>;
    /// What the policy does to a key and why.
    fn explain(&self, key: Vec<u8>) -> Explanation;
    /// Invalidates something, or tells how far that is.
    fn invalidate(&self, request: Request) -> Invalidation;
}

/// Why the admin server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct AdminError {
    /// Where.
    pub address: String,
    /// Why.
    pub source: io::Error,
}

/// The places where the admin server listens, opened.
#[derive(Debug)]
pub struct AdminListeners {
    tcp: Option<std::net::TcpListener>,
    unix: Option<(std::os::unix::net::UnixListener, PathBuf)>,
}

impl AdminListeners {
    /// Opens a port for health and metrics, and a socket for policy and keys, where they are wanted.
    pub fn open(port: Option<SocketAddr>, socket: Option<&Path>) -> Result<Self, AdminError> {
        let open_port = |address: SocketAddr| {
            let listen = |address: SocketAddr| -> io::Result<_> {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            };
            let listener = match listen(address) {
                // Every address of both families; where there is no IPv6, every address that there is.
                Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.kind() != io::ErrorKind::AddrInUse => {
                    listen((Ipv4Addr::UNSPECIFIED, address.port()).into())
                }
                outcome => outcome,
            };
            listener.map_err(|source| AdminError { address: address.to_string(), source })
        };
        let open_socket = |path: &Path| {
            let opened = open_private_socket(path).map(|listener| (listener, path.to_owned()));
            opened.map_err(|source| AdminError { address: path.display().to_string(), source })
        };
        Ok(Self { tcp: port.map(open_port).transpose()?, unix: socket.map(open_socket).transpose()? })
    }

    /// The port's address, which tells the port where the system chose it.
    pub fn address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }
}

impl Drop for AdminListeners {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.unix {
            let _ = fs::remove_file(path);
        }
    }
}

/// A socket that nobody but its owner can ever have opened: it is made in a directory that only the owner enters, and moved to its
/// place when its mode is right. A socket that a process left behind is replaced; one that is listened on is not.
fn open_private_socket(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket"));
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    let private = parent.join(format!(".larder-{}-{:x}", std::process::id(), fastrand::u64(..)));
    DirBuilder::new().mode(0o700).create(&private)?;
    let open = || {
        let fresh = private.join("s");
        let listener = std::os::unix::net::UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        fs::rename(&fresh, path)?;
        Ok(listener)
    };
    let opened = open();
    let _ = fs::remove_dir_all(&private);
    opened
}

struct Shared {
    sidecar: Arc<dyn Introspect>,
    metrics: Arc<MetricsHub>,
}

/// Serves until `stop` holds true or is dropped, and then until the requests under way are answered; the caller bounds that.
pub async fn serve(
    listeners: AdminListeners,
    sidecar: Arc<dyn Introspect>,
    metrics: Arc<MetricsHub>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let shared = Arc::new(Shared { sidecar, metrics });
    let public = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .with_state(shared.clone());
    let private = Router::new()
        .route("/policy", get(show_policy))
        .route("/explain", get(explain))
        .route("/hot", get(hot))
        .route("/invalidate", post(invalidate::invalidate).get(invalidate::follow))
        .with_state(shared);
    serve_routers(listeners, public, private, None, stop).await
}

/// Serves `public` on the port and `private` on the socket, as [`serve`] does. The port is encrypted where something is `served`.
pub async fn serve_routers(
    mut listeners: AdminListeners,
    public: Router,
    private: Router,
    served: Option<Served>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let tcp = listeners.tcp.take().map(TcpListener::from_std).transpose()?;
    let unix = listeners.unix.as_ref().map(|(listener, _)| listener.try_clone()).transpose()?;
    let unix = unix.map(UnixListener::from_std).transpose()?;
    let on_tcp = async {
        match served {
            None => serve_on(tcp, public, stop.clone()).await,
            Some(served) => {
                let secured = tcp.map(|listener| SecuredListener { listener, served });
                serve_on(secured, public, stop.clone()).await
            }
        }
    };
    let (on_tcp, on_unix) = tokio::join!(on_tcp, serve_on(unix, private, stop.clone()));
    on_tcp.and(on_unix)
}

async fn serve_on<L: Listener>(listener: Option<L>, router: Router, mut stop: watch::Receiver<bool>) -> io::Result<()>
where
    L::Addr: std::fmt::Debug,
{
    let Some(listener) = listener else { return Ok(()) };
    let bounded = BoundedListener::new(listener, MAX_CONNECTIONS, IDLE_LIMIT);
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    axum::serve(bounded, router).with_graceful_shutdown(stopped).into_future().await
}

/// Whether the process serves; with `?started` also whether applications may start. One path, since a pod may have been given a sidecar that
/// does not know the question yet: that one says yes.
async fn livez(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let verdict = if query.as_deref() == Some("started") { shared.sidecar.started() } else { Ok(()) };
    tell(verdict, "not started")
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    tell(shared.sidecar.readiness(), "not ready")
}

fn tell(verdict: Result<(), String>, not: &str) -> Response {
    match verdict {
        Ok(()) => "ok\n".into_response(),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{not}: {missing}\n")).into_response(),
    }
}

async fn show_metrics(State(shared): State<Arc<Shared>>) -> Response {
    let readings = origin_readings(&shared.sidecar.origins());
    ([(CONTENT_TYPE, OPENMETRICS)], shared.metrics.render(readings)).into_response()
}

/// The origins' own counts, as families labelled by origin.
fn origin_readings(origins: &[OriginStats]) -> Vec<Reading> {
    let family = |name, help, kind, number: fn(&OriginStats) -> u64| {
        let lines = origins.iter().map(|stats| (stats.origin.clone(), number(stats))).collect();
        Reading { name, help, kind, label: "origin", lines }
    };
    use ReadingKind::{Count, Level};
    vec![
        family("larder_origin_loads", "Loads that the origin was wanted for; a batch is one", Count, |stats| stats.loads),
        family("larder_origin_queries", "Queries made at the origin, repeated ones included", Count, |stats| stats.queries),
        family("larder_origin_errors", "Loads that ended in an error of any kind", Count, |stats| stats.errors),
        family("larder_origin_timeouts", "Loads that the origin did not answer in time", Count, |stats| stats.timeouts),
        family("larder_origin_refused", "Loads that the breaker kept from a failing origin", Count, |stats| stats.refused),
        family("larder_origin_busy", "Loads for which no connection came free", Count, |stats| stats.busy),
        family("larder_origin_connections", "How many loads may be at the origin at once", Level, |stats| stats.connections),
        family("larder_origin_inflight", "Loads at the origin now", Level, |stats| stats.in_flight),
        family("larder_origin_waiting", "Loads that wait for a connection now", Level, |stats| stats.waiting),
        family("larder_origin_breaker_open", "1 while the origin is not asked because it fails", Level, |stats| {
            u64::from(stats.breaker != BreakerState::Closed)
        }),
    ]
}

fn as_json(value: &serde_json::Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], format!("{value:#}\n")).into_response()
}

async fn show_policy(State(shared): State<Arc<Shared>>) -> Response {
    let snapshot = shared.sidecar.policy();
    let generation = snapshot.as_ref().map(|snapshot| snapshot.generation);
    let (binding, Delivered { way, refused, .. }) = shared.sidecar.delivered();
    match serde_json::to_value(snapshot.map(|snapshot| redacted(&snapshot))) {
        Ok(policy) => as_json(&json!({
            "binding": binding, "generation": generation, "way": way, "refused": refused, "policy": policy
        })),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// The snapshot with every text replaced that may hold a secret.
fn redacted(snapshot: &Snapshot) -> Snapshot {
    let mut shown = snapshot.clone();
    for origin in &mut shown.origins {
        let (OriginKind::Sql { url } | OriginKind::Http { url }) = &mut origin.kind;
        if let Sensitive::Value(text) = url {
            *text = "(redacted)".to_owned();
        }
    }
    shown
}

async fn explain(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let key = query.as_deref().and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("key=")));
    let Some(key) = key.and_then(percent_decoded).filter(|key| key.len() <= MAX_KEY_BYTES) else {
        let remedy = "write /explain?key=KEY, the key percent-encoded and at most 4096 bytes long\n";
        return (StatusCode::BAD_REQUEST, remedy).into_response();
    };
    match timeout(EXPLAIN_LIMIT, shared.sidecar.explain(key)).await {
        Ok(Some(mut explanation)) => {
            let (binding, Delivered { way, refused, .. }) = shared.sidecar.delivered();
            if let Some(fields) = explanation.as_object_mut() {
                let delivered = [("binding", json!(binding)), ("way", json!(way)), ("refused", json!(refused))];
                fields.extend(delivered.map(|(name, value)| (name.to_owned(), value)));
            }
            as_json(&explanation)
        }
        _ => (StatusCode::SERVICE_UNAVAILABLE, "no policy is in force yet, or no worker answered in time\n").into_response(),
    }
}

/// Which keys are used most from now on, for as long as the caller says.
async fn hot(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let seconds = query.as_deref().and_then(|query| query.strip_prefix("seconds=")).map(str::parse::<u64>);
    let Some(Ok(seconds @ 1..=MAX_HOT_SECONDS)) = seconds else {
        return (StatusCode::BAD_REQUEST, "write /hot?seconds=N, with N from 1 to 20\n").into_response();
    };
    let Some(Hottest { keys, total, uncertainty }) = shared.metrics.hot_keys().watch(Duration::from_secs(seconds)).await else {
        return (StatusCode::CONFLICT, "somebody else is watching: ask again in half a minute\n").into_response();
    };
    let mut told = Vec::new();
    for (key, count) in keys {
        let explained = timeout(EXPLAIN_LIMIT, shared.sidecar.explain(key.clone())).await.ok().flatten();
        let rule = explained.map(|explained| explained["rule"].clone());
        told.push(json!({"key": String::from_utf8_lossy(&key), "count": count, "rule": rule}));
    }
    as_json(&json!({"seconds": seconds, "total": total, "uncertainty": uncertainty, "keys": told}))
}

/// The bytes that `text` stands for: `%XX` is a byte, everything else (`+` too) is itself.
fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |at: usize| tail.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        bytes.push((digit(0)? * 16 + digit(1)?) as u8);
        rest = tail.get(2..)?;
    }
    Some(bytes)
}

/// A listener with a bound on its connections, each of which has a bound on its silence.
pub struct BoundedListener<L> {
    listener: L,
    permits: Arc<Semaphore>,
    silence: Duration,
}

impl<L> BoundedListener<L> {
    /// At most `connections` at a time, each closed after it was silent for as long as that.
    pub fn new(listener: L, connections: usize, silence: Duration) -> Self {
        Self { listener, permits: Arc::new(Semaphore::new(connections)), silence }
    }
}

impl<L: Listener> Listener for BoundedListener<L> {
    type Io = Bounded<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // Never closed, so that there is a permit sooner or later.
        let permit = self.permits.clone().acquire_owned().await.ok();
        let (stream, address) = self.listener.accept().await;
        let idle = Box::pin(tokio::time::sleep(self.silence));
        (Bounded { stream, idle, silence: self.silence, _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection of a [`BoundedListener`].
pub struct Bounded<S> {
    stream: S,
    idle: Pin<Box<Sleep>>,
    silence: Duration,
    _permit: Option<OwnedSemaphorePermit>,
}

impl<S> Bounded<S> {
    /// What `outcome` of the stream means: progress starts the clock again, silence is an error in the end.
    fn watch<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.idle.as_mut().reset(Instant::now() + self.silence);
            return outcome;
        }
        self.idle.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_read(cx, buf);
        this.watch(cx, outcome)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.watch(cx, outcome)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_flush(cx);
        this.watch(cx, outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.watch(cx, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::delivery::Refused;
    use crate::sidecar::delivery::choice::Way;
    use crate::sidecar::events::request::Meant;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpStream, UnixStream};

    const SNAPSHOT: &str = r#"{"version":1,"requires":1,"generation":7,
        "cluster":{"name":"main","topology":{"cluster":{"seeds":["127.0.0.1:7000"]}}},
        "unmatched":{"bypass":{}},
        "origins":[{"name":"db","kind":{"sql":{"url":{"value":"postgres://u:hush@h/d"}}},"maxConnections":2,"connectTimeout":"1s","timeout":"2s"}]}"#;

    struct Fake(AtomicBool);

    impl Introspect for Fake {
        fn started(&self) -> Result<(), String> {
            if self.0.load(Ordering::Relaxed) { Ok(()) } else { Err("no policy".to_owned()) }
        }
        fn readiness(&self) -> Result<(), String> {
            if self.0.load(Ordering::Relaxed) { Ok(()) } else { Err("no server was found yet".to_owned()) }
        }
        fn policy(&self) -> Option<Arc<Snapshot>> {
            Some(Arc::new(Snapshot::parse(SNAPSHOT.as_bytes()).unwrap()))
        }
        fn delivered(&self) -> (Option<&str>, Delivered) {
            let refused = Refused { generation: Some(8), way: Way::Cache, reason: "it is too new".to_owned() };
            (Some("shop"), Delivered { generation: Some(7), way: Some(Way::File), refused: Some(refused) })
        }
        fn origins(&self) -> Vec<OriginStats> {
            crate::origin::Origins::new(&self.policy().unwrap().origins).unwrap().stats()
        }
        fn explain(&self, key: Vec<u8>) -> Explanation {
            Box::pin(async move { (key != b"hang").then(|| json!({ "key": key })) })
        }
        fn invalidate(&self, request: Request) -> Invalidation {
            Box::pin(async move {
                match request {
                    Request::Invalidate(Meant::Keys(keys)) => Ok(json!({"keys": keys.len()})),
                    Request::Follow(..) => Ok(json!({"state": "waiting"})),
                    _ => Err(Refusal::Later("the cache is away".to_owned())),
                }
            })
        }
    }

    async fn request(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> String {
        let (method, path) = path.split_once(' ').unwrap_or(("GET", path));
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_is_public_and_policy_is_the_owners() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("admin.sock");
        let listeners = AdminListeners::open(Some("127.0.0.1:0".parse().unwrap()), Some(&path)).unwrap();
        let address = listeners.address().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(AdminListeners::open(None, Some(&path)).is_err(), "a socket in use is not taken away");
        let sidecar = Arc::new(Fake(AtomicBool::new(false)));
        let hub = Arc::new(MetricsHub::new(Arc::default()));
        let (stop, stopped) = watch::channel(false);
        let serving = tokio::spawn(serve(listeners, sidecar.clone(), hub, stopped));

        let tcp = |path: &'static str| async move { request(TcpStream::connect(address).await.unwrap(), path).await };
        assert!(tcp("/livez").await.starts_with("HTTP/1.1 200"));
        let held = tcp("/livez?started").await;
        assert!(held.starts_with("HTTP/1.1 503") && held.contains("not started: no policy"), "{held}");
        let unready = tcp("/readyz").await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.contains("no server"), "{unready}");
        sidecar.0.store(true, Ordering::Relaxed);
        assert!(tcp("/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(tcp("/livez?started").await.starts_with("HTTP/1.1 200"));
        let metrics = tcp("/metrics").await;
        assert!(metrics.contains("openmetrics-text") && metrics.contains("larder_policy_generation 0"), "{metrics}");
        assert!(metrics.contains(r#"larder_origin_queries_total{origin="db"} 0"#) && metrics.ends_with("# EOF\n"), "{metrics}");
        assert!(tcp("/policy").await.starts_with("HTTP/1.1 404"));
        assert!(tcp("/explain?key=k").await.starts_with("HTTP/1.1 404"));
        assert!(tcp("/hot?seconds=1").await.starts_with("HTTP/1.1 404"));

        let unix = |line: &'static str| {
            let path = path.clone();
            async move { request(UnixStream::connect(path).await.unwrap(), line).await }
        };
        let policy = unix("/policy").await;
        assert!(policy.contains(r#""generation": 7"#) && policy.contains("(redacted)") && !policy.contains("hush"), "{policy}");
        let told = policy.replace(char::is_whitespace, "");
        assert!(told.contains(r#""refused":{"generation":8,"reason":"itistoonew","way":"cache"}"#), "{told}");
        assert!(told.contains(r#""way":"file""#) && told.contains(r#""binding":"shop""#), "{told}");
        let explained = unix("/explain?key=%00a%2B+").await.replace(char::is_whitespace, "");
        assert!(explained.contains("[0,97,43,43]") && explained.contains(r#""binding":"shop""#), "{explained}");
        assert!(unix("/explain?key=hang").await.starts_with("HTTP/1.1 503"));
        assert!(unix("/explain?key=%0").await.starts_with("HTTP/1.1 400"));
        assert!(unix("/explain").await.starts_with("HTTP/1.1 400"));
        let invalidated = unix("POST /invalidate?key=a&key=b%00").await.replace(char::is_whitespace, "");
        assert!(invalidated.starts_with("HTTP/1.1200") && invalidated.contains(r#"{"keys":2}"#), "{invalidated}");
        assert!(unix("/invalidate?rule=user&event=7-0").await.contains("waiting"));
        assert!(unix("POST /invalidate?rule=user").await.starts_with("HTTP/1.1 503"));
        assert!(unix("POST /invalidate?tag=a").await.starts_with("HTTP/1.1 503"));
        let refused = unix("POST /invalidate?tags=a").await;
        assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
        assert!(tcp("POST /invalidate?key=a").await.starts_with("HTTP/1.1 404"), "the port is not for that");
        assert!(unix("/hot?seconds=21").await.starts_with("HTTP/1.1 400") && unix("/hot").await.starts_with("HTTP/1.1 400"));

        stop.send_replace(true);
        timeout(Duration::from_secs(20), serving).await.expect("it stops").unwrap().unwrap();
        assert!(!path.exists());
    }
}
