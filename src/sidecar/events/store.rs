//! What is kept in the cache: whose turn it is to read, how far the stream was read, and what takes longer.
//!
//! Both keys lie in the stream's slot, so they are lost with it, and a server that has one has what was written before it. Whoever
//! writes proves in the same script that the turn is still theirs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::jobs::{Jobs, Target};
use super::position::{EntryId, Position};
use crate::policy::binding::BindingName;
use crate::policy::events;
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::worker::Worker;

/// For how long a turn is held that nobody gives back.
const TURN_MS: &str = "4000";
/// For how long it is remembered how far the stream was read, without anybody who reads: thirty days. Then it is read from its
/// beginning, and what it has lost by then counts as lost.
const STATE_MS: &str = "2592000000";

/// KEYS: turn, state. ARGV: who asks, for how long, position, jobs, how long the state is kept. 1: it is written.
const SAVE: &str = "\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('HSET', KEYS[2], 'position', ARGV[3], 'jobs', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1";

/// KEYS: turn. ARGV: who asks.
const LEAVE: &str = "\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1";

/// What is kept of one binding's reading.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kept {
    /// How far the stream was read.
    pub position: Position,
    /// What takes longer.
    pub jobs: Jobs,
}

impl Kept {
    /// Whether this event was read, and all walks over the keys of these rules that it or an earlier one wanted have come to their end.
    pub fn has_walked<'r>(&self, mut rules: impl Iterator<Item = &'r str>, event: EntryId) -> bool {
        self.position.id >= event && !rules.any(|rule| self.jobs.awaits(&Target::Rule(rule.to_owned()), event))
    }
}

/// Where it is kept, and who writes there.
#[derive(Debug)]
pub struct Store {
    turn: String,
    state: String,
    me: String,
    /// What the server calls the scripts that it has.
    loaded: RefCell<HashMap<&'static str, String>>,
}

impl Store {
    /// Of a binding's sidecars, or of those without one. This one has a name of its own from now on.
    pub fn new(binding: Option<&BindingName>) -> Self {
        let me = format!("{:016x}", fastrand::u64(..));
        Self { turn: events::turn_key(binding), state: events::state_key(binding), me, loaded: RefCell::default() }
    }

    /// Whether there is a stream, or was one: without either nothing is kept.
    ///
    /// # Errors
    /// The text of an error reply.
    pub async fn is_needed(&self, worker: &Rc<Worker>) -> Result<bool, String> {
        let answer = self.ask(worker, &["EXISTS", events::STREAM, &self.state]).await?;
        Ok(reply::integer(&answer) != Some(0))
    }

    /// Takes the turn where nobody else has it, and what was kept by then. `None`: somebody has it.
    ///
    /// # Errors
    /// The text of an error reply.
    pub async fn take(&self, worker: &Rc<Worker>) -> Result<Option<Kept>, String> {
        let taken = self.ask(worker, &["SET", &self.turn, &self.me, "NX", "PX", TURN_MS]).await?;
        if reply::is_null(&taken) { Ok(None) } else { self.look(worker).await.map(Some) }
    }

    /// Writes down how far it is, and holds the turn. `false`: it is another's by now, and nothing was written.
    ///
    /// # Errors
    /// As [`Store::take`].
    pub async fn save(&self, worker: &Rc<Worker>, kept: &Kept) -> Result<bool, String> {
        let jobs = serde_json::to_string(&kept.jobs).map_err(|error| format!("ERR {error}"))?;
        let position = kept.position.to_string();
        let args = [self.me.as_str(), TURN_MS, &position, &jobs, STATE_MS];
        let answer = self.run(worker, SAVE, &[&self.turn, &self.state], &args).await?;
        Ok(reply::integer(&answer) == Some(1))
    }

    /// Gives the turn back.
    pub async fn leave(&self, worker: &Rc<Worker>) {
        let _ = self.run(worker, LEAVE, &[&self.turn], &[&self.me]).await;
    }

    /// What is kept, whoever's turn it is.
    ///
    /// # Errors
    /// As [`Store::take`].
    pub async fn look(&self, worker: &Rc<Worker>) -> Result<Kept, String> {
        let answer = self.ask(worker, &["HMGET", &self.state, "position", "jobs"]).await?;
        Ok(read(&reply::elements(&answer).unwrap_or_default()))
    }

    /// Runs a script by its name, and has the server read it first where it does not know it.
    async fn run(&self, worker: &Rc<Worker>, script: &'static str, keys: &[&str], args: &[&str]) -> Result<Vec<u8>, String> {
        let count = keys.len().to_string();
        let known = self.loaded.borrow().get(script).cloned();
        for sha in [known, None] {
            let sha = match sha {
                Some(sha) => sha,
                None => self.load(worker, script).await?,
            };
            let words: Vec<&str> = ["EVALSHA", &sha, &count].into_iter().chain([keys, args].concat()).collect();
            match self.ask(worker, &words).await {
                Err(text) if text.starts_with("NOSCRIPT") => {}
                answer => return answer,
            }
        }
        Err("TRYAGAIN the server forgets scripts as soon as it has read them".to_owned())
    }

    async fn load(&self, worker: &Rc<Worker>, script: &'static str) -> Result<String, String> {
        let answer = self.ask(worker, &["SCRIPT", "LOAD", script]).await?;
        let sha = String::from_utf8_lossy(reply::text(&answer).unwrap_or_default()).into_owned();
        self.loaded.borrow_mut().insert(script, sha.clone());
        Ok(sha)
    }

    async fn ask(&self, worker: &Rc<Worker>, words: &[&str]) -> Result<Vec<u8>, String> {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        ask(worker, invalidation_slot(worker, events::STREAM.as_bytes()), Lane::default(), &words).await
    }
}

/// Reads the two fields. What a later version wrote, or nobody, counts as nothing: then the stream is read from its beginning.
fn read(fields: &[&[u8]]) -> Kept {
    let text = |index: usize| std::str::from_utf8(reply::text(fields.get(index)?)?).ok();
    let position = text(0).and_then(|text| text.parse().ok());
    let jobs = text(1).map_or_else(|| Some(Jobs::default()), |text| serde_json::from_str(text).ok());
    match (position, jobs) {
        (Some(position), Some(jobs)) => Kept { position, jobs },
        _ => Kept::default(),
    }
}
