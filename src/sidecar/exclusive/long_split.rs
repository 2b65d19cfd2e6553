//! Splits a command over many keys that is too long to be held: MSET, MGET, DEL and their kin, whose keys lie in several slots.
//!
//! The whole command is kept in a file. Its parts, one for each slot, are read from there one after the other: a part of ordinary
//! size takes the shared connection, a larger one a connection of its own. No more than [`MOST_UNANSWERED_BYTES`] of parts, and
//! one part, wait for answers at a time. Keys that are missing in the reply are loaded at the end, where a rule does that
//! ([`long_fill`]); then the command comes here also where one server has all its keys.

use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use super::connection::{Dedicated, Owed};
use super::elsewhere::instead_of;
use super::long_command::{LongCommand, LongKey};
use super::outlet::{Failure, Outlet, needs_guards};
use super::stream::{MOST_WHOLE_BYTES, Probe, reach};
use super::{guard, long_fill, long_pass, refuse};
use crate::sidecar::commands::{Access, Join};
use crate::sidecar::dispatch::submit_part;
use crate::sidecar::engine::ttl::{EXEC, MULTI};
use crate::sidecar::resp::{CommandScanner, encode, reply};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::upstream::sink::{Answer, Sink};

/// How much of the parts may be on its way.
const MOST_UNANSWERED_BYTES: usize = 1024 * 1024;

/// Splits `command`, of which all keys are known, and answers it.
pub async fn run(reader: &mut Reader, session: &Rc<Session>, mut command: LongCommand, join: Join) {
    if let Err(stopped) = command.read_to_end(reader).await {
        return long_pass::stop(reader, stopped).await;
    }
    let step = command.step();
    if !(command.announced() - 1).is_multiple_of(step) {
        return refuse(session, &format!("ERR wrong number of arguments for '{}' command", command.spec.name));
    }
    let fills = long_fill::may_load(&command);
    // A count does not tell which keys are missing.
    let parts = parts(&command, session.worker().is_cluster(), fills && join == Join::Sum);
    let places = parts.iter().map(|part| part.keys.clone()).collect();
    let writes = command.spec.access == Access::Write;
    let place = session.take_place();
    let meeting = Meeting::new(session.clone(), place, Assembly::Keys(join, places), writes, parts.len());
    meeting.watch();
    let gathered = fills.then(|| meeting.divert());
    let split = Split { session: session.clone(), command, meeting, parts };
    if !split.send(reader).await {
        return session.end(Ending::Now);
    }
    if let Some(gathered) = gathered
        && let Ok(gathered) = gathered.await
    {
        long_fill::complete(session, place, &split.command, join, gathered).await;
    }
}

/// The keys of one slot, by their places among the command's keys.
#[derive(Debug)]
struct Part {
    slot: u16,
    keys: Vec<u32>,
}

/// One part for each slot, in the order of the slots, or `by_key` one for each key; the keys of each keep their order. One server
/// without a Cluster has no slots.
fn parts(command: &LongCommand, cluster: bool, by_key: bool) -> Vec<Part> {
    let mut order: Vec<u32> = (0..command.keys.len() as u32).collect();
    let slot = |place: &u32| if cluster { command.keys[*place as usize].slot } else { ANY_SLOT };
    if by_key {
        return order.iter().map(|place| Part { slot: slot(place), keys: vec![*place] }).collect();
    }
    order.sort_by_key(slot);
    order.chunk_by(|one, other| slot(one) == slot(other)).map(|keys| Part { slot: slot(&keys[0]), keys: keys.to_vec() }).collect()
}

/// A command on its way to several servers.
struct Split {
    session: Rc<Session>,
    command: LongCommand,
    meeting: Rc<Meeting>,
    parts: Vec<Part>,
}

impl Split {
    /// Sends all parts. `false`: the session is over.
    async fn send(&self, reader: &mut Reader) -> bool {
        let (mut scanner, mut unanswered) = (CommandScanner::default(), 0);
        for (index, part) in self.parts.iter().enumerate() {
            let ranges: Vec<Range<u64>> = part.keys.iter().map(|place| self.command.key_and_value(*place as usize)).collect();
            let size: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            let later = self.parts.len() - index - 1;
            let mut room = true;
            if size <= MOST_WHOLE_BYTES as u64 {
                match self.command.bytes(ranges).await {
                    Ok(bytes) => {
                        let wire = [self.header(part), bytes].concat();
                        let sink = Sink::Part { meeting: self.meeting.clone(), index: index as u32 };
                        room = submit_part(&self.session, self.command.spec, &wire, part.slot, sink, &mut scanner);
                        unanswered += wire.len();
                    }
                    Err(error) => self.meeting.deliver(index as u32, Answer::Failed(&error.to_string())),
                }
            } else {
                match self.send_large(reader, part, ranges).await {
                    Ok(reply) => self.meeting.deliver(index as u32, Answer::Reply(&reply)),
                    Err(Some(text)) => self.meeting.deliver(index as u32, Answer::Failed(&text)),
                    Err(None) => return false,
                }
            }
            if later == 0 || !room || unanswered >= MOST_UNANSWERED_BYTES {
                unanswered = 0;
                if !self.until_left(later).await {
                    return false;
                }
            }
        }
        true
    }

