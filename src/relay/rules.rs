//! The rules as a relay needs them: which journals there are, who is told of which key, and which databases' changes are followed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::changes::followed::Followed;
use super::footing::Disk;
use crate::journal::Partition;
use crate::origin::{Carriage, Ledger, Loader, OriginError, Origins, Writer};
use crate::policy::snapshot::{Origin, OriginKind};
use crate::policy::{JournalName, KeyPattern, Mode, Rule, RuleIndex, Snapshot, Span, WriteBehind};

/// What a rule's writes go to.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// The rule's name.
    pub rule: String,
    /// The origin's name.
    pub origin: String,
    /// Whether the origin keeps an account of what it was told.
    pub keeps_account: bool,
    /// How many writes it takes at once.
    pub at_once: usize,
    /// How long one may take at most.
    pub timeout_ms: u64,
    /// Who tells it.
    pub writer: Writer,
}

/// The rules of a snapshot. Immutable: a change makes another one.
#[derive(Debug)]
pub struct Rules {
    journals: BTreeMap<JournalName, Outlets>,
    queues: BTreeMap<JournalName, Arc<Inlets>>,
    disk: Disk,
    feeds: Vec<Arc<Followed>>,
    origins: Origins,
}

/// The rules that write to one journal, in order.
#[derive(Debug, Default)]
struct Outlets {
    index: RuleIndex,
    patterns: Vec<KeyPattern>,
    outlets: Vec<Outlet>,
    /// The most entries that are read at once.
    batch: usize,
}

/// The rules by which keys are loaded for sidecars, by one queue, in order.
#[derive(Debug)]
pub struct Inlets {
    /// The most requests that are at the origin at once.
    pub at_once: usize,
    /// How long one may take.
    pub timeout: Span,
    index: RuleIndex,
    loaders: Vec<Loader>,
}

impl Inlets {
    fn new(snapshot: &Snapshot, origin: &Origin, origins: &Origins) -> Result<Self, OriginError> {
        let loads = |rule: &&Rule| rule.mode == Mode::Enforce;
        let load = |rule: &Rule| Some((rule.keys.clone(), rule.strategy.loads()?.load.clone()));
        let of_it = snapshot.rules.iter().filter(loads).filter_map(load).filter(|(_, load)| load.origin == origin.name);
        let (mut patterns, mut loaders) = (Vec::new(), Vec::new());
        for (keys, load) in of_it {
            loaders.push(origins.loader(&keys, &load)?);
            patterns.push(keys);
        }
        let at_once = origin.max_total_connections.unwrap_or(origin.max_connections) as usize;
        Ok(Self { at_once, timeout: origin.timeout, index: RuleIndex::new(patterns), loaders })
    }

    /// The first rule that covers a key, by its place among those of the queue. `None`: there is none.
    pub fn find(&self, key: &[u8]) -> Option<usize> {
        self.index.find(key)
    }

    /// Who loads keys of the rule at this place.
    pub fn loader(&self, rule: usize) -> Option<&Loader> {
        self.loaders.get(rule)
    }

    /// Closes the origin's connections over which nothing is under way.
    pub fn close_idle(&self) {
        self.loaders.iter().for_each(Loader::close_idle);
    }
}

impl Rules {
    /// Prepares the rules of a snapshot, whose origins are `origins`. Connects to nothing.
    pub fn new(snapshot: &Snapshot, origins: &Origins) -> Result<Self, OriginError> {
        let mut journals: BTreeMap<JournalName, Outlets> = BTreeMap::new();
        for rule in &snapshot.rules {
            let Some(behind) = rule.strategy.behind() else { continue };
            let outlets = journals.entry(behind.journal.name.clone()).or_default();
            outlets.batch = outlets.batch.max(behind.journal.batch as usize);
            outlets.patterns.push(rule.keys.clone());
            outlets.outlets.push(outlet(snapshot, rule, behind, origins)?);
        }
        for outlets in journals.values_mut() {
            outlets.index = RuleIndex::new(outlets.patterns.drain(..));
        }
        let inlets = |(queue, origin): (&JournalName, _)| {
            Ok::<_, OriginError>((queue.clone(), Arc::new(Inlets::new(snapshot, origin, origins)?)))
        };
        let queues = snapshot.load_queues().map(inlets).collect::<Result<_, _>>()?;
        origins.load_for_all();
        let feeds = snapshot.feeds.iter().map(|feed| Followed::new(snapshot, feed).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { journals, queues, disk: disk(snapshot), feeds, origins: origins.clone() })
    }

    /// What tells how the servers write to disk.
    pub fn disk(&self) -> Disk {
        self.disk
    }

    /// The journals.
    pub fn journals(&self) -> impl ExactSizeIterator<Item = &JournalName> {
        self.journals.keys()
    }

