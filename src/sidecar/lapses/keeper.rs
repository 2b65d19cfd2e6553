//! Asks the cache whether databases have lost changes, and how far they are made up for.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{Footing, Mark};
use crate::policy::binding::BindingName;
use crate::policy::changes::Feed;
use crate::policy::events::{LAPSE_FIELD, STREAM, feed_state_key};
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::events::position::EntryId;
use crate::sidecar::events::store::Store;
use crate::sidecar::policy::ActivePolicy;
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::versions::epoch::LEASE_MS;
use crate::sidecar::worker::Worker;

/// How often it is asked: some times within the second for which an answer is believed.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// What has not been answered by then is asked anew.
const ASK_FOR: Duration = Duration::from_millis(1_000);
/// How often it is said that a server does not let this sidecar ask.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Asks for ever, of all that rules follow. Each worker runs it.
pub async fn keep_forever(worker: Rc<Worker>, binding: Option<BindingName>) {
    let mut keeper = Keeper { store: Store::new(binding.as_ref()), worker, warned: None };
    loop {
        let policy = keeper.worker.policy();
        if policy.has_followed() {
            let _ = timeout(ASK_FOR, keeper.ask_all(&policy)).await;
        }
        sleep(ASK_EVERY).await;
    }
}

struct Keeper {
    worker: Rc<Worker>,
    /// Where the sidecars that read the stream note how far they are.
    store: Store,
    warned: Option<Instant>,
}

impl Keeper {
    async fn ask_all(&mut self, policy: &Rc<ActivePolicy>) {
        let (lapses, asked_at) = (self.worker.lapses(), self.worker.lapses().now());
        let feeds: Vec<&Feed> = policy.snapshot().feeds.iter().filter(|feed| !feed.follows.is_empty()).collect();
        let answers = join_all(feeds.iter().map(|feed| self.look(feed))).await;
        let mut all_whole = true;
        let mut refused = None;
        for (feed, answer) in feeds.iter().zip(answers) {
            match answer {
                Ok(footing) => {
                    all_whole &= footing == Footing::Whole;
                    lapses.with_feed(&feed.slot, |known| known.footing.heard(asked_at, footing));
                }
                // Who may not ask does without: the walk removes what is old all the same.
                Err(text) if text.starts_with("NOPERM") => {
                    lapses.with_feed(&feed.slot, |known| known.footing.heard(asked_at, Footing::Whole));
                    refused = Some(text);
                }
                Err(text) => {
                    all_whole = false;
                    tracing::debug!(slot = feed.slot, %text, "it cannot be told whether changes were lost");
                }
            }
        }
        *lapses.whole.borrow_mut() = all_whole.then(|| (policy.clone(), asked_at + LEASE_MS));
        lapses.told.notify_waiters();
        if let Some(text) = refused.filter(|_| self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY)) {
            self.warned = Some(Instant::now());
            tracing::warn!(
                error = %text,
                "the server does not let this sidecar ask whether changes were lost: what was cached may then be shown until a walk has removed it"
            );
        }
    }

    /// How one feed is.
    async fn look(&self, feed: &Feed) -> Result<Footing, String> {
        let key = feed_state_key(&feed.slot);
        let slot = invalidation_slot(&self.worker, STREAM.as_bytes());
        let answer = ask(&self.worker, slot, Lane::default(), &[b"HGET", key.as_bytes(), LAPSE_FIELD.as_bytes()]).await?;
        let Some(text) = reply::text(&answer) else { return Ok(Footing::Whole) };
        let lapse: Option<EntryId> = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        let lapse = lapse.ok_or_else(|| "ERR a lapse is not understood".to_owned())?;
        let lapses = self.worker.lapses();
        if lapses.with_feed(&feed.slot, |known| known.passed.is_some_and(|passed| passed >= lapse)) {
            return Ok(Footing::Whole);
        }
        let kept = self.store.look(&self.worker).await?;
        let rules = || feed.follows.iter().map(|follow| follow.rule.as_str());
        if !kept.has_walked(rules(), lapse) {
            return Ok(Footing::Open(Mark::Lapse(lapse)));
        }
        lapses.with_feed(&feed.slot, |known| known.passed = known.passed.max(Some(lapse)));
        Ok(Footing::Whole)
    }
}
