//! What becomes of a server's answer.

use std::fmt;
use std::rc::Rc;

use super::gather::Meeting;
use crate::sidecar::patterns::cache_aside::writes::Fill;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::versions::written::Written;
use crate::sidecar::worker::Worker;

/// What came back for a command.
#[derive(Debug, Clone, Copy)]
pub enum Answer<'a> {
    /// A whole reply, an error reply included.
    Reply(&'a [u8]),
    /// No reply will come. The text is an error reply's, its code first.
    Failed(&'a str),
}

/// What is done with a reply on its way to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnReply {
    /// It is passed on.
    Pass,
    /// It is passed on; a null counts as a miss of the rule at this position, anything else as a hit.
    Count(u16),
    /// As [`OnReply::Count`], but a null starts a load.
    Fill(u16),
    /// As [`OnReply::Fill`], where zero or nothing stands for a missing key.
    FillZero(u16),
    /// As [`OnReply::Fill`], of a hash, of which nothing may be there: see [`reply::is_hollow`].
    FillHash(u16),
    /// As [`OnReply::Count`], but a null asks for the right to load.
    Lease(u16),
    /// As [`OnReply::Lease`], and a value asks for the right to load anew: it may expire soon.
    Early(u16),
    /// An array: its nulls start loads where their keys are loaded through.
    FillMany,
    /// As [`OnReply::Count`], of a rule that only observes.
    Watch(u16),
    /// It is passed on; an array's nulls are told to rules that only observe.
    WatchMany,
}

/// What is called with an internal command's answer.
pub type Callback = Box<dyn FnOnce(&Rc<Worker>, Answer<'_>)>;

/// Who waits for an answer.
pub enum Sink {
    /// A client.
    Client {
        /// Its session.
        session: Rc<Session>,
        /// The place of the reply in its order.
        sequence: u32,
        /// What is done with the reply.
        on_reply: OnReply,
    },
    /// A client, whose command went inside a transaction of ours.
    Transaction(Box<Transaction>),
    /// A write that went as a script of ours.
    Fill(Box<Fill>),
    /// A write of keys with versions, which is acknowledged once the version that counts has heard of it.
    Written(Box<Written>),
    /// A part of a command that was split over nodes.
    Part {
        /// Where the parts meet.
        meeting: Rc<Meeting>,
        /// Which part it is.
        index: u32,
    },
    /// Larder itself.
    Call(Callback),
    /// Nobody.
    Drop,
}

/// A command inside `MULTI … EXEC`: the first element of EXEC's reply answers it.
#[derive(Debug)]
pub struct Transaction {
    /// Who waits for that element. Never a transaction itself.
    pub sink: Sink,
    /// How many replies it brings, those to MULTI and EXEC included.
    pub expects: u32,
    /// The first error reply before EXEC's.
    pub error: Option<Vec<u8>>,
}

impl Sink {
    /// The session whose order the answer belongs to.
    pub fn session(&self) -> Option<&Rc<Session>> {
        match self {
            Self::Client { session, .. } => Some(session),
            Self::Transaction(transaction) => transaction.sink.session(),
            Self::Fill(fill) => fill.sink.session(),
            Self::Written(written) => written.sink.session(),
            Self::Part { meeting, .. } => Some(meeting.session()),
            Self::Call(_) | Self::Drop => None,
        }
    }

    /// How many replies the command brings: more than one for a transaction.
    #[inline]
    pub fn expects(&self) -> u32 {
        if let Self::Transaction(transaction) = self { transaction.expects } else { 1 }
    }

    /// Hands over the answer.
    #[inline]
    pub fn deliver(self, worker: &Rc<Worker>, answer: Answer<'_>) {
        match self {
            Self::Client { session, sequence, on_reply } => match answer {
                Answer::Reply(bytes) => pass_on(worker, &session, sequence, on_reply, bytes),
                Answer::Failed(text) => session.answer(sequence, |out| encode::error(out, text)),
            },
            Self::Transaction(transaction) => transaction.finish(worker, answer),
            Self::Fill(fill) => fill.finish(worker, answer),
            Self::Written(written) => written.finish(worker, answer),
            Self::Part { meeting, index } => meeting.deliver(index, answer),
            Self::Call(call) => call(worker, answer),
            Self::Drop => {}
        }
    }
}

#[inline]
fn pass_on(worker: &Rc<Worker>, session: &Rc<Session>, sequence: u32, on_reply: OnReply, bytes: &[u8]) {
    match on_reply {
        OnReply::Pass | OnReply::FillMany | OnReply::WatchMany => session.deliver(sequence, bytes),
        OnReply::FillHash(rule) => {
            worker.metrics().count_read(rule, reply::is_hollow(bytes));
            session.deliver(sequence, bytes);
        }
        OnReply::Count(rule)
        | OnReply::Watch(rule)
        | OnReply::Lease(rule)
        | OnReply::Early(rule)
        | OnReply::Fill(rule)
        | OnReply::FillZero(rule) => {
            worker.metrics().count_read(rule, reply::is_null(bytes));
            session.deliver(sequence, bytes);
        }
    }
}

impl Transaction {
    /// The error that stands for the whole, given EXEC's reply: EXEC itself only says that there was one.
    pub fn failure<'a>(&'a self, exec: &'a [u8]) -> Option<&'a [u8]> {
        (exec.first() == Some(&b'-')).then(|| self.error.as_deref().unwrap_or(exec))
    }

    fn finish(self, worker: &Rc<Worker>, answer: Answer<'_>) {
        let exec = match answer {
            Answer::Failed(_) => return self.sink.deliver(worker, answer),
            Answer::Reply(bytes) => bytes,
        };
        if let Some(error) = self.failure(exec) {
            let error = error.to_vec();
            return self.sink.deliver(worker, Answer::Reply(&error));
        }
        match reply::elements(exec).as_deref() {
            Some([first, ..]) => self.sink.deliver(worker, Answer::Reply(first)),
            _ => self.sink.deliver(worker, Answer::Failed("ERR the server answered EXEC with something else than an array")),
        }
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client { .. } => "Client",
            Self::Transaction(_) => "Transaction",
            Self::Fill(_) => "Fill",
            Self::Written(_) => "Written",
            Self::Part { .. } => "Part",
            Self::Call(_) => "Call",
            Self::Drop => "Drop",
        })
    }
}
