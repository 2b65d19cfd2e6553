//! Commands that are too long to be held: their bytes are passed on as they come, with back-pressure both ways.
//!
//! Where a command goes must be known before its end. What has one key, in front, is passed on at once; so are scripts, once
//! their keys have come, and messages. A command whose keys may stand anywhere (MSET, DEL, SUNIONSTORE, …) is held whole up to
//! [`MOST_WHOLE_BYTES`] and then takes its usual way. A longer one is kept in a file until its last key has come, where a Cluster's
//! slots or a policy depend on the keys ([`long_pass`]), and split from there where its keys are apart ([`long_split`](super::long_split)).
//!
//! A client that stops within a command for as long as a transaction may be idle is closed.
//!
//! Covered writes go inside MULTI and EXEC, with the commands that see to the TTL.

use std::rc::Rc;

use super::connection::{Dedicated, Owed};
use super::exec_filter::ExecFilter;
use super::follow::{Follow, Halt};
use super::long_command::{LongCommand, LongKey};
use super::outlet::{Failure, Outlet};
use super::pool::{Hold, acquire};
use super::transaction::Transaction;
use super::turn::{Turn, Want, turn};
use super::{guard, long_pass, refuse};
use crate::sidecar::commands::{self, Class, CommandSpec, UNKNOWN};
use crate::sidecar::engine::ttl::{EXEC, MULTI};
use crate::sidecar::lapses;
use crate::sidecar::patterns::cache_aside::writes;
use crate::sidecar::patterns::write_through;
use crate::sidecar::resp::{CommandArgs, CommandTail, encode};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::tracking;
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::queue::{ANY_SLOT, ASKING};
use crate::sidecar::versions;

/// A command whose keys are not known before its end is held whole up to this size.
pub const MOST_WHOLE_BYTES: usize = 1024 * 1024;
/// How much of a client's bytes waits for the server.
pub const MOST_UNSENT_BYTES: usize = 64 * 1024;
/// How much of them is read ahead.
const MOST_AHEAD_BYTES: usize = 128 * 1024;

