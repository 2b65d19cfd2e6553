//! Planned handover of a primary by commands alone: another takes over, and no acknowledged write is lost.
//!
//! Where the engine has a coordinated failover, the primary itself hands over. Elsewhere writes are paused until every replica that
//! follows has everything, Sentinel fails over, and the old primary is told to follow as soon as a majority names another. Writes
//! stay paused until its role has changed, so that none is acknowledged that the new primary lacks. A deadline gives up and
//! unpauses, and so does whoever drops a handover in the middle; the pause itself is bounded by the server, so that it ends even where
//! nobody is left to end it.
//!
//! The agent beside the primary may do the same at the same moment, because its pod ends: each takes a failover that is under way
//! for its own, and neither lets writes go on while sentinels may still promote.
//!
//! Whether this process still leads is asked before each command that begins something: the preference, the first pause, each order to
//! fail over. What is begun is seen through whoever leads by then, since writes that go on meanwhile would be lost.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info, warn};

use crate::operator::admin::{Admin, AdminError, Entry, Keys};
use crate::operator::election::Leadership;

/// How often something is looked at while writes are paused.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often sentinels are asked while they fail over.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How much longer than the deadline the server itself keeps writes paused, should nobody end the pause.
const PAUSE_MARGIN: Duration = Duration::from_secs(1);
/// How long a failover that the sentinels have begun is waited for beyond the deadline: it may still come about.
const BEGUN_LIMIT: Duration = Duration::from_secs(20);
/// How long no sentinel may have acted before it counts as having given up.
const QUIET_LIMIT: Duration = Duration::from_secs(3);
/// How many times in a row the sentinel that fails over may not answer before it counts as dead. On a node that is drained it ends with
/// the primary; what it has begun, another ends in a second, and by themselves they would in eight.
const GONE_AFTER: u32 = 2;
/// How long writes may be paused until a sentinel has begun. Sentinels greet each other by `PUBLISH` at the primary, which such a pause
/// holds up together with their next PING: after `down-after-milliseconds` they would take the primary for dead.
const BEGIN_WITHIN: Duration = Duration::from_millis(1500);
/// How long the sentinels may take to hear of the replica that is preferred: they ask replicas every ten seconds.
const PREFERENCE_LIMIT: Duration = Duration::from_secs(12);
/// The `replica-priority` of the replica that is preferred: the lowest that may be promoted at all.
pub const PREFERRED: &str = "1";
/// The `replica-priority` of every server that may be promoted, as agents are told.
pub const PRIORITY: u16 = 100;

/// How long the questions before and after may take in all, each of which has a deadline of its own.
const AROUND: Duration = Duration::from_secs(20);

/// The longest that a handover with this limit takes, with all that comes before and after.
pub const fn longest(limit: Duration) -> Duration {
    let heard_of = if limit.as_millis() > PREFERENCE_LIMIT.as_millis() { limit } else { PREFERENCE_LIMIT };
    limit.saturating_add(heard_of).saturating_add(BEGUN_LIMIT).saturating_add(AROUND)
}

/// What is handed over, and by whom.
#[derive(Debug, Clone)]
pub struct Handover<'a> {
    /// The name under which the sentinels watch the primary.
    pub master: &'a str,
    /// The primary, by its announced address.
    pub from: SocketAddr,
    /// The replica that is preferred. Sentinels may choose another where it is not good enough.
    pub to: SocketAddr,
    /// Every sentinel.
    pub sentinels: &'a [SocketAddr],
    /// How servers and sentinels alike let Larder in.
    pub entry: Entry<'a>,
    /// Whether this process may begin anything.
    pub leadership: &'a Leadership,
    /// When to give up. As long again may pass before, in which the sentinels come to see the replica and hear of the preference, and
    /// what they have begun may take longer.
    pub limit: Duration,
}

/// How a handover ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The server was no primary: nothing was to be done.
    NoPrimary,
    /// Another is primary now.
    Done {
        /// Which.
        primary: SocketAddr,
    },
}

/// Why a handover was given up. The primary serves as before.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The primary or a replica failed to answer.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// This process no longer leads.
    #[error("another operator leads; writes go on at {0}")]
    NotLeading(SocketAddr),
    /// Nobody could take over.
    #[error("no replica of {0} is attached and in step that the sentinels could promote")]
    NoReplica(SocketAddr),
    /// The replicas did not catch up.
    #[error("no replica of {0} had everything before the deadline; writes go on there")]
    Behind(SocketAddr),
    /// The sentinels did not act.
    #[error("no sentinel began to fail {from} over before the deadline; writes go on there: {why}")]
    NotBegun {
        /// The primary.
        from: SocketAddr,
        /// What the last sentinel that was asked answered.
        why: String,
    },
    /// The sentinels began and did not end it.
    #[error("the failover of {0} did not come about before the deadline; writes go on there")]
    NotDone(SocketAddr),
}

