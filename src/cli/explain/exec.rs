//! Asks the sidecar in a pod, by `kubectl exec`: kubectl knows every way to log in, and the command stays free of web sockets.

use std::ffi::{OsStr, OsString};
use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::process::Command;
use tokio::time::timeout;

use super::workload::Injected;
use crate::cli::output::harmless;
use crate::cli::{Failure, WRONG_LINE, waiting};
use crate::injector::CONTAINER;
use crate::policy::explain::KeyFacts;

/// How long one sidecar may take to answer.
const LIMIT: Duration = Duration::from_secs(15);
/// How much of an error of kubectl's is repeated.
const MOST_CHARS: usize = 400;
/// What to do where no sidecar can be asked.
const OTHERWISE: &str = "or explain manifests: --file POLICY.yaml";

/// What a sidecar answers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Answer {
    /// What is in force.
    #[serde(flatten)]
    pub facts: KeyFacts,
    /// The binding that it serves.
    #[serde(default)]
    pub binding: Option<String>,
    /// How the snapshot came.
    #[serde(default)]
    pub way: Option<String>,
    /// What it did not take up since.
    #[serde(default)]
    pub refused: Option<Refused>,
}

/// A snapshot that did not come into force.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Refused {
    /// Its generation.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Why.
    pub reason: String,
}

/// Asks the sidecar of a pod. `access` are the arguments by which kubectl finds the cluster.
pub async fn ask(access: &[OsString], namespace: &str, pod: &Injected, key: &OsStr) -> Result<Answer, Failure> {
    let question: [&OsStr; 5] = ["explain".as_ref(), "--socket".as_ref(), pod.socket.as_ref(), "--".as_ref(), key];
    let asked = Asked { namespace, pod: &pod.pod, otherwise: OTHERWISE };
    let output = run(access, &asked, &pod.program, &question, LIMIT).await?;
    understand(&output, &asked)
}

/// Who is asked, and what to do where that fails.
pub struct Asked<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// Its name.
    pub pod: &'a str,
    /// The end of the next step.
    pub otherwise: &'a str,
}

/// Runs the sidecar's program in its container, with these arguments, for so long at the most.
pub async fn run(
    access: &[OsString],
    asked: &Asked<'_>,
    program: &str,
    arguments: &[&OsStr],
    limit: Duration,
) -> Result<Output, Failure> {
    let Asked { namespace, pod, otherwise } = *asked;
    let mut command = Command::new("kubectl");
    command.args(access).args(["exec", "--namespace", namespace, pod, "--container", CONTAINER, "--", program]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    match waiting::for_answer(&format!("the sidecar of pod {pod}"), timeout(limit, command.output())).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            let next = format!("install kubectl, which carries the question into the pod, {otherwise}");
            Err(failure("there is no kubectl on the PATH", next))
        }
        Ok(Err(error)) => Err(failure(format!("kubectl cannot be run: {error}"), otherwise)),
        Err(_) => {
            let what = format!("the sidecar of pod {pod} did not answer within {} s", limit.as_secs());
            Err(failure(what, format!("see `kubectl logs {pod} -n {namespace} -c {CONTAINER}`, {otherwise}")))
        }
    }
}

/// Reads an answer in JSON.
pub fn understand<T: DeserializeOwned>(output: &Output, asked: &Asked<'_>) -> Result<T, Failure> {
    let Asked { namespace, pod, otherwise } = *asked;
    if output.status.success() {
        return serde_json::from_slice(&output.stdout).map_err(|error| {
            let what = format!("what the sidecar of pod {pod} answers is not understood: {error}");
            failure(what, format!("use the version of larder that the sidecar has, {otherwise}"))
        });
    }
    let said: String = harmless(&String::from_utf8_lossy(&output.stderr)).chars().take(MOST_CHARS).collect();
    let next = if said.contains("orbidden") {
        format!("ask for the right to create pods/exec in namespace {namespace}, {otherwise}")
    } else if said.contains("unrecognized subcommand") {
        format!("the sidecar is older than this command: start its pod anew, {otherwise}")
    } else {
        format!("see `kubectl logs {pod} -n {namespace} -c {CONTAINER}`, {otherwise}")
    };
    Err(failure(format!("the sidecar of pod {pod} could not be asked: {said}"), next))
}

fn failure(what: impl std::fmt::Display, next: impl std::fmt::Display) -> Failure {
    Failure::new(what, next).with_code(WRONG_LINE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn heard(code: i32, out: &str, err: &str) -> Result<Answer, Failure> {
        let output = Output { status: ExitStatus::from_raw(code << 8), stdout: out.into(), stderr: err.into() };
        understand(&output, &Asked { namespace: "shop", pod: "shop-1", otherwise: OTHERWISE })
    }

    #[test]
    fn an_answer_is_read_with_what_came_of_its_delivery() {
        let answer = heard(
            0,
            r#"{"key":"a","rule":null,"strategy":"Bypass","ttl":null,"why":"w","generation":4,"binding":"shop-1","way":"cache",
                "refused":{"generation":5,"reason":"it is too new","way":"cache"}}"#,
            "",
        );
        let answer = answer.expect("an answer");
        assert_eq!((answer.facts.generation, answer.way.as_deref()), (Some(4), Some("cache")));
        assert_eq!(answer.refused, Some(Refused { generation: Some(5), reason: "it is too new".to_owned() }));
    }

    #[test]
    fn what_fails_says_what_to_do() {
        for (code, out, err, words) in [
            (1, "", "Error from server (Forbidden): pods \"shop-1\" is forbidden", "create pods/exec in namespace shop"),
            (2, "", "error: unrecognized subcommand 'explain'", "older than this command"),
            (1, "", "container not found\x1b[0m", "kubectl logs shop-1 -n shop -c larder-sidecar"),
            (0, "hello", "", "the version of larder"),
        ] {
            let told = format!("{:?}", heard(code, out, err).expect_err("a failure"));
            assert!(told.contains(words) && told.contains("--file") && !told.contains('\u{1b}'), "{told}");
        }
    }
}
