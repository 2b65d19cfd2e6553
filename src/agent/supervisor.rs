//! The server's life: decide its place, start it, watch it, and begin again when it ends.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use super::ballot::Ballot;
use super::board::Board;
use super::boot::{Decision, Start, decide, may_be_promoted};
use super::catch_up::has_caught_up;
use super::charge::Charge;
use super::child::{Children, Program, Server};
use super::cluster_memory::ClusterMemory;
use super::disk::Disk;
use super::info::{Info, Role};
use super::line::{Line, LineError};
use super::node_table::NodeTable;
use super::peers::PeerClient;
use super::questions::{self, Own};
use super::upkeep::Upkeep;
use crate::policy::agent::{DataState, ServerPhase};
use crate::sidecar::upstream::access::ClusterAccess;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::node::NodeAddr;

/// How often a place is decided again while the server is held, and how often the running server is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The same until it has answered for the first time.
const FIRST_LOOKS_EVERY: Duration = Duration::from_millis(50);
/// How often it is asked whether a replica that has not synchronised may be promoted.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// The pauses between starts of a server that ends at once: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The settings that keep a server from being promoted: under Sentinel, and in a Cluster.
const PRIORITY: &str = "replica-priority";
const NO_FAILOVER: &str = "cluster-replica-no-failover";
/// A server that lived this long did not end at once.
const LIVED: Duration = Duration::from_secs(10);

/// Owns the server's process.
pub struct Supervisor {
    /// The configuration in force.
    pub charge: watch::Receiver<Arc<Charge>>,
    /// How to log in.
    pub access: ClusterAccess,
    /// Asks peers.
    pub http: PeerClient,
    /// Where everything is told.
    pub board: Arc<Board>,
    /// The data.
    pub disk: Disk,
    /// The table of nodes; `None` outside a Cluster.
    pub memory: Option<ClusterMemory>,
    /// The processes.
    pub children: Children,
    /// The server's command line.
    pub program: Program,
    /// To the server.
    pub line: Line,
    /// Settings, users, certificates.
    pub upkeep: Upkeep,
    /// Holds true once the agent is to end.
    pub stop: watch::Receiver<bool>,
}

/// One run of the server's process.
struct Run {
    start: Start,
    /// What it started with.
    brought: Own,
    since: Instant,
    /// Whether it has its primary's data, or is the primary.
    synchronised: bool,
    seen_copying: bool,
    /// Whether it may be promoted.
    promotable: bool,
    /// Whether it has answered.
    greeted: bool,
    asked: Instant,
    /// When its primary was last asked in vain how far it is.
    untold: Option<Instant>,
}

/// How a run ended.
enum Ended {
    /// By itself, or by another's hand.
    Died,
    /// Because the agent was told to end.
    Stopped,
}

impl Supervisor {
    /// Until the agent is told to end.
    pub async fn run(mut self) -> io::Result<()> {
        let mut pause = Duration::ZERO;
        loop {
            if self.pause(pause).await {
                return Ok(());
            }
            let remembered = self.remembered();
            let data = self.disk.inspect(remembered.as_ref().is_some_and(NodeTable::is_blank))?;
            let own = Own { data, claim: remembered.and_then(|table| table.claim()) };
            self.board.update(|known| (known.report.data, known.report.claim) = (own.data.clone(), own.claim));
            let Some(start) = self.find_place(&own).await? else { return Ok(()) };
            let began = Instant::now();
            match self.serve(start, own).await? {
                Ended::Stopped => return Ok(()),
                Ended::Died if began.elapsed() > LIVED => pause = Duration::ZERO,
                Ended::Died => pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
            }
        }
    }

    /// Waits, unevenly so that servers that died together do not start together. True where the agent is to end.
    async fn pause(&mut self, pause: Duration) -> bool {
        let pause = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        timeout(pause, told(&mut self.stop)).await.is_ok()
    }

    /// What the server remembers of its Cluster.
    fn remembered(&self) -> Option<NodeTable> {
        self.memory.as_ref().and_then(ClusterMemory::read)
    }

