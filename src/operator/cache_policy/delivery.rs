//! What is to become of one binding: which snapshot is to be in force, under which generation, and which files it needs. Pure.
//!
//! - What policies say comes into force where all is there that they name. Otherwise the last good snapshot stays; only where there is none,
//!   the policies that have what they name begin without the others.
//! - Where no policy is left, the last snapshot says farewell: no rules, and a TTL for every key.
//! - Where the CacheCluster is, is always said anew: sidecars of a snapshot that stays have to find it, too.
//! - Sidecars may be older than this operator. What they all understand, by what they tell, is what is said; where none has told, what was
//!   last said to them. So a new operator changes nothing before it knows who listens, and says all once the last old one is gone.
//! - A generation is never given twice, and only rises. The first of a binding is the time in seconds: one that was removed and is made
//!   again under its name goes on above what its cache, or a pod on its way out, may still hold.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::merge::Merged;
use crate::api::compile::{DEFAULT_JITTER, DEFAULT_MAX_TTL, DEFAULT_TTL};
use crate::policy::snapshot::Cluster;
use crate::policy::{Lifetime, Snapshot, Unmatched};

/// How long the files of an origin stay that the newest snapshot does not name: sidecars may still follow the one before.
pub const FILES_STAY: Duration = Duration::from_secs(600);

/// What stands of a binding.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The snapshot as it lies there.
    pub text: Option<Arc<str>>,
    /// The same, where it can be read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The newest generation that was ever given.
    pub newest: Option<u64>,
    /// The generation of a newer snapshot that the cache holds, and that nobody here knows.
    pub in_cache: Option<u64>,
    /// The newest form that all sidecars understand. `None`: that is not known.
    pub understood: Option<u32>,
    /// Whether the servers write each command to disk before they answer. `None`: that is not known.
    pub durable: Option<bool>,
}

/// What policies make of a binding.
#[derive(Debug, Clone, Copy)]
pub enum Wish<'a> {
    /// This.
    Merged(&'a Merged),
    /// This, and maybe more: policies that cannot be read may have a part in it. It stands only where nothing does.
    Partial(&'a Merged),
    /// There are policies, and none is accepted.
    Refused,
    /// There is none.
    Nobody,
}

/// What is to be in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The snapshot, with its generation.
    pub snapshot: Snapshot,
    /// Whether it is another than the one that stands.
    pub is_new: bool,
    /// Whether it is what policies say now: then the user of the binding is to be able to do just that, before any sidecar hears of it.
    /// Otherwise the user stays as it is.
    pub is_wished: bool,
}

/// What is to be in force. `cluster`: how the CacheCluster is found, where that is known. `None`: nothing, since nothing ever was.
pub fn decide(standing: &Standing, wish: Wish<'_>, cluster: Option<&Cluster>, now: SystemTime) -> Option<Decision> {
    let before = standing.snapshot.as_deref();
    let (mut snapshot, is_wished) = match wish {
        Wish::Merged(Merged { snapshot: Some(merged), is_complete, .. }) if *is_complete || before.is_none() => {
            (merged.clone(), true)
        }
        Wish::Partial(Merged { snapshot: Some(merged), .. }) if before.is_none() => (merged.clone(), true),
        Wish::Merged(_) | Wish::Partial(_) | Wish::Refused => (before?.clone(), false),
        Wish::Nobody if is_farewell(before?) => (before?.clone(), false),
        Wish::Nobody => (before?.farewell(0, lifetime(before?)), false),
    };
    if let Some(cluster) = cluster.filter(|_| !is_wished) {
        // How long a command is tried stays as policies said it, with all else that they said.
        let patience = if is_farewell(&snapshot) { cluster.patience } else { snapshot.cluster.patience };
        snapshot.cluster = Cluster { patience, ..cluster.clone() };
    }
    // What is no longer so must not go on being said, whatever else stays as it was.
    if let Some(durable) = standing.durable {
        snapshot = snapshot.vouched_for(durable);
    }
    if let Some(form) = standing.understood.or(before.map(|before| before.version)) {
        snapshot = snapshot.in_form(form);
    }
    snapshot.generation = before.map_or(0, |before| before.generation);
    // What the cache holds would be followed instead.
    let is_new = before != Some(&snapshot) || standing.in_cache > before.map(|before| before.generation);
    if is_new {
        snapshot.generation = next_generation(standing.newest.max(standing.in_cache), now);
    }
    Some(Decision { snapshot, is_new, is_wished })
}

/// Whether it is what the last policy leaves behind: whatever policies say has a rule.
pub fn is_farewell(snapshot: &Snapshot) -> bool {
    snapshot.rules.is_empty()
}

/// The generation after this one.
pub fn next_generation(newest: Option<u64>, now: SystemTime) -> u64 {
    newest.map_or_else(|| now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().max(1), |newest| newest.saturating_add(1))
}

