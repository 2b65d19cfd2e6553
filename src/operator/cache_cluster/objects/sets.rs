//! StatefulSets, and the budgets of their disruptions.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, PodTemplateSpec, VolumeResourceRequirements};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::ObjectMeta;

use super::pods::{DATA_VOLUME, LARDER_CONTAINER, sentinel_template, server_template};
use super::{Installation, Kept, Revisions, metadata};
use crate::operator::cache_cluster::names::{Component, REVISION_ANNOTATION};
use crate::operator::cache_cluster::validate::Wanted;
use crate::policy::ByteSize;

/// The volume of a sentinel: its memory is a few kilobytes.
const SENTINEL_STORAGE: ByteSize = ByteSize::from_bytes(64 << 20);

/// The StatefulSet of each shard's servers, and that of the sentinels.
pub fn stateful_sets(wanted: &Wanted, installation: &Installation, kept: &Kept, revisions: &Revisions) -> Vec<StatefulSet> {
    let names = &wanted.names;
    let size = wanted.storage.as_ref().map(|storage| storage.size);
    let shards: BTreeSet<u16> = (0..wanted.shards()).chain(kept.servers.keys().copied()).collect();
    let of_shard = |shard: u16| {
        let set = Set {
            name: names.shard_set(shard),
            component: Component::Server,
            shard: Some(shard),
            service: names.servers_headless(),
            size,
        };
        let template = kept_or(kept, &names.shard_set(shard), server_template(wanted, installation, revisions, shard));
        stateful_set(wanted, set, kept.servers.get(&shard).copied().unwrap_or(wanted.replicas + 1), template)
    };
    let mut sets: Vec<StatefulSet> = shards.into_iter().map(of_shard).collect();
    if !wanted.is_cluster() {
        let set = Set {
            name: names.sentinel_set(),
            component: Component::Sentinel,
            shard: None,
            service: names.sentinels_headless(),
            size: size.map(|_| SENTINEL_STORAGE),
        };
        let template = kept_or(kept, &names.sentinel_set(), sentinel_template(wanted, installation, revisions));
        sets.push(stateful_set(wanted, set, wanted.sentinels(), template));
    }
    sets
}

/// The template that stands, where nothing but another Larder image speaks for the new one: what a pod is made from stays of one piece,
/// and only a roll that has another reason brings the new release along.
fn kept_or(kept: &Kept, name: &str, fresh: PodTemplateSpec) -> PodTemplateSpec {
    match kept.templates.get(name) {
        Some(standing) if revision(standing) == revision(&fresh) && larder_image(standing) != larder_image(&fresh) => {
            standing.clone()
        }
        _ => fresh,
    }
}

fn revision(template: &PodTemplateSpec) -> Option<&str> {
    template.metadata.as_ref()?.annotations.as_ref()?.get(REVISION_ANNOTATION).map(String::as_str)
}

fn larder_image(template: &PodTemplateSpec) -> Option<&str> {
    let containers = template.spec.as_ref()?.init_containers.as_ref()?;
    containers.iter().find(|container| container.name == LARDER_CONTAINER)?.image.as_deref()
}

struct Set {
    name: String,
    component: Component,
    shard: Option<u16>,
    service: String,
    size: Option<ByteSize>,
}

fn stateful_set(wanted: &Wanted, set: Set, replicas: u16, template: PodTemplateSpec) -> StatefulSet {
    let Set { name, component, shard, service, size } = set;
    let when_deleted = wanted.storage.as_ref().map(|storage| storage.when_deleted.unwrap_or_default());
    StatefulSet {
        metadata: metadata(wanted, name, wanted.names.component_labels(component, shard)),
        spec: Some(StatefulSetSpec {
            service_name: Some(service),
            replicas: Some(i32::from(replicas)),
            selector: wanted.names.selector(Some(component), shard),
            template,
            // The order of everything is the operator's: pods start at once, and are replaced when it deletes them.
            pod_management_policy: Some("Parallel".to_owned()),
            update_strategy: Some(StatefulSetUpdateStrategy { type_: Some("OnDelete".to_owned()), rolling_update: None }),
            revision_history_limit: Some(2),
            volume_claim_templates: size.map(|size| vec![claim(wanted, wanted.names.component_labels(component, shard), size)]),
            persistent_volume_claim_retention_policy: when_deleted.map(|when_deleted| {
                StatefulSetPersistentVolumeClaimRetentionPolicy {
                    when_deleted: Some(when_deleted.as_str().to_owned()),
                    when_scaled: Some("Retain".to_owned()),
                }
            }),
            ..StatefulSetSpec::default()
        }),
        status: None,
    }
}

/// Has the volumes of a set go with its pods, where it is to ask for none any more: its shard has left and held nothing, and another of that
/// number must not begin with what these servers remember.
pub fn release_volumes(set: &mut StatefulSet) {
    let policy = set.spec.as_mut().and_then(|spec| spec.persistent_volume_claim_retention_policy.as_mut());
    if let Some(policy) = policy {
        policy.when_scaled = Some("Delete".to_owned());
    }
}

fn claim(wanted: &Wanted, labels: BTreeMap<String, String>, size: ByteSize) -> PersistentVolumeClaim {
    let class = wanted.storage.as_ref().and_then(|storage| storage.class.clone());
    let requests = [("storage".to_owned(), Quantity(size.to_string()))].into();
    PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some(DATA_VOLUME.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            storage_class_name: class,
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// Of servers, and of sentinels, one at a time; of a Cluster's servers over all shards, whose primaries are a majority together.
pub fn disruption_budgets(wanted: &Wanted) -> Vec<PodDisruptionBudget> {
    let names = &wanted.names;
    let budget = |name: String, component, shard, unhealthy: &str| PodDisruptionBudget {
        metadata: metadata(wanted, name, names.component_labels(component, shard)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(names.selector(Some(component), shard)),
            unhealthy_pod_eviction_policy: Some(unhealthy.to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    };
    // A server that is not ready may hold the last copy.
    if wanted.is_cluster() {
        return vec![budget(names.cluster().to_owned(), Component::Server, None, "IfHealthyBudget")];
    }
    vec![
        budget(names.shard_set(0), Component::Server, Some(0), "IfHealthyBudget"),
        budget(names.sentinel_set(), Component::Sentinel, None, "AlwaysAllow"),
    ]
}
