//! Commands that the sidecar answers by itself. Nothing here is forwarded unless its function says so.

mod client;
mod clients;
mod connection;
mod hello;
mod inspect;
pub(super) mod invalidate;
mod tokens;
mod topology;

pub use connection::{database, run as connection};
pub use hello::{alone as hello_alone, greet};
pub use topology::run as topology;

use std::rc::Rc;

use super::{Flow, Request};
use crate::sidecar::resp::encode;
use crate::sidecar::session::Session;

/// LARDER.*
pub fn larder(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.name {
        "larder.explain" => inspect::explain(session, request),
        "larder.fetch" => tokens::fetch(session, request),
        "larder.fill" => tokens::fill(session, request),
        "larder.invalidate" => invalidate::run(session, request),
        _ => inspect::stats(session, request),
    }
}

fn ok(session: &Rc<Session>) -> Flow {
    session.answer_now(|out| encode::status(out, "OK"));
    Flow::Continue
}

/// A client's text as an error repeats it: shortened.
fn quoted(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(128)]).into_owned()
}
