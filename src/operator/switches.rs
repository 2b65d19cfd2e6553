//! Hears from sentinels that a primary has changed, so that it need not be asked for all the time.
//!
//! One sentinel of each tier is listened to: each of them tells of every change, as it learns of it. What is missed while a connection
//! is made anew, the operator's regular look finds.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use redis::Cmd;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::admin::{self, Entry, Keys, Login, Stream};
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
/// What is read at a time: a message is shorter. Hundreds of these connections stand, and say nothing nearly all the time.
const BUFFER_BYTES: usize = 256;
/// The longest line that is read.
const MAX_LINE_BYTES: u64 = 4096;

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
async fn listen_to(sentinel: SocketAddr, keys: &Keys, key: &Key, queue: &Queue, metrics: &Metrics) -> io::Result<()> {
    let subscribe = async {
        let (stream, _) = admin::open(sentinel, keys.entry().trust).await?;
        let mut stream = BufReader::with_capacity(BUFFER_BYTES, stream);
        stream.write_all(&subscription(keys.entry().login)).await?;
        stream.flush().await?;
        loop {
            match next_line(&mut stream).await? {
                line if line == "subscribe" => return Ok(stream),
                // The code alone: what follows may repeat what was sent.
                line if line.starts_with('-') => {
                    return Err(io::Error::other(line.split(' ').next().unwrap_or_default().to_owned()));
                }
                _ => {}
            }
        }
    };
    let mut stream = timeout(CONNECT_WITHIN, subscribe).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    while let Ok(line) = timeout(QUIET, next_line(&mut stream)).await {
        // The first word of each message; no other is so.
        if line? == "message" {
            debug!(%key, %sentinel, "the primary has changed");
            metrics.heard_switch();
            queue.add_urgent(key.clone());
        }
    }
    Ok(())
}

fn subscription(login: Option<&Login>) -> Vec<u8> {
    let mut commands = Vec::new();
    if let Some(Login { user, password }) = login {
        commands.extend(Cmd::new().arg("AUTH").arg(user).arg(password).get_packed_command());
    }
    commands.extend(Cmd::new().arg("SUBSCRIBE").arg(CHANNEL).get_packed_command());
    commands
}

/// The next line, without its end. Whoever gives it up in the middle gives the connection up.
async fn next_line(stream: &mut BufReader<Stream>) -> io::Result<String> {
    let mut line = String::new();
    stream.take(MAX_LINE_BYTES).read_line(&mut line).await?;
    match line.strip_suffix('\n') {
        Some(whole) => Ok(whole.trim_end_matches('\r').to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// The commands up to the subscription.
    async fn subscribed(stream: &mut TcpStream) -> String {
        let mut heard = Vec::new();
        while !heard.ends_with(b"$9\r\nSUBSCRIBE\r\n$14\r\n+switch-master\r\n") {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0, "{heard:?}");
        }
        String::from_utf8(heard).unwrap()
    }

    #[tokio::test]
    async fn a_switch_that_a_sentinel_tells_has_the_tier_looked_at() {
        let sentinel = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, queue) = (sentinel.local_addr().unwrap(), Queue::default());
        let login = Login { user: "larder-system".to_owned(), password: "secret".to_owned() };
        let key = Key { namespace: "store".to_owned(), name: "shop".to_owned() };
        let start = || Listener::start(vec![address], Entry::from(Some(&login)), key.clone(), queue.clone(), Arc::default());
        let looked_at = async || timeout(Duration::from_millis(200), queue.next()).await.ok().map(|turn| turn.key().clone());

        let refused = start();
        let (mut stream, _) = sentinel.accept().await.unwrap();
        let said = subscribed(&mut stream).await;
        assert!(said.starts_with("*3\r\n$4\r\nAUTH\r\n$13\r\nlarder-system\r\n$6\r\nsecret\r\n"), "{said}");
        stream.write_all(b"-WRONGPASS invalid\r\n-NOAUTH required\r\n").await.unwrap();
        assert_eq!(stream.read(&mut [0; 64]).await.unwrap_or_default(), 0, "it hangs up");
        assert_eq!(looked_at().await, None);
        drop(refused);

        let _heard = start();
        let (mut stream, _) = sentinel.accept().await.unwrap();
        subscribed(&mut stream).await;
        stream.write_all(b"+OK\r\n*3\r\n$9\r\nsubscribe\r\n$14\r\n+switch-master\r\n:1\r\n").await.unwrap();
        assert_eq!(looked_at().await, None, "nothing has changed yet");
        stream.write_all(b"*3\r\n$7\r\nmessage\r\n$14\r\n+switch-master\r\n$3\r\na b\r\n").await.unwrap();
        assert_eq!(timeout(Duration::from_secs(10), queue.next()).await.unwrap().key(), &key);
    }
}
