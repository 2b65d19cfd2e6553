//! What can go wrong with an origin. No text here holds a password, a URL or a part of a key.

use std::path::PathBuf;
use std::time::Duration;

use crate::policy::Span;

/// Why an origin or a rule's question to it was refused. The text names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    /// A rule names an origin that the snapshot does not have.
    #[error("origin `{0}` does not exist: name one of the policy's origins")]
    Unknown(String),
    /// A rule asks an SQL origin for a path, or an HTTP origin with a statement.
    #[error("origin `{0}` is asked in the wrong terms: an sql origin by `read`, an http origin by `path`")]
    WrongTerms(String),
    /// The URL cannot be used.
    #[error("origin `{origin}` has an unusable url: {why}")]
    Url {
        /// The origin's name.
        origin: String,
        /// What is wrong with it and what to write instead; never the URL itself.
        why: String,
    },
    /// The URL stands in a file, and cannot be used.
    #[error("origin `{origin}` has no usable url in the file {}: {why}", path.display())]
    Secret {
        /// The origin's name.
        origin: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never what it says.
        why: String,
    },
    /// A statement or a path is malformed or contradicts the rule's pattern.
    #[error("{place}: {why}")]
    Template {
        /// `read`, `readMany`, `write`, `delete` or `path`.
        place: &'static str,
        /// What is wrong and what to write instead.
        why: String,
    },
}

/// Why a load gave neither a value nor the certainty that there is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The circuit breaker is open: the origin failed repeatedly and was not asked.
    #[error("origin `{origin}` failed repeatedly and is not asked for another {retry_in}")]
    Refused {
        /// The origin's name.
        origin: String,
        /// When asking again may succeed.
        retry_in: Span,
    },
    /// All connections are busy and the queue is full, or none came free in time.
    #[error("origin `{origin}` is busy: raise its maxConnections, or load less")]
    Busy {
        /// The origin's name.
        origin: String,
    },
    /// The origin did not answer in time.
    #[error("origin `{origin}` gave no answer within {within}")]
    Timeout {
        /// The origin's name.
        origin: String,
        /// The origin's timeout.
        within: Span,
    },
    /// No connection came about, or it broke.
    #[error("origin `{origin}` cannot be reached: {why}")]
    Unreachable {
        /// The origin's name.
        origin: String,
        /// What the network, TLS or the log-in said.
        why: String,
    },
    /// The origin answered that it failed.
    #[error("origin `{origin}` failed: {why}")]
    Failed {
        /// The origin's name.
        origin: String,
        /// The status or the SQLSTATE.
        why: String,
    },
    /// The question or its answer does not fit the rule; asking again does not help.
    #[error("origin `{origin}` cannot serve this rule: {why}")]
    Unusable {
        /// The origin's name.
        origin: String,
        /// What does not fit and what to write instead.
        why: String,
    },
    /// Of a write alone: the origin will not have it, and nothing has changed.
    #[error("origin `{origin}` refused the write: {why}")]
    Rejected {
        /// The origin's name.
        origin: String,
        /// The origin's own words.
        why: String,
    },
    /// Of a write alone: it is not known whether it was made.
    #[error("origin `{origin}` may have made the write or not: {why}")]
    Unknown {
        /// The origin's name.
        origin: String,
        /// What happened.
        why: String,
    },
}

impl LoadError {
    /// A short fixed word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "refused",
            Self::Busy { .. } => "busy",
            Self::Timeout { .. } => "timeout",
            Self::Unreachable { .. } => "unreachable",
            Self::Failed { .. } => "failed",
            Self::Unusable { .. } => "unusable",
            Self::Rejected { .. } => "rejected",
            Self::Unknown { .. } => "unknown",
        }
    }
}

/// How one attempt failed, before the origin's name is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// No answer before the deadline.
    Timeout,
    /// The connection did not come about or broke: worth another attempt.
    Unreachable(String),
    /// The origin is in trouble.
    Failed { why: String, retry: bool, retry_after: Option<Duration> },
    /// The origin is well, and the question or the answer is wrong.
    Unusable(String),
    /// The origin is well, and will not have the write.
    Rejected(String),
    /// The write may have been made.
    Unknown { why: String, retry: bool },
}

impl Failure {
    pub(super) fn is_retriable(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Failed { retry: true, .. } | Self::Unknown { retry: true, .. })
    }

    /// Whether it speaks against the origin's health.
    pub(super) fn is_trouble(&self) -> bool {
        !matches!(self, Self::Unusable(_) | Self::Rejected(_))
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Failed { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(super) fn named(self, origin: &str, within: Span) -> LoadError {
        let origin = origin.to_owned();
        match self {
            Self::Timeout => LoadError::Timeout { origin, within },
            Self::Unreachable(why) => LoadError::Unreachable { origin, why },
            Self::Failed { why, .. } => LoadError::Failed { origin, why },
            Self::Unusable(why) => LoadError::Unusable { origin, why },
            Self::Rejected(why) => LoadError::Rejected { origin, why },
            Self::Unknown { why, .. } => LoadError::Unknown { origin, why },
        }
    }
}
