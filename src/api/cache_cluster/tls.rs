//! `spec.tls`: whether servers and sentinels speak TLS, and with which certificates.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::api::text::RequestText;

/// Whether servers and sentinels speak TLS.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.enabled || !has(self.rotation)")
    .message("rotation has a meaning with enabled: true only: remove it, or write enabled: true"))]
pub struct TlsSpec {
    /// Whether servers and sentinels speak TLS, and nothing else, among each other and with clients. Larder makes an authority for this
    /// object alone, whose certificate clients find in the ConfigMap NAME-ca, entry ca.crt, and renews what ends.
    pub enabled: bool,
    /// Any text, such as a date. Each change makes new certificates at once. Servers take theirs up while they run; sentinels are
    /// restarted, one at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<RequestText>")]
    pub rotation: Option<String>,
}
