//! A connection that is ready for a lane's commands.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::dial::{self, DialError, Link};
use super::lane::{Lane, Mode};
use super::node::NodeAddr;
use crate::sidecar::resp::encode;
use crate::sidecar::worker::Worker;

const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Dials `node`: logged in, proven to serve (as a primary, where an address may outlive a role), in the lane's protocol and
/// database. Takes two seconds at most.
pub async fn open(worker: &Worker, node: &NodeAddr, lane: Lane) -> Result<Link, DialError> {
    open_numbered(worker, node, lane).await.map(|(link, _)| link)
}

/// As [`open`], with what the server calls the connection.
pub async fn open_numbered(worker: &Worker, node: &NodeAddr, lane: Lane) -> Result<(Link, i64), DialError> {
    let deadline = Instant::now() + DIAL_TIMEOUT;
    let (access, protocol) = (worker.access(), lane.protocol);
    let (mut link, number) = if worker.is_cluster() {
        dial::dial(node, &access, protocol, deadline).await?
    } else {
        dial::dial_primary(node, &access, protocol, deadline).await?
    };
    if lane.database > 0 {
        let selected = timeout_at(deadline, select(&mut link, lane.database)).await;
        selected.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(|source| DialError::Io { node: node.clone(), source })?;
    }
    for mode in Mode::ALL.into_iter().filter(|mode| lane.has(*mode)) {
        let set = timeout_at(deadline, enter(&mut link, mode)).await;
        set.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(|source| DialError::Io { node: node.clone(), source })?;
    }
    Ok((link, number))
}

/// Sets a mode. A server that knows none, or is not in the state for it, has told the client so that asked for it: its commands go on
/// without.
async fn enter(link: &mut Link, mode: Mode) -> io::Result<()> {
    const LONGEST_LINE: usize = 1024;
    let mut command = Vec::new();
    encode::command(&mut command, &[&b"CLIENT"[..], mode.subcommand(), b"ON"]);
    link.write_all(&command).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n") && answer.len() < LONGEST_LINE {
        answer.push(link.read_u8().await?);
    }
    if answer != b"+OK\r\n" {
        tracing::debug!(?mode, answer = %String::from_utf8_lossy(&answer).trim_end(), "a server does not take a mode");
    }
    Ok(())
}

async fn select(link: &mut Link, database: u8) -> io::Result<()> {
    let mut command = Vec::new();
    encode::command(&mut command, &[&b"SELECT"[..], database.to_string().as_bytes()]);
    link.write_all(&command).await?;
    let mut answer = [0u8; 5];
    link.read_exact(&mut answer).await?;
    if &answer == b"+OK\r\n" { Ok(()) } else { Err(io::Error::other(format!("the server has no database {database}"))) }
}
