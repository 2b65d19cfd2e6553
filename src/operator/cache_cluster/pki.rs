//! The certificates of a CacheCluster's servers and sentinels, and the authority that signs them: which there are to be, and when
//! each is made anew. No I/O and no clock: the time is given.
//!
//! There are two certificates, one for all servers and one for all sentinels: the pods of a StatefulSet mount the same Secret. Servers
//! take a new one up while they run; sentinels read theirs when they start, and are restarted for it. So a sentinel's certificate
//! that only lacks the names of newer sentinels stands for the newer one.
//!
//! An authority is replaced in steps, each of which every server and sentinel must have shown before the next: the new one is trusted
//! beside the old, then it signs, then the old one is trusted no more. Whoever is trusted stands in one bundle, and a change of the
//! bundle makes new certificates, by which everybody shows to have read it.

mod issue;

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

pub use issue::IssueError;

const DAY: u64 = 24 * 3600;
/// How long an authority is valid.
pub const AUTHORITY_LIFE: u64 = 3650 * DAY;
/// How long before its end the next one is made.
pub const AUTHORITY_RENEWAL: u64 = 730 * DAY;
/// How long clients have to learn of a new authority before it signs, and to need the former no more before that is dropped: Secrets
/// and ConfigMaps reach pods within minutes, and applications may read them at their start only.
pub const AUTHORITY_STEP: u64 = 30 * DAY;
/// How long a certificate is valid.
pub const CERTIFICATE_LIFE: u64 = 90 * DAY;
/// How long before its end the next one is made.
pub const CERTIFICATE_RENEWAL: u64 = 30 * DAY;
/// How many earlier certificates are remembered that need not be replaced.
const MAX_EQUIVALENTS: usize = 16;

/// An authority and its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Authority {
    /// Rises with each one.
    number: u64,
    /// The name in its certificate, which no other has.
    name: String,
    made: u64,
    expires: u64,
    /// PEM.
    certificate: String,
    /// PEM.
    key: String,
}

/// A certificate and its key. `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Certified {
    /// Which authority signed it.
    authority: u64,
    /// Which authorities were trusted when it was made.
    bundle: Vec<u64>,
    /// Names and addresses.
    names: BTreeSet<String>,
    /// The text that asked for it.
    rotation: Option<String>,
    /// In seconds since 1970, as are all times here.
    made: u64,
    /// When the next one is made.
    renewal: u64,
    expires: u64,
    /// The SHA-256 of its DER form.
    fingerprint: String,
    /// Fingerprints of earlier ones that need not be replaced.
    equivalents: Vec<String>,
    /// PEM.
    certificate: String,
    /// PEM.
    key: String,
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { authority, names, rotation, expires, fingerprint, .. } = self;
        let mut shown = f.debug_struct("Certified");
        shown.field("authority", authority).field("names", names).field("rotation", rotation);
        shown.field("expires", expires).field("fingerprint", fingerprint).finish_non_exhaustive()
    }
}

impl Certified {
    /// The certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its key, PEM.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The SHA-256 of its DER form, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The text that asked for it.
    pub fn rotation(&self) -> Option<&str> {
        self.rotation.as_deref()
    }

    /// When it ends.
    pub fn expires(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.expires)
    }

    /// Whether who presents the certificate of this fingerprint needs no other.
    pub fn is_served_by(&self, fingerprint: &str) -> bool {
        self.fingerprint == fingerprint || self.equivalents.iter().any(|equivalent| equivalent == fingerprint)
    }
}

/// Who is certified, and on whose word.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Subjects {
    /// The CacheCluster's name.
    pub cluster: String,
    /// Names and addresses of all servers. Whoever has none gets no certificate.
    pub servers: BTreeSet<String>,
    /// Names and addresses of all sentinels, where there are some.
    pub sentinels: BTreeSet<String>,
    /// A text whose change asks for new certificates.
    pub rotation: Option<String>,
}

/// The authorities and certificates of one CacheCluster. This is what a Secret of the operator's alone remembers: see [`Pki::parse`].
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pki {
    /// Rises with each change.
    generation: u64,
    /// The oldest first.
    authorities: Vec<Authority>,
    servers: Option<Certified>,
    sentinels: Option<Certified>,
}

impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, authorities, servers, sentinels } = self;
        let authorities: Vec<_> = authorities.iter().map(|authority| (&authority.name, authority.expires)).collect();
        let mut shown = f.debug_struct("Pki");
        shown.field("generation", generation).field("authorities", &authorities);
        shown.field("servers", servers).field("sentinels", sentinels).finish()
    }
}

impl Pki {
    /// Rises with each change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The servers' certificate.
    pub fn servers(&self) -> Option<&Certified> {
        self.servers.as_ref()
    }

    /// The sentinels' certificate.
    pub fn sentinels(&self) -> Option<&Certified> {
        self.sentinels.as_ref()
    }

    /// Everybody who is trusted, PEM.
    pub fn bundle(&self) -> String {
        self.authorities.iter().map(|authority| authority.certificate.as_str()).collect()
    }

