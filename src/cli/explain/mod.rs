//! `larder explain`: which policy and rule decides over a key of a workload.

pub(super) mod exec;
mod render;
pub(super) mod workload;
mod written;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use kube::api::{ApiResource, ListParams};
use serde::Serialize;

use self::exec::{Answer, Refused};
use self::workload::WorkloadName;
use self::written::{Written, policy_of, written, written_in_files};
use super::cluster::{Cluster, ClusterArgs, block_on, object_name};
use super::output::{self, Format};
use super::{Failure, Outcome, WRONG_LINE};
use crate::api::problem::namespace_of;
use crate::api::{CachePolicy, Manifests};
use crate::policy::explain::KeyFacts;

/// Explain which policy and rule decides over a key of a workload, and what its sidecars do with it
///
/// Asks the sidecar of a running pod of the workload, by `kubectl exec`: what it answers is in force there. Where no such pod runs, the
/// policies are explained as they are written. With --file nothing is asked: the policies of the files are taken to be about the workload.
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes: 0 explained; 1 no policy is about the workload, or none can take effect; 2 the API server or the sidecar cannot be
asked, or the command line is wrong

Examples:
  larder explain user:42 --workload deployment/shop -n shop
  larder explain user:42 --workload sts/worker --output json
  larder explain user:42 --file examples/first-policy")]
pub struct Args {
    /// The key
    #[arg(value_name = "KEY")]
    key: OsString,
    /// The workload, such as deployment/shop, statefulset/worker or pod/debug
    #[arg(long, short, value_name = "KIND/NAME", required_unless_present = "file")]
    workload: Option<WorkloadName>,
    /// Manifests to explain, without a cluster: YAML or JSON files, or directories of them
    #[arg(long, short, value_name = "PATH", num_args = 1.., conflicts_with_all = ["workload", "context", "kubeconfig"])]
    file: Vec<PathBuf>,
    /// The namespace; otherwise that of the context, or of the files
    #[arg(long, short, value_name = "NAME", value_parser = object_name)]
    namespace: Option<String>,
    /// How it is written, on standard output
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What is said of a key.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explained {
    workload: String,
    namespace: String,
    source: Source,
    /// The CachePolicy that the rule comes from.
    policy: Option<String>,
    #[serde(flatten)]
    facts: KeyFacts,
    /// What a person should know besides.
    notes: Vec<String>,
}

/// Where it is known from.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
enum Source {
    /// What is in force in a pod.
    Sidecar {
        pod: String,
        binding: Option<String>,
        /// How the snapshot came.
        way: Option<String>,
        #[serde(skip)]
        generation: Option<u64>,
    },
    /// The CachePolicies that the API server has.
    Policies {},
    /// The policies of files.
    Files {},
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policies {} => f.write_str("the policies as they are written: no pod of it with a sidecar runs"),
            Self::Files {} => f.write_str("the policies of the files"),
            Self::Sidecar { pod, binding, way, generation } => {
                write!(f, "the sidecar of pod {pod}")?;
                if let Some(binding) = binding {
                    write!(f, ": binding {binding}")?;
                }
                if let Some(generation) = generation {
                    write!(f, ", generation {generation}")?;
                }
                way.as_ref().map_or(Ok(()), |way| write!(f, ", which came by {way}"))
            }
        }
    }
}

/// Asks, and explains.
pub fn run(args: Args) -> Outcome {
    let explained = match &args.workload {
        Some(workload) => block_on(of_workload(&args, workload))?,
        None => of_files(&args)?,
    };
    output::answer(args.output, &explained, |paint| render::text(&explained, paint))?;
    Ok(ExitCode::SUCCESS)
}

fn of_files(args: &Args) -> Result<Explained, Failure> {
    let manifests = Manifests::read(&args.file)
        .map_err(|refused| Failure::new(refused, "correct the manifests; `larder check` finds the same").with_code(WRONG_LINE))?;
    let policies: Vec<CachePolicy> = manifests.policies.into_iter().map(|located| located.object).collect();
    let namespaces: BTreeSet<&str> = policies.iter().map(|policy| namespace_of(&policy.metadata)).collect();
    let namespace = match (&args.namespace, namespaces.iter().collect::<Vec<_>>().as_slice()) {
        (Some(named), _) => named.clone(),
        (None, [only]) => (**only).to_owned(),
        (None, []) => {
            return Err(Failure::new("the files hold no CachePolicy", "name files that do with --file").with_code(WRONG_LINE));
        }
        (None, several) => {
            let names = several.iter().map(|name| **name).collect::<Vec<_>>().join(", ");
            let what = format!("the files hold policies of several namespaces: {names}");
            return Err(Failure::new(what, "name one of them with --namespace").with_code(WRONG_LINE));
        }
    };
    let told = written_in_files(&namespace, &policies, args.key.as_bytes());
    let workload = "any that they select".to_owned();
    as_written(told, &policies, Source::Files {}, workload, namespace)
}

/// What policies say, as they are written.
fn as_written(
    told: Written,
    policies: &[CachePolicy],
    source: Source,
    workload: String,
    namespace: String,
) -> Result<Explained, Failure> {
    let notes = without_part(&told);
    let Some(facts) = told.facts else {
        let what = match notes.as_slice() {
            [] => format!(
                "no CachePolicy of namespace {namespace} selects {workload}, and so nothing of Larder's decides over its keys"
            ),
            notes => notes.join("\n"),
        };
        return Err(Failure::new(
            what,
            "compare spec.workloads.matchLabels with the labels of its pods, and see `larder status`",
        ));
    };
    Ok(Explained { workload, namespace, source, policy: policy_of(policies, &facts), facts, notes })
}

