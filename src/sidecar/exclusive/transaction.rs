//! MULTI, WATCH and what follows, up to EXEC or DISCARD.
//!
//! MULTI is answered here; the server hears of it together with the first command that says where the transaction belongs. In
//! a Cluster that is the first one with a key (or WATCH's); commands without keys before it are answered QUEUED and kept. All
//! that follows goes to that server in order, without waiting for each reply. A key of another slot is refused when it is
//! queued, with Cluster's own error, and EXEC then with EXECABORT.
//!
//! Between WATCH and MULTI a client's commands take their usual ways: they may be loaded, split, answered here. The connection
//! on which the server watches is kept aside ([`Held`](super::Held)). Where it is lost, EXEC answers nil, as after a change of
//! a watched key: the client tries again.
//!
//! Nobody holds a connection and says nothing for long: after [`idle_transaction`](crate::policy::snapshot::Cluster) it goes
//! back clean. What follows in MULTI is answered with EXECABORT; EXEC after WATCH alone answers nil.
//!
//! What Larder answers itself, or has a part in, is carried out when EXEC's reply comes to its element ([`within`]): that reply is
//! several answers, each at a place of its own in the session's order. Until then the command is kept.
//!
//! Refused within MULTI, with EXECABORT to follow: what [`refusal`] names. Nothing blocks within MULTI.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use tokio::task::yield_now;

use super::connection::{Dedicated, Owed};
use super::exec_filter::{ExecFilter, Queued};
use super::pool::{Hold, Target, acquire};
use super::turn::{Turn, Want, turn};
use super::wait::settle;
use super::{Watch, guard, refuse, stream, subscribe};
use crate::sidecar::commands::{self, Access, Class, CommandSpec};
use crate::sidecar::dispatch::{CROSS_SLOT, Request, within};
use crate::sidecar::engine::ttl::{EXEC, MULTI};
use crate::sidecar::lapses;
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::reader::{Front, MOST_HELD_BYTES, Taken};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::tracking;
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::ANY_SLOT;

const DISCARD: &[u8] = b"*1\r\n$7\r\nDISCARD\r\n";
const UNWATCH: &[u8] = b"*1\r\n$7\r\nUNWATCH\r\n";
const ABORTED: &str = "EXECABORT Transaction discarded because of previous errors.";
/// Commands without keys that wait for the first one with a key may take this much memory.
const MOST_KEPT_BYTES: usize = 64 * 1024;
/// Commands that Larder has a part in may take this much memory until EXEC. One has 1 MiB at most.
const MOST_HELD_BACK_BYTES: usize = 2 * 1024 * 1024;
/// So many of them in a row before other tasks get their turn.
const PARTS_PER_TURN: usize = 64;
/// The most replies that a server may owe before more commands are sent to it.
const MOST_OWED: usize = 4096;

/// How far the client has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before MULTI: only WATCH and UNWATCH are handled.
    Outside,
    /// After MULTI.
    Multi,
    /// After EXEC or DISCARD, or when another command follows WATCH.
    Over,
}

