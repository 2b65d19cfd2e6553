//! A binding: what ties one workload to one CacheCluster, and where it is found.
//!
//! A workload is what owns pods: a Deployment, a StatefulSet, a Job. All its pods have the same binding, which is named when they are
//! injected, and whose content alone changes afterwards. Both planes and the injector agree on the names here.

use std::fmt;

use super::digest::sha256;

/// Where a sidecar finds the snapshot: the binding's `ConfigMap`, mounted whole.
pub const POLICY_DIR: &str = "/etc/larder/policy";
/// The snapshot's name there, and the key of the `ConfigMap`.
pub const SNAPSHOT_FILE: &str = "snapshot.json";
/// Where a sidecar finds the binding's Secret, mounted whole.
pub const SECRET_DIR: &str = "/etc/larder/secret";
/// The ACL user's name there.
pub const USERNAME_FILE: &str = "username";
/// Its password.
pub const PASSWORD_FILE: &str = "password";
/// The user for sentinels.
pub const SENTINEL_USERNAME_FILE: &str = "sentinel-username";
/// Its password.
pub const SENTINEL_PASSWORD_FILE: &str = "sentinel-password";
/// The authorities of servers, PEM.
pub const CA_FILE: &str = "ca.crt";
/// The socket at which a sidecar in a pod explains itself.
pub const ADMIN_SOCKET: &str = "/run/larder-admin/admin.sock";

/// The most bytes of a binding's name: what is put before it still makes a DNS label.
const MAX_NAME: usize = 52;
/// Hexadecimal digits of the fingerprint that tells apart what has the same beginning.
const FINGERPRINT: usize = 10;

/// A binding's name: a DNS label of at most 52 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingName(String);

/// Why a text names no binding.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no binding's name: lower-case letters, digits and dashes, at most 52 of them, without a dash at either end")]
pub struct BindingNameError {
    text: String,
}

impl BindingName {
    /// The binding of the workload of this kind and name with a CacheCluster of its namespace.
    ///
    /// Readable at its beginning, and told apart from all others by a fingerprint at its end.
    pub fn of(kind: &str, workload: &str, cluster: &str) -> Self {
        let fingerprint = &sha256(format!("{kind}/{workload}/{cluster}").as_bytes())[..FINGERPRINT];
        let readable: String = workload.chars().take(MAX_NAME - FINGERPRINT - 1).map(label_char).collect();
        let readable = readable.trim_matches('-');
        Self(if readable.is_empty() { format!("b-{fingerprint}") } else { format!("{readable}-{fingerprint}") })
    }

    /// A binding's name that somebody gave.
    ///
    /// # Errors
    ///
    /// What could not be the name of one.
    pub fn parse(text: &str) -> Result<Self, BindingNameError> {
        let bytes = text.as_bytes();
        let legal = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let ends = [bytes.first(), bytes.last()].into_iter().all(|end| end.is_some_and(|byte| *byte != b'-'));
        if bytes.len() <= MAX_NAME && ends && bytes.iter().all(legal) {
            return Ok(Self(text.to_owned()));
        }
        Err(BindingNameError { text: text.chars().take(64).collect() })
    }

    /// The name as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of its `ConfigMap`, and of its Secret.
    pub fn object_name(&self) -> String {
        format!("larder-b-{self}")
    }

    /// The key in the cache that holds its newest snapshot, and the channel that tells of a newer one.
    pub fn snapshot_key(&self) -> String {
        format!("larder:p:{self}")
    }

    /// The channel on which its sidecars say how they are.
    pub fn heartbeat_channel(&self) -> String {
        format!("larder:hb:{self}")
    }

    /// The key in the cache that tells its sidecars how many they are. In the slot of [`BindingName::snapshot_key`], so that in a
    /// Cluster one connection reads both.
    pub fn fleet_key(&self) -> String {
        format!("larder:fleet:{{{}}}", self.snapshot_key())
    }

    /// The key in the cache that the one of its sidecars holds which repairs keys without a TTL.
    pub fn sweep_key(&self) -> String {
        format!("larder:sweep:{self}")
    }

    /// The ACL user of its sidecars at the servers.
    pub fn user(&self) -> String {
        format!("larder-b-{self}")
    }

    /// The binding whose sidecars' user has this name.
    pub fn of_user(user: &str) -> Option<Self> {
        Self::parse(user.strip_prefix("larder-b-")?).ok()
    }
}

/// A character that a DNS label may have, in place of this one.
fn label_char(character: char) -> char {
    let lower = character.to_ascii_lowercase();
    if lower.is_ascii_lowercase() || lower.is_ascii_digit() { lower } else { '-' }
}

impl fmt::Display for BindingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_readable_and_told_apart() {
        let shop = BindingName::of("Deployment", "shop", "main");
        assert!(shop.as_str().starts_with("shop-"), "{shop}");
        assert_ne!(shop, BindingName::of("StatefulSet", "shop", "main"));
        assert_ne!(shop, BindingName::of("Deployment", "shop", "other"));
        assert_ne!(BindingName::of("Deployment", "a.b", "main"), BindingName::of("Deployment", "a-b", "main"));
        assert_eq!(BindingName::of_user(&shop.user()), Some(shop));
        assert_eq!([BindingName::of_user("larder-system"), BindingName::of_user("larder-b-")], [None, None]);
    }

    #[test]
    fn what_is_no_label_is_refused() {
        for text in ["", "-a", "a-", "A", "a.b", "ä", &"a".repeat(53)] {
            assert!(BindingName::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_workload_has_a_name_that_parses(kind in "[A-Z][a-z]{2,20}", workload in "\\PC{0,253}", cluster in "[a-z-]{1,40}") {
            let name = BindingName::of(&kind, &workload, &cluster);
            prop_assert_eq!(BindingName::parse(name.as_str()), Ok(name.clone()));
            prop_assert!(name.object_name().len() <= 63);
        }
    }
}
