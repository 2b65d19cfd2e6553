//! From a client's command to what is sent, to whom, and what becomes of the answer.

mod announce;
mod config;
mod data;
mod local;
mod names;
pub mod own_keys;
mod shards;
mod slot_stats;
mod split;
pub mod within;

use std::rc::Rc;

pub use data::{CROSS_SLOT, note_written, unmatched_text};
pub use local::invalidate::{
    keys_end as invalidation_keys_end, slot_of as invalidation_slot, submit as submit_invalidation, write as write_invalidation,
};
pub use split::submit_part;

use super::commands::{self, Access, Class, CommandSpec, Effect};
use super::exclusive::Exclusive;
use super::lapses;
use super::patterns::{cache_aside, write_through};
use super::resp::{CommandArgs, encode};
use super::session::Session;
use super::versions;

/// What the client's task does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// It hands on the next command.
    Continue,
    /// The command is handed on; the task waits until it is woken.
    Wait,
    /// The command is not handed on: it changes which connections later commands take, and is handed on again when all earlier
    /// ones are answered.
    Quiet,
    /// The command is not handed on: something is asked for first, until when the session is held.
    Again,
    /// The command is not handed on: it needs a connection of the client's own.
    Exclusive(Exclusive),
}

/// A command of a client.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its bytes as they came.
    pub raw: &'a [u8],
    /// Its arguments.
    pub args: CommandArgs<'a>,
    /// What it is.
    pub spec: &'static CommandSpec,
}

/// Hands on one command of `session`.
#[inline]
pub fn command(session: &Rc<Session>, raw: &[u8], args: CommandArgs<'_>) -> Flow {
    let spec = match commands::resolve(&args) {
        Ok(spec) => spec,
        Err(error) => {
            session.answer_now(|out| error.write(&args, out));
            return Flow::Continue;
        }
    };
    let request = Request { raw, args, spec };
    if session.worker().metrics().hot_keys().are_watched() {
        note_keys(session, &request);
    }
    if session.worker().has_followed()
        && let Some(flow) = lapses::takes(session, &request)
    {
        return flow;
    }
    if session.worker().has_versions()
        && let Some(flow) = versions::takes(session, &request)
    {
        return flow;
    }
    hand_on(session, &request)
}

/// Whether a command may change what the cache has of its keys.
pub fn changes(request: &Request<'_>) -> bool {
    request.spec.access == Access::Write || request.spec.name == "larder.invalidate"
}

/// Hands on a command that names keys as the cache has them.
#[inline]
pub fn hand_on(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let spec = request.spec;
    session.set_leaving(false);
    if session.has_parked() {
        cache_aside::arrives(session, request);
    }
    if spec.access != Access::Read {
        session.note_change();
    }
    if let Some(key) = own_keys::named_by(request) {
        return if announce::is_announcement(request) { announce::run(session, request) } else { own_keys::refuse(session, key) };
    }
    if spec.access == Access::Write
        && let Some(flow) = write_through::takes(session, request)
    {
        return flow;
    }
    match spec.class {
        Class::Data | Class::Script | Class::Publish | Class::Unknown => data::forward(session, request),
        Class::Split(join) => split::forward(session, request, join),
        Class::Blocking | Class::Wait(_) if !spec.blocks(&request.args) => data::forward(session, request),
        Class::Blocking | Class::Wait(_) => Flow::Exclusive(Exclusive::Blocking),
        Class::Transaction => transaction(session, request),
        Class::PubSub => Flow::Exclusive(Exclusive::Subscribe),
        Class::ScriptAdmin(gather) | Class::AllShards(gather) => shards::all(session, request, gather),
        Class::Gated(gather) => shards::gated(session, request, gather),
        Class::Scan if spec.name == "randomkey" => names::random(session),
        Class::Scan => shards::scan(session, request),
        Class::AnyNode if spec.name == "config|get" => config::get(session, request),
        Class::AnyNode => shards::any(session, request),
        Class::Connection => local::connection(session, request),
        Class::Topology => local::topology(session, request),
        Class::Larder => local::larder(session, request),
        Class::Refused(refusal) => {
            let name = spec.name.replace('|', " ").to_ascii_uppercase();
            refuse(session, &format!("NOPERM {name} is not passed on by Larder: {}", refusal.remedy()))
        }
    }
}

/// Somebody asks which keys are used most.
#[cold]
fn note_keys(session: &Rc<Session>, request: &Request<'_>) {
    let named = request.spec.keys(&request.args).unwrap_or_default();
    let keys = named.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| request.args.get(at.index as usize));
    keys.for_each(|key| session.worker().metrics().hot_keys().note(key));
}

fn refuse(session: &Rc<Session>, text: &str) -> Flow {
    session.answer_now(|out| encode::error(out, text));
    Flow::Continue
}

/// Outside a transaction only MULTI and WATCH begin something.
fn transaction(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    match request.spec.name {
        "exec" => refuse(session, "ERR EXEC without MULTI"),
        "discard" => refuse(session, "ERR DISCARD without MULTI"),
        "unwatch" if !session.held().borrow().is_watching() => {
            session.answer_now(|out| encode::status(out, "OK"));
            Flow::Continue
        }
        _ => Flow::Exclusive(Exclusive::Transaction),
    }
}