pub(super) struct Transaction {
    session: Rc<Session>,
    stage: Stage,
    connection: Option<Dedicated>,
    slot: u16,
    watching: bool,
    /// The connection on which keys were watched is lost: EXEC answers nil.
    watch_lost: bool,
    /// Whether the server has heard of MULTI.
    begun: bool,
    /// A command was refused: EXEC is.
    aborted: bool,
    /// Commands without keys that wait for a server to be chosen.
    kept: Vec<u8>,
    /// The commands that were queued.
    queued: Vec<Queued>,
    /// Those of them that Larder has a part in.
    parts: VecDeque<(Taken, &'static CommandSpec)>,
    parts_bytes: usize,
    /// The database of the next command: a queued SELECT may have named another than the client's.
    database: u8,
    /// Whether CLIENT TRACKING or CACHING is queued, and the last command behind it that reads.
    may_track: bool,
    reads_untold: Option<&'static CommandSpec>,
    /// CLIENT REPLY SKIP was carried out: it is about the command behind EXEC.
    skips: bool,
    /// Where EXEC begins among the bytes sent.
    exec_mark: Option<u64>,
    /// When the client's last command was handled, on the worker's clock.
    active: u64,
    /// The client was idle for too long, and has not heard of it.
    idled: bool,
}

/// Serves a client whose next command is MULTI, WATCH or UNWATCH.
pub async fn run(reader: &mut Reader) {
    let mut transaction = Transaction::resume(reader.session()).await;
    while transaction.stage != Stage::Over {
        match reader.take_front() {
            Front::Command(command) => {
                transaction.command(reader, command).await;
                transaction.active = reader.session().worker().now();
            }
            Front::Broken => {
                // What was queued is answered before the error that ends the session.
                transaction.wait(reader, 0, true).await;
                return;
            }
            Front::Long | Front::Partial if transaction.stage == Stage::Outside => transaction.stage = Stage::Over,
            Front::Long => stream::within(reader, &mut transaction).await,
            Front::Partial if transaction.must_leave(reader) => return transaction.leave(reader).await,
            Front::Partial => {
                if !transaction.wait(reader, MOST_HELD_BYTES, false).await {
                    return;
                }
                if transaction.is_idle() {
                    transaction.give_up(reader).await;
                }
            }
        }
        let is_full = |connection: &Dedicated| connection.owes() > MOST_OWED || connection.unsent() > MOST_HELD_BYTES;
        if transaction.connection.as_ref().is_some_and(is_full) && !transaction.wait(reader, 0, true).await {
            return;
        }
    }
    if transaction.conclude(reader).await {
        transaction.finish();
    }
}

impl Transaction {
    /// Takes up the keys that the client watches.
    async fn resume(session: &Rc<Session>) -> Self {
        let watch = session.held().borrow_mut().watch.take();
        let mut transaction = Self {
            session: session.clone(),
            stage: Stage::Outside,
            connection: None,
            slot: ANY_SLOT,
            watching: watch.is_some(),
            watch_lost: false,
            begun: false,
            aborted: false,
            kept: Vec::new(),
            queued: Vec::new(),
            parts: VecDeque::new(),
            parts_bytes: 0,
            database: session.lane().database,
            may_track: false,
            reads_untold: None,
            skips: false,
            exec_mark: None,
            active: session.worker().now(),
            idled: false,
        };
        match watch {
            None => {}
            Some(Watch::Lost) => transaction.watch_lost = true,
            Some(Watch::Kept { mut connection, slot, .. }) => {
                let serves = connection.lane() == session.lane().shared() && !connection.is_displaced(slot);
                if serves && connection.is_alive().await {
                    transaction.connection = Some(*connection);
                    transaction.slot = slot;
                } else {
                    transaction.watch_lost = true;
                }
            }
        }
        transaction
    }

    /// Waits for the server, or for up to `input` bytes of the client. `false`: the session is over.
    async fn wait(&mut self, reader: &mut Reader, input: usize, settled: bool) -> bool {
        if settled && self.connection.as_ref().is_none_or(Dedicated::is_settled) {
            return true;
        }
        let (slot, may_drain) = (self.slot, self.connection.is_none());
        let idle_since = (!settled && self.connection.is_some()).then_some(self.active);
        let want = Want { input, settled, slot, answers_soon: true, may_drain, idle_since, ..Want::default() };
        match turn(reader, self.connection.as_mut(), want).await {
            Turn::Gone => return false,
            Turn::Lost(broken) => self.lose(&broken),
            Turn::Input | Turn::Settled | Turn::Room | Turn::Ended | Turn::Late | Turn::Due => {}
        }
        true
    }

    /// Whether the client has been silent for too long on a connection that others may wait for.
    fn is_idle(&self) -> bool {
        let worker = self.session.worker();
        self.connection.is_some() && worker.now() >= self.active + worker.idle_transaction()
    }

    /// Gives the connection back. The client hears of it with its next command.
    async fn give_up(&mut self, reader: &mut Reader) {
        self.end_at_server();
        (self.begun, self.aborted, self.idled) = (false, true, true);
        if self.wait(reader, 0, true).await
            && let Some(connection) = self.connection.take()
        {
            connection.give_back();
        }
    }

    /// The error for the first command after [`Transaction::give_up`].
    fn take_idle_text(&mut self) -> Option<String> {
        let idle = self.session.worker().policy().idle_transaction();
        std::mem::take(&mut self.idled).then(|| {
            format!(
                "EXECABORT Transaction discarded: no command came for {idle}, and others may need its connection: send it again"
            )
        })
    }

