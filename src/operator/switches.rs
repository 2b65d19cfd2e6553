//! Hears from sentinels that a primary has changed, so that it need not be asked for all the time.
//!
//! One sentinel of each tier is listened to: each of them tells of every change, as it learns of it. What is missed while a connection
//! is made anew, the operator's regular look finds.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use redis::aio::PubSub;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::admin::{self, Entry, Keys};
use super::metrics::Metrics;
use super::queue::{Key, Queue};

/// What is subscribed to.
const CHANNEL: &str = "+switch-master";
/// How long a connection and the subscription may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// How long one connection is trusted that says nothing: a lost one may look just so.
const QUIET: Duration = Duration::from_secs(300);
/// The pauses between attempts, at the least and at the most.
const PAUSES_MS: std::ops::Range<u64> = 1000..5000;

/// A listener. It ends when it is dropped.
#[derive(Debug)]
pub struct Listener {
    sentinels: Vec<SocketAddr>,
    keys: Keys,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens to one of the sentinels, whichever can be reached, and has `key` looked at when it tells of another primary.
    pub fn start(sentinels: Vec<SocketAddr>, entry: Entry<'_>, key: Key, queue: Queue, metrics: Arc<Metrics>) -> Self {
        let keys = Keys::from(entry);
        let task = tokio::spawn(listen(sentinels.clone(), keys.clone(), key, queue, metrics));
        Self { sentinels, keys, task }
    }

    /// Whether it listens to these sentinels, and is let in so.
    pub fn is_for(&self, sentinels: &[SocketAddr], entry: Entry<'_>) -> bool {
        self.sentinels == sentinels && self.keys.entry() == entry
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(sentinels: Vec<SocketAddr>, keys: Keys, key: Key, queue: Queue, metrics: Arc<Metrics>) {
    let start = fastrand::usize(..sentinels.len().max(1));
    for sentinel in sentinels.iter().cycle().skip(start) {
        if let Err(error) = listen_to(*sentinel, &keys, &key, &queue, &metrics).await {
            debug!(%key, %sentinel, %error, "a sentinel is not heard");
        }
        sleep(Duration::from_millis(fastrand::u64(PAUSES_MS))).await;
    }
}

/// Returns when nothing more is heard.
async fn listen_to(
    sentinel: SocketAddr,
    keys: &Keys,
    key: &Key,
    queue: &Queue,
    metrics: &Metrics,
) -> Result<(), redis::RedisError> {
    let subscribe = async {
        let (stream, _) = admin::open(sentinel, keys.entry().trust).await?;
        let mut messages = PubSub::new(&admin::settings(keys.entry().login), stream).await?;
        messages.subscribe(CHANNEL).await?;
        Ok::<_, redis::RedisError>(messages)
    };
    let late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
    let mut messages = timeout(CONNECT_WITHIN, subscribe).await.map_err(|_| late())??.into_on_message();
    while let Ok(Some(_)) = timeout(QUIET, messages.next()).await {
        debug!(%key, %sentinel, "the primary has changed");
        metrics.heard_switch();
        queue.add_urgent(key.clone());
    }
    Ok(())
}
