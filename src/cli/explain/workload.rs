//! Which workload is meant, and what of it runs.

use std::collections::BTreeMap;
use std::str::FromStr;

use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::core::GroupVersionKind;
use serde_json::Value;

use crate::cli::Failure;
use crate::cli::cluster::{Cluster, object_name};
use crate::injector::CONTAINER;
use crate::operator::cache_policy::objects::BINDING_LABEL;
use crate::operator::owner::{Owner, owner};
use crate::policy::binding::ADMIN_SOCKET;

/// The kinds of workloads, by what people call them: kind, group, version.
const KINDS: [(&[&str], &str, &str, &str); 8] = [
    (&["deployment", "deployments", "deploy"], "Deployment", "apps", "v1"),
    (&["statefulset", "statefulsets", "sts"], "StatefulSet", "apps", "v1"),
    (&["daemonset", "daemonsets", "ds"], "DaemonSet", "apps", "v1"),
    (&["replicaset", "replicasets", "rs"], "ReplicaSet", "apps", "v1"),
    (&["job", "jobs"], "Job", "batch", "v1"),
    (&["cronjob", "cronjobs", "cj"], "CronJob", "batch", "v1"),
    (&["rollout", "rollouts"], "Rollout", "argoproj.io", "v1alpha1"),
    (&["pod", "pods", "po"], "Pod", "", "v1"),
];
/// How many pods are asked, where one does not answer.
pub const MOST_ASKED: usize = 3;

/// A workload, as `KIND/NAME` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadName {
    /// Such as `Deployment`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    group: &'static str,
    version: &'static str,
}

impl FromStr for WorkloadName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, name) = text.split_once('/').ok_or("write KIND/NAME, such as deployment/shop")?;
        let wanted = kind.to_ascii_lowercase();
        let found = KINDS.iter().find(|(words, ..)| words.contains(&wanted.as_str()));
        let &(_, kind, group, version) = found.ok_or_else(|| {
            let kinds: Vec<&str> = KINDS.iter().filter_map(|(words, ..)| words.first().copied()).collect();
            format!("`{kind}` is no kind of workload: write one of {}", kinds.join(", "))
        })?;
        Ok(Self { kind, name: object_name(name)?, group, version })
    }
}

impl std::fmt::Display for WorkloadName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

impl WorkloadName {
    fn resource(&self) -> ApiResource {
        ApiResource::from_gvk(&GroupVersionKind::gvk(self.group, self.version, self.kind))
    }

    /// Its `apiVersion`.
    pub fn api_version(&self) -> String {
        self.resource().api_version
    }

    fn owns(&self, pod: &Value) -> bool {
        let Owner { kind, name } = owner(pod);
        kind == self.kind && name == self.name
    }

    /// The labels of the pods that it makes. `None`: there is no such workload.
    pub async fn labels(&self, cluster: &Cluster, namespace: &str) -> Result<Option<BTreeMap<String, String>>, Failure> {
        let Some(object) = cluster.get(&self.resource(), namespace, &self.name).await? else { return Ok(None) };
        let path = match self.kind {
            "Pod" => return Ok(Some(object.metadata.labels.unwrap_or_default())),
            "CronJob" => "/spec/jobTemplate/spec/template/metadata/labels",
            _ => "/spec/template/metadata/labels",
        };
        let labels = object.data.pointer(path).and_then(Value::as_object).into_iter().flatten();
        Ok(Some(labels.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()))
    }

    /// Its pods whose sidecar runs, at most as many as are ever asked.
    pub async fn injected(&self, cluster: &Cluster, namespace: &str) -> Result<Vec<Injected>, Failure> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
        let of_mine = |pod: &DynamicObject| {
            let pod = serde_json::to_value(pod).unwrap_or_default();
            self.owns(&pod).then(|| Injected::of(&pod)).flatten()
        };
        let enough = |found: &[DynamicObject]| found.iter().filter_map(of_mine).take(MOST_ASKED).count() == MOST_ASKED;
        let pods = cluster.list(&resource, Some(namespace), ListParams::default().labels(BINDING_LABEL), enough).await?;
        Ok(pods.unwrap_or_default().iter().filter_map(of_mine).take(MOST_ASKED).collect())
    }
}

