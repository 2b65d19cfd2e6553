//! One feed's reader: from the database's stream to the stream of events, for as long as this relay has the feed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::clock::Clock;
use super::course::{Course, Due, Start, begin};
use super::figures::{Counts, now_ms};
use super::followed::Followed;
use super::register::{Beginning, Condition, Kept, Position, Register, Written, looked, noted, written};
use super::rows::UnknownTable;
use super::wanted::Why;
use crate::journal::scripts::Call;
use crate::origin::LoadError;
use crate::origin::changes::{Feed, FeedError, Lag, Ready, SlotOwner};
use crate::relay::consumer::Claim;
use crate::relay::hub::{Hub, HubError};
use crate::sidecar::upstream::discovery::{doubled, jittered};
use crate::sidecar::versions::epoch::LEASE_MS;

/// After troubles in a row.
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
const MAX_BACK_OFF: Duration = Duration::from_secs(5);
/// How often a lasting trouble is logged.
const WARN_EVERY: Duration = Duration::from_secs(30);
/// How often the slot, the publication and the tables are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long replicas may take to have heard of events before the next are read.
const REPLICAS_LIMIT_MS: &str = "200";
/// How long sidecars may go on as they were told before a lapse, and a tenth more, since clocks do not all run alike.
const UNTIL_TOLD: Duration = Duration::from_millis(LEASE_MS + LEASE_MS / 10);
/// Where they have not for so long, the database need not keep what was said all the same: were it lost, that would be noticed.
const UNCONFIRMED_LIMIT: Duration = Duration::from_secs(30);

