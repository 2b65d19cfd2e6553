//! The command table: arity, keys, and what each command means for the proxy.
