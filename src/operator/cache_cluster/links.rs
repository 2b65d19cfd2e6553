//! How soon sentinels give up a connection that nobody answers.
//!
//! A sentinel that connects to the address of a pod that has just died may wait for as long as the kernel repeats the attempt, along
//! the way to the dead pod: it begins another after fifteen seconds and no sooner, and until then it takes a server that is long back
//! for dead, and fails it over. Redis since 7.0 and Valkey let that time be shortened (`SENTINEL DEBUG min-link-reconnect-period`), in the running
//! process alone: each that starts is told.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::operator::admin::{Admin, AdminError, Entry};

/// How old a connection whose PING has no answer is to be before another takes its place: the kernel has repeated the attempt once
/// by then. One to a server that is merely slow is opened anew as well, which costs neither of them anything.
pub const RECONNECT_AFTER: Duration = Duration::from_secs(3);

/// How old such a connection is to be now; `None` where the sentinel does not tell.
pub async fn reconnects_after(sentinel: &mut Admin) -> Option<Duration> {
    let periods: HashMap<String, String> = sentinel.ask("SENTINEL DEBUG", &[]).await.ok()?;
    let (_, millis) = periods.iter().find(|(name, _)| name.eq_ignore_ascii_case("min-link-reconnect-period"))?;
    Some(Duration::from_millis(millis.parse().ok()?))
}

/// Has a sentinel wait no longer than [`RECONNECT_AFTER`].
pub async fn shorten(sentinel: SocketAddr, entry: Entry<'_>) -> Result<(), AdminError> {
    let mut admin = Admin::connect(sentinel, entry).await?;
    admin.ask("SENTINEL DEBUG", &["min-link-reconnect-period", &RECONNECT_AFTER.as_millis().to_string()]).await
}
