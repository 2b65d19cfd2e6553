//! The servers: topology, connections, multiplexing.

pub mod access;
pub mod admin_client;
pub mod ask;
pub mod broken;
pub mod bulk;
pub mod dial;
pub mod discovery;
pub mod disks;
pub mod gather;
pub mod heirs;
pub mod lane;
pub mod mux;
pub mod node;
pub mod open;
pub mod queue;
pub mod redirect;
pub mod router;
pub mod sink;
pub mod view;