    /// Asks until the place is known, and the server is to find itself there. `None`: the agent is to end.
    async fn find_place(&mut self, own: &Own) -> io::Result<Option<Start>> {
        self.set_phase(ServerPhase::Deciding);
        let mut said = None;
        let mut intends = false;
        loop {
            let charge = self.charge.borrow_and_update().clone();
            self.board.update(|known| known.report.generation = charge.config.generation);
            let (situation, ballot) = tokio::select! {
                asked = questions::situation(&charge, &self.access, &self.http, own) => asked,
                () = told(&mut self.stop) => return Ok(None),
            };
            match decide(&situation) {
                Decision::Start(Start::Primary) if !intends => {
                    // Told before it is done, and everybody asked again: two that intend the same both see it.
                    intends = true;
                    self.set_phase(ServerPhase::Starting { as_primary: true });
                    continue;
                }
                Decision::Start(start) if self.prepare(&start, &ballot, &charge).await? => return Ok(Some(start)),
                Decision::Start(_) => intends = false,
                Decision::Hold(hold) => {
                    intends = false;
                    let message = hold.explain(situation.voters);
                    if said.as_ref() != Some(&hold) {
                        warn!(reason = hold.word(), "the server is held: {message}");
                    }
                    self.set_phase(ServerPhase::Held { reason: hold.word().to_owned(), message });
                    said = Some(hold);
                }
            }
            tokio::select! {
                () = sleep(LOOK_EVERY.mul_f64(0.75 + fastrand::f64() / 2.0)) => {}
                changed = self.charge.changed() => if changed.is_err() { return Ok(None) },
                () = told(&mut self.stop) => return Ok(None),
            }
        }
    }

    /// Makes a server of a Cluster find itself in its place. False where nobody says enough of it any more.
    async fn prepare(&self, start: &Start, ballot: &Ballot, charge: &Charge) -> io::Result<bool> {
        let Some(memory) = &self.memory else { return Ok(true) };
        let owner = match start {
            Start::Primary => Some(&charge.address),
            Start::Replica { of, .. } => Some(of),
            Start::Blank => None,
        };
        let told = match owner {
            Some(owner) => ballot.table_naming(owner, &self.access.servers).await,
            None => None,
        };
        memory.prepare(start, told.as_ref())
    }

    fn set_phase(&self, phase: ServerPhase) {
        self.board.update(|known| {
            known.report.server = phase;
            known.info = None;
            known.runs = false;
        });
    }

    /// Starts the server and stays with it to its end.
    async fn serve(&mut self, start: Start, own: Own) -> io::Result<Ended> {
        let priority = self.charge.borrow().config.server.priority;
        let server = self.start(&start, priority)?;
        let promotable = matches!(start, Start::Primary | Start::Replica { promotable: true, .. });
        let brought = own;
        let now = Instant::now();
        let mut run = Run {
            start,
            brought,
            since: now,
            synchronised: false,
            seen_copying: false,
            promotable,
            greeted: false,
            asked: now,
            untold: None,
        };
        loop {
            tokio::select! {
                status = self.children.ended(&server) => {
                    self.line.hang_up();
                    error!(%status, ran_for = ?run.since.elapsed(), "the server has ended");
                    if status.success() {
                        self.disk.ended_cleanly();
                    }
                    return Ok(Ended::Died);
                }
                () = told(&mut self.stop) => {
                    self.shut_down(&server, &mut run).await;
                    return Ok(Ended::Stopped);
                }
                () = sleep(if run.greeted { LOOK_EVERY } else { FIRST_LOOKS_EVERY }) => self.look(&mut run).await,
                () = self.board.look_wanted() => self.look(&mut run).await,
                () = self.upkeep.due() => {
                    // Cloned in a statement of its own: who writes a configuration waits for whoever reads it.
                    let charge = self.charge.borrow().clone();
                    self.upkeep.act(&charge, &mut self.line, &self.board).await;
                }
            }
        }
    }

