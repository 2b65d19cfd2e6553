//! Which `larder dev` of this machine is meant.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{Failure, WRONG_LINE};
use crate::dev;

/// The directory of a run: the one that is named, or that of the only one that runs without a directory of its own.
///
/// # Errors
/// None runs, or several do. `otherwise` is what a person may name instead.
pub fn run_dir(named: Option<&Path>, otherwise: &str) -> Result<PathBuf, Failure> {
    if let Some(directory) = named {
        return Ok(directory.to_owned());
    }
    let running = running(&std::env::temp_dir());
    match running.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(failure("no `larder dev` runs here", format!("start one, name its --data with --run-dir, or {otherwise}"))),
        several => {
            let names: Vec<String> = several.iter().map(|directory| directory.display().to_string()).collect();
            let next = format!("name one of them with --run-dir: {}", names.join(", "));
            Err(failure(format!("{} `larder dev` run here", several.len()), next))
        }
    }
}

/// The directories of runs whose first sidecar listens.
fn running(temporary: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(temporary).into_iter().flatten().flatten();
    let runs = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(dev::RUN_DIR_PREFIX));
    runs.map(|entry| entry.path()).filter(|directory| UnixStream::connect(dev::admin_socket(directory, 0)).is_ok()).collect()
}

fn failure(what: impl std::fmt::Display, next: impl std::fmt::Display) -> Failure {
    Failure::new(what, next).with_code(WRONG_LINE)
}
