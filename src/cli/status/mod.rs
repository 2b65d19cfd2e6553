//! `larder status`: how caches and policies are.

mod judge;
mod render;

use std::process::ExitCode;

use kube::api::{ApiResource, DynamicObject, ListParams};
use serde_json::Value;

use self::judge::Report;
use super::cluster::{Cluster, ClusterArgs, block_on, object_name};
use super::output::{self, Format};
use super::{Failure, Outcome, WRONG_LINE};
use crate::api::{CacheCluster, CachePolicy};

/// The exit code where something is not well.
const NOT_WELL: u8 = 1;

/// Show how CacheClusters and CachePolicies are: what is not well first, with the reason and what to do
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  all is well, or only under way
  1  something is not well
  2  the API server cannot be asked, there is no such object, or the command line is wrong

Examples:
  larder status                            the namespace of the context
  larder status main -n shop               the CacheCluster and the CachePolicy of that name
  larder status -A                         all namespaces
  larder status -A --output json | jq '.policies[] | select(.well | not)'
  until larder status main >/dev/null; do sleep 5; done")]
pub struct Args {
    /// The name of a CacheCluster or a CachePolicy; otherwise all of them
    #[arg(value_name = "NAME", value_parser = object_name)]
    name: Option<String>,
    /// The namespace; otherwise that of the context
    #[arg(long, short, value_name = "NAME", value_parser = object_name, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// All namespaces
    #[arg(long, short = 'A')]
    all_namespaces: bool,
    /// How it is written, on standard output
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Looks, and says how it is.
pub fn run(args: Args) -> Outcome {
    // A code of 1 would say that something is not well.
    show(&args).map_err(|failure| failure.with_code(WRONG_LINE))
}

fn show(args: &Args) -> Outcome {
    let report = block_on(look(args))?;
    output::answer(args.output, &report, |paint| render::table(&report, args.all_namespaces, paint))?;
    Ok(if report.well { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) })
}

async fn look(args: &Args) -> Result<Report, Failure> {
    let cluster = args.cluster.open().await?;
    let namespace = args.namespace.clone().unwrap_or_else(|| cluster.namespace.clone());
    let scope = (!args.all_namespaces).then_some(namespace.as_str());
    let name = args.name.as_deref();
    let clusters = objects(&cluster, &ApiResource::erase::<CacheCluster>(&()), scope, name).await?;
    let policies = objects(&cluster, &ApiResource::erase::<CachePolicy>(&()), scope, name).await?;
    if let Some(name) = name
        && clusters.is_empty()
        && policies.is_empty()
    {
        let place = scope.map_or_else(|| "in any namespace".to_owned(), |namespace| format!("in namespace {namespace}"));
        let next = "list what there is with `larder status`, or look elsewhere with --namespace or -A";
        return Err(Failure::new(format!("there is no CacheCluster and no CachePolicy `{name}` {place}"), next));
    }
    Ok(Report::of(&clusters, &policies))
}

async fn objects(
    cluster: &Cluster,
    resource: &ApiResource,
    scope: Option<&str>,
    name: Option<&str>,
) -> Result<Vec<Value>, Failure> {
    let params = name.map_or_else(ListParams::default, |name| ListParams::default().fields(&format!("metadata.name={name}")));
    match cluster.list(resource, scope, params, |_| false).await? {
        Some(found) => found.iter().map(as_json).collect(),
        None => Err(Failure::new(
            format!("the API server knows no {}", resource.plural),
            "install Larder's definitions: larder crds | kubectl apply --server-side -f -, or the chart",
        )),
    }
}

fn as_json(object: &DynamicObject) -> Result<Value, Failure> {
    serde_json::to_value(object).map_err(|error| Failure::new(error, "report this"))
}
