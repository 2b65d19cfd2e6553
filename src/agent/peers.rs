//! How peers' agents are asked: over plain HTTP, or over TLS with the authorities that are trusted at this moment.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sidecar::upstream::access::{Access, Keys};

/// A client that follows the keys.
pub struct PeerClient {
    plain: reqwest::Client,
    /// `None`: peers are asked in the clear.
    access: Option<Access>,
    /// The last one that was made, and with which keys.
    secured: Mutex<Option<(Arc<Keys>, reqwest::Client)>>,
}

impl PeerClient {
    /// A client that encrypts with the keys of `access`, or does not.
    pub fn new(access: Option<Access>) -> Result<Self, reqwest::Error> {
        // The server's image may have no certificates, without which the usual verifier does not start.
        Ok(Self { plain: builder().tls_certs_only([]).build()?, access, secured: Mutex::default() })
    }

    /// The scheme of addresses, and who asks.
    pub fn current(&self) -> Result<(&'static str, reqwest::Client), reqwest::Error> {
        let keys = self.access.as_ref().map(Access::current);
        let Some((keys, tls)) = keys.and_then(|keys| Some((keys.clone(), keys.tls.clone()?))) else {
            return Ok(("http", self.plain.clone()));
        };
        let mut secured = self.secured.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = secured.as_ref().filter(|(with, _)| Arc::ptr_eq(with, &keys)) {
            return Ok(("https", client.clone()));
        }
        let client = builder().tls_backend_preconfigured(tls.client_config()).build()?;
        *secured = Some((keys, client.clone()));
        Ok(("https", client))
    }
}

fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder().no_proxy().pool_max_idle_per_host(1)
}
