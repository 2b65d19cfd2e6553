//! Whose journals are asked: those of a snapshot.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::cli::cluster::block_on;
use crate::cli::{Failure, WRONG_LINE, runs};
use crate::policy::JournalName;
use crate::relay::desk::{Desk, DeskError};
use crate::relay::run::RelayError;

/// Which snapshot.
#[derive(clap::Args)]
pub struct SnapshotArgs {
    /// The policy snapshot of the sidecars, by which the servers are found; otherwise that of a `larder dev`
    #[arg(long, value_name = "FILE", conflicts_with = "run_dir")]
    snapshot: Option<PathBuf>,
    /// The directory of a `larder dev`: its --data, or what it names when it starts; otherwise that of the only one that runs
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// Which snapshot, and which of its journals.
#[derive(clap::Args)]
pub struct PlaceArgs {
    #[command(flatten)]
    place: SnapshotArgs,
    /// The journal; otherwise the only one
    #[arg(long, value_name = "NAME")]
    journal: Option<JournalName>,
}

impl SnapshotArgs {
    /// Finds the servers, and does `what` with the way to them.
    ///
    /// # Errors
    /// The cache cannot be asked.
    pub fn with<T>(&self, what: impl AsyncFnOnce(&mut Desk) -> Result<T, DeskError>) -> Result<T, Failure> {
        let snapshot = self.snapshot()?;
        in_quiet(async {
            let mut desk = Desk::open(&snapshot).await.map_err(|error| unreached(&snapshot, &error))?;
            what(&mut desk).await.map_err(|error| unreached(&snapshot, &error))
        })
    }

    fn snapshot(&self) -> Result<PathBuf, Failure> {
        match &self.snapshot {
            Some(snapshot) => Ok(snapshot.clone()),
            None => Ok(runs::run_dir(self.run_dir.as_deref(), "a snapshot with --snapshot")?.join("snapshot.json")),
        }
    }
}

/// What servers there are is no news to a person who asks for something else.
fn in_quiet<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::default());
    block_on(work)
}

impl PlaceArgs {
    /// Opens the journals, and does `what` with the one that is meant.
    ///
    /// # Errors
    /// The journal cannot be asked.
    pub fn with<T>(&self, what: impl AsyncFnOnce(&mut Desk, &JournalName) -> Result<T, DeskError>) -> Result<T, Failure> {
        let snapshot = self.place.snapshot()?;
        in_quiet(async {
            let mut desk = Desk::open(&snapshot).await.map_err(|error| unreached(&snapshot, &error))?;
            let journal = self.journal(&desk)?;
            what(&mut desk, &journal).await.map_err(|error| unreached(&snapshot, &error))
        })
    }

    fn journal(&self, desk: &Desk) -> Result<JournalName, Failure> {
        let all = desk.journals();
        let names = all.iter().map(JournalName::as_str).collect::<Vec<_>>().join(", ");
        match (&self.journal, all.first()) {
            (_, None) => Err(Failure::new("no rule writes behind", "name another snapshot").with_code(WRONG_LINE)),
            (Some(journal), _) if all.contains(journal) => Ok(journal.clone()),
            (Some(journal), _) => {
                Err(Failure::new(format!("there is no journal {journal}"), format!("name one of {names}")).with_code(WRONG_LINE))
            }
            (None, Some(only)) if all.len() == 1 => Ok(only.clone()),
            (None, _) => {
                let next = format!("name one with --journal: {names}");
                Err(Failure::new("there are several journals", next).with_code(WRONG_LINE))
            }
        }
    }
}

fn unreached(snapshot: &Path, error: &DeskError) -> Failure {
    let told = |error: &dyn Display| format!("{}: {error}", snapshot.display());
    let failure = match error {
        DeskError::Snapshot(error @ RelayError::File(_)) => {
            // It names the file itself.
            Failure::new(
                error,
                "see that the file is there and may be read, or name that of the sidecars or of the relay with --snapshot",
            )
        }
        DeskError::Snapshot(error) => {
            Failure::new(told(error), "correct the file, or what it names; the sidecars' and the relay's are as they should be")
        }
        DeskError::NotFound | DeskError::Cache(_) => {
            let next = "see that the servers which the snapshot names run, and that it is the sidecars' or the relay's";
            Failure::new(told(error), next)
        }
    };
    failure.with_code(WRONG_LINE)
}
