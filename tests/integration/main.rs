//! Integration tests: real servers, real clients, real processes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod check;
mod discovery;
mod support;
mod tidy;