/// What `INFO` says that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Info {
    /// `None`: it is a primary.
    follows: Option<SocketAddr>,
    offset: u64,
    /// The replicas that are attached and in step.
    online: Vec<SocketAddr>,
    has_coordinated: bool,
}

/// What a sentinel says of the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Opinion {
    primary: SocketAddr,
    failing_over: bool,
}

impl Handover<'_> {
    /// Hands over if the server is a primary. Safe to repeat, and beside an agent that does the same.
    pub async fn run(&self) -> Result<Outcome, HandoverError> {
        let mut server = self.connect(self.from).await?;
        let info = read_info(&mut server).await?;
        if info.follows.is_some() {
            return Ok(Outcome::NoPrimary);
        }
        if info.online.is_empty() {
            return Err(HandoverError::NoReplica(self.from));
        }
        let began = Instant::now();
        self.wait_until_seen(&info.online, began + self.limit).await?;
        let heard_by = began + self.limit.max(PREFERENCE_LIMIT);
        let before = if info.online.len() > 1 { self.prefer(heard_by).await } else { None };
        let outcome = self.hand_over(&mut server, info.has_coordinated).await;
        if let Some(priority) = before {
            self.set_priority(&priority).await;
        }
        outcome
    }

    fn check_leads(&self) -> Result<(), HandoverError> {
        if self.leadership.holds() { Ok(()) } else { Err(HandoverError::NotLeading(self.from)) }
    }

    async fn connect(&self, address: SocketAddr) -> Result<Admin, AdminError> {
        Admin::connect(address, self.entry).await
    }

    async fn hand_over(&self, server: &mut Admin, coordinated: bool) -> Result<Outcome, HandoverError> {
        let deadline = Instant::now() + self.limit;
        if coordinated && let Some(outcome) = self.coordinate(server, deadline).await {
            return outcome;
        }
        // Before anything is undone as well: what is paused by now, another has paused.
        self.check_leads()?;
        let mut pause = Pause::of(self);
        let outcome = timeout_at(deadline + BEGUN_LIMIT, self.pause_and_fail_over(server, deadline)).await;
        let outcome = outcome.unwrap_or(Err(HandoverError::NotDone(self.from)));
        self.end_pause(outcome.is_err()).await;
        pause.is_ended = true;
        outcome
    }

    /// Lets writes go on, unless the handover `failed` and sentinels may still promote.
    async fn end_pause(&self, failed: bool) {
        // An agent's handover may be under way, and what it pauses it unpauses.
        if failed && self.opinions().await.iter().any(|opinion| self.is_acting(opinion)) {
            info!(primary = %self.from, "sentinels act by themselves; writes stay paused until the server ends the pause");
            return;
        }
        for _ in 0..2 {
            let unpaused = async { self.connect(self.from).await?.ask::<()>("CLIENT UNPAUSE", &[]).await }.await;
            match unpaused {
                Ok(()) => return,
                Err(error) => warn!(%error, "writes are not unpaused; the server does it by itself in a moment"),
            }
        }
    }

    /// Until a sentinel that acts sees one of the `online` replicas as one that it would promote. Where a pod was replaced, sentinels may
    /// take fifteen seconds to connect to the new one, and until then none begins; nothing is paused for that.
    async fn wait_until_seen(&self, online: &[SocketAddr], deadline: Instant) -> Result<(), HandoverError> {
        loop {
            let asked = join_all(self.sentinels.iter().map(|sentinel| self.would_promote(*sentinel, online))).await;
            if asked.into_iter().any(|answer| answer.unwrap_or(false)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = "none of them sees a replica that it would promote".to_owned();
                return Err(HandoverError::NotBegun { from: self.from, why });
            }
            sleep(ASK_EVERY).await;
        }
    }

    async fn would_promote(&self, sentinel: SocketAddr, online: &[SocketAddr]) -> Result<bool, AdminError> {
        let mut sentinel = self.connect(sentinel).await?;
        let replicas: Vec<HashMap<String, String>> = sentinel.ask("SENTINEL REPLICAS", &[self.master]).await?;
        Ok(replicas.iter().any(|fields| is_promotable(fields, online)) && !is_in_tilt(&mut sentinel).await?)
    }

    /// Makes the sentinels prefer the wanted replica, and waits until they know. The priority that it had; `None` where it stays as
    /// it was, because it may not be promoted or does not answer.
    async fn prefer(&self, deadline: Instant) -> Option<String> {
        let mut replica = self.connect(self.to).await.ok()?;
        let config: HashMap<String, String> = replica.ask("CONFIG GET", &["replica-priority"]).await.ok()?;
        let before = config.get("replica-priority").filter(|priority| *priority != "0")?.clone();
        if self.check_leads().is_err() || !self.set_priority(PREFERRED).await {
            return None;
        }
        let known = async {
            while !self.is_preferred_everywhere().await {
                sleep(ASK_EVERY).await;
            }
        };
        // A sentinel that has not heard of it may choose another; nothing is lost.
        let _ = timeout_at(deadline, known).await;
        // One that was left behind by a handover that was cut short is put right by this one.
        Some(if before == PREFERRED { PRIORITY.to_string() } else { before })
    }

    async fn set_priority(&self, priority: &str) -> bool {
        let told: Result<(), AdminError> = async {
            let mut replica = self.connect(self.to).await?;
            replica.ask("CONFIG SET", &["replica-priority", priority]).await
        }
        .await;
        if let Err(error) = &told {
            warn!(%error, priority, "replica-priority cannot be set");
        }
        told.is_ok()
    }

    async fn is_preferred_everywhere(&self) -> bool {
        let asked = join_all(self.sentinels.iter().map(|sentinel| self.is_preferred_at(*sentinel))).await;
        // A sentinel that does not answer does not fail over either.
        asked.into_iter().all(|preferred| preferred.unwrap_or(true))
    }

    async fn is_preferred_at(&self, sentinel: SocketAddr) -> Result<bool, AdminError> {
        let mut sentinel = self.connect(sentinel).await?;
        let replicas: Vec<HashMap<String, String>> = sentinel.ask("SENTINEL REPLICAS", &[self.master]).await?;
        let wanted = replicas.iter().find(|fields| address_in(fields, "ip", "port") == Some(self.to));
        Ok(wanted.and_then(|fields| fields.get("slave-priority")).is_some_and(|priority| priority == PREFERRED))
    }

    /// The primary itself hands over, asked by a sentinel; by another where the first dies. `None`: no sentinel can.
    async fn coordinate(&self, server: &mut Admin, deadline: Instant) -> Option<Result<Outcome, HandoverError>> {
        let mut first = None;
        while Instant::now() < deadline {
            match self.ask_for_failover(&["COORDINATED"], first.unwrap_or(0)).await {
                Ok(asked) => {
                    first = Some(asked + 1);
                    if let Some(done) = self.wait_for_demotion(server, asked, deadline).await {
                        return Some(Ok(done));
                    }
                }
                Err(error @ HandoverError::NotLeading(_)) if first.is_none() => return Some(Err(error)),
                Err(_) if first.is_none() => return None,
                // What is begun is not begun again by one that leads no more.
                Err(HandoverError::NotLeading(_)) => break,
                // One has begun, and nobody answers for the moment.
                Err(_) => sleep(ASK_EVERY).await,
            }
        }
        // Ends it where it is still under way; elsewhere the server answers that there is none.
        let _: Result<(), AdminError> = server.ask("FAILOVER", &["ABORT"]).await;
        Some(Err(HandoverError::NotDone(self.from)))
    }

    /// Asks the sentinels in turn, that of the number `first` first, until one has begun, or has another failover under way: which.
    /// Otherwise what the last one answered, or that this process leads no more.
    async fn ask_for_failover(&self, how: &[&str], first: usize) -> Result<usize, HandoverError> {
        let mut why = "no sentinel is configured".to_owned();
        let all = self.sentinels.len();
        for (at, sentinel) in self.sentinels.iter().enumerate().cycle().skip(first % all.max(1)).take(all) {
            let answer: Result<bool, HandoverError> = async {
                let mut sentinel = self.connect(*sentinel).await?;
                if is_in_tilt(&mut sentinel).await? {
                    return Ok(false);
                }
                self.check_leads()?;
                sentinel.ask::<()>("SENTINEL FAILOVER", &[&[self.master], how].concat()).await?;
                Ok(true)
            }
            .await;
            match answer {
                Ok(true) => return Ok(at),
                Ok(false) => why = format!("{sentinel} is in TILT mode, after its clock or the whole of it stood still"),
                Err(error @ HandoverError::NotLeading(_)) => return Err(error),
                Err(HandoverError::Admin(error)) if error.code() == Some("INPROG") => return Ok(at),
                Err(error) => {
                    debug!(%error, ?how, "a sentinel begins no failover");
                    why = error.to_string();
                }
            }
        }
        Err(HandoverError::NotBegun { from: self.from, why })
    }

    async fn pause_and_fail_over(&self, server: &mut Admin, deadline: Instant) -> Result<Outcome, HandoverError> {
        let mut begin_by = deadline.min(Instant::now() + BEGIN_WITHIN);
        pause_until(server, begin_by).await?;
        self.wait_for_replicas(server, begin_by).await?;
        let limit = deadline.max(Instant::now() + BEGUN_LIMIT);
        let mut first = 0;
        loop {
            let asked = self.begin_failover(first, begin_by).await?;
            // From here on the sentinels may promote at any moment: writes stay paused until they have, or have given up, whoever leads.
            pause_until(server, limit).await?;
            match self.wait_for_demotion(server, asked, limit).await {
                Some(done) => return Ok(done),
                // The one that was asked may have died: another is.
                None if Instant::now() < deadline => {
                    (first, begin_by) = (asked + 1, deadline.min(Instant::now() + BEGIN_WITHIN));
                }
                None => return Err(HandoverError::NotDone(self.from)),
            }
        }
    }

    /// Until every attached replica that follows has all that this primary has: whichever is promoted lacks nothing.
    async fn wait_for_replicas(&self, server: &mut Admin, deadline: Instant) -> Result<(), HandoverError> {
        while Instant::now() < deadline {
            let info = read_info(server).await?;
            if info.online.is_empty() {
                return Err(HandoverError::NoReplica(self.from));
            }
            let offsets = join_all(info.online.iter().map(|replica| self.offset_of(*replica))).await;
            if offsets.into_iter().all(|offset| offset.is_ok_and(|offset| offset >= info.offset)) {
                return Ok(());
            }
            sleep(LOOK_EVERY).await;
        }
        Err(HandoverError::Behind(self.from))
    }

    async fn offset_of(&self, replica: SocketAddr) -> Result<u64, AdminError> {
        let mut replica = self.connect(replica).await?;
        Ok(read_info(&mut replica).await?.offset)
    }

    async fn begin_failover(&self, first: usize, deadline: Instant) -> Result<usize, HandoverError> {
        let mut last = HandoverError::NotBegun { from: self.from, why: "the deadline had passed".to_owned() };
        while Instant::now() < deadline {
            match self.ask_for_failover(&[], first).await {
                Err(error @ HandoverError::NotBegun { .. }) => last = error,
                outcome => return outcome,
            }
            sleep(ASK_EVERY).await;
        }
        Err(last)
    }

    /// Until the server has become a replica; `None` where the limit passed, or no sentinel does anything: for a while, or because the
    /// one that was `asked` is gone. Sentinel turns a former primary round only after several seconds, so as soon as the majority names
    /// another, this does.
    async fn wait_for_demotion(&self, server: &mut Admin, asked: usize, limit: Instant) -> Option<Outcome> {
        let (mut acted, mut silent) = (Instant::now(), 0);
        while Instant::now() < limit && acted.elapsed() < QUIET_LIMIT && silent < GONE_AFTER {
            match read_info(server).await {
                Ok(Info { follows: Some(primary), .. }) => return Some(Outcome::Done { primary }),
                Ok(Info { follows: None, .. }) => {}
                Err(error) => {
                    debug!(%error, "the server that hands over does not answer");
                    if let Ok(again) = self.connect(self.from).await {
                        *server = again;
                    }
                }
            }
            let answers = self.answers().await;
            let opinions: Vec<Opinion> = answers.iter().filter_map(|answer| answer.as_ref().ok().copied().flatten()).collect();
            if let Some(primary) = self.successor(&opinions) {
                let (host, port) = (primary.ip().to_string(), primary.port().to_string());
                // Refused while the server itself hands over; it is asked again then.
                if let Err(error) = server.ask::<()>("REPLICAOF", &[&host, &port]).await {
                    warn!(%error, "the server that hands over cannot be told to follow its successor");
                }
            }
            let somebody_acts = opinions.iter().any(|opinion| self.is_acting(opinion));
            if somebody_acts {
                acted = Instant::now();
            }
            let is_gone = !somebody_acts && answers.get(asked).is_none_or(Result::is_err);
            silent = if is_gone { silent + 1 } else { 0 };
            sleep(ASK_EVERY).await;
        }
        None
    }

    /// What the sentinels that answer say.
    async fn opinions(&self) -> Vec<Opinion> {
        self.answers().await.into_iter().filter_map(|answer| answer.ok().flatten()).collect()
    }

    /// What each sentinel answers.
    async fn answers(&self) -> Vec<Result<Option<Opinion>, AdminError>> {
        join_all(self.sentinels.iter().map(|sentinel| self.opinion_of(*sentinel))).await
    }

    async fn opinion_of(&self, sentinel: SocketAddr) -> Result<Option<Opinion>, AdminError> {
        let mut sentinel = self.connect(sentinel).await?;
        let fields: HashMap<String, String> = sentinel.ask("SENTINEL MASTER", &[self.master]).await?;
        Ok(parse_master(&fields))
    }

    /// The server that a majority of all sentinels names instead of the one that hands over.
    fn successor(&self, opinions: &[Opinion]) -> Option<SocketAddr> {
        let votes = |primary| opinions.iter().filter(|opinion| opinion.primary == primary).count();
        let named = opinions.iter().map(|opinion| opinion.primary).find(|primary| votes(*primary) > self.sentinels.len() / 2);
        named.filter(|primary| *primary != self.from)
    }

    /// Whether a sentinel is replacing the server, or has.
    fn is_acting(&self, opinion: &Opinion) -> bool {
        opinion.failing_over || opinion.primary != self.from
    }
}

