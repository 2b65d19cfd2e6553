//! The judgement itself: schema and rules, references, compilation, anti-patterns.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::api::cache_cluster::Keeping;
use crate::api::compile::{compile_about, policy_ref};
use crate::api::finding::{Finding, Severity};
use crate::api::lint::{self, lint};
use crate::api::manifest::{Located, Manifests};
use crate::api::problem::{Problem, Problems, namespace_of};
use crate::api::{CacheCluster, CachePolicy, FieldPath, ObjectRef, Reach, SecretKeyRef};
use crate::cli::Failure;
use crate::operator::cache_cluster::build::PATIENCE;
use crate::origin::{self, Carriage, OriginError};
use crate::policy::snapshot::{Sensitive, Snapshot, Topology};

/// What was found.
pub(super) struct Review {
    /// In the order of the files, from top to bottom.
    pub(super) findings: Vec<Finding>,
    /// How many objects there are: clusters, policies, secrets.
    pub(super) objects: [usize; 3],
}

impl Review {
    fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// How many errors there are.
    pub(super) fn errors(&self) -> usize {
        self.count(Severity::Error)
    }

    /// How many warnings there are.
    pub(super) fn warnings(&self) -> usize {
        self.count(Severity::Warning)
    }

    /// Leaves out warnings of these codes.
    pub(super) fn allow(&mut self, codes: &[String]) -> Result<(), Failure> {
        if let Some(unknown) = codes.iter().find(|code| !lint::CODES.contains(&code.as_str())) {
            let next = format!("write one of {}", lint::CODES.join(", "));
            return Err(Failure::new(format!("there is no warning with the code `{unknown}`"), next));
        }
        self.findings.retain(|finding| finding.severity == Severity::Error || !codes.iter().any(|code| code == finding.code));
        Ok(())
    }
}

/// Judges the files.
pub(super) fn review(files: &[PathBuf]) -> Review {
    let (manifests, mut findings) = Manifests::read_all(files);
    check_cluster_references(&manifests, &mut findings);
    check_secret_references(&manifests, &mut findings);
    check_compilation(&manifests, &mut findings);
    findings.extend(lint(&manifests));
    findings.sort_by(|a, b| (&a.file, a.position, &a.path).cmp(&(&b.file, b.position, &b.path)));
    findings.dedup();
    Review { findings, objects: [manifests.clusters.len(), manifests.policies.len(), manifests.secrets.len()] }
}

/// A policy about a cluster that is not among the given ones. Where none is given, it may exist elsewhere.
fn check_cluster_references(manifests: &Manifests, findings: &mut Vec<Finding>) {
    for policy in &manifests.policies {
        let namespace = namespace_of(&policy.object.metadata);
        let mut given =
            manifests.clusters.iter().filter(|cluster| namespace_of(&cluster.object.metadata) == namespace).peekable();
        let wanted = &policy.object.spec.cache_cluster;
        if given.peek().is_some() && !given.any(|cluster| cluster.object.metadata.name.as_ref() == Some(wanted)) {
            findings.push(policy.document.finding(
                Severity::Error,
                FieldPath::root().key("spec").key("cacheCluster"),
                format!("there is no CacheCluster `{wanted}` in namespace {namespace} among these files"),
                "write the name of one that is, or add it",
            ));
        }
    }
}

/// References to Secrets: an entry that a given Secret does not have is an error, a Secret that is not given may exist elsewhere.
fn check_secret_references(manifests: &Manifests, findings: &mut Vec<Finding>) {
    let spec = FieldPath::root().key("spec");
    for Located { object, document } in &manifests.clusters {
        let reference = object.spec.auth.as_ref().and_then(|auth| auth.password.secret_key_ref.as_ref());
        let path = spec.key("auth").key("password").key("secretKeyRef");
        check_secret(manifests, namespace_of(&object.metadata), reference, findings, |what, remedy| {
            document.finding(Severity::Error, path, what, remedy)
        });
    }
    for Located { object, document } in &manifests.policies {
        for (index, origin) in object.spec.origins.iter().enumerate() {
            for (kind, access) in [("sql", &origin.sql), ("http", &origin.http)] {
                let reference = access.as_ref().and_then(|access| access.url.secret_key_ref.as_ref());
                let path = spec.key("origins").index(index).key(kind).key("url").key("secretKeyRef");
                check_secret(manifests, namespace_of(&object.metadata), reference, findings, |what, remedy| {
                    document.finding(Severity::Error, path, what, remedy)
                });
            }
        }
    }
}

