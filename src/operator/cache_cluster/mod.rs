//! One CacheCluster: what is seen of it, and what to do next.
//!
//! The pure middle ([`plan`]) takes no client, so that one planner serves both actuators: processes on one machine, and Kubernetes.
//! There, [`validate`] turns the resource into what is wanted, and [`objects`] that into Kubernetes' own objects.

pub mod act;
pub mod apply;
pub mod build;
pub mod certify;
pub mod client_login;
pub mod cluster_handover;
#[cfg(test)]
mod cluster_look_tests;
pub mod cluster_steps;
pub mod fetch;
pub mod handover;
pub mod judge;
pub mod links;
#[cfg(test)]
mod look_tests;
pub mod monitor;
pub mod move_slots;
pub mod names;
pub mod nodes;
pub mod objects;
pub mod observe;
pub mod parts;
pub mod pki;
pub mod plan;
pub mod reconcile;
pub mod report;
pub mod resharding;
mod slot_migrations;
pub mod spin;
mod told;
pub mod troubles;
pub mod users;
pub mod validate;
pub mod written;