/// Writes that are paused. Where nobody comes to end that, because whoever waited for the handover has gone, this does.
struct Pause {
    master: String,
    from: SocketAddr,
    to: SocketAddr,
    sentinels: Vec<SocketAddr>,
    keys: Option<Keys>,
    leadership: Leadership,
    is_ended: bool,
}

impl Pause {
    fn of(handover: &Handover<'_>) -> Self {
        let Handover { master, from, to, sentinels, entry, leadership, limit: _ } = handover;
        let (master, sentinels, keys) = ((*master).to_owned(), sentinels.to_vec(), Some(Keys::from(*entry)));
        Self { master, from: *from, to: *to, sentinels, keys, leadership: (*leadership).clone(), is_ended: false }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_ended {
            return;
        }
        let (master, sentinels, keys) = (std::mem::take(&mut self.master), std::mem::take(&mut self.sentinels), self.keys.take());
        let (from, to, leadership) = (self.from, self.to, self.leadership.clone());
        runtime.spawn(async move {
            let (sentinels, entry) = (&sentinels[..], keys.as_ref().map(Keys::entry).unwrap_or_default());
            let (leadership, limit) = (&leadership, Duration::ZERO);
            Handover { master: &master, from, to, sentinels, entry, leadership, limit }.end_pause(true).await;
        });
    }
}

