//! What of a CacheCluster takes a restart of its pods: its fingerprint stands on each pod and tells those that are to be replaced.
//!
//! It is made from what the user wrote, never from the objects: another release of the operator may write those differently, and
//! that alone restarts nothing. A test holds the fingerprints of some objects fast.

use std::collections::BTreeMap;

use serde::Serialize;

use super::config::is_read_at_start;
use crate::api::cache_cluster::PodOptions;
use crate::operator::cache_cluster::validate::Wanted;
use crate::policy::digest::sha256;

/// The fingerprints that pods are to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revisions {
    /// Of servers.
    pub servers: String,
    /// Of sentinels.
    pub sentinels: String,
}

/// A further field must not be written where it has its default: what stands would have another fingerprint.
#[derive(Serialize)]
struct ServerInputs<'a> {
    image: &'a str,
    memory: u64,
    parameters: BTreeMap<&'a str, &'a str>,
    durable: bool,
    pod: &'a PodOptions,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    tls: bool,
}

#[derive(Serialize)]
struct SentinelInputs<'a> {
    image: &'a str,
    durable: bool,
    pod: &'a PodOptions,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    tls: bool,
}

/// The revisions of what is wanted. Every field is named here, and with it how its change takes effect.
pub fn revisions(wanted: &Wanted) -> Revisions {
    let Wanted {
        // They never change.
        names: _,
        namespace: _,
        uid: _,
        generation: _,
        // Restarts: the program's name is part of the image.
        engine: _,
        image,
        memory,
        storage,
        pod,
        // Restarts where it is switched on or off. Certificates are the agents' to take up, and the planner sees which of them
        // sentinels present.
        tls,
        // Restarts for those that are read at the start; the others are set live.
        parameters,
        // Never changes, but for the numbers of shards and sentinels: pods come and go; the files of those that stay follow.
        layout: _,
        replicas: _,
        // Live, by the agents.
        eviction: _,
        auth: _,
        writes: _,
        accept_data_loss: _,
        // Not the pods'.
        network: _,
        paused: _,
    } = wanted;
    let read_at_start = parameters.iter().filter(|(name, _)| is_read_at_start(name));
    let (durable, tls) = (storage.is_some(), tls.is_some());
    // What concerns the servers' processor alone leaves sentinels alone.
    let sentinel_pod = PodOptions { cpu: None, ..pod.clone() };
    Revisions {
        servers: fingerprint(&ServerInputs {
            image,
            memory: memory.as_bytes(),
            parameters: read_at_start.map(|(name, value)| (name.as_str(), value.as_str())).collect(),
            durable,
            pod,
            tls,
        }),
        sentinels: fingerprint(&SentinelInputs { image, durable, pod: &sentinel_pod, tls }),
    }
}

fn fingerprint(inputs: &impl Serialize) -> String {
    let mut hash = sha256(&serde_json::to_vec(inputs).unwrap_or_default());
    hash.truncate(10);
    hash
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::operator::cache_cluster::validate::{tests::cluster, validate};

    fn of(spec: &serde_json::Value) -> (String, String) {
        let Revisions { servers, sentinels } = revisions(&validate(&cluster(spec)).unwrap());
        (servers, sentinels)
    }

    /// Whoever changes one of these restarts every server of every user at the next upgrade of the operator.
    #[test]
    fn fingerprints_stay_what_they_are() {
        let full = json!({
            "memory": "1Gi",
            "engine": {"kind": "Redis", "version": "8.0"},
            "parameters": {"io-threads": "4", "hz": "20"},
            "storage": {"size": "2Gi", "fsync": "Always"},
            "pod": {
                "labels": {"team": "shop"}, "cpu": {"request": "500m"}, "nodeSelector": {"disk": "ssd"}, "spread": "Require",
                "tolerations": [{"key": "cache", "effect": "NoSchedule"}], "imagePullSecrets": [{"name": "registry"}],
            },
        });
        for (spec, servers, sentinels) in [(json!({}), "86d50e9c3c", "2a9d8216b1"), (full, "91a8573d6e", "510a747abb")] {
            assert_eq!(of(&spec), (servers.to_owned(), sentinels.to_owned()));
        }
    }

    #[test]
    fn a_new_certificate_replaces_no_pod() {
        let rotated = |rotation: &str| of(&json!({"tls": {"enabled": true, "rotation": rotation}}));
        assert_eq!((rotated("one"), rotated("one")), (rotated("two"), of(&json!({"tls": {"enabled": true}}))));
        assert_eq!(of(&json!({"tls": {"enabled": false}})), of(&json!({})));
        let (servers, sentinels) = rotated("one");
        assert!(servers != of(&json!({})).0 && sentinels != of(&json!({})).1);
    }

    #[test]
    fn only_what_takes_a_restart_changes_them() {
        let plain = of(&json!({}));
        for live in [
            json!({"eviction": "noeviction"}),
            json!({"parameters": {"hz": "20"}}),
            json!({"replicas": 2, "sentinels": 5, "writes": {"minReplicas": 1}}),
            json!({"auth": {"password": {"value": "x"}}, "networkPolicy": {"enabled": false}, "paused": true}),
        ] {
            assert_eq!(of(&live), plain, "{live}");
        }
        for restart in
            [json!({"memory": "512Mi"}), json!({"parameters": {"io-threads": "2"}}), json!({"pod": {"cpu": {"request": "1"}}})]
        {
            let (servers, sentinels) = of(&restart);
            assert!(servers != plain.0 && sentinels == plain.1, "{restart}");
        }
        for both in [json!({"engine": {"kind": "Valkey", "version": "9.1"}}), json!({"pod": {"labels": {"a": "b"}}})] {
            let (servers, sentinels) = of(&both);
            assert!(servers != plain.0 && sentinels != plain.1, "{both}");
        }
    }
}
