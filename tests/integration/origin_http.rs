//! Loads from a real HTTP service.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Redirect, Response};
use larder::origin::{LoadError, Loaded, Origins};
use larder::policy::{Load, Query, ReplyForm, Span};
use tokio::net::TcpListener;

use crate::support::origin::{found, http, loader};

/// A service that records what it is asked.
struct Service {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Service {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&asked);
        let app = Router::new().fallback(move |uri: Uri, headers: HeaderMap| {
            let before = {
                let mut asked = record.lock().expect("no panic");
                asked.push(uri.to_string());
                asked.iter().filter(|path| **path == uri.to_string()).count()
            };
            answer(uri, headers, before)
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().expect("no panic"))
    }
}

async fn answer(uri: Uri, headers: HeaderMap, times: usize) -> Response {
    match uri.path() {
        "/max-age" => ([("cache-control", "max-age=60"), ("age", "15")], "x").into_response(),
        "/no-store" => ([("cache-control", "no-store")], "x").into_response(),
        "/gone" => StatusCode::GONE.into_response(),
        "/missing" => StatusCode::NOT_FOUND.into_response(),
        "/empty" => StatusCode::NO_CONTENT.into_response(),
        "/forbidden" => StatusCode::FORBIDDEN.into_response(),
        "/broken" => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "/flaky" if times == 1 => StatusCode::BAD_GATEWAY.into_response(),
        "/overloaded" => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "3600")]).into_response(),
        "/near" => Redirect::temporary("/there").into_response(),
        "/far" => Redirect::temporary("http://localhost:1/").into_response(),
        "/loop" => Redirect::temporary("/loop").into_response(),
        "/json" => "{\"a\": 1}".into_response(),
        "/bytes" => vec![0u8, 255, 10].into_response(),
        "/login" => headers.get("authorization").map_or("none", |value| value.to_str().unwrap_or("?")).to_owned().into_response(),
        "/hang" => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            StatusCode::OK.into_response()
        }
        "/large" => {
            axum::body::Body::from_stream(futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b'x'; 1 << 20])))
                .into_response()
        }
        _ => "found".into_response(),
    }
}

fn path(path: &str, reply: Option<ReplyForm>) -> Load {
    Load { origin: "db".to_owned(), query: Query::Http { path: path.to_owned() }, reply }
}

#[tokio::test]
async fn statuses_and_headers_decide() {
    let service = Service::start().await;
    let origin = http(&service.url);
    let load = |key: &'static str, reply| {
        let loader = loader(&origin, "{p}", &path("/{p}", reply));
        async move { loader.load(key.as_bytes()).await }
    };
    let limited = |secs| Loaded::Found { value: b"x".to_vec(), max_age: Some(Span::from_secs(secs)), tag: None };
    assert_eq!(load("plain", None).await, Ok(found("found")));
    assert_eq!(load("max-age", None).await, Ok(limited(45)));
    assert_eq!(load("no-store", None).await, Ok(limited(0)));
    assert_eq!(load("bytes", None).await, Ok(found([0, 255, 10])));
    assert_eq!(load("json", Some(ReplyForm::Json)).await, Ok(found("{\"a\": 1}")));
    assert_eq!(load("near", None).await, Ok(found("found")));
    for missing in ["gone", "missing", "empty"] {
        assert_eq!(load(missing, None).await, Ok(Loaded::NotFound));
    }
    for (unusable, word) in [("forbidden", "403"), ("far", "redirect"), ("loop", "redirect"), ("large", "larger")] {
        let error = load(unusable, None).await.expect_err(unusable);
        assert!(matches!(error, LoadError::Unusable { .. }) && error.to_string().contains(word), "{error}");
    }
    assert!(matches!(load("plain", Some(ReplyForm::Json)).await, Err(LoadError::Unusable { .. })));
    assert!(matches!(load("broken", None).await, Err(LoadError::Failed { .. })));
    service.asked();
    assert_eq!(load("flaky", None).await, Ok(found("found")), "one retry");
    assert_eq!(service.asked(), ["/flaky", "/flaky"]);
}

