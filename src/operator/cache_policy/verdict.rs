//! Why a policy has no part in a workload's snapshot, and how its status tells so.

use super::origins::UrlError;
use super::slots::SlotTaken;
use crate::api::Problems;
use crate::operator::cache_cluster::report::Verdict;
use crate::policy::snapshot::{MAX_BYTES, MAX_RULES};

/// The types of a CachePolicy's conditions that come of merging.
pub const ACCEPTED: &str = "Accepted";
/// Beside [`ACCEPTED`].
pub const RESOLVED_REFS: &str = "ResolvedRefs";
/// What is told of a policy that is accepted.
const IN_FORCE: &str = "its rules are part of the snapshot of the workloads that it selects";

/// Two rules of two policies that cover one key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the rule `{rule}` ({keys}) and the rule `{winning_rule}` ({winning_keys}) of the CachePolicy `{winner}`, which is older, both cover \
     keys such as `{key}` for {workload}: `{winner}` stays in force; narrow one of the patterns, or bring both rules into one policy"
)]
pub struct Clash {
    /// Whose policies they are.
    pub workload: String,
    /// The rule that has no effect.
    pub rule: String,
    /// Its pattern.
    pub keys: String,
    /// The policy that stays in force.
    pub winner: String,
    /// Its rule.
    pub winning_rule: String,
    /// The pattern of that.
    pub winning_keys: String,
    /// A key that both cover.
    pub key: String,
}

/// Why a policy has no part in a workload's snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It contradicts itself.
    #[error("{}", first_of(.0))]
    Invalid(Problems),
    /// It names another CacheCluster than an earlier policy.
    #[error(
        "{workload} follows the CachePolicy `{winner}`, which is older and names the CacheCluster `{cluster}`, and a workload uses one \
         CacheCluster: name `{cluster}` here too, or select other workloads"
    )]
    TwoClusters {
        /// Whose policies they are.
        workload: String,
        /// The policy that stays in force.
        winner: String,
        /// Its CacheCluster.
        cluster: String,
    },
    /// A key is covered by a rule of an earlier policy as well.
    #[error(transparent)]
    Overlap(Box<Clash>),
    /// It names a slot that an earlier policy has.
    #[error(transparent)]
    SlotTaken(Box<SlotTaken>),
    /// With it the snapshot would be too large.
    #[error(
        "with this policy the snapshot of {workload} would have {bytes} bytes and {rules} rules, more than {MAX_BYTES} bytes or {MAX_RULES} \
         rules: shorten its statements, or bring rules together"
    )]
    TooLarge {
        /// Whose snapshot it is.
        workload: String,
        /// How large it would be.
        bytes: usize,
        /// How many rules it would have.
        rules: usize,
    },
    /// With it the rules of access would be too long.
    #[error(
        "with this policy the patterns of {workload} would be {bytes} bytes of access rules, more than {most}, which servers go through at each \
         command: bring patterns together, such as user:{{id…}}"
    )]
    TooManyKeys {
        /// Whose patterns they are.
        workload: String,
        /// How long they would be.
        bytes: usize,
        /// How long they may be.
        most: usize,
    },
}

/// The first of them, and how many there are more: as much as a person reads in one line.
pub fn first_of(Problems(problems): &Problems) -> String {
    match problems.as_slice() {
        [] => "it is not valid".to_owned(),
        [only] => format!("{}: {}; {}", only.path, only.what, only.remedy),
        [first, others @ ..] => format!("{}: {}; {} (and {} more)", first.path, first.what, first.remedy, others.len()),
    }
}

impl Refusal {
    /// Of one that contradicts itself, in one word.
    pub const INVALID: &str = "InvalidSpec";

    /// In one word.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => Self::INVALID,
            Self::TwoClusters { .. } => "TwoClusters",
            Self::Overlap(_) => "Overlap",
            Self::SlotTaken(_) => "SlotTaken",
            Self::TooLarge { .. } => "TooLarge",
            Self::TooManyKeys { .. } => "TooManyKeys",
        }
    }
}

/// Something that a policy names and that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Its CacheCluster.
    #[error("there is no CacheCluster `{0}` in this namespace: create it, or name another in spec.cacheCluster")]
    CacheCluster(String),
    /// Its CacheCluster has no sentinels to ask yet.
    #[error("the CacheCluster `{0}` is being formed and has no address yet: its own status tells how far it is")]
    Address(String),
    /// A URL of an origin.
    #[error(transparent)]
    Url(#[from] UrlError),
}

impl Missing {
    /// In one word.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::CacheCluster(_) => "CacheClusterNotFound",
            Self::Address(_) => "CacheClusterNotReady",
            Self::Url(error) => error.reason(),
        }
    }
}

/// What came of one policy for one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// The policy's name.
    pub policy: String,
    /// Whether its rules have a part in the snapshot.
    pub accepted: Result<(), Refusal>,
    /// Whether all is there that it names.
    pub resolved: Result<(), Missing>,
    /// Whether its rules go on where something is missing: with the URL that lies ready for sidecars since it was there.
    pub goes_on: bool,
    /// What of it another policy decides, for people.
    pub remarks: Vec<String>,
}

impl Judgement {
    /// The condition [`ACCEPTED`].
    pub fn accepted(&self) -> Verdict {
        match &self.accepted {
            Err(refusal) => Verdict::no(refusal.reason(), refusal.to_string()),
            Ok(()) if self.remarks.is_empty() => Verdict::yes("Accepted", IN_FORCE),
            Ok(()) => Verdict::yes("Accepted", format!("{IN_FORCE}, but {}", self.remarks.join("; "))),
        }
    }

    /// Whether the policy's rules have a part in the snapshot.
    pub fn has_part(&self) -> bool {
        self.accepted.is_ok() && (self.resolved.is_ok() || self.goes_on)
    }

    /// The condition [`RESOLVED_REFS`].
    pub fn resolved_refs(&self) -> Verdict {
        match &self.resolved {
            Err(missing) if self.goes_on => {
                Verdict::no(missing.reason(), format!("{missing}; until then its rules go on with the URL that was there last"))
            }
            Err(missing) => Verdict::no(missing.reason(), format!("{missing}; until then the last good snapshot stays in force")),
            Ok(()) => Verdict::yes("ResolvedRefs", "all that it names is there"),
        }
    }
}
