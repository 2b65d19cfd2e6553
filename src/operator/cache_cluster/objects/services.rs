//! Services: one for each pod, whose address outlives the pod; headless ones for the StatefulSets; and those for clients.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ObjectReference, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::metadata;
use crate::operator::cache_cluster::names::{
    AGENT_PORT, BUS_PORT, Component, MANAGER, POD_NAME_LABEL, SENTINEL_PORT, SERVER_PORT,
};
use crate::operator::cache_cluster::plan::ServerId;
use crate::operator::cache_cluster::validate::Wanted;

const REDIS: (&str, u16) = ("redis", SERVER_PORT);
const AGENT: (&str, u16) = ("agent", AGENT_PORT);
const BUS: (&str, u16) = ("bus", BUS_PORT);
const SENTINEL: (&str, u16) = ("sentinel", SENTINEL_PORT);

/// All Services. `leaving` are servers that are wanted no more and have not left.
pub fn services(wanted: &Wanted, leaving: impl IntoIterator<Item = ServerId>) -> Vec<Service> {
    let names = &wanted.names;
    let servers: BTreeSet<ServerId> = wanted.servers().chain(leaving).collect();
    let of_servers: &[_] = if wanted.is_cluster() { &[REDIS, AGENT, BUS] } else { &[REDIS, AGENT] };
    let mut services = vec![headless(wanted, names.servers_headless(), Component::Server, of_servers)];
    if wanted.is_cluster() {
        services.push(client(wanted, names.nodes_service(), Some(Component::Server), REDIS));
    } else {
        services.extend([
            headless(wanted, names.sentinels_headless(), Component::Sentinel, &[SENTINEL]),
            client(wanted, names.sentinels_service(), Some(Component::Sentinel), SENTINEL),
            client(wanted, names.replicas_service(), Some(Component::Server), REDIS),
            client(wanted, names.primary_service(), None, REDIS),
        ]);
    }
    services.extend(servers.into_iter().map(|id| {
        let labels = names.component_labels(Component::Server, Some(id.shard));
        of_pod(wanted, names.server_pod(id), labels, of_servers)
    }));
    services.extend(wanted.sentinel_ids().map(|id| {
        let labels = names.component_labels(Component::Sentinel, None);
        of_pod(wanted, names.sentinel_pod(id), labels, &[SENTINEL])
    }));
    services
}

/// The one endpoint of the Service of the primary: the address of its pod, which clients reach without another hop.
pub fn primary_endpoints(wanted: &Wanted, pod: &str, pod_ip: IpAddr, node: Option<&str>) -> EndpointSlice {
    let name = wanted.names.primary_service();
    let mut labels = wanted.names.labels();
    labels.insert("kubernetes.io/service-name".to_owned(), name.clone());
    labels.insert("endpointslice.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned());
    let target = ObjectReference {
        kind: Some("Pod".to_owned()),
        name: Some(pod.to_owned()),
        namespace: Some(wanted.namespace.clone()),
        ..ObjectReference::default()
    };
    let (port_name, port) = REDIS;
    EndpointSlice {
        address_type: if pod_ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned(),
        endpoints: vec![Endpoint {
            addresses: vec![pod_ip.to_string()],
            conditions: Some(EndpointConditions { ready: Some(true), serving: Some(true), terminating: Some(false) }),
            node_name: node.map(str::to_owned),
            target_ref: Some(target),
            ..Endpoint::default()
        }],
        metadata: metadata(wanted, name, labels),
        ports: Some(vec![EndpointPort {
            name: Some(port_name.to_owned()),
            port: Some(i32::from(port)),
            protocol: Some("TCP".to_owned()),
            app_protocol: None,
        }]),
    }
}

/// The Service of one pod. Its address is announced before the pod is ready: servers must reach each other to become so.
fn of_pod(wanted: &Wanted, pod: String, labels: BTreeMap<String, String>, ports: &[(&str, u16)]) -> Service {
    let selector = BTreeMap::from([(POD_NAME_LABEL.to_owned(), pod.clone())]);
    Service {
        metadata: metadata(wanted, pod, labels),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            selector: Some(selector),
            publish_not_ready_addresses: Some(true),
            ports: Some(ports.iter().map(service_port).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn headless(wanted: &Wanted, name: String, component: Component, ports: &[(&str, u16)]) -> Service {
    Service {
        metadata: metadata(wanted, name, wanted.names.component_labels(component, None)),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            cluster_ip: Some("None".to_owned()),
            selector: wanted.names.selector(Some(component), None).match_labels,
            publish_not_ready_addresses: Some(true),
            ports: Some(ports.iter().map(service_port).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// A Service for clients, of pods that are ready. Without a component it selects none: its endpoints are written by the operator.
fn client(wanted: &Wanted, name: String, component: Option<Component>, port: (&str, u16)) -> Service {
    let labels = component.map_or_else(|| wanted.names.labels(), |component| wanted.names.component_labels(component, None));
    Service {
        metadata: metadata(wanted, name, labels),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            selector: component.and_then(|component| wanted.names.selector(Some(component), None).match_labels),
            ports: Some(vec![service_port(&port)]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn service_port((name, port): &(&str, u16)) -> ServicePort {
    ServicePort {
        name: Some((*name).to_owned()),
        port: i32::from(*port),
        target_port: Some(IntOrString::String((*name).to_owned())),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}
