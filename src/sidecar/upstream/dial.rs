//! Makes a connection to a server: TCP, TLS, login, and the first proof that the server can serve.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::access::{Access, Keys};
use super::admin_client::{ReplyError, Value, ask};
use super::node::NodeAddr;
use crate::sidecar::resp::Protocol;

/// The longest text of a server's error that an error of ours repeats.
const MAX_ERROR_CHARS: usize = 200;
/// The most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Finds a peer that vanished without a word while nothing is asked of it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// What a server says of itself when a connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Primary,
    /// It follows a primary.
    Replica,
    /// It is a sentinel, or something else that keeps no data.
    Other,
}

/// What a server says when a connection begins.
#[derive(Debug, Clone, Copy)]
struct Greeting {
    role: Role,
    /// What it calls the connection. Zero where it does not say.
    number: i64,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no address.
    #[error("{node}: the name cannot be resolved: {source}")]
    Resolve {
        /// Whom.
        node: NodeAddr,
        /// Why.
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("{node}: the connection was refused")]
    Refused {
        /// Whom.
        node: NodeAddr,
    },
    /// The network failed in another way.
    #[error("{node}: {source}")]
    Io {
        /// Whom.
        node: NodeAddr,
        /// How.
        source: io::Error,
    },
    /// The deadline passed.
    #[error("{node}: no answer in time while {stage}")]
    Timeout {
        /// Whom.
        node: NodeAddr,
        /// Doing what.
        stage: &'static str,
    },
    /// TLS failed: a certificate, a name, or a peer without TLS.
    #[error("{node}: TLS failed: {source}")]
    Tls {
        /// Whom.
        node: NodeAddr,
        /// How.
        source: io::Error,
    },
    /// The login failed.
    #[error("{node}: the login failed: {failure}")]
    Auth {
        /// Whom.
        node: NodeAddr,
        /// How.
        failure: AuthFailure,
    },
    /// The server is reading its data.
    #[error("{node}: the server is still loading its data")]
    Loading {
        /// Whom.
        node: NodeAddr,
    },
    /// The server is a replica that lost its primary and serves nothing.
    #[error("{node}: the server is a replica without a primary")]
    MasterDown {
        /// Whom.
        node: NodeAddr,
    },
    /// A primary was wanted.
    #[error("{node}: the server is no primary")]
    NotPrimary {
        /// Whom.
        node: NodeAddr,
    },
    /// The server answered with another error.
    #[error("{node}: the server said `{text}`")]
    Server {
        /// Whom.
        node: NodeAddr,
        /// Its words, shortened.
        text: String,
    },
    /// What answers does not speak the protocol.
    #[error("{node}: {source}")]
    Protocol {
        /// Whom.
        node: NodeAddr,
        /// How.
        source: ReplyError,
    },
}

impl DialError {
    /// What clients are told of it: not where.
    pub fn told(&self) -> String {
        match self {
            Self::Resolve { .. } => "the server's name cannot be resolved".to_owned(),
            Self::Refused { .. } => "the server refused the connection".to_owned(),
            Self::Io { .. } => "the network failed".to_owned(),
            Self::Timeout { stage, .. } => format!("the server did not answer in time while {stage}"),
            Self::Tls { .. } => "TLS with the server failed".to_owned(),
            Self::Auth { failure, .. } => format!("the sidecar's login failed: {failure}"),
            Self::Loading { .. } => "the server is still loading its data".to_owned(),
            Self::MasterDown { .. } => "the server is a replica without a primary".to_owned(),
            Self::NotPrimary { .. } => "the server is no primary".to_owned(),
            Self::Server { .. } | Self::Protocol { .. } => "the server does not take the sidecar's connection".to_owned(),
        }
    }
}

/// How a login failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthFailure {
    /// `WRONGPASS`.
    #[error("the user or the password is wrong, or the user is disabled")]
    WrongPassword,
    /// `NOAUTH`.
    #[error("the server wants a user and a password, and none are configured")]
    Required,
    /// `NOPERM`.
    #[error("the user may not run what the sidecar needs")]
    NotPermitted,
}