/// The TTL of keys after the last policy: the one that unmatched keys had, or the default.
fn lifetime(snapshot: &Snapshot) -> Lifetime {
    match &snapshot.unmatched {
        Unmatched::Ttl(lifetime) => *lifetime,
        Unmatched::Bypass {} | Unmatched::Refuse {} => {
            Lifetime { default: DEFAULT_TTL, max: DEFAULT_MAX_TTL, jitter: DEFAULT_JITTER }
        }
    }
}

/// A snapshot that was once in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// Its generation.
    pub generation: u64,
    /// When it came.
    pub since: Option<SystemTime>,
    /// The files that it names.
    pub files: BTreeSet<String>,
}

/// The files that some sidecar may still read: those of the newest snapshot, and of earlier ones until [`FILES_STAY`] after the next one
/// came. And when fewer are to be kept, if ever.
pub fn kept_files(past: &[Past], now: SystemTime) -> (BTreeSet<String>, Option<SystemTime>) {
    let mut past: Vec<&Past> = past.iter().collect();
    past.sort_by_key(|past| past.generation);
    let mut kept: BTreeSet<String> = past.last().map(|newest| newest.files.clone()).unwrap_or_default();
    let mut until: Option<SystemTime> = None;
    for pair in past.windows(2) {
        let (earlier, next) = (pair[0], pair[1]);
        let end = next.since.map(|since| since + FILES_STAY);
        if end.is_some_and(|end| now < end) && !earlier.files.is_subset(&kept) {
            kept.extend(earlier.files.iter().cloned());
            until = until.into_iter().chain(end).min();
        }
    }
    (kept, until)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::policy::Span;
    use crate::policy::binding::BindingName;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    /// A snapshot whose one rule is about these keys.
    fn about(keys: &str) -> Snapshot {
        let ttl = json!({"default": "5m", "max": "24h", "jitter": "10%"});
        let snapshot = json!({
            "version": 3, "requires": 1, "generation": 0,
            "cluster": {"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["10.0.0.1:26379"]}}},
            "unmatched": {"bypass": {}}, "origins": [],
            "rules": [{"name": "r", "keys": keys, "strategy": {"cacheAside": {"ttl": ttl}}}],
        });
        serde_json::from_value(snapshot).unwrap()
    }

    fn merged(keys: Option<&str>, is_complete: bool) -> Merged {
        Merged {
            cluster: "main".to_owned(),
            binding: BindingName::of("Deployment", "shop", "main"),
            snapshot: keys.map(about),
            is_complete,
            files: super::super::origins::Files::default(),
        }
    }

    fn standing(decision: &Decision) -> Standing {
        let text = serde_json::to_string(&decision.snapshot).unwrap();
        Standing {
            text: Some(text.as_str().into()),
            snapshot: Snapshot::parse(text.as_bytes()).ok().map(Arc::new),
            newest: Some(decision.snapshot.generation),
            in_cache: None,
            understood: None,
            durable: None,
        }
    }

    #[test]
    fn a_snapshot_comes_once_and_stays_until_it_changes() {
        let wish = merged(Some("a:{id}"), true);
        let first = decide(&Standing::default(), Wish::Merged(&wish), None, at(1_700_000_000)).unwrap();
        assert_eq!((first.snapshot.generation, first.is_new, first.is_wished), (1_700_000_000, true, true));
        let again = decide(&standing(&first), Wish::Merged(&wish), None, at(1_700_000_009)).unwrap();
        assert_eq!((again.snapshot.generation, again.is_new), (1_700_000_000, false));
        let other = decide(&standing(&first), Wish::Merged(&merged(Some("b:{id}"), true)), None, at(9)).unwrap();
        assert_eq!((other.snapshot.generation, other.is_new), (1_700_000_001, true), "a clock that falls back changes nothing");
        assert_eq!(decide(&Standing::default(), Wish::Nobody, None, at(9)), None);
    }

    #[test]
    fn what_nobody_here_remembers_is_gone_on_from() {
        let wish = merged(Some("a:{id}"), true);
        let first = decide(&Standing::default(), Wish::Merged(&wish), None, at(7)).unwrap();
        let standing = |in_cache| Standing { in_cache: Some(in_cache), ..standing(&first) };
        let above = decide(&standing(90), Wish::Merged(&wish), None, at(8)).unwrap();
        assert_eq!((above.snapshot.generation, above.is_new), (91, true));
        assert!(!decide(&standing(7), Wish::Merged(&wish), None, at(8)).unwrap().is_new, "it is the one that stands");
        assert!(!decide(&standing(6), Wish::Merged(&wish), None, at(8)).unwrap().is_new);
    }

    #[test]
    fn what_is_not_complete_stands_only_where_nothing_does() {
        let first = decide(&Standing::default(), Wish::Merged(&merged(Some("a:{id}"), true)), None, at(1)).unwrap();
        for wish in [merged(Some("b:{id}"), false), merged(None, false)] {
            let kept = decide(&standing(&first), Wish::Merged(&wish), None, at(9)).unwrap();
            assert_eq!((&kept.snapshot, kept.is_new, kept.is_wished), (&first.snapshot, false, false));
        }
        assert!(!decide(&standing(&first), Wish::Refused, None, at(9)).unwrap().is_new);
        let whole = merged(Some("b:{id}"), true);
        let kept = decide(&standing(&first), Wish::Partial(&whole), None, at(9)).unwrap();
        assert_eq!((&kept.snapshot, kept.is_new, kept.is_wished), (&first.snapshot, false, false), "there may be more to say");
        assert!(decide(&Standing::default(), Wish::Partial(&whole), None, at(9)).unwrap().is_wished);
        let partial = decide(&Standing::default(), Wish::Merged(&merged(Some("b:{id}"), false)), None, at(9)).unwrap();
        assert!(partial.is_new && partial.is_wished);
        assert_eq!(decide(&Standing::default(), Wish::Merged(&merged(None, false)), None, at(9)), None);
        // A CacheCluster that moved is found all the same.
        let moved = Cluster { name: "moved".to_owned(), ..first.snapshot.cluster.clone() };
        let kept = decide(&standing(&first), Wish::Refused, Some(&moved), at(9)).unwrap();
        assert_eq!((kept.snapshot.generation, kept.is_new, kept.is_wished), (2, true, false));
        assert_eq!((&kept.snapshot.cluster, &kept.snapshot.rules), (&moved, &first.snapshot.rules));
    }

    #[test]
    fn older_sidecars_are_told_what_they_understand() {
        let mut wish = merged(Some("a:{id}"), true);
        let json = json!({"name": "db", "kind": {"http": {"url": {"value": "http://a"}}}, "maxConnections": 2,
            "maxTotalConnections": 9, "connectTimeout": "1s", "timeout": "1s"});
        wish.snapshot.as_mut().unwrap().origins.push(serde_json::from_value(json).unwrap());
        let heard = |decision: &Decision, understood| {
            decide(&Standing { understood, ..standing(decision) }, Wish::Merged(&wish), None, at(9)).unwrap()
        };
        let first = decide(&Standing::default(), Wish::Merged(&wish), None, at(1)).unwrap();
        assert_eq!((first.snapshot.version, first.snapshot.origins[0].max_total_connections), (3, Some(9)), "nobody has spoken");
        let older = heard(&first, Some(2));
        assert_eq!((older.snapshot.version, older.snapshot.origins[0].max_total_connections), (2, None));
        assert!(older.is_new && older.snapshot.generation == 2);
        // It stays so while none is heard, by this operator or the next.
        assert!(!heard(&older, None).is_new && !heard(&older, Some(2)).is_new);
        let all = heard(&older, Some(3));
        assert_eq!((all.snapshot.version, all.snapshot.generation), (3, 3));
        assert_eq!((all.snapshot.origins, all.is_new), (first.snapshot.origins, true));
        // A snapshot that stays is not said anew in a newer form.
        let kept = Standing { understood: Some(3), ..standing(&older) };
        assert!(!decide(&kept, Wish::Refused, None, at(9)).unwrap().is_new);
    }

    #[test]
    fn servers_are_vouched_for_as_long_as_they_write_to_disk() {
        let mut wish = merged(Some("a:{id}"), true);
        let read = json!({
            "ttl": {"default": "5m", "max": "24h", "jitter": "10%"}, "stale": "0s", "negativeTtl": "0s", "lease": "1s", "wait": "1s",
            "load": {"origin": "db", "query": {"sql": {"read": "SELECT a FROM t WHERE id = $id"}}, "reply": null},
        });
        let journal = json!({"name": "shop.db", "batch": 9, "maxLag": "1m", "maxDepth": 4096, "maxBytes": "64Mi"});
        let behind = json!({"read": read, "store": {"sql": {"write": "INSERT INTO t VALUES ($id, $value)"}}, "journal": journal});
        let rule = json!({"name": "r", "keys": "a:{id}", "strategy": {"writeBehind": behind}});
        let snapshot = wish.snapshot.as_mut().unwrap();
        snapshot.rules = vec![serde_json::from_value(rule).unwrap()];
        let first = decide(&Standing::default(), Wish::Merged(&wish), None, at(1)).unwrap();
        assert!(!first.snapshot.writes_to_disk, "nobody knows");
        let then = |durable| Standing { durable, ..standing(&first) };
        let vouched = decide(&then(Some(true)), Wish::Merged(&wish), None, at(2)).unwrap();
        assert!(vouched.is_new && vouched.snapshot.writes_to_disk);
        // Also where the rest stays as it was.
        let kept = Standing { durable: Some(false), snapshot: Some(Arc::new(vouched.snapshot.clone())), ..Standing::default() };
        let withdrawn = decide(&kept, Wish::Refused, None, at(3)).unwrap();
        assert!(withdrawn.is_new && !withdrawn.snapshot.writes_to_disk && withdrawn.snapshot.rules == vouched.snapshot.rules);
        let last = decide(&Standing { durable: Some(true), ..kept }, Wish::Nobody, None, at(4)).unwrap();
        assert!(!last.snapshot.writes_to_disk && last.snapshot.requires == 1, "no rule asks for it");
    }

    #[test]
    fn how_long_commands_are_tried_stays_until_the_last_policy_is_gone() {
        let mut wish = merged(Some("a:{id}"), true);
        wish.snapshot.as_mut().unwrap().cluster.patience = Span::from_secs(30);
        let first = decide(&Standing::default(), Wish::Merged(&wish), None, at(1)).unwrap();
        let place = Cluster { patience: Span::from_secs(8), ..first.snapshot.cluster.clone() };
        let kept = decide(&standing(&first), Wish::Refused, Some(&place), at(9)).unwrap();
        assert_eq!((kept.snapshot.cluster.patience, kept.is_new), (Span::from_secs(30), false));
        let last = decide(&standing(&first), Wish::Nobody, Some(&place), at(9)).unwrap();
        assert_eq!((last.snapshot.cluster.patience, last.is_new), (Span::from_secs(8), true));
    }

    #[test]
    fn the_last_policy_leaves_a_farewell_once() {
        let first = decide(&Standing::default(), Wish::Merged(&merged(Some("a:{id}"), true)), None, at(1)).unwrap();
        let last = decide(&standing(&first), Wish::Nobody, None, at(9)).unwrap();
        assert!(last.is_new && !last.is_wished && is_farewell(&last.snapshot) && last.snapshot.generation == 2);
        let Unmatched::Ttl(lifetime) = &last.snapshot.unmatched else { panic!("{:?}", last.snapshot) };
        assert_eq!(lifetime.default, DEFAULT_TTL);
        assert!(!decide(&standing(&last), Wish::Nobody, None, at(10)).unwrap().is_new);
        let back = decide(&standing(&last), Wish::Merged(&merged(Some("a:{id}"), true)), None, at(11)).unwrap();
        assert_eq!((back.snapshot.generation, back.snapshot.rules.len()), (3, 1));
    }

    #[test]
    fn files_outlive_the_snapshot_that_names_them() {
        let past = |generation: u64, since: u64, files: &[&str]| Past {
            generation,
            since: Some(at(since)),
            files: files.iter().map(|file| (*file).to_owned()).collect(),
        };
        let all = [past(3, 2000, &["b"]), past(1, 0, &["old"]), past(2, 1000, &["a", "b"])];
        let names = |now: u64| {
            let (files, until) = kept_files(&all, at(now));
            (files.into_iter().collect::<Vec<_>>().join(" "), until)
        };
        assert_eq!(names(2001), ("a b".to_owned(), Some(at(2600))));
        assert_eq!(names(1100), ("a b old".to_owned(), Some(at(1600))));
        assert_eq!(names(2600), ("b".to_owned(), None));
        assert_eq!(kept_files(&[], at(0)), (BTreeSet::new(), None));
    }

    proptest! {
        /// Whatever comes and goes, and whatever the clock does: each snapshot that differs has a generation above all before it, and what
        /// does not differ keeps its own.
        #[test]
        fn generations_only_rise(steps in prop::collection::vec((0usize..6, 0u64..100, any::<bool>()), 1..40)) {
            let merges =
                [merged(Some("a:{id}"), true), merged(Some("b:{id}"), true), merged(Some("c:{id}"), false), merged(None, false)];
            let mut stands = Standing::default();
            let mut newest = 0;
            for (step, now, is_lost) in steps {
                // Somebody removed the ConfigMap; its history tells the generation.
                if is_lost {
                    (stands.text, stands.snapshot) = (None, None);
                }
                let wish = match step {
                    4 => Wish::Refused,
                    5 => Wish::Nobody,
                    index => Wish::Merged(&merges[index]),
                };
                let Some(decision) = decide(&stands, wish, None, at(now)) else { continue };
                if decision.is_new {
                    prop_assert!(decision.snapshot.generation > newest, "{:?} after {}", decision, newest);
                } else {
                    prop_assert_eq!(Some(&decision.snapshot), stands.snapshot.as_deref());
                }
                newest = decision.snapshot.generation;
                let again = decide(&standing(&decision), wish, None, at(now + 1)).unwrap();
                prop_assert!(!again.is_new, "{:?}", again);
                stands = standing(&decision);
            }
        }
    }
}
