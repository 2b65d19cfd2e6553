//! Loads for sidecars that outnumber the connections of their origin: a relay makes them, so many at once as there may be connections.
//!
//! Requests wait in the cache ([`crate::journal::loads`]). One relay at a time takes them, which a claim names; [`hold`] says how much it may
//! take when, so that relays do not go beyond that number together either, however long one of them stands still. [`tender`] carries it out.

pub mod figures;
pub mod hold;
#[cfg(test)]
mod simulation;
pub mod tender;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use self::figures::LoadFigures;
use self::tender::Tender;
use super::hub::Hub;
use super::rules::Rules;
use crate::policy::JournalName;

/// How often it is looked whether there are other queues, where nothing says so.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The tenders of all queues of a relay's rules.
pub struct Keeper {
    token: Arc<str>,
    new_hub: Box<dyn Fn() -> Hub + Send>,
    rules: watch::Receiver<Arc<Rules>>,
    figures: LoadFigures,
    claim: Duration,
    tasks: HashMap<JournalName, JoinHandle<()>>,
}

impl Keeper {
    /// Takes nothing yet. `token` is that of the claims, after whose `claim` without a word another relay takes over.
    pub fn new(
        token: Arc<str>,
        new_hub: Box<dyn Fn() -> Hub + Send>,
        rules: watch::Receiver<Arc<Rules>>,
        figures: LoadFigures,
        claim: Duration,
    ) -> Self {
        Self { token, new_hub, rules, figures, claim, tasks: HashMap::new() }
    }

    /// Tends all queues until `halted`, and gives them up.
    pub async fn run(mut self, mut halted: watch::Receiver<bool>) {
        while !*halted.borrow_and_update() {
            self.look_after(&halted);
            tokio::select! {
                _ = self.rules.changed() => {}
                _ = halted.changed() => {}
                () = sleep(LOOK_EVERY) => {}
            }
        }
        join_all(self.tasks.into_values()).await;
    }

    /// Has each queue tended. A tender whose queue is gone ends by itself.
    fn look_after(&mut self, halted: &watch::Receiver<bool>) {
        self.tasks.retain(|_, task| !task.is_finished());
        let queues: Vec<JournalName> = self.rules.borrow().queues().cloned().collect();
        for queue in queues {
            let (token, claim, rules) = (&self.token, self.claim, &self.rules);
            let (new_hub, counts) = (&self.new_hub, self.figures.counts(&queue));
            self.tasks.entry(queue).or_insert_with_key(|queue| {
                let tender = Tender::new(queue.clone(), token.clone(), [new_hub(), new_hub()], rules.clone(), counts, claim);
                tokio::spawn(tender.run(halted.clone()))
            });
        }
    }
}
