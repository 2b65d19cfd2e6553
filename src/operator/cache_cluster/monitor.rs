//! How a sentinel is told which primary to watch, by either actuator.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::build::{DOWN_AFTER, FAILOVER_TIMEOUT};
use super::plan::SentinelId;
use crate::operator::admin::{Admin, AdminError, Login};

/// How much later than the one before it a sentinel takes a primary for dead. Those that do so at the same moment vote for
/// themselves each, and none of them tries again within twice [`FAILOVER_TIMEOUT`].
const ONE_AFTER_ANOTHER: Duration = Duration::from_millis(250);

/// How long a sentinel lets a server be silent before it takes it for dead.
fn down_after(id: SentinelId) -> Duration {
    DOWN_AFTER + ONE_AFTER_ANOTHER * u32::from(id.0)
}

/// The epoch of the last vote that a sentinel gave about the primary of this name. 0: it gave none, or watches none.
///
/// Asked for a vote in epoch 0, which is over, a sentinel answers with its last one and gives none.
pub async fn last_vote(sentinel: &mut Admin, master: &str) -> Result<u64, AdminError> {
    let Ok(facts) = sentinel.ask::<HashMap<String, String>>("SENTINEL MASTER", &[master]).await else { return Ok(0) };
    let (Some(host), Some(port)) = (facts.get("ip"), facts.get("port")) else { return Ok(0) };
    let (_, _, epoch): (u8, String, i64) = sentinel.ask("SENTINEL IS-MASTER-DOWN-BY-ADDR", &[host, port, "0", NOBODY]).await?;
    Ok(u64::try_from(epoch).unwrap_or(0))
}

/// In the place of a sentinel's identity.
const NOBODY: &str = "nobody";

/// Makes a sentinel watch `primary` under the name `master`, and nothing else under it. `login` is how the servers let sentinels in.
///
/// With that it forgets its vote, as it has with its file: it might give it to a second sentinel in the same epoch, and both would fail
/// over. So it votes for itself, whom it does not make stand by that, in `voted`: the last epoch that any sentinel gave a vote in.
pub async fn monitor(
    (id, sentinel): (SentinelId, &mut Admin),
    master: &str,
    primary: SocketAddr,
    (quorum, voted): (u16, u64),
    login: Option<&Login>,
) -> Result<(), AdminError> {
    let (host, port, quorum) = (primary.ip().to_string(), primary.port().to_string(), quorum.to_string());
    let (down_after, failover) = (down_after(id).as_millis().to_string(), FAILOVER_TIMEOUT.as_millis().to_string());
    // It may watch nothing yet, which is an error that says so.
    let _: Result<(), _> = sentinel.ask("SENTINEL REMOVE", &[master]).await;
    let identity: String = sentinel.ask("SENTINEL MYID", &[]).await?;
    let _: () = sentinel.ask("SENTINEL MONITOR", &[master, &host, &port, &quorum]).await?;
    if voted > 0 {
        let vote = [host.as_str(), &port, &voted.to_string(), &identity];
        let _: (u8, String, i64) = sentinel.ask("SENTINEL IS-MASTER-DOWN-BY-ADDR", &vote).await?;
    }
    if let Some(Login { user, password }) = login {
        let _: () = sentinel.ask("SENTINEL SET", &[master, "auth-user", user, "auth-pass", password]).await?;
    }
    let settings = [master, "down-after-milliseconds", &down_after, "failover-timeout", &failover];
    sentinel.ask("SENTINEL SET", &settings).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_sentinels_take_a_primary_for_dead_at_the_same_moment() {
        // They look ten times a second.
        let looks = Duration::from_millis(100);
        for id in 0..7 {
            let (one, next) = (down_after(SentinelId(id)), down_after(SentinelId(id + 1)));
            assert!(one >= DOWN_AFTER && next >= one + 2 * looks, "{one:?} {next:?}");
        }
        // The one that makes the majority of three still decides in time.
        assert!(down_after(SentinelId(2)) <= DOWN_AFTER + Duration::from_millis(500));
    }
}
