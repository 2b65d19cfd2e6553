//! End-to-end tests on a Kubernetes cluster: the chart is installed, caches are made, disturbed and judged by what clients see.
//!
//! `make e2e` builds the images, makes a cluster where KUBECONFIG names none, and runs them, six tests at a time. The matrix is pairwise:
//! of disruption, engine, storage, and whether the operator is restarted in the midst of a change, every two meet.
//!
//! | engine | every disruption | operator restarted in | made and served |
//! |---|---|---|---|
//! | Redis 7.0 | ephemeral | every other change | persistent |
//! | Redis 8.0 | persistent | the same | ephemeral |
//! | Valkey 8.1 | persistent | the other ones | ephemeral |
//! | Valkey 9.1 | ephemeral | the other ones | persistent |
//!
//! There is no smaller one: every engine has to meet every disruption, which is four runs of each, and these are all there are. Two of
//! the four are ephemeral and two persistent, and one of either restarts the operator.
//!
//! With `LARDER_E2E_FULL=1` (`make e2e-full`) every engine meets every disruption with both kinds of storage, with and without the restart.
//! `LARDER_E2E_CASES=a,b` runs the disruptions whose names contain one of the parts.
//!
//! Mode Cluster meets the same in [`clusters`], each disruption with one of two engines or with both: `make e2e E2E_ARGS=clusters_` runs
//! these alone.
//!
//! What concerns policies and sidecars is in [`policies`], [`workloads`] and [`quick_start`], and what concerns databases in [`database_changes`], with
//! [`by_hand`] and [`loads`], and [`write_behind`], with [`write_through`]; `make e2e E2E_ARGS=policies_` runs these alone.
//!
//! Six tests run at a time, since most of each is waiting. What touches whole nodes, or takes the operator away, has them to itself; and the
//! floors that bounds are relative to, those of the bare engine, are taken under the same conditions.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod api;
mod bare;
mod by_hand;
mod cluster;
mod clusters;
mod console;
mod counter;
mod database;
mod database_changes;
mod disruptions;
mod encrypted;
mod faults;
mod install;
mod loads;
mod logs;
mod matrix;
mod nodes;
mod operator;
mod planned;
mod policies;
mod primaries;
mod quick_start;
mod readers;
mod refusals;
mod report;
mod shards;
mod shop;
mod sidecars;
mod tier;
mod trouble;
mod uninstall;
mod workloads;
mod write_behind;
mod write_through;
mod writers;
