//! The manifests of a run: read, turned into the snapshot and the secrets' files, and read again when they change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::run_dir::{RunDir, RunDirError, write_private};
use crate::api::cache_cluster::AuthSpec;
use crate::api::compile::cluster_ref;
use crate::api::manifest::{Located, is_manifest};
use crate::api::{
    CacheCluster, CacheClusterSpec, FieldPath, Manifests, Problem, Reach, Refused, SecretKeyRef, SensitiveSource, compile,
};
use crate::operator::admin::Login;
use crate::operator::cache_cluster::build::PATIENCE;
use crate::policy::Snapshot;
use crate::policy::snapshot::{Auth, Sensitive, Topology};

/// Why manifests cannot be used. Each text names the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// They are wrong.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// They come from standard input.
    #[error("standard input cannot be read again when it changes: name a file or a directory with -f")]
    StandardInput,
    /// They hold no CacheCluster.
    #[error("the manifests hold no CacheCluster: add one, such as examples/ has, to what -f names")]
    NoCluster,
    /// They hold several.
    #[error("the manifests hold {} CacheClusters, and larder dev runs one: name fewer files with -f\n{}", .0.len(), .0.join("\n"))]
    SeveralClusters(Vec<String>),
    /// A file of the run cannot be written.
    #[error("{path}: {source}: see that the disk has space and the directory can be written", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The run's directory cannot be written.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// It cannot become JSON.
    #[error("the snapshot cannot be written: {0}: report this")]
    Json(#[from] serde_json::Error),
}

/// Manifests that can be used.
#[derive(Debug)]
pub struct Loaded {
    manifests: Manifests,
    cluster: CacheCluster,
    /// The password of the servers' user.
    login: Option<Login>,
}

impl Loaded {
    /// Reads and checks them.
    pub fn read(paths: &[PathBuf]) -> Result<Self, ManifestError> {
        if paths.iter().any(|path| path == Path::new("-")) {
            return Err(ManifestError::StandardInput);
        }
        let manifests = Manifests::read(paths)?;
        let cluster = match &manifests.clusters[..] {
            [] => return Err(ManifestError::NoCluster),
            [only] => only.object.clone(),
            several => return Err(ManifestError::SeveralClusters(several.iter().map(name_and_place).collect())),
        };
        let login = cluster.spec.auth.as_ref().map(|auth| login(&manifests, &cluster, auth)).transpose()?;
        Ok(Self { manifests, cluster, login })
    }

    /// The cache tier.
    pub fn cluster(&self) -> &CacheCluster {
        &self.cluster
    }

    /// The user that its servers ask for.
    pub fn login(&self) -> Option<&Login> {
        self.login.as_ref()
    }

    /// Compiles the snapshot. Secrets that it names become files below `run_dir`.
    pub fn compile(&self, run_dir: &RunDir, generation: u64, topology: Topology) -> Result<Snapshot, ManifestError> {
        let auth = self.login.as_ref().map(|login| auth_files(run_dir, "", login)).transpose()?;
        let sentinel_auth = auth.clone().filter(|_| matches!(topology, Topology::Sentinel { .. }));
        let reach = Reach { topology, tls: None, auth, sentinel_auth, patience: PATIENCE };
        let secrets = |namespace: &str, reference: &SecretKeyRef| {
            let bytes = self.manifests.secret_entry(namespace, reference)?;
            let path = secret_file(run_dir, namespace, reference).map_err(|error| error.to_string())?;
            write_private(&path, bytes).map_err(|error| format!("{} cannot be written: {error}", path.display()))?;
            Ok(Sensitive::File(path))
        };
        let policies = self.manifests.policies_for(&self.cluster);
        compile(&self.cluster, &policies, generation, reach, &secrets).map_err(|problems| {
            let located = problems.0.into_iter().map(|problem| self.manifests.locate(problem));
            ManifestError::Refused(Refused(located.collect()))
        })
    }

    /// What of the manifests has no effect: policies about other clusters, and fields that are about pods.
    pub fn idle(&self) -> Vec<String> {
        let fields = fields_without_effect(&self.cluster.spec).into_iter();
        let fields = fields.map(|(field, instead)| format!("spec.{field} has no effect on one machine{instead}"));
        fields.chain(self.idle_policies()).collect()
    }

    fn idle_policies(&self) -> Vec<String> {
        let used = self.manifests.policies_for(&self.cluster);
        let idle = self.manifests.policies.iter().filter(|policy| !used.iter().any(|used| **used == policy.object));
        idle.map(|policy| {
            let of = &policy.object.spec.cache_cluster;
            format!("{}: it is about the CacheCluster `{of}`, which is not here: it has no effect", name_and_place(policy))
        })
        .collect()
    }
}

/// The fields that are written and that one machine has no use for, each with what to know instead.
fn fields_without_effect(spec: &CacheClusterSpec) -> Vec<(&'static str, &'static str)> {
    let CacheClusterSpec {
        engine,
        mode: _,
        shards: _,
        replicas: _,
        sentinels: _,
        memory: _,
        eviction: _,
        parameters: _,
        auth: _,
        tls,
        storage,
        writes: _,
        pod,
        network_policy,
        recovery,
        paused,
    } = spec;
    let written = [
        (engine.image.is_some(), "engine.image", ": the programs that are installed are used"),
        (tls.is_some(), "tls", ": servers listen on loopback, and speak plain TCP"),
        (storage.as_ref().is_some_and(|storage| storage.class.is_some()), "storage.class", ": --data says where data is kept"),
        (pod.is_some(), "pod", ""),
        (network_policy.is_some(), "networkPolicy", ": servers listen on loopback"),
        (recovery.is_some(), "recovery", ""),
        (*paused, "paused", ""),
    ];
    written.into_iter().filter(|(is_written, ..)| *is_written).map(|(_, field, instead)| (field, instead)).collect()
}

