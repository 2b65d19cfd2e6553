//! The relay of a run, as a process: from the first moment at which there is anything for it to do, to the end of the run.
//!
//! Its snapshot is a file of its own, with its own login at the servers. It also has the rules that wrote behind in earlier manifests and
//! do so no more: what their journals still hold is carried to where it was meant to go.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use super::DevError;
use super::manifests::{ManifestError, write_snapshot};
use super::process::{Process, Watchdog, bound_log, last_lines};
use super::restart::Restarts;
use super::servers::Ended;
use crate::policy::snapshot::{Allow, Auth, Origin, OriginKind, Snapshot, required_form};
use crate::policy::{JournalName, Mode, Rule, Strategy};
use crate::relay::desk::{Desk, DeskError};

/// How long a look at journals may take.
const LOOK_WITHIN: Duration = Duration::from_secs(3);

/// What journals hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    /// Writes that have not reached their origins.
    pub writes: u64,
    /// Those that an origin refused, and that wait for a person.
    pub dead: u64,
}

impl Left {
    /// The writes, in words.
    pub fn writes_in_words(self) -> String {
        counted(self.writes, "write")
    }

    /// The dead letters, in words.
    pub fn dead_in_words(self) -> String {
        counted(self.dead, "dead letter")
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The relay, where there is anything for it to do.
#[derive(Debug)]
pub struct Relay {
    program: PathBuf,
    path: PathBuf,
    log: PathBuf,
    log_options: Vec<String>,
    /// The login at the servers, where they ask for one.
    auth: Option<Auth>,
    /// What the file holds.
    snapshot: Option<Snapshot>,
    process: Option<Process>,
    restarts: Restarts,
}

impl Relay {
    /// Starts nothing, and remembers what an earlier run in the same directory left.
    pub fn new(program: PathBuf, run_dir: &Path, log_options: &[String], auth: Option<Auth>) -> Self {
        let path = run_dir.join("relay.json");
        let snapshot = fs::read(&path).ok().and_then(|bytes| Snapshot::parse(&bytes).ok());
        let (log, log_options) = (run_dir.join("relay.log"), log_options.to_vec());
        Self { program, path, log, log_options, auth, snapshot, process: None, restarts: Restarts::default() }
    }

    /// Takes up what sidecars are told.
    pub fn follow(&mut self, told: &Snapshot) -> Result<(), ManifestError> {
        let mut snapshot = with_earlier(told, self.snapshot.as_ref());
        snapshot.cluster.auth = self.auth.clone();
        let followed = self.snapshot.as_ref().is_some_and(|earlier| !earlier.feeds.is_empty());
        if snapshot.needs_relay() || followed {
            write_snapshot(&self.path, &snapshot)?;
            self.snapshot = Some(snapshot);
        }
        Ok(())
    }

    /// The journals that rules write to, or wrote to.
    pub fn journals(&self) -> BTreeSet<JournalName> {
        self.snapshot.iter().flat_map(|snapshot| &snapshot.rules).filter_map(journal_of).cloned().collect()
    }

    /// Of those the ones that a rule writes to now, and would not under `next`.
    pub fn given_up_by(&self, now: &Snapshot, next: &Snapshot) -> BTreeSet<JournalName> {
        let stays = |rule: &&Rule| next.rules.iter().any(|other| writes_alike(rule, other));
        now.rules.iter().filter(|rule| !stays(rule)).filter_map(journal_of).cloned().collect()
    }

    /// What these journals still hold. `None`: they cannot be asked now.
    pub async fn left(&self, journals: &BTreeSet<JournalName>) -> Option<Left> {
        // What servers there are is no news to who asks for something else.
        let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::default());
        let look = async {
            let mut desk = Desk::open(&self.path).await?;
            let mut left = Left::default();
            for journal in journals {
                for status in desk.status(journal).await? {
                    left.writes += status.depth;
                    left.dead += status.dead;
                }
            }
            Ok::<_, DeskError>(left)
        };
        timeout(LOOK_WITHIN, look).await.ok()?.ok()
    }

    /// Starts it where it is to run, does not, and may.
    pub async fn start(&mut self, watchdog: &mut Watchdog) -> Result<(), DevError> {
        if self.snapshot.is_none() || self.process.is_some() || !self.restarts.may_start() {
            return Ok(());
        }
        self.restarts.started();
        let snapshot = self.path.to_string_lossy().into_owned();
        // A machine of one's own notices at once when a process is gone. What is cached ends with the run, and with it what a slot is for.
        let mut arguments = ["relay", "--snapshot", &snapshot, "--claim", "3s", "--drop-slots"].map(str::to_owned).to_vec();
        arguments.extend_from_slice(&self.log_options);
        let started = Process::start(watchdog, &self.program, &arguments, &self.log).await;
        self.process = Some(started.map_err(|source| DevError::Start { what: "the relay".to_owned(), source })?);
        Ok(())
    }

    /// Notices that it has ended.
    pub async fn reap(&mut self, watchdog: &mut Watchdog) -> Option<Ended> {
        bound_log(&self.log);
        let status = self.process.as_mut().and_then(Process::ended)?;
        if let Some(process) = self.process.take() {
            process.clear(watchdog).await;
        }
        self.restarts.ended();
        // Nobody waits for it: it may take as many starts as it needs.
        Some(Ended { name: "the relay".to_owned(), how: status.to_string(), said: last_lines(&self.log, 3), hopeless: false })
    }

    /// Ends it.
    pub async fn stop(&mut self, watchdog: &mut Watchdog) {
        if let Some(process) = self.process.take() {
            process.stop(watchdog).await;
        }
    }
}

/// Where a rule journals writes. One that only observes journals none.
fn journal_of(rule: &Rule) -> Option<&JournalName> {
    let behind = rule.strategy.behind().filter(|_| rule.mode == Mode::Enforce)?;
    Some(&behind.journal.name)
}

/// Whether two rules write the same keys to the same journal.
fn writes_alike(one: &Rule, other: &Rule) -> bool {
    journal_of(one).is_some() && journal_of(one) == journal_of(other) && one.keys == other.keys
}

/// What sidecars are told, and behind it those rules of an earlier snapshot of the relay that write behind otherwise, with their origins.
fn with_earlier(told: &Snapshot, earlier: Option<&Snapshot>) -> Snapshot {
    // A relay flushes nothing, and what sidecars may is no concern of it.
    let mut snapshot = Snapshot { allow: Allow::default(), ..told.clone() };
    for rule in earlier.iter().flat_map(|earlier| &earlier.rules) {
        let stays = told.rules.iter().any(|other| writes_alike(rule, other));
        if let (false, Some(journal), Some(earlier)) = (stays, journal_of(rule), earlier) {
            let rule = renamed(rule, journal, &snapshot);
            if let Some(rule) = with_origin(rule, earlier, &mut snapshot) {
                snapshot.rules.push(rule);
            }
        }
    }
    snapshot.requires = required_form(&snapshot.origins, &snapshot.rules);
    snapshot
}

/// The rule under a name that is free.
fn renamed(rule: &Rule, journal: &JournalName, among: &Snapshot) -> Rule {
    let mut rule = rule.clone();
    while among.rules.iter().any(|other| other.name == rule.name) {
        rule.name = format!("{journal}/{}", rule.name);
    }
    rule
}

/// The rule, whose origin `snapshot` has then: its own of that name, or the earlier one.
fn with_origin(mut rule: Rule, earlier: &Snapshot, snapshot: &mut Snapshot) -> Option<Rule> {
    let name = rule.strategy.loads()?.load.origin.clone();
    let mut origin = earlier.origins.iter().find(|origin| origin.name == name)?.clone();
    let is_sql = |origin: &Origin| matches!(origin.kind, OriginKind::Sql { .. });
    let namesake = snapshot.origins.iter().find(|other| other.name == name);
    match namesake.map(|other| is_sql(other) == is_sql(&origin)) {
        Some(true) => return Some(rule),
        Some(false) => origin.name = format!("earlier/{name}"),
        None => {}
    }
    if let Strategy::WriteBehind(behind) = &mut rule.strategy {
        behind.read.load.origin.clone_from(&origin.name);
    }
    if !snapshot.origins.iter().any(|other| other.name == origin.name) {
        snapshot.origins.push(origin);
    }
    Some(rule)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rule(name: &str, keys: &str, origin: &str, journal: &str) -> Value {
        let read = json!({
            "ttl": {"default": "1m", "max": "1h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "0s", "lease": "3s", "wait": "1s",
            "load": {"origin": origin, "query": {"sql": {"read": "SELECT v FROM t WHERE id = $id"}}, "reply": null},
        });
        let store = json!({"sql": {"write": "INSERT INTO t VALUES ($id, $value)"}});
        let journal = json!({"name": journal, "maxLag": "30s", "maxDepth": 4096, "maxBytes": "64Mi", "batch": 500});
        json!({"name": name, "keys": keys, "strategy": {"writeBehind": {"read": read, "store": store, "journal": journal}}})
    }

    fn snapshot(origins: &[(&str, &str)], rules: &[Value], flush: bool) -> Snapshot {
        let origin = |(name, url): &(&str, &str)| {
            let kind = if url.starts_with("http") { "http" } else { "sql" };
            json!({"name": name, "kind": {kind: {"url": {"value": url}}}, "maxConnections": 1, "connectTimeout": "1s", "timeout": "1s"})
        };
        let origins: Vec<Value> = origins.iter().map(origin).collect();
        let text = json!({
            "version": 5, "requires": 5, "generation": 1, "unmatched": {"bypass": {}}, "allow": {"flush": flush},
            "cluster": {"name": "main", "topology": {"cluster": {"seeds": ["127.0.0.1:7000"]}}},
            "origins": origins, "rules": rules,
        });
        Snapshot::parse(text.to_string().as_bytes()).expect("valid")
    }

    fn names(snapshot: &Snapshot) -> Vec<&str> {
        snapshot.rules.iter().map(|rule| rule.name.as_str()).collect()
    }

    #[test]
    fn what_wrote_behind_stays_the_relays_until_it_does_so_again() {
        let earlier = snapshot(&[("db", "sqlite://a")], &[rule("user", "user:{id}", "db", "j")], false);
        let through = json!({"name": "user", "keys": "user:{id}", "strategy": {"bypass": {}}});
        let merged = with_earlier(&snapshot(&[], &[through], true), Some(&earlier));
        merged.check().expect("a relay takes it");
        assert_eq!((names(&merged), merged.requires), (vec!["user", "j/user"], 5));
        assert_eq!(merged.origins, earlier.origins);
        let again = with_earlier(&earlier, Some(&merged));
        assert_eq!(names(&again), ["user"], "it is the same rule");
        let narrower = snapshot(&[("db", "sqlite://b")], &[rule("user", "user:{id}:x", "db", "j")], false);
        let merged = with_earlier(&narrower, Some(&earlier));
        assert_eq!(names(&merged), ["user", "j/user"], "the journal may hold keys that only the earlier one covers");
        assert_eq!(merged.origins, narrower.origins, "an origin is where the manifests say that it is now");
    }

    #[test]
    fn an_origin_of_another_kind_is_another_origin() {
        let earlier = snapshot(&[("db", "sqlite://a")], &[rule("user", "user:{id}", "db", "j")], false);
        let merged = with_earlier(&snapshot(&[("db", "http://h")], &[], false), Some(&earlier));
        merged.check().expect("a relay takes it");
        assert_eq!(merged.origins.iter().map(|origin| origin.name.as_str()).collect::<Vec<_>>(), ["db", "earlier/db"]);
        assert_eq!(merged.rules[0].strategy.loads().expect("it loads").load.origin, "earlier/db");
    }

    #[test]
    fn what_a_change_gives_up_is_known() {
        let relay = Relay::new(PathBuf::new(), Path::new("/nowhere"), &[], None);
        let origins = [("db", "sqlite://a")];
        let now = snapshot(&origins, &[rule("a", "a:{id}", "db", "j"), rule("b", "b:{id}", "db", "k")], false);
        assert!(relay.given_up_by(&now, &now).is_empty());
        let next = snapshot(&origins, &[rule("a", "a:{id}", "db", "j"), rule("b", "b:{id}", "db", "other")], false);
        assert_eq!(relay.given_up_by(&now, &next).iter().map(JournalName::as_str).collect::<Vec<_>>(), ["k"]);
        let mut observing = now.clone();
        observing.rules[0].mode = Mode::Observe;
        assert_eq!(relay.given_up_by(&now, &observing).iter().map(JournalName::as_str).collect::<Vec<_>>(), ["j"]);
    }
}
