//! Bytes that are kept in a file for a while, because they are too many to be held.
//!
//! The file lies in the directory for temporary files (`TMPDIR`) and has no name: it is gone with the process. What all spools of
//! the process take together is bounded. Reading and writing happen on threads that may wait for a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::{JoinError, spawn_blocking};

/// What all spools of the process may take: room for four arguments of the greatest length.
const MOST_SPOOLED_BYTES: u64 = 2 * 1024 * 1024 * 1024;

static SPOOLED_BYTES: AtomicU64 = AtomicU64::new(0);

/// An unnamed temporary file.
#[derive(Debug)]
pub struct Spool {
    file: Arc<File>,
    length: u64,
}

/// Why bytes cannot be kept, or not be found again. The text is that of an error reply, and names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// There is no file.
    #[error(
        "ERR a command whose keys are this far behind its start needs a temporary file, which cannot be made in {}: {source}; \
         set TMPDIR for the sidecar to a directory that it may write to", directory.display()
    )]
    Create {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written or read.
    #[error("ERR the temporary file of a long command failed: {0}; look at the space that is left where TMPDIR points")]
    File(#[from] io::Error),
    /// One command alone would take more.
    #[error("ERR a command whose keys are known only behind {MOST_SPOOLED_BYTES} bytes is too long: send it in parts")]
    TooLong,
    /// Others have taken the room.
    #[error(
        "TRYAGAIN long commands of all clients together take {MOST_SPOOLED_BYTES} bytes of temporary files, the most that they may: \
         the command was not sent, and can safely be repeated"
    )]
    Full,
    /// The process is ending.
    #[error("TRYAGAIN the sidecar is ending: {0}")]
    Ending(#[from] JoinError),
}

impl Spool {
    /// An empty one.
    ///
    /// # Errors
    /// Where no file can be made.
    pub async fn create() -> Result<Self, SpoolError> {
        let file = spawn_blocking(|| {
            let directory = std::env::temp_dir();
            create_unnamed(&directory).map_err(|source| SpoolError::Create { directory, source })
        });
        Ok(Self { file: Arc::new(file.await??), length: 0 })
    }

    /// How many bytes it holds.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// Where there is no room, or the file cannot be written.
    pub async fn append(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let count = bytes.len() as u64;
        let taken = SPOOLED_BYTES.fetch_add(count, Ordering::Relaxed);
        let start = self.length;
        // From here on the room is given back with the spool, also where what follows fails.
        self.length += count;
        if self.length > MOST_SPOOLED_BYTES {
            return Err(SpoolError::TooLong);
        }
        if taken + count > MOST_SPOOLED_BYTES {
            return Err(SpoolError::Full);
        }
        let (file, bytes) = (self.file.clone(), bytes.to_vec());
        Ok(spawn_blocking(move || file.write_all_at(&bytes, start)).await??)
    }

    /// Reads ranges, one after the other. Their sum is the caller's to bound.
    ///
    /// # Errors
    /// Where the file cannot be read, or a range lies behind its end.
    pub async fn read(&self, ranges: Vec<Range<u64>>) -> Result<Vec<u8>, SpoolError> {
        let file = self.file.clone();
        let read = move || {
            let length: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            let mut bytes = vec![0; length as usize];
            let mut rest = &mut bytes[..];
            for range in ranges {
                let (own, others) = rest.split_at_mut((range.end - range.start) as usize);
                file.read_exact_at(own, range.start)?;
                rest = others;
            }
            Ok::<_, io::Error>(bytes)
        };
        Ok(spawn_blocking(read).await??)
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        SPOOLED_BYTES.fetch_sub(self.length, Ordering::Relaxed);
    }
}

/// A file that only this process can reach.
fn create_unnamed(directory: &std::path::Path) -> io::Result<File> {
    let path = directory.join(format!("larder-{}-{:016x}", std::process::id(), fastrand::u64(..)));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_appended_is_read_again_and_leaves_no_name() {
        let mut spool = Spool::create().await.expect("a temporary file");
        spool.append(b"hello ").await.expect("room");
        spool.append(b"world").await.expect("room");
        assert_eq!(spool.len(), 11);
        assert_eq!(spool.read(vec![6..11, 0..2]).await.expect("there"), b"worldhe");
        assert!(spool.read(vec![0..1, 10..12]).await.is_err());
    }

    #[test]
    fn a_directory_that_cannot_be_written_to_is_named() {
        let missing = PathBuf::from("/nonexistent/larder");
        let source = create_unnamed(&missing).expect_err("no such directory");
        let text = SpoolError::Create { directory: missing, source }.to_string();
        assert!(text.contains("/nonexistent/larder") && text.contains("TMPDIR"), "{text}");
    }
}