fn check_secret(
    manifests: &Manifests,
    namespace: &str,
    reference: Option<&SecretKeyRef>,
    findings: &mut Vec<Finding>,
    finding: impl FnOnce(String, String) -> Finding,
) {
    let Some(reference) = reference else { return };
    let Some(secret) = manifests.secret(namespace, &reference.name) else { return };
    if secret.entry(&reference.key).is_none() {
        let what = format!("the Secret `{}` has no entry `{}`", reference.name, reference.key);
        findings.push(finding(what, format!("write one of its entries: {}", secret.keys().join(", "))));
    }
}

/// Compiles the policies about each cluster as the operator does, and has the sidecar's own parsers look at what rules ask their
/// origins.
fn check_compilation(manifests: &Manifests, findings: &mut Vec<Finding>) {
    let mut groups: BTreeMap<(&str, &str), Vec<&CachePolicy>> = BTreeMap::new();
    for policy in &manifests.policies {
        let key = (namespace_of(&policy.object.metadata), policy.object.spec.cache_cluster.as_str());
        groups.entry(key).or_default().push(&policy.object);
    }
    for ((namespace, name), policies) in groups {
        let given = |cluster: &&Located<CacheCluster>| {
            let metadata = &cluster.object.metadata;
            namespace_of(metadata) == namespace && metadata.name.as_deref() == Some(name)
        };
        let keeping = manifests.clusters.iter().find(given).map(|cluster| cluster.object.spec.keeping());
        let cluster = ObjectRef { kind: "CacheCluster", namespace: namespace.to_owned(), name: name.to_owned() };
        match compile_for_check(manifests, &cluster, keeping, &policies) {
            Ok(_) => {
                for policy in policies {
                    if let Ok(snapshot) = compile_for_check(manifests, &cluster, keeping, &[policy]) {
                        check_loads(manifests, policy, &snapshot, findings);
                    }
                }
            }
            Err(problems) => findings.extend(problems.0.into_iter().map(|problem| manifests.locate(problem))),
        }
    }
}

/// What a policy compiles to depends on nothing of its cluster but its name and what it keeps, where that is given.
fn compile_for_check(
    manifests: &Manifests,
    cluster: &ObjectRef,
    keeping: Option<Keeping>,
    policies: &[&CachePolicy],
) -> Result<Snapshot, Problems> {
    // Only a text can be looked at; what is not given, or not a text, is taken on trust.
    let secrets = |namespace: &str, secret: &SecretKeyRef| {
        let text = manifests.secret_entry(namespace, secret).ok().and_then(|bytes| std::str::from_utf8(bytes).ok());
        Ok(text.map_or_else(|| Sensitive::File(secret.key.as_str().into()), |text| Sensitive::Value(text.trim_end().to_owned())))
    };
    // Any address will do: nothing is dialled.
    let topology = Topology::Cluster { seeds: vec!["localhost:6379".to_owned()] };
    let reach = Reach { topology, tls: None, auth: None, sentinel_auth: None, patience: PATIENCE };
    compile_about(cluster, keeping, policies, 1, reach, &secrets)
}

/// Has the origin layer parse the statements and paths of one policy, whose rules stand in `snapshot` in their order.
fn check_loads(manifests: &Manifests, policy: &CachePolicy, snapshot: &Snapshot, findings: &mut Vec<Finding>) {
    for (index, rule) in snapshot.rules.iter().enumerate() {
        let Some(read_through) = rule.strategy.loads() else { continue };
        let Some(origin) = snapshot.origins.iter().find(|origin| origin.name == read_through.load.origin) else { continue };
        let store = rule.strategy.writes().map(|(_, store)| (store, Carriage::of(&rule.strategy)));
        if let Err(error) = origin::check_rule(origin, &rule.keys, &read_through.load, store) {
            let path = FieldPath::root().key("spec").key("rules").index(index).key("origin");
            findings.push(manifests.locate(load_problem(policy, path, &error)));
        }
    }
}

fn load_problem(policy: &CachePolicy, rule: FieldPath, error: &OriginError) -> Problem {
    let (path, text) = match error {
        OriginError::Template { place, why } => (rule.key(*place), why.clone()),
        other => (rule, other.to_string()),
    };
    let (what, remedy) = text.split_once(": ").unwrap_or((&text, "correct it"));
    Problem { object: policy_ref(policy), path, what: what.to_owned(), remedy: remedy.to_owned() }
}
