//! Passwords and certificates from files: read and checked before anything starts, renewed when they change.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use tracing::{info, warn};

use super::files::{Contents, FileError, WatchedFiles};
use super::upstream::access::{Access, ClientTls, ClusterAccess, Credentials, Keys, KeysError};
use crate::policy::snapshot::{Auth, Cluster, Tls};
use crate::telemetry::background::Background;

/// The longest of these files. A bundle of authorities is the largest.
const MAX_FILE_BYTES: usize = 1 << 20;

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// One cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What one holds is refused.
    #[error("{of}: {source}")]
    Keys {
        /// Which of them.
        of: &'static str,
        /// Why.
        source: KeysError,
    },
}

/// Reads the files that `cluster` names, and keeps what it returns up to date while anybody holds it. A change that cannot be
/// used leaves the old keys in place, is counted and logged.
pub async fn open_access(cluster: &Cluster, metrics: Arc<Background>) -> Result<ClusterAccess, AccessError> {
    let plan = Plan::new(cluster);
    if plan.paths.is_empty() {
        let nothing = Access::fixed(Keys::default());
        return Ok(ClusterAccess { servers: nothing.clone(), sentinels: nothing });
    }
    let files = WatchedFiles::open(plan.paths.clone(), MAX_FILE_BYTES).await?;
    let (servers, sentinels) = plan.read(&files.current())?;
    let (servers_sender, servers) = Access::new(servers);
    let (sentinels_sender, sentinels) = Access::new(sentinels);
    tokio::spawn(renew(plan, files, servers_sender, sentinels_sender, metrics));
    Ok(ClusterAccess { servers, sentinels })
}

async fn renew(
    plan: Plan,
    mut files: WatchedFiles,
    servers: watch::Sender<Arc<Keys>>,
    sentinels: watch::Sender<Arc<Keys>>,
    metrics: Arc<Background>,
) {
    let unused = async { tokio::join!(servers.closed(), sentinels.closed()) };
    tokio::pin!(unused);
    loop {
        let contents = tokio::select! {
            contents = files.changed() => contents,
            _ = &mut unused => return,
        };
        match plan.read(&contents) {
            Ok((for_servers, for_sentinels)) => {
                servers.send_replace(Arc::new(for_servers));
                sentinels.send_replace(Arc::new(for_sentinels));
                metrics.secrets_renewed.inc();
                info!("credentials and certificates were renewed");
            }
            Err(error) => {
                metrics.secrets_rejected.inc();
                warn!(%error, "new credentials or certificates cannot be used; the old ones stay in use");
            }
        }
    }
}

/// Which files there are, and what each is for: positions in `paths`.
struct Plan {
    paths: Vec<PathBuf>,
    auth: Option<AuthPlan>,
    sentinel_auth: Option<AuthPlan>,
    tls: Option<TlsPlan>,
}

struct AuthPlan {
    user: Option<usize>,
    password: usize,
}

struct TlsPlan {
    ca: usize,
    cert: Option<usize>,
    key: Option<usize>,
    server_name: Option<String>,
}

impl Plan {
    fn new(cluster: &Cluster) -> Self {
        let mut paths = Vec::new();
        let mut place = |path: &PathBuf| {
            paths.push(path.clone());
            paths.len() - 1
        };
        let mut auth_plan = |auth: &Option<Auth>| {
            let Auth { username_file, password_file } = auth.as_ref()?;
            Some(AuthPlan { user: username_file.as_ref().map(&mut place), password: place(password_file) })
        };
        let (auth, sentinel_auth) = (auth_plan(&cluster.auth), auth_plan(&cluster.sentinel_auth));
        let tls = cluster.tls.as_ref().map(|Tls { ca_file, cert_file, key_file, server_name }| TlsPlan {
            ca: place(ca_file),
            cert: cert_file.as_ref().map(&mut place),
            key: key_file.as_ref().map(&mut place),
            server_name: server_name.clone(),
        });
        Self { paths, auth, sentinel_auth, tls }
    }

