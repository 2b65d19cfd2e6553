//! Logs, metrics, health.

pub mod background;
pub mod counter;
pub mod logs;
