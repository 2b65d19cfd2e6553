//! The main job in a minute: the same load on a slow database without a cache, with plain cache-aside, and with Larder.

pub mod data;
pub mod database;
pub mod keyspace;
pub mod origin;
pub mod truth;
pub mod wire;
