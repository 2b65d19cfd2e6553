//! Commands on their way to a server, in order, with their bytes kept until they are answered.
//!
//! The bytes stay because three things need them again: a redirect, a read that is repeated on another server, and a command
//! that never left. What is certain about a command is told by one number: whether the first of its bytes was handed to the
//! socket.

use std::collections::VecDeque;
use std::rc::Rc;

use super::lane::Lane;
use super::sink::Sink;
use crate::sidecar::session::Session;

/// No slot: any node will do, or there is only one.
pub const ANY_SLOT: u16 = u16::MAX;

/// Written before a command that a node asked to be sent elsewhere once.
pub const ASKING: &[u8] = b"*1\r\n$6\r\nASKING\r\n";

/// Whether a command may be sent again although a server may have carried it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It changes something: never.
    Never,
    /// A read, the deletion of covered keys, or the fill of one after a miss: yes.
    Safe,
    /// It is about the connection itself, and of no use on another.
    Here,
}

/// A command that waits for its answer.
#[derive(Debug)]
pub struct Pending {
    /// What becomes of the answer.
    pub sink: Sink,
    /// How many bytes it takes in the log, an [`ASKING`] before it included.
    pub length: u32,
    /// How many replies are still to come, [`ASKING`]'s included. Set by [`Queue::push`].
    pub replies: u32,
    /// Where its key lives.
    pub slot: u16,
    /// Whether it may be sent twice.
    pub retry: Retry,
    /// Whether [`ASKING`] stands before it.
    pub asking: bool,
    /// How often it has been sent elsewhere.
    pub hops: u8,
    /// When it was first queued, on the worker's clock, in milliseconds.
    pub since: u64,
    /// The kind of connection it takes.
    pub lane: Lane,
}

impl Pending {
    /// A command with one reply, queued now.
    pub fn new(sink: Sink, slot: u16, retry: Retry, lane: Lane, now: u64) -> Self {
        Self { sink, length: 0, replies: 1, slot, retry, asking: false, hops: 0, since: now, lane }
    }
}

/// A first-in-first-out queue of commands and their bytes.
#[derive(Debug, Default)]
pub struct Queue {
    bytes: Vec<u8>,
    /// Where the oldest unanswered command begins.
    head: usize,
    /// Where the first byte lies that the socket has not taken.
    sent: usize,
    pending: VecDeque<Pending>,
}

/// A command taken back out of a queue.
#[derive(Debug)]
pub struct Recovered {
    /// What was waiting.
    pub pending: Pending,
    /// Its bytes, without an [`ASKING`].
    pub bytes: Vec<u8>,
    /// Whether a byte of it may have left.
    pub left: bool,
}

impl Recovered {
    /// A command whose bytes, an [`ASKING`] before them included, are `bytes`.
    fn new(mut pending: Pending, mut bytes: Vec<u8>, left: bool) -> Self {
        if std::mem::take(&mut pending.asking) {
            bytes.drain(..ASKING.len());
        }
        Self { pending, bytes, left }
    }
}

impl Queue {
    /// Appends a command whose bytes are `parts`, one after the other.
    #[inline]
    pub fn push(&mut self, parts: &[&[u8]], mut pending: Pending) {
        let before = self.bytes.len();
        pending.replies = pending.sink.expects();
        if pending.asking {
            self.bytes.extend_from_slice(ASKING);
            pending.replies += 1;
        }
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        pending.length = (self.bytes.len() - before) as u32;
        self.pending.push_back(pending);
    }

    /// The bytes that the socket has not taken.
    #[inline]
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Tells that the socket took `count` more bytes.
    #[inline]
    pub fn mark_sent(&mut self, count: usize) {
        self.sent += count;
    }

    /// The oldest command that is not answered.
    #[inline]
    pub fn front_mut(&mut self) -> Option<&mut Pending> {
        self.pending.front_mut()
    }

    /// The bytes of the oldest command, without an [`ASKING`].
    pub fn front_bytes(&self) -> &[u8] {
        self.pending.front().map_or(&[], |front| {
            let skip = if front.asking { ASKING.len() } else { 0 };
            &self.bytes[self.head + skip..self.head + front.length as usize]
        })
    }

    /// Takes out the oldest command; its bytes go.
    #[inline]
    pub fn pop(&mut self) -> Option<Pending> {
        let front = self.pending.pop_front()?;
        self.head += front.length as usize;
        self.sent = self.sent.max(self.head);
        self.reclaim();
        Some(front)
    }

    /// Gives back the room of answered commands, at a cost that is constant per byte.
    #[inline]
    fn reclaim(&mut self) {
        const WORTH_MOVING: usize = 16 * 1024;
        const KEEP: usize = 256 * 1024;
        if self.pending.is_empty() {
            self.bytes.clear();
            (self.head, self.sent) = (0, 0);
            if self.bytes.capacity() > KEEP {
                self.bytes = Vec::new();
            }
        } else if self.head >= WORTH_MOVING && self.head * 2 >= self.bytes.len() {
            self.bytes.drain(..self.head);
            self.sent -= self.head;
            self.head = 0;
        }
    }

    /// Takes out everything, oldest first.
    pub fn drain(&mut self) -> Vec<Recovered> {
        let mut recovered = Vec::with_capacity(self.pending.len());
        while let Some(front) = self.pending.front() {
            let left = self.sent > self.head;
            let bytes = self.bytes[self.head..self.head + front.length as usize].to_vec();
            if let Some(pending) = self.pop() {
                recovered.push(Recovered::new(pending, bytes, left));
            }
        }
        recovered
    }

