//! What the integration tests share: server processes, a small RESP client, waiting with deadlines.
#![allow(dead_code)]

pub mod admin;
pub mod certificates;
pub mod crowd;
pub mod dev;
pub mod frames;
pub mod histories;
pub mod origin;
pub mod postgres;
pub mod program;
pub mod resp;
pub mod saboteur;
pub mod server;
pub mod sidecar;
pub mod silent;
pub mod tilt;
pub mod trap;
pub mod web;

use std::time::{Duration, Instant};

/// Polls `done` until it holds. Panics, naming `what`, where it does not within `limit`.
#[track_caller]
pub fn wait_for(what: &str, limit: Duration, done: impl FnMut() -> bool) {
    wait_or_tell(what, limit, done, String::new);
}

/// [`wait_for`], which tells what there is instead.
#[track_caller]
pub fn wait_or_tell(what: &str, limit: Duration, mut done: impl FnMut() -> bool, there_is: impl FnOnce() -> String) {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            panic!("{what}: not within {limit:?} {}", there_is());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// [`wait_for`] within a runtime. The limit is long: test machines are busy.
pub async fn poll(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done().await {
        assert!(Instant::now() < deadline, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
