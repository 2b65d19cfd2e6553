//! What the agent serves: what it knows, to everybody on a port; what changes something, on a Unix socket that only its owner opens.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use super::board::Board;
use super::handover::{Handover, Handovers};
use super::metrics;
use crate::sidecar::admin::{AdminListeners, OPENMETRICS, serve_routers};
use crate::sidecar::served_tls::Served;

/// How long a handover may take where the caller does not say.
pub const HANDOVER_LIMIT: Duration = Duration::from_secs(15);
/// The longest that a caller may ask for.
pub const LONGEST_HANDOVER: Duration = Duration::from_secs(300);

struct Shared {
    board: Arc<Board>,
    handovers: Handovers,
}

/// Serves until `stop` holds true; the port with TLS where something is `served`.
pub async fn serve(
    listeners: AdminListeners,
    board: Arc<Board>,
    handovers: Handovers,
    served: Option<Served>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let shared = Arc::new(Shared { board, handovers });
    let known = || {
        Router::new()
            .route("/livez", get(livez))
            .route("/startupz", get(startupz))
            .route("/readyz", get(readyz))
            .route("/state", get(state))
            .route("/metrics", get(show_metrics))
    };
    let public = known().with_state(shared.clone());
    let private = known().route("/handover", post(handover)).with_state(shared);
    serve_routers(listeners, public, private, served, stop).await
}

fn verdict(verdict: Result<(), String>) -> Response {
    match verdict {
        Ok(()) => "ok\n".into_response(),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")).into_response(),
    }
}

fn as_json(value: &serde_json::Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], format!("{value:#}\n")).into_response()
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    verdict(shared.board.read().liveness(Instant::now()))
}

async fn startupz(State(shared): State<Arc<Shared>>) -> Response {
    verdict(shared.board.read().startup())
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    verdict(shared.board.read().readiness())
}

async fn state(State(shared): State<Arc<Shared>>) -> Response {
    match serde_json::to_value(shared.board.fresh_report().await) {
        Ok(report) => as_json(&report),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn show_metrics(State(shared): State<Arc<Shared>>) -> Response {
    ([(CONTENT_TYPE, OPENMETRICS)], metrics::render(&shared.board)).into_response()
}

/// A handover goes on where its caller has gone: half of one would leave writes paused.
async fn handover(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let asked = query.as_deref().and_then(|query| query.strip_prefix("limitMillis=")).map(str::parse::<u64>);
    let limit = match asked {
        None => HANDOVER_LIMIT,
        Some(Ok(millis)) => Duration::from_millis(millis).min(LONGEST_HANDOVER),
        Some(Err(_)) => return (StatusCode::BAD_REQUEST, "write /handover?limitMillis=N\n").into_response(),
    };
    let task = tokio::spawn(async move {
        let outcome = shared.handovers.run(limit).await;
        shared.board.update(|known| match &outcome {
            Ok(Handover::Done { .. }) => known.counts.handovers += 1,
            Ok(Handover::NoPrimary) => {}
            Err(_) => known.counts.handovers_aborted += 1,
        });
        outcome
    });
    match task.await {
        Ok(Ok(Handover::Done { primary })) => {
            info!(%primary, "handed over");
            as_json(&json!({ "outcome": "done", "primary": primary }))
        }
        Ok(Ok(Handover::NoPrimary)) => as_json(&json!({ "outcome": "noPrimary" })),
        Ok(Err(error)) => {
            warn!(%error, "the handover was given up");
            (StatusCode::CONFLICT, format!("{error}\n")).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