async fn pause_until(server: &mut Admin, until: Instant) -> Result<(), AdminError> {
    let pause = until.saturating_duration_since(Instant::now()) + PAUSE_MARGIN;
    server.ask("CLIENT PAUSE", &[&pause.as_millis().to_string(), "WRITE"]).await
}

/// Whether a sentinel has seen its clock jump, or itself stand still, in the last half minute: it takes orders then, and carries none out
/// before that is over.
async fn is_in_tilt(sentinel: &mut Admin) -> Result<bool, AdminError> {
    let info: String = sentinel.ask("INFO", &["sentinel"]).await?;
    Ok(info.lines().any(|line| line.trim_end() == "sentinel_tilt:1"))
}

async fn read_info(server: &mut Admin) -> Result<Info, AdminError> {
    let text: String = server.ask("INFO", &[]).await?;
    Ok(parse_info(&text))
}

fn parse_info(text: &str) -> Info {
    let fields: HashMap<&str, &str> = text.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
    let field = |name: &str| fields.get(name).copied();
    let address = |host: Option<&str>, port: Option<&str>| Some(SocketAddr::new(host?.parse().ok()?, port?.parse().ok()?));
    let is_primary = field("role") == Some("master");
    let follows = if is_primary { None } else { address(field("master_host"), field("master_port")) };
    let attached = fields.iter().filter(|(name, value)| is_numbered(name, "slave") && value.contains("state=online"));
    let online = attached.filter_map(|(_, value)| {
        let part = |name: &str| value.split(',').find_map(|part| part.strip_prefix(name));
        address(part("ip="), part("port="))
    });
    let offset = field(if is_primary { "master_repl_offset" } else { "slave_repl_offset" });
    let major = field("valkey_version").and_then(|version| version.split('.').next()).and_then(|major| major.parse::<u16>().ok());
    Info {
        follows,
        offset: offset.and_then(|offset| offset.parse().ok()).unwrap_or(0),
        online: online.collect(),
        has_coordinated: major.is_some_and(|major| major >= 9),
    }
}

