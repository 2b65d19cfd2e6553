//! An HTTP origin under the test's control: it records who asked for what, and answers when it is told to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// A service on loopback, until it is dropped. Paths that nobody set answer 404.
pub struct Web {
    address: SocketAddr,
    pages: Arc<Mutex<HashMap<String, Page>>>,
    /// Dropping it ends the service.
    _stop: oneshot::Sender<()>,
}

/// What a path answers, and who asked for it.
#[derive(Debug, Default, Clone)]
struct Page {
    answer: Answer,
    /// Requests after this many wait.
    free: Option<usize>,
    /// When each request came.
    visits: Vec<Instant>,
    ended: usize,
}

#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    body: Vec<u8>,
    cache_control: Option<&'static str>,
    /// How long it takes.
    delay: Duration,
}

impl Default for Answer {
    fn default() -> Self {
        Self { status: 404, body: Vec::new(), cache_control: None, delay: Duration::ZERO }
    }
}

/// Serves on a free port of loopback, until the sender is dropped.
pub fn serve_on_loopback(app: Router) -> (SocketAddr, oneshot::Sender<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback has a free port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopped) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        runtime.block_on(async move {
            tokio::select! {
                served = axum::serve(listener, app) => served.expect("the service goes on"),
                _ = stopped => {}
            }
        });
    });
    (address, stop)
}

impl Web {
    pub fn start() -> Self {
        let pages: Arc<Mutex<HashMap<String, Page>>> = Arc::default();
        let shared = pages.clone();
        let app = Router::new().fallback(move |uri: Uri| serve(shared.clone(), uri.path().to_owned()));
        let (address, stop) = serve_on_loopback(app);
        Self { address, pages, _stop: stop }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What requests that come from now on are answered.
    pub fn put(&self, path: &str, body: &str) {
        self.answer(path, Answer { status: 200, body: body.into(), ..Answer::default() });
    }

    /// [`Web::put`], answered after a while.
    pub fn put_slow(&self, path: &str, body: &str, delay: Duration) {
        self.answer(path, Answer { status: 200, body: body.into(), delay, ..Answer::default() });
    }

    /// [`Web::put`], with a Cache-Control header.
    pub fn put_limited(&self, path: &str, body: &str, cache_control: &'static str) {
        self.answer(path, Answer { status: 200, body: body.into(), cache_control: Some(cache_control), ..Answer::default() });
    }

    /// Requests that come from now on fail with this status.
    pub fn fail(&self, path: &str, status: u16) {
        self.answer(path, Answer { status, ..Answer::default() });
    }

    fn answer(&self, path: &str, answer: Answer) {
        lock(&self.pages).entry(path.to_owned()).or_default().answer = answer;
    }

    /// Requests wait, those excepted that came before. What they will be answered is settled when they come, as by a slow query.
    pub fn hold(&self, path: &str) {
        let mut pages = lock(&self.pages);
        let page = pages.entry(path.to_owned()).or_default();
        page.free = Some(page.visits.len());
    }

    /// Lets the request that has waited longest go.
    pub fn release_one(&self, path: &str) {
        let mut pages = lock(&self.pages);
        let page = pages.entry(path.to_owned()).or_default();
        page.free = page.free.map(|free| free + 1);
    }

    /// Lets all go, and those to come.
    pub fn release(&self, path: &str) {
        lock(&self.pages).entry(path.to_owned()).or_default().free = None;
    }

    /// How many requests have come.
    pub fn visits(&self, path: &str) -> usize {
        self.visited_at(path).len()
    }

    /// When they came.
    pub fn visited_at(&self, path: &str) -> Vec<Instant> {
        lock(&self.pages).get(path).map_or_else(Vec::new, |page| page.visits.clone())
    }

    /// How many requests wait for their answer.
    pub fn under_way(&self, path: &str) -> usize {
        lock(&self.pages).get(path).map_or(0, |page| page.visits.len() - page.ended)
    }
}

fn lock(pages: &Mutex<HashMap<String, Page>>) -> MutexGuard<'_, HashMap<String, Page>> {
    pages.lock().expect("no panic")
}

/// Ends a visit, also one that its client gives up.
struct Visit {
    pages: Arc<Mutex<HashMap<String, Page>>>,
    path: String,
    number: usize,
}

impl Visit {
    fn waits(&self) -> bool {
        lock(&self.pages).get(&self.path).and_then(|page| page.free).is_some_and(|free| self.number > free)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Some(page) = lock(&self.pages).get_mut(&self.path) {
            page.ended += 1;
        }
    }
}

async fn serve(pages: Arc<Mutex<HashMap<String, Page>>>, path: String) -> (StatusCode, HeaderMap, Vec<u8>) {
    let (answer, number) = {
        let mut pages = lock(&pages);
        let page = pages.entry(path.clone()).or_default();
        page.visits.push(Instant::now());
        (page.answer.clone(), page.visits.len())
    };
    let visit = Visit { pages, path, number };
    tokio::time::sleep(answer.delay).await;
    while visit.waits() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut headers = HeaderMap::new();
    if let Some(limit) = answer.cache_control {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static(limit));
    }
    (StatusCode::from_u16(answer.status).expect("a status"), headers, answer.body)
}
