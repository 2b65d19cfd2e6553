//! Where the data really lives.
