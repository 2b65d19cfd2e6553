//! `larder`: the control plane, and everything on one machine.

fn main() {}