    /// Whether nothing more will come of the transaction.
    fn must_leave(&self, reader: &Reader) -> bool {
        reader.has_ended() || (self.connection.is_none() && self.session.ending() != Ending::No)
    }

    /// The client sends no more, and its transaction is not whole: it is dropped, as by Redis.
    async fn leave(mut self, reader: &mut Reader) {
        if self.wait(reader, 0, true).await {
            self.session.end(Ending::Draining);
        }
    }

    async fn command(&mut self, reader: &mut Reader, command: Taken) {
        let spec = match commands::resolve(&command.args()) {
            Ok(spec) => spec,
            Err(error) => {
                self.aborted = true;
                return self.session.answer_now(|out| error.write(&command.args(), out));
            }
        };
        match (self.stage, spec.name) {
            (Stage::Outside, "multi") => {
                self.stage = Stage::Multi;
                self.session.answer_now(|out| encode::status(out, "OK"));
            }
            (Stage::Outside, "watch") => self.watch(&command, spec).await,
            (Stage::Outside, "unwatch") => self.unwatch(),
            // Everything else takes its usual way.
            (Stage::Outside, _) => {
                reader.put_back(command);
                self.stage = Stage::Over;
            }
            (_, "multi") => refuse(&self.session, "ERR MULTI calls can not be nested"),
            (_, "watch") => refuse(&self.session, "ERR WATCH inside MULTI is not allowed"),
            (_, "exec") => self.exec().await,
            (_, "discard") => self.discard(),
            (_, "quit" | "reset") => {
                reader.put_back(command);
                self.abandon();
            }
            _ => self.enqueue(command, spec).await,
        }
    }

    async fn watch(&mut self, command: &Taken, spec: &CommandSpec) {
        if let Err(text) = lapses::clear(&self.session, self.database, spec, &command.args()).await {
            return refuse(&self.session, &text);
        }
        self.leave_the_displaced();
        let slot = match self.slot_for(guard::admit(&self.session, &command.args(), spec)) {
            Ok(slot) => slot,
            Err(text) => return refuse(&self.session, &text),
        };
        if self.watch_lost {
            // EXEC will answer nil whatever else is watched.
            return self.session.answer_now(|out| encode::status(out, "OK"));
        }
        if let Err(text) = self.connect(slot).await {
            return refuse(&self.session, &text);
        }
        if let Some(connection) = &mut self.connection {
            connection.queue(command.raw());
            connection.owe(Owed::Client(self.session.take_place()));
            self.watching = true;
        }
    }

    /// Another server has the slot now: whatever is watched at this one counts as changed.
    fn leave_the_displaced(&mut self) {
        if self.connection.as_ref().is_some_and(|connection| connection.is_displaced(self.slot)) {
            self.connection = None;
            self.watch_lost |= self.watching;
        }
    }

    fn unwatch(&mut self) {
        (self.watching, self.watch_lost) = (false, false);
        match &mut self.connection {
            Some(connection) => {
                connection.queue(UNWATCH);
                connection.owe(Owed::Client(self.session.take_place()));
            }
            None => self.session.answer_now(|out| encode::status(out, "OK")),
        }
    }

    /// The slot of a command's keys, where the transaction may have it.
    fn slot_for(&self, admitted: Result<u16, String>) -> Result<u16, String> {
        let slot = admitted?;
        let fits = slot == ANY_SLOT || self.slot == ANY_SLOT || slot == self.slot;
        if fits { Ok(slot) } else { Err(CROSS_SLOT.to_owned()) }
    }

    /// What a command within MULTI is refused with, or its slot.
    pub(super) fn admit(
        &mut self,
        args: &crate::sidecar::resp::CommandArgs<'_>,
        spec: &'static CommandSpec,
    ) -> Result<u16, String> {
        if let Some(text) = refusal(&self.session, spec) {
            return Err(text);
        }
        self.admit_allowed(args, spec)
    }

    /// As [`Transaction::admit`], of a command that [`refusal`] lets pass.
    fn admit_allowed(&mut self, args: &crate::sidecar::resp::CommandArgs<'_>, spec: &'static CommandSpec) -> Result<u16, String> {
        self.note_read(spec);
        self.slot_for(guard::admit(&self.session, args, spec))
    }

