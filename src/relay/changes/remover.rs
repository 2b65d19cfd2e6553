//! What was made at a database is taken away once nobody follows it any more: its slot would keep the log for ever. What somebody else has made
//! stays.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use super::followed::Followed;
use super::register::{Register, looked, noted};
use crate::origin::LoadError;
use crate::origin::changes::SlotOwner;
use crate::relay::consumer::Claim;
use crate::relay::hub::{Hub, HubError};
use crate::sidecar::upstream::discovery::{doubled, jittered};

/// After troubles in a row.
const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// How often it is looked at again: whoever has not heard yet that nobody follows may have made a slot anew, and a cache may forget what it
/// was told.
const AGAIN: Duration = Duration::from_secs(5);

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// The cache does not say who made the slot.
    #[error("the cache does not say whether a relay has made the slot: {0}")]
    Cache(#[from] HubError),
    /// The database.
    #[error(transparent)]
    Origin(#[from] LoadError),
}

/// Takes away what is Larder's own of a feed's slot and publication. Whose the slot is.
///
/// # Errors
/// Something is left: it does no harm to try again.
pub async fn remove(followed: &Followed, register: &Register, hub: &mut Hub) -> Result<SlotOwner, RemoveError> {
    let owner = match followed.place.names_own_slot() {
        true => SlotOwner::Larder,
        false => hub.run(register.slot(), &register.look(), looked).await?.slot_owner().unwrap_or(SlotOwner::Other),
    };
    followed.database.remove(&followed.place, owner).await?;
    Ok(owner)
}

/// Says in the log what has become of a slot that nobody needs any more.
pub fn tell(followed: &Followed, owner: SlotOwner) {
    let (origin, slot) = (followed.database.name(), &followed.place.slot);
    match owner {
        SlotOwner::Larder => info!(origin, slot, "the slot is taken away: nobody follows the database any more"),
        SlotOwner::Other => {
            warn!(
                origin,
                slot, "nobody follows the database any more, and the slot, which somebody else has made, stays and keeps its log"
            );
        }
    }
}

/// Takes a feed's slot and publication away, where they are Larder's, and says so in the cache, for as long as the snapshot names them.
pub struct Remover {
    followed: Arc<Followed>,
    register: Register,
    token: Arc<str>,
    hub: Hub,
    claim: watch::Receiver<Option<Claim>>,
}

impl Remover {
    /// One that waits for its first claim. `token` is that of the claims.
    pub fn new(followed: Arc<Followed>, token: Arc<str>, hub: Hub, claim: watch::Receiver<Option<Claim>>) -> Self {
        let register = Register::new(&followed.place.slot);
        Self { followed, register, token, hub, claim }
    }

    /// Runs until nobody can claim the feed for it any more. The claim is left to end by itself: meanwhile nobody makes the slot anew.
    pub async fn run(mut self) {
        let (mut failures, mut told) = (0, false);
        loop {
            if self.claim.wait_for(Option::is_some).await.is_err() {
                return;
            }
            let pause = match self.remove().await {
                Ok(owner) => {
                    failures = 0;
                    if !std::mem::replace(&mut told, true) {
                        tell(&self.followed, owner);
                    }
                    AGAIN
                }
                Err(()) => {
                    failures += 1;
                    doubled(FIRST_BACK_OFF, failures - 1, MAX_BACK_OFF)
                }
            };
            let over = async { while self.claim.changed().await.is_ok() {} };
            if timeout(jittered(pause), over).await.is_ok() {
                return;
            }
        }
    }

    async fn remove(&mut self) -> Result<SlotOwner, ()> {
        let followed = self.followed.clone();
        let slot = &followed.place.slot;
        let (call, owner) = match remove(&followed, &self.register, &mut self.hub).await {
            Ok(owner) => (self.register.removed(Some(&self.token)), owner),
            Err(error) => {
                warn!(%error, slot, "the slot cannot be taken away yet");
                let trouble = self.register.trouble(&self.token, &error.to_string());
                let _ = self.hub.run(self.register.slot(), &trouble, noted).await;
                return Err(());
            }
        };
        match self.hub.run(self.register.slot(), &call, noted).await {
            Ok(true) => Ok(owner),
            // Another has the feed by now, and does the same.
            Ok(false) => Err(()),
            Err(error) => {
                warn!(%error, slot, "the cache cannot be told that the slot is taken away");
                Err(())
            }
        }
    }
}
