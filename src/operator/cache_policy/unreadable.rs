//! Policies that cannot be read: their definition changed under them, and lets pass what this operator does not understand.
//!
//! Such a policy goes on as it was when it could last be read, where this process has seen that. Where it has not, all that is looked for is whom
//! it selects: what these workloads have stays as it is, since the policy may have a part in it, and others are no concern of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Resource as _};
use serde_json::Value;
use tracing::debug;

use super::workload::Workload;
use crate::api::CachePolicy;
use crate::operator::controller::Context;
use crate::operator::watches::Policy;

/// The labels that a policy selects pods by.
type Labels = BTreeMap<String, String>;

/// What is remembered of a namespace's policies for when they cannot be read any more, by their uids.
#[derive(Debug, Default)]
pub struct Earlier {
    readable: HashMap<String, Arc<Policy>>,
    /// Of those that never could be read here: the version that was asked for, and whom that selects.
    asked: HashMap<String, (Option<String>, Option<Labels>)>,
}

/// A policy of which nothing is known but whom it selects.
#[derive(Debug, Clone)]
pub struct Unknown {
    /// Its name.
    pub name: String,
    /// The labels that it selects by. `None`: not even these can be told.
    labels: Option<Labels>,
}

impl Unknown {
    /// Whether it may have a part in what a workload has.
    pub fn may_concern(&self, workload: &Workload) -> bool {
        let has = |(name, value): (&String, &String)| workload.labels.get(name) == Some(value);
        self.labels.as_ref().is_none_or(|labels| labels.iter().all(has))
    }
}

impl Earlier {
    /// The policies that stand in for those which cannot be read, and those for which there is none.
    pub async fn settle(
        &mut self,
        context: &Context,
        namespace: &str,
        policies: &[Arc<Policy>],
    ) -> (Vec<Arc<Policy>>, Vec<Unknown>) {
        let (mut readable, mut asked) = (HashMap::new(), HashMap::new());
        let (mut stand_ins, mut unknown) = (Vec::new(), Vec::new());
        for policy in policies {
            let metadata = policy.meta();
            let (Some(uid), Some(name)) = (metadata.uid.clone(), metadata.name.clone()) else { continue };
            if policy.0.is_ok() {
                readable.insert(uid, policy.clone());
            } else if let Some(earlier) = self.readable.remove(&uid) {
                stand_ins.push(earlier.clone());
                readable.insert(uid, earlier);
            } else {
                let version = metadata.resource_version.clone();
                let known = self.asked.remove(&uid).filter(|(of, _)| of.is_some() && *of == version);
                let labels = match known {
                    Some((_, labels)) => Ok(labels),
                    None => selected_by(context, namespace, &name).await,
                };
                if let Ok(labels) = &labels {
                    asked.insert(uid, (version, labels.clone()));
                }
                let of_error = |error| debug!(namespace, name, %error, "a policy that cannot be read was not looked at");
                let labels = labels.map_err(of_error).unwrap_or_default();
                unknown.push(Unknown { name, labels });
            }
        }
        (self.readable, self.asked) = (readable, asked);
        (stand_ins, unknown)
    }
}

/// Whom a policy selects, of which the rest cannot be read. Who may list need not have the right to get.
async fn selected_by(context: &Context, namespace: &str, name: &str) -> Result<Option<Labels>, kube::Error> {
    let resource = ApiResource::erase::<CachePolicy>(&());
    let api = Api::<DynamicObject>::namespaced_with(context.client.clone(), namespace, &resource);
    let listed = api.list(&ListParams::default().fields(&format!("metadata.name={name}"))).await?;
    Ok(listed.items.first().and_then(|policy| labels_in(&policy.data)))
}

/// The labels, where they are some and no more is asked than that they are there: whatever else may be said there selects fewer.
fn labels_in(policy: &Value) -> Option<Labels> {
    let labels = policy.pointer("/spec/workloads/matchLabels")?.as_object().filter(|labels| !labels.is_empty())?;
    labels.iter().map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whom_an_unreadable_policy_selects_is_read_alone() {
        let of = |workloads: Value| labels_in(&json!({"spec": {"rules": 7, "workloads": workloads}}));
        let labels = of(json!({"matchLabels": {"app": "shop", "tier": "web"}, "matchSomething": true}));
        assert_eq!(labels.as_ref().map(BTreeMap::len), Some(2));
        for nothing in [json!({}), json!({"matchLabels": {}}), json!({"matchLabels": {"app": 7}}), json!("app=shop")] {
            assert_eq!(of(nothing), None);
        }
        let unknown = |labels| Unknown { name: "new".to_owned(), labels };
        let other = Some(BTreeMap::from([("app".to_owned(), "other".to_owned())]));
        assert!(unknown(labels).may_concern(&Workload::shop()) && unknown(None).may_concern(&Workload::shop()));
        assert!(!unknown(other).may_concern(&Workload::shop()));
    }
}