    /// As [`Transaction::admit`], of a command whose keys are known to lie in `slot`, and admitted.
    pub(super) fn admit_slot(&mut self, slot: u16, spec: &'static CommandSpec) -> Result<u16, String> {
        self.note_read(spec);
        refusal(&self.session, spec).map_or_else(|| self.slot_for(Ok(slot)), Err)
    }

    /// What a client reads before it is known to track, but behind the command by which it does, it must not keep.
    fn note_read(&mut self, spec: &'static CommandSpec) {
        if self.may_track && (spec.access == Access::Read || spec.class == Class::Script) {
            self.reads_untold = Some(spec);
        }
    }

    /// The database of the next command.
    pub(super) fn database(&self) -> u8 {
        self.database
    }

    /// Judges a command by the database that it will be carried out in.
    pub(super) fn in_its_database<T>(&self, judge: impl FnOnce(&Rc<Session>) -> T) -> T {
        let lane = self.session.lane();
        self.session.set_lane(Lane { database: self.database, ..lane });
        let judged = judge(&self.session);
        self.session.set_lane(lane);
        judged
    }

    async fn enqueue(&mut self, command: Taken, spec: &'static CommandSpec) {
        if let Some(text) = self.take_idle_text() {
            return refuse(&self.session, &text);
        }
        if let Some(text) = refusal(&self.session, spec) {
            return self.abort(&text);
        }
        let request = Request { raw: command.raw(), args: command.args(), spec };
        let stand_in = within::stand_in(&self.session, &request).map(std::borrow::Cow::into_owned);
        if let Some(bytes) = stand_in {
            let selects = within::selects(&self.session, &request);
            return self.hold_back(command, spec, selects, &bytes).await;
        }
        if let Err(text) = lapses::clear(&self.session, self.database, spec, &command.args()).await {
            return self.abort(&text);
        }
        let slot = match self.admit_allowed(&command.args(), spec) {
            Ok(slot) => slot,
            Err(text) => return self.abort(&text),
        };
        let mut bytes = Vec::new();
        let queued = self.in_its_database(|session| guard::write_queued(session, &command, spec, &mut bytes));
        self.send(slot, &bytes, queued).await;
    }

    /// Keeps a command that Larder has a part in, and has the server queue `bytes` in its place.
    async fn hold_back(&mut self, command: Taken, spec: &'static CommandSpec, selects: Option<u8>, bytes: &[u8]) {
        if !self.aborted {
            self.parts_bytes += command.raw().len();
            if self.parts_bytes > MOST_HELD_BACK_BYTES {
                return self.abort("ERR too many commands that Larder answers itself stand in one transaction");
            }
            self.may_track |= matches!(spec.name, "client|tracking" | "client|caching");
            self.database = selects.unwrap_or(self.database);
            self.parts.push_back((command, spec));
        }
        self.send(ANY_SLOT, bytes, Queued { held: true, ..Queued::default() }).await;
    }

    /// Has the server queue a command.
    async fn send(&mut self, slot: u16, bytes: &[u8], queued: Queued) {
        if self.aborted || self.waits_for_key(slot) {
            return self.keep(bytes, queued);
        }
        match self.begin(slot).await {
            Ok(connection) => {
                connection.queue(bytes);
                self.owe_queued(queued);
            }
            Err(text) => self.abort(&text),
        }
    }

    /// Whether no server can be chosen yet.
    pub(super) fn waits_for_key(&self, slot: u16) -> bool {
        slot == ANY_SLOT && self.connection.is_none() && self.session.worker().is_cluster()
    }

    /// Answers QUEUED here. A command after a refused one is never sent: EXEC will not be.
    fn keep(&mut self, bytes: &[u8], queued: Queued) {
        if !self.aborted {
            if self.kept.len() + bytes.len() > MOST_KEPT_BYTES {
                return self.abort("ERR too many commands without a key stand before the first with a key");
            }
            self.kept.extend_from_slice(bytes);
            self.queued.push(queued);
        }
        self.session.answer_now(|out| encode::status(out, "QUEUED"));
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.aborted
    }

    pub(super) fn session(&self) -> &Rc<Session> {
        &self.session
    }

