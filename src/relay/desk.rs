//! What a person asks of a journal, and does with its dead letters; and how feeds are.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::changes::followed::Followed;
use super::hub::{Hub, HubError, bytes_of};
use super::rules::disk;
use super::run::RelayError;
use crate::journal::feed::{self, View, viewed};
use crate::journal::letters::{self, Dropped, Letter, Replayed};
use crate::journal::scripts::{self, Status};
use crate::journal::{Entry, Partition};
use crate::origin::LoadError;
use crate::origin::changes::Lag;
use crate::policy::events::STREAM;
use crate::policy::slots::{self, Companion};
use crate::policy::snapshot::MAX_BYTES;
use crate::policy::{JournalName, Snapshot};
use crate::sidecar::access_files::open_access;
use crate::sidecar::files::WatchedFiles;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::discovery::Discovery;
use crate::sidecar::upstream::view::ViewKind;
use crate::telemetry::background::Background;

/// How long the servers may take to be found.
const FOUND_WITHIN: Duration = Duration::from_secs(10);
/// How many dead letters are read at once.
const PAGE: usize = 100;

/// Why a journal cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// The snapshot, or what it names, cannot be used.
    #[error(transparent)]
    Snapshot(#[from] RelayError),
    /// No server has been found.
    #[error("no server of the cache was found within {FOUND_WITHIN:?}")]
    NotFound,
    /// The cache gave no answer that counts.
    #[error(transparent)]
    Cache(#[from] HubError),
}

/// How a feed is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedStatus {
    /// The origin whose changes it tells.
    pub origin: String,
    /// The slot that it reads.
    pub slot: String,
    /// Whether nobody follows it any more, and relays are to take its slot away.
    pub ends: bool,
    /// What the cache tells of it.
    pub view: View,
    /// How far the slot is behind, by the database's word. None: there is no slot.
    pub lag: Result<Option<Lag>, LoadError>,
}

/// What came of a dead letter that is given up.
#[derive(Debug)]
pub struct GivenUp {
    /// Of the letter itself.
    pub letter: Dropped,
    /// Why what the cache has of its key, which is to go with it, may stay until its TTL ends. `None`: it is gone, or need not go.
    pub kept: Option<HubError>,
}

/// The journals of a snapshot, and a way to them.
pub struct Desk {
    hub: Hub,
    journals: BTreeSet<JournalName>,
    feeds: Vec<Followed>,
    _discovery: Discovery,
}

impl Desk {
    /// Reads a snapshot and finds its servers.
    pub async fn open(snapshot: &Path) -> Result<Self, DeskError> {
        let files = WatchedFiles::open(vec![snapshot.to_owned()], MAX_BYTES).await.map_err(RelayError::from)?;
        let text = files.current();
        let snapshot = Snapshot::parse(text.first().map_or(&[][..], |bytes| bytes)).map_err(RelayError::from)?;
        let counters = Arc::new(Background::default());
        let access = open_access(&snapshot.cluster, counters.clone()).await.map_err(RelayError::from)?;
        let found = Discovery::start(&snapshot.cluster, access.clone(), counters).map_err(RelayError::from)?;
        let (discovery, mut view, refresh) = found;
        let usable = view.wait_for(|view| !matches!(view.kind, ViewKind::Unknown));
        timeout(FOUND_WITHIN, usable).await.map_err(|_| DeskError::NotFound)?.map_err(|_| DeskError::NotFound)?;
        let journals = snapshot.rules.iter().filter_map(|rule| Some(rule.strategy.behind()?.journal.name.clone())).collect();
        let feeds = snapshot.feeds.iter().map(|feed| Followed::new(&snapshot, feed));
        let feeds = feeds.collect::<Result<_, _>>().map_err(RelayError::from)?;
        let mut hub = Hub::new(access.servers, view, refresh);
        hub.trust(disk(&snapshot));
        Ok(Self { hub, journals, feeds, _discovery: discovery })
    }

    /// The journals that rules write to.
    pub fn journals(&self) -> &BTreeSet<JournalName> {
        &self.journals
    }

    /// How each feed is, by the cache and by its database.
    pub async fn feeds(&mut self) -> Result<Vec<FeedStatus>, DeskError> {
        let mut all = Vec::new();
        for followed in &self.feeds {
            let view = self.hub.run(slots::slot_of(STREAM.as_bytes()), &feed::view(&followed.place.slot), viewed).await?;
            all.push(FeedStatus {
                origin: followed.database.name().to_owned(),
                slot: followed.place.slot.clone(),
                ends: followed.ends,
                view,
                lag: followed.database.lag(&followed.place).await,
            });
        }
        Ok(all)
    }