    fn start(&mut self, start: &Start, priority: u16) -> io::Result<Server> {
        match start {
            Start::Primary => {
                info!("starting the server as primary");
                self.disk.begins_as_primary();
            }
            Start::Blank => {
                info!("starting the server as a node that owns nothing");
                self.disk.begins_blank()?;
            }
            Start::Replica { of, promotable } => {
                info!(primary = %of, promotable, "starting the server as a replica");
                self.disk.begins_as_replica();
            }
        }
        self.line.hang_up();
        let server = self.children.start(&self.program, &arguments(start, priority, self.memory.is_some()))?;
        self.board.update(|known| {
            known.report.server = ServerPhase::Starting { as_primary: *start == Start::Primary };
            known.report.proved.users_told = None;
            known.heard = Instant::now();
            known.runs = true;
            known.counts.starts += 1;
        });
        Ok(server)
    }

    /// One look at the running server.
    async fn look(&mut self, run: &mut Run) {
        let number = self.board.look_begins();
        let info = match self.line.ask(&["INFO"]).await {
            Ok(answer) => Info::parse(answer.as_str().unwrap_or_default()),
            Err(failure) => {
                // An error is an answer: a server that is busy or full lives.
                let heard = matches!(failure, LineError::Refused { .. });
                debug!(%failure, "the server does not tell of itself");
                self.board.update(|known| {
                    known.info = None;
                    known.heard = if heard { Instant::now() } else { known.heard };
                });
                return;
            }
        };
        let always = self.writes_always().await;
        let claim = self.remembered().and_then(|table| table.claim());
        let owns_nothing = self.memory.is_some() && claim.is_none();
        let data = self.data_of(run, &info, always, owns_nothing);
        let phase = phase_of(run, &info);
        self.board.update(|known| {
            known.heard = Instant::now();
            known.report.data = data;
            known.report.claim = claim;
            known.owns_nothing = owns_nothing;
            known.report.server = phase;
            known.info = Some(info);
        });
        self.upkeep.heed(&mut self.line, &self.board).await;
        self.board.look_done(number);
        if !run.greeted {
            run.greeted = true;
            self.upkeep.begin();
        }
        self.settle_promotability(run).await;
    }

    /// Whether the server has each change on the disk before it acknowledges it.
    async fn writes_always(&mut self) -> bool {
        if !self.charge.borrow().config.server.durable {
            return false;
        }
        let answer = self.line.ask(&["CONFIG", "GET", "appendfsync"]).await;
        answer.is_ok_and(|answer| answer.field("appendfsync").and_then(Value::as_str) == Some("always"))
    }

    /// What the server holds. Before it has synchronised, that is what it brought along.
    fn data_of(&mut self, run: &mut Run, info: &Info, always: bool, owns_nothing: bool) -> DataState {
        let role = info.role().filter(|_| !info.is_loading());
        match role {
            // Nobody writes to it, and it may be told to follow another.
            Some(Role::Primary) if owns_nothing => {}
            Some(Role::Primary | Role::Replica { link_up: true, .. }) => run.synchronised = true,
            Some(Role::Replica { syncing: true, .. }) => run.seen_copying = true,
            Some(Role::Replica { .. }) | None => {}
        }
        if run.synchronised {
            return self.disk.observe(info, always);
        }
        let loads_a_copy = info.is_loading() && (run.seen_copying || run.brought.data == DataState::Empty);
        if loads_a_copy { DataState::Partial } else { run.brought.data.clone() }
    }

    /// Lets the server be promoted, once it may be.
    async fn settle_promotability(&mut self, run: &mut Run) {
        if run.promotable || !self.may_be_promoted(run).await {
            return;
        }
        let charge = self.charge.borrow().clone();
        let priority = charge.config.server.priority.to_string();
        let setting = if self.memory.is_some() { [NO_FAILOVER, "no"] } else { [PRIORITY, &priority] };
        match self.line.ask(&["CONFIG", "SET", setting[0], setting[1]]).await {
            Ok(Value::Text(_)) => run.promotable = true,
            Ok(_) | Err(_) => warn!("{} cannot be set; the server cannot be promoted yet", setting[0]),
        }
    }

