//! `larder operator` against a real API server that has nothing behind it: etcd and kube-apiserver as plain processes, no controllers and
//! no nodes. [`stage`] plays the StatefulSet controller, the kubelets, and the servers, sentinels and agents in the pods.
//!
//! `make apiserver-tests` builds what is missing and runs them. Each test has an API server of its own, so that what is counted there is
//! its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod admission;
mod at_once;
mod audit;
mod authority;
mod bad_objects;
mod chart;
mod control_plane;
mod drained;
mod encrypted;
mod explained;
mod forming;
mod injected;
mod lease;
mod many;
mod many_policies;
mod odd_policies;
mod operator;
mod person;
mod policies;
mod policy_conditions;
mod process;
mod refusals;
mod rights;
mod scene;
mod stage;
#[path = "../integration/support/mod.rs"]
mod support;
