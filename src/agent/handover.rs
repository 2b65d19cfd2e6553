//! Planned handover of a primary: another takes over before this one ends, and no acknowledged write is lost.
//!
//! Where the engine has a coordinated failover, the primary itself hands over. Elsewhere the agent pauses writes, waits until a
//! replica has everything, lets Sentinel fail over, and follows the new primary itself as soon as the majority names it. Writes stay
//! paused until the role has changed, so that none is acknowledged that the new primary lacks. A deadline gives up and unpauses;
//! the pause itself is bounded by the server, so that it ends even where the agent dies.
//!
//! The operator may do the same at the same moment. Each takes a failover that is under way for its own, and neither lets writes go on
//! while sentinels may still promote on the other's word.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::boot::{Vote, named};
use super::charge::Charge;
use super::cluster_handover;
use super::cluster_memory::ClusterMemory;
use super::info::{Attached, Info, Role};
use super::line::{Line, LineError};
use super::questions::ask_sentinels;
use crate::sidecar::upstream::access::ClusterAccess;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::node::NodeAddr;

/// How often something is looked at while writes are paused.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often sentinels are asked while they fail over.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How much longer than the deadline the server itself keeps writes paused, should the agent die.
const PAUSE_MARGIN: Duration = Duration::from_secs(1);
/// How long writes may be paused until a sentinel has begun. Sentinels greet each other by `PUBLISH` at the primary, which such a pause
/// holds up together with their next PING: after `down-after-milliseconds` they would take the primary for dead.
const BEGIN_WITHIN: Duration = Duration::from_millis(1500);
/// How long writes go on between two attempts.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// What is left of the time for the handover itself while the sentinels do not see the replica yet.
const NEEDED: Duration = Duration::from_secs(5);
/// How long a failover that the sentinels have begun is waited for beyond the deadline: it may still come about.
const BEGUN_LIMIT: Duration = Duration::from_secs(20);
/// How long no sentinel may have acted before it counts as having given up.
const QUIET_LIMIT: Duration = Duration::from_secs(3);
/// How many times in a row the sentinel that fails over may not answer before it counts as dead. On a node that is drained it ends with
/// the primary; what it has begun, another ends in a second, and by themselves they would in eight.
const GONE_AFTER: u32 = 2;

/// How a handover ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handover {
    /// The server was no primary: nothing was to be done.
    NoPrimary,
    /// Another is primary now.
    Done {
        /// Which.
        primary: String,
    },
}

/// Why a handover was given up. The server serves as before.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The server or a sentinel failed to answer.
    #[error(transparent)]
    Line(#[from] LineError),
    /// Nobody could take over.
    #[error("no replica is attached and in step that could be promoted")]
    NoReplica,
    /// The replicas did not catch up.
    #[error("no replica had everything before the deadline; writes go on here")]
    Behind,
    /// The sentinels did not act.
    #[error("no sentinel began a failover before the deadline; writes go on here: {0}")]
    NotBegun(String),
    /// The sentinels began and did not end it.
    #[error("the failover did not come about before the deadline; writes go on here")]
    NotDone,
}

/// What a handover needs.
pub struct Handovers {
    /// The configuration in force.
    pub charge: tokio::sync::watch::Receiver<Arc<Charge>>,
    /// How to log in.
    pub access: ClusterAccess,
    /// One at a time: a second caller waits, and then finds nothing to do.
    pub one: tokio::sync::Mutex<()>,
}

