//! Which sidecar is asked, and how: over its socket on this machine, or by `kubectl exec` in its pod.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::Answer;
use crate::cli::cluster::ClusterArgs;
use crate::cli::explain::exec::{Asked, run, understand};
use crate::cli::explain::workload::{Injected, WorkloadName};
use crate::cli::invalidate_here::{LIMIT, Question};
use crate::cli::wanted::Wanted;
use crate::cli::{Failure, WRONG_LINE, local, runs};
use crate::dev;

/// What to do where the sidecar of a pod cannot be asked.
const OTHERWISE: &str = "or write the event yourself: XADD larder:events * key KEY";

/// Where a sidecar is asked.
pub enum Way {
    /// At its socket.
    Socket(PathBuf),
    /// In its pod.
    Pod {
        /// The arguments by which kubectl finds the cluster.
        access: Vec<OsString>,
        /// The pod's namespace.
        namespace: String,
        /// The pod.
        pod: Injected,
    },
}

impl Way {
    /// A socket, that of a directory's `larder dev`, or that of the only one that runs.
    ///
    /// # Errors
    /// None runs, or several do.
    pub fn on_this_machine(socket: Option<&Path>, run_dir: Option<&Path>) -> Result<Self, Failure> {
        if let Some(socket) = socket {
            return Ok(Self::Socket(socket.to_owned()));
        }
        let directory = runs::run_dir(run_dir, "a workload with --workload")?;
        Ok(Self::Socket(dev::admin_socket(&directory, 0)))
    }

    /// The sidecar in a pod of a workload.
    ///
    /// # Errors
    /// The API server cannot be asked, or no such pod runs.
    pub async fn to_workload(args: &ClusterArgs, namespace: Option<&str>, workload: &WorkloadName) -> Result<Self, Failure> {
        let cluster = args.open().await?;
        let namespace = namespace.map_or_else(|| cluster.namespace.clone(), str::to_owned);
        let Some(pod) = workload.injected(&cluster, &namespace).await?.into_iter().next() else {
            let what = format!("no pod of {workload} in namespace {namespace} has a sidecar that runs");
            return Err(failure(what, format!("see `larder status` and `kubectl get pods -n {namespace}`, {OTHERWISE}")));
        };
        Ok(Self::Pod { access: args.for_kubectl(), namespace, pod })
    }

    /// Asks for all that is wanted: an answer for each part of the keys.
    ///
    /// # Errors
    /// The sidecar cannot be asked, or it says why not.
    pub async fn ask(&self, wanted: &Wanted, question: Question<'_>) -> Result<Vec<Answer>, Failure> {
        let mut answers = Vec::new();
        match self {
            Self::Socket(socket) => {
                for query in wanted.queries() {
                    let (method, path) = question.request(&query);
                    let (status, text) = local::exchange(socket, method, &path, LIMIT, "a running sidecar").await?;
                    answers.push(match status {
                        status if status.is_success() => serde_json::from_str(&text).map_err(|error| {
                            failure(format!("the answer is not understood: {error}"), "use the sidecar's own version of larder")
                        })?,
                        status if status.is_client_error() => return Err(failure(text.trim_end(), "correct what is named")),
                        _ => return Err(Failure::new(text.trim_end(), "repeat it, which does no harm")),
                    });
                }
            }
            Self::Pod { access, namespace, pod } => {
                let mut options = ["invalidate", "--socket", &pod.socket].map(OsString::from).to_vec();
                options.extend(question.options());
                for words in wanted.arguments() {
                    let line: Vec<&OsStr> = options.iter().chain(&words).map(OsString::as_os_str).collect();
                    let asked = Asked { namespace, pod: &pod.pod, otherwise: OTHERWISE };
                    let output = run(access, &asked, &pod.program, &line, LIMIT).await?;
                    answers.push(understand(&output, &asked)?);
                }
            }
        }
        Ok(answers)
    }
}

fn failure(what: impl std::fmt::Display, next: impl std::fmt::Display) -> Failure {
    Failure::new(what, next).with_code(WRONG_LINE)
}