    /// The queues by which keys are loaded for sidecars.
    pub fn queues(&self) -> impl Iterator<Item = &JournalName> {
        self.queues.keys()
    }

    /// What is loaded by a queue. `None`: nothing is any more.
    pub fn inlets(&self, queue: &JournalName) -> Option<&Arc<Inlets>> {
        self.queues.get(queue)
    }

    /// The databases whose changes are followed.
    pub fn feeds(&self) -> &[Arc<Followed>] {
        &self.feeds
    }

    /// The most entries of a journal that are read at once. `None`: no rule writes to it.
    pub fn batch(&self, journal: &JournalName) -> Option<usize> {
        self.journals.get(journal).map(|outlets| outlets.batch)
    }

    /// Where writes of `key` in a journal go: what the first rule says that writes to this journal and covers the key. Whether another rule
    /// covers it by now is no matter: the write was acknowledged under that one. `None`: there is none.
    pub fn outlet(&self, journal: &JournalName, key: &[u8]) -> Option<&Outlet> {
        let Outlets { index, outlets, .. } = self.journals.get(journal)?;
        outlets.get(index.find(key)?)
    }

    /// The account of a partition that an origin keeps.
    pub fn ledger(&self, origin: &str, partition: &Partition, journal: &JournalName) -> Result<Option<Ledger>, OriginError> {
        self.origins.ledger(origin, &format!("{journal}/{}", partition.number()))
    }

    /// The origins, whose connections the next rules go on with.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }
}

/// What tells how the servers of a snapshot write to disk.
pub fn disk(snapshot: &Snapshot) -> Disk {
    if snapshot.writes_to_disk { Disk::VouchedFor } else { Disk::Asked }
}

fn outlet(snapshot: &Snapshot, rule: &Rule, behind: &WriteBehind, origins: &Origins) -> Result<Outlet, OriginError> {
    let load = &behind.read.load;
    let origin = snapshot.origins.iter().find(|origin| origin.name == load.origin);
    let origin = origin.ok_or_else(|| OriginError::Unknown(load.origin.clone()))?;
    Ok(Outlet {
        rule: rule.name.clone(),
        origin: origin.name.clone(),
        keeps_account: matches!(origin.kind, OriginKind::Sql { .. }),
        at_once: origin.max_connections as usize,
        timeout_ms: origin.timeout.as_millis(),
        writer: origins.writer(&rule.keys, load, &behind.store, Carriage::Behind)?.marked(snapshot.slot_of(&load.origin)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_write_goes_where_the_rule_of_its_journal_says() {
        let read = json!({
            "ttl": {"default": "1m", "max": "1h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "0s", "lease": "3s", "wait": "1s",
            "load": {"origin": "db", "query": {"sql": {"read": "SELECT v FROM t WHERE id = $id"}}, "reply": null},
        });
        let behind = |name: &str, keys: &str, journal: &str| {
            let store = json!({"sql": {"write": "INSERT INTO t VALUES ($id, $value)"}});
            let journal = json!({"name": journal, "maxLag": "30s", "maxDepth": 4096, "maxBytes": "64Mi", "batch": 50});
            json!({"name": name, "keys": keys, "strategy": {"writeBehind": {"read": read, "store": store, "journal": journal}}})
        };
        let text = json!({
            "version": 5, "requires": 5, "generation": 1, "unmatched": {"bypass": {}},
            "cluster": {"name": "main", "topology": {"cluster": {"seeds": ["127.0.0.1:7000"]}}},
            "origins": [{"name": "db", "kind": {"sql": {"url": {"value": "sqlite://x"}}}, "maxConnections": 1, "connectTimeout": "1s",
                "timeout": "1s"}],
            "rules": [
                {"name": "now", "keys": "user:{id}", "strategy": {"bypass": {}}},
                behind("earlier", "user:{id}", "one"),
                behind("rest", "user:{id…}", "one"),
                behind("other", "user:{id}", "two"),
            ],
        });
        let snapshot = Snapshot::parse(text.to_string().as_bytes()).expect("valid");
        let rules = Rules::new(&snapshot, &Origins::new(&snapshot.origins).expect("origins")).expect("rules");
        let rule = |journal: &str, key: &str| {
            let journal = journal.parse().expect("a name");
            rules.outlet(&journal, key.as_bytes()).map(|outlet| outlet.rule.clone())
        };
        assert_eq!(rule("one", "user:7").as_deref(), Some("earlier"));
        assert_eq!(rule("one", "user:7:x").as_deref(), Some("rest"));
        assert_eq!((rule("two", "user:7").as_deref(), rule("two", "user:7:x")), (Some("other"), None));
        assert_eq!((rule("three", "user:7"), rules.batch(&"one".parse().expect("a name"))), (None, Some(50)));
    }
}
