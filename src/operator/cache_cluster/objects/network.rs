//! The NetworkPolicy: who may open connections to servers and sentinels.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Installation, metadata};
use crate::api::cache_cluster::{PeerSpec, SelectorSpec};
use crate::operator::cache_cluster::names::{AGENT_PORT, BUS_PORT, SENTINEL_PORT, SERVER_PORT};
use crate::operator::cache_cluster::validate::{Network, Wanted};
use crate::operator::cache_policy::objects::USES_LABEL;
use crate::operator::cache_policy::relay;

/// The label that Kubernetes gives each namespace.
const NAMESPACE_LABEL: &str = "kubernetes.io/metadata.name";

/// The NetworkPolicy, unless it is not wanted. What servers and sentinels themselves open is not restricted.
pub fn network_policy(wanted: &Wanted, installation: &Installation) -> Option<NetworkPolicy> {
    let Network { from, metrics_from } = wanted.network.as_ref()?;
    let own = NetworkPolicyPeer { pod_selector: Some(wanted.names.selector(None, None)), ..NetworkPolicyPeer::default() };
    let operator = NetworkPolicyPeer {
        namespace_selector: Some(labelled(BTreeMap::from([(
            NAMESPACE_LABEL.to_owned(),
            installation.operator_namespace.clone(),
        )]))),
        ..NetworkPolicyPeer::default()
    };
    let clients = if from.is_empty() {
        vec![NetworkPolicyPeer { pod_selector: Some(LabelSelector::default()), ..NetworkPolicyPeer::default() }]
    } else {
        from.iter().map(peer).chain([relays(wanted)]).collect()
    };
    let mut ingress = if wanted.is_cluster() {
        vec![
            rule(vec![own.clone(), operator], &[SERVER_PORT, AGENT_PORT]),
            // Whoever reaches the bus may take slots: nobody else does.
            rule(vec![own], &[BUS_PORT]),
            rule(clients, &[SERVER_PORT]),
        ]
    } else {
        vec![rule(vec![own, operator], &[SERVER_PORT, AGENT_PORT, SENTINEL_PORT]), rule(clients, &[SERVER_PORT, SENTINEL_PORT])]
    };
    if !metrics_from.is_empty() {
        ingress.push(rule(metrics_from.iter().map(peer).collect(), &[AGENT_PORT]));
    }
    Some(NetworkPolicy {
        metadata: metadata(wanted, wanted.names.cluster(), wanted.names.labels()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(wanted.names.selector(None, None)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            egress: None,
        }),
    })
}

fn rule(from: Vec<NetworkPolicyPeer>, ports: &[u16]) -> NetworkPolicyIngressRule {
    let ports = ports.iter().map(|port| NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(*port))),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    });
    NetworkPolicyIngressRule { from: Some(from), ports: Some(ports.collect()) }
}

fn peer(PeerSpec { pod_selector, namespace_selector }: &PeerSpec) -> NetworkPolicyPeer {
    let selector = |selector: &Option<SelectorSpec>| selector.as_ref().map(|selector| labelled(selector.match_labels.clone()));
    NetworkPolicyPeer { pod_selector: selector(pod_selector), namespace_selector: selector(namespace_selector), ip_block: None }
}

/// The relays of policies that write behind to this CacheCluster, whoever else may come.
fn relays(wanted: &Wanted) -> NetworkPolicyPeer {
    let labels = [("app.kubernetes.io/name", relay::objects::NAME), (USES_LABEL, wanted.names.cluster())];
    let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    NetworkPolicyPeer { pod_selector: Some(labelled(labels)), ..NetworkPolicyPeer::default() }
}

fn labelled(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), match_expressions: None }
}