    /// How many commands have left, in whole or in part, and are not answered.
    pub fn sent_count(&self) -> usize {
        let (mut count, mut room) = (self.pending.len(), self.bytes.len() - self.sent);
        while let Some(last) = count.checked_sub(1).and_then(|index| self.pending.get(index))
            && last.length as usize <= room
        {
            room -= last.length as usize;
            count -= 1;
        }
        count
    }

    /// Whether a command has left that is not answered.
    #[inline]
    pub fn is_owed(&self) -> bool {
        self.sent > self.head
    }

    /// How many bytes are missing of a command of which some have left: it can only be finished, not taken back.
    pub fn rest_of_started(&self) -> usize {
        let mut end = self.head;
        for pending in &self.pending {
            if end >= self.sent {
                break;
            }
            end += pending.length as usize;
        }
        end.saturating_sub(self.sent)
    }

    /// Takes out those that are `wanted` of the commands that have not left, oldest first. The others keep their order.
    pub fn take_unsent(&mut self, wanted: impl Fn(&Pending) -> bool) -> Vec<Recovered> {
        let first = if self.unsent().is_empty() { self.pending.len() } else { self.sent_count() };
        if !self.pending.range(first..).any(&wanted) {
            return Vec::new();
        }
        let tail = self.pending.split_off(first);
        let length: usize = tail.iter().map(|pending| pending.length as usize).sum();
        let bytes = self.bytes.split_off(self.bytes.len() - length);
        let (mut taken, mut at) = (Vec::new(), 0);
        for pending in tail {
            let own = &bytes[at..at + pending.length as usize];
            at += own.len();
            if wanted(&pending) {
                taken.push(Recovered::new(pending, own.to_vec(), false));
            } else {
                self.bytes.extend_from_slice(own);
                self.pending.push_back(pending);
            }
        }
        self.reclaim();
        taken
    }

    /// Whether, among the next commands, one of `session` waits for the same slot as `slot`. Also true where there are too many
    /// to look at.
    pub fn has_another(&self, session: &Rc<Session>, slot: u16) -> bool {
        const MOST_SEEN: usize = 1024;
        let same =
            |pending: &Pending| pending.slot == slot && pending.sink.session().is_some_and(|other| Rc::ptr_eq(other, session));
        self.pending.len() > MOST_SEEN || self.pending.iter().any(same)
    }

    /// How many of the next commands are `session`'s and, byte for byte, `command`. Counts only so many as are worth the look.
    pub fn count_same(&self, session: &Rc<Session>, command: &[u8]) -> u32 {
        const MOST_SEEN: usize = 1024;
        let (mut count, mut at) = (0, self.head);
        for pending in self.pending.iter().take(MOST_SEEN) {
            let bytes = &self.bytes[at..at + pending.length as usize];
            at += bytes.len();
            let own = || pending.sink.session().is_some_and(|other| Rc::ptr_eq(other, session));
            count += u32::from(bytes == command && own());
        }
        count
    }

    /// How many commands wait.
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// How many bytes of memory the waiting commands take.
    #[inline]
    pub fn held_bytes(&self) -> usize {
        self.bytes.len() - self.head
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One is written, moved and read for each command: it fits a cache line with room to spare.
    #[test]
    fn a_pending_command_takes_48_bytes() {
        assert_eq!(size_of::<Pending>(), 48);
    }

    fn pending() -> Pending {
        Pending::new(Sink::Drop, 0, Retry::Never, Lane::default(), 0)
    }

    proptest! {
        /// Whatever is pushed, sent and answered in whatever order: what comes back is what was not answered, and `left` says
        /// whether the socket got its first byte.
        #[test]
        fn nothing_is_lost_and_what_left_is_known(
            steps in proptest::collection::vec((0u8..3, 1usize..40_000), 1..60),
            take in any::<bool>(),
        ) {
            let mut queue = Queue::default();
            let mut model: VecDeque<(Vec<u8>, usize)> = VecDeque::new();
            let (mut pushed, mut sent) = (0usize, 0usize);
            for (index, (action, size)) in steps.into_iter().enumerate() {
                match action {
                    0 => {
                        let bytes = vec![index as u8; size];
                        queue.push(&[&bytes[..size / 2], &bytes[size / 2..]], pending());
                        model.push_back((bytes, pushed));
                        pushed += size;
                    }
                    1 => {
                        let count = size.min(queue.unsent().len());
                        queue.mark_sent(count);
                        sent += count;
                    }
                    _ => {
                        prop_assert_eq!(queue.front_bytes(), model.front().map_or(&[][..], |front| &front.0[..]));
                        queue.pop();
                        if let Some((bytes, start)) = model.pop_front() {
                            sent = sent.max(start + bytes.len());
                        }
                    }
                }
                prop_assert_eq!(queue.held_bytes(), model.iter().map(|entry| entry.0.len()).sum::<usize>());
            }
            prop_assert_eq!(queue.sent_count(), model.iter().filter(|(_, start)| sent > *start).count());
            if take {
                let odd = |bytes: &[u8]| bytes[0] % 2 == 1;
                queue.pending.iter_mut().zip(&model).for_each(|(pending, (bytes, _))| pending.slot = u16::from(odd(bytes)));
                let taken = queue.take_unsent(|pending| pending.slot == 1);
                let (gone, kept): (Vec<_>, Vec<_>) = model.into_iter().partition(|(bytes, start)| odd(bytes) && sent <= *start);
                prop_assert_eq!(taken.into_iter().map(|it| it.bytes).collect::<Vec<_>>(), gone.into_iter().map(|it| it.0).collect::<Vec<_>>());
                model = kept.into();
            }
            let recovered = queue.drain();
            prop_assert_eq!(recovered.len(), model.len());
            for (found, (bytes, start)) in recovered.into_iter().zip(model) {
                prop_assert_eq!(found.bytes, bytes);
                prop_assert_eq!(found.left, sent > start);
            }
        }
    }
}
