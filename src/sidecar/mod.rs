//! The RESP proxy beside a workload.
