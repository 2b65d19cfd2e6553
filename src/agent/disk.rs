//! The server's data on the disk, and the agent's own record of how far it reaches.
//!
//! Replication ids and offsets are not in an append-only file, so the agent writes down what it sees: at each look while the server
//! runs, and only where the server has written everything. What a record claims is at least there. A server that is killed may have
//! acknowledged more than it wrote, even where its machine lives: with `appendfsync everysec` it delays writes while the disk is
//! slow. Only a clean end, or `appendfsync always`, excludes that.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::info::{Info, Role};
use crate::policy::agent::{DataState, Position};

const RECORD: &str = "larder-agent.json";
/// There as long as the server has owned nothing and followed nobody since it began without data.
const BLANK: &str = "larder-agent-blank";
const AOF_DIRECTORY: &str = "appendonlydir";
/// The longest record that is read.
const MAX_RECORD_BYTES: u64 = 4096;

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    version: u32,
    lineage: String,
    offset: u64,
    led: bool,
    complete: bool,
    /// Whether every change is on the disk before it is acknowledged.
    always: bool,
    /// Whether the server ended by itself after this, with everything flushed.
    clean: bool,
}

/// A data directory.
#[derive(Debug)]
pub struct Disk {
    directory: PathBuf,
    durable: bool,
    last: Option<Record>,
    /// Whether the disk holds what memory holds: since the start for who started with it, else since a copy was written whole.
    settled: bool,
    /// Whether [`BLANK`] is there.
    blank: bool,
}

impl Disk {
    /// The directory of a server whose data survives its process, or does not.
    pub fn new(directory: &Path, durable: bool) -> Self {
        Self { directory: directory.to_owned(), durable, last: None, settled: false, blank: false }
    }

    /// What the server would start with. Of data that is not to survive, what was left behind is removed; so is what a node of a Cluster
    /// left that never held any: `owns_nothing` says that its table of nodes knows neither slots nor a primary.
    pub fn inspect(&mut self, owns_nothing: bool) -> io::Result<DataState> {
        self.settled = false;
        self.blank = self.directory.join(BLANK).exists();
        if !self.durable || (self.blank && owns_nothing) {
            self.last = None;
            self.forget()?;
            return Ok(DataState::Empty);
        }
        if !self.holds_files()? {
            self.last = None;
            return Ok(DataState::Empty);
        }
        self.last = self.read_record();
        Ok(match &self.last {
            Some(record) if record.complete => DataState::Complete(Position {
                lineage: record.lineage.clone(),
                offset: record.offset,
                led: record.led,
                exact: record.clean || record.always,
            }),
            _ => DataState::Partial,
        })
    }

    /// The server is about to start as primary with what is there.
    pub fn begins_as_primary(&mut self) {
        self.settled = true;
        let first =
            Record { version: 1, lineage: String::new(), offset: 0, led: true, complete: true, always: false, clean: false };
        let record = self.last.clone().unwrap_or(first);
        self.write(Record { clean: false, always: false, ..record }, false);
    }

    /// The server is about to start without data as a node of a Cluster that owns nothing.
    pub fn begins_blank(&mut self) -> io::Result<()> {
        self.last = None;
        if self.durable && !self.blank {
            fs::create_dir_all(&self.directory)?;
            fs::File::create(self.directory.join(BLANK))?.sync_all()?;
            self.blank = true;
        }
        Ok(())
    }

    /// The server is about to start as a replica.
    pub fn begins_as_replica(&mut self) {
        if let Some(record) = self.last.clone() {
            self.write(Record { clean: false, always: false, ..record }, false);
        }
    }