    pub(super) fn connection_mut(&mut self) -> Option<&mut Dedicated> {
        self.connection.as_mut()
    }

    /// Refuses a command, and with it the transaction.
    pub(super) fn abort(&mut self, text: &str) {
        self.aborted = true;
        refuse(&self.session, text);
    }

    /// Notes that a command of the client, and those of ours behind it, were sent to be queued.
    pub(super) fn owe_queued(&mut self, queued: Queued) {
        let place = self.session.take_place();
        if let Some(connection) = &mut self.connection {
            connection.owe(Owed::Queued(place));
            (0..queued.extra).for_each(|_| connection.owe(Owed::Nobody));
        }
        self.queued.push(queued);
    }

    /// Tells of the command that was queued last what was not known before: above all how many of ours have followed it.
    pub(super) fn amend_queued(&mut self, queued: Queued) {
        if let Some(last) = self.queued.last_mut() {
            *last = queued;
        }
    }

    /// The connection, after MULTI.
    pub(super) async fn begin(&mut self, slot: u16) -> Result<&mut Dedicated, String> {
        let (begun, kept) = (std::mem::replace(&mut self.begun, true), std::mem::take(&mut self.kept));
        let count = self.queued.len();
        let connection = self.connect(slot).await?;
        if !begun {
            connection.queue(MULTI);
            connection.owe(Owed::Nobody);
            if !kept.is_empty() {
                connection.queue(&kept);
                (0..count).for_each(|_| connection.owe(Owed::Nobody));
            }
        }
        Ok(connection)
    }

    async fn connect(&mut self, slot: u16) -> Result<&mut Dedicated, String> {
        if slot != ANY_SLOT {
            self.slot = slot;
        }
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => acquire(self.session.worker(), &Target::Slot(slot), self.session.lane(), Hold::Brief).await?,
        };
        Ok(self.connection.insert(connection))
    }

    async fn exec(&mut self) {
        self.stage = Stage::Over;
        if self.aborted || self.watch_lost {
            let nil = self.watch_lost && !self.aborted;
            self.end_at_server();
            return match (nil, self.session.protocol()) {
                (false, _) => {
                    let idled = self.take_idle_text();
                    refuse(&self.session, idled.as_deref().unwrap_or(ABORTED));
                }
                (true, Protocol::Resp2) => self.session.answer_now(|out| out.extend_from_slice(b"*-1\r\n")),
                (true, protocol) => self.session.answer_now(|out| encode::null(out, protocol)),
            };
        }
        if self.queued.is_empty() && self.connection.is_none() {
            return self.session.answer_now(|out| encode::array(out, 0));
        }
        if let Err(text) = self.begin(ANY_SLOT).await {
            return refuse(&self.session, &format!("EXECABORT Transaction discarded: {text}"));
        }
        let queued = std::mem::take(&mut self.queued);
        let place = self.session.take_place();
        if let Some(connection) = &mut self.connection {
            self.exec_mark = Some(connection.mark());
            connection.queue(EXEC);
            connection.owe(Owed::Exec(place, ExecFilter::of_client(queued)));
        }
        self.watching = false;
    }

    /// Waits for all replies. What Larder has a part in is carried out when EXEC's reply comes to it. `false`: the session is over.
    async fn conclude(&mut self, reader: &mut Reader) -> bool {
        loop {
            if !self.connection.as_ref().is_some_and(Dedicated::is_due) && !self.wait(reader, 0, true).await {
                return false;
            }
            let Some(element) = self.connection.as_mut().and_then(Dedicated::take_due) else { break };
            self.take_part(reader, &element).await;
            if self.parts.len().is_multiple_of(PARTS_PER_TURN) {
                yield_now().await;
            }
            if !answered(&self.session).await {
                return false;
            }
            let Some(connection) = &mut self.connection else { break };
            connection.adopt(self.session.lane());
            if let Err(broken) = connection.resume(&self.session) {
                self.lose(&broken);
            }
        }
        if self.skips {
            self.session.skip_next();
        }
        if let Some(spec) = self.reads_untold {
            tracking::reads_unnamed(&self.session, spec);
        }
        true
    }

