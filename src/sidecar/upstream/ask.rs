//! Reads that Larder sends for itself, over the shared connections.

use std::rc::Rc;

use tokio::sync::oneshot;

use super::lane::Lane;
use super::queue::{Pending, Retry};
use super::sink::{Answer, Sink};
use crate::sidecar::resp::encode;
use crate::sidecar::worker::Worker;

/// Sends a command that only reads to the server of `slot`, and waits for its reply.
///
/// # Errors
/// The text of an error reply, its code first: the server's, or that no reply came.
pub async fn ask(worker: &Rc<Worker>, slot: u16, lane: Lane, command: &[&[u8]]) -> Result<Vec<u8>, String> {
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
    let mut wire = Vec::new();
    encode::command(&mut wire, command);
    worker.submit(&[&wire], Pending::new(sink, slot, Retry::Safe, lane, worker.now()));
    receiver.await.unwrap_or_else(|_| Err("TRYAGAIN the sidecar is stopping".to_owned()))
}