/// A pod with a sidecar that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    /// The pod's name.
    pub pod: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The program that the sidecar is.
    pub program: String,
    /// Where it explains itself.
    pub socket: String,
}

impl Injected {
    /// `None`: its sidecar does not run.
    fn of(pod: &Value) -> Option<Self> {
        let ours = |list: &'static str| {
            let of_list = pod.pointer(list)?.as_array()?;
            of_list.iter().find(|container| container["name"] == CONTAINER)
        };
        let status = ours("/status/initContainerStatuses")?;
        if status["state"]["running"].is_null() || !pod["metadata"]["deletionTimestamp"].is_null() {
            return None;
        }
        let container = ours("/spec/initContainers")?;
        let words = |field: &str| container[field].as_array().into_iter().flatten().filter_map(Value::as_str);
        let socket = words("args").skip_while(|word| *word != "--admin-socket").nth(1).unwrap_or(ADMIN_SOCKET);
        let labels = pod["metadata"]["labels"].as_object().into_iter().flatten();
        Some(Self {
            pod: pod["metadata"]["name"].as_str()?.to_owned(),
            labels: labels.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect(),
            program: words("command").next().unwrap_or("/larderd").to_owned(),
            socket: socket.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn workloads_are_named_as_kubectl_names_them() {
        let shop: WorkloadName = "deploy/shop".parse().expect("a workload");
        assert_eq!((shop.kind, shop.name.as_str(), shop.api_version().as_str()), ("Deployment", "shop", "apps/v1"));
        assert_eq!("Pod/a".parse::<WorkloadName>().expect("a workload").api_version(), "v1");
        assert_eq!("cronjobs/a".parse::<WorkloadName>().expect("a workload").kind, "CronJob");
        let error = "shop".parse::<WorkloadName>().expect_err("no kind");
        assert!(error.contains("KIND/NAME"), "{error}");
        let error = "service/shop".parse::<WorkloadName>().expect_err("no workload");
        assert!(error.contains("`service`") && error.contains("statefulset"), "{error}");
        assert!("deploy/A b".parse::<WorkloadName>().is_err() && "deploy/".parse::<WorkloadName>().is_err());
    }

    fn pod() -> Value {
        json!({
            "metadata": {
                "name": "shop-6f7c-x", "labels": {"app": "shop", "pod-template-hash": "6f7c", "larder.dev/binding": "shop-1"},
                "ownerReferences": [{"kind": "ReplicaSet", "name": "shop-6f7c", "controller": true}],
            },
            "spec": {"initContainers": [
                {"name": "other"},
                {"name": "larder-sidecar", "command": ["/larderd"], "args": ["sidecar", "--admin-socket", "/a.sock", "--drain", "1s"]},
            ]},
            "status": {"initContainerStatuses": [{"name": "larder-sidecar", "state": {"running": {"startedAt": "now"}}}]},
        })
    }

    #[test]
    fn a_pod_tells_how_its_sidecar_is_asked() {
        let shop: WorkloadName = "deployment/shop".parse().expect("a workload");
        assert!(shop.owns(&pod()));
        assert!(!"deployment/other".parse::<WorkloadName>().expect("a workload").owns(&pod()));
        let found = Injected::of(&pod()).expect("it runs");
        assert_eq!((found.pod.as_str(), found.program.as_str(), found.socket.as_str()), ("shop-6f7c-x", "/larderd", "/a.sock"));
        assert_eq!(found.labels["app"], "shop");
    }

    #[test]
    fn who_does_not_run_is_not_asked() {
        let mut waiting = pod();
        waiting["status"]["initContainerStatuses"][0]["state"] = json!({"waiting": {"reason": "ImagePullBackOff"}});
        let mut ending = pod();
        ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        let mut bare = pod();
        bare["status"] = json!({});
        for pod in [waiting, ending, bare] {
            assert_eq!(Injected::of(&pod), None, "{pod}");
        }
    }
}
