//! The Kubernetes objects that run a relay, in its policy's namespace. Pure: typed objects for server-side apply, without a client.
//!
//! A relay reads its snapshot and what its Secret holds while it runs. Only where it would have to log in by other files its pods are made
//! anew; and when the operator has another image.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, HTTPGetAction,
    LocalObjectReference, PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
    WeightedPodAffinityTerm,
};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::ObjectMeta;
use serde_json::json;

use crate::operator::cache_cluster::names::MANAGER;
use crate::operator::cache_cluster::objects::Installation;
use crate::operator::cache_policy::objects::{USES_LABEL, WORKLOAD_ANNOTATION};
use crate::operator::cache_policy::workload::Workload;
use crate::policy::binding::{BindingName, POLICY_DIR, SECRET_DIR, SNAPSHOT_FILE};
use crate::policy::digest::sha256;
use crate::policy::snapshot::Cluster;

/// The label of a relay's objects and pods, with its binding's name.
pub const RELAY_LABEL: &str = "larder.dev/relay";
/// The value of `app.kubernetes.io/name` on them.
pub const NAME: &str = "larder-relay";
/// The annotation of pods with a fingerprint of the files that they read once.
const FILES_ANNOTATION: &str = "larder.dev/reads";
/// The port of health and metrics.
const ADMIN_PORT: u16 = 9122;
/// How many there are: two survive the loss of one.
const REPLICAS: i32 = 2;
/// A user and group that owns nothing.
const USER: i64 = 65_532;
/// How long a relay may take to end: to finish what it tells an origin, and to give up its partitions.
const GRACE_SECS: i64 = 30;

/// What relays are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayOptions {
    /// The processor time that each asks for.
    pub cpu: String,
    /// The memory that each asks for, and may have at most.
    pub memory: String,
    /// Names of Secrets with the registry's login, in each namespace with a relay.
    pub pull_secrets: Vec<String>,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self { cpu: "50m".to_owned(), memory: "128Mi".to_owned(), pull_secrets: Vec::new() }
    }
}

/// What the objects of a relay are made of.
#[derive(Debug, Clone, Copy)]
pub struct Relay<'a> {
    /// The policy, as a workload.
    pub workload: &'a Workload,
    /// Whose ConfigMap and Secret it mounts.
    pub binding: &'a BindingName,
    /// Where its snapshot says that the cache is.
    pub cluster: &'a Cluster,
}

/// The objects of a relay, besides those of its binding.
#[derive(Debug, Clone, PartialEq)]
pub struct Objects {
    /// Who may ask it: whoever reads metrics and health.
    pub network_policy: NetworkPolicy,
    /// How many of its pods may be drained at the same time.
    pub disruption_budget: PodDisruptionBudget,
    /// Its pods.
    pub deployment: Deployment,
}

/// The name of all of them.
pub fn object_name(binding: &BindingName) -> String {
    format!("larder-r-{binding}")
}

/// Builds a relay's objects.
pub fn objects(relay: &Relay<'_>, installation: &Installation, options: &RelayOptions) -> Objects {
    Objects {
        network_policy: NetworkPolicy {
            metadata: relay.metadata(),
            spec: Some(NetworkPolicySpec {
                pod_selector: Some(relay.selector()),
                policy_types: Some(vec!["Ingress".to_owned()]),
                ingress: Some(vec![NetworkPolicyIngressRule {
                    from: None,
                    ports: Some(vec![NetworkPolicyPort {
                        port: Some(IntOrString::Int(i32::from(ADMIN_PORT))),
                        protocol: Some("TCP".to_owned()),
                        end_port: None,
                    }]),
                }]),
                egress: None,
            }),
        },
        disruption_budget: PodDisruptionBudget {
            metadata: relay.metadata(),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(relay.selector()),
                // One that cannot work holds up no drain of its node.
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        },
        deployment: Deployment {
            metadata: relay.metadata(),
            spec: Some(DeploymentSpec {
                replicas: Some(REPLICAS),
                selector: relay.selector(),
                template: relay.template(installation, options),
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".to_owned()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(IntOrString::Int(1)),
                        max_unavailable: Some(IntOrString::Int(1)),
                    }),
                }),
                revision_history_limit: Some(2),
                ..DeploymentSpec::default()
            }),
            status: None,
        },
    }
}

