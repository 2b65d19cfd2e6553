//! Certificates of an authority of the test's own, in files that are replaced as Kubernetes does it.

use std::path::Path;

use tempfile::TempDir;

/// An authority with a certificate for localhost, written as `ca.pem`, `cert.pem` and `key.pem`.
pub fn write_certificates(dir: &Path) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    // Of two authorities with one name, a client that trusts both may take the wrong one.
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("test authority {:x}", fastrand::u64(..)));
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(params, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "cache.test".to_owned()];
    let cert = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    for (name, text) in [("ca.pem", ca.pem()), ("cert.pem", cert.pem()), ("key.pem", key.serialize_pem())] {
        std::fs::write(dir.join(name), text).unwrap();
    }
}

/// Makes the files of `version` the current ones, all at once, as Kubernetes does.
pub fn swap_to(dir: &TempDir, version: &str) {
    let fresh = dir.path().join("..data_tmp");
    std::os::unix::fs::symlink(version, &fresh).unwrap();
    std::fs::rename(fresh, dir.path().join("..data")).unwrap();
}

/// What makes a server offer TLS with those files, once its `tls-port` is set.
pub fn tls_arguments(files: &Path) -> Vec<String> {
    let at = |name: &str| files.join(name).display().to_string();
    let pairs = [("--tls-cert-file", at("cert.pem")), ("--tls-key-file", at("key.pem")), ("--tls-ca-cert-file", at("ca.pem"))];
    pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}
