//! The RESP proxy beside a workload.

pub mod access_files;
pub mod commands;
pub mod files;
pub mod resp;
pub mod slots;
pub mod upstream;
