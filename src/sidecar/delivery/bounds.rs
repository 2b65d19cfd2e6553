//! What a snapshot from the cache may say.
//!
//! Whoever may write the binding's key (the control plane alone, by the servers' access lists) could say anything there. The file
//! and the Secret come through the API server instead, and stay the authority on places: where the cache is and how to log in,
//! which databases and services there are, and where passwords lie. What comes through the cache says how keys are cached, and
//! names places that the mounts know. So a writer of that key can move no sidecar to servers of his own, have no file read but
//! those in the binding's Secret, and have nothing asked that was not asked before by somebody's leave; nor can he put a
//! generation in force that the control plane cannot surpass. What is written to an origin is the file's to say as well: whoever
//! could have another statement carried out there could change the workload's data.

use std::path::{Path, PathBuf};

use crate::policy::snapshot::{Cluster, Origin, OriginKind, Sensitive};
use crate::policy::{Journal, KeyPattern, Query, Rule, Snapshot, Store};

/// How far a generation in the cache may be ahead of the file's. Far beyond what a file is late, and far below the largest
/// generation: one more can always be written to the file.
const MAX_LEAD: u64 = 1 << 40;

/// Why a snapshot from the cache may not come into force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BoundsError {
    /// It is another cluster's.
    #[error("it is about the cluster `{named}`, and this sidecar serves `{served}`")]
    OtherCluster {
        /// The one it names.
        named: String,
        /// The file's.
        served: String,
    },
    /// Its generation is out of all proportion.
    #[error("its generation {generation} is too far ahead of the file's, which is {file}")]
    TooFarAhead {
        /// Its own.
        generation: u64,
        /// The file's.
        file: u64,
    },
    /// It names a file that is none of the binding's.
    #[error("origin `{origin}` names the file {}, which is not in the directory of the binding's Secret", path.display())]
    ForeignFile {
        /// The origin.
        origin: String,
        /// The file.
        path: PathBuf,
    },
    /// It names a file that has not been mounted yet.
    #[error("origin `{origin}` names the file {}, which has not arrived", path.display())]
    NoSecret {
        /// The origin.
        origin: String,
        /// The file.
        path: PathBuf,
    },
    /// It names a URL that the file does not.
    #[error("origin `{origin}` has a URL that the snapshot's file does not name: new ones count once the file brings them")]
    NewUrl {
        /// The origin.
        origin: String,
    },
    /// It writes to an origin in a way that the file does not know.
    #[error(
        "rule `{rule}` writes to its origin in a way that the snapshot's file does not say: new ones count once the file brings them"
    )]
    NewWrite {
        /// The rule.
        rule: String,
    },
}

/// Checks a snapshot from the cache against the newest from the file. `exists` says whether there is a file.
///
/// # Errors
/// The first thing that it may not say, or not yet.
pub fn check(offered: &Snapshot, file: &Snapshot, secrets: &Path, exists: impl Fn(&Path) -> bool) -> Result<(), BoundsError> {
    let (named, served) = (&offered.cluster.name, &file.cluster.name);
    if named != served {
        return Err(BoundsError::OtherCluster { named: named.clone(), served: served.clone() });
    }
    if offered.generation > file.generation.saturating_add(MAX_LEAD) {
        return Err(BoundsError::TooFarAhead { generation: offered.generation, file: file.generation });
    }
    offered.origins.iter().try_for_each(|origin| check_origin(origin, file, secrets, &exists))?;
    let known: Vec<Told<'_>> = file.rules.iter().filter_map(|rule| told(file, rule)).collect();
    let is_new = |rule: &&Rule| told(offered, rule).is_some_and(|told| !known.contains(&told));
    offered.rules.iter().find(is_new).map_or(Ok(()), |rule| Err(BoundsError::NewWrite { rule: rule.name.clone() }))
}

/// What a rule tells which place about which keys, whether of hashes, and by way of which journal.
type Told<'a> = (&'a KeyPattern, &'a Store, &'a Query, bool, Option<&'a OriginKind>, Option<&'a Journal>);

/// `None`: it writes nothing.
fn told<'a>(snapshot: &'a Snapshot, rule: &'a Rule) -> Option<Told<'a>> {
    let (read, store) = rule.strategy.writes()?;
    let origin = snapshot.origins.iter().find(|origin| origin.name == read.load.origin);
    let journal = rule.strategy.behind().map(|write_behind| &write_behind.journal);
    Some((&rule.keys, store, &read.load.query, rule.is_of_hashes(), origin.map(|origin| &origin.kind), journal))
}

fn check_origin(origin: &Origin, file: &Snapshot, secrets: &Path, exists: &impl Fn(&Path) -> bool) -> Result<(), BoundsError> {
    let name = || origin.name.clone();
    let (OriginKind::Sql { url } | OriginKind::Http { url }) = &origin.kind;
    match url {
        Sensitive::Value(_) if file.origins.iter().any(|known| known.kind == origin.kind) => Ok(()),
        Sensitive::Value(_) => Err(BoundsError::NewUrl { origin: name() }),
        // Lexically: a path with `..` in it has another parent, or no name.
        Sensitive::File(path) if path.parent() != Some(secrets) || path.file_name().is_none() => {
            Err(BoundsError::ForeignFile { origin: name(), path: path.clone() })
        }
        Sensitive::File(path) if !exists(path) => Err(BoundsError::NoSecret { origin: name(), path: path.clone() }),
        Sensitive::File(_) => Ok(()),
    }
}

