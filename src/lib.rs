//! Larder: managed cache tiers for Kubernetes, in two planes.
//!
//! | layer | what it is | may use |
//! |---|---|---|
//! | [`policy`] | the vocabulary both planes share: units, patterns, rules, the snapshot | nothing |
//! | [`journal`] | what is written behind: partitions, entries, and the scripts over them; how databases' changes are told. No I/O | `policy` |
//! | [`origin`] | where the data really lives: SQL, HTTP | `policy` |
//! | [`telemetry`] | logs, metrics, health | nothing |
//! | [`sidecar`] | the RESP proxy beside a workload | `policy`, `journal`, `origin`, `telemetry` |
//! | [`agent`] | the entry point of a server: its place, supervision, probes, metrics, handover | `policy`, `telemetry`, `sidecar` |
//! | [`relay`] | what is written behind, on its way from the journal to the origins | `policy`, `journal`, `origin`, `telemetry`, `sidecar` |
//! | `api` | the custom resources, their checks, and their compilation into a snapshot | `policy` |
//! | `operator` | what a CacheCluster needs, as a plan, and what policies make of workloads | `policy`, `journal`, `api` |
//! | `injector` | admission: pods that a policy selects get a sidecar | `policy`, `api`, `operator`, and of `sidecar` the encrypted listener |
//! | `dev` | a second actuator of the plan: real servers as processes on one machine | `policy`, `api`, `operator`, and of `relay` the desk |
//! | `demo` | the main job in a minute | all but `cli` |
//! | [`cli`] | one file per command: arguments → validated configuration | all |
//!
//! The data plane (`policy`, `journal`, `origin`, `telemetry`, `sidecar`, `agent`, `relay`) never names the control plane (`api`,
//! `operator`, `injector`, `dev`, `demo`) and builds without it; a tidy test holds the arrows.

pub mod agent;
#[cfg(feature = "control-plane")]
pub mod api;
pub mod cli;
#[cfg(feature = "control-plane")]
pub mod demo;
#[cfg(feature = "control-plane")]
pub mod dev;
#[cfg(feature = "control-plane")]
pub mod injector;
pub mod journal;
#[cfg(feature = "control-plane")]
pub mod operator;
pub mod origin;
pub mod policy;
pub mod relay;
pub mod sidecar;
pub mod telemetry;
