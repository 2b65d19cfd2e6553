//! The RESP proxy beside a workload.

pub mod commands;
pub mod resp;
pub mod slots;
pub mod upstream;
