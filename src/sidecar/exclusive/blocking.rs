//! Commands that may block: each has a connection of its own until it is answered.
//!
//! While it blocks, the client is watched: when it leaves, the connection is closed, so that the server pops nothing for nobody.

use std::rc::Rc;

use super::connection::{Dedicated, Owed};
use super::exec_filter::Queued;
use super::follow::{Follow, Halt};
use super::pool::{Hold, acquire};
use super::turn::{Turn, Want, turn};
use super::{guard, refuse, wait};
use crate::sidecar::commands::{self, Access, Class};
use crate::sidecar::resp::encode;
use crate::sidecar::session::reader::{Front, MOST_HELD_BYTES};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::queue::ASKING;

/// How often a command is sent again that left nothing at a server, or only reads.
const MOST_RETRIES: u8 = 1;

/// Serves a client whose next command blocks.
pub async fn run(reader: &mut Reader) {
    let session = reader.session().clone();
    let Front::Command(command) = reader.take_front() else { return };
    let spec = match commands::resolve(&command.args()) {
        Ok(spec) => spec,
        Err(error) => return session.answer_now(|out| error.write(&command.args(), out)),
    };
    if let Class::Wait(gather) = spec.class {
        return wait::run(reader, &command, gather).await;
    }
    let slot = match guard::admit(&session, &command.args(), spec) {
        Ok(slot) => slot,
        Err(text) => return refuse(&session, &text),
    };
    let mut bytes = Vec::new();
    let queued = guard::write_queued(&session, &command, spec, &mut bytes);
    let call = Call { place: session.take_place(), slot, bytes, queued, repeatable: spec.access == Access::Read };
    call.carry_out(reader, &session).await;
}

/// A command that may block, on its way.
struct Call {
    place: u32,
    slot: u16,
    bytes: Vec<u8>,
    /// What goes with the command.
    queued: Queued,
    repeatable: bool,
}

impl Call {
    async fn carry_out(&self, reader: &mut Reader, session: &Rc<Session>) {
        let (mut follow, mut retries) = (Follow::new(session.worker(), self.slot), 0);
        loop {
            let acquired = acquire(session.worker(), &follow.target, session.lane(), Hold::Lasting).await;
            let mut connection = match acquired {
                Ok(connection) => connection,
                Err(text) => return session.answer(self.place, |out| encode::error(out, &text)),
            };
            let mark = self.send(&mut connection, follow.asking);
            session.begin_wait(connection.waits());
            let outcome = self.sit_out(reader, &mut connection).await;
            session.end_waits();
            match outcome {
                Outcome::Answered => {
                    if let Some(rule) = self.queued.given_ttl {
                        session.worker().metrics().ttl_added(rule);
                    }
                    return connection.give_back();
                }
                Outcome::Gone => return session.end(Ending::Now),
                Outcome::Refused(error) => {
                    let node = connection.address().clone();
                    connection.give_back();
                    match follow.after(&error, &node).await {
                        Ok(()) => {}
                        Err(Halt::Refused) => return session.deliver(self.place, &error),
                        Err(Halt::Astray(text)) => return session.answer(self.place, |out| encode::error(out, &text)),
                    }
                }
                Outcome::Lost(broken) => {
                    let (node, left) = (connection.address().clone(), connection.has_left(mark));
                    tracing::warn!(%node, error = %broken, "lost the connection of a blocked client");
                    session.worker().refresh_topology();
                    let again = retries < MOST_RETRIES && (self.repeatable || !left) && !session.is_streaming(self.place);
                    if !again || !follow.again().await {
                        return session.answer(self.place, |out| encode::error(out, guard::lost_text(left)));
                    }
                    retries += 1;
                }
            }
        }
    }

    fn send(&self, connection: &mut Dedicated, asking: bool) -> u64 {
        if asking {
            connection.queue(ASKING);
            connection.owe(Owed::Nobody);
        }
        let mark = connection.mark();
        connection.queue(&self.bytes);
        connection.owe(Owed::Judged(self.place));
        (0..self.queued.extra).for_each(|_| connection.owe(Owed::Nobody));
        mark
    }

    async fn sit_out(&self, reader: &mut Reader, connection: &mut Dedicated) -> Outcome {
        // What a client sends meanwhile is read up to a bound: only who reads sees it leave.
        let want = Want { input: MOST_HELD_BYTES, settled: true, slot: self.slot, ..Want::default() };
        loop {
            match turn(reader, Some(connection), want).await {
                Turn::Input | Turn::Room | Turn::Late | Turn::Due => {}
                Turn::Settled => return connection.take_judged().map_or(Outcome::Answered, Outcome::Refused),
                Turn::Ended | Turn::Gone => return Outcome::Gone,
                Turn::Lost(broken) => return Outcome::Lost(broken),
            }
        }
    }
}

/// How a command on one server ended.
enum Outcome {
    Answered,
    Refused(Vec<u8>),
    Lost(Broken),
    /// The client has left.
    Gone,
}
