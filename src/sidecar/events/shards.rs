//! Which shards there are, as they say themselves: whether a walk has met every key depends on that.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::jobs::Shard;
use crate::sidecar::resp::reply;
use crate::sidecar::slots::SLOTS;
use crate::sidecar::sweep::databases;
use crate::sidecar::upstream::ask::ask_node;
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::Worker;

/// Why shards cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum Unsettled {
    /// One does not answer, or not with what was asked.
    #[error("a server does not say what it holds: {0}")]
    Silent(String),
    /// A slot is on its way between two.
    #[error("slots are moving between servers")]
    Moving,
    /// Not all slots have an owner that is known.
    #[error("not every slot has an owner that is known")]
    Incomplete,
}

/// The shards, each with its node, once no slot is on its way.
///
/// # Errors
/// Why not now. The topology is looked at anew meanwhile.
pub async fn survey(worker: &Rc<Worker>) -> Result<Vec<(Shard, Rc<Node>)>, Unsettled> {
    let surveyed = look(worker).await;
    if surveyed.is_err() {
        worker.refresh_topology();
    }
    surveyed
}

async fn look(worker: &Rc<Worker>) -> Result<Vec<(Shard, Rc<Node>)>, Unsettled> {
    let (mut shards, mut owned) = (Vec::new(), 0);
    for node in worker.router().primaries() {
        let info = text(worker, &node, &[b"INFO", b"server"]).await?;
        let run = info.lines().find_map(|line| line.strip_prefix("run_id:")).unwrap_or_default().trim().to_owned();
        let mut slots = String::new();
        if worker.is_cluster() {
            let own = own_slots(&text(worker, &node, &[b"CLUSTER", b"NODES"]).await?).ok_or(Unsettled::Moving)?;
            owned += own.count;
            slots = own.text;
        }
        shards.push((Shard { address: node.address().to_string(), run, slots }, node));
    }
    let whole = if worker.is_cluster() { owned == u32::from(SLOTS) } else { shards.len() == 1 };
    if whole { Ok(shards) } else { Err(Unsettled::Incomplete) }
}

async fn text(worker: &Rc<Worker>, node: &Rc<Node>, command: &[&[u8]]) -> Result<String, Unsettled> {
    let answer = ask_node(worker, node, 0, command).await.map_err(Unsettled::Silent)?;
    let text = reply::text(&answer).ok_or_else(|| Unsettled::Silent("no text".to_owned()))?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The shards with the databases that hold keys, and about how many keys there are.
pub async fn contents(worker: &Rc<Worker>, shards: &[(Shard, Rc<Node>)]) -> (BTreeMap<Shard, Vec<u8>>, u64) {
    let (mut contents, mut total) = (BTreeMap::new(), 0);
    for (shard, node) in shards {
        let databases = databases(worker, node).await;
        for database in &databases {
            let size = ask_node(worker, node, *database, &[b"DBSIZE"]).await;
            total += size.ok().and_then(|size| reply::integer(&size)).and_then(|size| u64::try_from(size).ok()).unwrap_or(0);
        }
        contents.insert(shard.clone(), databases);
    }
    (contents, total)
}

/// The slots of one primary, in its own words.
#[derive(Debug, PartialEq, Eq)]
struct Own {
    text: String,
    count: u32,
}

/// What the answer to CLUSTER NODES says of the server that gave it. `None`: it is no primary, or a slot is on its way to it or from it.
fn own_slots(nodes: &str) -> Option<Own> {
    let fields: Vec<&str> = nodes
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2).is_some_and(|flags| flags.split(',').any(|flag| flag == "myself")))?;
    let is_primary = fields.get(2)?.split(',').any(|flag| flag == "master");
    let ranges = fields.get(8..).unwrap_or_default();
    if !is_primary || ranges.iter().any(|range| range.starts_with('[')) {
        return None;
    }
    let mut count = 0;
    for range in ranges {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        count += last.trim().parse::<u32>().ok()?.checked_sub(first.trim().parse().ok()?)? + 1;
    }
    Some(Own { text: ranges.join(" ").trim().to_owned(), count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_which_slots_are_its_own() {
        let line = |flags: &str, slots: &str| {
            format!("aa 127.0.0.1:1@2,h {flags} - 0 0 1 connected{slots}\nbb 127.0.0.1:2@3 master - 0 0 2 connected 9-16383\n")
        };
        let own = |text: &str, count| Some(Own { text: text.to_owned(), count });
        assert_eq!(own_slots(&line("myself,master", " 0-5 7")), own("0-5 7", 7));
        assert_eq!(own_slots(&line("myself,master", "")), own("", 0));
        assert_eq!(own_slots(&line("myself,slave", "")), None);
        assert_eq!(own_slots(&line("myself,master", " 0-5 [6->-bb]")), None);
        assert_eq!(own_slots(&line("myself,master", " 0-x")), None);
        assert_eq!(own_slots("no such thing"), None);
    }
}
