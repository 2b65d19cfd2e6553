//! Fingerprints.

/// A SHA-256.
pub type Digest = [u8; 32];

/// The SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    // The one suite whose hash this is; the provider has no other way to it.
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let hash = suite.tls13().map(|suite| suite.common.hash_provider.hash(bytes));
    hash.and_then(|hash| hash.as_ref().try_into().ok()).unwrap_or_default()
}

/// The SHA-256 of some bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&digest(bytes))
}

/// A SHA-256, in hexadecimal.
pub fn hexadecimal(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_sha256() {
        assert_eq!(sha256(b"one"), "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed");
    }
}
