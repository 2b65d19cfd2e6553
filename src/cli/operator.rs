//! `larder operator`: keeps CacheClusters on Kubernetes.

use std::net::SocketAddr;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use super::{Failure, Outcome};
use crate::operator::cache_cluster::objects::Installation;
use crate::operator::controller::{self, Config, OperatorError};

/// Where Kubernetes tells a pod its namespace.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// Keep the CacheClusters of a Kubernetes cluster
#[derive(clap::Args)]
#[command(after_help = "\
Usually the Helm chart starts it. Several may run: one leads, and another takes over when it is gone. It finds the API server by its
pod's ServiceAccount, or by KUBECONFIG. /livez, /readyz and /metrics tell how it does.

Examples:
  larder operator --watch-namespaces shop,search --larder-image registry.example/larder:0.1.0
                                                   the CacheClusters of two namespaces
  larder operator --larder-image registry.example/larder:0.1.0 --lease-namespace larder --listen 127.0.0.1:8080
                                                   those of all namespaces")]
pub struct Args {
    /// The namespaces whose CacheClusters are kept, separated by commas; otherwise all
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = clap::builder::NonEmptyStringValueParser::new())]
    watch_namespaces: Vec<String>,
    /// Where /livez, /readyz and /metrics are served
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Larder's own image, which each server's pod takes its agent from
    #[arg(long, value_name = "IMAGE")]
    larder_image: String,
    /// When that image is pulled: Always, IfNotPresent or Never; otherwise as Kubernetes decides by its tag
    #[arg(long, value_name = "POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: Option<String>,
    /// The namespace of the Lease that says which operator leads; otherwise the pod's own
    #[arg(long, value_name = "NAME")]
    lease_namespace: Option<String>,
    /// This process' name among the operators; otherwise the host's name with a random end
    #[arg(long, value_name = "NAME")]
    identity: Option<String>,
}

/// Runs until a signal comes.
pub fn run(args: Args) -> Outcome {
    let config = config(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, "see that the system has file descriptors left"))?;
    runtime.block_on(async {
        let stopped = stopped().map_err(|error| Failure::new(error, "see that the system has file descriptors left"))?;
        controller::run(config, stopped).await.map_err(explain)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn config(args: Args) -> Result<Config, Failure> {
    let Args { mut watch_namespaces, listen, larder_image, image_pull_policy, lease_namespace, identity } = args;
    watch_namespaces.sort();
    watch_namespaces.dedup();
    let own_namespace = || std::fs::read_to_string(NAMESPACE_FILE).ok().map(|name| name.trim().to_owned());
    let Some(lease_namespace) = lease_namespace.or_else(own_namespace) else {
        return Err(Failure::new("nothing says where the Lease of the operators is", "name a namespace with --lease-namespace"));
    };
    let host = || std::env::var("HOSTNAME").unwrap_or_else(|_| "operator".to_owned());
    let identity = identity.unwrap_or_else(|| format!("{}-{:08x}", host(), fastrand::u32(..)));
    let operator_namespace = own_namespace().unwrap_or_else(|| lease_namespace.clone());
    let installation = Installation { larder_image, image_pull_policy, operator_namespace };
    Ok(Config { namespaces: watch_namespaces, listen, lease_namespace, identity, installation })
}

/// Complete once this process is told to stop.
fn stopped() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => info!("told to stop by SIGTERM"),
            _ = interrupt.recv() => info!("told to stop by SIGINT"),
        }
    })
}

fn explain(error: OperatorError) -> Failure {
    let text = error.to_string();
    match text.rsplit_once(": ") {
        Some((what, next)) => Failure::new(what, next),
        None => Failure::new(text, "see the log above"),
    }
}
