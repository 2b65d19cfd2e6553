//! Which server is the primary: what most sentinels say and the server itself confirms; without sentinels, the only one that says so.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use futures_util::future::join_all;
use redis::Value;

use super::Servers;
use crate::operator::admin::{Admin, AdminError, Entry};

/// The most servers or sentinels that are asked.
pub const MOST: usize = 16;

/// Why there is no primary to be had.
#[derive(Debug, thiserror::Error)]
pub enum PrimaryError {
    /// The one that most sentinels name does not say that it is one.
    #[error("{0}, which most sentinels name, is no primary")]
    Unconfirmed(SocketAddr),
    /// None can be asked.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// No sentinels' majority, and none or several that say so themselves.
    #[error("{0} of {1} servers say that they are the primary")]
    Servers(usize, usize),
    /// Of a Cluster, whose servers know no owner of some slots.
    #[error("no server answers that knows the owner of every slot")]
    Partial,
}

/// Finds the primary, and connects to it.
pub async fn find(servers: &Servers, entry: Entry<'_>) -> Result<(SocketAddr, Admin), PrimaryError> {
    if let Some(address) = by_majority(servers, entry).await {
        let mut admin = Admin::connect(address, entry).await?;
        return if is_primary(&mut admin).await? { Ok((address, admin)) } else { Err(PrimaryError::Unconfirmed(address)) };
    }
    let asked = servers.servers.iter().take(MOST).map(async |address| {
        let mut admin = Admin::connect(*address, entry).await.ok()?;
        is_primary(&mut admin).await.ok()?.then_some((*address, admin))
    });
    let mut found: Vec<(SocketAddr, Admin)> = join_all(asked).await.into_iter().flatten().collect();
    match (found.pop(), found.len()) {
        (Some(only), 0) => Ok(only),
        (last, others) => Err(PrimaryError::Servers(others + usize::from(last.is_some()), servers.servers.len())),
    }
}

/// The primary that most of all sentinels name.
pub async fn by_majority(servers: &Servers, entry: Entry<'_>) -> Option<SocketAddr> {
    let sentinels = || servers.sentinels.iter().take(MOST);
    let asked = sentinels().map(async |address| {
        let mut sentinel = Admin::connect(*address, entry).await.ok()?;
        named(&mut sentinel, &servers.master).await.ok()?
    });
    majority(join_all(asked).await.into_iter().flatten(), sentinels().count())
}

/// The primary that a sentinel names.
pub async fn named(sentinel: &mut Admin, master: &str) -> Result<Option<SocketAddr>, AdminError> {
    let answer: Option<(String, String)> = sentinel.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", &[master]).await?;
    Ok(answer.and_then(|(host, port)| Some(SocketAddr::new(host.parse::<IpAddr>().ok()?, port.parse().ok()?))))
}

/// Whether a server says that it is one.
pub async fn is_primary(server: &mut Admin) -> Result<bool, AdminError> {
    let role: Vec<Value> = server.ask("ROLE", &[]).await?;
    let word = role.first().and_then(|word| redis::from_redis_value_ref::<String>(word).ok());
    Ok(word.as_deref() == Some("master"))
}

fn majority(votes: impl Iterator<Item = SocketAddr>, of: usize) -> Option<SocketAddr> {
    let mut counts: HashMap<SocketAddr, usize> = HashMap::new();
    votes.for_each(|vote| *counts.entry(vote).or_default() += 1);
    counts.into_iter().find(|(_, votes)| votes * 2 > of).map(|(address, _)| address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_half_of_all_sentinels_have_to_agree() {
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let of = |votes: &[u16], all| majority(votes.iter().map(|port| at(*port)), all);
        assert_eq!(of(&[1, 2, 1], 3), Some(at(1)));
        assert_eq!(of(&[1, 2], 3), None);
        assert_eq!(of(&[1, 1], 4), None);
        assert_eq!(of(&[], 0), None);
    }
}
