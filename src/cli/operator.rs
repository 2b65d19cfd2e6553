//! `larder operator`: keeps CacheClusters on Kubernetes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use super::{Failure, Outcome};
use crate::injector;
use crate::operator::cache_cluster::objects::Installation;
use crate::operator::cache_policy::relay::objects::RelayOptions;
use crate::operator::controller::{self, Beside, Config, OperatorError};
use crate::policy::{Span, UnitError};

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
    /// How old the password by which a workload's sidecars log in may grow, such as 720h; 0s: until somebody asks for another
    #[arg(long, value_name = "DURATION", default_value = "720h", value_parser = password_age)]
    password_age: Span,
    #[command(flatten)]
    relay: RelayArgs,
    #[command(flatten)]
    webhook: WebhookArgs,
}

/// What the relays of policies that write behind are given.
#[derive(clap::Args)]
#[command(next_help_heading = "Relays")]
struct RelayArgs {
    /// The share of a processor that a relay asks for
    #[arg(long, value_name = "CPUS", default_value = "50m")]
    relay_cpu: String,
    /// A relay's memory, asked for and held to
    #[arg(long, value_name = "SIZE", default_value = "128Mi")]
    relay_memory: String,
    /// A Secret of the policy's namespace by which Larder's image is pulled; may be repeated
    #[arg(long, value_name = "NAME")]
    relay_pull_secret: Vec<String>,
}

impl From<RelayArgs> for RelayOptions {
    fn from(RelayArgs { relay_cpu, relay_memory, relay_pull_secret }: RelayArgs) -> Self {
        Self { cpu: relay_cpu, memory: relay_memory, pull_secrets: relay_pull_secret }
    }
}

/// What concerns the webhook that gives pods their sidecar.
#[derive(clap::Args)]
#[command(next_help_heading = "Webhook")]
struct WebhookArgs {
    /// Where the webhook is served that gives pods their sidecar; otherwise it is not
    #[arg(long, value_name = "HOST:PORT", requires_all = ["webhook_configuration", "webhook_secret", "webhook_host"])]
    webhook_listen: Option<SocketAddr>,
    /// The MutatingWebhookConfiguration that leads to it, and the ValidatingWebhookConfiguration of the same name
    #[arg(long, value_name = "NAME")]
    webhook_configuration: Option<String>,
    /// The Secret, in the namespace of the Lease, with its certificate
    #[arg(long, value_name = "NAME")]
    webhook_secret: Option<String>,
    /// A name under which the API server finds it; may be repeated
    #[arg(long, value_name = "NAME")]
    webhook_host: Vec<String>,
    /// The sidecars' image; otherwise Larder's own
    #[arg(long, value_name = "IMAGE")]
    sidecar_image: Option<String>,
    /// A Secret of the pod's namespace by which that image is pulled; may be repeated
    #[arg(long, value_name = "NAME")]
    sidecar_pull_secret: Vec<String>,
    /// The sidecars' numeric user
    #[arg(long, value_name = "UID", default_value_t = 65532, value_parser = clap::value_parser!(i64).range(1..=i64::from(i32::MAX)))]
    sidecar_uid: i64,
    /// The share of a processor that a sidecar asks for
    #[arg(long, value_name = "CPUS", default_value = "100m")]
    sidecar_cpu: String,
    /// The share that it asks for, and is held to, in a pod of the class Guaranteed
    #[arg(long, value_name = "CPUS", default_value = "500m")]
    sidecar_guaranteed_cpu: String,
    /// A sidecar's memory, asked for and held to
    #[arg(long, value_name = "SIZE", default_value = "128Mi")]
    sidecar_memory: String,
}

/// A new password is on its way for some minutes, and the earlier one works for ten more.
fn password_age(text: &str) -> Result<Span, String> {
    let age: Span = text.parse().map_err(|error: UnitError| error.to_string())?;
    if age.is_zero() || age >= Span::from_secs(3600) { Ok(age) } else { Err("write 1h or more, or 0s".to_owned()) }
}

/// Runs until a signal comes.
pub fn run(args: Args) -> Outcome {
    let (config, injector) = config(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, "see that the system has file descriptors left"))?;
    runtime.block_on(async {
        let stopped = stopped().map_err(|error| Failure::new(error, "see that the system has file descriptors left"))?;
        let webhook = match injector {
            Some(config) => Some((injector::bind(config.listen).await.map_err(|error| split(&error.to_string()))?, config)),
            None => None,
        };
        let beside = |beside: Beside<'_>| match webhook {
            Some((listener, config)) => injector::start(config, listener, beside),
            None => Vec::new(),
        };
        controller::run(config, beside, stopped).await.map_err(explain)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn config(args: Args) -> Result<(Config, Option<injector::Config>), Failure> {
    let Args {
        mut watch_namespaces,
        listen,
        larder_image,
        image_pull_policy,
        lease_namespace,
        identity,
        password_age,
        relay,
        webhook,
    } = args;
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
    let password_age = (!password_age.is_zero()).then_some(password_age.as_duration());
    let relays = relay.into();
    let config = Config { namespaces: watch_namespaces, listen, lease_namespace, identity, installation, password_age, relays };
    let injector = injector_config(webhook, &config);
    Ok((config, injector))
}

/// `None`: the webhook is not served.
fn injector_config(args: WebhookArgs, config: &Config) -> Option<injector::Config> {
    let WebhookArgs {
        webhook_listen,
        webhook_configuration,
        webhook_secret,
        webhook_host,
        sidecar_image,
        sidecar_pull_secret,
        sidecar_uid,
        sidecar_cpu,
        sidecar_guaranteed_cpu,
        sidecar_memory,
    } = args;
    let Installation { larder_image, image_pull_policy, .. } = &config.installation;
    Some(injector::Config {
        listen: webhook_listen?,
        namespaces: config.namespaces.clone(),
        namespace: config.lease_namespace.clone(),
        secret: webhook_secret?,
        configuration: webhook_configuration?,
        hosts: webhook_host.into_iter().collect::<BTreeSet<_>>(),
        settings: injector::Settings {
            image: sidecar_image.unwrap_or_else(|| larder_image.clone()),
            image_pull_policy: image_pull_policy.clone(),
            pull_secrets: sidecar_pull_secret,
            uid: sidecar_uid,
            cpu: sidecar_cpu,
            guaranteed_cpu: sidecar_guaranteed_cpu,
            memory: sidecar_memory,
        },
    })
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
    split(&error.to_string())
}

/// A text that ends in its remedy.
fn split(text: &str) -> Failure {
    match text.rsplit_once(": ") {
        Some((what, next)) => Failure::new(what, next),
        None => Failure::new(text, "see the log above"),
    }
}
