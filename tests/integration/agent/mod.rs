//! `larderd agent`: real servers and sentinels, with faults.

mod cluster;
mod cluster_planned;
mod configuration;
mod handover;
mod places;
mod sentinels;
mod tier;
mod writes;
