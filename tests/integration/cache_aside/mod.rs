//! Cache-aside through real sidecars and servers.

mod scripts;