impl Relay<'_> {
    fn labels(&self) -> BTreeMap<String, String> {
        let labels = [
            ("app.kubernetes.io/name", NAME),
            ("app.kubernetes.io/managed-by", MANAGER),
            (RELAY_LABEL, self.binding.as_str()),
            (USES_LABEL, &self.cluster.name),
        ];
        labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn selector(&self) -> LabelSelector {
        let label = (RELAY_LABEL.to_owned(), self.binding.as_str().to_owned());
        LabelSelector { match_labels: Some(BTreeMap::from([label])), match_expressions: None }
    }

    fn metadata(&self) -> ObjectMeta {
        let Workload { kind, name, namespace, .. } = self.workload;
        ObjectMeta {
            name: Some(object_name(self.binding)),
            namespace: Some(namespace.clone()),
            labels: Some(self.labels()),
            annotations: Some(BTreeMap::from([(WORKLOAD_ANNOTATION.to_owned(), format!("{kind}/{name}"))])),
            owner_references: self.workload.owner_reference().map(|owner| vec![owner]),
            ..ObjectMeta::default()
        }
    }

    /// A fingerprint of which files it logs in by, and whom it trusts: what is in them may change.
    fn files(&self) -> String {
        let Cluster { name, tls, auth, sentinel_auth, .. } = self.cluster;
        sha256(json!([name, tls, auth, sentinel_auth]).to_string().as_bytes())[..16].to_owned()
    }

    fn template(&self, installation: &Installation, options: &RelayOptions) -> PodTemplateSpec {
        let pull_secrets: Vec<_> = options.pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() }).collect();
        PodTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: Some(self.labels()),
                annotations: Some(BTreeMap::from([(FILES_ANNOTATION.to_owned(), self.files())])),
                ..ObjectMeta::default()
            }),
            spec: Some(PodSpec {
                containers: vec![container(installation, options)],
                volumes: Some(volumes(self.binding)),
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                image_pull_secrets: (!pull_secrets.is_empty()).then_some(pull_secrets),
                affinity: Some(self.apart()),
                topology_spread_constraints: Some(vec![self.spread("topology.kubernetes.io/zone")]),
                termination_grace_period_seconds: Some(GRACE_SECS),
                security_context: Some(PodSecurityContext {
                    run_as_non_root: Some(true),
                    run_as_user: Some(USER),
                    run_as_group: Some(USER),
                    fs_group: Some(USER),
                    seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
                    ..PodSecurityContext::default()
                }),
                ..PodSpec::default()
            }),
        }
    }

    /// On nodes of their own, where there are enough.
    fn apart(&self) -> Affinity {
        let term = PodAffinityTerm {
            label_selector: Some(self.selector()),
            topology_key: "kubernetes.io/hostname".to_owned(),
            ..PodAffinityTerm::default()
        };
        let preferred = vec![WeightedPodAffinityTerm { pod_affinity_term: term, weight: 100 }];
        let rules = PodAntiAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(preferred),
            ..PodAntiAffinity::default()
        };
        Affinity { pod_anti_affinity: Some(rules), ..Affinity::default() }
    }

    fn spread(&self, topology_key: &str) -> TopologySpreadConstraint {
        TopologySpreadConstraint {
            label_selector: Some(self.selector()),
            max_skew: 1,
            topology_key: topology_key.to_owned(),
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            ..TopologySpreadConstraint::default()
        }
    }
}

