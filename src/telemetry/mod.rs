//! Logs, metrics, health.

pub mod background;
pub mod counter;
pub mod histogram;
pub mod hot_keys;
pub mod logs;
pub mod metrics;
pub mod readings;
pub mod slow_log;
