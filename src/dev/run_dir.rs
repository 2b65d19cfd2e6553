//! The directory in which everything of one run lives, for a moment or for longer.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// What the names of temporary directories begin with.
pub const RUN_DIR_PREFIX: &str = "larder-dev-";
/// The longest path of a socket that every system takes.
const MAX_SOCKET_PATH: usize = 100;

/// Where the sidecar of this number is asked by the owner of the run. There is none where the path is too long for a socket.
pub fn admin_socket(run_dir: &Path, sidecar: u16) -> PathBuf {
    run_dir.join(format!("sidecar-{sidecar}.sock"))
}

/// Whether a socket can be at a path.
pub fn fits_socket(path: &Path) -> bool {
    path.as_os_str().len() <= MAX_SOCKET_PATH
}

const PLACES_FILE: &str = "places.json";

/// Where the servers of a run listen, which survives it where the directory does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// What was asked for, such as `Redis Cluster named main of 3 x 2 servers`: data of another form, but for the number of shards, is
    /// not touched.
    pub form: String,
    /// Each process's ports: its own and, for a Cluster node, that of its bus.
    pub ports: BTreeMap<String, (u16, Option<u16>)>,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// It cannot be written.
    #[error("{path}: {source}: name a directory that can be written with --data, or set TMPDIR", path = path.display())]
    Io {
        /// The directory, or a file in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another run uses it.
    #[error("{path} is in use by another `larder dev`: stop that one, or name another directory with --data", path = path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
    },
    /// It holds data of another form.
    #[error(
        "{path} holds the data of a {found}, and the manifest asks for a {wanted}: name another directory with --data, or remove this one",
        path = path.display()
    )]
    OtherForm {
        /// The directory.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What is asked for.
        wanted: String,
    },
}

/// The directory. A temporary one goes with it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    temporary: Option<TempDir>,
    _lock: Option<File>,
}

impl RunDir {
    /// Takes `data`, which stays, or makes a temporary directory.
    pub fn open(data: Option<&Path>) -> Result<Self, RunDirError> {
        match data {
            Some(path) => Self::persistent(path),
            None => {
                let at = std::env::temp_dir();
                let directory = tempfile::Builder::new().prefix(RUN_DIR_PREFIX).tempdir_in(&at);
                let directory = directory.map_err(|source| RunDirError::Io { path: at, source })?;
                Ok(Self { path: directory.path().to_owned(), temporary: Some(directory), _lock: None })
            }
        }
    }

    fn persistent(path: &Path) -> Result<Self, RunDirError> {
        let fail = |source| RunDirError::Io { path: path.to_owned(), source };
        make_dir(path).map_err(fail)?;
        // Servers need a path that does not depend on where they run.
        let path = path.canonicalize().map_err(fail)?;
        let lock = path.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock).map_err(fail)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, temporary: None, _lock: Some(lock) }),
            Err(TryLockError::WouldBlock) => Err(RunDirError::Taken { path }),
            Err(TryLockError::Error(source)) => Err(RunDirError::Io { path, source }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it outlives the run.
    pub fn is_durable(&self) -> bool {
        self.temporary.is_none()
    }

    /// A directory of that name in it, for its owner only.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf, RunDirError> {
        let path = self.path.join(name);
        make_dir(&path).map_err(|source| RunDirError::Io { path: path.clone(), source })?;
        Ok(path)
    }

    /// Where the servers of an earlier run listened; empty at the first.
    pub fn places(&self, form: &str) -> Result<Places, RunDirError> {
        let path = self.path.join(PLACES_FILE);
        let places = match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| RunDirError::Io { path, source: io::Error::other(error) })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Places { form: form.to_owned(), ..Places::default() },
            Err(source) => return Err(RunDirError::Io { path, source }),
        };
        if without_shards(&places.form) == without_shards(form) {
            return Ok(Places { form: form.to_owned(), ..places });
        }
        Err(RunDirError::OtherForm { path: self.path.clone(), found: places.form, wanted: form.to_owned() })
    }

    /// Removes what a server that is no more has left.
    pub fn remove(&self, name: &str) -> Result<(), RunDirError> {
        let path = self.path.join(name);
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RunDirError::Io { path, source }),
            _ => Ok(()),
        }
    }

    /// Remembers where the servers listen.
    pub fn save_places(&self, places: &Places) -> Result<(), RunDirError> {
        let path = self.path.join(PLACES_FILE);
        let text = serde_json::to_vec_pretty(places).map_err(io::Error::other);
        text.and_then(|text| write_private(&path, &text)).map_err(|source| RunDirError::Io { path, source })
    }
}

/// A form such as `Redis Cluster named main of 3 x 2 servers` without the number of its shards, which may change: slots move.
fn without_shards(form: &str) -> Option<(&str, &str)> {
    let (shards, servers) = form.rsplit_once(" x ")?;
    Some((shards.trim_end_matches(|digit: char| digit.is_ascii_digit()), servers))
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that only its owner can read, so that a reader sees the old text or the new one and nothing between.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&staged)?;
    file.write_all(bytes)?;
    fs::rename(&staged, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_stays_with_another_number_of_shards_and_nothing_else() {
        let directory = TempDir::new().unwrap();
        let run_dir = RunDir::open(Some(directory.path())).unwrap();
        let form = |shards: u32, servers: u32| format!("Redis Cluster named main-3 of {shards} x {servers} servers");
        let places = Places { form: form(3, 2), ports: BTreeMap::from([("server-0-0".to_owned(), (7000, None))]) };
        run_dir.save_places(&places).unwrap();
        assert_eq!(run_dir.places(&form(15, 2)).unwrap(), Places { form: form(15, 2), ..places });
        for other in [form(3, 3), form(3, 2).replace("main", "other"), String::new()] {
            assert!(matches!(run_dir.places(&other), Err(RunDirError::OtherForm { .. })), "{other}");
        }
    }
}
