//! Commands that are on disk before they count: at their server, and at every replica that might take its place.
//!
//! A server tells per connection how far its replicas are. So commands and the question go over one connection, which leads to one process
//! that was the primary before the first and still is behind the last: what was carried out there is what was confirmed. They go in
//! *rounds*: what comes while one is under way makes up the next, and is one wait and one fsync for all of it.
//!
//! All that follow the primary must confirm, and the same must follow it before and after. Nobody else may be promoted in its place: an
//! [heir](crate::sidecar::upstream::heirs) that does not follow, dead or not, has each round refused as long as it has not ruled that out.
//!
//! `WAITAOF` counts an fsync that is due as done unless `appendfsync` is `always`; that is looked at before each round, at the server and all
//! that follow it, unless the snapshot vouches for it. A server without `WAITAOF` (Redis before 7.2) is asked by `WAIT`: with `always` a
//! server writes to disk before it answers, and a replica before it acknowledges.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::connection::{Dedicated, Owed};
use super::pool::{Hold, Target, acquire};
use super::wait::{HEIRS_UNKNOWN, MARK_COMMANDS, check_heirs, followers_of, mark, settle};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::disks::{Careless, Disks};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::worker::Worker;

/// The most commands of a round.
const MOST_IN_ROUND: usize = 256;
/// How long a server may not be fit, as while it is being replaced, before what waits for it is given up.
const FIT_WITHIN: Duration = Duration::from_secs(3);
const FIT_LOOK_MS: u64 = 50;
/// How long all may take to have it on disk, looked at in steps: who follows may change meanwhile.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(3);
const CONFIRM_STEP_MS: u64 = 1_000;
/// A server that answers nothing for this long, while it may wait for a step, is given up.
const ANSWERED_WITHIN: Duration = Duration::from_millis(2 * CONFIRM_STEP_MS);
/// How many commands ask who has something and who follows, the last of [`Footing::question`]: the others' answers count for nothing.
const ASKED: usize = 2;

/// Why a command is not known to have been carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undone {
    /// It surely was not. An error reply's text, its code first.
    Surely(String),
    /// It may have been. What happened.
    Perhaps(String),
}

/// What came of a command that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// The server's answer: no error.
    pub answer: Vec<u8>,
    /// Whether it is on disk everywhere; else why that is not known.
    pub durable: Result<(), String>,
}

/// Makes a command, by the time at its server in microseconds since 1970.
type Make = Box<dyn FnOnce(u64) -> Vec<u8>>;

/// Who waits for what comes of a command.
struct Asker(oneshot::Sender<Result<Done, Undone>>);

impl Asker {
    fn tell(self, outcome: Result<Done, Undone>) {
        // He may have gone.
        let _ = self.0.send(outcome);
    }
}

struct Waiting {
    make: Make,
    /// It is not sent later than this.
    until: Instant,
    asker: Asker,
}

/// The rounds of a worker.
#[derive(Default)]
pub struct Rounds {
    /// What waits for its round, by slot. A slot that is here has a round under way.
    waiting: RefCell<FxHashMap<u16, Vec<Waiting>>>,
    /// Asks replicas; out while a round does.
    disks: RefCell<Disks>,
}

impl std::fmt::Debug for Rounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rounds").field(&self.waiting.borrow().len()).finish()
    }
}

/// Carries out a command, all of whose keys lie in `slot`, and waits until it is on disk at their primary and at all replicas that might take its place,
/// of which there must be one. It is not sent after `until`, and `make` is called when it is.
///
/// # Errors
/// Whether it was carried out all the same.
pub async fn carry_out(
    worker: &Rc<Worker>,
    slot: u16,
    until: Instant,
    make: impl FnOnce(u64) -> Vec<u8> + 'static,
) -> Result<Done, Undone> {
    let (tell, told) = oneshot::channel();
    let waiting = Waiting { make: Box::new(make), until, asker: Asker(tell) };
    let is_first = {
        let mut by_slot = worker.rounds().waiting.borrow_mut();
        let is_first = !by_slot.contains_key(&slot);
        by_slot.entry(slot).or_default().push(waiting);
        is_first
    };
    if is_first {
        tokio::task::spawn_local(lead(worker.clone(), slot));
    }
    told.await.unwrap_or_else(|_| Err(Undone::Perhaps("the sidecar is stopping".to_owned())))
}

/// Plays rounds until nothing waits.
async fn lead(worker: Rc<Worker>, slot: u16) {
    loop {
        let batch: Vec<Waiting> = {
            let mut by_slot = worker.rounds().waiting.borrow_mut();
            let Some(waiting) = by_slot.get_mut(&slot).filter(|waiting| !waiting.is_empty()) else {
                by_slot.remove(&slot);
                return;
            };
            let count = waiting.len().min(MOST_IN_ROUND);
            waiting.drain(..count).collect()
        };
        play(&worker, slot, batch).await;
    }
}

