//! Listens on the sentinels for `+switch-master`, which tells of a failover the moment it is decided.
//!
//! An event only asks for a round; the round decides. So a false or late event costs a few questions and nothing else.

use std::collections::HashMap;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::{ANSWER_LIMIT, Refresh, doubled, jittered};
use crate::sidecar::resp::encode;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::{ReplyError, Value, read_value};
use crate::sidecar::upstream::dial::dial_any;
use crate::sidecar::upstream::node::NodeAddr;

/// The most sentinels that are listened to. One would do; several outlive it.
const MAX_SUBSCRIPTIONS: usize = 5;
/// How often a silent sentinel is asked whether it is still there, and for how long silence is taken for life.
const PING_EVERY: Duration = Duration::from_secs(5);
const SILENCE_LIMIT: Duration = Duration::from_secs(12);
const FIRST_BACK_OFF: Duration = Duration::from_millis(200);
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

/// One task for each sentinel that is listened to. Dropping it ends them.
pub struct Subscriptions {
    master: String,
    access: Access,
    refresh: Refresh,
    tasks: HashMap<NodeAddr, AbortHandle>,
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

impl Subscriptions {
    pub fn new(master: String, access: Access, refresh: Refresh) -> Self {
        Self { master, access, refresh, tasks: HashMap::new() }
    }

    /// Listens to the first of `sentinels` and to no others.
    pub fn keep(&mut self, sentinels: &[NodeAddr]) {
        let wanted = &sentinels[..sentinels.len().min(MAX_SUBSCRIPTIONS)];
        self.tasks.retain(|sentinel, task| {
            let stays = wanted.contains(sentinel);
            if !stays {
                task.abort();
            }
            stays
        });
        for sentinel in wanted {
            self.tasks.entry(sentinel.clone()).or_insert_with(|| {
                let listening = listen(sentinel.clone(), self.master.clone(), self.access.clone(), self.refresh.clone());
                tokio::spawn(listening).abort_handle()
            });
        }
    }
}

/// Listens for ever, over as many connections as it takes.
async fn listen(sentinel: NodeAddr, master: String, access: Access, refresh: Refresh) {
    let mut failures = 0;
    loop {
        match dial_any(&sentinel, &access, Instant::now() + ANSWER_LIMIT).await {
            Ok((link, _)) => {
                // What happened while nobody listened is asked for.
                if failures > 0 {
                    refresh.request();
                }
                let since = Instant::now();
                let error = listen_on(link, &master, &refresh).await;
                debug!(%sentinel, %error, "a subscription ended");
                failures = if since.elapsed() > SILENCE_LIMIT { 1 } else { failures + 1 };
            }
            Err(error) => {
                debug!(%error, "a sentinel cannot be listened to");
                failures += 1;
            }
        }
        tokio::time::sleep(jittered(doubled(FIRST_BACK_OFF, failures - 1, MAX_BACK_OFF))).await;
    }
}

/// Listens until the connection fails, and says how.
async fn listen_on(link: impl AsyncRead + AsyncWrite, master: &str, refresh: &Refresh) -> ReplyError {
    let (read_half, mut write_half) = tokio::io::split(link);
    let pings = async {
        let (mut subscribe, mut ping) = (Vec::new(), Vec::new());
        encode::command(&mut subscribe, &["SUBSCRIBE", "+switch-master"]);
        encode::command(&mut ping, &["PING"]);
        let mut next = &subscribe;
        loop {
            if let Err(error) = write_half.write_all(next).await {
                return error.into();
            }
            next = &ping;
            tokio::time::sleep(PING_EVERY).await;
        }
    };
    let events = async {
        let mut reader = BufReader::with_capacity(1024, read_half);
        loop {
            match timeout(SILENCE_LIMIT, read_value(&mut reader)).await {
                Ok(Ok(Value::Error(_))) => return ReplyError::NotResp,
                Ok(Ok(message)) if is_switch(&message, master) => refresh.request(),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error,
                Err(_) => return std::io::Error::from(std::io::ErrorKind::TimedOut).into(),
            }
        }
    };
    tokio::select! {
        error = pings => error,
        error = events => error,
    }
}

/// Whether a message is `+switch-master MASTER …`.
fn is_switch(message: &Value, master: &str) -> bool {
    match message.as_list() {
        Some([kind, _channel, body]) if kind.as_str() == Some("message") => {
            body.as_str().and_then(|body| body.split(' ').next()) == Some(master)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn only_a_switch_of_the_own_primary_wakes() {
        let (near, mut far) = tokio::io::duplex(4096);
        let refresh = Refresh::default();
        let listening = {
            let refresh = refresh.clone();
            tokio::spawn(async move { listen_on(near, "main", &refresh).await.to_string() })
        };
        let mut subscribe = vec![0; 40];
        far.read_exact(&mut subscribe).await.unwrap();
        assert_eq!(subscribe, b"*2\r\n$9\r\nSUBSCRIBE\r\n$14\r\n+switch-master\r\n");
        let message = |body: &str| {
            let mut out = Vec::new();
            encode::command(&mut out, &["message", "+switch-master", body]);
            out
        };
        far.write_all(&message("mainly 10.0.0.1 1 10.0.0.2 1")).await.unwrap();
        assert!(timeout(Duration::from_millis(50), refresh.0.wake.notified()).await.is_err());
        far.write_all(&message("main 10.0.0.1 1 10.0.0.2 1")).await.unwrap();
        timeout(Duration::from_secs(10), refresh.0.wake.notified()).await.expect("it wakes");
        drop(far);
        let ended = timeout(Duration::from_secs(10), listening).await.expect("it ends").unwrap();
        assert!(ended.contains("failed"), "{ended}");
    }
}
