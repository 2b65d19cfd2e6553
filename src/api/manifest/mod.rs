//! Manifests: YAML files that hold CacheClusters, CachePolicies and Secrets.

mod files;
mod tree;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use serde::de::DeserializeOwned;

pub use files::{MAX_FILE_BYTES, MAX_FILES, is_manifest};
pub use tree::{Entry, Node, Position, Tree};

use super::finding::{Finding, INVALID, Refused, Severity};
use super::path::{FieldPath, at};
use super::problem::{ObjectRef, Problem, namespace_of};
use super::schema::{self, Kind, Schemas};
use super::{CacheCluster, CachePolicy, SecretKeyRef};

/// One document of a file.
#[derive(Clone, Debug)]
pub struct Document {
    /// The file.
    pub file: Arc<Path>,
    /// What stands in it.
    pub root: Node,
}

/// An object, and the document that it was read from.
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The object.
    pub object: T,
    /// Its document.
    pub document: Document,
}

/// What a set of manifests holds, each kind in the order of the files.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    /// The cache tiers.
    pub clusters: Vec<Located<CacheCluster>>,
    /// The policies.
    pub policies: Vec<Located<CachePolicy>>,
    /// The Secrets.
    pub secrets: Vec<Located<SecretTexts>>,
}

/// A Secret. `Debug` shows the names of its entries only.
#[derive(Clone, PartialEq)]
pub struct SecretTexts {
    inner: Secret,
}

impl SecretTexts {
    /// Its name.
    pub fn name(&self) -> &str {
        self.inner.metadata.name.as_deref().unwrap_or_default()
    }

    /// Its namespace; `default` where it states none.
    pub fn namespace(&self) -> &str {
        self.inner.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// The bytes of an entry. `stringData` wins over `data`, as on the API server.
    pub fn entry(&self, key: &str) -> Option<&[u8]> {
        let text = self.inner.string_data.as_ref().and_then(|entries| entries.get(key)).map(String::as_bytes);
        text.or_else(|| self.inner.data.as_ref().and_then(|entries| entries.get(key)).map(|bytes| bytes.0.as_slice()))
    }

    /// The names of its entries, sorted, each once.
    pub fn keys(&self) -> Vec<&str> {
        let data = self.inner.data.iter().flat_map(|entries| entries.keys());
        let mut keys: Vec<&str> =
            data.chain(self.inner.string_data.iter().flat_map(|entries| entries.keys())).map(String::as_str).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

impl fmt::Debug for SecretTexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret {}/{} {:?}", self.namespace(), self.name(), self.keys())
    }
}

impl Document {
    /// A finding at `path`.
    pub fn finding(&self, severity: Severity, path: FieldPath, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            severity,
            code: INVALID,
            file: self.file.to_path_buf(),
            position: self.root.locate(&path),
            path,
            what: what.into(),
            why: String::new(),
            remedy: remedy.into(),
        }
    }

    fn refuse(&self, path: FieldPath, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        self.finding(Severity::Error, path, what, remedy)
    }
}

impl Manifests {
    /// Reads files, and directories of `.yaml`, `.yml` and `.json` files (one level deep, sorted). Everything that is wrong is
    /// told at once.
    pub fn read(paths: &[PathBuf]) -> Result<Self, Refused> {
        let (manifests, findings) = Self::read_all(paths);
        if findings.is_empty() { Ok(manifests) } else { Err(Refused(findings)) }
    }

    /// Reads as [`Self::read`] does, and keeps what is right beside what is wrong.
    pub fn read_all(paths: &[PathBuf]) -> (Self, Vec<Finding>) {
        let mut findings = Vec::new();
        let documents = files::read(paths, &mut findings);
        let manifests = Self::from_documents(documents, &mut findings);
        (manifests, findings)
    }

