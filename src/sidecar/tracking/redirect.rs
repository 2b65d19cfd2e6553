//! Messages that one client's tracking sends to another, which any worker may have.
//!
//! One errand at a time goes round the workers for each client that redirects: what it is told meanwhile waits here, and goes with the
//! next. Where that would be too much, the other is told once that any key may have changed. So neither this nor a worker's
//! mailbox grows with the changes; what the other client does not read is bounded with the rest of its output.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::oneshot;

use super::table::ClientId;
use super::{Changed, deliver};
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::Session;
use crate::sidecar::worker::Worker;

/// So many messages wait.
const MOST_MESSAGES: usize = 16_384;
/// They name keys of so many bytes.
const MOST_BYTES: usize = 1024 * 1024;

/// What waits to be told to the client that another redirects to.
#[derive(Debug, Default)]
pub struct Redirected {
    waiting: RefCell<Vec<Changed>>,
    bytes: Cell<usize>,
    /// An errand is under way.
    busy: Cell<bool>,
}

impl Redirected {
    fn add(&self, changed: Changed) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.last().is_some_and(Option::is_none) {
            // Nothing is told more by more.
            return;
        }
        let bytes = self.bytes.get() + changed.iter().flatten().map(Vec::len).sum::<usize>();
        if changed.is_none() || waiting.len() >= MOST_MESSAGES || bytes > MOST_BYTES {
            *waiting = vec![None];
            self.bytes.set(0);
        } else {
            waiting.push(changed);
            self.bytes.set(bytes);
        }
    }

    fn take(&self) -> Vec<Changed> {
        self.bytes.set(0);
        self.waiting.take()
    }
}

/// Tells `target` what `session` would be told.
pub fn send(session: &Rc<Session>, redirected: &Rc<Redirected>, target: ClientId, changed: Changed) {
    redirected.add(changed);
    if redirected.busy.replace(true) {
        return;
    }
    let (session, redirected) = (session.clone(), redirected.clone());
    tokio::task::spawn_local(async move {
        loop {
            let messages = redirected.take();
            if messages.is_empty() {
                return redirected.busy.set(false);
            }
            if !tell(&session, target, messages).await {
                lose(&session, target);
            }
        }
    });
}

/// `false`: there is no such client.
async fn tell(session: &Session, target: ClientId, messages: Vec<Changed>) -> bool {
    let look = move |worker: &Rc<Worker>, answer: oneshot::Sender<bool>| {
        let mut found = false;
        worker.each_session(|session| {
            if session.id() == target && !session.is_closed() {
                messages.iter().for_each(|changed| deliver(session, changed, true));
                found = true;
            }
        });
        // Whoever asked may have gone.
        let _ = answer.send(found);
    };
    let roster = session.worker().roster().clone();
    roster.ask_all(look).await.contains(&true)
}

/// The client is told that the other is gone.
fn lose(session: &Rc<Session>, target: ClientId) {
    if let Some(tracks) = session.tracks().borrow_mut().as_deref_mut() {
        tracks.broken = true;
    }
    if session.protocol() == Protocol::Resp3 {
        let mut frame = b">2\r\n$21\r\ntracking-redir-broken\r\n".to_vec();
        encode::integer(&mut frame, target.cast_signed());
        session.deliver_push(&frame);
        session.worker().flush_dirty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(number: usize, length: usize) -> Changed {
        Some(vec![format!("{number:0length$}").into_bytes()])
    }

    #[test]
    fn what_waits_is_told_in_order_and_is_bounded() {
        let redirected = Redirected::default();
        (0..5).for_each(|number| redirected.add(named(number, 8)));
        assert_eq!(redirected.take(), (0..5).map(|number| named(number, 8)).collect::<Vec<_>>());
        assert!(redirected.take().is_empty());
        for length in [8, 10_000] {
            let mut most = 0;
            for number in 0..100_000 {
                redirected.add(named(number, length));
                most = most.max(redirected.waiting.borrow().len());
            }
            assert!(most * length <= MOST_BYTES && most <= MOST_MESSAGES, "{most} keys of {length} bytes wait");
            assert_eq!(redirected.take(), [None], "keys of {length} bytes: all may have changed");
        }
        // What has been forgotten needs not be named.
        redirected.add(named(1, 8));
        redirected.add(None);
        redirected.add(named(2, 8));
        assert_eq!(redirected.take(), [None]);
        redirected.add(named(3, 8));
        assert_eq!(redirected.take(), [named(3, 8)]);
    }
}
