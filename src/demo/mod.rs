//! The main job in a minute: a skewed load on a slow database, without and with Larder.
