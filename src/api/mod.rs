//! The custom resources, their checks, and their compilation into a snapshot.

pub mod cache_cluster;
pub mod cache_policy;
pub mod compile;
pub mod crd;
pub mod finding;
mod labels;
pub mod lint;
pub mod manifest;
pub mod parameters;
pub mod path;
pub mod problem;
pub mod schema;
pub mod sensitive;
pub mod text;

pub use cache_cluster::{CacheCluster, CacheClusterSpec};
pub use cache_policy::{CachePolicy, CachePolicySpec};
pub use compile::{Reach, Secrets, compile};
pub use finding::{Finding, Refused, Severity};
pub use manifest::Manifests;
pub use path::FieldPath;
pub use problem::{ObjectRef, Problem, Problems};
pub use sensitive::{SecretKeyRef, SensitiveSource};
