//! The operator's own port: `/livez`, `/readyz` and `/metrics`. All of it only reads.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::metrics::Metrics;

/// What the port tells of.
#[derive(Debug, Clone)]
struct Shown {
    metrics: Arc<Metrics>,
    /// What is still waited for, by each who waits; empty once every cache is filled.
    waiting: Vec<watch::Receiver<String>>,
}

/// Why the port cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{address} cannot be listened on: {source}: stop what listens there, or choose another address with --listen")]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
}

/// Takes the port. Serving begins with [`serve`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError { address, source })
}

/// Serves until `stop` is complete. Each of `waiting` says what the operator is not ready for, and is empty once it is ready.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    waiting: Vec<watch::Receiver<String>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .with_state(Shown { metrics, waiting });
    axum::serve(listener, routes).with_graceful_shutdown(stop).await
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    let waiting = shown.waiting.iter().map(|waiting| waiting.borrow().clone()).find(|waiting| !waiting.is_empty());
    match waiting {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(waiting) => (StatusCode::SERVICE_UNAVAILABLE, format!("waits for {waiting}\n")),
    }
}

async fn show_metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let form = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(CONTENT_TYPE, form)], shown.metrics.render())
}
