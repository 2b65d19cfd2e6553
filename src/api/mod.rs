//! The custom resources, their checks, and their compilation into a snapshot.
