//! TLS, from the side of whoever answers.

use std::fmt;
use std::io;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use larder::policy::digest::sha256;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// A certificate and its key as a Secret holds them.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

impl Pair {
    pub fn of(secret: &Secret) -> Option<Self> {
        let entry = |name: &str| Some(secret.data.as_ref()?.get(name)?.0.clone());
        Some(Self { certificate: entry("tls.crt")?, key: entry("tls.key")? })
    }

    /// What a program shows that has read it.
    pub fn present(&self) -> Presented {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&self.certificate).map(|one| one.expect("a certificate")).collect();
        let key = PrivateKeyDer::from_pem_slice(&self.key).expect("a key");
        let fingerprint = sha256(chain.first().expect("a certificate"));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
        let config = builder.with_no_client_auth().with_single_cert(chain, key).expect("they belong together");
        Presented { fingerprint, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }
}

/// What a member shows to whoever connects.
#[derive(Clone)]
pub struct Presented {
    /// As operator and agents write it.
    pub fingerprint: String,
    acceptor: TlsAcceptor,
}

impl fmt::Debug for Presented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Presented").field(&self.fingerprint).finish()
    }
}

/// A connection, in the clear or not.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// Goes through the handshake, where there is something to show.
pub async fn accept(stream: TcpStream, presented: Option<Presented>) -> io::Result<Box<dyn Duplex>> {
    let stream: Box<dyn Duplex> = match presented {
        Some(presented) => Box::new(presented.acceptor.accept(stream).await?),
        None => Box::new(stream),
    };
    Ok(stream)
}