fn name_and_place<T: kube::Resource>(located: &Located<T>) -> String {
    let position = located.document.root.locate(&FieldPath::root());
    let name = located.object.meta().name.as_deref().unwrap_or_default();
    format!("{}:{}: {name}", located.document.file.display(), position.line)
}

fn login(manifests: &Manifests, cluster: &CacheCluster, auth: &AuthSpec) -> Result<Login, ManifestError> {
    let refuse = |what: &str, remedy: &str| {
        let path = FieldPath::root().key("spec").key("auth").key("password");
        let problem = Problem { object: cluster_ref(cluster), path, what: what.to_owned(), remedy: remedy.to_owned() };
        ManifestError::Refused(Refused(vec![manifests.locate(problem)]))
    };
    let password = match &auth.password {
        SensitiveSource { value: Some(text), .. } => text.clone(),
        SensitiveSource { secret_key_ref: Some(reference), .. } => {
            let namespace = cluster.metadata.namespace.as_deref().unwrap_or("default");
            let bytes = manifests.secret_entry(namespace, reference).map_err(|why| {
                let (what, remedy) = why.split_once(": ").unwrap_or((&why, "correct it"));
                refuse(what, remedy)
            })?;
            let text = std::str::from_utf8(bytes).map_err(|_| refuse("the password is not UTF-8", "write one that is"))?;
            text.to_owned()
        }
        SensitiveSource { value: None, secret_key_ref: None } => {
            return Err(refuse("there is neither value nor secretKeyRef", "write one of them"));
        }
    };
    if password.is_empty() || password.contains(['\n', '\r', '\0']) {
        return Err(refuse(
            "the password is empty or has several lines",
            "write one line; mind the line end of a file in `data`",
        ));
    }
    Ok(Login { user: auth.user().to_owned(), password })
}

/// Writes a login to files whose names begin with `prefix`.
pub fn auth_files(run_dir: &RunDir, prefix: &str, login: &Login) -> Result<Auth, ManifestError> {
    let directory = run_dir.subdirectory("auth")?;
    let write = |name: &str, text: &str| {
        let path = directory.join(format!("{prefix}{name}"));
        match write_private(&path, text.as_bytes()) {
            Ok(()) => Ok(path),
            Err(source) => Err(ManifestError::Io { path, source }),
        }
    };
    Ok(Auth { username_file: Some(write("user", &login.user)?), password_file: write("password", &login.password)? })
}

/// Where an entry of a Secret is kept. Its names become names of files, so they may not lead elsewhere.
fn secret_file(run_dir: &RunDir, namespace: &str, reference: &SecretKeyRef) -> Result<PathBuf, RunDirError> {
    let plain = |name: &str| name.replace('/', "%").replace("..", "%");
    let directory = run_dir.subdirectory(&format!("secrets/{}.{}", plain(namespace), plain(&reference.name)))?;
    Ok(directory.join(plain(&reference.key)))
}

/// The generation that follows the one which a snapshot file holds.
pub fn next_generation(path: &Path) -> u64 {
    let previous = fs::read(path).ok().and_then(|bytes| Snapshot::parse(&bytes).ok());
    previous.map_or(1, |snapshot| snapshot.generation + 1)
}

/// Writes the snapshot for the sidecars to find.
pub fn write_snapshot(path: &Path, snapshot: &Snapshot) -> Result<(), ManifestError> {
    let text = serde_json::to_vec_pretty(snapshot)?;
    write_private(path, &text).map_err(|source| ManifestError::Io { path: path.to_owned(), source })
}

/// The outward state of some files: equal as long as nobody saves one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fingerprint(Vec<(PathBuf, Option<SystemTime>, u64)>);

impl Fingerprint {
    /// Looks at the files, and at the manifests in directories: a database may lie beside them.
    pub fn of(paths: &[PathBuf]) -> Self {
        let mut files = Vec::new();
        for path in paths {
            let entries = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
            files.extend(entries.filter(|file| is_manifest(file)).chain((!path.is_dir()).then(|| path.clone())));
        }
        files.sort();
        let seen = files.into_iter().map(|path| {
            let metadata = fs::metadata(&path).ok();
            let modified = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
            let length = metadata.map_or(0, |metadata| metadata.len());
            (path, modified, length)
        });
        Self(seen.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_beside_the_manifests_is_none_of_them() {
        let directory = tempfile::TempDir::new().expect("a temporary directory");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("the directory is writable");
        write("policy.yaml", "a");
        let look = || Fingerprint::of(&[directory.path().to_owned()]);
        let before = look();
        write("shop.db", "x");
        write("shop.db-journal", "y");
        fs::remove_file(directory.path().join("shop.db-journal")).expect("a file");
        assert_eq!(look(), before);
        write("policy.yaml", "ab");
        let changed = look();
        assert_ne!(changed, before);
        write("more.yml", "");
        assert_ne!(look(), changed);
    }
}
