//! The servers: topology, connections, multiplexing.
