//! A connection that is ready for a lane's commands.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::dial::{self, DialError, Link};
use super::mux::Lane;
use super::node::NodeAddr;
use crate::sidecar::resp::encode;
use crate::sidecar::worker::Worker;

const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Dials `node`: logged in, proven to serve (as a primary, where an address may outlive a role), in the lane's protocol and
/// database. Takes two seconds at most.
pub async fn open(worker: &Worker, node: &NodeAddr, lane: Lane) -> Result<Link, DialError> {
    let deadline = Instant::now() + DIAL_TIMEOUT;
    let (access, protocol) = (worker.access(), lane.protocol);
    let mut link = if worker.is_cluster() {
        dial::dial(node, &access, protocol, deadline).await?
    } else {
        dial::dial_primary(node, &access, protocol, deadline).await?
    };
    if lane.database > 0 {
        let selected = timeout_at(deadline, select(&mut link, lane.database)).await;
        selected.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(|source| DialError::Io { node: node.clone(), source })?;
    }
    Ok(link)
}

async fn select(link: &mut Link, database: u8) -> io::Result<()> {
    let mut command = Vec::new();
    encode::command(&mut command, &[&b"SELECT"[..], database.to_string().as_bytes()]);
    link.write_all(&command).await?;
    let mut answer = [0u8; 5];
    link.read_exact(&mut answer).await?;
    if &answer == b"+OK\r\n" { Ok(()) } else { Err(io::Error::other(format!("the server has no database {database}"))) }
}
