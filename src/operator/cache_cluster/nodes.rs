//! What is asked of nodes: whether they are ready, and whether a pod could be scheduled on them. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Taint};

use crate::api::cache_cluster::{PodOptions, TaintEffect, TolerationOperator, TolerationSpec};

/// Whether a node says that it is ready.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The nodes on which a pod with these options could be scheduled: ready, not cordoned, and without a taint that it does not tolerate.
/// None where the options select nodes by labels, of which Larder keeps none. Whether a node has room, the scheduler alone knows.
pub fn open(nodes: &[Arc<Node>], options: &PodOptions) -> BTreeSet<String> {
    if !options.node_selector.is_empty() {
        return BTreeSet::new();
    }
    let is_open = |node: &&Arc<Node>| is_ready(node) && lets_in(node, &options.tolerations);
    nodes.iter().filter(is_open).filter_map(|node| node.metadata.name.clone()).collect()
}

fn lets_in(node: &Node, tolerations: &[TolerationSpec]) -> bool {
    let Some(spec) = &node.spec else { return true };
    let tolerated = |taint: &Taint| tolerations.iter().any(|toleration| tolerates(toleration, taint));
    let mut taints = spec.taints.iter().flatten().filter(|taint| taint.effect != TaintEffect::PreferNoSchedule.as_str());
    spec.unschedulable != Some(true) && taints.all(tolerated)
}

fn tolerates(toleration: &TolerationSpec, taint: &Taint) -> bool {
    let TolerationSpec { key, operator, value, effect, toleration_seconds } = toleration;
    // One that ends is no place to stay.
    toleration_seconds.is_none()
        && effect.is_none_or(|effect| effect.as_str() == taint.effect)
        && key.as_ref().is_none_or(|key| *key == taint.key)
        && match operator {
            Some(TolerationOperator::Exists) => true,
            Some(TolerationOperator::Equal) | None => {
                value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
            }
        }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, ready: &str, spec: Value) -> Arc<Node> {
        let node = json!({
            "metadata": {"name": name},
            "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(node).unwrap())
    }

    fn taint(value: &str, effect: &str) -> Value {
        json!({"taints": [{"key": "for", "value": value, "effect": effect}]})
    }

    #[test]
    fn a_node_is_open_where_nothing_keeps_pods_away() {
        let nodes = [
            node("free", "True", json!({})),
            node("down", "False", json!({})),
            node("cordoned", "True", json!({"unschedulable": true})),
            node("reluctant", "True", taint("x", "PreferNoSchedule")),
            node("caches", "True", taint("caches", "NoSchedule")),
            node("others", "True", taint("others", "NoExecute")),
        ];
        let open_to = |options: Value| open(&nodes, &serde_json::from_value(options).unwrap()).into_iter().collect::<Vec<_>>();
        assert_eq!(open_to(json!({})), ["free", "reluctant"]);
        let caches = json!({"tolerations": [{"key": "for", "value": "caches", "effect": "NoSchedule"}]});
        assert_eq!(open_to(caches), ["caches", "free", "reluctant"]);
        assert_eq!(open_to(json!({"tolerations": [{"operator": "Exists"}]})), ["caches", "free", "others", "reluctant"]);
        let for_a_while =
            json!({"tolerations": [{"key": "for", "value": "others", "effect": "NoExecute", "tolerationSeconds": 9}]});
        assert_eq!(open_to(for_a_while), ["free", "reluctant"]);
        assert!(open_to(json!({"nodeSelector": {"disk": "fast"}})).is_empty());
    }
}
