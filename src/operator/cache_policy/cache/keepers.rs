//! The servers that keep Larder's own keys: under Sentinel the primary, in a Cluster the owner of each key's slot.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::net::SocketAddr;

use futures_util::future::join_all;

use super::Servers;
use super::primary::{self, MOST, PrimaryError};
use crate::operator::admin::{Admin, AdminError, Entry, Keys};
use crate::operator::cache_cluster::observe;
use crate::operator::cache_cluster::plan::SlotSet;
use crate::policy::slots::slot_of;

/// Connections to them. After an error they are made anew, all of them.
pub struct Keepers {
    keys: Keys,
    address: SocketAddr,
    /// The server at that address: under Sentinel the primary, in a Cluster one that says who owns which slots.
    first: Admin,
    /// Who owns which slots of a Cluster. `None`: under Sentinel.
    owners: Option<Vec<(SocketAddr, SlotSet)>>,
    lines: HashMap<SocketAddr, Admin>,
}

impl Keepers {
    /// Finds them.
    pub async fn find(servers: &Servers, entry: Entry<'_>) -> Result<Self, PrimaryError> {
        let (keys, lines) = (entry.into(), HashMap::new());
        if !servers.in_cluster {
            let (address, first) = primary::find(servers, entry).await?;
            return Ok(Self { keys, address, first, owners: None, lines });
        }
        let mut asked = servers.servers.clone();
        fastrand::shuffle(&mut asked);
        let told = asked.iter().take(MOST).map(async |address| {
            let mut server = Admin::connect(*address, entry).await.ok()?;
            let owners = owners_told(*address, &mut server).await.ok()??;
            Some((*address, server, owners))
        });
        let told = join_all(told).await.into_iter().flatten().next();
        let (address, first, owners) = told.ok_or(PrimaryError::Partial)?;
        Ok(Self { keys, address, first, owners: Some(owners), lines })
    }

    /// Where what is published is heard: at the primary, or at any server of a Cluster.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether they are a Cluster's.
    pub fn in_cluster(&self) -> bool {
        self.owners.is_some()
    }

    /// The server at [`Keepers::address`].
    pub fn first(&mut self) -> &mut Admin {
        &mut self.first
    }

    /// The server that keeps this key.
    pub async fn of(&mut self, key: &str) -> Result<&mut Admin, PrimaryError> {
        let Some(owners) = &self.owners else { return Ok(&mut self.first) };
        let slot = slot_of(key.as_bytes());
        let owner = owners.iter().find(|(_, slots)| slots.contains(slot)).map(|(address, _)| *address);
        let owner = owner.ok_or(PrimaryError::Partial)?;
        match self.lines.entry(owner) {
            Slot::Occupied(line) => Ok(line.into_mut()),
            Slot::Vacant(empty) => Ok(empty.insert(Admin::connect(owner, self.keys.entry()).await?)),
        }
    }

    /// Learns anew who owns which slots.
    pub async fn learn_owners(&mut self) -> Result<(), PrimaryError> {
        let owners = owners_told(self.address, &mut self.first).await?.ok_or(PrimaryError::Partial)?;
        self.lines.retain(|address, _| owners.iter().any(|(owner, _)| owner == address));
        self.owners = Some(owners);
        Ok(())
    }
}

/// Who owns which slots, as a server says. `None` where it knows no owner of some, or is loading.
async fn owners_told(address: SocketAddr, server: &mut Admin) -> Result<Option<Vec<(SocketAddr, SlotSet)>>, AdminError> {
    let Some(view) = observe::server(server, true).await?.and_then(|facts| facts.cluster) else { return Ok(None) };
    let others = view.peers.into_iter().filter_map(|peer| Some((peer.address?, peer.slots)));
    let owners = others.chain([(address, view.slots)]).map(|(address, slots)| (address, slots.into_iter().collect::<SlotSet>()));
    let owners: Vec<(SocketAddr, SlotSet)> = owners.filter(|(_, slots)| !slots.is_empty()).collect();
    let mut all = SlotSet::default();
    owners.iter().for_each(|(_, slots)| all.add(slots));
    Ok((all == SlotSet::all()).then_some(owners))
}