    /// The keys for the servers and those for the sentinels.
    fn read(&self, contents: &Contents) -> Result<(Keys, Keys), AccessError> {
        let file = |index: usize| contents.get(index).map_or(&[][..], |bytes| bytes);
        let credentials = |of: &'static str, auth: &Option<AuthPlan>| {
            let parse = |auth: &AuthPlan| Credentials::parse(auth.user.map(file), file(auth.password));
            auth.as_ref().map(parse).transpose().map_err(|source| AccessError::Keys { of, source })
        };
        let tls = self.tls.as_ref().map(|tls| {
            let pair = match (tls.cert, tls.key) {
                (None, None) => Ok(None),
                (Some(cert), Some(key)) => Ok(Some((file(cert), file(key)))),
                _ => Err(KeysError::HalfPair),
            };
            ClientTls::parse(file(tls.ca), pair?, tls.server_name.as_deref())
        });
        let tls = tls.transpose().map_err(|source| AccessError::Keys { of: "tls", source })?;
        let servers = Keys { credentials: credentials("auth", &self.auth)?, tls: tls.clone() };
        let sentinels = Keys { credentials: credentials("sentinelAuth", &self.sentinel_auth)?, tls };
        Ok((servers, sentinels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::snapshot::Topology;
    use crate::policy::units::Span;
    use std::fs;
    use std::time::Duration;
    use tempfile::TempDir;
    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(20);

    fn cluster(dir: &TempDir) -> Cluster {
        Cluster {
            name: "main".to_owned(),
            topology: Topology::Cluster { seeds: vec!["127.0.0.1:7000".to_owned()] },
            tls: None,
            auth: Some(Auth { username_file: Some(dir.path().join("user")), password_file: dir.path().join("password") }),
            sentinel_auth: Some(Auth { username_file: None, password_file: dir.path().join("sentinel") }),
            patience: Span::from_secs(2),
            idle_transaction: Span::from_secs(60),
        }
    }

    fn write(dir: &TempDir, name: &str, text: &str) {
        let fresh = dir.path().join("fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, dir.path().join(name)).unwrap();
    }

    #[tokio::test]
    async fn new_passwords_are_taken_up_and_bad_ones_refused() {
        let dir = TempDir::new().unwrap();
        write(&dir, "user", "shop\n");
        write(&dir, "password", "one");
        write(&dir, "sentinel", "s");
        let metrics = Arc::new(Background::default());
        let mut access = open_access(&cluster(&dir), metrics.clone()).await.unwrap();
        let password = |keys: &Keys| keys.credentials.clone().unwrap() == Credentials::parse(Some(b"shop"), b"two").unwrap();
        assert_eq!(access.sentinels.current().credentials, Some(Credentials::parse(None, b"s").unwrap()));
        write(&dir, "password", "");
        let refused = async {
            while metrics.secrets_rejected.get() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LONG, refused).await.expect("the empty password is refused");
        assert_eq!(access.servers.current().credentials, Some(Credentials::parse(Some(b"shop"), b"one").unwrap()));
        write(&dir, "password", "two");
        let renewed = timeout(LONG, access.servers.changed()).await.expect("the password is renewed");
        assert!(password(&renewed));
        assert_eq!(metrics.secrets_renewed.get(), 1);
    }

    #[tokio::test]
    async fn what_is_wrong_at_the_start_is_named() {
        let dir = TempDir::new().unwrap();
        let open = || async { open_access(&cluster(&dir), Arc::default()).await.map(|_| ()).unwrap_err().to_string() };
        assert!(open().await.contains("user: No such file"), "{}", open().await);
        write(&dir, "user", "shop");
        write(&dir, "password", "pw");
        write(&dir, "sentinel", "\n");
        assert_eq!(open().await, "sentinelAuth: the password is empty");
        let mut half = cluster(&dir);
        half.sentinel_auth = None;
        let cert = Some(dir.path().join("user"));
        half.tls = Some(Tls { ca_file: dir.path().join("user"), cert_file: cert, key_file: None, server_name: None });
        let error = open_access(&half, Arc::default()).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("tls: a client certificate needs both"), "{error}");
    }
}