async fn play(worker: &Rc<Worker>, slot: u16, batch: Vec<Waiting>) {
    let (mut connection, footing) = match find_footing(worker, slot).await {
        Ok(found) => found,
        Err(text) => return batch.into_iter().for_each(|waiting| waiting.asker.tell(Err(Undone::Surely(text.clone())))),
    };
    let now = Instant::now();
    let (batch, late): (Vec<Waiting>, Vec<Waiting>) = batch.into_iter().partition(|waiting| waiting.until > now);
    let too_late = || Undone::Surely("TRYAGAIN the server took too long to be reached".to_owned());
    late.into_iter().for_each(|waiting| waiting.asker.tell(Err(too_late())));
    if batch.is_empty() {
        return connection.give_back();
    }
    let before = connection.mark();
    let mut askers = Vec::with_capacity(batch.len());
    for Waiting { make, asker, .. } in batch {
        connection.queue(&make(footing.now));
        connection.owe(Owed::Kept);
        askers.push(asker);
    }
    // What the question is about: not every server counts what a script wrote as its client's.
    connection.queue(&mark(slot));
    (0..MARK_COMMANDS).for_each(|_| connection.owe(Owed::Kept));
    ask(&mut connection, &footing);
    if let Err(lost) = settled(&mut connection).await {
        tracing::warn!(node = %connection.address(), error = %lost, "lost the connection on which a write was to become durable");
        let undone = match connection.has_left(before) {
            true => Undone::Perhaps("the connection to the server was lost before it answered".to_owned()),
            false => Undone::Surely("TRYAGAIN the connection to the server was lost".to_owned()),
        };
        return askers.into_iter().for_each(|asker| asker.tell(Err(undone.clone())));
    }
    let mut answers = connection.take_kept();
    let word = Word::taken_from(&mut answers);
    let marked = answers.split_off(askers.len().min(answers.len()));
    let durable = match marked.first().and_then(|answer| answer.strip_prefix(b"-")) {
        Some(error) => Err(format!("the server says ({})", String::from_utf8_lossy(error).trim_end())),
        None => confirm(worker, connection, footing, word).await,
    };
    for (asker, answer) in askers.into_iter().zip(answers) {
        asker.tell(judge(answer, &durable));
    }
}

fn judge(answer: Vec<u8>, durable: &Result<(), String>) -> Result<Done, Undone> {
    let Some(error) = answer.strip_prefix(b"-") else { return Ok(Done { answer, durable: durable.clone() }) };
    let text = String::from_utf8_lossy(error).trim_end().to_owned();
    // A script that fails for another reason than the server's state may have done a part of its work.
    Err(if text.starts_with("ERR ") { Undone::Perhaps(text) } else { Undone::Surely(text) })
}

/// What a server is before a round.
#[derive(Debug, Clone)]
struct Footing {
    /// Who must have it: all replicas that follow it, sorted.
    followers: Vec<NodeAddr>,
    /// Which of them has the least of its data.
    last: Option<String>,
    /// Its clock, in microseconds since 1970.
    now: u64,
    /// Whether it knows WAITAOF.
    counts_fsyncs: bool,
    /// What it calls the history of its data: another, once it has been a replica in between.
    history: Vec<u8>,
}

/// What a server says once it has waited for replicas.
struct Word {
    /// How many have it.
    counts: Vec<u8>,
    /// Who follows it then.
    role: Vec<u8>,
}

impl Word {
    fn taken_from(answers: &mut Vec<Vec<u8>>) -> Self {
        let role = answers.pop().unwrap_or_default();
        Self { counts: answers.pop().unwrap_or_default(), role }
    }
}

/// Asks who has what the connection carried out, and who follows the server behind that.
fn ask(connection: &mut Dedicated, footing: &Footing) {
    let (wire, commands) = footing.question();
    connection.queue(&wire);
    (0..commands).for_each(|_| connection.owe(Owed::Kept));
}

