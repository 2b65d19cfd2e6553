//! StatefulSets, and the budgets of their disruptions.

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

/// The StatefulSet of the servers, and that of the sentinels.
pub fn stateful_sets(wanted: &Wanted, installation: &Installation, kept: &Kept, revisions: &Revisions) -> Vec<StatefulSet> {
    let names = &wanted.names;
    let servers = kept.servers.unwrap_or(wanted.replicas + 1);
    let size = wanted.storage.as_ref().map(|storage| storage.size);
    vec![
        stateful_set(
            wanted,
            Set { name: names.shard_set(0), component: Component::Server, service: names.servers_headless(), size },
            servers,
            kept_or(kept, &names.shard_set(0), server_template(wanted, installation, revisions)),
        ),
        stateful_set(
            wanted,
            Set {
                name: names.sentinel_set(),
                component: Component::Sentinel,
                service: names.sentinels_headless(),
                size: size.map(|_| SENTINEL_STORAGE),
            },
            wanted.sentinels,
            kept_or(kept, &names.sentinel_set(), sentinel_template(wanted, installation, revisions)),
        ),
    ]
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
    service: String,
    size: Option<ByteSize>,
}

fn stateful_set(wanted: &Wanted, set: Set, replicas: u16, template: PodTemplateSpec) -> StatefulSet {
    let Set { name, component, service, size } = set;
    let shard = shard_of(component);
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
            volume_claim_templates: size.map(|size| vec![claim(wanted, component, size)]),
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

fn shard_of(component: Component) -> Option<u16> {
    match component {
        Component::Server => Some(0),
        Component::Sentinel => None,
    }
}

fn claim(wanted: &Wanted, component: Component, size: ByteSize) -> PersistentVolumeClaim {
    let class = wanted.storage.as_ref().and_then(|storage| storage.class.clone());
    let requests = [("storage".to_owned(), Quantity(size.to_string()))].into();
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(DATA_VOLUME.to_owned()),
            labels: Some(wanted.names.component_labels(component, shard_of(component))),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            storage_class_name: class,
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// Of servers, and of sentinels, one at a time.
pub fn disruption_budgets(wanted: &Wanted) -> Vec<PodDisruptionBudget> {
    let names = &wanted.names;
    let budget = |name, component, unhealthy: &str| PodDisruptionBudget {
        metadata: metadata(wanted, name, names.component_labels(component, shard_of(component))),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(names.selector(Some(component), shard_of(component))),
            unhealthy_pod_eviction_policy: Some(unhealthy.to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    };
    vec![
        // A server that is not ready may hold the last copy.
        budget(names.shard_set(0), Component::Server, "IfHealthyBudget"),
        budget(names.sentinel_set(), Component::Sentinel, "AlwaysAllow"),
    ]
}
