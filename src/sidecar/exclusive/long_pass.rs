//! Passes on commands whose keys are known only far behind their start: see [`LongCommand`].
//!
//! What stands up to the last key comes from the file, the rest from the client as it comes. Covered writes go inside MULTI and
//! EXEC, with the commands that see to the TTL; they repeat the key from the file.

use std::rc::Rc;

use super::connection::{Dedicated, Owed};
use super::exec_filter::{ExecFilter, Queued};
use super::long_command::{LongCommand, LongKey, Stopped};
use super::outlet::{Failure, Outlet, needs_guards};
use super::stream::{Passed, Probe, ask, pass_tail, reach, swallow_tail};
use super::transaction::Transaction;
use super::{guard, long_fill, long_split, refuse};
use crate::sidecar::commands::{Access, Class, CommandSpec, Effect};
use crate::sidecar::dispatch::CROSS_SLOT;
use crate::sidecar::engine::ttl::{EXEC, MULTI};
use crate::sidecar::patterns::read_through::hash;
use crate::sidecar::resp::{CommandTail, encode, reply};
use crate::sidecar::session::{Ending, Reader, Session};

/// Serves a client whose next command is a `spec` of `announced` arguments that cannot be held.
pub async fn run(reader: &mut Reader, session: &Rc<Session>, spec: &'static CommandSpec, announced: usize) {
    let command = match LongCommand::read(reader, session, spec, announced).await {
        Ok(command) => command,
        Err(stopped) => return stop(reader, stopped).await,
    };
    match (command.slot(), spec.class) {
        (_, Class::Split(join)) if long_fill::may_load(&command) => long_split::run(reader, session, command, join).await,
        (Some(slot), _) => pass(reader, session, &command, slot).await,
        (None, Class::Split(join)) => long_split::run(reader, session, command, join).await,
        (None, _) => refuse_tail(reader, command.tail(), CROSS_SLOT).await,
    }
}

/// Ends a command that is not passed on.
pub async fn stop(reader: &mut Reader, stopped: Stopped) {
    match stopped {
        Stopped::Gone => reader.session().end(Ending::Now),
        Stopped::Refused(tail, text) => refuse_tail(reader, tail, &text).await,
    }
}

/// Swallows the rest of a command, and answers it with an error.
async fn refuse_tail(reader: &mut Reader, tail: CommandTail, text: &str) {
    if swallow_tail(reader, tail).await {
        refuse(reader.session(), text);
    }
}

/// Passes the command on to the one server that has its keys.
async fn pass(reader: &mut Reader, session: &Rc<Session>, command: &LongCommand, slot: u16) {
    let probe = command.keys.first().map_or(Probe::None, |key| Probe::Kept(command, *key));
    let mut connection = match reach(reader, session, slot, probe).await {
        Ok(connection) => connection,
        Err(text) => return refuse_tail(reader, command.tail(), &text).await,
    };
    if let Some(key) = long_fill::only_loaded_key(command, command.spec) {
        // A hash that is there has null for a field that it lacks.
        if !hash::loads(command.spec.name) {
            connection.refuse_null(long_fill::too_long(key));
        }
        // Of these a missing key's reply is that of an empty one.
        if command.spec.name != "get" {
            match is_there(reader, &mut connection, command, key, slot).await {
                Ok(true) => {}
                Ok(false) => {
                    connection.give_back();
                    return refuse_tail(reader, command.tail(), &long_fill::too_long(key)).await;
                }
                Err(text) => return refuse_tail(reader, command.tail(), &text).await,
            }
        }
    }
    let mut passage = Passage { place: session.take_place(), promised: false };
    match passage.send(reader, session, &mut connection, command, slot).await {
        Ok(()) => connection.give_back(),
        Err(Failure::Gone) => session.end(Ending::Now),
        Err(failure) => passage.fail(session, connection, failure),
    }
}

/// Whether the server has the key.
async fn is_there(
    reader: &mut Reader,
    connection: &mut Dedicated,
    command: &LongCommand,
    key: &LongKey,
    slot: u16,
) -> Result<bool, String> {
    match ask(reader, connection, slot, Probe::Kept(command, *key)).await? {
        Passed::Whole => Ok(connection.take_kept().pop().is_none_or(|reply| reply::integer(&reply) != Some(0))),
        Passed::Gone | Passed::Lost(_) => Err(guard::lost_text(false).to_owned()),
    }
}

/// One command on its way.
struct Passage {
    /// The place of its reply.
    place: u32,
    /// Whether the connection owes the reply that goes there.
    promised: bool,
}

