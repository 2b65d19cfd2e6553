//! How a snapshot reaches the sidecar: by file, and under a binding through the cache as well.
//!
//! [`choice`] says which of those that came counts, [`bounds`] what one from the cache may say, and [`link`] brings it.

pub mod bounds;
pub mod choice;
pub mod link;

use std::path::PathBuf;

use serde::Serialize;

use self::choice::Way;
use crate::policy::binding::BindingName;

/// The binding that a sidecar serves.
#[derive(Debug, Clone)]
pub struct Binding {
    /// Its name.
    pub name: BindingName,
    /// Where its Secret is mounted.
    pub secrets: PathBuf,
}

/// What has been delivered so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Delivered {
    /// The generation in force. `None`: there is no snapshot yet.
    pub generation: Option<u64>,
    /// How it came.
    pub way: Option<Way>,
    /// What has been refused since.
    pub refused: Option<Refused>,
}

/// A snapshot that did not come into force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// Its generation, where it could be read.
    pub generation: Option<u64>,
    /// How it came.
    pub way: Way,
    /// Why.
    pub reason: String,
}