    /// How each partition is, by number.
    pub async fn status(&mut self, journal: &JournalName) -> Result<Vec<Status>, DeskError> {
        let mut all = Vec::new();
        for partition in Partition::all(journal) {
            all.push(self.hub.run(partition.slot(), &scripts::status(&partition), scripts::status_answer).await?);
        }
        Ok(all)
    }

    /// The oldest entries of each partition, at most `most` of them, with the partition's number.
    pub async fn peek(&mut self, journal: &JournalName, most: usize) -> Result<Vec<(u8, Entry)>, DeskError> {
        let mut all = Vec::new();
        for partition in Partition::all(journal) {
            for (id, fields) in self.range(&partition, partition.log(), "-", most).await? {
                let entry = Entry::parse(&id, fields.iter().map(|(name, value)| (&name[..], &value[..])));
                all.push((partition.number(), entry.map_err(|_| HubError::Answer)?));
            }
        }
        Ok(all)
    }

    /// All dead letters, with the number of their partition, the oldest of each partition first.
    pub async fn letters(&mut self, journal: &JournalName) -> Result<Vec<(u8, Letter)>, DeskError> {
        let mut all = Vec::new();
        for partition in Partition::all(journal) {
            let mut from = "-".to_owned();
            loop {
                let page = self.range(&partition, partition.dead(), &from, PAGE).await?;
                let whole = page.len() == PAGE;
                for (id, fields) in page {
                    let fields: Vec<(&[u8], &[u8])> = fields.iter().map(|(name, value)| (&name[..], &value[..])).collect();
                    all.push((partition.number(), Letter::parse(&id, &fields).map_err(|_| HubError::Answer)?));
                }
                match all.last().filter(|_| whole) {
                    Some((_, last)) => from = format!("({}", last.id),
                    None => break,
                }
            }
        }
        Ok(all)
    }

    /// Has a dead letter's write told to its origin once more, as the newest of its key. As with any write, it is on disk everywhere then.
    pub async fn replay(&mut self, journal: &JournalName, number: u8, id: &str) -> Result<Replayed, DeskError> {
        let partition = Partition::new(journal, number);
        Ok(self.hub.run_durably(partition.slot(), &letters::replay(&partition, id), letters::replayed).await?)
    }

    /// Gives a dead letter's write up. Where it was the last of its key, what the cache has of the key goes, too: the next read sees what
    /// the origin has. That it does not go, as where the login may delete no keys that no rule writes behind any more, is no error: the letter
    /// is gone by then.
    pub async fn drop(&mut self, journal: &JournalName, number: u8, id: &str) -> Result<GivenUp, DeskError> {
        let partition = Partition::new(journal, number);
        let letter = self.range(&partition, partition.dead(), id, 1).await?;
        let outcome = self.hub.run_durably(partition.slot(), &letters::drop(&partition, id), letters::dropped).await?;
        let key = letter.iter().flat_map(|(_, fields)| fields).find(|(name, _)| name == b"k").map(|(_, key)| key);
        let mut kept = None;
        if let (Dropped::Last, Some(key)) = (outcome, key) {
            let copies = [Companion::Lease, Companion::Stale, Companion::Negative].map(|companion| companion.name(key));
            let command = [b"DEL".to_vec(), key.clone()].into_iter().chain(copies).collect();
            kept = self.hub.ask(slots::slot_of(key), &[command]).await.err();
        }
        Ok(GivenUp { letter: outcome, kept })
    }

    async fn range(&mut self, partition: &Partition, key: Vec<u8>, from: &str, most: usize) -> Result<Vec<Item>, DeskError> {
        let command = vec![
            b"XRANGE".to_vec(),
            key,
            from.as_bytes().to_vec(),
            b"+".to_vec(),
            b"COUNT".to_vec(),
            most.to_string().into_bytes(),
        ];
        let answers = self.hub.ask(partition.slot(), &[command]).await?;
        let list = answers.first().and_then(Value::as_list).ok_or(HubError::Answer)?;
        Ok(list.iter().map(item_of).collect::<Option<_>>().ok_or(HubError::Answer)?)
    }
}

/// An element of a stream: its ID, and its fields with their values.
type Item = (Vec<u8>, Vec<(Vec<u8>, Vec<u8>)>);

fn item_of(element: &Value) -> Option<Item> {
    let [id, fields] = element.as_list()? else { return None };
    let fields: Vec<&[u8]> = fields.as_list()?.iter().map(bytes_of).collect::<Option<_>>()?;
    let pairs = fields.chunks_exact(2).map(|pair| (pair[0].to_vec(), pair[1].to_vec()));
    Some((bytes_of(id)?.to_vec(), pairs.collect()))
}
