//! Which feeds this relay reads: each is claimed by one relay at a time, in the cache.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::figures::FeedFigures;
use super::followed::Followed;
use super::reader::Reader;
use super::register::{Claimed, Register, claimed, noted};
use super::remover::{Remover, remove, tell};
use crate::origin::changes::SlotOwner;
use crate::relay::consumer::Claim;
use crate::relay::hub::{Hub, HubError};
use crate::relay::rules::Rules;
use crate::sidecar::upstream::discovery::jittered;

/// How long a reader may take to give up what it has.
const LAST_STEPS: Duration = Duration::from_secs(5);
/// How often, and how long apart, it is tried to take away a slot that nobody needs any more.
const REMOVALS: (u32, Duration) = (5, Duration::from_secs(2));

/// A feed's reader, and what it is told of its claim.
struct Seat {
    followed: Arc<Followed>,
    register: Register,
    claim: watch::Sender<Option<Claim>>,
    task: JoinHandle<()>,
}

/// The readers of a relay's feeds.
pub struct Keeper {
    token: Arc<str>,
    hub: Hub,
    new_hub: Box<dyn Fn() -> Hub + Send>,
    rules: watch::Receiver<Arc<Rules>>,
    figures: FeedFigures,
    lasts: Duration,
    /// Whether slots go with this relay.
    drops: bool,
    /// By the name of the slot.
    seats: HashMap<String, Seat>,
}

impl Keeper {
    /// Reads nothing yet. `token` is that of the claims, which last for `lasts`.
    pub fn new(
        token: Arc<str>,
        new_hub: Box<dyn Fn() -> Hub + Send>,
        rules: watch::Receiver<Arc<Rules>>,
        figures: FeedFigures,
        lasts: Duration,
    ) -> Self {
        Self { token, hub: new_hub(), new_hub, rules, figures, lasts, drops: false, seats: HashMap::new() }
    }

    /// The same, whose slots are taken away when it is halted.
    #[must_use]
    pub fn dropping_slots(self) -> Self {
        Self { drops: true, ..self }
    }

    /// Looks after all feeds until `halted`, and gives them up.
    pub async fn run(mut self, mut halted: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = self.turn() => {}
                _ = halted.wait_for(|halted| *halted) => break,
            }
        }
        self.stop().await;
    }

    /// Looks after all feeds once, and sleeps until the next time, or until there are other rules.
    async fn turn(&mut self) {
        let feeds = self.rules.borrow_and_update().feeds().to_vec();
        let over = |seat: &Seat| !feeds.contains(&seat.followed);
        let gone: Vec<String> = self.seats.iter().filter(|(_, seat)| over(seat)).map(|(slot, _)| slot.clone()).collect();
        for slot in gone {
            let Some(seat) = self.seats.remove(&slot) else { continue };
            match feeds.iter().any(|feed| feed.place.slot == slot) {
                // The next reader of the slot has the same token: it begins when this one has ended.
                true => give_up(seat, None).await,
                false => drop(tokio::spawn(give_up(seat, Some((self.new_hub)())))),
            }
        }
        let mut pause = self.lasts / 4;
        for followed in feeds {
            if let Err(trouble) = self.claim(followed).await {
                debug!(%trouble, "the claim of a feed cannot be renewed");
                pause = self.lasts / 16;
            }
        }
        if let Ok(Err(_)) = timeout(jittered(pause), self.rules.changed()).await {
            // There are no other rules any more.
            sleep(pause).await;
        }
    }

    /// Claims a feed, or renews the claim.
    async fn claim(&mut self, followed: Arc<Followed>) -> Result<(), HubError> {
        let seat = self.seat(followed);
        let (register, claim) = (seat.register.clone(), seat.claim.clone());
        let renewed = Instant::now();
        let millis = u64::try_from(self.lasts.as_millis()).unwrap_or(u64::MAX);
        let outcome = self.hub.run(register.slot(), &register.claim(&self.token, millis), claimed).await?;
        let lasts = self.lasts;
        claim.send_replace(match outcome {
            Claimed::Yes(fence) => Some(Claim { fence, renewed, lasts }),
            Claimed::Held => None,
        });
        Ok(())
    }

    fn seat(&mut self, followed: Arc<Followed>) -> &Seat {
        let (token, new_hub, figures) = (&self.token, &self.new_hub, &self.figures);
        self.seats.entry(followed.place.slot.clone()).or_insert_with(|| {
            let (claim, told) = watch::channel(None);
            let register = Register::new(&followed.place.slot);
            let task = if followed.ends {
                tokio::spawn(Remover::new(followed.clone(), token.clone(), new_hub(), told).run())
            } else {
                let counts = figures.counts(followed.database.name());
                tokio::spawn(Reader::new(followed.clone(), token.clone(), new_hub(), told, counts).run())
            };
            Seat { followed, register, claim, task }
        })
    }

    /// Gives up everything, so that others need not wait. Slots stay as a rule: they keep what is told to the next.
    async fn stop(self) {
        let Self { seats, new_hub, drops, .. } = self;
        let seats = seats.into_values().map(|seat| give_up(seat, drops.then(&new_hub)));
        futures_util::future::join_all(seats).await;
    }
}

/// Ends a reader. Where nobody follows the database any more, whoever read it takes its slot away, unless somebody else has made it: it would keep
/// the log for ever. `for_good`: by what the cache is asked who has.
async fn give_up(seat: Seat, for_good: Option<Hub>) {
    let Seat { followed, register, claim, task } = seat;
    let had_it = claim.send_replace(None).is_some();
    drop(claim);
    if timeout(LAST_STEPS, task).await.is_err() {
        warn!(origin = followed.database.name(), "a feed could not be given up in time: its claim ends by itself");
    }
    let Some(mut hub) = for_good.filter(|_| had_it && !followed.ends) else { return };
    for _ in 0..REMOVALS.0 {
        match remove(&followed, &register, &mut hub).await {
            Ok(owner) => {
                if owner == SlotOwner::Larder && !followed.place.names_own_slot() {
                    // Else one that a person makes under its name would be taken for it.
                    let _ = hub.run(register.slot(), &register.removed(None), noted).await;
                }
                return tell(&followed, owner);
            }
            Err(error) => warn!(%error, slot = followed.place.slot, "the slot cannot be taken away yet"),
        }
        sleep(REMOVALS.1).await;
    }
    warn!(
        origin = followed.database.name(),
        slot = followed.place.slot,
        "the slot stays, and keeps the database's log: SELECT pg_drop_replication_slot(…)"
    );
}
