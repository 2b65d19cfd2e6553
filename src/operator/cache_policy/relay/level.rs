//! How much the journals of a relay hold, and how its feeds are, asked of the cache's primary itself: that needs no relay that runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::journal::feed::{self, View};
use crate::journal::scripts::{self, Call};
use crate::journal::{Level, Partition};
use crate::operator::admin::{Admin, AdminError, Entry};
use crate::policy::JournalName;

/// Why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// The cache did not answer.
    #[error(transparent)]
    Cache(#[from] AdminError),
    /// It gave an answer that is none.
    #[error("the journal `{0}` gives an unexpected answer")]
    Answer(JournalName),
    /// The same of a feed.
    #[error("the cache gives an unexpected answer about the slot `{0}`")]
    Feed(String),
}

/// Asks the primary how these journals are.
pub async fn ask<'a>(
    primary: SocketAddr,
    entry: Entry<'_>,
    journals: impl IntoIterator<Item = &'a JournalName>,
) -> Result<BTreeMap<JournalName, Level>, LevelError> {
    let mut admin = Admin::connect(primary, entry).await?;
    let mut levels = BTreeMap::new();
    for journal in journals {
        let mut level = Level::default();
        for partition in Partition::all(journal) {
            let answer: Vec<Vec<u8>> = evaluate(&mut admin, &scripts::status(&partition)).await?;
            let answer: Vec<&[u8]> = answer.iter().map(Vec::as_slice).collect();
            level.add(&scripts::status_answer(&answer).map_err(|_| LevelError::Answer(journal.clone()))?);
        }
        levels.insert(journal.clone(), level);
    }
    Ok(levels)
}

/// Asks a server how the feeds of these slots are, which must have them.
pub async fn ask_feeds(server: SocketAddr, entry: Entry<'_>, slots: &[String]) -> Result<BTreeMap<String, View>, LevelError> {
    let mut admin = Admin::connect(server, entry).await?;
    let mut views = BTreeMap::new();
    for slot in slots {
        let answer: Vec<Vec<u8>> = evaluate(&mut admin, &feed::view(slot)).await?;
        let answer: Vec<&[u8]> = answer.iter().map(Vec::as_slice).collect();
        views.insert(slot.clone(), feed::viewed(&answer).map_err(|_| LevelError::Feed(slot.clone()))?);
    }
    Ok(views)
}

async fn evaluate(admin: &mut Admin, call: &Call) -> Result<Vec<Vec<u8>>, AdminError> {
    let words = call.command();
    let words: Vec<String> = words.iter().skip(1).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    admin.ask("EVAL", &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}
