//! The Kubernetes objects of a binding, in its workload's namespace. Pure: typed objects for server-side apply, without a client.
//!
//! One ConfigMap holds the snapshot and one Secret all that opens doors; the sidecars mount both, whole, and pods name them from the
//! start, so that policies change their content and never a pod. Beside them a few immutable ConfigMaps, which nobody mounts, tell what
//! the last snapshots were. All of them belong to the workload, and go with it.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::ObjectMeta;

use super::merge::Merged;
use super::passwords::{NEXT_PASSWORD, Passwords};
use super::workload::Workload;
use crate::operator::cache_cluster::names::MANAGER;
use crate::policy::Snapshot;
use crate::policy::binding::{
    BindingName, CA_FILE, PASSWORD_FILE, SENTINEL_PASSWORD_FILE, SENTINEL_USERNAME_FILE, SNAPSHOT_FILE, USERNAME_FILE,
};

/// The label with the binding's name.
pub const BINDING_LABEL: &str = "larder.dev/binding";
/// The label with the CacheCluster's name. Not that of a CacheCluster's own objects: these are none.
pub const USES_LABEL: &str = "larder.dev/uses-cluster";
/// The label that tells what the object is: `snapshot`, `secret` or `history`.
pub const CONTENT_LABEL: &str = "larder.dev/content";
/// The annotation with the workload's kind and name.
pub const WORKLOAD_ANNOTATION: &str = "larder.dev/workload";
/// How many snapshots are kept as they were, the newest among them.
pub const HISTORY: usize = 5;

/// What a binding's objects are made of.
#[derive(Debug, Clone, Copy)]
pub struct Binding<'a> {
    /// The workload.
    pub workload: &'a Workload,
    /// With whom the ConfigMaps go.
    pub owners: &'a [OwnerReference],
    /// With whom the Secret goes: with those that it was made for. An API server may let owners be changed only by who may delete, which the
    /// operator may no Secret.
    pub secret_owners: &'a [OwnerReference],
    /// What its policies are together.
    pub merged: &'a Merged,
    /// The snapshot that is to be in force: the merged one, or an earlier one where that is not complete.
    pub snapshot: &'a Snapshot,
    /// The passwords of its user.
    pub passwords: &'a Passwords,
    /// The authorities of servers, PEM, where they speak TLS.
    pub authorities: Option<&'a str>,
}

/// A binding's objects, in the order in which they are applied: a snapshot names files of the Secret.
#[derive(Debug, Clone, PartialEq)]
pub struct Objects {
    /// All that opens doors.
    pub secret: Secret,
    /// The snapshot, as it was once made.
    pub history: ConfigMap,
    /// The snapshot.
    pub config_map: ConfigMap,
}

/// Builds a binding's objects.
pub fn objects(binding: &Binding<'_>) -> Objects {
    let text = serde_json::to_string(binding.snapshot).unwrap_or_default();
    let snapshot = BTreeMap::from([(SNAPSHOT_FILE.to_owned(), text)]);
    let name = &binding.merged.binding;
    let metadata = |object: String, content: &str| binding.metadata(object, content);
    Objects {
        secret: Secret {
            metadata: binding.secret_metadata(),
            data: Some(binding.secret_entries()),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        },
        history: ConfigMap {
            metadata: metadata(history_name(name, binding.snapshot.generation), "history"),
            data: Some(snapshot.clone()),
            immutable: Some(true),
            ..ConfigMap::default()
        },
        config_map: ConfigMap {
            metadata: metadata(name.object_name(), "snapshot"),
            data: Some(snapshot),
            ..ConfigMap::default()
        },
    }
}