    /// What a running server holds, by what it tells; written down where it is on the disk. `always`: by `appendfsync always`.
    pub fn observe(&mut self, info: &Info, always: bool) -> DataState {
        let Some(role) = info.role().filter(|_| !info.is_loading()) else { return DataState::Partial };
        if self.blank {
            match fs::remove_file(self.directory.join(BLANK)) {
                Ok(()) => self.blank = false,
                Err(error) => warn!(%error, "the mark of an empty server cannot be removed"),
            }
        }
        match &role {
            Role::Replica { syncing: true, .. } => self.settled = false,
            Role::Primary | Role::Replica { link_up: true, .. } => self.settled |= info.is_on_disk(),
            Role::Replica { .. } => {}
        }
        let led = role == Role::Primary;
        let position =
            Position { lineage: info.lineage().unwrap_or_default().to_owned(), offset: info.offset(), led, exact: true };
        if self.durable && self.settled && (always || info.is_on_disk()) {
            let Position { lineage, offset, .. } = position.clone();
            self.write(Record { version: 1, lineage, offset, led, complete: true, always, clean: false }, false);
        }
        if !self.durable && !info.holds_keys() { DataState::Empty } else { DataState::Complete(position) }
    }

    /// The server ended by itself and has flushed everything.
    pub fn ended_cleanly(&mut self) {
        if let Some(record) = self.last.clone().filter(|_| self.settled) {
            self.write(Record { clean: true, ..record }, true);
        }
    }

    fn record_path(&self) -> PathBuf {
        self.directory.join(RECORD)
    }

    fn read_record(&self) -> Option<Record> {
        let path = self.record_path();
        let length = fs::metadata(&path).ok()?.len();
        if length > MAX_RECORD_BYTES {
            return None;
        }
        let record: Record = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        (record.version == 1).then_some(record)
    }

    /// Replaces the record where it says something new.
    fn write(&mut self, record: Record, sync: bool) {
        if !self.durable || (self.last.as_ref() == Some(&record) && !sync) {
            return;
        }
        match self.try_write(&record, sync) {
            Ok(()) => self.last = Some(record),
            Err(error) => warn!(%error, "the record of the data cannot be written; a restart may hold the server"),
        }
    }

    fn try_write(&self, record: &Record, sync: bool) -> io::Result<()> {
        let fresh = self.directory.join(format!("{RECORD}.new"));
        let mut file = fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        if sync {
            file.sync_all()?;
        }
        fs::rename(fresh, self.record_path())
    }

    fn holds_files(&self) -> io::Result<bool> {
        for entry in self.entries()? {
            let entry = entry?;
            let holds = if entry.file_name() == AOF_DIRECTORY {
                fs::read_dir(entry.path())?.next().is_some()
            } else {
                is_data_file(&entry.path()) && entry.metadata()?.len() > 0
            };
            if holds {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn entries(&self) -> io::Result<fs::ReadDir> {
        fs::create_dir_all(&self.directory)?;
        fs::read_dir(&self.directory)
    }

    /// Removes what a process left whose data is not to survive it: an old copy must never pass for the newest.
    fn forget(&self) -> io::Result<()> {
        for entry in self.entries()? {
            let path = entry?.path();
            if path.ends_with(RECORD) {
                fs::remove_file(path)?;
            } else if path.ends_with(AOF_DIRECTORY) {
                info!(path = %path.display(), "removing what an earlier process left");
                fs::remove_dir_all(path)?;
            } else if is_data_file(&path) {
                info!(path = %path.display(), "removing what an earlier process left");
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

fn is_data_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rdb" || extension == "aof")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const RUNNING: &str = "role:master\nmaster_replid:aa\nmaster_repl_offset:42\naof_enabled:1\naof_buffer_length:0\naof_rewrite_in_progress:0\n\
                           aof_rewrite_scheduled:0\naof_last_write_status:ok\n";

    fn with_data(dir: &TempDir) {
        fs::create_dir_all(dir.path().join(AOF_DIRECTORY)).unwrap();
        fs::write(dir.path().join(AOF_DIRECTORY).join("appendonly.aof.1.base.rdb"), "x").unwrap();
    }

    #[test]
    fn what_was_seen_is_known_after_a_restart() {
        let dir = TempDir::new().unwrap();
        let mut disk = Disk::new(dir.path(), true);
        assert_eq!(disk.inspect(false).unwrap(), DataState::Empty);
        disk.begins_as_primary();
        with_data(&dir);
        let seen = disk.observe(&Info::parse(RUNNING), false);
        let position = Position { lineage: "aa".into(), offset: 42, led: true, exact: false };
        assert_eq!(seen, DataState::Complete(Position { exact: true, ..position.clone() }), "its memory holds all");
        let mut again = Disk::new(dir.path(), true);
        assert_eq!(again.inspect(false).unwrap(), DataState::Complete(position.clone()));
        disk.ended_cleanly();
        let exact = DataState::Complete(Position { exact: true, ..position.clone() });
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), exact);
        // The next start is not clean any more, unless each change is on the disk before it is acknowledged.
        let mut next = Disk::new(dir.path(), true);
        next.inspect(false).unwrap();
        next.begins_as_primary();
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), DataState::Complete(position));
        next.observe(&Info::parse(RUNNING), true);
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), exact);
    }

