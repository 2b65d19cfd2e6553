//! The API server's audit log: who asked for what, and whether it was allowed.

use std::fs;
use std::path::Path;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serde::Deserialize;

/// One line.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    pub stage: String,
    pub verb: String,
    pub user: Who,
    #[serde(default)]
    pub object_ref: What,
    #[serde(default)]
    pub response_status: Outcome,
    #[serde(rename = "requestURI")]
    pub uri: String,
    /// When it came.
    #[serde(rename = "requestReceivedTimestamp")]
    pub at: MicroTime,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Who {
    pub username: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct What {
    pub api_group: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Outcome {
    #[serde(default)]
    pub code: u16,
    #[serde(default)]
    pub message: String,
}

impl Entry {
    /// `verb group/resource`, as grants are written here.
    pub fn right(&self) -> String {
        let What { api_group, resource, subresource, .. } = &self.object_ref;
        let subresource = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
        format!("{} {api_group}/{resource}{subresource}", self.verb)
    }

    /// Whether it tells of the end of a request. One that goes on, as a watch does, has another line for its beginning.
    pub fn is_end(&self) -> bool {
        self.stage == "ResponseComplete"
    }
}

/// All lines that are complete.
pub fn read(path: &Path) -> Vec<Entry> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
    complete.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}
