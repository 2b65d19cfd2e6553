//! The volumes of a pod with a sidecar, and where they are mounted.
//!
//! What belongs to the binding is mounted whole and optional: the pod starts before it is there, and sees each change of it. Nothing but the
//! socket's directory is mounted by any other container.

use serde_json::{Value, json};

use super::patch::Plan;
use crate::policy::binding::{self, POLICY_DIR, SECRET_DIR};

/// The directory of the sockets that applications use.
pub const SOCKET_DIR: &str = "/run/larder";
/// The socket that applications use.
pub const SOCKET: &str = "/run/larder/redis.sock";
/// The socket at which policy and keys are explained.
pub const ADMIN_SOCKET: &str = binding::ADMIN_SOCKET;
/// The volume of [`SOCKET`].
pub const SOCKET_VOLUME: &str = "larder-socket";

const ADMIN_DIR: &str = "/run/larder-admin";
/// Where the API server has each container find the token of the pod's account, unless something else is mounted there.
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Readable for whichever user the sidecar has: no other container has the volume.
const SECRET_MODE: u32 = 0o444;
/// Long keys are kept in temporary files, up to this size in all.
const TEMPORARY: &str = "2Gi";

/// All names that are taken.
pub const NAMES: [&str; 6] = ["larder-policy", "larder-secret", "larder-admin", "larder-no-token", "larder-tmp", SOCKET_VOLUME];

/// The volumes, in the order of [`NAMES`].
pub fn volumes(plan: &Plan) -> Vec<Value> {
    let object = plan.binding.object_name();
    let mut volumes = vec![
        json!({"name": "larder-policy", "configMap": {"name": object, "optional": true, "defaultMode": 0o644}}),
        json!({"name": "larder-secret", "secret": {"secretName": object, "optional": true, "defaultMode": SECRET_MODE}}),
        json!({"name": "larder-admin", "emptyDir": {"sizeLimit": "1Mi"}}),
        json!({"name": "larder-no-token", "emptyDir": {"sizeLimit": "1Mi"}}),
        json!({"name": "larder-tmp", "emptyDir": {"sizeLimit": TEMPORARY}}),
    ];
    if plan.socket {
        volumes.push(json!({"name": SOCKET_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}}));
    }
    volumes
}

/// What the sidecar mounts. The empty directory in place of the account's token keeps the API server from mounting that.
pub fn sidecar_mounts(plan: &Plan) -> Vec<Value> {
    let mut mounts = vec![
        json!({"name": "larder-policy", "mountPath": POLICY_DIR, "readOnly": true}),
        json!({"name": "larder-secret", "mountPath": SECRET_DIR, "readOnly": true}),
        json!({"name": "larder-admin", "mountPath": ADMIN_DIR}),
        json!({"name": "larder-no-token", "mountPath": TOKEN_DIR, "readOnly": true}),
        json!({"name": "larder-tmp", "mountPath": "/tmp"}),
    ];
    if plan.socket {
        mounts.push(socket_mount(false));
    }
    mounts
}

/// Where the socket is found. Who may only read the directory may use a socket in it, and not replace it.
pub fn socket_mount(read_only: bool) -> Value {
    let mut mount = json!({"name": SOCKET_VOLUME, "mountPath": SOCKET_DIR});
    if read_only {
        mount["readOnly"] = true.into();
    }
    mount
}
