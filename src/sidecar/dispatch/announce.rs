//! `XADD larder:events`: the one key of Larder's own that applications write to.

use std::rc::Rc;

use super::{Flow, Request, data, local, refuse};
use crate::policy::events::STREAM;
use crate::sidecar::events::entry::check_announcement;
use crate::sidecar::session::Session;
use crate::sidecar::upstream::queue::Retry;
use crate::sidecar::upstream::sink::OnReply;

/// Whether a command tells of an event.
pub fn is_announcement(request: &Request<'_>) -> bool {
    request.spec.name == "xadd" && request.args.get(1) == Some(STREAM.as_bytes())
}

/// Passes the event on, where its readers will understand it. It is read in database 0.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    if session.lane().database != 0 {
        return refuse(session, "ERR events are read in database 0: SELECT 0 first");
    }
    if let Err(error) = check_announcement(request.args.iter()) {
        return refuse(session, &format!("ERR {error}"));
    }
    let slot = local::invalidate::slot_of(session.worker(), STREAM.as_bytes());
    data::send(session, &[request.raw], slot, Retry::Never, OnReply::Pass)
}