impl Binding<'_> {
    fn metadata(&self, name: String, content: &str) -> ObjectMeta {
        let Self { workload, owners, merged, .. } = self;
        let labels = [
            ("app.kubernetes.io/name", "larder-binding"),
            ("app.kubernetes.io/managed-by", MANAGER),
            (BINDING_LABEL, merged.binding.as_str()),
            (USES_LABEL, &merged.cluster),
            (CONTENT_LABEL, content),
        ];
        let annotation = (WORKLOAD_ANNOTATION.to_owned(), format!("{}/{}", workload.kind, workload.name));
        ObjectMeta {
            name: Some(name),
            namespace: Some(workload.namespace.clone()),
            labels: Some(labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()),
            annotations: Some(BTreeMap::from([annotation])),
            owner_references: (!owners.is_empty()).then(|| owners.to_vec()),
            ..ObjectMeta::default()
        }
    }

    fn secret_metadata(&self) -> ObjectMeta {
        let mut metadata = self.metadata(self.merged.binding.object_name(), "secret");
        metadata.annotations.get_or_insert_default().extend(self.passwords.annotations());
        metadata.owner_references = (!self.secret_owners.is_empty()).then(|| self.secret_owners.to_vec());
        metadata
    }

    fn secret_entries(&self) -> BTreeMap<String, ByteString> {
        let user = self.merged.binding.user();
        let Passwords { current, next, .. } = self.passwords;
        let login = [
            (USERNAME_FILE, Some(&user)),
            (PASSWORD_FILE, current.as_ref()),
            (SENTINEL_USERNAME_FILE, Some(&user)),
            (SENTINEL_PASSWORD_FILE, current.as_ref()),
            (NEXT_PASSWORD, next.as_ref()),
        ];
        let login = login.into_iter().filter_map(|(entry, text)| Some((entry, text?.as_str())));
        let authorities = self.authorities.map(|authorities| (CA_FILE, authorities));
        let urls = self.merged.files.0.iter().map(|(entry, url)| (entry.as_str(), url.as_str()));
        let entries = login.chain(authorities).chain(urls);
        entries.map(|(entry, text)| (entry.to_owned(), ByteString(text.as_bytes().to_vec()))).collect()
    }
}

/// The name of the ConfigMap that keeps one snapshot. The dot tells it from every binding's own objects, whose names have none.
fn history_name(binding: &BindingName, generation: u64) -> String {
    format!("{}.g{generation}", binding.object_name())
}