impl Passage {
    async fn send(
        &mut self,
        reader: &mut Reader,
        session: &Rc<Session>,
        connection: &mut Dedicated,
        command: &LongCommand,
        slot: u16,
    ) -> Result<(), Failure> {
        let guarded = needs_guards(command, command.keys.iter().copied());
        if guarded {
            connection.queue(MULTI);
            connection.owe(Owed::Nobody);
            connection.owe(Owed::Nobody);
        } else {
            connection.owe(Owed::Client(self.place));
            self.promised = true;
        }
        send_command(reader, connection, command, slot).await?;
        let mut outlet = Outlet::new(reader, connection, command, slot);
        if guarded {
            let extra = outlet.guards(session, command.keys.iter().copied()).await?;
            outlet.connection.owe(Owed::Exec(self.place, ExecFilter::of_ours(queued(command, extra))));
            self.promised = true;
            outlet.bytes(EXEC.to_vec()).await?;
        }
        outlet.settle().await
    }

    /// Answers the command whose way has ended early; all of it has been read.
    fn fail(self, session: &Rc<Session>, connection: Dedicated, failure: Failure) {
        let node = connection.address().clone();
        let text = match failure {
            Failure::Spool(error) => error.to_string(),
            Failure::Lost(broken) => {
                tracing::warn!(%node, error = %broken, "lost a client's own server connection");
                session.worker().refresh_topology();
                // Without EXEC nothing is carried out.
                guard::lost_text(self.promised).to_owned()
            }
            Failure::Gone => return,
        };
        if self.promised {
            guard::fail_owed(session, connection.into_owed(), &text);
        } else {
            session.answer(self.place, |out| encode::error(out, &text));
        }
    }
}

/// Sends the command: what is kept of it, then the rest as it comes. Where that fails, the rest is swallowed.
async fn send_command(reader: &mut Reader, connection: &mut Dedicated, command: &LongCommand, slot: u16) -> Result<(), Failure> {
    let mut outlet = Outlet::new(reader, connection, command, slot);
    let mut sent = outlet.kept(0..command.len()).await;
    if sent.is_ok() {
        sent = outlet.flush().await;
    }
    match sent {
        Ok(()) => match pass_tail(reader, Some(connection), slot, command.tail()).await {
            Passed::Whole => Ok(()),
            Passed::Gone => Err(Failure::Gone),
            Passed::Lost(broken) => Err(Failure::Lost(broken)),
        },
        Err(Failure::Gone) => Err(Failure::Gone),
        Err(failure) if swallow_tail(reader, command.tail()).await => Err(failure),
        Err(_) => Err(Failure::Gone),
    }
}

/// The same within a client's transaction.
pub async fn within(reader: &mut Reader, transaction: &mut Transaction, spec: &'static CommandSpec, announced: usize) {
    let session = transaction.session().clone();
    let command = match LongCommand::read(reader, &session, spec, announced).await {
        Ok(command) => command,
        Err(Stopped::Gone) => return session.end(Ending::Now),
        Err(Stopped::Refused(tail, text)) => return abort_tail(reader, transaction, tail, &text).await,
    };
    let slot = match command.slot().ok_or_else(|| CROSS_SLOT.to_owned()).and_then(|slot| transaction.admit_slot(slot, spec)) {
        Ok(slot) => slot,
        Err(text) => return abort_tail(reader, transaction, command.tail(), &text).await,
    };
    if transaction.is_aborted() {
        if swallow_tail(reader, command.tail()).await {
            session.answer_now(|out| encode::status(out, "QUEUED"));
        }
        return;
    }
    if let Err(text) = transaction.begin(slot).await.map(|_| ()) {
        return abort_tail(reader, transaction, command.tail(), &text).await;
    }
    transaction.owe_queued(Queued::default());
    // It has just begun.
    let Some(connection) = transaction.connection_mut() else { return session.end(Ending::Now) };
    match queue_within(reader, &session, connection, &command, slot).await {
        Ok(extra) => transaction.amend_queued(queued(&command, extra)),
        Err(Failure::Gone) => session.end(Ending::Now),
        Err(Failure::Lost(broken)) => transaction.lose(&broken),
        Err(Failure::Spool(error)) => transaction.break_off(&error.to_string()),
    }
}

/// What is counted of a command that `extra` commands of ours follow.
fn queued(command: &LongCommand, extra: u32) -> Queued {
    let reads = command.spec.access != Access::Write && command.keys.len() == 1;
    let first = command.keys.first().filter(|key| key.effect != Effect::Route).map(|key| key.rule);
    Queued { extra, reads: first.filter(|_| reads), leased: None, given_ttl: first.filter(|_| extra > 0), held: false }
}

async fn abort_tail(reader: &mut Reader, transaction: &mut Transaction, tail: CommandTail, text: &str) {
    if swallow_tail(reader, tail).await {
        transaction.abort(text);
    }
}

async fn queue_within(
    reader: &mut Reader,
    session: &Rc<Session>,
    connection: &mut Dedicated,
    command: &LongCommand,
    slot: u16,
) -> Result<u32, Failure> {
    send_command(reader, connection, command, slot).await?;
    if !needs_guards(command, command.keys.iter().copied()) {
        return Ok(0);
    }
    Outlet::new(reader, connection, command, slot).guards(session, command.keys.iter().copied()).await
}
