//! Files that appear at once and whole, and the two things that need them: this program in another container's volume, and a
//! sentinel's configuration.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tracing::{info, warn};

use crate::policy::config_file::{self, SentinelLogin};

/// The largest file that is read: a sentinel's memory, a template, users.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Why a file could not be read or put in its place.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct PlaceError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl PlaceError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        |source| Self { path, source }
    }
}

/// Copies this program to `destination`, executable by everyone. What is there is replaced, also while it runs.
pub fn install(destination: &Path) -> Result<(), PlaceError> {
    let own = std::env::current_exe().map_err(PlaceError::at(Path::new("this program")))?;
    let mut source = File::open(&own).map_err(PlaceError::at(&own))?;
    put(destination, 0o755, |file| io::copy(&mut source, file).map(drop)).map_err(PlaceError::at(destination))
}

/// Replaces a file that its owner alone reads by one with these bytes.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    put(path, 0o600, |file| file.write_all(bytes))
}

/// Writes a file beside `path`, then gives it its name.
fn put(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut name = path.file_name().ok_or_else(|| io::Error::other("it is no path of a file"))?.to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    // What an interrupted attempt left has its own mode.
    if let Err(error) = fs::remove_file(&fresh)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
    fill(&mut file)?;
    // The process' mask may have taken some of it away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    drop(file);
    fs::rename(fresh, path)
}

/// What a sentinel's configuration is made from.
#[derive(Debug)]
pub struct SentinelFiles {
    /// What Larder says: addresses, and the sentinel's identity.
    pub template: PathBuf,
    /// Lines of users, if it is to have any.
    pub users: Option<PathBuf>,
    /// The user and the password with which it logs in at servers and other sentinels.
    pub login: Option<(PathBuf, PathBuf)>,
    /// The sentinel's own file, where its memory is. It need not be there.
    pub file: PathBuf,
}

impl SentinelFiles {
    /// Writes the sentinel's file anew, with the memory that it holds: what it says now.
    pub fn compose(&self) -> Result<String, PlaceError> {
        let mut own = read(&self.template)?;
        if let Some(users) = &self.users {
            if !own.ends_with('\n') {
                own.push('\n');
            }
            own.push_str(&read(users)?);
        }
        let login = match &self.login {
            Some((user, password)) => Some((read(user)?, read(password)?)),
            None => None,
        };
        let login = login.as_ref().map(|(user, password)| SentinelLogin {
            user: user.trim_end_matches(['\r', '\n']),
            password: password.trim_end_matches(['\r', '\n']),
        });
        let previous = self.previous()?;
        info!(remembers = !previous.is_empty(), file = %self.file.display(), "the sentinel's configuration is written");
        let text = config_file::sentinel(&own, login, &previous);
        replace(&self.file, text.as_bytes()).map_err(PlaceError::at(&self.file))?;
        Ok(text)
    }

    /// The sentinel's memory. One that is no text is as good as none: the other sentinels tell it everything again.
    fn previous(&self) -> Result<String, PlaceError> {
        match read(&self.file) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) if error.source.kind() == io::ErrorKind::InvalidData => {
                warn!(%error, "the sentinel's memory cannot be read: it begins without");
                Ok(String::new())
            }
            read => read,
        }
    }
}

fn read(path: &Path) -> Result<String, PlaceError> {
    let length = fs::metadata(path).map_err(PlaceError::at(path))?.len();
    if length > MAX_FILE_BYTES {
        let source = io::Error::new(io::ErrorKind::InvalidData, format!("it has {length} bytes, more than {MAX_FILE_BYTES}"));
        return Err(PlaceError::at(path)(source));
    }
    fs::read_to_string(path).map_err(PlaceError::at(path))
}

/// Turns this process into the sentinel. Returns only where that fails.
pub fn become_sentinel(program: &Path, arguments: &[String], file: &Path) -> io::Error {
    Command::new(program).arg(file).arg("--sentinel").args(arguments).exec()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn files_are_replaced_at_once_with_their_mode() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("file");
        fs::write(dir.path().join("file.new"), "left behind").unwrap();
        for content in ["one", "two"] {
            put(&path, 0o600, |file| file.write_all(content.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let failed = put(&path, 0o600, |_| Err(io::Error::other("no space")));
        assert!(failed.is_err() && fs::read_to_string(&path).unwrap() == "two");
    }

    #[test]
    fn a_sentinel_keeps_its_memory_and_gets_everything_else_anew() {
        let dir = TempDir::new().unwrap();
        let write = |name: &str, text: &[u8]| {
            fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let files = SentinelFiles {
            template: write("template", b"port 26379\nsentinel myid abc"),
            users: Some(write("users", b"user default off\n")),
            login: Some((write("username", b"system\n"), write("password", b"secret"))),
            file: dir.path().join("sentinel.conf"),
        };
        let composed = |files: &SentinelFiles| {
            files.compose().unwrap();
            fs::read_to_string(&files.file).unwrap()
        };
        let own =
            "port 26379\nsentinel myid abc\nuser default off\nsentinel sentinel-user system\nsentinel sentinel-pass secret\n";
        assert_eq!(composed(&files), own);
        write(
            "sentinel.conf",
            b"port 1\nsentinel myid xyz\nsentinel monitor shop 10.0.0.1 6379 2\nsentinel auth-pass shop old\n",
        );
        let monitor = "sentinel monitor shop 10.0.0.1 6379 2\nsentinel auth-user shop system\nsentinel auth-pass shop secret\n";
        assert_eq!(composed(&files), format!("{own}{monitor}"));
        write("sentinel.conf", &[0xff, 0xfe, 0]);
        assert_eq!(composed(&files), own);
        fs::remove_file(&files.template).unwrap();
        assert!(files.compose().unwrap_err().to_string().contains("template"));
    }
}