fn is_numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn address_in(fields: &HashMap<String, String>, host: &str, port: &str) -> Option<SocketAddr> {
    Some(SocketAddr::new(fields.get(host)?.parse().ok()?, fields.get(port)?.parse().ok()?))
}

/// Whether a sentinel's words on a replica are those of one that it would promote.
fn is_promotable(fields: &HashMap<String, String>, online: &[SocketAddr]) -> bool {
    let field = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
    let is_away = field("flags").split(',').any(|flag| matches!(flag, "s_down" | "o_down" | "disconnected"));
    address_in(fields, "ip", "port").is_some_and(|address| online.contains(&address))
        && !is_away
        && field("slave-priority") != "0"
}

fn parse_master(fields: &HashMap<String, String>) -> Option<Opinion> {
    let flags = fields.get("flags").map(String::as_str).unwrap_or_default();
    let failing_over = flags.split(',').any(|flag| flag == "failover_in_progress");
    Some(Opinion { primary: address_in(fields, "ip", "port")?, failing_over })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_primary_names_its_replicas_in_step() {
        let info = parse_info(
            "redis_version:7.2.4\r\nvalkey_version:9.1.0\r\nrole:master\r\nconnected_slaves:2\r\n\
             slave0:ip=127.0.0.1,port=7001,state=online,offset=42,lag=0\r\n\
             slave1:ip=127.0.0.1,port=7002,state=wait_bgsave,offset=0,lag=0\r\nmaster_repl_offset:42\r\n",
        );
        assert_eq!(info, Info { follows: None, offset: 42, online: vec![at(7001)], has_coordinated: true });
    }

    #[test]
    fn a_replica_tells_how_far_it_is() {
        let info = parse_info(
            "redis_version:7.0.15\r\nrole:slave\r\nmaster_host:127.0.0.1\r\nmaster_port:7000\r\nslave_read_repl_offset:50\r\n\
             slave_repl_offset:41\r\nmaster_repl_offset:41\r\n",
        );
        assert_eq!(info, Info { follows: Some(at(7000)), offset: 41, online: vec![], has_coordinated: false });
    }

    #[test]
    fn a_replica_that_a_sentinel_lost_sight_of_is_not_promoted() {
        let replica = |port: &str, flags: &str, priority: &str| {
            let fields = [("ip", "127.0.0.1"), ("port", port), ("flags", flags), ("slave-priority", priority)];
            HashMap::from(fields.map(|(name, value)| (name.to_owned(), value.to_owned())))
        };
        let is_promotable = |port, flags, priority| is_promotable(&replica(port, flags, priority), &[at(7001)]);
        assert!(is_promotable("7001", "slave", "100"));
        assert!(!is_promotable("7001", "s_down,slave", "100"));
        assert!(!is_promotable("7001", "slave,disconnected", "100"));
        assert!(!is_promotable("7001", "slave", "0"));
        assert!(!is_promotable("7002", "slave", "100"));
    }

    #[test]
    fn only_a_majority_of_all_names_a_successor() {
        let sentinels = [at(1), at(2), at(3)];
        let (from, to, limit) = (at(7000), at(7001), Duration::from_secs(1));
        let (entry, leadership) = (Entry::default(), &Leadership::for_good());
        let handover = Handover { master: "main", from, to, sentinels: &sentinels, entry, leadership, limit };
        let opinion = |primary| Opinion { primary, failing_over: false };
        assert_eq!(handover.successor(&[opinion(to)]), None);
        assert_eq!(handover.successor(&[opinion(to), opinion(from), opinion(from)]), None);
        assert_eq!(handover.successor(&[opinion(to), opinion(to), opinion(from)]), Some(to));
        assert!(handover.is_acting(&opinion(to)) && !handover.is_acting(&opinion(from)));
    }
}
