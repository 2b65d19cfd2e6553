//! Texts that may hold a password: written in place, or kept in a Secret.

use std::fmt;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::text::{ObjectNameText, SecretKeyText, SensitiveText};

/// A text that may hold a password. Exactly one of the two fields is set; `Debug` does not show the text.
#[derive(KubeSchema, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.value) != has(self.secretKeyRef)").message("write either value or secretKeyRef, and not both"))]
pub struct SensitiveSource {
    /// The text itself. Whoever may read this object can read it: keep passwords in a Secret and name it in secretKeyRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SensitiveText>")]
    pub value: Option<String>,
    /// The entry of a Secret, in the same namespace, that holds the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<SecretKeyRef>,
}

/// One entry of a Secret in the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretKeyRef {
    /// The Secret's name.
    #[schemars(with = "ObjectNameText")]
    pub name: String,
    /// The name of the entry in it.
    #[schemars(with = "SecretKeyText")]
    pub key: String,
}

impl SensitiveSource {
    /// A text written in place.
    pub fn value(text: impl Into<String>) -> Self {
        Self { value: Some(text.into()), secret_key_ref: None }
    }

    /// A text kept in a Secret.
    pub fn secret(name: impl Into<String>, key: impl Into<String>) -> Self {
        Self { value: None, secret_key_ref: Some(SecretKeyRef { name: name.into(), key: key.into() }) }
    }
}

impl fmt::Debug for SensitiveSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.value, &self.secret_key_ref) {
            (_, Some(secret)) => write!(f, "secretKeyRef {}/{}", secret.name, secret.key),
            (Some(_), None) => f.write_str("value …"),
            (None, None) => f.write_str("nothing"),
        }
    }
}
