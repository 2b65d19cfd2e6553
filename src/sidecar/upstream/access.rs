//! What a connection needs beyond an address: a login and TLS.
//!
//! Both come from files that rotate. A connection is always made with the newest. Shared ones that stand log in anew, between two
//! commands; those of one client at a time are not used again once it has left them.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::watch;

use crate::sidecar::resp::encode;

/// Why credentials or certificates were refused. The texts never hold what the files hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// The password's file is empty.
    #[error("the password is empty")]
    NoPassword,
    /// The user's name is empty or holds white space.
    #[error("the user name is empty or holds white space")]
    UserName,
    /// The file with the authorities has no certificate.
    #[error("the CA file has no PEM certificate that can be used")]
    NoAuthority,
    /// The certificate's file has none.
    #[error("the certificate file has no PEM certificate that can be read")]
    NoCertificate,
    /// The key's file has none.
    #[error("the key file has no PEM private key that can be read")]
    NoKey,
    /// They do not belong together, or their kind is not supported.
    #[error("the certificate and its key cannot be used together: {0}")]
    Pair(String),
    /// Only one of certificate and key is given.
    #[error("a client certificate needs both its file and its key's file")]
    HalfPair,
    /// The name to expect in certificates is none.
    #[error("`{0}` is no name that a certificate can have")]
    ServerName(String),
}

/// A user and a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    user: Box<str>,
    password: Box<[u8]>,
}

impl Credentials {
    /// Reads what the files hold; one line end at the end of each does not count. `None` as the user: `default`.
    pub fn parse(user: Option<&[u8]>, password: &[u8]) -> Result<Self, KeysError> {
        let user = match user {
            Some(bytes) => std::str::from_utf8(without_line_end(bytes)).map_err(|_| KeysError::UserName)?,
            None => "default",
        };
        if user.is_empty() || user.chars().any(char::is_whitespace) {
            return Err(KeysError::UserName);
        }
        match without_line_end(password) {
            [] => Err(KeysError::NoPassword),
            password => Ok(Self { user: user.into(), password: password.into() }),
        }
    }

    /// The user's name.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The password, for the one command that carries it.
    pub(super) fn password(&self) -> &[u8] {
        &self.password
    }
}

fn without_line_end(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    bytes.strip_suffix(b"\r").unwrap_or(bytes)
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The client's side of TLS.
#[derive(Clone)]
pub struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) server_name: Option<ServerName<'static>>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl ClientTls {
    /// What others than [`super::dial`] encrypt with.
    pub fn client_config(&self) -> ClientConfig {
        (*self.config).clone()
    }

    /// Reads PEM files: the authorities to trust, and a certificate with its key where the servers want one. `server_name` is the
    /// name to expect in the servers' certificates; without it, the host that is dialled.
    pub fn parse(ca: &[u8], pair: Option<(&[u8], &[u8])>, server_name: Option<&str>) -> Result<Self, KeysError> {
        let server_name = server_name
            .map(|name| ServerName::try_from(name.to_owned()).map_err(|_| KeysError::ServerName(name.to_owned())))
            .transpose()?;
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(ca) {
            roots.add(authority.map_err(|_| KeysError::NoAuthority)?).map_err(|_| KeysError::NoAuthority)?;
        }
        if roots.is_empty() {
            return Err(KeysError::NoAuthority);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| KeysError::Pair(error.to_string()))?
            .with_root_certificates(roots);
        let config = match pair {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain: Vec<_> = CertificateDer::pem_slice_iter(cert).collect::<Result<_, _>>().unwrap_or_default();
                if chain.is_empty() {
                    return Err(KeysError::NoCertificate);
                }
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| KeysError::NoKey)?;
                builder.with_client_auth_cert(chain, key).map_err(|error| KeysError::Pair(error.to_string()))?
            }
        };
        Ok(Self { config: Arc::new(config), server_name })
    }
}

/// A login and TLS as they are at one moment.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// Whom to log in as. `None`: nobody.
    pub credentials: Option<Credentials>,
    /// How to encrypt. `None`: not at all.
    pub tls: Option<ClientTls>,
}

impl Keys {
    /// The command that logs in on a connection that stands.
    pub(super) fn login(&self) -> Option<Vec<u8>> {
        let credentials = self.credentials.as_ref()?;
        let mut command = Vec::new();
        encode::command(&mut command, &[b"AUTH", credentials.user().as_bytes(), credentials.password()]);
        Some(command)
    }
}

/// The newest [`Keys`], whichever thread asks. Cloning costs a reference count.
#[derive(Debug, Clone)]
pub struct Access(watch::Receiver<Arc<Keys>>);

impl Access {
    /// An access whose keys `sender`'s owner renews.
    pub fn new(keys: Keys) -> (watch::Sender<Arc<Keys>>, Self) {
        let (sender, receiver) = watch::channel(Arc::new(keys));
        (sender, Self(receiver))
    }

    /// An access whose keys never change.
    pub fn fixed(keys: Keys) -> Self {
        Self::new(keys).1
    }

    /// The keys to use now.
    pub fn current(&self) -> Arc<Keys> {
        self.0.borrow().clone()
    }

    /// Waits for keys newer than those that this clone has waited for. Never returns where they cannot change any more.
    pub async fn changed(&mut self) -> Arc<Keys> {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.0.borrow_and_update().clone()
    }
}

/// How to log in at the servers of one cluster, and at its sentinels.
#[derive(Debug, Clone)]
pub struct ClusterAccess {
    /// At the servers.
    pub servers: Access,
    /// At the sentinels, which have users of their own.
    pub sentinels: Access,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_read_without_their_line_end_and_never_shown() {
        let credentials = Credentials::parse(Some(b"shop\n"), b"s3cret\r\n").unwrap();
        assert_eq!((credentials.user(), credentials.password()), ("shop", &b"s3cret"[..]));
        assert!(!format!("{credentials:?}").contains("s3cret"));
        assert_eq!(Credentials::parse(None, b"x").unwrap().user(), "default");
        assert_eq!(Credentials::parse(None, b"\n"), Err(KeysError::NoPassword));
        assert_eq!(Credentials::parse(Some(b"a b"), b"x"), Err(KeysError::UserName));
    }

    #[test]
    fn certificates_must_be_whole() {
        let one = rcgen::generate_simple_self_signed(["cache".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["cache".to_owned()]).unwrap();
        let (cert, key) = (one.cert.pem(), one.signing_key.serialize_pem());
        let parse = |ca: &str, cert: &str, key: &str| {
            ClientTls::parse(ca.as_bytes(), Some((cert.as_bytes(), key.as_bytes())), None).map(|_| ())
        };
        assert_eq!(parse(&cert, &cert, &key), Ok(()));
        assert_eq!(parse("", &cert, &key), Err(KeysError::NoAuthority));
        assert_eq!(parse(&cert[..cert.len() / 2], &cert, &key), Err(KeysError::NoAuthority));
        assert_eq!(parse(&cert, "", &key), Err(KeysError::NoCertificate));
        assert_eq!(parse(&cert, &cert, ""), Err(KeysError::NoKey));
        assert!(matches!(parse(&cert, &cert, &other.signing_key.serialize_pem()), Err(KeysError::Pair(_))));
        let named = ClientTls::parse(cert.as_bytes(), None, Some("no name"));
        assert!(matches!(named, Err(KeysError::ServerName(_))));
    }
}