    /// Reads one text as if it stood in `file`.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Refused> {
        let mut findings = Vec::new();
        let documents = files::parse(file, text.as_bytes(), &mut findings);
        let manifests = Self::from_documents(documents, &mut findings);
        if findings.is_empty() { Ok(manifests) } else { Err(Refused(findings)) }
    }

    /// Sorts documents by kind. What cannot be used is told in `findings` and left out.
    fn from_documents(documents: Vec<Document>, findings: &mut Vec<Finding>) -> Self {
        let mut manifests = Self::default();
        let schemas = match Schemas::load() {
            Ok(schemas) => schemas,
            Err(error) => {
                let remedy = "report this: Larder's own schemas are at fault";
                findings.push(Finding::about_file(Path::new("-"), error.to_string(), remedy));
                return manifests;
            }
        };
        for document in documents {
            manifests.add(&schemas, document, findings);
        }
        manifests.refuse_twins(findings);
        manifests
    }

    fn add(&mut self, schemas: &Schemas, document: Document, findings: &mut Vec<Finding>) {
        let text = |key: &str| document.root.get(key).and_then(Node::as_str);
        match (text("apiVersion"), text("kind")) {
            (Some("larder.dev/v1alpha1"), Some("CacheCluster")) => {
                let wrong = schemas.validate(Kind::CacheCluster, &document);
                self.clusters.extend(typed(document, wrong, findings));
            }
            (Some("larder.dev/v1alpha1"), Some("CachePolicy")) => {
                let wrong = schemas.validate(Kind::CachePolicy, &document);
                self.policies.extend(typed(document, wrong, findings));
            }
            (Some("v1"), Some("Secret")) => {
                let wrong = schema::validate_secret(&document);
                if let Some(Located { object: inner, document }) = typed(document, wrong, findings) {
                    self.secrets.push(Located { object: SecretTexts { inner }, document });
                }
            }
            (None, _) | (_, None) => findings.push(document.refuse(
                FieldPath::root(),
                "apiVersion and kind are missing",
                "begin the document with apiVersion: larder.dev/v1alpha1 and kind: CacheCluster or CachePolicy",
            )),
            (Some(version), Some(kind)) => {
                let what = format!("{version} {kind} is not one of Larder's kinds");
                let remedy =
                    "write CacheCluster or CachePolicy of larder.dev/v1alpha1, or a v1 Secret; keep other kinds in other files";
                findings.push(document.refuse(at!("kind"), what, remedy));
            }
        }
    }

    /// Two objects of one kind and name: `kubectl apply` would keep the second only.
    fn refuse_twins(&self, findings: &mut Vec<Finding>) {
        let clusters = self.clusters.iter().map(|found| (Kind::CacheCluster.as_str(), &found.object.metadata, &found.document));
        let policies = self.policies.iter().map(|found| (Kind::CachePolicy.as_str(), &found.object.metadata, &found.document));
        let secrets = self.secrets.iter().map(|found| ("Secret", &found.object.inner.metadata, &found.document));
        let mut seen = HashSet::new();
        for (kind, metadata, document) in clusters.chain(policies).chain(secrets) {
            let name = metadata.name.as_deref().unwrap_or_default();
            if !seen.insert((kind, namespace_of(metadata), name)) {
                let what = format!("there is another {kind} `{name}` in namespace {}", namespace_of(metadata));
                findings.push(document.refuse(at!("metadata", "name"), what, "rename or remove one of the two"));
            }
        }
    }

    /// The Secret of that name.
    pub fn secret(&self, namespace: &str, name: &str) -> Option<&SecretTexts> {
        self.secrets.iter().map(|secret| &secret.object).find(|secret| secret.namespace() == namespace && secret.name() == name)
    }

    /// The bytes that a reference of an object in `namespace` names. The error says what is missing, and what to do.
    pub fn secret_entry(&self, namespace: &str, reference: &SecretKeyRef) -> Result<&[u8], String> {
        let SecretKeyRef { name, key } = reference;
        let secret = self.secret(namespace, name).ok_or_else(|| {
            format!("there is no Secret `{name}` in namespace {namespace}: add it to the manifests, or write value instead")
        })?;
        secret
            .entry(key)
            .ok_or_else(|| format!("the Secret `{name}` has no entry `{key}`: it has {}", list_or_none(&secret.keys())))
    }

    /// The policies about one cluster.
    pub fn policies_for(&self, cluster: &CacheCluster) -> Vec<&CachePolicy> {
        let name = cluster.metadata.name.as_deref().unwrap_or_default();
        let namespace = namespace_of(&cluster.metadata);
        let policies = self.policies.iter().map(|policy| &policy.object);
        policies.filter(|policy| policy.spec.cache_cluster == name && namespace_of(&policy.metadata) == namespace).collect()
    }

    /// A problem of one of these objects, with the place in its file.
    pub fn locate(&self, problem: Problem) -> Finding {
        let Problem { object, path, what, remedy } = problem;
        match self.document(&object) {
            Some(document) => document.refuse(path, what, remedy),
            None => Finding { path, ..Finding::about_file(Path::new("-"), format!("{object}: {what}"), remedy) },
        }
    }

    fn document(&self, object: &ObjectRef) -> Option<&Document> {
        let is = |metadata: &kube::core::ObjectMeta| {
            metadata.name.as_deref() == Some(object.name.as_str()) && namespace_of(metadata) == object.namespace
        };
        match object.kind {
            "CacheCluster" => self.clusters.iter().find(|located| is(&located.object.metadata)).map(|located| &located.document),
            "CachePolicy" => self.policies.iter().find(|located| is(&located.object.metadata)).map(|located| &located.document),
            _ => None,
        }
    }
}

