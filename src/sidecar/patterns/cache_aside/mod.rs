//! Cache-aside: the application loads and stores; Larder sees to it that one loads and that nothing old is stored.

pub mod scripts;
