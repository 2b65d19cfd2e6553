//! What is known of the server, for whoever asks: probes, peers, metrics.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::info::Info;
use crate::policy::agent::{DataState, Proved, ServerPhase, StateReport, VERSION};

/// How long a running server may answer nothing before it counts as hanging. A server that is busy with a script or loads its
/// data answers with an error, and does not count.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// How long a fresh look may take.
const LOOK_LIMIT: Duration = Duration::from_millis(700);

/// Written by the supervisor, read by everybody.
#[derive(Debug)]
pub struct Board {
    known: Mutex<Known>,
    wanted: Notify,
    /// Looks that were begun, and the last that was done, by that count.
    looks: watch::Sender<(u64, u64)>,
}

/// Everything that is known.
#[derive(Debug, Clone)]
pub struct Known {
    /// What peers are told.
    pub report: StateReport,
    /// What the server last told of itself; `None` where it does not run or does not answer.
    pub info: Option<Info>,
    /// When the server was last heard, or started.
    pub heard: Instant,
    /// Whether there is a process, whose data changes all the time.
    pub runs: bool,
    /// Whether the server is a primary of a Cluster without slots, which has nothing to serve.
    pub owns_nothing: bool,
    /// What was counted.
    pub counts: Counts,
}

/// What the agent counts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Starts of the server's process.
    pub starts: u64,
    /// Handovers that ended with another primary.
    pub handovers: u64,
    /// Handovers that were given up.
    pub handovers_aborted: u64,
    /// Configurations, users or certificates that were refused.
    pub refusals: u64,
}

impl Board {
    /// A board of a server that nothing is known of.
    pub fn new(ordinal: u16) -> Self {
        let report = StateReport {
            version: VERSION,
            ordinal,
            address: None,
            generation: 0,
            // Until the disk has been looked at, there may be anything.
            data: DataState::Partial,
            claim: None,
            server: ServerPhase::Deciding,
            proved: Proved::default(),
        };
        let known =
            Known { report, info: None, heard: Instant::now(), runs: false, owns_nothing: false, counts: Counts::default() };
        Self { known: Mutex::new(known), wanted: Notify::new(), looks: watch::Sender::new((0, 0)) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it, as it is now.
    pub fn read(&self) -> Known {
        self.known().clone()
    }

    /// What peers are told, as it is at this moment: a server that was empty when it was last looked at may hold data by now. What
    /// cannot be looked at is not called empty.
    pub async fn fresh_report(&self) -> StateReport {
        let mut looks = self.looks.subscribe();
        let (begun, _) = *looks.borrow_and_update();
        if !self.known().runs {
            return self.known().report.clone();
        }
        self.wanted.notify_one();
        let looked = timeout(LOOK_LIMIT, looks.wait_for(|(_, done)| *done > begun)).await.is_ok();
        let known = self.known();
        let mut report = known.report.clone();
        if !looked && known.runs && report.data == DataState::Empty {
            report.data = DataState::Partial;
        }
        report
    }

    /// Waits until somebody wants a fresh look. Cancel-safe.
    pub async fn look_wanted(&self) {
        self.wanted.notified().await;
    }

    /// A look begins. Its number is for [`Board::look_done`].
    pub fn look_begins(&self) -> u64 {
        self.looks.send_modify(|(begun, _)| *begun += 1);
        self.looks.borrow().0
    }

    /// A look has brought something.
    pub fn look_done(&self, number: u64) {
        self.looks.send_modify(|(_, done)| *done = number);
    }

    /// Changes some of it at once.
    pub fn update(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.known());
    }
}

impl Known {
    /// Whether the pod lives: the agent does, or it could not say so; the server unless it hangs. A held server lives.
    pub fn liveness(&self, now: Instant) -> Result<(), String> {
        let silent = now.saturating_duration_since(self.heard);
        match self.report.server {
            ServerPhase::Starting { .. } | ServerPhase::Primary | ServerPhase::Replica { .. } if silent > HANGS_AFTER => {
                Err(format!("the server has answered nothing for {} s", silent.as_secs()))
            }
            _ => Ok(()),
        }
    }

    /// Whether the start is over: the server serves, or is held, which can last.
    pub fn startup(&self) -> Result<(), String> {
        match &self.report.server {
            ServerPhase::Deciding => Err("the server's place is being decided".to_owned()),
            ServerPhase::Starting { .. } => Err("the server starts or loads its data".to_owned()),
            ServerPhase::Held { .. } | ServerPhase::Primary | ServerPhase::Replica { .. } | ServerPhase::Stopping => Ok(()),
        }
    }

    /// Whether clients are served: a primary, or a replica in step.
    pub fn readiness(&self) -> Result<(), String> {
        match &self.report.server {
            ServerPhase::Primary if self.owns_nothing => Err("the server owns no slots".to_owned()),
            ServerPhase::Primary | ServerPhase::Replica { link_up: true, .. } if self.info.is_some() => Ok(()),
            ServerPhase::Primary | ServerPhase::Replica { link_up: true, .. } => Err("the server does not answer".to_owned()),
            ServerPhase::Replica { of, .. } => Err(format!("the link to the primary {of} is down")),
            ServerPhase::Held { message, .. } => Err(format!("held: {message}")),
            ServerPhase::Deciding | ServerPhase::Starting { .. } => self.startup(),
            ServerPhase::Stopping => Err("the server is stopping".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(phase: ServerPhase, silent_secs: u64, live: bool, started: bool, ready: bool) {
        let mut known = Board::new(0).read();
        known.report.server = phase;
        known.info = Some(Info::default());
        let now = known.heard + Duration::from_secs(silent_secs);
        assert_eq!(
            (known.liveness(now).is_ok(), known.startup().is_ok(), known.readiness().is_ok()),
            (live, started, ready),
            "{:?}",
            known.report.server
        );
    }

    #[tokio::test]
    async fn emptiness_is_told_only_of_what_was_looked_at_just_now() {
        let board = Board::new(0);
        board.update(|known| known.report.data = DataState::Empty);
        assert_eq!(board.fresh_report().await.data, DataState::Empty, "nothing runs, nothing changes");
        board.update(|known| known.runs = true);
        assert_eq!(board.fresh_report().await.data, DataState::Partial, "nobody looked");
        // A look that began before the question does not count.
        let early = board.look_begins();
        let look = async {
            board.look_wanted().await;
            board.look_done(early);
        };
        assert_eq!(tokio::join!(board.fresh_report(), look).0.data, DataState::Partial);
        let look = async {
            board.look_wanted().await;
            board.look_done(board.look_begins());
        };
        assert_eq!(tokio::join!(board.fresh_report(), look).0.data, DataState::Empty);
    }

    #[test]
    fn a_held_server_lives_and_has_started_and_is_not_ready() {
        check(ServerPhase::Held { reason: "PeerAhead".into(), message: "waiting".into() }, 999, true, true, false);
    }

    #[test]
    fn liveness_is_local_and_readiness_wants_the_link() {
        check(ServerPhase::Deciding, 999, true, false, false);
        check(ServerPhase::Starting { as_primary: true }, 1, true, false, false);
        check(ServerPhase::Primary, 1, true, true, true);
        check(ServerPhase::Primary, 31, false, true, true);
        check(ServerPhase::Replica { of: "a:1".into(), link_up: true }, 1, true, true, true);
        check(ServerPhase::Replica { of: "a:1".into(), link_up: false }, 1, true, true, false);
        check(ServerPhase::Stopping, 999, true, true, false);
    }
}
