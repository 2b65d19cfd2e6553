//! Commands that the sidecar answers by itself.

use std::rc::Rc;

use super::{Flow, Request, refuse, shards};
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::{Ending, Session};

/// Commands about the client's own connection.
pub fn connection(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.name {
        "ping" => match request.args.get(1) {
            Some(text) => session.answer_now(|out| encode::bulk(out, text)),
            None => session.answer_now(|out| encode::status(out, "PONG")),
        },
        "quit" => {
            session.answer_now(|out| encode::status(out, "OK"));
            session.end(Ending::Draining);
            return Flow::Wait;
        }
        "hello" => return hello(session, request),
        _ => session.answer_now(|out| encode::status(out, "OK")),
    }
    Flow::Continue
}

fn hello(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let protocol = match request.args.get(1) {
        None => session.protocol(),
        Some(b"2") => Protocol::Resp2,
        Some(b"3") => Protocol::Resp3,
        Some(_) => return refuse(session, "NOPROTO unsupported protocol version"),
    };
    let mut lane = session.lane();
    lane.protocol = protocol;
    session.set_lane(lane);
    session.answer_now(|out| {
        encode::map(out, protocol, 7);
        for (name, value) in [("server", "redis"), ("version", "7.0.15")] {
            encode::bulk(out, name.as_bytes());
            encode::bulk(out, value.as_bytes());
        }
        encode::bulk(out, b"proto");
        encode::integer(out, if protocol == Protocol::Resp3 { 3 } else { 2 });
        encode::bulk(out, b"id");
        encode::integer(out, session.id() as i64);
        for (name, value) in [("mode", "standalone"), ("role", "master")] {
            encode::bulk(out, name.as_bytes());
            encode::bulk(out, value.as_bytes());
        }
        encode::bulk(out, b"modules");
        encode::array(out, 0);
    });
    Flow::Continue
}

/// Commands about the topology.
pub fn topology(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    shards::any(session, request)
}

/// LARDER.*
pub fn larder(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    refuse(session, &format!("ERR {} is not built yet", request.spec.name))
}