/// What becomes of a long command, by what is known of it so far.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// It takes its usual way when it is whole.
    Whole,
    /// It is passed on, as a command on this slot.
    Pass(&'static CommandSpec, u16),
    /// It has so many arguments, and is kept in a file until its keys are known.
    Keep(&'static CommandSpec, usize),
    /// It is swallowed, and answered with this error.
    Refuse(String),
}

/// Serves a client whose next command is too long to be held.
pub async fn run(reader: &mut Reader) {
    let session = reader.session().clone();
    match decide(reader, &session).await {
        None | Some(Decision::Whole) => {}
        Some(Decision::Refuse(text)) => refuse_long(reader, &text).await,
        Some(Decision::Pass(spec, slot)) => {
            let cleared = lapses::clear(&session, session.lane().database, spec, &reader.unfinished().0).await;
            match cleared {
                Ok(()) => pass(reader, &session, spec, slot).await,
                Err(text) => refuse_long(reader, &text).await,
            }
        }
        Some(Decision::Keep(spec, announced)) => {
            tracking::reads_unnamed(&session, spec);
            long_pass::run(reader, &session, spec, announced).await;
        }
    }
}

/// The same within a transaction.
pub async fn within(reader: &mut Reader, transaction: &mut Transaction) {
    let session = transaction.session().clone();
    let decision = decide(reader, &session).await;
    let (spec, slot) = match decision {
        None | Some(Decision::Whole) => return,
        Some(Decision::Keep(spec, announced)) => {
            tracking::reads_unnamed(&session, spec);
            return long_pass::within(reader, transaction, spec, announced).await;
        }
        Some(Decision::Pass(spec, _)) => {
            let args = &reader.unfinished().0;
            let cleared = lapses::clear(&session, transaction.database(), spec, args).await;
            (spec, cleared.and_then(|()| transaction.admit(args, spec)))
        }
        Some(Decision::Refuse(text)) => (&UNKNOWN, Err(text)),
    };
    let mut guards = Vec::new();
    let judge = |session: &Rc<Session>| guard::write_guards(session, &reader.unfinished().0, spec, &mut guards);
    let queued = transaction.in_its_database(judge);
    let began = match slot {
        Ok(_) if transaction.is_aborted() => {
            if swallow(reader).await {
                session.answer_now(|out| encode::status(out, "QUEUED"));
            }
            return;
        }
        Ok(slot) => transaction.begin(slot).await.map(|_| slot),
        Err(text) => Err(text),
    };
    let slot = match began {
        Ok(slot) => slot,
        Err(text) => {
            if swallow(reader).await {
                transaction.abort(&text);
            }
            return;
        }
    };
    transaction.owe_queued(queued);
    let tail = reader.begin_tail();
    match pass_tail(reader, transaction.connection_mut(), slot, tail).await {
        Passed::Whole => {
            if let Some(connection) = transaction.connection_mut() {
                connection.queue(&guards);
            }
        }
        Passed::Lost(broken) => transaction.lose(&broken),
        Passed::Gone => session.end(Ending::Now),
    }
}

/// Reads on until it is known what becomes of the command. `None`: the session is over.
async fn decide(reader: &mut Reader, session: &Rc<Session>) -> Option<Decision> {
    let want = Want { input: MOST_WHOLE_BYTES, ..Want::default() };
    loop {
        if reader.is_whole() {
            return Some(Decision::Whole);
        }
        let (args, announced) = reader.unfinished();
        let last = reader.inbox().len() >= MOST_WHOLE_BYTES;
        match judge(session, &args, announced, last) {
            Decision::Whole => {}
            decision => return Some(decision),
        }
        match turn(reader, None, want).await {
            Turn::Ended | Turn::Gone => {
                session.end(Ending::Now);
                return None;
            }
            _ => {}
        }
    }
}

/// `last`: no more of it can be held. Then never [`Decision::Whole`].
fn judge(session: &Rc<Session>, args: &CommandArgs<'_>, announced: usize, last: bool) -> Decision {
    let too_long = |name: &str| {
        let name = name.replace('|', " ").to_ascii_uppercase();
        let kind = if name.is_empty() { "this command" } else { &name };
        Decision::Refuse(format!("ERR {kind} is longer than {MOST_WHOLE_BYTES} bytes, and its keys must be known before its end"))
    };
    let spec = match find(args) {
        Ok(Some(spec)) => spec,
        Ok(None) if last => return too_long(""),
        Ok(None) => return Decision::Whole,
        Err(text) => return Decision::Refuse(text),
    };
    if !spec.arity_ok(announced) {
        return Decision::Refuse(format!("ERR wrong number of arguments for '{}' command", spec.name));
    }
    if let Class::Refused(refusal) = spec.class {
        let name = spec.name.replace('|', " ").to_ascii_uppercase();
        return Decision::Refuse(format!("NOPERM {name} is not passed on by Larder: {}", refusal.remedy()));
    }
    let transparent = session.worker().policy().is_transparent();
    let one_server = transparent && !session.worker().is_cluster();
    let passable = match spec.class {
        Class::Publish if spec.keys.is_empty() => true,
        Class::Data | Class::Publish | Class::Script | Class::Unknown => one_server || are_known(spec, args),
        Class::Split(_) => one_server && last,
        _ => false,
    };
    // What may be a fill is stored by a script, and an origin is told a value, which need all of it. What is too long for that is not
    // kept, or refused.
    let carried = write_through::may_carry(session, spec, args);
    // So does a name that is not the one which the cache has.
    let carried = carried.or_else(|| versions::refusal_apart(&session.worker().policy(), spec, args));
    if let Some(text) = carried.as_ref().filter(|_| last) {
        return Decision::Refuse(text.clone());
    }
    let passable = passable && (last || !(writes::may_fill(session, spec, args) || carried.is_some()));
    if passable {
        return match guard::admit(session, args, spec) {
            Ok(slot) => Decision::Pass(spec, slot),
            Err(text) => Decision::Refuse(text),
        };
    }
    let kept = matches!(spec.class, Class::Data | Class::Publish | Class::Script | Class::Unknown | Class::Split(_));
    match last {
        false => Decision::Whole,
        true if kept && spec.has_spans() => Decision::Keep(spec, announced),
        true => too_long(spec.name),
    }
}

/// The command that the arguments so far name, once they do.
fn find(args: &CommandArgs<'_>) -> Result<Option<&'static CommandSpec>, String> {
    if args.is_empty() {
        return Ok(None);
    }
    let spec = commands::lookup(args.name()).unwrap_or(&UNKNOWN);
    if spec.subcommands.is_empty() {
        return Ok(Some(spec));
    }
    if args.len() < 2 {
        return Ok(None);
    }
    spec.subcommand(args).map(Some).map_err(|error| {
        let mut line = Vec::new();
        error.write(args, &mut line);
        String::from_utf8_lossy(&line).trim_start_matches('-').trim_end().to_owned()
    })
}

/// Whether all keys of the command are among the arguments so far.
fn are_known(spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
    match spec.class {
        Class::Script => args.len() > 2 && spec.keys(args).is_ok(),
        _ => spec.only_key(args).is_some(),
    }
}

/// Passes a command on, on a connection of its own, and its reply back.
async fn pass(reader: &mut Reader, session: &Rc<Session>, spec: &CommandSpec, slot: u16) {
    let mut guards = Vec::new();
    let queued = guard::write_guards(session, &reader.unfinished().0, spec, &mut guards);
    let key = spec.first_key(&reader.unfinished().0).map(<[u8]>::to_vec);
    let mut connection = match reach(reader, session, slot, key.as_deref().map_or(Probe::None, Probe::Key)).await {
        Ok(connection) => connection,
        Err(text) => {
            return refuse_long(reader, &text).await;
        }
    };
    let place = session.take_place();
    let extra = queued.extra;
    if extra == 0 {
        connection.owe(Owed::Client(place));
    } else {
        connection.queue(MULTI);
        (0..extra + 2).for_each(|_| connection.owe(Owed::Nobody));
        connection.owe(Owed::Exec(place, ExecFilter::of_ours(queued)));
    }
    let tail = reader.begin_tail();
    let passed = match pass_tail(reader, Some(&mut connection), slot, tail).await {
        Passed::Whole => {
            if extra > 0 {
                connection.queue(&guards);
                connection.queue(EXEC);
            }
            settle(reader, &mut connection, slot).await
        }
        other => other,
    };
    match passed {
        Passed::Whole => connection.give_back(),
        Passed::Gone => session.end(Ending::Now),
        Passed::Lost(broken) => {
            let node = connection.address().clone();
            tracing::warn!(%node, error = %broken, "lost a client's own server connection");
            session.worker().refresh_topology();
            guard::fail_owed(session, connection.into_owed(), guard::lost_text(true));
        }
    }
}

/// The key by which a Cluster tells where a command goes.
#[derive(Debug, Clone, Copy)]
pub enum Probe<'a> {
    /// There is none.
    None,
    /// It is at hand.
    Key(&'a [u8]),
    /// It is kept with its command.
    Kept(&'a LongCommand, LongKey),
}

/// A connection to the server that has the key: a command whose bytes are not held cannot follow a redirection.
///
/// # Errors
/// The text of an error reply: nothing of the client's command has left.
pub async fn reach(reader: &mut Reader, session: &Rc<Session>, slot: u16, probe: Probe<'_>) -> Result<Dedicated, String> {
    let mut follow = Follow::new(session.worker(), slot);
    loop {
        let mut connection = acquire(session.worker(), &follow.target, session.lane(), Hold::Brief).await?;
        if !session.worker().is_cluster() || matches!(probe, Probe::None) {
            return Ok(connection);
        }
        if follow.asking {
            connection.queue(ASKING);
            connection.owe(Owed::Nobody);
        }
        let node = connection.address().clone();
        match ask(reader, &mut connection, slot, probe).await? {
            Passed::Whole => {
                let reply = connection.take_kept().pop().unwrap_or_default();
                let next = if reply.first() == Some(&b'-') { follow.after(&reply, &node).await } else { Err(Halt::Refused) };
                if matches!(next, Err(Halt::Refused)) {
                    if follow.asking {
                        connection.queue(ASKING);
                        connection.owe(Owed::Nobody);
                    }
                    return Ok(connection);
                }
                connection.give_back();
                if let Err(Halt::Astray(text)) = next {
                    return Err(text);
                }
            }
            Passed::Gone => return Err(guard::lost_text(false).to_owned()),
            Passed::Lost(_) if follow.again().await => {}
            Passed::Lost(_) => return Err(guard::lost_text(false).to_owned()),
        }
    }
}

/// Sends EXISTS, and waits for the answer, which is kept.
///
/// # Errors
/// The text of an error reply, where the key cannot be read.
pub async fn ask(reader: &mut Reader, connection: &mut Dedicated, slot: u16, probe: Probe<'_>) -> Result<Passed, String> {
    let mut command = Vec::new();
    encode::array(&mut command, 2);
    encode::bulk(&mut command, b"EXISTS");
    connection.owe(Owed::Kept);
    match probe {
        Probe::None => {}
        Probe::Key(key) => {
            encode::bulk(&mut command, key);
            connection.queue(&command);
        }
        Probe::Kept(kept, key) => {
            connection.queue(&command);
            let mut outlet = Outlet::new(reader, connection, kept, slot);
            let sent = match outlet.kept(key.as_argument()).await {
                Ok(()) => outlet.flush().await,
                failed => failed,
            };
            match sent {
                Ok(()) => {}
                Err(Failure::Spool(error)) => return Err(error.to_string()),
                Err(Failure::Gone) => return Ok(Passed::Gone),
                Err(Failure::Lost(broken)) => return Ok(Passed::Lost(broken)),
            }
        }
    }
    Ok(settle(reader, connection, slot).await)
}

/// How passing on ended.
#[derive(Debug)]
pub enum Passed {
    /// All of it is sent.
    Whole,
    /// The connection is lost; the rest of the command was read.
    Lost(Broken),
    /// The client has left, or what it sent is no command.
    Gone,
}

/// Reads the rest of the command and drops it. `false`: the session is over.
async fn swallow(reader: &mut Reader) -> bool {
    let tail = reader.begin_tail();
    swallow_tail(reader, tail).await
}

/// The same of a command whose rest is `tail`.
pub async fn swallow_tail(reader: &mut Reader, tail: CommandTail) -> bool {
    match pass_tail(reader, None, ANY_SLOT, tail).await {
        Passed::Whole => true,
        Passed::Gone | Passed::Lost(_) => {
            reader.session().end(Ending::Now);
            false
        }
    }
}

/// Swallows the unfinished command, and answers it with an error.
pub async fn refuse_long(reader: &mut Reader, text: &str) {
    if swallow(reader).await {
        refuse(reader.session(), text);
    }
}

/// Hands on the unfinished command at the front of the inbox, up to its end. Where the connection is lost on the way, the rest
/// is dropped.
pub async fn pass_tail(reader: &mut Reader, mut connection: Option<&mut Dedicated>, slot: u16, mut tail: CommandTail) -> Passed {
    let mut lost = None;
    let worker = reader.session().worker().clone();
    let mut active = worker.now();
    loop {
        let Ok((count, ended)) = tail.advance(reader.inbox()) else { return Passed::Gone };
        if count > 0 {
            active = worker.now();
        }
        if let Some(connection) = &mut connection {
            connection.queue(&reader.inbox()[..count]);
        }
        reader.skip(count);
        if ended {
            return lost.map_or(Passed::Whole, Passed::Lost);
        }
        let full = connection.as_ref().is_some_and(|connection| connection.unsent() > MOST_UNSENT_BYTES);
        let (input, unsent_below) = if full { (0, MOST_UNSENT_BYTES / 2) } else { (MOST_AHEAD_BYTES, 0) };
        let idle_since = (connection.is_some() && !full).then_some(active);
        let want = Want { input, unsent_below, slot, answers_soon: full, idle_since, ..Want::default() };
        match turn(reader, connection.as_deref_mut(), want).await {
            Turn::Input | Turn::Room | Turn::Settled | Turn::Due => {}
            // Half a command can neither be finished nor taken back, and others may need its connection.
            Turn::Ended | Turn::Gone | Turn::Late => return Passed::Gone,
            Turn::Lost(broken) => {
                lost = Some(broken);
                connection = None;
            }
        }
    }
}

/// Waits for the reply, which is passed on as it comes.
pub async fn settle(reader: &mut Reader, connection: &mut Dedicated, slot: u16) -> Passed {
    loop {
        let want = Want { settled: true, slot, answers_soon: true, ..Want::default() };
        match turn(reader, Some(connection), want).await {
            Turn::Settled => return Passed::Whole,
            Turn::Input | Turn::Room | Turn::Late | Turn::Due => {}
            Turn::Ended | Turn::Gone => return Passed::Gone,
            Turn::Lost(broken) => return Passed::Lost(broken),
        }
    }
}
