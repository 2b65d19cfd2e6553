//! Beside a server, as its entry point: decides the server's place, supervises it, tells of it, keeps its configuration in place, and
//! hands a primary over before it ends.
//!
//! The agent reads one JSON file ([`crate::policy::agent::AgentConfig`]) and the files that it names. It serves what it knows on a
//! port, and what changes something on a Unix socket.

pub mod ballot;
pub mod board;
pub mod boot;
pub mod catch_up;
pub mod charge;
pub mod child;
mod cluster_handover;
pub mod cluster_memory;
pub mod disk;
pub mod endpoints;
pub mod handover;
pub mod info;
pub mod line;
pub mod metrics;
pub mod node_table;
pub mod peers;
pub mod place;
pub mod questions;
pub mod reach;
pub mod run;
pub mod supervisor;
pub mod upkeep;
pub mod users;
pub mod values;
