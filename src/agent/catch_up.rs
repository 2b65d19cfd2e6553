//! Whether a replica has all that its primary has.
//!
//! A link is up as soon as the primary sends over it, and what was acknowledged while the replica was away may still be on its way. So the
//! primary is asked how far it is, after the link was seen up, and the replica must have come that far, of the same history and over a link
//! that is still up. What the primary acknowledges later waits for the replica, which follows.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::info::{Info, Role};
use super::line::{Line, LineError};
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::node::NodeAddr;

/// How long a replica is looked at after its primary has said how far it is.
const WITHIN: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How far a server follows another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Following {
    primary: NodeAddr,
    lineage: Option<String>,
    offset: u64,
}

/// Whether the server behind `server` has all that its primary had at a moment since this was asked. False also where it follows nobody,
/// where the link is lost or another primary is followed meanwhile, and where it is still behind after half a second: ask again.
///
/// # Errors
/// One of the two does not answer.
pub async fn has_caught_up(server: &mut Line, access: &Access) -> Result<bool, LineError> {
    let Some(before) = Following::of(&read(server).await?) else { return Ok(false) };
    let primary = read(&mut Line::new(before.primary.clone(), access.clone())).await?;
    if primary.role() != Some(Role::Primary) {
        return Ok(false);
    }
    let deadline = Instant::now() + WITHIN;
    loop {
        let now = Following::of(&read(server).await?);
        match now.filter(|now| now.primary == before.primary && now.lineage.as_deref() == primary.lineage()) {
            None => return Ok(false),
            Some(now) if now.offset >= primary.offset() => return Ok(true),
            Some(_) if Instant::now() >= deadline => return Ok(false),
            Some(_) => sleep(LOOK_EVERY).await,
        }
    }
}

impl Following {
    /// `None` where the server follows nobody, or its link is down.
    fn of(info: &Info) -> Option<Self> {
        let Some(Role::Replica { host, port, link_up: true, .. }) = info.role() else { return None };
        Some(Self { primary: NodeAddr::new(host, port), lineage: info.lineage().map(str::to_owned), offset: info.offset() })
    }
}

async fn read(line: &mut Line) -> Result<Info, LineError> {
    let answer = line.ask(&["INFO", "replication"]).await?;
    Ok(Info::parse(answer.as_str().unwrap_or_default()))
}