/// Why reading ends.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Cache(#[from] HubError),
    #[error(transparent)]
    Origin(#[from] LoadError),
    #[error(transparent)]
    Stream(#[from] UnknownTable),
    #[error("the slot has to be made anew: {0}")]
    Useless(String),
    #[error("the database keeps {0} bytes for the slot, more than its maxLag: the slot is given up")]
    TooFarBehind(u64),
    #[error("another relay has the feed")]
    Fenced,
    #[error("the cache has lost what was written last")]
    Lost,
}

impl From<FeedError> for Ended {
    fn from(error: FeedError) -> Self {
        match error {
            FeedError::Useless { why, .. } => Self::Useless(why),
            FeedError::Origin(error) => Self::Origin(error),
        }
    }
}

/// A feed's reader.
pub struct Reader {
    followed: Arc<Followed>,
    register: Register,
    token: Arc<str>,
    hub: Hub,
    claim: watch::Receiver<Option<Claim>>,
    counts: Arc<Counts>,
    /// Whether a slot that is there is of no use.
    anew: bool,
    warned: Option<Instant>,
    /// Since when replicas have not heard of events.
    unconfirmed: Option<Instant>,
    /// What the cache is told beside each position.
    condition: Condition,
    /// The cache's clock, from its last answer on.
    clock: Option<Clock>,
}

impl Reader {
    /// A reader that waits for its first claim. `token` is that of the claims.
    pub fn new(
        followed: Arc<Followed>,
        token: Arc<str>,
        hub: Hub,
        claim: watch::Receiver<Option<Claim>>,
        counts: Arc<Counts>,
    ) -> Self {
        let register = Register::new(&followed.place.slot);
        let (warned, unconfirmed, condition, clock) = (None, None, Condition::default(), None);
        Self { followed, register, token, hub, claim, counts, anew: false, warned, unconfirmed, condition, clock }
    }

    /// Reads whenever this relay has the feed, until nobody can claim it for this reader any more.
    pub async fn run(mut self) {
        loop {
            let claimed = self.claim.wait_for(Option::is_some).await.map(|claim| *claim);
            let Ok(Some(Claim { fence, .. })) = claimed else { return };
            Counts::add(&self.counts.claims, 1);
            info!(origin = self.followed.database.name(), fence, "the database's changes are read here");
            self.read_under(fence).await;
            Counts::set(&self.counts.reading, 0);
            Counts::set(&self.counts.through_ms, 0);
            let over = self.claim.has_changed().is_err();
            if over || self.claim.borrow().is_none() {
                // Where it fails, the claim ends by itself.
                let _ = self.hub.ask(self.register.slot(), &[self.register.release(&self.token).command()]).await;
            }
            if over {
                return;
            }
        }
    }

    /// Reads under one claim.
    async fn read_under(&mut self, fence: u64) {
        let mut claim = self.claim.clone();
        let mut failures = 0;
        while stands(&mut claim, fence).await {
            let began = Instant::now();
            let ended = tokio::select! {
                ended = self.follow(fence) => ended,
                () = ends(&mut claim, fence) => return,
            };
            let Err(ended) = ended;
            Counts::set(&self.counts.reading, 0);
            if began.elapsed() > MAX_BACK_OFF * 2 {
                failures = 0;
            }
            self.note(&ended).await;
            let pause = match ended {
                // What the cache has lost is to be made up for at once.
                Ended::Lost if failures == 0 => Duration::ZERO,
                _ => jittered(doubled(FIRST_BACK_OFF, failures, MAX_BACK_OFF)),
            };
            failures = failures.saturating_add(1);
            tokio::select! {
                () = sleep(pause) => {}
                () = ends(&mut claim, fence) => return,
            }
            if matches!(ended, Ended::Fenced) {
                // Whether the claim still stands is for the cache to say: whoever has it now is not to be disturbed.
                let since = Instant::now();
                let _ = claim.wait_for(|claim| claim.is_none_or(|claim| claim.fence != fence || claim.renewed > since)).await;
            }
        }
    }

    async fn note(&mut self, ended: &Ended) {
        match ended {
            Ended::Fenced => Counts::add(&self.counts.fenced, 1),
            _ => Counts::add(&self.counts.retries, 1),
        }
        if matches!(ended, Ended::Useless(_) | Ended::TooFarBehind(_)) {
            self.anew = true;
            // What is given up is told each time.
            self.warned = None;
        }
        self.warn(ended);
        if !matches!(ended, Ended::Fenced | Ended::Lost | Ended::Cache(_)) {
            // For who asks how the feed is: the log has it as well.
            let trouble = self.register.trouble(&self.token, &ended.to_string());
            let _ = self.hub.run(self.register.slot(), &trouble, noted).await;
        }
    }

    fn warn(&mut self, trouble: &dyn std::fmt::Display) {
        if self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) {
            self.warned = Some(Instant::now());
            warn!(origin = self.followed.database.name(), %trouble, "the database's changes wait");
        }
    }

    /// Reads on and on.
    async fn follow(&mut self, fence: u64) -> Result<Infallible, Ended> {
        let followed = self.followed.clone();
        // Before anything is made at the database: while the cache is away, a slot would only keep its log.
        let kept = self.hub.run(self.register.slot(), &self.register.look(), looked).await?;
        let owner = self.slot_owner(&kept).await?;
        let (mut feed, ready) = followed.database.feed(&followed.place, &followed.tables(), owner, self.anew).await?;
        let start = begin(&kept, feed.identity(), &ready, &followed.watches);
        self.tell_of(&start, &ready);
        self.measure(feed.lag().await?);
        // What the slot keeps is read next.
        (self.condition.behind, self.condition.through) = (None, None);
        let (is_lapse, entries) = (start.is_lapse(), start.wanted.entries(followed.policy.as_deref()));
        let beginning = Some(Beginning { followers: &start.followers, is_lapse });
        for call in self.register.write(fence, None, &start.position, beginning, &self.condition, entries) {
            self.write(&mut feed, &call).await?;
        }
        self.anew = false;
        if is_lapse {
            // Nobody shows what was cached before, once what sidecars were told before has ceased to count.
            self.is_replicated().await;
            sleep(UNTIL_TOLD).await;
        }
        feed.start().await?;
        Counts::set(&self.counts.reading, 1);
        info!(origin = followed.database.name(), from = %start.position.lsn, "follows the database's changes");
        let mut course = Course::new(followed.watches.clone(), &followed.place.slot, start.position);
        let mut looked_at = Instant::now();
        loop {
            course.take(&feed.next().await?)?;
            if looked_at.elapsed() >= LOOK_EVERY {
                looked_at = Instant::now();
                self.look_after(&mut feed, &mut course).await?;
            }
            if let Due::Say(position) = course.due(feed.has_more()) {
                self.say(&mut feed, fence, &mut course, position).await?;
            }
        }
    }

    /// Whose the slot is. Where its name does not say so it is noted in the cache, and before one is made: whoever is there next could not tell
    /// it from one that somebody else has made.
    async fn slot_owner(&mut self, kept: &Kept) -> Result<SlotOwner, Ended> {
        let Followed { database, place, .. } = &*self.followed;
        // Since one was taken away, anybody may have made the one that is there.
        let known = kept.slot_owner().filter(|_| !kept.removed);
        if place.names_own_slot() || known == Some(SlotOwner::Larder) {
            return Ok(SlotOwner::Larder);
        }
        // Nobody has anything of one that is lost: it is replaced.
        let is_there = database.lag(place).await?.is_some_and(|lag| !lag.lost);
        let owner = if is_there { SlotOwner::Other } else { SlotOwner::Larder };
        if known == Some(owner) || self.hub.run(self.register.slot(), &self.register.owned(&self.token, owner), noted).await? {
            return Ok(owner);
        }
        Err(Ended::Fenced)
    }

    /// Says in the log what a beginning means.
    fn tell_of(&mut self, start: &Start, ready: &Ready) {
        self.tell_troubles(&ready.troubles);
        let origin = self.followed.database.name();
        Counts::add(&self.counts.rules, start.wanted.rules().len() as u64);
        if start.lost {
            Counts::add(&self.counts.losses, 1);
            warn!(origin, "changes may have been lost: all keys of the rules that follow its tables are invalidated");
        } else if !start.wanted.is_empty() {
            info!(
                origin,
                rules = start.wanted.rules().len(),
                "all keys of rules that follow other tables than before are invalidated"
            );
        }
    }

    fn tell_troubles(&mut self, troubles: &[String]) {
        self.condition.trouble = troubles.first().cloned().unwrap_or_default();
        let before = self.counts.troubles.swap(troubles.len() as u64, std::sync::atomic::Ordering::Relaxed);
        if before != troubles.len() as u64 {
            let origin = self.followed.database.name();
            troubles.iter().for_each(|trouble| warn!(origin, %trouble, "a table's changes are not told, or not in full"));
        }
    }

    /// Says what is wanted, moves the position, and lets the database forget what is behind it.
    async fn say(&mut self, feed: &mut Feed, fence: u64, course: &mut Course, next: Position) -> Result<(), Ended> {
        let wanted = course.wanted();
        if !wanted.is_empty() {
            feed.seen(course.xids()).await?;
        }
        for (rule, why) in wanted.rules() {
            if *why != Why::Said {
                warn!(rule, %why, "all keys of a rule are invalidated, where some would do");
            }
        }
        let (keys, rules) = (wanted.named(), wanted.rules().len());
        let behind = course.behind();
        self.condition.behind = Some(behind);
        self.condition.through = self.clock.map(|clock| clock.ago(behind, Instant::now()));
        let entries = wanted.entries(self.followed.policy.as_deref());
        for call in self.register.write(fence, Some(course.position()), &next, None, &self.condition, entries) {
            self.write(feed, &call).await?;
        }
        Counts::set(&self.counts.through_ms, now_ms().saturating_sub(millis(course.behind())));
        if keys + rules > 0 {
            Counts::set(&self.counts.lag_ms, millis(course.age()));
        }
        Counts::add(&self.counts.keys, keys as u64);
        Counts::add(&self.counts.rules, rules as u64);
        let lsn = next.lsn;
        Counts::add(&self.counts.transactions, course.said(next));
        if self.is_replicated().await {
            feed.confirm(lsn).await?;
        }
        Ok(())
    }

    /// Runs a script, as often as it takes.
    async fn write(&mut self, feed: &mut Feed, call: &Call) -> Result<(), Ended> {
        let (mut failures, mut looked_at) = (0, Instant::now());
        loop {
            match self.hub.run(self.register.slot(), call, written).await {
                Ok(Written::Yes { at }) => {
                    self.clock = Some(Clock::new(at, Instant::now()));
                    return Ok(());
                }
                Ok(Written::Fenced) => return Err(Ended::Fenced),
                Ok(Written::Lost) => return Err(Ended::Lost),
                Err(error) => self.warn(&error),
            }
            sleep(jittered(doubled(FIRST_BACK_OFF, failures, MAX_BACK_OFF / 2))).await;
            failures = failures.saturating_add(1);
            feed.alive().await?;
            if looked_at.elapsed() >= LOOK_EVERY {
                looked_at = Instant::now();
                self.bound(feed.lag().await?).await?;
            }
        }
    }

    /// Takes note of how much the database keeps.
    fn measure(&mut self, lag: Option<Lag>) -> u64 {
        self.condition.kept = lag.unwrap_or_default().bytes;
        Counts::set(&self.counts.slot_bytes, self.condition.kept);
        self.condition.kept
    }

    /// Gives the slot up where the database keeps more for it than it should, while nothing can be said.
    async fn bound(&mut self, lag: Option<Lag>) -> Result<(), Ended> {
        let bytes = self.measure(lag);
        if bytes <= self.followed.max_lag {
            return Ok(());
        }
        // Whoever made it: there is no other way to have less kept.
        self.followed.database.remove(&self.followed.place, SlotOwner::Larder).await?;
        Err(Ended::TooFarBehind(bytes))
    }

    /// Whether the replicas that might become primary have heard of what was written, or have had their time.
    async fn is_replicated(&mut self) -> bool {
        let slot = self.register.slot();
        let replicas = self.hub.replicas(slot);
        if replicas > 0 {
            let wait = [b"WAIT".to_vec(), replicas.to_string().into_bytes(), REPLICAS_LIMIT_MS.as_bytes().to_vec()];
            let heard = self.hub.ask(slot, &[wait.to_vec()]).await.ok();
            let heard = heard.and_then(|answers| usize::try_from(answers.first()?.as_int()?).ok());
            if heard.is_none_or(|heard| heard < replicas) {
                return self.unconfirmed.get_or_insert_with(Instant::now).elapsed() > UNCONFIRMED_LIMIT;
            }
        }
        self.unconfirmed = None;
        true
    }

    /// Sees to the slot, the publication and the tables.
    async fn look_after(&mut self, feed: &mut Feed, course: &mut Course) -> Result<(), Ended> {
        self.measure(feed.lag().await?);
        let ready = feed.look_after(&self.followed.tables()).await?;
        self.tell_troubles(&ready.troubles);
        if ready.is_new {
            return Err(Ended::Useless("its publication was gone".to_owned()));
        }
        course.added(&ready.added);
        Ok(())
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Waits until the claim surely stands, as after a process stood still; whether it does.
async fn stands(claim: &mut watch::Receiver<Option<Claim>>, fence: u64) -> bool {
    let settled = claim.wait_for(|claim| claim.is_none_or(|claim| claim.fence != fence || claim.renewed.elapsed() < claim.lasts));
    settled.await.is_ok_and(|claim| claim.is_some_and(|claim| claim.fence == fence))
}

/// Waits until the claim has ended.
async fn ends(claim: &mut watch::Receiver<Option<Claim>>, fence: u64) {
    let _ = claim.wait_for(|claim| claim.is_none_or(|claim| claim.fence != fence)).await;
}
