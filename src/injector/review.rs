//! What the API server asks and is answered: `AdmissionReview` of `admission.k8s.io/v1`.
//!
//! Written out, so that the object stays as it was sent.

use k8s_openapi::ByteString;
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::patch::Outcome;

/// The only form that is spoken.
const VERSION: &str = "admission.k8s.io/v1";
/// Longer warnings may be cut off by the API server.
const MAX_WARNING_CHARS: usize = 256;
/// More are as good as none.
const MAX_WARNINGS: usize = 8;

/// A question.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    api_version: String,
    /// What it is about.
    pub request: Request,
}

/// An object that is about to be made, or changed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    resource: Named,
    #[serde(default)]
    sub_resource: String,
    /// Its namespace, which the object itself may not name yet.
    #[serde(default)]
    pub namespace: String,
    /// The object.
    #[serde(default)]
    pub object: Value,
    /// Null where the object is new.
    #[serde(default)]
    old_object: Value,
}

#[derive(Debug, Default, Deserialize)]
struct Named {
    #[serde(default)]
    group: String,
    #[serde(default)]
    resource: String,
}

/// Why a question is none.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// It is not JSON, or has not its form.
    #[error("this is no AdmissionReview: {0}")]
    Form(#[from] serde_json::Error),
    /// It is of another version.
    #[error("AdmissionReviews of {VERSION} are understood, not of {0:?}")]
    Version(String),
}

impl Review {
    /// Reads one.
    pub fn parse(body: &[u8]) -> Result<Self, ReviewError> {
        let review: Self = serde_json::from_slice(body)?;
        if review.api_version != VERSION {
            return Err(ReviewError::Version(review.api_version.chars().take(64).collect()));
        }
        Ok(review)
    }
}

impl Request {
    /// Whether a pod is about to be made, and nothing else.
    pub fn is_about_a_new_pod(&self) -> bool {
        let Named { group, resource } = &self.resource;
        self.operation == "CREATE" && group.is_empty() && resource == "pods" && self.sub_resource.is_empty()
    }

    /// Whether a policy is about to be made or changed, and not its status.
    pub fn is_about_a_policy(&self) -> bool {
        self.writes("cachepolicies")
    }

    /// Whether a CacheCluster is, and not its status.
    pub fn is_about_a_cluster(&self) -> bool {
        self.writes("cacheclusters")
    }

    fn writes(&self, ours: &str) -> bool {
        let Named { group, resource } = &self.resource;
        let is_written = ["CREATE", "UPDATE"].contains(&self.operation.as_str()) && self.sub_resource.is_empty();
        is_written && group == "larder.dev" && resource == ours
    }

    /// The object, as one of this kind. `None`: it cannot be read.
    pub fn object_as<K: DeserializeOwned + Resource>(&self) -> Option<K> {
        let mut object: K = serde_json::from_value(self.object.clone()).ok()?;
        object.meta_mut().namespace = Some(self.namespace.clone());
        Some(object)
    }

    /// What it was before, if it was anything.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn before<K: DeserializeOwned>(&self) -> serde_json::Result<Option<K>> {
        // Null is nothing.
        serde_json::from_value(self.old_object.clone())
    }

    /// The answer.
    pub fn answer(&self, outcome: &Outcome) -> Answer {
        let mut response = Response { uid: self.uid.clone(), allowed: true, ..Response::default() };
        match outcome {
            Outcome::Unchanged { why: _, warnings } => response.warnings = bounded(warnings),
            Outcome::Patched { steps, warnings } => {
                response.warnings = bounded(warnings);
                response.patch_type = Some("JSONPatch");
                response.patch = serde_json::to_vec(steps).ok().map(ByteString);
            }
            Outcome::Refused { message } => {
                response.allowed = false;
                response.status = Some(Status { code: 422, reason: "Invalid", message: format!("larder: {message}") });
            }
        }
        Answer { api_version: VERSION, kind: "AdmissionReview", response }
    }
}

fn bounded(warnings: &[String]) -> Vec<String> {
    warnings.iter().flat_map(|warning| pieces(&format!("larder: {warning}"))).take(MAX_WARNINGS).collect()
}

