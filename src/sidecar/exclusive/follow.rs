//! Where a command goes next that a server refused to carry out.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::pool::Target;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::redirect::parse_redirect;
use crate::sidecar::worker::Worker;

/// The most redirects that one command follows without a pause.
const MAX_HOPS: u8 = 8;
/// How long a command waits before it is repeated at a server that was not ready for it.
const PAUSE: Duration = Duration::from_millis(25);

/// Follows one command from server to server, as long as the policy's patience.
#[derive(Debug)]
pub struct Follow {
    worker: Rc<Worker>,
    slot: u16,
    deadline: Instant,
    hops: u8,
    /// Where the command goes.
    pub target: Target,
    /// Whether ASKING goes before it.
    pub asking: bool,
}

/// Why a command goes nowhere any more.
#[derive(Debug)]
pub enum Halt {
    /// The server's error is the answer.
    Refused,
    /// Servers point at each other for its slot, and patience has ended. The answer is this text, which names none of them.
    Astray(String),
}

impl Follow {
    /// For a command on `slot`.
    pub fn new(worker: &Rc<Worker>, slot: u16) -> Self {
        let deadline = Instant::now() + Duration::from_millis(worker.patience());
        Self { worker: worker.clone(), slot, deadline, hops: 0, target: Target::Slot(slot), asking: false }
    }

    /// Learns where to go from the error of the server at `asked`.
    ///
    /// # Errors
    /// It goes nowhere any more.
    pub async fn after(&mut self, error: &[u8], asked: &NodeAddr) -> Result<(), Halt> {
        let code = error.get(1..).and_then(|text| text.split(|byte| matches!(byte, b' ' | b'\r')).next()).unwrap_or_default();
        let goes_on = match code {
            b"MOVED" | b"ASK" if self.hops < MAX_HOPS => self.redirected(error, asked),
            b"MOVED" | b"ASK" => {
                // Servers point at each other for the slot: they will agree.
                self.hops = 0;
                return if self.again().await { Ok(()) } else { Err(Halt::Astray(self.worker.astray_text())) };
            }
            b"TRYAGAIN" | b"CLUSTERDOWN" | b"LOADING" | b"MASTERDOWN" => self.again().await,
            b"READONLY" if !self.worker.is_cluster() => self.again().await,
            _ => false,
        };
        if goes_on { Ok(()) } else { Err(Halt::Refused) }
    }

    fn redirected(&mut self, error: &[u8], asked: &NodeAddr) -> bool {
        let Some(redirect) = parse_redirect(error, asked) else { return false };
        self.worker.metrics().redirect();
        if !redirect.ask {
            self.worker.refresh_topology();
        }
        self.hops += 1;
        self.asking = redirect.ask;
        self.target = Target::Node(redirect.node);
        true
    }

    /// Goes where the slot belongs, after a pause. `false`: patience has ended.
    pub async fn again(&mut self) -> bool {
        self.worker.refresh_topology();
        self.asking = false;
        self.target = Target::Slot(self.slot);
        if Instant::now() + PAUSE >= self.deadline {
            return false;
        }
        sleep(PAUSE).await;
        true
    }
}
