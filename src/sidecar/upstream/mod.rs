//! The servers: topology, connections, multiplexing.

pub mod access;
pub mod admin_client;
pub mod dial;
pub mod discovery;
pub mod node;
pub mod redirect;
pub mod view;
