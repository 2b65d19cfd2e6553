//! Commands of a client's transaction that Larder answers, or has a part in.
//!
//! While they are queued, the server gets something harmless in their place, or the command itself. They are carried out when EXEC's
//! reply comes to that place: in order with all others, and not at all where EXEC carries nothing out. What such a command asks of
//! servers is asked then, when the whole transaction is done, except of the transaction's own server, which has answered in its turn.
//! Subscriptions are no business of this module's: see [`subscribe`](crate::sidecar::exclusive).

use std::borrow::Cow;
use std::rc::Rc;

use super::{Flow, Request, config, local, names, own_keys, shards};
use crate::sidecar::commands::{Class, Gather};
use crate::sidecar::resp::reply;
use crate::sidecar::session::Session;
use crate::sidecar::slots::is_larder_key;
use crate::sidecar::upstream::lane::{Lane, Mode};
use crate::sidecar::upstream::node::NodeAddr;

/// Any server queues it, and it changes nothing.
const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
/// The same where a server may refuse to queue the command itself: then it refuses this.
const REPLY_ON: &[u8] = b"*3\r\n$6\r\nCLIENT\r\n$5\r\nREPLY\r\n$2\r\nON\r\n";

/// What Larder does with the element that answers what the server has queued.
enum Part {
    /// It answers by itself.
    Answers,
    /// Nothing yet: what to queue instead decides whether the server takes it.
    Instead(&'static [u8]),
    /// The server's HELLO without what is not its business.
    Greets(Vec<u8>),
    /// The client goes where the server's connection has gone.
    Enters(Lane),
    /// It asks the other shards, too.
    Gathers(Gather),
    /// It leaves out what is not for clients.
    Censors(fn(&[u8], &mut Vec<u8>)),
    /// It draws again where the server has named a key of Larder's.
    Draws,
}

/// What the server is to queue for a command. `None`: Larder has no part in it.
pub fn stand_in<'a>(session: &Rc<Session>, request: &Request<'a>) -> Option<Cow<'a, [u8]>> {
    Some(match part(session, request)? {
        Part::Answers => PING.into(),
        Part::Instead(command) => command.into(),
        Part::Greets(hello) => hello.into(),
        Part::Enters(_) | Part::Gathers(_) | Part::Censors(_) | Part::Draws => request.raw.into(),
    })
}

/// The database that a queued command selects for those behind it.
pub fn selects(session: &Rc<Session>, request: &Request<'_>) -> Option<u8> {
    if request.spec.name == "select" { local::database(session, request).ok() } else { None }
}

fn part(session: &Rc<Session>, request: &Request<'_>) -> Option<Part> {
    let (name, is_cluster, lane) = (request.spec.name, session.worker().is_cluster(), session.lane());
    let enters = |mode: Mode| {
        // Any other word the server refuses.
        let word = request.args.get(2).unwrap_or_default();
        Part::Enters(lane.with(mode, word.eq_ignore_ascii_case(b"on")))
    };
    match (request.spec.class, name) {
        (Class::Connection, "ping" | "echo" | "client|help") | (Class::Topology, "cluster|help") => None,
        (Class::Connection, "hello") => Some(local::hello_alone(session, request).map_or(Part::Answers, Part::Greets)),
        (Class::Connection, "select") => {
            let database = local::database(session, request);
            Some(database.map_or(Part::Answers, |database| Part::Enters(Lane { database, ..lane })))
        }
        (Class::Connection, "client|no-touch") => Some(enters(Mode::NoTouch)),
        (Class::Connection, "client|import-source") => Some(enters(Mode::ImportSource)),
        (Class::Connection, "client|reply") => Some(Part::Instead(REPLY_ON)),
        (Class::Topology, name) if name.starts_with("cluster") && !is_cluster => None,
        (Class::Connection | Class::Topology | Class::Larder | Class::PubSub, _) => Some(Part::Answers),
        (Class::AnyNode, "config|get") => Some(Part::Censors(config::without_secrets)),
        (Class::Scan, _) if is_cluster => Some(Part::Answers),
        (Class::Scan, "scan") => Some(Part::Censors(shards::hide_in_scan)),
        (Class::Scan, "randomkey") => Some(Part::Draws),
        (Class::AllShards(gather) | Class::ScriptAdmin(gather) | Class::Gated(gather), _) if is_cluster => {
            Some(Part::Gathers(gather))
        }
        (Class::Gated(_), "keys") => Some(Part::Censors(own_keys::hide)),
        _ => None,
    }
}

/// Carries a command out, and answers it, where `node` has answered its [stand-in](stand_in) with `element`. All that came before is
/// answered.
pub fn carry_out(session: &Rc<Session>, request: &Request<'_>, element: &[u8], node: &NodeAddr) -> Flow {
    let pass = || {
        session.answer_now(|out| out.extend_from_slice(element));
        Flow::Continue
    };
    if let Some(key) = own_keys::named_by(request) {
        return own_keys::refuse(session, key);
    }
    let failed = element.first() == Some(&b'-');
    if request.spec.class == Class::Scan && session.worker().policy().has_versions() {
        return super::refuse(
            session,
            "NOPERM within a transaction names with versions cannot be told from others: use SCAN outside",
        );
    }
    match part(session, request) {
        None => pass(),
        Some(Part::Answers | Part::Instead(_)) => answer(session, request),
        // A script may run elsewhere.
        Some(Part::Gathers(Gather::AnySuccess)) => shards::others(session, request, Gather::AnySuccess, element, node),
        Some(_) if failed => pass(),
        Some(Part::Greets(_)) => local::greet(session, request, element),
        Some(Part::Enters(lane)) => {
            session.set_lane(lane);
            pass()
        }
        Some(Part::Gathers(gather)) => shards::others(session, request, gather, element, node),
        Some(Part::Censors(censor)) => {
            session.answer_now(|out| censor(element, out));
            Flow::Continue
        }
        Some(Part::Draws) if reply::text(element).is_some_and(is_larder_key) => names::random(session),
        Some(Part::Draws) => pass(),
    }
}

fn answer(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.class {
        Class::Topology => local::topology(session, request),
        Class::Larder => local::larder(session, request),
        Class::Scan if request.spec.name == "randomkey" => names::random(session),
        Class::Scan => shards::scan(session, request),
        _ => local::connection(session, request),
    }
}
