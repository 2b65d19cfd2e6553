//! Commands to servers and sentinels: few, small, and each with a deadline.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{AsyncStream, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, Pipeline, RedisConnectionInfo};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::policy::digest::sha256;

/// How long a connection may take to come about, and a command to be answered. Nothing that is asked here takes a server long.
const DEADLINE: Duration = Duration::from_secs(1);

/// A user and its password. `Debug` does not show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The authorities whose certificates servers and sentinels show.
#[derive(Clone)]
pub struct Trust {
    bundle: String,
    config: Arc<ClientConfig>,
    http: reqwest::Client,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").finish_non_exhaustive()
    }
}

impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        self.bundle == other.bundle
    }
}

/// A bundle of authorities that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the certificates of the authorities cannot be used")]
pub struct TrustError;

impl Trust {
    /// Reads a bundle of certificates, PEM.
    pub fn parse(bundle: &str) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
            roots.add(authority.map_err(|_| TrustError)?).map_err(|_| TrustError)?;
        }
        if roots.is_empty() {
            return Err(TrustError);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = builder.map_err(|_| TrustError)?.with_root_certificates(roots).with_no_client_auth();
        // A session that is taken up again shows no certificate, and what is served now is to be seen.
        config.resumption = Resumption::disabled();
        let http = reqwest::Client::builder().connect_timeout(DEADLINE).timeout(DEADLINE).no_proxy();
        let http = http.pool_max_idle_per_host(0).tls_backend_preconfigured(config.clone()).build().map_err(|_| TrustError)?;
        Ok(Self { bundle: bundle.to_owned(), config: Arc::new(config), http })
    }

    /// Whether it is of this bundle.
    pub fn is_of(&self, bundle: &str) -> bool {
        self.bundle == bundle
    }

    /// Asks agents.
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }
}

/// How servers and sentinels let Larder in.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Entry<'a> {
    /// Whom to log in as. `None`: nobody.
    pub login: Option<&'a Login>,
    /// Whom to trust. `None`: plain TCP.
    pub trust: Option<&'a Trust>,
}

impl<'a> From<Option<&'a Login>> for Entry<'a> {
    fn from(login: Option<&'a Login>) -> Self {
        Self { login, trust: None }
    }
}

/// An [`Entry`] of one's own.
#[derive(Debug, Clone, PartialEq)]
pub struct Keys {
    login: Option<Login>,
    trust: Option<Trust>,
}

impl From<Entry<'_>> for Keys {
    fn from(Entry { login, trust }: Entry<'_>) -> Self {
        Self { login: login.cloned(), trust: trust.cloned() }
    }
}

impl Keys {
    /// To be let in with.
    pub fn entry(&self) -> Entry<'_> {
        Entry { login: self.login.as_ref(), trust: self.trust.as_ref() }
    }
}

/// Why a command brought nothing.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {command}: {source}")]
pub struct AdminError {
    /// Who was asked.
    pub address: SocketAddr,
    /// The command's name.
    pub command: &'static str,
    source: redis::RedisError,
}

/// As whom to connect.
fn settings(login: Option<&Login>) -> RedisConnectionInfo {
    let settings = RedisConnectionInfo::default().set_skip_set_lib_name();
    match login {
        Some(Login { user, password }) => settings.set_username(user).set_password(password),
        None => settings,
    }
}

/// A stream to a server or a sentinel.
pub(super) type Stream = Pin<Box<dyn AsyncStream + Send + Sync>>;

/// Opens a stream, encrypted where somebody is to be trusted, and tells the fingerprint of the certificate that was shown.
pub(super) async fn open(address: SocketAddr, trust: Option<&Trust>) -> io::Result<(Stream, Option<String>)> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let Some(trust) = trust else { return Ok((Box::pin(tcp), None)) };
    let stream = TlsConnector::from(trust.config.clone()).connect(ServerName::from(address.ip()), tcp).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(|certificate| sha256(certificate));
    Ok((Box::pin(stream), shown))
}

impl AdminError {
    /// The code that a refusal begins with, such as `INPROG`; `None` where the command was not answered, or not with an error.
    pub fn code(&self) -> Option<&str> {
        self.source.code()
    }
}

/// A connection to one server or sentinel. It does not reconnect: after an error, open another.
#[derive(Clone)]
pub struct Admin {
    address: SocketAddr,
    connection: MultiplexedConnection,
    shown: Option<String>,
}

impl Admin {
    /// Connects, and logs in where there is a login.
    pub async fn connect<'a>(address: SocketAddr, entry: impl Into<Entry<'a>>) -> Result<Self, AdminError> {
        Self::connect_for(address, entry, DEADLINE).await
    }

    /// Connects for commands that may take a server as long as `patience`.
    pub async fn connect_for<'a>(
        address: SocketAddr,
        entry: impl Into<Entry<'a>>,
        patience: Duration,
    ) -> Result<Self, AdminError> {
        let Entry { login, trust } = entry.into();
        let connect = async {
            let (stream, shown) = open(address, trust).await?;
            let config = AsyncConnectionConfig::new().set_response_timeout(Some(patience));
            let (connection, driver) = MultiplexedConnection::new_with_config(&settings(login), stream, config).await?;
            // It ends with the last handle of the connection.
            tokio::spawn(driver);
            Ok(Self { address, connection, shown })
        };
        let late = || io::Error::from(io::ErrorKind::TimedOut).into();
        let connected: Result<Self, redis::RedisError> = timeout(DEADLINE, connect).await.unwrap_or_else(|_| Err(late()));
        connected.map_err(|source| AdminError { address, command: "connect", source })
    }

    /// The SHA-256 of the certificate (DER, in hexadecimal) that was shown when this connection was made; `None` over plain TCP.
    pub fn shown_certificate(&self) -> Option<&str> {
        self.shown.as_deref()
    }

    /// Sends a command of one word with its arguments.
    pub async fn ask<T: FromRedisValue>(&mut self, command: &'static str, arguments: &[&str]) -> Result<T, AdminError> {
        let mut cmd = Cmd::new();
        // A subcommand is an argument of its own: `CLUSTER NODES` is written so for readers.
        command.split(' ').for_each(|word| {
            cmd.arg(word);
        });
        arguments.iter().for_each(|argument| {
            cmd.arg(*argument);
        });
        let address = self.address;
        cmd.query_async(&mut self.connection).await.map_err(|source| AdminError { address, command, source })
    }

    /// Sends commands together, and reads all their replies. The first refusal is the error; the other commands are carried out
    /// nevertheless. `command` is what they are called in an error.
    pub async fn ask_all<T: FromRedisValue>(&mut self, command: &'static str, commands: Vec<Cmd>) -> Result<Vec<T>, AdminError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = Pipeline::with_capacity(commands.len());
        commands.into_iter().for_each(|cmd| {
            pipeline.add_command(cmd);
        });
        let address = self.address;
        pipeline.query_async(&mut self.connection).await.map_err(|source| AdminError { address, command, source })
    }
}