    /// Reads what [`Pki::to_json`] wrote.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// What is to be remembered until the next call. It holds keys.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What is to be in force now. `shown`: whether every server and sentinel has shown the certificates that are in force. Calling it
    /// again with its own result changes nothing.
    pub fn next(&self, subjects: &Subjects, shown: bool, now: SystemTime) -> Result<Self, IssueError> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut next = self.clone();
        next.settle_authorities(subjects, shown, now)?;
        let bundle: Vec<u64> = next.authorities.iter().map(|authority| authority.number).collect();
        let Self { authorities, servers, sentinels, .. } = &mut next;
        for (held, names) in [(servers, &subjects.servers), (sentinels, &subjects.sentinels)] {
            if names.is_empty() {
                *held = None;
                continue;
            }
            let Some(signer) = signer(authorities, held.as_ref(), shown, now) else { continue };
            let wanted = Wanted { signer, bundle: &bundle, names, rotation: &subjects.rotation };
            if let Some(why) = wanted.lacks(held.as_ref(), now) {
                *held = Some(wanted.make(&subjects.cluster, held.as_ref(), why, now)?);
            }
        }
        if next != *self {
            next.generation += 1;
        }
        Ok(next)
    }

    /// Makes the next authority in time, and drops what nobody needs.
    fn settle_authorities(&mut self, subjects: &Subjects, shown: bool, now: u64) -> Result<(), IssueError> {
        let newest = self.authorities.last().map_or(0, |newest| newest.number);
        let signed_by_newest = |held: &Option<Certified>, names: &BTreeSet<String>| {
            let is_signed = |held: &Certified| held.authority == newest && held.made + AUTHORITY_STEP <= now;
            names.is_empty() || held.as_ref().is_some_and(is_signed)
        };
        let replaced =
            shown && signed_by_newest(&self.servers, &subjects.servers) && signed_by_newest(&self.sentinels, &subjects.sentinels);
        self.authorities.retain(|authority| authority.expires > now && (authority.number == newest || !replaced));
        let lasts = self.authorities.last().is_some_and(|newest| newest.expires.saturating_sub(now) > AUTHORITY_RENEWAL);
        if !lasts {
            self.authorities.push(Authority::make(&subjects.cluster, newest + 1, now)?);
        }
        Ok(())
    }
}

/// Who signs: the newest authority once everybody trusts it, and until then the one that signed before.
fn signer<'a>(authorities: &'a [Authority], held: Option<&Certified>, shown: bool, now: u64) -> Option<&'a Authority> {
    let newest = authorities.last()?;
    let known = newest.made + AUTHORITY_STEP <= now && shown;
    let former = held.and_then(|held| authorities.iter().find(|authority| authority.number == held.authority));
    match former {
        Some(former) if !known => Some(former),
        Some(_) => Some(newest),
        // Where nothing was signed yet, or by nobody who is still trusted, the one that has been trusted longest does it.
        None => authorities.first(),
    }
}

/// A certificate as it is to be.
struct Wanted<'a> {
    signer: &'a Authority,
    bundle: &'a [u64],
    names: &'a BTreeSet<String>,
    rotation: &'a Option<String>,
}

/// Why a certificate is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// It names more than the one before.
    Names,
    /// The one before is to be replaced everywhere.
    Replacement,
}

impl Wanted<'_> {
    fn lacks(&self, held: Option<&Certified>, now: u64) -> Option<Why> {
        let Some(held) = held else { return Some(Why::Replacement) };
        let stands = held.authority == self.signer.number
            && held.bundle == self.bundle
            && held.rotation == *self.rotation
            && held.renewal > now;
        match (stands, self.names.is_subset(&held.names)) {
            (true, true) => None,
            (true, false) => Some(Why::Names),
            (false, _) => Some(Why::Replacement),
        }
    }

    fn make(&self, cluster: &str, before: Option<&Certified>, why: Why, now: u64) -> Result<Certified, IssueError> {
        let expires = (now + CERTIFICATE_LIFE).min(self.signer.expires);
        let issued = issue::certificate(self.signer, cluster, self.names, now, expires)?;
        // Not at once again, however soon its authority ends.
        let (mut renewal, mut equivalents) = (expires.saturating_sub(CERTIFICATE_RENEWAL).max(now + DAY), Vec::new());
        if let (Some(before), Why::Names) = (before, why) {
            // Who still presents the one before gets another in time.
            renewal = before.renewal;
            equivalents.push(before.fingerprint.clone());
            equivalents.extend(before.equivalents.iter().take(MAX_EQUIVALENTS - 1).cloned());
        }
        Ok(Certified {
            authority: self.signer.number,
            bundle: self.bundle.to_vec(),
            names: self.names.clone(),
            rotation: self.rotation.clone(),
            made: now,
            renewal,
            expires,
            fingerprint: issued.fingerprint,
            equivalents,
            certificate: issued.certificate,
            key: issued.key,
        })
    }
}

#[cfg(test)]
mod tests;
