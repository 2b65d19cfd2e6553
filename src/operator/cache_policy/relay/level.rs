//! How much the journals of a relay hold, and how its feeds are, asked of the cache's servers themselves: that needs no relay that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::journal::feed::{self, View};
use crate::journal::loads::LoadQueue;
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
    /// No server has a part of it.
    #[error("no server that answers has all of the journal `{0}`")]
    Nowhere(JournalName),
    /// As [`LevelError::Answer`], of a feed.
    #[error("the cache gives an unexpected answer about the slot `{0}`")]
    Feed(String),
}

/// Asks servers how these journals are. Each partition is told by the one that has its slot; without slots, `servers` is the primary alone.
///
/// # Errors
/// Why a partition is not known: half of a journal tells nothing of whether it is drained.
pub async fn ask<'a>(
    servers: &[SocketAddr],
    entry: Entry<'_>,
    journals: impl IntoIterator<Item = &'a JournalName>,
) -> Result<BTreeMap<JournalName, Level>, LevelError> {
    let mut levels = BTreeMap::new();
    let mut open = Vec::new();
    for journal in journals {
        levels.insert(journal.clone(), Level::default());
        open.extend(Partition::all(journal).map(|partition| (journal, partition)));
    }
    let mut trouble = None;
    for server in servers {
        if open.is_empty() {
            break;
        }
        if let Err(error) = ask_one(*server, entry, &mut open, &mut levels).await {
            trouble = Some(error);
        }
    }
    match open.first() {
        None => Ok(levels),
        Some((journal, _)) => Err(trouble.unwrap_or_else(|| LevelError::Nowhere((*journal).clone()))),
    }
}

/// Takes those of `open` that a server has into account. The others stay.
async fn ask_one(
    server: SocketAddr,
    entry: Entry<'_>,
    open: &mut Vec<(&JournalName, Partition)>,
    levels: &mut BTreeMap<JournalName, Level>,
) -> Result<(), LevelError> {
    let mut admin = Admin::connect(server, entry).await?;
    let mut at = 0;
    while let Some((journal, partition)) = open.get(at) {
        let answer: Result<Vec<Vec<u8>>, AdminError> = evaluate(&mut admin, &scripts::status(partition)).await;
        if answer.as_ref().err().and_then(AdminError::code) == Some("MOVED") {
            at += 1;
            continue;
        }
        let answer = answer?;
        let answer: Vec<&[u8]> = answer.iter().map(Vec::as_slice).collect();
        let status = scripts::status_answer(&answer).map_err(|_| LevelError::Answer((*journal).clone()))?;
        levels.entry((*journal).clone()).or_default().add(&status);
        open.swap_remove(at);
    }
    Ok(())
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

/// Of these queues, those that a relay tends, as far as servers say it.
///
/// # Errors
/// The last that did not answer.
pub async fn ask_tended(
    servers: &[SocketAddr],
    entry: Entry<'_>,
    queues: &BTreeSet<JournalName>,
) -> Result<BTreeSet<JournalName>, LevelError> {
    let (mut tended, mut trouble) = (BTreeSet::new(), None);
    for server in servers {
        let mut admin = match Admin::connect(*server, entry).await {
            Ok(admin) => admin,
            Err(error) => {
                trouble = Some(error);
                continue;
            }
        };
        for queue in queues {
            let key = String::from_utf8_lossy(&LoadQueue::new(queue).relay()).into_owned();
            match admin.ask::<u64>("EXISTS", &[&key]).await {
                Ok(0) => {}
                Ok(_) => drop(tended.insert(queue.clone())),
                Err(error) if error.code() == Some("MOVED") => {}
                Err(error) => trouble = Some(error),
            }
        }
    }
    match trouble {
        Some(error) if tended.is_empty() => Err(error.into()),
        _ => Ok(tended),
    }
}

async fn evaluate(admin: &mut Admin, call: &Call) -> Result<Vec<Vec<u8>>, AdminError> {
    let words = call.command();
    let words: Vec<String> = words.iter().skip(1).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    admin.ask("EVAL", &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::fake_server::{self, in_bulk};

    /// One of two servers of a Cluster, whose partitions are those of even numbers, or of odd ones: one write lies in each.
    fn half(parity: u8) -> SocketAddr {
        fake_server::listen("127.0.0.1:0", move |words| answer(words, parity))
    }

    fn answer(words: &[String], parity: u8) -> String {
        let partition = Partition::all(&journal())
            .find(|partition| scripts::status(partition).command()[3] == words[3].as_bytes())
            .expect("a partition's first key");
        if partition.number() % 2 != parity {
            return format!("-MOVED {} 127.0.0.1:1\r\n", partition.slot());
        }
        let numbers = [9, 1, 100, 4, 5, 0, 0, 1, 0, 0].map(|number: u64| number.to_string());
        in_bulk(&["status".to_owned()].into_iter().chain(numbers).chain([String::new()]).collect::<Vec<_>>())
    }

    fn journal() -> JournalName {
        "store.shop.db".parse().unwrap()
    }

    #[tokio::test]
    async fn each_server_of_a_cluster_tells_of_its_own_partitions() {
        let (even, odd, gone) = (half(0), half(1), SocketAddr::from(([127, 0, 0, 1], 1)));
        let journals = [journal()];
        let all = ask(&[gone, odd, even], Entry::default(), &journals).await.unwrap();
        assert_eq!(all[&journal()].depth, Partition::all(&journal()).count() as u64);
        // Half a journal may not pass for a drained one.
        assert!(matches!(ask(&[even, even], Entry::default(), &journals).await, Err(LevelError::Nowhere(_))));
        assert!(matches!(ask(&[even, gone], Entry::default(), &journals).await, Err(LevelError::Cache(_))));
    }
}