    /// Carries out the next command that Larder has a part in, whose stand-in the server has answered with `element`.
    async fn take_part(&mut self, reader: &mut Reader, element: &[u8]) {
        let (Some((command, spec)), Some(connection)) = (self.parts.pop_front(), &self.connection) else { return };
        let args = command.args();
        match spec.class {
            Class::PubSub => {
                let told = subscribe::within(reader, &command, spec).await;
                self.session.answer_now(|out| out.extend_from_slice(&told));
            }
            _ if spec.name == "client|reply" && args.get(2).is_some_and(|word| word.eq_ignore_ascii_case(b"skip")) => {
                self.skips |= !self.session.is_muted();
            }
            _ => {
                let request = Request { raw: command.raw(), args, spec };
                within::carry_out(&self.session, &request, element, connection.address());
            }
        }
    }

    fn discard(&mut self) {
        self.stage = Stage::Over;
        self.end_at_server();
        self.session.answer_now(|out| encode::status(out, "OK"));
    }

    /// Ends the transaction, and the watch, at the server.
    fn end_at_server(&mut self) {
        self.watching = false;
        if let Some(connection) = &mut self.connection {
            connection.queue(if self.begun { DISCARD } else { UNWATCH });
            connection.owe(Owed::Nobody);
        }
    }

    /// Lets go of everything; what follows is no business of the transaction's.
    fn abandon(&mut self) {
        self.stage = Stage::Over;
        self.end_at_server();
    }

    /// The connection is lost: nothing was carried out unless EXEC has left.
    pub(super) fn lose(&mut self, broken: &Broken) {
        let Some(connection) = self.connection.take() else { return };
        let node = connection.address().clone();
        tracing::warn!(%node, error = %broken, "lost a client's own server connection");
        self.session.worker().refresh_topology();
        let left = self.exec_mark.is_some_and(|mark| connection.has_left(mark));
        self.fail(connection, guard::lost_text(left));
    }

    /// The connection cannot be used any more: the command on it cannot be finished.
    pub(super) fn break_off(&mut self, text: &str) {
        if let Some(connection) = self.connection.take() {
            self.fail(connection, text);
        }
    }

    fn fail(&mut self, connection: Dedicated, text: &str) {
        guard::fail_owed(&self.session, connection.into_owed(), text);
        self.aborted |= self.stage == Stage::Multi;
        self.watch_lost |= self.watching;
        self.begun = false;
    }

    /// Gives the connection back, or keeps it aside where keys are watched.
    fn finish(mut self) {
        let kept = match (self.connection.take(), self.watching) {
            (Some(connection), true) => {
                let since = self.session.worker().now();
                Some(Watch::Kept { connection: Box::new(connection), slot: self.slot, since })
            }
            (None, true) => Some(Watch::Lost),
            (Some(connection), false) => {
                connection.give_back();
                None
            }
            (None, false) => None,
        };
        self.session.held().borrow_mut().watch = kept;
    }
}

/// Gives the connection back on which an idle client's keys were watched.
pub(super) async fn unwatch(mut connection: Box<Dedicated>) {
    connection.queue(UNWATCH);
    connection.owe(Owed::Nobody);
    if settle(&mut connection, true).await.is_ok() {
        connection.give_back();
    }
}

/// Waits until nothing is left to be answered. `false`: the session is over.
async fn answered(session: &Rc<Session>) -> bool {
    poll_fn(|cx| {
        if session.is_closed() || session.outstanding() == 0 {
            return Poll::Ready(!session.is_closed());
        }
        session.remember_waker(cx);
        session.watch_answers();
        session.worker().flush_dirty();
        session.poll_flush(cx);
        Poll::Pending
    })
    .await
}

/// What is refused within MULTI, as everywhere.
fn refusal(session: &Rc<Session>, spec: &CommandSpec) -> Option<String> {
    let name = || spec.name.replace('|', " ").to_ascii_uppercase();
    let allow = session.worker().policy().allow();
    match spec.class {
        Class::Refused(refusal) => Some(format!("NOPERM {} is not passed on by Larder: {}", name(), refusal.remedy())),
        Class::Gated(_) if !(if spec.name == "keys" { allow.keys } else { allow.flush }) => {
            Some(format!("NOPERM {} touches every key of a shared cache: allow it in the CachePolicy", name()))
        }
        _ => None,
    }
}