fn without_part(told: &Written) -> Vec<String> {
    told.refused.iter().map(|(policy, why)| format!("the CachePolicy `{policy}` has no part in it. {why}")).collect()
}

async fn of_workload(args: &Args, workload: &WorkloadName) -> Result<Explained, Failure> {
    let cluster = args.cluster.open().await?;
    let namespace = args.namespace.clone().unwrap_or_else(|| cluster.namespace.clone());
    let policies = policies(&cluster, &namespace).await?;
    let of_labels = |labels| {
        let workload = written::workload(workload.kind, &workload.name, &workload.api_version(), &namespace, labels);
        written(&workload, &policies, args.key.as_bytes())
    };
    let mut unheard = None;
    for pod in workload.injected(&cluster, &namespace).await? {
        match exec::ask(&args.cluster.for_kubectl(), &namespace, &pod, &args.key).await {
            Ok(answer) => {
                let told = of_labels(pod.labels);
                return Ok(in_force(answer, pod.pod, &told, &policies, workload.to_string(), namespace.clone()));
            }
            Err(failure) => unheard = Some(failure),
        }
    }
    if let Some(failure) = unheard {
        return Err(failure);
    }
    let Some(labels) = workload.labels(&cluster, &namespace).await? else {
        let what = format!("there is no {workload} in namespace {namespace}");
        let next = format!("list what there is: kubectl get {} -n {namespace}", workload.kind.to_ascii_lowercase());
        return Err(Failure::new(what, next).with_code(WRONG_LINE));
    };
    as_written(of_labels(labels), &policies, Source::Policies {}, workload.to_string(), namespace.clone())
}

/// What a sidecar says, beside what is written.
fn in_force(
    answer: Answer,
    pod: String,
    told: &Written,
    policies: &[CachePolicy],
    workload: String,
    namespace: String,
) -> Explained {
    let Answer { facts, binding, way, refused } = answer;
    let mut notes = without_part(told);
    if let Some(Refused { generation, reason }) = refused {
        let which = generation.map_or_else(String::new, |generation| format!(" of generation {generation}"));
        notes.push(format!("the sidecar did not take up a later snapshot{which}: {reason}"));
    }
    if let Some(written) = &told.facts
        && !says_the_same(written, &facts)
    {
        let rule = written.rule.as_deref().map_or_else(|| "no rule".to_owned(), |rule| format!("the rule `{rule}`"));
        notes.push(format!(
            "the policies as they are written now say otherwise ({rule}, {}), and that is not in force in this pod: see `larder status`",
            written.strategy
        ));
    }
    let source = Source::Sidecar { pod, binding, way, generation: facts.generation };
    Explained { workload, namespace, source, policy: policy_of(policies, &facts), facts, notes }
}

/// Whether both say the same of the key, wherever and why. Which tables are followed is a relay's concern, and older sidecars tell nothing of it.
fn says_the_same(one: &KeyFacts, other: &KeyFacts) -> bool {
    let bare = |facts: &KeyFacts| {
        let (why, follows) = (String::new(), Vec::new());
        KeyFacts { why, follows, generation: None, cluster: None, ..facts.clone() }
    };
    bare(one) == bare(other)
}

/// The policies of a namespace, without those that cannot be read.
async fn policies(cluster: &Cluster, namespace: &str) -> Result<Vec<CachePolicy>, Failure> {
    let resource = ApiResource::erase::<CachePolicy>(&());
    let found = cluster.list(&resource, Some(namespace), ListParams::default(), |_| false).await?.unwrap_or_default();
    let read = |object| serde_json::to_value(object).and_then(serde_json::from_value::<CachePolicy>).ok();
    Ok(found.into_iter().filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts(ttl: &str) -> KeyFacts {
        let ttl = json!({"default": ttl, "max": "24h", "jitter": "10%"});
        let facts =
            json!({"key": "a", "rule": "r", "pattern": "a", "strategy": "CacheAside", "ttl": ttl, "why": "w", "generation": 3});
        serde_json::from_value(facts).expect("facts")
    }

    fn explained(written: &str) -> Explained {
        let answer = Answer {
            facts: facts("5m"),
            binding: Some("shop-1".to_owned()),
            way: Some("file".to_owned()),
            refused: Some(Refused { generation: Some(4), reason: "it is too new".to_owned() }),
        };
        let told = Written { facts: Some(KeyFacts { generation: None, ..facts(written) }), refused: Vec::new() };
        in_force(answer, "shop-a".to_owned(), &told, &[], "Deployment shop".to_owned(), "shop".to_owned())
    }

    #[test]
    fn what_is_written_and_not_in_force_is_told() {
        let same = explained("5m");
        assert_eq!(same.notes, ["the sidecar did not take up a later snapshot of generation 4: it is too new"]);
        assert_eq!(same.source.to_string(), "the sidecar of pod shop-a: binding shop-1, generation 3, which came by file");
        let other = explained("10m");
        assert!(other.notes.last().is_some_and(|note| note.contains("say otherwise")), "{:?}", other.notes);
    }

    #[test]
    fn a_machine_reads_where_it_is_known_from() {
        let json = serde_json::to_value(explained("5m")).expect("JSON");
        assert_eq!(json["source"]["sidecar"]["pod"], "shop-a");
        assert_eq!((&json["rule"], &json["generation"]), (&json!("r"), &json!(3)));
    }

    #[test]
    fn a_workload_without_policy_is_told_so() {
        let failure = as_written(Written::default(), &[], Source::Policies {}, "Job a".to_owned(), "shop".to_owned());
        let failure = format!("{:?}", failure.err());
        assert!(
            failure.contains("no CachePolicy of namespace shop selects Job a") && failure.contains("matchLabels"),
            "{failure}"
        );
    }
}