    #[test]
    fn what_never_held_anything_is_empty_again() {
        let dir = TempDir::new().unwrap();
        let mut disk = Disk::new(dir.path(), true);
        assert_eq!(disk.inspect(false).unwrap(), DataState::Empty);
        disk.begins_blank().unwrap();
        // What a server makes of nothing looks like data.
        with_data(&dir);
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), DataState::Partial, "it owns slots by now");
        assert_eq!(Disk::new(dir.path(), true).inspect(true).unwrap(), DataState::Empty);
        with_data(&dir);
        disk.observe(&Info::parse(RUNNING), false);
        assert!(matches!(Disk::new(dir.path(), true).inspect(true).unwrap(), DataState::Complete(_)), "it has served");
    }

    #[test]
    fn what_waits_in_the_buffer_is_not_claimed() {
        let dir = TempDir::new().unwrap();
        with_data(&dir);
        let mut disk = Disk::new(dir.path(), true);
        disk.observe(&Info::parse(RUNNING), false);
        let waiting = RUNNING.replace("offset:42", "offset:50").replace("buffer_length:0", "buffer_length:8");
        disk.observe(&Info::parse(&waiting), false);
        let position = Position { lineage: "aa".into(), offset: 42, led: true, exact: false };
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), DataState::Complete(position));
    }

    #[test]
    fn a_copy_under_way_is_not_claimed_before_it_is_on_the_disk() {
        let dir = TempDir::new().unwrap();
        with_data(&dir);
        let mut disk = Disk::new(dir.path(), true);
        assert_eq!(disk.inspect(false).unwrap(), DataState::Partial, "data without a record");
        disk.begins_as_replica();
        let replica = RUNNING
            .replace("role:master", "role:slave\nmaster_host:h\nmaster_port:1\nmaster_link_status:up\nslave_repl_offset:42");
        disk.observe(&Info::parse(&replica.replace("in_progress:0", "in_progress:1")), false);
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), DataState::Partial);
        disk.observe(&Info::parse(&replica), false);
        let position = Position { lineage: "aa".into(), offset: 42, led: false, exact: false };
        assert_eq!(Disk::new(dir.path(), true).inspect(false).unwrap(), DataState::Complete(position));
    }

    #[test]
    fn what_is_not_to_survive_is_removed_and_nothing_else() {
        let dir = TempDir::new().unwrap();
        with_data(&dir);
        for name in ["dump.rdb", "temp-1.rdb", "nodes.conf"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        assert_eq!(Disk::new(dir.path(), false).inspect(false).unwrap(), DataState::Empty);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["nodes.conf"]);
    }

    #[test]
    fn a_running_cache_without_keys_holds_nothing() {
        let mut disk = Disk::new(Path::new("/nowhere"), false);
        assert_eq!(disk.observe(&Info::parse(RUNNING), false), DataState::Empty);
        let keys = format!("{RUNNING}db0:keys=1,expires=0,avg_ttl=0\n");
        assert!(matches!(disk.observe(&Info::parse(&keys), false), DataState::Complete(_)));
        assert_eq!(disk.observe(&Info::parse(&format!("{keys}loading:1\n")), false), DataState::Partial);
    }
}
