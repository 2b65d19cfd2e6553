//! How a sentinel is told which primary to watch, by either actuator.

use std::net::SocketAddr;

use super::build::{DOWN_AFTER, FAILOVER_TIMEOUT};
use crate::operator::admin::{Admin, AdminError, Login};

/// Makes a sentinel watch `primary` under the name `master`, and nothing else under it. `login` is how the servers let sentinels in.
pub async fn monitor(
    sentinel: &mut Admin,
    master: &str,
    primary: SocketAddr,
    quorum: u16,
    login: Option<&Login>,
) -> Result<(), AdminError> {
    let (host, port, quorum) = (primary.ip().to_string(), primary.port().to_string(), quorum.to_string());
    let (down_after, failover) = (DOWN_AFTER.as_millis().to_string(), FAILOVER_TIMEOUT.as_millis().to_string());
    // It may watch nothing yet, which is an error that says so.
    let _: Result<(), _> = sentinel.ask("SENTINEL REMOVE", &[master]).await;
    let _: () = sentinel.ask("SENTINEL MONITOR", &[master, &host, &port, &quorum]).await?;
    if let Some(Login { user, password }) = login {
        let _: () = sentinel.ask("SENTINEL SET", &[master, "auth-user", user, "auth-pass", password]).await?;
    }
    let settings = [master, "down-after-milliseconds", &down_after, "failover-timeout", &failover];
    sentinel.ask("SENTINEL SET", &settings).await
}
