//! Watches files that others replace: the snapshot, passwords, certificates.
//!
//! By looking, not by notification: Kubernetes swaps a symbolic link above the files, network file systems notify nobody, and a
//! look costs a few microseconds. A set of files is read as one: what is published are contents that stood still, all of them,
//! for a moment, so that a certificate never meets the key of another.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tracing::warn;

/// How often the files are looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long they must have stood still before they count.
const SETTLE: Duration = Duration::from_millis(50);
/// File times are coarse: a file that changed less than this before it was read may have changed again without a trace.
const DOUBTFUL: Duration = Duration::from_secs(2);
/// How often a lasting failure is logged, in looks.
const WARN_EVERY: u32 = 150;

/// Why files cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// One is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// One is over the limit.
    #[error("{}: the file has more than {limit} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The limit in bytes.
        limit: usize,
    },
    /// They are being written.
    #[error("{}: the file changes while it is read", path.display())]
    Restless {
        /// Which.
        path: PathBuf,
    },
}

/// What a set of files holds, in the order of their paths.
pub type Contents = Arc<[Arc<[u8]>]>;

/// One set of files, read together. Dropping it and its receivers ends the watching.
#[derive(Debug)]
pub struct WatchedFiles {
    contents: watch::Receiver<Contents>,
}

impl WatchedFiles {
    /// Reads the files, each at most `limit` bytes long, and watches them on the current tokio runtime. A file that goes missing or
    /// grows too large later leaves the last contents in place, and a line in the log.
    pub async fn open(paths: Vec<PathBuf>, limit: usize) -> Result<Self, FileError> {
        let paths: Arc<[PathBuf]> = paths.into();
        let first = read_settled(&paths, limit).await?;
        let (sender, contents) = watch::channel(first.contents.clone());
        tokio::spawn(watch_on(paths, limit, first, sender));
        Ok(Self { contents })
    }

    /// What the files hold now.
    pub fn current(&self) -> Contents {
        self.contents.borrow().clone()
    }

    /// Waits for contents other than those that were last waited for. Cancel-safe.
    pub async fn changed(&mut self) -> Contents {
        if self.contents.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.contents.borrow_and_update().clone()
    }
}

/// What tells one state of a file from another. Of the file that a path leads to, whatever links are between.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, FileError> {
        let metadata = fs::metadata(path).map_err(|source| FileError::Io { path: path.to_owned(), source })?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    fn all(paths: &[PathBuf]) -> Result<Vec<Self>, FileError> {
        paths.iter().map(|path| Self::of(path)).collect()
    }

    /// Whether the file may have changed after the stamp was taken without changing the stamp.
    fn is_doubtful(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::new(self.changed.0.max(0).cast_unsigned(), self.changed.1.clamp(0, 999_999_999) as u32);
        now.saturating_sub(changed) < DOUBTFUL
    }
}

/// Contents and what they were read from.
#[derive(Debug, Clone)]
struct Reading {
    contents: Contents,
    stamps: Vec<Stamp>,
    doubtful: bool,
}

async fn watch_on(paths: Arc<[PathBuf]>, limit: usize, mut last: Reading, sender: watch::Sender<Contents>) {
    let mut looks_failed = 0u32;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = sender.closed() => return,
        }
        match look(&paths, limit, &last).await {
            Ok(None) => looks_failed = 0,
            Ok(Some(reading)) => {
                looks_failed = 0;
                last = reading;
                sender.send_if_modified(|current| {
                    let is_news = *current != last.contents;
                    if is_news {
                        *current = last.contents.clone();
                    }
                    is_news
                });
            }
            Err(error) => {
                // Files that are being replaced are missing or restless for a moment: only what lasts is worth a line.
                if looks_failed % WARN_EVERY == 5 {
                    warn!(%error, "a watched file cannot be read; its last contents stay in use");
                }
                looks_failed = looks_failed.wrapping_add(1);
            }
        }
    }
}

/// A new reading, where the files may hold something else than the last one.
async fn look(paths: &Arc<[PathBuf]>, limit: usize, last: &Reading) -> Result<Option<Reading>, FileError> {
    let (at, stamps) = (paths.clone(), last.stamps.clone());
    let same = blocking(move || Ok(Stamp::all(&at)? == stamps)).await?;
    if same && !last.doubtful { Ok(None) } else { read_settled(paths, limit).await.map(Some) }
}

/// Reads the files twice if need be: what is returned had the same stamps before, and a moment after.
async fn read_settled(paths: &Arc<[PathBuf]>, limit: usize) -> Result<Reading, FileError> {
    let at = paths.clone();
    let reading = blocking(move || read_all(&at, limit)).await?;
    if !reading.doubtful {
        return Ok(reading);
    }
    tokio::time::sleep(SETTLE).await;
    let at = paths.clone();
    let again = blocking(move || read_all(&at, limit)).await?;
    settled(paths, &reading, again)
}

/// The second of two readings, where both are the same.
fn settled(paths: &[PathBuf], first: &Reading, second: Reading) -> Result<Reading, FileError> {
    let differs =
        |index: &usize| first.stamps[*index] != second.stamps[*index] || first.contents[*index] != second.contents[*index];
    match (0..paths.len()).find(differs) {
        None => Ok(second),
        Some(index) => Err(FileError::Restless { path: paths[index].clone() }),
    }
}

