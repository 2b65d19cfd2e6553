//! Makes authorities and certificates. Their keys are new each time; nothing else is decided here.

use std::collections::BTreeSet;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::{AUTHORITY_LIFE, Authority};
use crate::policy::digest::sha256;

/// Clocks differ: what is made now is valid for those who are behind.
const CLOCK_SKEW: u64 = 3600;

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("a certificate cannot be made: {0}: see that the Secret with the authority's key is as Larder wrote it, or delete it")]
pub struct IssueError(#[from] rcgen::Error);

/// A certificate that was made.
pub(super) struct Issued {
    pub(super) certificate: String,
    pub(super) key: String,
    pub(super) fingerprint: String,
}

impl Authority {
    /// A new authority.
    pub(super) fn make(cluster: &str, number: u64, now: u64) -> Result<Self, IssueError> {
        let key = KeyPair::generate()?;
        // Of two authorities of one name, who trusts both may try the wrong one.
        let name = format!("larder {cluster} {}", sha256(key.public_key_raw()).get(..12).unwrap_or_default());
        let expires = now + AUTHORITY_LIFE;
        let mut params = authority_params(&name);
        set_validity(&mut params, now, expires);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { number, name, made: now, expires, certificate, key: key.serialize_pem() })
    }
}

/// A certificate for whoever has these names and addresses.
pub(super) fn certificate(
    signer: &Authority,
    cluster: &str,
    names: &BTreeSet<String>,
    now: u64,
    expires: u64,
) -> Result<Issued, IssueError> {
    let issuer = Issuer::new(authority_params(&signer.name), KeyPair::from_pem(&signer.key)?);
    let mut params = CertificateParams::new(names.iter().cloned().collect::<Vec<_>>())?;
    params.distinguished_name = common_name(cluster);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Servers that replicate, and sentinels, are each other's clients.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, now, expires);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    Ok(Issued { fingerprint: sha256(certificate.der()), certificate: certificate.pem(), key: key.serialize_pem() })
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, now: u64, expires: u64) {
    let at = |secs: u64| date_time_ymd(1970, 1, 1) + Duration::from_secs(secs);
    params.not_before = at(now.saturating_sub(CLOCK_SKEW));
    params.not_after = at(expires);
}
