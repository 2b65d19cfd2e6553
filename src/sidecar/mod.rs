//! The RESP proxy beside a workload.

pub mod access_files;
pub mod admin;
pub mod commands;
pub mod delivery;
pub mod dispatch;
pub mod engine;
pub mod events;
pub mod exclusive;
pub mod files;
pub mod lapses;
pub mod meter;
pub mod patterns;
pub mod policy;
pub mod pulse;
pub mod reload;
pub mod resp;
pub mod roster;
pub mod served_tls;
pub mod server;
pub mod session;
pub mod signals;
pub mod start_gate;
pub mod sweep;
pub mod tracking;
pub mod upstream;
pub mod versions;
pub mod waiting_room;
pub mod worker;

pub use crate::policy::slots;