fn read_all(paths: &[PathBuf], limit: usize) -> Result<Reading, FileError> {
    let stamps = Stamp::all(paths)?;
    let contents: Vec<Arc<[u8]>> = paths.iter().map(|path| read_one(path, limit)).collect::<Result<_, _>>()?;
    let after = Stamp::all(paths)?;
    if let Some(index) = (0..paths.len()).find(|index| stamps[*index] != after[*index]) {
        return Err(FileError::Restless { path: paths[index].clone() });
    }
    let doubtful = stamps.iter().any(Stamp::is_doubtful);
    Ok(Reading { contents: contents.into(), stamps, doubtful })
}

fn read_one(path: &Path, limit: usize) -> Result<Arc<[u8]>, FileError> {
    let failed = |source| FileError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit { Err(FileError::TooLarge { path: path.to_owned(), limit }) } else { Ok(bytes.into()) }
}

/// Runs file work where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, FileError> + Send + 'static) -> Result<T, FileError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(FileError::Io { path: PathBuf::new(), source: io::Error::other(error) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;
    use tokio::time::timeout;

    const LIMIT: usize = 100;
    const LONG: Duration = Duration::from_secs(20);

    async fn open(paths: &[PathBuf]) -> WatchedFiles {
        let deadline = tokio::time::Instant::now() + LONG;
        loop {
            match WatchedFiles::open(paths.to_vec(), LIMIT).await {
                Ok(files) => return files,
                Err(FileError::Restless { .. }) if tokio::time::Instant::now() < deadline => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn texts(contents: &Contents) -> Vec<&str> {
        contents.iter().map(|bytes| std::str::from_utf8(bytes).unwrap()).collect()
    }

    #[tokio::test]
    async fn a_swapped_link_changes_all_files_at_once() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("cert"), format!("cert {version}")).unwrap();
            fs::write(at(version).join("key"), format!("key {version}")).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/cert", at("cert")).unwrap();
        symlink("..data/key", at("key")).unwrap();
        let mut files = open(&[at("cert"), at("key")]).await;
        assert_eq!(texts(&files.current()), ["cert 1", "key 1"]);
        symlink("2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        let changed = timeout(LONG, files.changed()).await.expect("the change is seen");
        assert_eq!(texts(&changed), ["cert 2", "key 2"]);
    }

    #[tokio::test]
    async fn missing_and_oversized_files_leave_the_last_contents() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("password");
        assert!(matches!(WatchedFiles::open(vec![path.clone()], LIMIT).await, Err(FileError::Io { .. })));
        fs::write(&path, vec![b'x'; LIMIT + 1]).unwrap();
        assert!(matches!(WatchedFiles::open(vec![path.clone()], LIMIT).await, Err(FileError::TooLarge { .. })));
        fs::write(&path, "one").unwrap();
        let mut files = open(std::slice::from_ref(&path)).await;
        fs::remove_file(&path).unwrap();
        tokio::time::sleep(2 * LOOK_EVERY).await;
        fs::write(&path, vec![b'x'; LIMIT + 1]).unwrap();
        tokio::time::sleep(2 * LOOK_EVERY).await;
        assert_eq!(texts(&files.current()), ["one"]);
        fs::write(&path, "two").unwrap();
        assert_eq!(texts(&timeout(LONG, files.changed()).await.expect("the change is seen")), ["two"]);
    }

    /// What a second takes on a busy machine: so much sleep, with reads in between, as the watching needs them.
    async fn a_second_with_reads(paths: Arc<[PathBuf]>) {
        for _ in 0..4 {
            for pause in [Duration::from_millis(200), Duration::from_millis(50)] {
                tokio::time::sleep(pause).await;
                let at = paths.clone();
                blocking(move || read_all(&at, LIMIT)).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_change_is_seen_within_a_second() {
        let dir = TempDir::new().unwrap();
        let [path, next] = ["snapshot", "next"].map(|name| dir.path().join(name));
        fs::write(&path, "0").unwrap();
        let mut files = open(std::slice::from_ref(&path)).await;
        for round in 1..=5 {
            fs::write(&next, round.to_string()).unwrap();
            fs::rename(&next, &path).unwrap();
            let second = tokio::spawn(a_second_with_reads([path.clone()].into()));
            tokio::select! {
                biased;
                contents = files.changed() => assert_eq!(texts(&contents), [round.to_string()]),
                _ = second => panic!("the change was not seen"),
            }
        }
    }

    #[test]
    fn a_file_that_changes_between_two_looks_has_not_settled() {
        let dir = TempDir::new().unwrap();
        let paths = [dir.path().join("a"), dir.path().join("b")];
        let write = |at: usize, text: &str| fs::write(&paths[at], text).unwrap();
        let read = || read_all(&paths, LIMIT).unwrap();
        write(0, "a");
        write(1, "");
        let first = read();
        assert!(first.doubtful);
        assert!(settled(&paths, &first, read()).is_ok());
        write(1, "half");
        let half = read();
        assert!(settled(&paths, &first, half.clone()).is_err());
        // Even where the coarse time and the length stay the same.
        write(1, "HALF");
        let mut other = read();
        other.stamps = half.stamps.clone();
        assert!(settled(&paths, &half, other).is_err());
    }

    #[tokio::test]
    async fn the_watching_ends_with_its_owner() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "a").unwrap();
        let files = open(std::slice::from_ref(&path)).await;
        let metrics = tokio::runtime::Handle::current().metrics();
        assert_eq!(metrics.num_alive_tasks(), 1);
        drop(files);
        let ended = async {
            while metrics.num_alive_tasks() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, ended).await.expect("the task ends");
    }
}
