//! The agents' port, of which the operator reads `/state` alone.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use larder::operator::queue::Key;
use tokio::net::TcpListener;

use super::Tiers;

#[derive(Clone)]
struct Place {
    tiers: Tiers,
    key: Key,
    ordinal: u16,
}

/// Serves for one server's agent.
pub async fn serve(listener: TcpListener, tiers: Tiers, key: Key, ordinal: u16) {
    let routes = Router::new().route("/state", get(state)).with_state(Place { tiers, key, ordinal });
    axum::serve(listener, routes).await.expect("a listener serves");
}

async fn state(State(place): State<Place>) -> Response {
    let report = place.tiers.with(&place.key, |tier| tier.report(place.ordinal));
    match report {
        Some(report) => {
            let text = serde_json::to_string(&report).expect("a report serialises");
            ([(CONTENT_TYPE, "application/json")], text).into_response()
        }
        // A connection that has outlived its pod.
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}