impl Footing {
    /// What to ask, and how many commands that is.
    ///
    /// `WAITAOF` has the server ask its replicas what they have on disk. One that reads the write and the question together answers before it writes
    /// to disk, and says more only a second later. So `WAIT` goes before: what a replica says of what it has read it sends when that is on
    /// disk, and when it is asked again there is nothing left to wait for.
    fn question(&self) -> (Vec<u8>, usize) {
        let replicas = self.followers.len().to_string();
        let step = |steps: u64| (CONFIRM_STEP_MS / steps).to_string();
        let mut wire = Vec::new();
        if self.counts_fsyncs {
            encode::command(&mut wire, &["WAIT", &replicas, &step(2)]);
            encode::command(&mut wire, &["WAITAOF", "1", &replicas, &step(2)]);
        } else {
            encode::command(&mut wire, &["WAIT", &replicas, &step(1)]);
        }
        encode::command(&mut wire, &["ROLE"]);
        (wire, ASKED + usize::from(self.counts_fsyncs))
    }

    /// Whether the answer to the question says that it is on disk everywhere. Where others follow than before, those may be who was counted.
    fn confirms(&self, word: &Word) -> bool {
        followers_of(&word.role).as_ref() == Some(&self.followers) && self.have_it(&word.counts)
    }

    fn have_it(&self, counts: &[u8]) -> bool {
        let reached = |count: Option<i64>, least: usize| {
            count.is_some_and(|count| usize::try_from(count).is_ok_and(|count| count >= least))
        };
        match reply::elements(counts).as_deref() {
            Some([own, replicas]) => {
                self.counts_fsyncs && reached(reply::integer(own), 1) && reached(reply::integer(replicas), self.followers.len())
            }
            Some(_) => false,
            None => !self.counts_fsyncs && reached(reply::integer(counts), self.followers.len()),
        }
    }
}

/// Why a server is not fit for a round.
enum Unfit {
    /// It may be soon, or another is.
    NotNow(String),
    /// It is not made for it.
    Never(String),
}

/// A connection to the slot's primary, which has what a round needs.
async fn find_footing(worker: &Rc<Worker>, slot: u16) -> Result<(Dedicated, Footing), String> {
    let until = Instant::now() + FIT_WITHIN;
    loop {
        let mut connection = acquire(worker, &Target::Slot(slot), Lane::default(), Hold::Brief).await?;
        match look(worker, &mut connection).await {
            Ok(footing) => return Ok((connection, footing)),
            Err(Unfit::Never(text)) => {
                connection.give_back();
                return Err(text);
            }
            Err(Unfit::NotNow(text)) if Instant::now() >= until => return Err(text),
            Err(Unfit::NotNow(_)) => {
                connection.give_back();
                worker.refresh_topology();
                pause(worker).await;
            }
        }
    }
}

async fn pause(worker: &Rc<Worker>) {
    sleep(Duration::from_millis(FIT_LOOK_MS / 2 + u64::from(worker.random()) % FIT_LOOK_MS)).await;
}

/// Looks at the server: whether it is a primary that all follow who might be promoted in its place, how it writes to disk, and what time it
/// has.
async fn look(worker: &Rc<Worker>, connection: &mut Dedicated) -> Result<Footing, Unfit> {
    let mut wire = Vec::new();
    encode::command(&mut wire, &["ROLE"]);
    encode::command(&mut wire, &["TIME"]);
    encode::command(&mut wire, &["WAITAOF", "0", "0", "1"]);
    encode::command(&mut wire, &["INFO", "replication"]);
    let is_vouched_for = worker.policy().writes_to_disk();
    if !is_vouched_for {
        encode::command(&mut wire, &["CONFIG", "GET", "append*"]);
    }
    connection.queue(&wire);
    (0..4 + usize::from(!is_vouched_for)).for_each(|_| connection.owe(Owed::Kept));
    let lost = |error: Broken| Unfit::NotNow(format!("TRYAGAIN the connection to the server was lost ({error})"));
    settled(connection).await.map_err(lost)?;
    let answers = connection.take_kept();
    let [role, time, waitaof, info, config @ ..] = answers.as_slice() else {
        return Err(Unfit::NotNow("TRYAGAIN the server gave an unexpected answer".to_owned()));
    };
    let Some(followers) = followers_of(role) else {
        return Err(Unfit::NotNow("TRYAGAIN the server is no primary any more".to_owned()));
    };
    let Some(heirs) = worker.router().heirs_at(connection.address()) else {
        return Err(Unfit::NotNow(format!("NOREPLICAS {HEIRS_UNKNOWN}")));
    };
    if followers.is_empty() {
        // A primary that has been replaced, and does not know it yet, has none.
        return Err(Unfit::NotNow(format!("NOREPLICAS 0 of {} replicas follow the server", heirs.len().max(1))));
    }
    if let [config] = config {
        check_disk(config).map_err(Unfit::Never)?;
        check_disks(worker, &followers).await?;
    }
    let now = clock_of(time).ok_or_else(|| Unfit::NotNow("TRYAGAIN the server does not tell the time".to_owned()))?;
    let history =
        history_of(info).ok_or_else(|| Unfit::NotNow("TRYAGAIN the server does not tell its replication ID".to_owned()))?;
    check_heirs(worker, &heirs, &followers).await.map_err(|electable| Unfit::NotNow(format!("NOREPLICAS {electable}")))?;
    Ok(Footing { followers, last: last_of(info), now, counts_fsyncs: waitaof.first() != Some(&b'-'), history })
}