/// A long text in pieces, broken at blanks where it has some.
fn pieces(text: &str) -> Vec<String> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while let Some((bound, _)) = rest.char_indices().nth(MAX_WARNING_CHARS) {
        let end = rest[..bound].rfind(' ').filter(|end| *end > bound / 2).unwrap_or(bound);
        let (piece, after) = rest.split_at(end);
        pieces.push(piece.to_owned());
        rest = after.trim_start();
    }
    pieces.push(rest.to_owned());
    pieces
}

/// An answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: Response,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    /// Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<ByteString>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

#[derive(Debug, Serialize)]
struct Status {
    code: u16,
    reason: &'static str,
    message: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn question(change: &Value) -> Vec<u8> {
        let mut review = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "request": {
            "uid": "7", "operation": "CREATE", "namespace": "shop", "object": {"a": 1},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
        }});
        for (name, value) in change.as_object().unwrap() {
            review["request"][name] = value.clone();
        }
        review.to_string().into_bytes()
    }

    #[test]
    fn only_new_pods_are_looked_at() {
        let is_one = |change: &Value| Review::parse(&question(change)).unwrap().request.is_about_a_new_pod();
        assert!(is_one(&json!({})));
        assert!(!is_one(&json!({"operation": "UPDATE"})));
        assert!(!is_one(&json!({"subResource": "exec"})));
        assert!(!is_one(&json!({"resource": {"group": "apps", "resource": "deployments"}})));
        assert!(Review::parse(b"{}").is_err());
        let other = br#"{"apiVersion": "admission.k8s.io/v1beta1", "request": {"uid": "7"}}"#;
        assert!(Review::parse(other).is_err_and(|error| error.to_string().contains("v1beta1")));
    }

    #[test]
    fn policies_are_looked_at_when_they_are_written() {
        let policies = json!({"group": "larder.dev", "version": "v1alpha1", "resource": "cachepolicies"});
        let is_one = |operation: &str, sub: &str| {
            let change = json!({"operation": operation, "subResource": sub, "resource": policies});
            Review::parse(&question(&change)).unwrap().request.is_about_a_policy()
        };
        assert!(is_one("CREATE", "") && is_one("UPDATE", ""));
        assert!(!is_one("UPDATE", "status") && !is_one("DELETE", ""));
        let clusters = json!({"group": "larder.dev", "version": "v1alpha1", "resource": "cacheclusters"});
        let about_a_cluster = Review::parse(&question(&json!({"operation": "UPDATE", "resource": clusters}))).unwrap().request;
        assert!(about_a_cluster.is_about_a_cluster() && !about_a_cluster.is_about_a_policy());
        assert!(!Review::parse(&question(&json!({}))).unwrap().request.is_about_a_policy());
    }

    #[test]
    fn long_warnings_are_told_in_pieces() {
        let words = "word ".repeat(100);
        let told = bounded(&[words.trim().to_owned(), "short".to_owned()]);
        assert_eq!(told.len(), 3);
        assert!(told.iter().all(|piece| piece.chars().count() <= MAX_WARNING_CHARS));
        assert_eq!(told[..told.len() - 1].join(" "), format!("larder: {}", words.trim()));
        assert_eq!(told.last().map(String::as_str), Some("larder: short"));
    }

    #[test]
    fn answers_have_their_form() {
        let request = Review::parse(&question(&json!({}))).unwrap().request;
        let answer = |outcome: &Outcome| serde_json::to_value(request.answer(outcome)).unwrap()["response"].clone();
        let steps = json_patch::diff(&json!({}), &json!({"b": 2}));
        let long = vec!["x".repeat(1000); 20];
        let patched = answer(&Outcome::Patched { steps, warnings: long });
        assert_eq!(
            (&patched["uid"], &patched["allowed"], &patched["patchType"]),
            (&json!("7"), &json!(true), &json!("JSONPatch"))
        );
        assert_eq!(patched["patch"], "W3sib3AiOiJhZGQiLCJwYXRoIjoiL2IiLCJ2YWx1ZSI6Mn1d");
        let warnings = patched["warnings"].as_array().unwrap();
        assert!(warnings.len() == MAX_WARNINGS && warnings[0].as_str().unwrap().len() == MAX_WARNING_CHARS);
        let unchanged = answer(&Outcome::Unchanged { why: "so", warnings: vec![] });
        assert_eq!(unchanged, json!({"uid": "7", "allowed": true}));
        let refused = answer(&Outcome::Refused { message: "write it".to_owned() });
        assert_eq!(refused["allowed"], false);
        assert_eq!(refused["status"]["message"], "larder: write it");
    }
}
