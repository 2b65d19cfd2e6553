//! `larderd`: the data plane.

fn main() {}