/// Whether the server has each write on disk before it answers.
fn check_disk(config: &[u8]) -> Result<(), String> {
    if let Some(error) = config.strip_prefix(b"-") {
        let said = String::from_utf8_lossy(error).trim_end().to_owned();
        return Err(format!("JOURNAL the server does not tell whether it writes to disk ({said}): let the login use CONFIG GET"));
    }
    let words = reply::elements(config).unwrap_or_default();
    let says = |name: &[u8], value: &[u8]| {
        words.chunks_exact(2).any(|pair| reply::text(pair[0]) == Some(name) && reply::text(pair[1]) == Some(value))
    };
    if says(b"appendonly", b"yes") && says(b"appendfsync", b"always") {
        Ok(())
    } else {
        Err("JOURNAL the server does not write each command to disk: it needs appendonly yes and appendfsync always".to_owned())
    }
}

/// Whether all replicas have.
async fn check_disks(worker: &Worker, followers: &[NodeAddr]) -> Result<(), Unfit> {
    let mut disks = worker.rounds().disks.take();
    let checked = disks.check(followers, &worker.access()).await;
    worker.rounds().disks.borrow_mut().absorb(disks);
    checked.map_err(|careless| match careless {
        Careless::Silent(_) => Unfit::NotNow(format!("NOREPLICAS {careless}")),
        Careless::Settings(_) | Careless::Refused(..) => Unfit::Never(format!("JOURNAL {careless}")),
    })
}

fn history_of(info: &[u8]) -> Option<Vec<u8>> {
    let mut lines = reply::text(info)?.split(|byte| *byte == b'\n');
    lines.find_map(|line| line.strip_prefix(b"master_replid:")).map(|id| id.trim_ascii().to_vec())
}

/// Which of a primary's replicas has the least of its data, as they told it.
fn last_of(info: &[u8]) -> Option<String> {
    let lines = std::str::from_utf8(reply::text(info)?).ok()?.lines();
    let replicas = lines.filter(|line| line.starts_with("slave")).filter_map(|line| {
        let field = |name: &str| line.split_once(':')?.1.trim_end().split(',').find_map(|field| field.strip_prefix(name));
        Some((field("offset=")?.parse::<u64>().ok()?, format!("{}:{}", field("ip=")?, field("port=")?)))
    });
    replicas.min().map(|(_, address)| address)
}

fn clock_of(time: &[u8]) -> Option<u64> {
    let parts = reply::elements(time)?;
    let number = |at: usize| std::str::from_utf8(reply::text(parts.get(at)?)?).ok()?.parse::<u64>().ok();
    number(0)?.checked_mul(1_000_000)?.checked_add(number(1)?)
}

/// Waits until what the connection carried out is on disk everywhere, given the answer to the first question.
async fn confirm(worker: &Rc<Worker>, mut connection: Dedicated, mut footing: Footing, mut word: Word) -> Result<(), String> {
    let until = Instant::now() + CONFIRMED_WITHIN;
    while !footing.confirms(&word) {
        if let Some(error) = word.counts.strip_prefix(b"-") {
            return Err(format!("the server says ({})", String::from_utf8_lossy(error).trim_end()));
        }
        if Instant::now() >= until {
            let last = footing.last.map_or_else(String::new, |last| format!(", {last} least of all"));
            return Err(format!("not all of {} replicas had it on disk in time{last}", footing.followers.len()));
        }
        worker.refresh_topology();
        footing = match look(worker, &mut connection).await {
            Ok(found) if found.history == footing.history => found,
            Ok(_) => return Err("another server was the primary in between".to_owned()),
            Err(Unfit::Never(text)) => return Err(text),
            Err(Unfit::NotNow(_)) => {
                pause(worker).await;
                continue;
            }
        };
        ask(&mut connection, &footing);
        settled(&mut connection).await.map_err(|error| format!("the connection to the server was lost ({error})"))?;
        word = Word::taken_from(&mut connection.take_kept());
    }
    connection.give_back();
    Ok(())
}

async fn settled(connection: &mut Dedicated) -> Result<(), Broken> {
    timeout(ANSWERED_WITHIN, settle(connection, true)).await.unwrap_or(Err(Broken::Silent))
}
