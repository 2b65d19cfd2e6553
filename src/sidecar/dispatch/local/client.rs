//! CLIENT: what the client tells of itself stays here; what would reach into other clients, or into the shared connections, is
//! refused.

use std::fmt::Write as _;
use std::rc::Rc;

use super::super::{Flow, Request, refuse, shards};
use super::{ok, quoted};
use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::Session;

/// The longest name or version that is kept for a client.
const LONGEST_TEXT_BYTES: usize = 1024;
const SYNTAX: &str = "ERR syntax error";
const NO_TRACKING: &str =
    "ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode enabled";

/// Answers a subcommand.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.last_name() {
        "id" => integer(session, session.id() as i64),
        "getname" => get_name(session),
        "setname" => match set_name(session, request.args.get(2).unwrap_or_default()) {
            Ok(()) => ok(session),
            Err(text) => refuse(session, text),
        },
        "setinfo" => set_info(session, request),
        "info" => lines(session, 1),
        "list" => list(session, request),
        "no-evict" => on_off(session, request, None),
        "no-touch" => on_off(session, request, Some("CLIENT NO-TOUCH ON")),
        "reply" => reply_mode(session, request),
        "tracking" => tracking(session, request),
        "trackinginfo" => tracking_info(session),
        "caching" => refuse(session, NO_TRACKING),
        "getredir" => integer(session, -1),
        "capa" => ok(session),
        "kill" => {
            refuse(session, "NOPERM CLIENT KILL is not passed on by Larder: close your own connections in your application")
        }
        "unblock" => {
            refuse(session, "NOPERM CLIENT UNBLOCK is not passed on by Larder: give the blocking command a timeout instead")
        }
        "import-source" => {
            refuse(session, "NOPERM CLIENT IMPORT-SOURCE is not passed on by Larder: import through a connection to the server")
        }
        _ => shards::any(session, request),
    }
}

fn integer(session: &Rc<Session>, number: i64) -> Flow {
    session.answer_now(|out| encode::integer(out, number));
    Flow::Continue
}

fn get_name(session: &Rc<Session>) -> Flow {
    let name = session.about.borrow().name.clone();
    session.answer_now(|out| if name.is_empty() { encode::null(out, session.protocol()) } else { encode::bulk(out, &name) });
    Flow::Continue
}

/// Names the client, by the servers' own rules.
pub fn set_name(session: &Session, name: &[u8]) -> Result<(), &'static str> {
    if !is_plain(name) {
        return Err("ERR Client names cannot contain spaces, newlines or special characters.");
    }
    if name.len() > LONGEST_TEXT_BYTES {
        return Err("ERR Client names longer than 1024 bytes are not kept by Larder: use a shorter one");
    }
    session.about.borrow_mut().name = name.to_vec();
    Ok(())
}

fn is_plain(text: &[u8]) -> bool {
    text.iter().all(|byte| (b'!'..=b'~').contains(byte))
}

fn set_info(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let (option, value) = (request.args.get(2).unwrap_or_default(), request.args.get(3).unwrap_or_default());
    let is_name = option.eq_ignore_ascii_case(b"lib-name");
    if !is_name && !option.eq_ignore_ascii_case(b"lib-ver") {
        return refuse(session, &format!("ERR Unrecognized option '{}'", quoted(option)));
    }
    let shown = if is_name { "lib-name" } else { "lib-ver" };
    if !is_plain(value) || value.len() > LONGEST_TEXT_BYTES {
        return refuse(session, &format!("ERR {shown} cannot contain spaces, newlines or special characters."));
    }
    let mut about = session.about.borrow_mut();
    if is_name {
        about.library = value.to_vec()
    } else {
        about.library_version = value.to_vec()
    }
    drop(about);
    ok(session)
}

/// The client's own line, `count` times (0 or 1): of the others, who may belong to anybody, it learns nothing.
fn lines(session: &Rc<Session>, count: usize) -> Flow {
    let text = if count == 0 { String::new() } else { describe(session) };
    session.answer_now(|out| encode::verbatim(out, session.protocol(), text.as_bytes()));
    Flow::Continue
}