    /// A replica may be promoted once it has all that its primary has, or where its own copy is the best there is.
    async fn may_be_promoted(&mut self, run: &mut Run) -> bool {
        let known = self.board.read();
        let mut own = run.brought.clone();
        if run.synchronised {
            if known.report.server == ServerPhase::Primary {
                return true;
            }
            // A primary that hangs would hold up each look.
            if run.untold.is_none_or(|since| since.elapsed() >= ASK_EVERY) {
                match has_caught_up(&mut self.line, &self.access.servers).await {
                    Ok(true) => return true,
                    Ok(false) => {}
                    Err(error) => {
                        run.untold = Some(Instant::now());
                        debug!(%error, "it is not known whether the server has all that its primary has");
                    }
                }
            }
            own = Own { data: known.report.data, claim: known.report.claim };
        }
        if run.asked.elapsed() < ASK_EVERY || own.data == DataState::Empty {
            return false;
        }
        run.asked = Instant::now();
        let charge = self.charge.borrow().clone();
        let (situation, _) = questions::situation(&charge, &self.access, &self.http, &own).await;
        let is_best = may_be_promoted(&situation);
        if is_best {
            info!("nobody holds a better copy than this server: it may be promoted");
        }
        is_best
    }

    /// SIGTERM, and after the bound SIGKILL.
    async fn shut_down(&mut self, server: &Server, run: &mut Run) {
        self.look(run).await;
        self.board.update(|known| known.report.server = ServerPhase::Stopping);
        let bound = self.charge.borrow().config.shutdown.as_duration();
        info!(?bound, "stopping the server");
        server.terminate();
        match timeout(bound, self.children.ended(server)).await {
            Ok(status) if status.success() => self.disk.ended_cleanly(),
            Ok(status) => warn!(%status, "the server ended badly"),
            Err(_) => {
                warn!("the server did not end within {bound:?} and is killed");
                server.kill();
                let _ = timeout(Duration::from_secs(5), self.children.ended(server)).await;
            }
        }
    }
}

/// Waits until the agent is to end. Cancel-safe.
async fn told(stop: &mut watch::Receiver<bool>) {
    // Where nobody can tell any more, it is to end too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// What is added to the server's command line: its place, said in full, so that nothing that a file says of it counts.
/// A node of a Cluster finds its place in its table.
fn arguments(start: &Start, priority: u16, in_cluster: bool) -> Vec<String> {
    if in_cluster {
        let promotable = matches!(start, Start::Primary | Start::Replica { promotable: true, .. });
        return [format!("--{NO_FAILOVER}"), if promotable { "no" } else { "yes" }.to_owned()].into();
    }
    let (of, priority) = match start {
        Start::Primary | Start::Blank => (None, priority),
        Start::Replica { of, promotable } => (Some(of), if *promotable { priority } else { 0 }),
    };
    let host = of.map_or("no", NodeAddr::host).to_owned();
    let port = of.map_or("one".to_owned(), |of| of.port().to_string());
    ["--replicaof".into(), host, port, format!("--{PRIORITY}"), priority.to_string()].into()
}

fn phase_of(run: &Run, info: &Info) -> ServerPhase {
    if info.is_loading() && !run.synchronised {
        return ServerPhase::Starting { as_primary: run.start == Start::Primary };
    }
    match info.role() {
        Some(Role::Primary) => ServerPhase::Primary,
        Some(Role::Replica { host, port, link_up, .. }) => {
            ServerPhase::Replica { of: NodeAddr::new(host, port).to_string(), link_up }
        }
        None => ServerPhase::Starting { as_primary: run.start == Start::Primary },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_the_place_in_full() {
        let of = NodeAddr::new("10.0.0.7", 6379);
        let line = |start| arguments(&start, 100, false).join(" ");
        assert_eq!(line(Start::Primary), "--replicaof no one --replica-priority 100");
        let replica = |promotable| line(Start::Replica { of: of.clone(), promotable });
        assert_eq!(replica(false), "--replicaof 10.0.0.7 6379 --replica-priority 0");
        assert_eq!(replica(true), "--replicaof 10.0.0.7 6379 --replica-priority 100");
        let line = |start| arguments(&start, 100, true).join(" ");
        assert_eq!(line(Start::Primary), "--cluster-replica-no-failover no");
        assert_eq!(line(Start::Blank), "--cluster-replica-no-failover yes");
        let replica = |promotable| line(Start::Replica { of: of.clone(), promotable });
        assert_eq!(
            (replica(false).as_str(), replica(true).as_str()),
            ("--cluster-replica-no-failover yes", "--cluster-replica-no-failover no")
        );
    }
}
