//! CLIENT: what the client tells of itself stays here, and decides which connections its commands take.

use std::rc::Rc;

use super::super::names::answer_later;
use super::super::{Flow, Request, refuse, shards};
use super::connection::change_lane;
use super::{clients, ok, quoted};
use crate::sidecar::resp::encode;
use crate::sidecar::session::Session;
use crate::sidecar::tracking::Tracks;
use crate::sidecar::tracking::mode::{self, Wish};
use crate::sidecar::upstream::lane::Mode;

/// The longest name or version that is kept for a client.
const LONGEST_TEXT_BYTES: usize = 1024;
const SYNTAX: &str = "ERR syntax error";

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
        "info" => info(session),
        "list" => clients::list(session, request),
        "no-evict" => on_off(session, request),
        "no-touch" => lane_mode(session, request, Mode::NoTouch),
        "import-source" => lane_mode(session, request, Mode::ImportSource),
        "reply" => reply_mode(session, request),
        "tracking" => tracking(session, request),
        "trackinginfo" => tracking_info(session),
        "caching" => caching(session, request),
        "getredir" => get_redirection(session),
        "capa" => ok(session),
        "kill" => clients::kill(session, request),
        "unblock" => clients::unblock(session, request),
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
    check_name(name)?;
    rename(session, name);
    Ok(())
}

/// Gives the client a name that [`check_name`] has found good.
pub fn rename(session: &Session, name: &[u8]) {
    session.about.borrow_mut().name = name.to_vec();
}

/// Whether the client can be named so.
pub fn check_name(name: &[u8]) -> Result<(), &'static str> {
    if !is_plain(name) {
        return Err("ERR Client names cannot contain spaces, newlines or special characters.");
    }
    if name.len() > LONGEST_TEXT_BYTES {
        return Err("ERR Client names longer than 1024 bytes are not kept by Larder: use a shorter one");
    }
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

/// The client's own line of CLIENT LIST.
fn info(session: &Rc<Session>) -> Flow {
    let text = clients::describe(session);
    session.answer_now(|out| encode::verbatim(out, session.protocol(), text.as_bytes()));
    Flow::Continue
}

/// ON or OFF, where neither changes anything: who is evicted at a server are its own clients.
fn on_off(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let word = request.args.get(2).unwrap_or_default();
    if word.eq_ignore_ascii_case(b"on") || word.eq_ignore_ascii_case(b"off") { ok(session) } else { refuse(session, SYNTAX) }
}

/// Has the client share its connections only with those that are in the same mode.
fn lane_mode(session: &Rc<Session>, request: &Request<'_>, mode: Mode) -> Flow {
    let (word, old) = (request.args.get(2).unwrap_or_default(), session.lane());
    let enters = word.eq_ignore_ascii_case(b"on");
    let lane = if enters || word.eq_ignore_ascii_case(b"off") { old.with(mode, enters) } else { old };
    if !change_lane(session, lane) {
        return Flow::Quiet;
    }
    // The servers say OK, or what is wrong: some know no such mode.
    if enters { shards::enter_mode(session, request, old) } else { shards::any(session, request) }
}

/// Whether the client gets replies. All earlier ones are on their way to it before that changes.
fn reply_mode(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let mode = request.args.get(2).unwrap_or_default().to_ascii_lowercase();
    let known = matches!(mode.as_slice(), b"on" | b"off" | b"skip");
    if known && session.outstanding() > 0 {
        return Flow::Quiet;
    }
    match mode.as_slice() {
        b"on" => {
            session.unmute();
            return ok(session);
        }
        b"off" => session.mute(),
        b"skip" => session.skip_next(),
        _ => return refuse(session, SYNTAX),
    }
    Flow::Continue
}

/// Whether the client hears of changes of what it has read.
fn tracking(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let words: Vec<&[u8]> = request.args.iter().skip(2).collect();
    let wish = Wish::parse(&words, session.tracks().borrow().as_deref().map(Tracks::mode));
    match wish {
        Err(text) => refuse(session, &text),
        Ok(Wish::Off) => {
            session.worker().tracking().end(session);
            ok(session)
        }
        Ok(Wish::On(mode)) => {
            let asking = session.clone();
            answer_later(session, async move {
                let worker = asking.worker().clone();
                if let Some(target) = mode.redirect
                    && !clients::exists(&worker, target).await
                {
                    return Err("ERR The client ID you want redirect to does not exist".to_owned());
                }
                worker.tracking().begin(&worker, &asking, mode).await.map(|()| b"+OK\r\n".to_vec())
            })
        }
    }
}

fn caching(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let told = {
        let mut tracks = session.tracks().borrow_mut();
        let told = mode::caching(request.args.get(2).unwrap_or_default(), tracks.as_deref().map(Tracks::mode));
        if let (Ok(caching), Some(tracks)) = (&told, tracks.as_deref_mut()) {
            tracks.set_caching(*caching);
        }
        told
    };
    match told {
        Ok(_) => ok(session),
        Err(text) => refuse(session, &text),
    }
}

fn tracking_info(session: &Rc<Session>) -> Flow {
    let mut info = Vec::new();
    {
        let tracks = session.tracks().borrow();
        let tracks = tracks.as_deref();
        let (caching, broken) = (tracks.and_then(Tracks::caching), tracks.is_some_and(Tracks::is_broken));
        mode::info(tracks.map(Tracks::mode), caching, broken, session.protocol(), &mut info);
    }
    session.answer_now(|out| out.extend_from_slice(&info));
    Flow::Continue
}

fn get_redirection(session: &Rc<Session>) -> Flow {
    let target = mode::redirection(session.tracks().borrow().as_deref().map(Tracks::mode));
    integer(session, target)
}
