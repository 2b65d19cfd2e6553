//! What is wrong with an object, and what to do about it.

use std::fmt;

use kube::core::ObjectMeta;

use super::path::FieldPath;

/// An object by kind and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Such as `CachePolicy`.
    pub kind: &'static str,
    /// Its namespace; `default` where it states none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The namespace that an object states; `default` where it states none.
pub fn namespace_of(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or("default")
}

impl ObjectRef {
    /// The object with this metadata.
    pub fn new(kind: &'static str, metadata: &ObjectMeta) -> Self {
        Self { kind, namespace: namespace_of(metadata).to_owned(), name: metadata.name.clone().unwrap_or_default() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Something that keeps an object from being used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {path}: {what}; {remedy}")]
pub struct Problem {
    /// The object.
    pub object: ObjectRef,
    /// Where in it.
    pub path: FieldPath,
    /// What is wrong.
    pub what: String,
    /// What to write instead.
    pub remedy: String,
}

/// One or more problems, shown one a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
