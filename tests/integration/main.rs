//! Integration tests: real servers, real clients, real processes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod cache_aside;
mod check;
mod clients;
mod command_table;
mod conformance;
mod demo;
mod dev_lifecycle;
mod dev_topologies;
mod discovery;
mod examples;
mod exclusive_blocking;
mod exclusive_streams;
mod exclusive_subscriptions;
mod exclusive_transactions;
mod failover;
mod health;
mod large_replies;
mod local_commands;
mod origin_column_types;
mod origin_http;
mod origin_postgres;
mod origin_postgres_tls;
mod origin_query_log;
mod origin_sqlite;
mod read_through;
mod readme;
mod secured;
mod sidecar_process;
mod sidecar_start;
mod support;
mod tidy;
mod ttl;
mod ttl_sweep;
mod wire;
mod wire_fuzz;