/// Of these ConfigMaps those that keep snapshots of the binding which are no longer to be kept, once one of `newest` is written.
pub fn outlived<'a>(binding: &BindingName, names: impl IntoIterator<Item = &'a str>, newest: u64) -> Vec<&'a str> {
    let prefix = format!("{}.g", binding.object_name());
    let generation = |name: &str| {
        let generation: u64 = name.strip_prefix(&prefix)?.parse().ok()?;
        (history_name(binding, generation) == name).then_some(generation)
    };
    let kept =
        names.into_iter().filter_map(|name| Some((generation(name)?, name))).filter(|(generation, _)| *generation != newest);
    let mut kept: Vec<(u64, &str)> = kept.collect();
    kept.sort_unstable_by(|one, other| other.cmp(one));
    kept.into_iter().skip(HISTORY - 1).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::merge::{Namespace, merge};
    use super::super::origins::KnownSecrets;
    use super::super::place::Place;
    use super::*;
    use crate::api::CachePolicy;
    use crate::policy::snapshot::Topology;

    fn merged() -> Merged {
        let spec = json!({
            "cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}},
            "origins": [{"name": "db", "sql": {"url": {"secretKeyRef": {"name": "shop-db", "key": "url"}}}}],
            "rules": [{"name": "user", "keys": "user:{id}", "strategy": "ReadThrough",
                "origin": {"name": "db", "read": "SELECT name FROM users WHERE id = $id"}}],
        });
        let mut policy = CachePolicy::new("shop", serde_json::from_value(spec).unwrap());
        policy.metadata.namespace = Some("store".to_owned());
        let topology = Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["10.96.0.7:26379".to_owned()] };
        let url = BTreeMap::from([("url".to_owned(), b"postgres://app:hidden@db/shop".to_vec())]);
        let namespace = Namespace {
            clusters: BTreeMap::from([("main".to_owned(), Some(Place { topology, tls: true, keeping: None }))]),
            secrets: KnownSecrets(BTreeMap::from([("shop-db".to_owned(), url)])),
            ..Namespace::default()
        };
        merge(&Workload::shop(), &[&policy], &namespace, 12).unwrap().merged.unwrap()
    }

    fn build(merged: &Merged) -> Objects {
        let passwords = Passwords { current: Some("binding password".to_owned()), ..Passwords::default() };
        let snapshot = merged.snapshot.as_ref().unwrap();
        let (workload, authorities) = (&Workload::shop(), Some("PEM"));
        let owners = &Vec::from_iter(workload.owner_reference());
        objects(&Binding { workload, owners, secret_owners: owners, merged, snapshot, passwords: &passwords, authorities })
    }

    fn metadata(name: &str, content: &str) -> serde_json::Value {
        json!({
            "name": name,
            "namespace": "store",
            "labels": {
                "app.kubernetes.io/name": "larder-binding",
                "app.kubernetes.io/managed-by": "larder",
                "larder.dev/binding": "shop-4469096e2a",
                "larder.dev/uses-cluster": "main",
                "larder.dev/content": content,
            },
            "annotations": {"larder.dev/workload": "Deployment/shop"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "shop", "uid": "8d2c"}],
        })
    }

    /// What pods mount is named in them for good: the names and the entries must not change from release to release.
    #[test]
    fn the_objects_of_a_binding() {
        let merged = merged();
        let Objects { secret, history, config_map } = build(&merged);
        let name = "larder-b-shop-4469096e2a";
        let snapshot = concat!(
            r#"{"version":10,"requires":1,"generation":12,"cluster":{"name":"main","topology":{"sentinel":{"master":"main","#,
            r#""sentinels":["10.96.0.7:26379"]}},"tls":{"caFile":"/etc/larder/secret/ca.crt"},"#,
            r#""auth":{"usernameFile":"/etc/larder/secret/username","passwordFile":"/etc/larder/secret/password"},"#,
            r#""sentinelAuth":{"usernameFile":"/etc/larder/secret/sentinel-username","#,
            r#""passwordFile":"/etc/larder/secret/sentinel-password"},"patience":"8s","idleTransaction":"1m"},"#,
            r#""unmatched":{"bypass":{}},"ttlSweep":"10m","allow":{"flush":false,"keys":false},"#,
            r#""origins":[{"name":"db","kind":{"sql":{"url":{"file":"/etc/larder/secret/origin-ORIGIN-url"}}},"#,
            r#""maxConnections":4,"connectTimeout":"1s","timeout":"2s"}],"#,
            r#""rules":[{"name":"user","keys":"user:{id}","strategy":{"readThrough":{"#,
            r#""ttl":{"default":"5m","max":"24h","jitter":"10%"},"stale":"0s","negativeTtl":"10s","lease":"3s","wait":"2s500ms","#,
            r#""load":{"origin":"db","query":{"sql":{"read":"SELECT name FROM users WHERE id = $id"}},"reply":null}}}}]}"#,
        )
        .replace("ORIGIN", "08d0b104b3");
        assert_eq!(
            json!(config_map),
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(name, "snapshot"), "data": {"snapshot.json": snapshot},
            })
        );
        assert_eq!(
            json!(history),
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(&format!("{name}.g12"), "history"),
                "data": {"snapshot.json": snapshot}, "immutable": true,
            })
        );
        let entries: BTreeMap<&str, &str> =
            secret.data.iter().flatten().map(|(entry, bytes)| (entry.as_str(), std::str::from_utf8(&bytes.0).unwrap())).collect();
        let user = "larder-b-shop-4469096e2a";
        let expected = [
            ("ca.crt", "PEM"),
            ("origin-08d0b104b3-url", "postgres://app:hidden@db/shop"),
            ("password", "binding password"),
            ("sentinel-password", "binding password"),
            ("sentinel-username", user),
            ("username", user),
        ];
        assert_eq!(entries, BTreeMap::from(expected));
        assert_eq!(json!(secret.metadata), metadata(name, "secret"));
        assert_eq!(secret.type_.as_deref(), Some("Opaque"));
    }

    #[test]
    fn the_secret_alone_holds_secrets() {
        let Objects { secret: _, history, config_map } = build(&merged());
        let open = json!([history, config_map]).to_string();
        assert!(!open.contains("hidden") && !open.contains("binding password"), "{open}");
        let merged = Merged { cluster: "plain".to_owned(), ..merged() };
        let passwords = Passwords { next: Some("p".to_owned()), since: Some(0), ..Passwords::default() };
        let snapshot = merged.snapshot.as_ref().unwrap();
        let binding = Binding {
            workload: &Workload::shop(),
            owners: &[],
            secret_owners: &[],
            merged: &merged,
            snapshot,
            passwords: &passwords,
            authorities: None,
        };
        let secret = objects(&binding).secret;
        let entries: Vec<String> = secret.data.unwrap().into_keys().filter(|entry| !entry.starts_with("origin-")).collect();
        assert_eq!(entries, ["next-password", "sentinel-username", "username"], "what servers do not take is no password yet");
        assert_eq!(secret.metadata.annotations.unwrap()["larder.dev/password-since"], "1970-01-01T00:00:00Z");
    }

    #[test]
    fn the_newest_snapshots_are_kept() {
        let binding = BindingName::of("Deployment", "shop", "main");
        let of = |generation: u64| history_name(&binding, generation);
        let names: Vec<String> = [1, 2, 9, 10, 11, 12].map(of).into_iter().collect();
        let other = BindingName::of("Deployment", "shop", "other");
        let strange = [history_name(&other, 1), binding.object_name(), format!("{}.g01", binding.object_name()), "x".to_owned()];
        let all = || names.iter().chain(&strange).map(String::as_str);
        assert_eq!(outlived(&binding, all(), 12), [of(1)]);
        assert_eq!(outlived(&binding, all(), 13), [of(2), of(1)]);
        assert!(outlived(&binding, strange.iter().map(String::as_str), 1).is_empty());
    }
}
