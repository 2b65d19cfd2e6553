//! The workers of the process, for the few commands that concern clients of any of them: CLIENT LIST, KILL and UNBLOCK, and messages
//! that one client's tracking redirects to another. And for what is asked on the second thread that takes a worker.
//!
//! A worker's state is its own. Whoever wants something of another's sends it an errand, which it runs between two turns.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};

use super::worker::Worker;

/// What one worker asks of another.
pub type Errand = Box<dyn FnOnce(&Rc<Worker>) + Send>;

/// Where a worker's errands come in.
pub type Inbox = mpsc::UnboundedReceiver<Errand>;

/// All workers of the process.
#[derive(Debug)]
pub struct Roster {
    workers: Vec<mpsc::UnboundedSender<Errand>>,
}

impl Roster {
    /// For so many workers, each with its inbox.
    pub fn new(workers: usize) -> (Arc<Self>, Vec<Inbox>) {
        let (workers, inboxes) = (0..workers).map(|_| mpsc::unbounded_channel()).unzip();
        (Arc::new(Self { workers }), inboxes)
    }

    /// Has one worker do something that takes a while, and waits for what it says. `None`: it is ending.
    pub async fn ask_first<T, F>(&self, work: F) -> Option<T>
    where
        T: Send + 'static,
        F: AsyncFnOnce(Rc<Worker>) -> T + Send + 'static,
    {
        let (sender, answer) = oneshot::channel();
        let errand: Errand = Box::new(move |worker| {
            let worker = worker.clone();
            tokio::task::spawn_local(async move {
                // Who asked may have gone.
                let _ = sender.send(work(worker).await);
            });
        });
        self.workers.first()?.send(errand).ok()?;
        answer.await.ok()
    }

    /// Has every worker look at its clients, and collects what they say. One that is ending says nothing.
    pub async fn ask_all<T, F>(&self, look: F) -> Vec<T>
    where
        T: Send + 'static,
        F: FnOnce(&Rc<Worker>, oneshot::Sender<T>) + Clone + Send + 'static,
    {
        let mut answers = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            let (sender, answer) = oneshot::channel();
            let look = look.clone();
            if worker.send(Box::new(move |worker| look(worker, sender))).is_ok() {
                answers.push(answer);
            }
        }
        join_all(answers).await.into_iter().flatten().collect()
    }
}

/// Runs errands for as long as the worker.
pub async fn run_errands(worker: Rc<Worker>, mut inbox: Inbox) {
    while let Some(errand) = inbox.recv().await {
        errand(&worker);
        worker.flush_dirty();
    }
}
