//! CachePolicies: what the operator makes of them for each workload.
//!
//! A workload that policies select has a [binding](crate::policy::binding) with the CacheCluster that they name. [`merge`] makes one
//! snapshot of the policies, or says of each why it has no part in it; [`place`] and [`origins`] know where a sidecar finds what the
//! snapshot names; [`slots`] knows which name a slot that another has, [`user`] is what its login can do, [`passwords`] how it logs in; [`objects`] is what lies in the workload's namespace; [`delivery`] decides what of
//! it is to be in force, and [`report`] what is told. All of that is pure. [`look`] carries it out for one namespace: it reads what there is
//! ([`fetch`], [`parts`]), merges what changed ([`judged`]), writes ([`apply`]), and tells ([`tell`]). [`ties`] are what it and the looks at CacheClusters tell each other.

pub mod apply;
pub mod cache;
pub mod delivery;
pub mod fetch;
pub mod judged;
pub mod look;
pub mod merge;
pub mod objects;
pub mod origins;
pub mod parts;
pub mod passwords;
pub mod place;
pub mod relay;
pub mod report;
pub mod slots;
pub mod tell;
pub mod ties;
mod unreadable;
pub mod user;
pub mod verdict;
pub mod workload;
