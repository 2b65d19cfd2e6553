//! TLS towards Postgres as a URL's `sslmode` has it: the same as for loads.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use sqlx::postgres::PgSslMode;

/// Which files TLS takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// The authorities to trust beside the well-known ones, PEM.
    pub authorities: Option<PathBuf>,
    /// The certificate to present, PEM.
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
}

/// What a connection encrypts with. The error is a text that names no secret.
///
/// # Errors
/// A file cannot be used.
pub async fn config(mode: PgSslMode, files: &Files) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    let verifier = verifier(mode, files, provider).await?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match (&files.certificate, &files.key) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate).await?;
            let key = PrivateKeyDer::from_pem_slice(&read(key).await?).map_err(|error| format!("sslkey: {error}"))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| error.to_string())
        }
        _ => Err("sslcert and sslkey belong together: write both".to_owned()),
    }
}

async fn verifier(mode: PgSslMode, files: &Files, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, String> {
    if !matches!(mode, PgSslMode::VerifyCa | PgSslMode::VerifyFull) {
        return Ok(Arc::new(Lenient { issued: None, provider }));
    }
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(path) = &files.authorities {
        for authority in certificates(path).await? {
            roots.add(authority).map_err(|error| format!("sslrootcert: {error}"))?;
        }
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let verifier = verifier.map_err(|error| error.to_string())?;
    Ok(if matches!(mode, PgSslMode::VerifyFull) { verifier } else { Arc::new(Lenient { issued: Some(verifier), provider }) })
}

async fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(path).await?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    if found.is_empty() { Err(format!("{} has no certificate", path.display())) } else { Ok(found) }
}

async fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    tokio::fs::read(path).await.map_err(|error| format!("{} cannot be read: {}", path.display(), error.kind()))
}

/// Asks for less than [`WebPkiServerVerifier`], as these `sslmode`s do.
#[derive(Debug)]
struct Lenient {
    /// verify-ca: who issued the certificate counts, and its name does not. prefer and require have none: what is encrypted is for whoever answers.
    issued: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(issued) = &self.issued else { return Ok(ServerCertVerified::assertion()) };
        match issued.verify_server_cert(cert, intermediates, name, ocsp, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