impl Handovers {
    /// Hands over if the server is a primary, within `limit`.
    pub async fn run(&self, limit: Duration) -> Result<Handover, HandoverError> {
        let _one = self.one.lock().await;
        let charge = self.charge.borrow().clone();
        let mut server = Line::new(charge.dial.clone(), self.access.servers.clone());
        let deadline = Instant::now() + limit;
        let info = read_info(&mut server).await?;
        if info.role() != Some(Role::Primary) || self.owns_nothing(&charge) {
            return Ok(Handover::NoPrimary);
        }
        if charge.cluster.is_some() {
            return cluster_handover::hand_over(&charge, &self.access.servers, &mut server, deadline).await;
        }
        if info.attached().iter().all(|replica| !replica.online) {
            return Err(HandoverError::NoReplica);
        }
        self.wait_until_seen(&charge, &info, deadline.checked_sub(NEEDED)).await;
        let (is_valkey, major, _) = info.version();
        if is_valkey
            && major >= 9
            && let Some(outcome) = self.coordinate(&charge, &mut server, deadline).await
        {
            return outcome;
        }
        loop {
            let outcome = self.pause_and_fail_over(&charge, &mut server, deadline).await;
            if outcome.is_err() && self.somebody_acts(&charge).await {
                debug!("sentinels act by themselves; writes stay paused until the server ends the pause");
            } else if let Err(error) = server.ask(&["CLIENT", "UNPAUSE"]).await {
                warn!(%error, "writes cannot be unpaused; the server does it by itself in a moment");
            }
            match outcome {
                Err(HandoverError::Behind | HandoverError::NotBegun(_)) if Instant::now() + TRY_AGAIN < deadline => {
                    sleep(TRY_AGAIN).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Whether it is a Cluster's primary that owns nothing.
    fn owns_nothing(&self, charge: &Charge) -> bool {
        let memory = ClusterMemory::of(charge);
        memory.and_then(|memory| memory.read()).is_some_and(|table| table.is_blank())
    }

    /// Whether a sentinel is replacing this server, or has.
    async fn somebody_acts(&self, charge: &Charge) -> bool {
        let answers = ask_sentinels(charge, &self.access.sentinels).await;
        answers.iter().any(|answer| is_acting(answer, &charge.address))
    }

    /// Until a sentinel that acts sees one of the attached replicas as one that it would promote, or the time is over. Where a pod was
    /// replaced, sentinels may take fifteen seconds to connect to the new one, and until then none begins; nothing is paused for that.
    async fn wait_until_seen(&self, charge: &Charge, info: &Info, deadline: Option<Instant>) {
        let attached = info.attached();
        while deadline.is_some_and(|deadline| Instant::now() < deadline) {
            let asked = charge.sentinels.iter().map(|sentinel| async {
                let mut line = Line::new(sentinel.clone(), self.access.sentinels.clone());
                let replicas = line.ask(&["SENTINEL", "REPLICAS", &charge.master]).await;
                replicas.is_ok_and(|replicas| names_promotable(&replicas, &attached))
                    && !is_in_tilt(&mut line).await.unwrap_or(true)
            });
            if join_all(asked).await.contains(&true) {
                return;
            }
            sleep(ASK_EVERY).await;
        }
    }

    /// The primary itself hands over, asked by a sentinel; by another where the first dies. `None`: no sentinel can.
    async fn coordinate(&self, charge: &Charge, server: &mut Line, deadline: Instant) -> Option<Result<Handover, HandoverError>> {
        let mut first = None;
        while Instant::now() < deadline {
            match self.ask_for_failover(charge, &["COORDINATED"], first.unwrap_or(0)).await {
                Ok(asked) => {
                    first = Some(asked + 1);
                    if let Some(done) = self.wait_for_demotion(charge, server, asked, deadline).await {
                        return Some(Ok(done));
                    }
                }
                Err(_) if first.is_none() => return None,
                // One has begun, and nobody answers for the moment.
                Err(_) => sleep(ASK_EVERY).await,
            }
        }
        // Ends it where it is still under way; elsewhere the server answers that there is none.
        let _ = server.ask(&["FAILOVER", "ABORT"]).await;
        Some(Err(HandoverError::NotDone))
    }

    /// Asks the sentinels in turn, that of the number `first` first, until one has begun, or has another failover under way: which.
    /// Otherwise what the last one answered.
    async fn ask_for_failover(&self, charge: &Charge, how: &[&str], first: usize) -> Result<usize, String> {
        let mut last = "no sentinel is configured".to_owned();
        let all = charge.sentinels.len();
        for (at, sentinel) in charge.sentinels.iter().enumerate().cycle().skip(first % all.max(1)).take(all) {
            let mut line = Line::new(sentinel.clone(), self.access.sentinels.clone());
            let answer = async {
                if is_in_tilt(&mut line).await? {
                    return Ok(false);
                }
                line.ask(&[&["SENTINEL", "FAILOVER", &charge.master], how].concat()).await.map(|_| true)
            };
            match answer.await {
                Ok(true) => return Ok(at),
                Ok(false) => last = format!("{sentinel} is in TILT mode, after its clock or the whole of it stood still"),
                Err(LineError::Refused { text, .. }) if text.starts_with("INPROG") => return Ok(at),
                Err(error) => {
                    debug!(%error, ?how, "a sentinel begins no failover");
                    last = error.to_string();
                }
            }
        }
        Err(last)
    }

    async fn pause_and_fail_over(
        &self,
        charge: &Charge,
        server: &mut Line,
        deadline: Instant,
    ) -> Result<Handover, HandoverError> {
        let mut begin_by = deadline.min(Instant::now() + BEGIN_WITHIN);
        pause_until(server, begin_by).await?;
        self.wait_for_replicas(server, begin_by).await?;
        let limit = deadline.max(Instant::now() + BEGUN_LIMIT);
        let mut first = 0;
        loop {
            let asked = self.begin_failover(charge, first, begin_by).await?;
            // From here on the sentinels may promote at any moment: writes stay paused until they have, or have given up.
            pause_until(server, limit).await?;
            match self.wait_for_demotion(charge, server, asked, limit).await {
                Some(done) => return Ok(done),
                // The one that was asked may have died: another is.
                None if Instant::now() < deadline => {
                    (first, begin_by) = (asked + 1, deadline.min(Instant::now() + BEGIN_WITHIN));
                }
                None => return Err(HandoverError::NotDone),
            }
        }
    }

    /// Until every attached replica that follows has all that this primary has: whichever is promoted lacks nothing.
    async fn wait_for_replicas(&self, server: &mut Line, deadline: Instant) -> Result<(), HandoverError> {
        while Instant::now() < deadline {
            let info = read_info(server).await?;
            let online: Vec<Attached> = info.attached().into_iter().filter(|replica| replica.online).collect();
            if online.is_empty() {
                return Err(HandoverError::NoReplica);
            }
            let mut equal = true;
            for replica in online {
                let node = NodeAddr::new(replica.host, replica.port);
                let mut line = Line::new(node, self.access.servers.clone());
                let offset = read_info(&mut line).await.map(|theirs| theirs.offset());
                equal &= offset.is_ok_and(|offset| offset >= info.offset());
            }
            if equal {
                return Ok(());
            }
            sleep(LOOK_EVERY).await;
        }
        Err(HandoverError::Behind)
    }

    async fn begin_failover(&self, charge: &Charge, first: usize, deadline: Instant) -> Result<usize, HandoverError> {
        let mut why = "the deadline had passed".to_owned();
        while Instant::now() < deadline {
            match self.ask_for_failover(charge, &[], first).await {
                Ok(asked) => return Ok(asked),
                Err(last) => why = last,
            }
            sleep(ASK_EVERY).await;
        }
        Err(HandoverError::NotBegun(why))
    }

    /// Until the server has become a replica; `None` where the limit passed, or no sentinel does anything: for a while, or because the
    /// one that was `asked` is gone. Sentinel turns a former primary round only after several seconds, so as soon as the majority names
    /// another, the agent does.
    async fn wait_for_demotion(&self, charge: &Charge, server: &mut Line, asked: usize, limit: Instant) -> Option<Handover> {
        let (mut acted, mut silent) = (Instant::now(), 0);
        while Instant::now() < limit && acted.elapsed() < QUIET_LIMIT && silent < GONE_AFTER {
            if let Ok(info) = read_info(server).await
                && let Some(Role::Replica { host, port, .. }) = info.role()
            {
                return Some(Handover::Done { primary: NodeAddr::new(host, port).to_string() });
            }
            let answers = ask_sentinels(charge, &self.access.sentinels).await;
            if let Some(owner) = named(&answers).filter(|owner| **owner != charge.address) {
                let port = owner.port().to_string();
                // Refused while the server itself hands over; it is asked again then.
                if let Err(error) = server.ask(&["REPLICAOF", owner.host(), &port]).await {
                    warn!(%error, "this server cannot be told to follow its successor");
                }
            }
            let somebody_acts = answers.iter().any(|answer| is_acting(answer, &charge.address));
            if somebody_acts {
                acted = Instant::now();
            }
            let is_gone = !somebody_acts && answers.get(asked) == Some(&Vote::Unreachable);
            silent = if is_gone { silent + 1 } else { 0 };
            sleep(ASK_EVERY).await;
        }
        None
    }
}

/// Whether a sentinel has seen its clock jump, or itself stand still, in the last half minute: it takes orders then, and carries none out
/// before that is over. One that tells nothing of itself may be asked for more.
async fn is_in_tilt(sentinel: &mut Line) -> Result<bool, LineError> {
    match sentinel.ask(&["INFO", "sentinel"]).await {
        Ok(info) => Ok(info.as_str().unwrap_or_default().lines().any(|line| line.trim_end() == "sentinel_tilt:1")),
        Err(LineError::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a sentinel is replacing the server at `address`, or has.
fn is_acting(answer: &Vote, address: &NodeAddr) -> bool {
    match answer {
        Vote::Names { primary, failing_over, .. } => *failing_over || primary != address,
        Vote::Unreachable | Vote::KnowsNone => false,
    }
}

/// Whether a sentinel's list of replicas has one of `attached` that it would promote.
fn names_promotable(answer: &Value, attached: &[Attached]) -> bool {
    answer.as_list().unwrap_or_default().iter().any(|replica| {
        let text = |name: &str| replica.field(name).and_then(Value::as_str).unwrap_or_default();
        let is_away = text("flags").split(',').any(|flag| matches!(flag, "s_down" | "o_down" | "disconnected"));
        let is_attached = |at: &Attached| at.online && at.host == text("ip") && at.port.to_string() == text("port");
        !is_away && text("slave-priority") != "0" && attached.iter().any(is_attached)
    })
}

pub(super) async fn read_info(line: &mut Line) -> Result<Info, LineError> {
    let answer = line.ask(&["INFO"]).await?;
    Ok(Info::parse(answer.as_str().unwrap_or_default()))
}

async fn pause_until(server: &mut Line, until: Instant) -> Result<(), LineError> {
    let pause = until.saturating_duration_since(Instant::now()) + PAUSE_MARGIN;
    server.ask(&["CLIENT", "PAUSE", &pause.as_millis().to_string(), "WRITE"]).await.map(|_| ())
}
