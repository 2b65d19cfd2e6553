//! HELLO: the protocol, and who answers.
//!
//! Name, version and modules are the real server's: it is asked each time, without credentials. A server that does not answer
//! keeps no client from connecting: then [`FALLBACK_VERSION`] stands for its version.

use std::rc::Rc;

use super::super::{Flow, Request, refuse};
use super::client::{check_name, rename};
use super::connection::change_lane;
use super::quoted;
use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{Protocol, encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};

/// The oldest version whose commands the sidecar knows.
const FALLBACK_VERSION: &str = "7.0.0";
const HELLO: &[u8] = b"*1\r\n$5\r\nHELLO\r\n";

/// What a client asks with it.
struct Wish<'a> {
    protocol: Protocol,
    name: Option<&'a [u8]>,
}

/// Answers HELLO.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let wish = match parse(session, request) {
        Ok(wish) => wish,
        Err(text) => return refuse(session, &text),
    };
    if !change_lane(session, Lane { protocol: wish.protocol, ..session.lane() }) {
        return Flow::Quiet;
    }
    wish.name.iter().for_each(|name| rename(session, name));
    let (worker, waiting, place) = (session.worker(), session.clone(), session.take_place());
    let sink = Sink::Call(Box::new(move |_, answer| {
        let told: &[u8] = match answer {
            Answer::Reply(bytes) => bytes,
            Answer::Failed(_) => &[],
        };
        waiting.answer(place, |out| write(&waiting, told, out));
    }));
    let pending = Pending::new(sink, ANY_SLOT, Retry::Safe, session.lane(), worker.now());
    if worker.submit(&[HELLO], pending) { Flow::Continue } else { Flow::Wait }
}

/// A HELLO that the server is to queue in a client's transaction: without name and credentials.
///
/// # Errors
/// The text of the error reply.
pub fn alone(session: &Session, request: &Request<'_>) -> Result<Vec<u8>, String> {
    let wish = parse(session, request)?;
    if request.args.get(1).is_none() {
        return Ok(HELLO.to_vec());
    }
    let mut wire = Vec::new();
    encode::command(&mut wire, &[b"HELLO".to_vec(), number_of(wish.protocol).to_string().into_bytes()]);
    Ok(wire)
}

/// Answers HELLO, where the server has switched the connection of the client's transaction, and said `told`.
pub fn greet(session: &Rc<Session>, request: &Request<'_>, told: &[u8]) -> Flow {
    match parse(session, request) {
        Ok(wish) => {
            session.set_lane(Lane { protocol: wish.protocol, ..session.lane() });
            wish.name.iter().for_each(|name| rename(session, name));
            session.answer_now(|out| write(session, told, out));
            Flow::Continue
        }
        Err(text) => refuse(session, &text),
    }
}

fn parse<'a>(session: &Session, request: &Request<'a>) -> Result<Wish<'a>, String> {
    let mut wish = Wish { protocol: session.protocol(), name: None };
    if let Some(version) = request.args.get(1) {
        wish.protocol = match parse_i64(version) {
            Some(2) => Protocol::Resp2,
            Some(3) => Protocol::Resp3,
            Some(_) => return Err("NOPROTO unsupported protocol version".to_owned()),
            None => return Err("ERR Protocol version is not an integer or out of range".to_owned()),
        };
    }
    let options: Vec<&[u8]> = request.args.iter().skip(2).collect();
    let mut rest = &options[..];
    while let [option, after @ ..] = rest {
        rest = match after {
            // Any credentials will do, as for AUTH.
            [_, _, after @ ..] if option.eq_ignore_ascii_case(b"auth") => after,
            [name, after @ ..] if option.eq_ignore_ascii_case(b"setname") => {
                check_name(name)?;
                wish.name = Some(name);
                after
            }
            _ => return Err(format!("ERR Syntax error in HELLO option '{}'", quoted(option))),
        };
    }
    Ok(wish)
}

/// The answer, where the server has said `told`, or nothing that could be understood.
fn write(session: &Session, told: &[u8], out: &mut Vec<u8>) {
    match reply::elements(told).filter(|parts| parts.len() >= 2 && parts.len().is_multiple_of(2)) {
        Some(parts) => pass_on(session, &parts, out),
        None => make_up(session, out),
    }
}

/// The server's own answer, with what is different for the client's connection.
fn pass_on(session: &Session, parts: &[&[u8]], out: &mut Vec<u8>) {
    encode::map(out, session.protocol(), parts.len() / 2);
    for pair in parts.chunks_exact(2) {
        out.extend_from_slice(pair[0]);
        match reply::text(pair[0]) {
            Some(b"proto") => encode::integer(out, number_of(session.protocol())),
            Some(b"id") => encode::integer(out, session.id() as i64),
            _ => out.extend_from_slice(pair[1]),
        }
    }
}

fn make_up(session: &Session, out: &mut Vec<u8>) {
    let mode = if session.worker().is_cluster() { "cluster" } else { "standalone" };
    encode::map(out, session.protocol(), 7);
    for (name, value) in [("server", "redis"), ("version", FALLBACK_VERSION), ("mode", mode), ("role", "master")] {
        encode::bulk(out, name.as_bytes());
        encode::bulk(out, value.as_bytes());
    }
    encode::bulk(out, b"proto");
    encode::integer(out, number_of(session.protocol()));
    encode::bulk(out, b"id");
    encode::integer(out, session.id() as i64);
    encode::bulk(out, b"modules");
    encode::array(out, 0);
}

fn number_of(protocol: Protocol) -> i64 {
    match protocol {
        Protocol::Resp2 => 2,
        Protocol::Resp3 => 3,
    }
}
