//! `larderd agent`: real servers and sentinels, with faults.

mod configuration;
mod handover;
mod places;
mod tier;
mod writes;
