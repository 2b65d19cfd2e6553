//! What the policy says of commands that do not take the shared connections.

use std::rc::Rc;

use super::connection::Owed;
use super::exec_filter::Queued;
use crate::sidecar::commands::{Access, CommandSpec, Effect};
use crate::sidecar::dispatch::{CROSS_SLOT, note_written, own_keys, unmatched_text};
use crate::sidecar::engine::ttl::{self, TtlPlan};
use crate::sidecar::patterns::cache_aside::writes;
use crate::sidecar::patterns::{observe, write_through};
use crate::sidecar::policy::{ActivePolicy, Covered, RuleId, UNMATCHED};
use crate::sidecar::resp::{CommandArgs, encode};
use crate::sidecar::session::Session;
use crate::sidecar::session::reader::Taken;
use crate::sidecar::slots;
use crate::sidecar::tracking;
use crate::sidecar::upstream::broken::LOST;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::versions;

/// The slot of a command's keys; [`ANY_SLOT`] where there are no slots, or no keys.
///
/// # Errors
/// The text of the error reply: keys of several slots, a key that the policy refuses, or one of Larder's own.
pub fn admit(session: &Rc<Session>, args: &CommandArgs<'_>, spec: &CommandSpec) -> Result<u16, String> {
    let worker = session.worker();
    let policy = worker.policy();
    // Where the arguments contradict themselves any server answers with the error that fits.
    if policy.minds_writes()
        && let Some(text) = write_through::refusal_apart(&policy, spec, args, "a transaction or a command that takes its own way")
    {
        return Err(text);
    }
    if let Some(text) = versions::refusal_apart(&policy, spec, args) {
        return Err(text);
    }
    let keys = spec.keys(args).unwrap_or_default();
    let mut slot = ANY_SLOT;
    for at in &keys {
        let Some(key) = args.get(at.index as usize) else { continue };
        if at.effect != Effect::Route && slots::is_larder_key(key) {
            return Err(own_keys::refusal(key));
        }
        if at.effect != Effect::Route && policy.refuses_unmatched() && policy.find(key) == UNMATCHED {
            return Err(unmatched_text(key));
        }
        if worker.is_cluster() {
            let own = slots::slot_of(key);
            if slot != ANY_SLOT && own != slot {
                return Err(CROSS_SLOT.to_owned());
            }
            slot = own;
        }
    }
    Ok(slot)
}

/// Appends what is sent for a command that is queued in the client's own transaction, or that blocks.
pub fn write_queued(session: &Rc<Session>, command: &Taken, spec: &CommandSpec, out: &mut Vec<u8>) -> Queued {
    if session.is_tracking() {
        tracking::reads_apart(session, spec, &command.args());
    }
    let worker = session.worker();
    let policy = worker.policy();
    if policy.is_transparent() {
        out.extend_from_slice(command.raw());
        return Queued::default();
    }
    let (args, coverage) = (command.args(), Covered { policy: &policy, database: session.lane().database });
    observe::on_write(session, spec, &args);
    let mut planned = Vec::new();
    let plan = ttl::plan(&args, spec, &coverage, &mut || worker.random(), &mut planned);
    if plan != TtlPlan::Forward {
        note_written(worker, spec, &args, &coverage);
    }
    let extra = plan.write_queued(command.raw(), args.len(), &planned, out);
    let given_ttl = if plan == TtlPlan::Forward { None } else { spec.first_key(&args).map(|key| policy.find(key)) };
    let extra = extra + writes::guard(session, spec, &args, out);
    let reads = read_rule(&policy, &args, spec);
    let gets = spec.name == "get" && reads.is_some_and(|rule| policy.leases(rule));
    let leased = spec.only_key(&args).filter(|_| gets).map(Rc::from);
    Queued { extra, reads, leased, given_ttl, held: false }
}

/// The rule of the one key that a command reads, as on the shared connections.
fn read_rule(policy: &ActivePolicy, args: &CommandArgs<'_>, spec: &CommandSpec) -> Option<RuleId> {
    let is_channel = matches!(spec.keys, [part] if part.effect == Effect::Route);
    let key = spec.only_key(args).filter(|_| spec.access != Access::Write && !is_channel)?;
    Some(policy.find(key))
}

/// The commands that guard a command which is passed on as it comes, of which `args` are the arguments known so far.
pub fn write_guards(session: &Rc<Session>, args: &CommandArgs<'_>, spec: &CommandSpec, out: &mut Vec<u8>) -> Queued {
    if session.is_tracking() {
        tracking::reads_apart(session, spec, args);
        if spec.only_key(args).is_none() {
            tracking::reads_unnamed(session, spec);
        }
    }
    let worker = session.worker();
    let policy = worker.policy();
    if policy.is_transparent() {
        return Queued::default();
    }
    observe::on_write(session, spec, args);
    let coverage = Covered { policy: &policy, database: session.lane().database };
    let guards = ttl::guards(args, spec, &coverage, &mut || worker.random(), out);
    if guards > 0 {
        note_written(worker, spec, args, &coverage);
    }
    let given_ttl = spec.first_key(args).filter(|_| guards > 0).map(|key| policy.find(key));
    let extra = guards + writes::guard(session, spec, args, out);
    Queued { extra, reads: read_rule(&policy, args, spec), leased: None, given_ttl, held: false }
}

/// What a client hears of a reply that did not come; never from where. `left`: whether a byte of its command may have left.
pub fn lost_text(left: bool) -> &'static str {
    const UNSENT: &str = "TRYAGAIN the connection to the server was lost: the command was not sent, and can safely be repeated";
    if left { LOST } else { UNSENT }
}

/// Answers what a lost connection owed.
pub fn fail_owed(session: &Rc<Session>, owed: impl IntoIterator<Item = Owed>, text: &str) {
    for owed in owed {
        match owed {
            Owed::Client(place) | Owed::Judged(place) | Owed::Queued(place) | Owed::Exec(place, _) => {
                session.answer(place, |out| encode::error(out, text));
            }
            Owed::Nobody | Owed::Kept => {}
        }
    }
}
