//! Which Kubernetes cluster a command asks, found as kubectl finds it.

use std::path::PathBuf;
use std::time::Duration;

use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use tokio::time::timeout;

use super::{Failure, WRONG_LINE};
use crate::cli::waiting;
use crate::operator::api_error;

/// How long one answer of the API server may take.
const LIMIT: Duration = Duration::from_secs(30);
/// How many objects one answer holds.
const PAGE: u32 = 500;

/// Which cluster is asked.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct ClusterArgs {
    /// The context of the kubeconfig; otherwise its current one
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// The kubeconfig; otherwise $KUBECONFIG, ~/.kube/config, or a pod's own account
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

/// A cluster that can be asked.
pub struct Cluster {
    client: Client,
    /// The namespace of the context.
    pub namespace: String,
}

/// The name of an object of Kubernetes.
pub fn object_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    if !text.is_empty() && text.len() <= 253 && text.chars().all(legal) {
        return Ok(text.to_owned());
    }
    Err("write the name of an object: small letters, digits, dashes and dots".to_owned())
}

/// Runs what asks a cluster to its end.
pub fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::new(format!("no event loop: {error}"), "raise the limits on open files").with_code(WRONG_LINE)
    })?;
    runtime.block_on(future)
}

impl ClusterArgs {
    /// Reads the configuration. Asks nothing yet.
    pub async fn open(&self) -> Result<Cluster, Failure> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let config = match (&self.kubeconfig, &self.context) {
            (Some(path), _) => match Kubeconfig::read_from(path) {
                Ok(read) => Config::from_custom_kubeconfig(read, &options).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            },
            (None, Some(_)) => Config::from_kubeconfig(&options).await.map_err(|error| error.to_string()),
            (None, None) => Config::infer().await.map_err(|error| error.to_string()),
        };
        let config = config.map_err(|error| {
            let next = "set KUBECONFIG, or name a file with --kubeconfig and one of its contexts with --context; \
                        `kubectl config get-contexts` lists them";
            Failure::new(format!("no API server is known: {error}"), next).with_code(WRONG_LINE)
        })?;
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).map_err(|error| unanswered("the connection to the API server", &error))?;
        Ok(Cluster { client, namespace })
    }

    /// As arguments of kubectl.
    pub fn for_kubectl(&self) -> Vec<std::ffi::OsString> {
        let mut arguments = Vec::new();
        if let Some(path) = &self.kubeconfig {
            arguments.extend(["--kubeconfig".into(), path.into()]);
        }
        if let Some(context) = &self.context {
            arguments.extend(["--context".into(), context.into()]);
        }
        arguments
    }
}

impl Cluster {
    /// The objects of a kind in a namespace, or in all, that the selectors of `params` let through; `enough` ends the list early.
    /// `None`: the API server does not know the kind.
    pub async fn list(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
        params: ListParams,
        enough: impl Fn(&[DynamicObject]) -> bool,
    ) -> Result<Option<Vec<DynamicObject>>, Failure> {
        let api = self.api(resource, namespace);
        let mut params = params.limit(PAGE);
        let mut found = Vec::new();
        loop {
            let page = match self.answer(&resource.plural, api.list(&params)).await {
                Ok(page) => page,
                Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(None),
                Err(error) => return Err(unanswered(&format!("the list of {}", resource.plural), &error)),
            };
            found.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) if !enough(&found) => params = params.continue_token(&token),
                _ => return Ok(Some(found)),
            }
        }
    }

    /// One object. `None`: there is none of that name.
    pub async fn get(&self, resource: &ApiResource, namespace: &str, name: &str) -> Result<Option<DynamicObject>, Failure> {
        let what = format!("{} {name}", resource.kind);
        let api = self.api(resource, Some(namespace));
        self.answer(&what, api.get_opt(name)).await.map_err(|error| unanswered(&what, &error))
    }

    fn api(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    async fn answer<T>(&self, what: &str, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
        let answered = waiting::for_answer(&format!("the API server: {what}"), timeout(LIMIT, request)).await;
        answered.unwrap_or_else(|_| {
            let late = format!("no answer within {} s", LIMIT.as_secs());
            Err(kube::Error::Service(std::io::Error::new(std::io::ErrorKind::TimedOut, late).into()))
        })
    }
}

fn unanswered(request: &str, error: &kube::Error) -> Failure {
    Failure::new(format!("{request} failed: {}", api_error::describe(error)), api_error::remedy(error)).with_code(WRONG_LINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_selector() {
        assert_eq!(object_name("main-1.a").as_deref(), Ok("main-1.a"));
        for text in ["", "a,b", "a=b", "Main", "a b"] {
            assert!(object_name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn kubectl_is_told_what_this_command_was_told() {
        assert!(ClusterArgs::default().for_kubectl().is_empty());
        let args = ClusterArgs { context: Some("prod".to_owned()), kubeconfig: Some("a b".into()) };
        assert_eq!(args.for_kubectl(), ["--kubeconfig", "a b", "--context", "prod"]);
    }
}