fn list_or_none(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Turns a document into its type, unless something is `wrong` with it.
fn typed<T: DeserializeOwned>(document: Document, wrong: Vec<Finding>, findings: &mut Vec<Finding>) -> Option<Located<T>> {
    if !wrong.is_empty() {
        findings.extend(wrong);
        return None;
    }
    match serde_json::from_value(document.root.to_json()) {
        Ok(object) => Some(Located { object, document }),
        Err(error) => {
            let remedy = "correct it; `kubectl explain` shows the fields";
            findings.push(document.refuse(FieldPath::root(), error.to_string(), remedy));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &str = "apiVersion: larder.dev/v1alpha1\nkind: CacheCluster\nmetadata: {name: main}\nspec:\n  engine: {kind: Valkey, version: \"8.1\"}\n  mode: Sentinel\n  memory: 256Mi\n";
    const SECRET: &str = "apiVersion: v1\nkind: Secret\nmetadata: {name: shop-db}\ndata: {url: cG9zdGdyZXM6Ly9oL2Q=}\n";

    fn parse(text: &str) -> Result<Manifests, String> {
        Manifests::parse(Path::new("a.yaml"), text).map_err(|refused| refused.to_string())
    }

    #[test]
    fn documents_become_objects() {
        let manifests = parse(&format!("{CLUSTER}---\n---\n{SECRET}")).expect("valid");
        assert_eq!(manifests.clusters.len(), 1);
        let reference = |key: &str| SecretKeyRef { name: "shop-db".to_owned(), key: key.to_owned() };
        assert_eq!(manifests.secret_entry("default", &reference("url")), Ok(b"postgres://h/d".as_slice()));
        assert!(manifests.secret_entry("default", &reference("uri")).is_err_and(|why| why.contains("it has url")));
        assert!(!format!("{manifests:?}").contains("postgres"));
    }

    #[test]
    fn problems_name_the_line() {
        let error = parse(&format!("{CLUSTER}---\napiVersion: v1\nkind: ConfigMap\n")).expect_err("unknown kind");
        assert!(error.starts_with("a.yaml:10:1: kind: v1 ConfigMap"), "{error}");
        let error = parse("a: [1\nb: 2\n").expect_err("not YAML");
        assert!(error.starts_with("a.yaml:"), "{error}");
        let error = parse("a: 1\n").expect_err("no kind");
        assert!(error.contains("apiVersion and kind"), "{error}");
    }

    #[test]
    fn hostile_files_are_refused_in_bounded_memory() {
        let deep = "[".repeat(100_000);
        let wide = format!(
            "a: &a [{}]\n{}",
            "x,".repeat(1000),
            (0..1000).map(|n| format!("b{n}: [*a, *a, *a, *a]\n")).collect::<String>()
        );
        let laughs =
            (1..30).fold("a0: &a0 [x, x]\n".to_owned(), |text, n| format!("{text}a{n}: &a{n} [*a{}, *a{}]\n", n - 1, n - 1));
        for text in [deep, wide, laughs, "a: !!binary x\n\u{0}".to_owned(), "? {a: b}\n: c\n".to_owned()] {
            let error = parse(&text).expect_err("refused");
            assert!(error.len() < 2000, "{error}");
        }
    }

    #[test]
    fn places_are_found() {
        let mut findings = Vec::new();
        let documents = files::parse(Path::new("a.yaml"), CLUSTER.as_bytes(), &mut findings);
        let root = &documents.first().expect("one").root;
        let place = |path: FieldPath| (root.locate(&path).line, root.locate(&path).column);
        assert_eq!(place(at!("spec", "mode")), (6, 3));
        assert_eq!(place(at!("spec", "engine", "version")), (5, 26));
        assert_eq!(place(at!("spec", "absent")), (4, 1));
    }
}