fn describe(session: &Session) -> String {
    let address = |address: Option<std::net::SocketAddr>| address.map_or_else(|| ":0".to_owned(), |address| address.to_string());
    let about = session.about.borrow();
    let mut line = String::new();
    let _ = write!(
        line,
        "id={} addr={} laddr={} fd=-1 name={} age={} idle=0 flags=N db={} sub=0 psub=0 ssub=0 multi=-1 cmd=client user=default \
         redir=-1 resp={} lib-name={} lib-ver={}",
        session.id(),
        address(session.peer_addr()),
        address(session.local_addr()),
        String::from_utf8_lossy(&about.name),
        session.age_seconds(),
        session.lane().database,
        if session.protocol() == Protocol::Resp3 { 3 } else { 2 },
        String::from_utf8_lossy(&about.library),
        String::from_utf8_lossy(&about.library_version),
    );
    line.push('\n');
    line
}

fn list(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let args = &request.args;
    let option = args.get(2).unwrap_or_default();
    if args.len() == 2 {
        return lines(session, 1);
    }
    if option.eq_ignore_ascii_case(b"type") && args.len() == 4 {
        let kind = args.get(3).unwrap_or_default();
        return match kind.to_ascii_lowercase().as_slice() {
            b"normal" => lines(session, 1),
            b"master" | b"slave" | b"replica" | b"pubsub" => lines(session, 0),
            _ => refuse(session, &format!("ERR Unknown client type '{}'", quoted(kind))),
        };
    }
    if option.eq_ignore_ascii_case(b"id") && args.len() > 3 {
        let ids: Option<Vec<i64>> = args.iter().skip(3).map(|id| parse_i64(id).filter(|id| *id > 0)).collect();
        return match ids {
            Some(ids) => lines(session, usize::from(ids.contains(&(session.id() as i64)))),
            None => refuse(session, "ERR Invalid client ID"),
        };
    }
    refuse(session, SYNTAX)
}

/// ON or OFF, where OFF changes nothing. `unsupported` names what ON would ask of a connection that others share.
fn on_off(session: &Rc<Session>, request: &Request<'_>, unsupported: Option<&str>) -> Flow {
    let word = request.args.get(2).unwrap_or_default();
    match (word.eq_ignore_ascii_case(b"on"), word.eq_ignore_ascii_case(b"off"), unsupported) {
        (true, _, Some(what)) => {
            refuse(session, &format!("ERR {what} is not passed on by Larder: clients share the connections to the servers"))
        }
        (true, _, None) | (_, true, _) => ok(session),
        _ => refuse(session, SYNTAX),
    }
}

fn reply_mode(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let mode = request.args.get(2).unwrap_or_default().to_ascii_lowercase();
    match mode.as_slice() {
        b"on" => ok(session),
        b"off" | b"skip" => {
            refuse(session, "ERR CLIENT REPLY OFF and SKIP are not passed on by Larder: read the replies, or pipeline")
        }
        _ => refuse(session, SYNTAX),
    }
}

fn tracking(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let word = request.args.get(2).unwrap_or_default();
    if word.eq_ignore_ascii_case(b"off") {
        return ok(session);
    }
    if word.eq_ignore_ascii_case(b"on") {
        return refuse(
            session,
            "ERR CLIENT TRACKING is not passed on by Larder: read every value through the sidecar, which is on the same host",
        );
    }
    refuse(session, SYNTAX)
}

fn tracking_info(session: &Rc<Session>) -> Flow {
    let protocol = session.protocol();
    session.answer_now(|out| {
        encode::map(out, protocol, 3);
        encode::bulk(out, b"flags");
        encode::set(out, protocol, 1);
        encode::bulk(out, b"off");
        encode::bulk(out, b"redirect");
        encode::integer(out, -1);
        encode::bulk(out, b"prefixes");
        encode::array(out, 0);
    });
    Flow::Continue
}
