//! Commands about the client's own connection.

use std::rc::Rc;

use super::super::{Flow, Request, refuse};
use super::{client, hello, ok};
use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::{About, Ending, Session};
use crate::sidecar::upstream::lane::Lane;

/// The databases that a client may select under Sentinel: as many as servers have unless they are told otherwise.
const DATABASES: i64 = 16;

/// Answers one of them.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.name {
        "ping" => ping(session, request),
        "echo" => {
            session.answer_now(|out| encode::bulk(out, request.args.get(1).unwrap_or_default()));
            Flow::Continue
        }
        "quit" => {
            session.answer_now(|out| encode::status(out, "OK"));
            session.end(Ending::Draining);
            Flow::Wait
        }
        "auth" => auth(session, request),
        "hello" => hello::run(session, request),
        "select" => select(session, request),
        "reset" => reset(session),
        name if name.starts_with("client") => client::run(session, request),
        "asking" if !session.worker().is_cluster() => refuse(session, "ERR This instance has cluster support disabled"),
        // READONLY, READWRITE, ASKING: every command goes to the primary that has the key anyway.
        _ => ok(session),
    }
}

fn ping(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match (request.args.get(1), request.args.len()) {
        (Some(text), 2) => session.answer_now(|out| encode::bulk(out, text)),
        (None, _) => session.answer_now(|out| encode::status(out, "PONG")),
        _ => return refuse(session, "ERR wrong number of arguments for 'ping' command"),
    }
    Flow::Continue
}

/// Whoever reaches the sidecar is the workload: any user and password will do. The sidecar logs in with its own.
fn auth(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    if request.args.len() > 3 { refuse(session, "ERR syntax error") } else { ok(session) }
}

/// The database that a SELECT names.
///
/// # Errors
/// The text of the error reply.
pub fn database(session: &Session, request: &Request<'_>) -> Result<u8, &'static str> {
    match parse_i64(request.args.get(1).unwrap_or_default()) {
        None => Err("ERR value is not an integer or out of range"),
        Some(number) if i32::try_from(number).is_err() => {
            Err("ERR value is out of range, value must between -2147483648 and 2147483647")
        }
        Some(number) if number != 0 && session.worker().is_cluster() => Err("ERR SELECT is not allowed in cluster mode"),
        Some(number) if !(0..DATABASES).contains(&number) => Err("ERR DB index is out of range"),
        Some(number) => Ok(number as u8),
    }
}

fn select(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let database = match database(session, request) {
        Ok(database) => database,
        Err(text) => return refuse(session, text),
    };
    if !change_lane(session, Lane { database, ..session.lane() }) {
        return Flow::Quiet;
    }
    ok(session)
}

fn reset(session: &Rc<Session>) -> Flow {
    if !change_lane(session, Lane { protocol: Protocol::Resp2, database: 0, ..session.lane().plain() }) {
        return Flow::Quiet;
    }
    if session.is_muted() && !session.is_skipping() {
        session.unmute();
    }
    session.worker().tracking().end(session);
    session.let_go();
    session.about.replace(About::default());
    session.answer_now(|out| encode::status(out, "RESET"));
    Flow::Continue
}

/// Has later commands take another connection. `false`: earlier ones are still on the old one, where they could be overtaken.
pub fn change_lane(session: &Rc<Session>, lane: Lane) -> bool {
    if lane != session.lane() {
        if session.outstanding() > 0 {
            return false;
        }
        session.set_lane(lane);
    }
    true
}