#[tokio::test]
async fn parts_stay_within_their_place() {
    let service = Service::start().await;
    let loads = loader(&http(&format!("{}/base/", service.url)), "p:{id…}", &path("/p/{id}/x?q={id}&l=en", None));
    for (part, encoded) in [
        (b"a b".as_slice(), "a%20b"),
        (b"../../admin", "..%2F..%2Fadmin"),
        (b"?#&=%", "%3F%23%26%3D%25"),
        (b"\0\r\n\xff", "%00%0D%0A%FF"),
        ("é".as_bytes(), "%C3%A9"),
    ] {
        loads.load(&[b"p:", part].concat()).await.expect("loads");
        assert_eq!(service.asked(), [format!("/base/p/{encoded}/x?q={encoded}&l=en")]);
    }
    for part in [b"..".to_vec(), b".".to_vec(), vec![b'x'; 1 << 20]] {
        assert_eq!(loads.load(&[b"p:".to_vec(), part].concat()).await, Ok(Loaded::NotFound));
    }
    assert!(service.asked().is_empty(), "what no path can express is not asked");
}

#[tokio::test]
async fn a_service_that_asks_for_a_pause_gets_it() {
    let service = Service::start().await;
    let loads = loader(&http(&service.url), "{p}", &path("/{p}", None));
    assert!(matches!(loads.load(b"overloaded").await, Err(LoadError::Failed { .. })));
    assert!(matches!(loads.load(b"plain").await, Err(LoadError::Refused { .. })));
    assert_eq!(service.asked(), ["/overloaded"]);
}

#[tokio::test]
async fn a_hanging_service_times_out_and_many_keys_are_loaded_at_once() {
    let service = Service::start().await;
    let mut origin = http(&service.url);
    let loads = loader(&origin, "{p}", &path("/{p}", None));
    assert!(!loads.batches());
    let keys: Vec<Vec<u8>> = (0..200).map(|n| format!("k{n}").into_bytes()).collect();
    assert!(loads.load_many(&keys).await.iter().all(|answer| *answer == Ok(found("found"))));
    origin.timeout = Span::from_millis(200);
    let started = Instant::now();
    let error = loader(&origin, "{p}", &path("/{p}", None)).load(b"hang").await.expect_err("hangs");
    assert!(matches!(error, LoadError::Timeout { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn passwords_in_urls_are_sent_and_not_told() {
    let service = Service::start().await;
    let url = service.url.replace("http://", "http://user:hunter2@");
    let loads = loader(&http(&url), "{p}", &path("/{p}", None));
    assert_eq!(loads.load(b"login").await, Ok(found("Basic dXNlcjpodW50ZXIy")));
    let closed = http(&format!("http://user:hunter2@127.0.0.1:{}", crate::support::server::free_port()));
    let error = loader(&closed, "{p}", &path("/{p}", None)).load(b"secret-part").await.expect_err("closed");
    assert!(matches!(error, LoadError::Unreachable { .. }), "{error}");
    let shown = format!("{error} {error:?} {loads:?}");
    assert!(!shown.contains("hunter2") && !shown.contains("secret-part"), "{shown}");
}

#[tokio::test]
async fn unchanged_origins_keep_their_state() {
    let service = Service::start().await;
    let mut origin = http(&service.url);
    let origins = Origins::new(std::slice::from_ref(&origin)).expect("valid");
    let keys = "{p}".parse().expect("valid");
    let load = path("/{p}", None);
    origins.loader(&keys, &load).expect("valid").load(b"overloaded").await.expect_err("refused");
    let same = origins.updated(std::slice::from_ref(&origin)).expect("valid");
    assert!(matches!(same.loader(&keys, &load).expect("valid").load(b"plain").await, Err(LoadError::Refused { .. })));
    origin.timeout = Span::from_secs(29);
    let changed = same.updated(&[origin]).expect("valid");
    assert_eq!(changed.loader(&keys, &load).expect("valid").load(b"plain").await, Ok(found("found")));
    assert_eq!(changed.stats()[0].loads, 3, "counters go on");
    assert!(changed.updated(&[]).expect("valid").loader(&keys, &load).is_err());
}

/// Loads are shared between threads.
#[test]
fn loads_are_send() {
    fn is_send<T: Send>(_: &T) {}
    let loader = loader(&http("http://127.0.0.1:1"), "{p}", &path("/{p}", None));
    is_send(&loader.load(b"x"));
    is_send(&loader.load_many(&[]));
}