/// The snapshot to put in force: what `offered` says of keys, and of how long a command is tried, and where `cluster` is.
pub fn placed(offered: &Snapshot, cluster: &Cluster) -> Snapshot {
    let cluster = Cluster { patience: offered.cluster.patience, ..cluster.clone() };
    Snapshot { cluster, ..offered.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Span;
    use crate::policy::snapshot::Topology;

    const SECRETS: &str = "/etc/larder/secret";

    fn snapshot(generation: u64, origins: &str) -> Snapshot {
        let json = format!(
            r#"{{"version":1,"requires":1,"generation":{generation},"unmatched":{{"bypass":{{}}}},"origins":[{origins}],
                "cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["127.0.0.1:7000"]}}}}}}}}"#
        );
        Snapshot::parse(json.as_bytes()).expect("valid")
    }

    fn origin(kind: &str, url: &str) -> String {
        format!(r#"{{"name":"db","kind":{{"{kind}":{{"url":{url}}}}},"maxConnections":2,"connectTimeout":"1s","timeout":"1s"}}"#)
    }

    fn verdict(offered: &Snapshot, file: &Snapshot) -> Result<(), BoundsError> {
        check(offered, file, Path::new(SECRETS), |path| path.ends_with("shop-db.url"))
    }

    #[test]
    fn files_are_those_of_the_secret() {
        let file = snapshot(1, "");
        let names = |path: &str| verdict(&snapshot(2, &origin("sql", &format!(r#"{{"file":"{path}"}}"#))), &file);
        assert_eq!(names("/etc/larder/secret/shop-db.url"), Ok(()));
        assert!(matches!(names("/etc/larder/secret/other"), Err(BoundsError::NoSecret { .. })));
        for foreign in [
            "/etc/passwd",
            "shop-db.url",
            "/etc/larder/secret/../shop-db.url",
            "/etc/larder/secret/../secret/shop-db.url",
            "/etc/larder/secret/deeper/shop-db.url",
            "/etc/larder/secret",
            "/etc/larder/secret/..",
            "/var/run/secrets/kubernetes.io/serviceaccount/shop-db.url",
        ] {
            assert!(matches!(names(foreign), Err(BoundsError::ForeignFile { .. })), "{foreign}");
        }
    }

    #[test]
    fn places_are_those_that_the_file_knows() {
        let http = |url: &str| origin("http", &format!(r#"{{"value":"{url}"}}"#));
        let file = snapshot(1, &http("http://catalog"));
        assert_eq!(verdict(&snapshot(2, &http("http://catalog")), &file), Ok(()));
        for new in [http("http://169.254.169.254"), origin("sql", r#"{"value":"sqlite:///etc/larder/x"}"#)] {
            let verdict = verdict(&snapshot(2, &new), &file);
            assert!(matches!(verdict, Err(BoundsError::NewUrl { .. })), "{verdict:?}");
        }
    }

    #[test]
    fn what_is_written_is_the_file_s_to_say() {
        let with = |generation: u64, keys: &str, write: &str, url: &str| {
            let mut snapshot = snapshot(generation, &origin("sql", &format!(r#"{{"value":"{url}"}}"#)));
            let rule = format!(
                r#"{{"name":"user","keys":"{keys}","strategy":{{"writeThrough":{{"read":{{"ttl":{{"default":"1m","max":"1h","jitter":"0%"}},
                    "stale":"0s","negativeTtl":"0s","lease":"3s","wait":"1s","load":{{"origin":"db","query":{{"sql":{{"read":"SELECT 1"}}}},
                    "reply":null}}}},"store":{{"sql":{{"write":"{write}"}}}}}}}}}}"#
            );
            snapshot.rules.push(serde_json::from_str(&rule).expect("a rule"));
            snapshot
        };
        let usual = ("user:{id}", "INSERT INTO t VALUES ($id, $value)", "sqlite://x.db");
        let file = with(1, usual.0, usual.1, usual.2);
        let mut offered = with(2, usual.0, usual.1, usual.2);
        assert_eq!(verdict(&offered, &file), Ok(()));
        offered.rules.clear();
        assert_eq!(verdict(&offered, &file), Ok(()), "to write no longer is no danger");
        for other in [with(2, "other:{id}", usual.1, usual.2), with(2, usual.0, "INSERT INTO u VALUES ($id, $value)", usual.2)] {
            assert_eq!(verdict(&other, &file), Err(BoundsError::NewWrite { rule: "user".to_owned() }));
        }
    }

    #[test]
    fn the_cluster_is_the_file_s() {
        let file = snapshot(1, "");
        let mut offered = snapshot(2, "");
        offered.cluster.topology = Topology::Cluster { seeds: vec!["10.6.6.6:6379".to_owned()] };
        assert_eq!(verdict(&offered, &file), Ok(()));
        assert_eq!(placed(&offered, &file.cluster).cluster, file.cluster);
        offered.cluster.patience = Span::from_secs(30);
        let cluster = placed(&offered, &file.cluster).cluster;
        assert!(cluster.is_same_place(&file.cluster), "{cluster:?}");
        assert_eq!(cluster.patience, Span::from_secs(30), "is about no place");
        offered.cluster.name = "other".to_owned();
        assert!(matches!(verdict(&offered, &file), Err(BoundsError::OtherCluster { .. })));
    }

    #[test]
    fn the_file_can_surpass_every_generation() {
        let file = snapshot(7, "");
        assert_eq!(verdict(&snapshot(7 + MAX_LEAD, ""), &file), Ok(()));
        for ahead in [8 + MAX_LEAD, u64::MAX] {
            assert!(matches!(verdict(&snapshot(ahead, ""), &file), Err(BoundsError::TooFarAhead { .. })));
        }
    }
}