fn container(installation: &Installation, options: &RelayOptions) -> Container {
    let probe = |path: &str, period: i32, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("metrics".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    let args = ["relay".to_owned(), "--snapshot".to_owned(), format!("{POLICY_DIR}/{SNAPSHOT_FILE}"), "--admin".to_owned()];
    Container {
        name: "relay".to_owned(),
        image: Some(installation.larder_image.clone()),
        image_pull_policy: installation.image_pull_policy.clone(),
        command: Some(vec!["/larderd".to_owned()]),
        args: Some(args.into_iter().chain([format!("[::]:{ADMIN_PORT}")]).collect()),
        ports: Some(vec![ContainerPort {
            name: Some("metrics".to_owned()),
            container_port: i32::from(ADMIN_PORT),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: Some(resources(options)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        // Where the cache or an origin is away, another process would find no more than this one.
        liveness_probe: Some(probe("/livez", 10, 6)),
        readiness_probe: Some(probe("/readyz", 5, 2)),
        volume_mounts: Some(vec![
            mount("policy", POLICY_DIR, true),
            mount("secret", SECRET_DIR, true),
            mount("tmp", "/tmp", false),
        ]),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

fn resources(options: &RelayOptions) -> ResourceRequirements {
    let quantity = |name: &str, text: &str| (name.to_owned(), Quantity(text.to_owned()));
    ResourceRequirements {
        requests: Some(BTreeMap::from([quantity("cpu", &options.cpu), quantity("memory", &options.memory)])),
        limits: Some(BTreeMap::from([quantity("memory", &options.memory)])),
        claims: None,
    }
}

/// What its binding holds, and nothing of any other.
fn volumes(binding: &BindingName) -> Vec<Volume> {
    let config_map = ConfigMapVolumeSource { name: binding.object_name(), ..ConfigMapVolumeSource::default() };
    let secret = SecretVolumeSource {
        secret_name: Some(binding.object_name()),
        default_mode: Some(0o440),
        ..SecretVolumeSource::default()
    };
    vec![
        Volume { name: "policy".to_owned(), config_map: Some(config_map), ..Volume::default() },
        Volume { name: "secret".to_owned(), secret: Some(secret), ..Volume::default() },
        Volume { name: "tmp".to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
    ]
}

fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::operator::cache_policy::place::Place;
    use crate::policy::snapshot::Topology;

    fn build(tls: bool, image: &str) -> Objects {
        let topology = Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["10.96.0.7:26379".to_owned()] };
        let cluster = Place { topology, tls, keeping: None }.cluster("main");
        let workload =
            Workload { kind: "CachePolicy".to_owned(), api_version: "larder.dev/v1alpha1".to_owned(), ..Workload::shop() };
        let binding = workload.binding("main");
        let installation = Installation {
            larder_image: image.to_owned(),
            image_pull_policy: Some("Always".to_owned()),
            operator_namespace: "larder-system".to_owned(),
        };
        let relay = Relay { workload: &workload, binding: &binding, cluster: &cluster };
        let options = RelayOptions { pull_secrets: vec!["registry".to_owned()], ..RelayOptions::default() };
        objects(&relay, &installation, &options)
    }

    fn labels() -> Value {
        json!({
            "app.kubernetes.io/name": "larder-relay", "app.kubernetes.io/managed-by": "larder",
            "larder.dev/relay": "shop-0c0df138e7", "larder.dev/uses-cluster": "main",
        })
    }

    fn metadata() -> Value {
        json!({
            "name": "larder-r-shop-0c0df138e7", "namespace": "store", "labels": labels(),
            "annotations": {"larder.dev/workload": "CachePolicy/shop"},
            "ownerReferences": [{"apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "name": "shop", "uid": "8d2c"}],
        })
    }

    fn selector() -> Value {
        json!({"matchLabels": {"larder.dev/relay": "shop-0c0df138e7"}})
    }

    #[test]
    fn the_pods_of_a_relay() {
        let deployment = json!(build(false, "larder:1").deployment);
        assert_eq!((&deployment["metadata"], &deployment["spec"]["selector"]), (&metadata(), &selector()));
        assert_eq!(deployment["spec"]["replicas"], 2);
        let pod = json!({
            "containers": [{
                "name": "relay", "image": "larder:1", "imagePullPolicy": "Always", "command": ["/larderd"],
                "args": ["relay", "--snapshot", "/etc/larder/policy/snapshot.json", "--admin", "[::]:9122"],
                "ports": [{"name": "metrics", "containerPort": 9122, "protocol": "TCP"}],
                "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "128Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                },
                "livenessProbe": {
                    "httpGet": {"path": "/livez", "port": "metrics"}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6,
                },
                "readinessProbe": {
                    "httpGet": {"path": "/readyz", "port": "metrics"}, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2,
                },
                "volumeMounts": [
                    {"name": "policy", "mountPath": "/etc/larder/policy", "readOnly": true},
                    {"name": "secret", "mountPath": "/etc/larder/secret", "readOnly": true},
                    {"name": "tmp", "mountPath": "/tmp"},
                ],
                "terminationMessagePolicy": "FallbackToLogsOnError",
            }],
            "volumes": [
                {"name": "policy", "configMap": {"name": "larder-b-shop-0c0df138e7"}},
                {"name": "secret", "secret": {"secretName": "larder-b-shop-0c0df138e7", "defaultMode": 0o440}},
                {"name": "tmp", "emptyDir": {}},
            ],
            "automountServiceAccountToken": false, "enableServiceLinks": false,
            "imagePullSecrets": [{"name": "registry"}],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "podAffinityTerm": {"labelSelector": selector(), "topologyKey": "kubernetes.io/hostname"}},
            ]}},
            "topologySpreadConstraints": [{
                "labelSelector": selector(), "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
            }],
            "terminationGracePeriodSeconds": 30,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        });
        let template = &deployment["spec"]["template"];
        assert_eq!((&template["spec"], &template["metadata"]["labels"]), (&pod, &labels()));
    }

    #[test]
    fn one_pod_at_a_time_is_drained_and_none_is_asked_for_anything_but_figures() {
        let Objects { network_policy, disruption_budget, .. } = build(false, "larder:1");
        let expected = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata(),
            "spec": {"maxUnavailable": 1, "selector": selector(), "unhealthyPodEvictionPolicy": "AlwaysAllow"},
        });
        assert_eq!(json!(disruption_budget), expected);
        let spec = json!({
            "podSelector": selector(), "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 9122, "protocol": "TCP"}]}],
        });
        let expected =
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata(), "spec": spec});
        assert_eq!(json!(network_policy), expected);
    }

    #[test]
    fn pods_are_made_anew_for_what_they_read_once() {
        let annotation = |objects: &Objects| json!(objects.deployment)["spec"]["template"]["metadata"]["annotations"].clone();
        let plain = build(false, "larder:1");
        assert_eq!(annotation(&plain), annotation(&build(false, "larder:2")));
        assert_ne!(annotation(&plain), annotation(&build(true, "larder:1")), "it trusts somebody");
    }
}