    /// The array's header, and the command's name.
    fn header(&self, part: &Part) -> Vec<u8> {
        let mut header = Vec::new();
        encode::array(&mut header, 1 + part.keys.len() * self.command.step());
        encode::bulk(&mut header, self.command.spec.name.as_bytes());
        header
    }

    /// Waits until only `left` parts have no answer. `false`: the session is over.
    async fn until_left(&self, left: usize) -> bool {
        poll_fn(|cx| {
            self.session.remember_waker(cx);
            self.session.worker().flush_dirty();
            if self.session.output_bytes() > 0 {
                self.session.poll_flush(cx);
            }
            match () {
                () if self.session.is_closed() => Poll::Ready(false),
                () if self.meeting.left() <= left => Poll::Ready(true),
                () => Poll::Pending,
            }
        })
        .await
    }

    /// Sends a part on a connection of its own, and waits for its reply. `Err(None)`: the session is over.
    async fn send_large(&self, reader: &mut Reader, part: &Part, ranges: Vec<Range<u64>>) -> Result<Vec<u8>, Option<String>> {
        let Some(first) = part.keys.first().map(|place| self.command.keys[*place as usize]) else { return Ok(Vec::new()) };
        let mut connection = reach(reader, &self.session, part.slot, Probe::Kept(&self.command, first)).await?;
        let guarded = needs_guards(&self.command, self.keys(part));
        let sent = self.stream(reader, &mut connection, part, ranges, guarded).await;
        match sent {
            Ok(()) => {
                let kept = connection.take_kept();
                connection.give_back();
                let reply = own_reply(kept, guarded);
                match instead_of(&reply) {
                    Some(text) => {
                        self.session.worker().refresh_topology();
                        Err(Some(text))
                    }
                    None => Ok(reply),
                }
            }
            Err(Failure::Gone) => Err(None),
            Err(Failure::Spool(error)) => Err(Some(error.to_string())),
            Err(Failure::Lost(broken)) => {
                let node = connection.address().clone();
                tracing::warn!(%node, error = %broken, "lost a client's own server connection");
                self.session.worker().refresh_topology();
                // Without EXEC nothing is carried out.
                let begun = connection.into_owed().iter().any(|owed| matches!(owed, Owed::Kept));
                Err(Some(guard::lost_text(begun).to_owned()))
            }
        }
    }

    fn keys(&self, part: &Part) -> impl Iterator<Item = LongKey> {
        part.keys.iter().map(|place| self.command.keys[*place as usize])
    }

    async fn stream(
        &self,
        reader: &mut Reader,
        connection: &mut Dedicated,
        part: &Part,
        ranges: Vec<Range<u64>>,
        guarded: bool,
    ) -> Result<(), Failure> {
        let mut outlet = Outlet::new(reader, connection, &self.command, part.slot);
        if guarded {
            outlet.bytes(MULTI.to_vec()).await?;
            outlet.connection.owe(Owed::Nobody);
        }
        outlet.connection.owe(if guarded { Owed::Nobody } else { Owed::Kept });
        outlet.bytes(self.header(part)).await?;
        for range in ranges {
            outlet.kept(range).await?;
        }
        outlet.flush().await?;
        if guarded {
            outlet.guards(&self.session, self.keys(part)).await?;
            outlet.connection.owe(Owed::Kept);
            outlet.bytes(EXEC.to_vec()).await?;
        }
        outlet.settle().await
    }
}

/// The reply of the part itself, of all that was kept: errors of commands in the transaction, and EXEC's reply.
fn own_reply(mut kept: Vec<Vec<u8>>, guarded: bool) -> Vec<u8> {
    let last = kept.pop().unwrap_or_default();
    if !guarded {
        return last;
    }
    if last.first() == Some(&b'-') {
        return kept.into_iter().next().unwrap_or(last);
    }
    reply::elements(&last).and_then(|elements| elements.first().map(|first| first.to_vec())).unwrap_or_default()
}
