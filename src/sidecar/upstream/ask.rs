//! What Larder asks for itself, over the shared connections.

use std::rc::Rc;

use tokio::sync::oneshot;

use super::lane::Lane;
use super::queue::{ANY_SLOT, Pending, Retry};
use super::router::Node;
use super::sink::{Answer, Sink};
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::worker::Worker;

/// A reply, or the text of an error reply, its code first: the server's, or that no reply came.
pub type Asked = Result<Vec<u8>, String>;

/// Who waits for one reply, and where it comes.
pub fn caller() -> (Sink, oneshot::Receiver<Asked>) {
    let (sender, receiver) = oneshot::channel();
    let sink = Sink::Call(Box::new(move |_, answer| {
        let answer = match answer {
            Answer::Reply([b'-', error @ ..]) => Err(String::from_utf8_lossy(error).trim_end().to_owned()),
            Answer::Reply(bytes) => Ok(bytes.to_vec()),
            Answer::Failed(text) => Err(text.to_owned()),
        };
        // Whoever asked may have gone.
        let _ = sender.send(answer);
    }));
    (sink, receiver)
}

/// What came to a [`caller`].
pub async fn heard(receiver: oneshot::Receiver<Asked>) -> Asked {
    receiver.await.unwrap_or_else(|_| Err("TRYAGAIN the sidecar is stopping".to_owned()))
}

/// Sends a command that may be repeated to the server of `slot`, and waits for its reply.
///
/// # Errors
/// The text of an error reply, its code first: the server's, or that no reply came.
pub async fn ask(worker: &Rc<Worker>, slot: u16, lane: Lane, command: &[&[u8]]) -> Asked {
    let mut wire = Vec::new();
    encode::command(&mut wire, command);
    ask_wire(worker, slot, lane, &wire, Retry::Safe).await
}

/// As [`ask`], for a command as it goes over the wire.
///
/// # Errors
/// As those of [`ask`].
pub async fn ask_wire(worker: &Rc<Worker>, slot: u16, lane: Lane, wire: &[u8], retry: Retry) -> Asked {
    let (sink, receiver) = caller();
    worker.submit(&[wire], Pending::new(sink, slot, retry, lane, worker.now()));
    heard(receiver).await
}

/// Sends a command to one node, whatever it serves, and waits for its reply.
///
/// # Errors
/// As those of [`ask`].
pub async fn ask_node(worker: &Rc<Worker>, node: &Rc<Node>, database: u8, command: &[&[u8]]) -> Asked {
    let (sink, receiver) = caller();
    let mut wire = Vec::new();
    encode::command(&mut wire, command);
    let lane = Lane::of(Protocol::Resp2, database);
    node.mux(worker, lane).push(&[&wire], Pending::new(sink, ANY_SLOT, Retry::Never, lane, worker.now()));
    heard(receiver).await
}