/// A connection that has logged in. Reads and writes go straight to the inner stream.
#[derive(Debug)]
pub enum Link {
    /// Plain.
    Tcp(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Link {
    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

impl AsyncRead for Link {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Link {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    #[inline]
    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Connects to `node`, encrypts and logs in with the newest keys of `access`, and asks whether the server can serve (it refuses
/// while it loads or lacks its primary). Nothing else is sent: the connection is as new. With what the server calls it.
pub async fn dial(node: &NodeAddr, access: &Access, protocol: Protocol, deadline: Instant) -> Result<(Link, i64), DialError> {
    dial_with(node, access, protocol, Probe::Ping, deadline).await.map(|(link, greeting)| (link, greeting.number))
}

/// As [`dial`], and the server has said that it is a primary. For topologies in which an address may outlive a role.
pub async fn dial_primary(
    node: &NodeAddr,
    access: &Access,
    protocol: Protocol,
    deadline: Instant,
) -> Result<(Link, i64), DialError> {
    match dial_with(node, access, protocol, Probe::Ping, deadline).await? {
        (link, Greeting { role: Role::Primary, number }) => Ok((link, number)),
        _ => Err(DialError::NotPrimary { node: node.clone() }),
    }
}

/// Connects to a server or a sentinel only to ask it about the topology: it may be loading, and have any role.
pub async fn dial_any(node: &NodeAddr, access: &Access, deadline: Instant) -> Result<(Link, Role), DialError> {
    dial_with(node, access, Protocol::Resp2, Probe::None, deadline).await.map(|(link, greeting)| (link, greeting.role))
}

async fn dial_with(
    node: &NodeAddr,
    access: &Access,
    protocol: Protocol,
    probe: Probe,
    deadline: Instant,
) -> Result<(Link, Greeting), DialError> {
    let keys = access.current();
    let link = connect(node, &keys, deadline).await?;
    within(deadline, node, "logging in", log_in(link, node, &keys, protocol, probe)).await
}

async fn within<T>(
    deadline: Instant,
    node: &NodeAddr,
    stage: &'static str,
    work: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    timeout_at(deadline, work).await.unwrap_or_else(|_| Err(DialError::Timeout { node: node.clone(), stage }))
}

async fn connect(node: &NodeAddr, keys: &Keys, deadline: Instant) -> Result<Link, DialError> {
    let resolve = async {
        let found = tokio::net::lookup_host((node.host(), node.port())).await;
        found.map(|found| found.take(MAX_ADDRESSES).collect()).map_err(|source| DialError::Resolve { node: node.clone(), source })
    };
    let addresses: Vec<SocketAddr> = within(deadline, node, "resolving the name", resolve).await?;
    let tcp = connect_first(node, &addresses, deadline).await?;
    set_options(&tcp).map_err(|source| DialError::Io { node: node.clone(), source })?;
    let Some(tls) = &keys.tls else { return Ok(Link::Tcp(tcp)) };
    let shake_hands = async {
        let name = match &tls.server_name {
            Some(name) => Ok(name.clone()),
            None => ServerName::try_from(node.host().to_owned()).map_err(io::Error::other),
        };
        let stream = async { TlsConnector::from(tls.config.clone()).connect(name?, tcp).await }.await;
        stream.map(|stream| Link::Tls(Box::new(stream))).map_err(|source| DialError::Tls { node: node.clone(), source })
    };
    within(deadline, node, "agreeing on TLS", shake_hands).await
}

/// Tries the addresses in turn. Each gets an even share of the time that is left, so that a dead one starves no other.
async fn connect_first(node: &NodeAddr, addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, DialError> {
    let missing = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut failure = DialError::Resolve { node: node.clone(), source: missing };
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - tried) as u32;
        failure = match timeout_at(Instant::now() + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => DialError::Refused { node: node.clone() },
            Ok(Err(source)) => DialError::Io { node: node.clone(), source },
            Err(_) => DialError::Timeout { node: node.clone(), stage: "connecting" },
        };
    }
    Err(failure)
}

fn set_options(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

/// What is asked after the login.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// PING, which only a server that can serve answers.
    Ping,
    None,
}

/// HELLO does it all in one round trip: protocol, login, and the server's own word on its role.
async fn log_in(
    link: Link,
    node: &NodeAddr,
    keys: &Keys,
    protocol: Protocol,
    probe: Probe,
) -> Result<(Link, Greeting), DialError> {
    let mut hello: Vec<&[u8]> = vec![b"HELLO", version(protocol)];
    if let Some(credentials) = &keys.credentials {
        hello.extend_from_slice(&[b"AUTH", credentials.user().as_bytes(), credentials.password()]);
    }
    let commands: &[&[&[u8]]] = if probe == Probe::Ping { &[&hello, &[b"PING"]] } else { &[&hello] };
    let mut stream = BufReader::with_capacity(1024, link);
    let replies = ask(&mut stream, commands).await.map_err(|error| from_reply_error(node, error))?;
    let greeting = match replies.first() {
        Some(Value::Error(text)) => return Err(from_error_line(node, text)),
        Some(hello) => Greeting { role: read_role(hello), number: read_number(hello) },
        None => Greeting { role: Role::Other, number: 0 },
    };
    match replies.get(1) {
        // A user who may not PING has logged in, and the server serves.
        Some(Value::Error(text)) if !text.starts_with("NOPERM") => return Err(from_error_line(node, text)),
        _ => {}
    }
    if !stream.buffer().is_empty() {
        return Err(DialError::Protocol { node: node.clone(), source: ReplyError::NotResp });
    }
    Ok((stream.into_inner(), greeting))
}

const fn version(protocol: Protocol) -> &'static [u8] {
    match protocol {
        Protocol::Resp2 => b"2",
        Protocol::Resp3 => b"3",
    }
}

fn read_role(hello: &Value) -> Role {
    match hello.field("role").and_then(Value::as_str) {
        Some("master" | "primary") => Role::Primary,
        Some("replica" | "slave") => Role::Replica,
        _ => Role::Other,
    }
}

fn read_number(hello: &Value) -> i64 {
    hello.field("id").and_then(Value::as_int).unwrap_or_default()
}

fn from_reply_error(node: &NodeAddr, error: ReplyError) -> DialError {
    let node = node.clone();
    match error {
        ReplyError::Io(source) => DialError::Io { node, source },
        source => DialError::Protocol { node, source },
    }
}

fn from_error_line(node: &NodeAddr, text: &str) -> DialError {
    let node = node.clone();
    let auth = |node, failure| DialError::Auth { node, failure };
    match text.split(' ').next().unwrap_or_default() {
        "WRONGPASS" => auth(node, AuthFailure::WrongPassword),
        "NOAUTH" => auth(node, AuthFailure::Required),
        "NOPERM" => auth(node, AuthFailure::NotPermitted),
        "LOADING" => DialError::Loading { node },
        "MASTERDOWN" => DialError::MasterDown { node },
        _ => DialError::Server { node, text: text.chars().take(MAX_ERROR_CHARS).collect() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::upstream::access::Credentials;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Dials a server that reads one request, says `reply` and keeps the connection open.
    async fn against(reply: &'static [u8], protocol: Protocol) -> (Result<Link, DialError>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let node = NodeAddr::new("127.0.0.1", listener.local_addr().unwrap().port());
        let server = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let length = peer.read(&mut request).await.unwrap();
            request.truncate(length);
            peer.write_all(reply).await.unwrap();
            (request, peer)
        });
        let credentials = Credentials::parse(Some(b"shop"), b"pw").unwrap();
        let access = Access::fixed(Keys { credentials: Some(credentials), tls: None });
        let result = dial_primary(&node, &access, protocol, Instant::now() + Duration::from_secs(5)).await;
        (result.map(|(link, _)| link), server.await.unwrap().0)
    }

    #[tokio::test]
    async fn one_round_trip_logs_in_and_proves_the_role() {
        let (link, request) = against(b"%1\r\n$4\r\nrole\r\n$6\r\nmaster\r\n+PONG\r\n", Protocol::Resp3).await;
        assert!(matches!(link, Ok(Link::Tcp(_))), "{link:?}");
        let wanted = "*5\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n$4\r\nshop\r\n$2\r\npw\r\n*1\r\n$4\r\nPING\r\n";
        assert_eq!(String::from_utf8(request).unwrap(), wanted);
    }

    #[tokio::test]
    async fn each_refusal_has_its_own_error() {
        let master = |rest: &str| format!("*2\r\n$4\r\nrole\r\n$6\r\nmaster\r\n{rest}");
        type Check = fn(&DialError) -> bool;
        let cases: [(String, Check); 7] = [
            ("-WRONGPASS invalid\r\n-NOAUTH\r\n".into(), |e| {
                matches!(e, DialError::Auth { failure: AuthFailure::WrongPassword, .. })
            }),
            (master("-LOADING Redis is loading\r\n"), |e| matches!(e, DialError::Loading { .. })),
            (master("-MASTERDOWN Link\r\n"), |e| matches!(e, DialError::MasterDown { .. })),
            ("*2\r\n$4\r\nrole\r\n$7\r\nreplica\r\n+PONG\r\n".into(), |e| matches!(e, DialError::NotPrimary { .. })),
            ("-ERR max number of clients reached\r\n+PONG\r\n".into(), |e| matches!(e, DialError::Server { .. })),
            ("HTTP/1.1 400 Bad Request\r\n".into(), |e| matches!(e, DialError::Protocol { .. })),
            (master("+PONG\r\n+more\r\n"), |e| matches!(e, DialError::Protocol { .. })),
        ];
        for (reply, is_right) in cases {
            let reply: &'static str = reply.leak();
            let error = against(reply.as_bytes(), Protocol::Resp2).await.0.expect_err(reply);
            assert!(is_right(&error), "{reply:?}: {error:?}");
            assert!(!error.to_string().contains("pw"));
        }
    }

    #[tokio::test]
    async fn nobody_there_and_nobody_answering_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let node = NodeAddr::new("127.0.0.1", listener.local_addr().unwrap().port());
        let access = Access::fixed(Keys::default());
        let soon = || Instant::now() + Duration::from_millis(50);
        let silent = dial(&node, &access, Protocol::Resp2, soon()).await;
        assert!(matches!(silent, Err(DialError::Timeout { stage: "logging in", .. })), "{silent:?}");
        drop(listener);
        let refused = dial(&node, &access, Protocol::Resp2, Instant::now() + Duration::from_secs(5)).await;
        assert!(matches!(refused, Err(DialError::Refused { .. })), "{refused:?}");
    }
}
