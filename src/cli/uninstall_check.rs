//! `larder uninstall-check`: nothing is uninstalled under a cache that is in use.

use std::fmt::Debug;
use std::process::ExitCode;
use std::time::Duration;

use kube::api::{ListParams, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::timeout;

use super::{Failure, Outcome};
use crate::api::{CacheCluster, CachePolicy};
use crate::operator::api_error;

/// How long the whole may take: less than the chart's hook is given.
const LIMIT: Duration = Duration::from_secs(90);
/// How many objects one answer of the API server holds.
const PAGE: u32 = 500;
/// How many objects a refusal names.
const NAMED: usize = 20;

/// Refuse while custom resources exist that nothing would look after; the chart runs it before it is uninstalled
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larder uninstall-check                                  all namespaces
  larder uninstall-check --watch-namespaces shop,search   these two")]
pub struct Args {
    /// The namespaces that are looked at, separated by commas. Default: all
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    watch_namespaces: Vec<String>,
    /// Refuse nothing, and remove the finalizers of what exists, so that it can be deleted later
    #[arg(long)]
    force: bool,
}

/// A custom resource that exists.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    kind: String,
    namespace: String,
    name: String,
    finalizers: bool,
}

/// Looks, and refuses or makes way.
pub fn run(args: Args) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no event loop: {error}"), "raise the limits on open files"))?;
    let checked = runtime.block_on(async { timeout(LIMIT, check(&args)).await });
    checked.unwrap_or_else(|_| {
        let what = format!("the API server did not answer within {} s", LIMIT.as_secs());
        Err(Failure::new(what, "try again once it answers, as `kubectl get --raw /readyz` shows"))
    })
}

async fn check(args: &Args) -> Outcome {
    let client = Client::try_default().await.map_err(|error| {
        Failure::new(format!("no API server is known: {error}"), "run it in a pod with a service account, or set KUBECONFIG")
    })?;
    let scopes: Vec<Option<&str>> = match args.watch_namespaces.as_slice() {
        [] => vec![None],
        names => names.iter().map(|name| Some(name.as_str())).collect(),
    };
    let mut found = Vec::new();
    for namespace in scopes {
        found.extend(existing::<CacheCluster>(&client, namespace).await?);
        found.extend(existing::<CachePolicy>(&client, namespace).await?);
    }
    if args.force {
        for object in found.iter().filter(|object| object.finalizers) {
            release(&client, object).await?;
        }
        tracing::info!(left = found.len(), "uninstalling although custom resources exist, as asked");
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(refusal(&found)) }
}

fn refusal(found: &[Found]) -> Failure {
    let mut names: Vec<String> =
        found.iter().take(NAMED).map(|object| format!("{} {}/{}", object.kind, object.namespace, object.name)).collect();
    if found.len() > NAMED {
        names.push(format!("and {} more", found.len() - NAMED));
    }
    Failure::new(
        format!("custom resources exist that nothing would look after:\n{}", names.join("\n")),
        "delete them, which deletes the caches; or leave the caches running unattended:\n\
         helm rollback RELEASE REVISION with the last that helm history RELEASE shows, helm upgrade RELEASE CHART --reuse-values --set uninstall.force=true, and uninstall again",
    )
}

/// The objects of a kind in a namespace, or in all. Only their metadata is read, so that a malformed one counts too.
async fn existing<K>(client: &Client, namespace: Option<&str>) -> Result<Vec<Found>, Failure>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    let api = api::<K>(client, namespace);
    let mut page = ListParams::default().limit(PAGE);
    let mut found = Vec::new();
    loop {
        let list = match api.list_metadata(&page).await {
            Ok(list) => list,
            // Without its definition there is no object of the kind.
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(found),
            Err(error) => return Err(unanswered(&format!("the list of {}", K::plural(&())), &error)),
        };
        found.extend(list.items.into_iter().map(|object| Found {
            kind: K::kind(&()).into_owned(),
            namespace: object.metadata.namespace.unwrap_or_default(),
            name: object.metadata.name.unwrap_or_default(),
            finalizers: object.metadata.finalizers.is_some_and(|finalizers| !finalizers.is_empty()),
        }));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(found),
        }
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

async fn release(client: &Client, object: &Found) -> Result<(), Failure> {
    let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    let (params, name, namespace) = (PatchParams::default(), object.name.as_str(), Some(object.namespace.as_str()));
    let patched = if object.kind == CacheCluster::kind(&()) {
        api::<CacheCluster>(client, namespace).patch_metadata(name, &params, &patch).await.map(drop)
    } else {
        api::<CachePolicy>(client, namespace).patch_metadata(name, &params, &patch).await.map(drop)
    };
    match patched {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map_err(|error| unanswered(&format!("the patch of {} {name}", object.kind), &error)),
    }
}

fn unanswered(request: &str, error: &kube::Error) -> Failure {
    Failure::new(format!("{request} failed: {}", api_error::describe(error)), api_error::remedy(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_what_exists_and_stays_short() {
        let found = |count: usize| -> Vec<Found> {
            let object = |n| Found {
                kind: "CacheCluster".to_owned(),
                namespace: "shop".to_owned(),
                name: format!("c{n}"),
                finalizers: false,
            };
            (0..count).map(object).collect()
        };
        let expected = Failure::new(
            "custom resources exist that nothing would look after:\nCacheCluster shop/c0\nCacheCluster shop/c1",
            "delete them, which deletes the caches; or leave the caches running unattended:\n\
             helm rollback RELEASE REVISION with the last that helm history RELEASE shows, helm upgrade RELEASE CHART --reuse-values --set uninstall.force=true, and uninstall again",
        );
        assert_eq!(refusal(&found(2)), expected);
        let long = format!("{:?}", refusal(&found(NAMED + 3)));
        assert!(long.contains("and 3 more") && !long.contains("c20"), "{long}");
    }
}
