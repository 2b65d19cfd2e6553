//! One file per command: arguments become a validated configuration.
