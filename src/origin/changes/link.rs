//! A connection that speaks replication: its beginning, and the frames of its messages.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use futures_util::FutureExt as _;
use rustls::pki_types::ServerName;
use sqlx::postgres::PgSslMode;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::address::Address;
use super::scram::{self, Exchange};
use super::tls;
use super::wire::{self, Refusal, Said, WireError};
use crate::origin::error::Failure;

/// The largest message that is taken. A larger one of a stream is passed over, which its reader is told.
pub const MOST_BYTES: usize = 16 * 1024 * 1024;
/// How much is read at once.
const READ_AT_ONCE: usize = 64 * 1024;
/// What a message has before its body: its kind, and its length without the kind.
const HEAD: usize = 5;
/// How long a message to the server may take to leave.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// What a server says of what a login may not do.
const FORBIDDEN: &str = "42501";

/// Settings under which values are written as loads see them.
const SETTINGS: [(&str, &str); 6] = [
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
];

/// What carries the bytes.
trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// The connection.
pub struct Link {
    socket: Box<dyn Duplex>,
    buffer: Vec<u8>,
    /// Where in the buffer the next message begins.
    begin: usize,
    /// How much of a message that is too large is still to come.
    skip: usize,
}

/// One message, within the buffer.
pub enum Frame {
    /// Its kind, and where its body is.
    Whole(u8, Range<usize>),
    /// It was too large, and is gone.
    TooLarge,
}

impl Link {
    /// Connects, and logs in for replication.
    pub async fn open(address: &Address) -> Result<Self, Failure> {
        let mut link = Self { socket: dial(address).await?, buffer: Vec::new(), begin: 0, skip: 0 };
        link.log_in(address).await?;
        Ok(link)
    }

    async fn log_in(&mut self, address: &Address) -> Result<(), Failure> {
        let options = &address.options;
        let mut parameters =
            vec![("user", options.get_username()), ("database", address.database()), ("replication", "database")];
        parameters.push(("application_name", options.get_application_name().unwrap_or("larder")));
        parameters.extend(options.get_options().map(|options| ("options", options)));
        parameters.extend(SETTINGS);
        self.send(&wire::startup(&parameters)).await?;
        let password = address
            .password
            .as_deref()
            .ok_or_else(|| Failure::Unusable("it wants a password: write one into the url".to_owned()));
        let mut exchange = None;
        loop {
            let answer = match self.said().await? {
                Said::Ready => return Ok(()),
                Said::Refuses(refusal) if refusal.code == FORBIDDEN => {
                    let (text, login) = (&refusal.text, options.get_username());
                    return Err(Failure::Unusable(format!(
                        "{text} (SQLSTATE {FORBIDDEN}): a login that follows changes may replicate: ALTER ROLE {login} REPLICATION"
                    )));
                }
                Said::Refuses(refusal) => return Err(refused(&refusal)),
                Said::WantsPassword => wire::password(password.clone()?),
                Said::WantsSasl(mechanisms) if mechanisms.contains(&scram::MECHANISM) => {
                    let begun = Exchange::new(password.clone()?, nonce()?);
                    let first = wire::sasl_initial(scram::MECHANISM, &begun.first());
                    exchange = Some(begun);
                    first
                }
                Said::SaslContinue(message) => {
                    let exchange = exchange.as_mut().ok_or(WireError("an exchange that was not begun")).map_err(unspoken)?;
                    wire::sasl_response(&exchange.answer(message).map_err(unspoken)?)
                }
                Said::SaslFinal(message) => {
                    let exchange = exchange.as_ref().ok_or(WireError("an exchange that was not begun")).map_err(unspoken)?;
                    exchange.check(message).map_err(unspoken)?;
                    continue;
                }
                Said::WantsSasl(_) | Said::WantsOther(_) => {
                    let why =
                        "it wants another proof than a password by SCRAM-SHA-256: let the login have one (password_encryption)";
                    return Err(Failure::Unusable(why.to_owned()));
                }
                _ => continue,
            };
            self.send(&answer).await?;
        }
    }

    /// Runs a command, and gives its rows.
    pub async fn rows(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, Failure> {
        self.send(&wire::query(command)).await?;
        let mut rows = Vec::new();
        loop {
            match self.said().await? {
                Said::Ready => return Ok(rows),
                Said::Refuses(refusal) => return Err(refused(&refusal)),
                Said::Row(cells) => rows.push(cells.into_iter().map(|cell| cell.map(str::to_owned)).collect()),
                _ => {}
            }
        }
    }

    /// Waits for a message that is small.
    pub async fn said(&mut self) -> Result<Said<'_>, Failure> {
        match self.frame().await? {
            Frame::Whole(kind, body) => Said::parse(kind, &self.buffer[body]).map_err(unspoken),
            Frame::TooLarge => Err(unspoken(WireError("a message that is too large"))),
        }
    }

    /// What stands in the buffer there.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer.get(range).unwrap_or_default()
    }

    /// Waits for a message. What was given before is gone then. May be cancelled: nothing is lost.
    pub async fn frame(&mut self) -> Result<Frame, Failure> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return Ok(frame);
            }
            self.fill().await?;
        }
    }

    /// Whether a message is there already, without waiting for one.
    pub fn has_frame(&mut self) -> bool {
        // An error is told of by whoever waits for the message.
        while !self.is_whole() {
            match self.fill().now_or_never() {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return false,
            }
        }
        true
    }

    fn is_whole(&self) -> bool {
        let waiting = &self.buffer[self.begin..];
        match self.skip {
            0 => length_of(waiting).is_some_and(|length| waiting.len() > length || length > MOST_BYTES),
            more => waiting.len() >= more,
        }
    }

    /// The message at the beginning of the buffer, where it is whole.
    fn next_frame(&mut self) -> Result<Option<Frame>, Failure> {
        if self.skip == 0 {
            let waiting = &self.buffer[self.begin..];
            let (Some(kind), Some(length)) = (waiting.first().copied(), length_of(waiting)) else { return Ok(None) };
            if length < HEAD - 1 || (length > MOST_BYTES && kind != b'd') {
                return Err(unspoken(WireError("a message of an impossible length")));
            }
            if length <= MOST_BYTES {
                let whole = waiting.len() > length;
                let body = self.begin + HEAD..self.begin + 1 + length;
                return Ok(whole.then(|| {
                    self.begin = body.end;
                    Frame::Whole(kind, body)
                }));
            }
            self.skip = length + 1;
        }
        let gone = self.skip.min(self.buffer.len() - self.begin);
        (self.begin, self.skip) = (self.begin + gone, self.skip - gone);
        Ok((self.skip == 0).then_some(Frame::TooLarge))
    }

    /// Reads what comes next.
    async fn fill(&mut self) -> Result<(), Failure> {
        self.buffer.drain(..self.begin);
        self.begin = 0;
        self.buffer.reserve(READ_AT_ONCE);
        match self.socket.read_buf(&mut self.buffer).await {
            Ok(0) => Err(Failure::Unreachable("the server closed the connection".to_owned())),
            Ok(_) => Ok(()),
            Err(error) => Err(broken(&error)),
        }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        let sent = timeout(SEND_LIMIT, async {
            self.socket.write_all(message).await?;
            self.socket.flush().await
        });
        sent.await.map_err(|_| Failure::Unreachable("the server takes no more".to_owned()))?.map_err(|error| broken(&error))
    }
}

/// The length of a message without its kind, where it is there.
fn length_of(waiting: &[u8]) -> Option<usize> {
    let length = waiting.get(1..HEAD)?.first_chunk()?;
    usize::try_from(u32::from_be_bytes(*length)).ok()
}

async fn dial(address: &Address) -> Result<Box<dyn Duplex>, Failure> {
    if let Some(path) = address.socket() {
        return Ok(Box::new(UnixStream::connect(path).await.map_err(|error| broken(&error))?));
    }
    let mut socket = TcpStream::connect((address.host(), address.options.get_port())).await.map_err(|error| broken(&error))?;
    socket.set_nodelay(true).map_err(|error| broken(&error))?;
    let mode = address.options.get_ssl_mode();
    if matches!(mode, PgSslMode::Disable | PgSslMode::Allow) {
        return Ok(Box::new(socket));
    }
    socket.write_all(&wire::SSL_REQUEST).await.map_err(|error| broken(&error))?;
    let insecure =
        |why: &dyn std::fmt::Display| Failure::Unreachable(format!("TLS failed: {why}: check sslmode and the certificates"));
    match socket.read_u8().await.map_err(|error| broken(&error))? {
        b'S' => {
            let config = tls::config(mode, &address.files).await.map_err(|why| insecure(&why))?;
            let name = ServerName::try_from(address.host().to_owned()).map_err(|why| insecure(&why))?;
            let connector = TlsConnector::from(Arc::new(config));
            Ok(Box::new(connector.connect(name, socket).await.map_err(|why| insecure(&why))?))
        }
        b'N' if matches!(mode, PgSslMode::Prefer) => Ok(Box::new(socket)),
        _ => Err(insecure(&"the server does not offer it")),
    }
}

fn nonce() -> Result<String, Failure> {
    let random = ring::rand::generate::<[u8; 18]>(&ring::rand::SystemRandom::new());
    let random = random.map_err(|_| Failure::Unusable("the system has no random numbers".to_owned()))?;
    Ok(BASE64_STANDARD.encode(random.expose()))
}

fn broken(error: &io::Error) -> Failure {
    Failure::Unreachable(error.kind().to_string())
}

fn unspoken(error: impl std::fmt::Display) -> Failure {
    Failure::Unreachable(error.to_string())
}

/// What an error of the server's means. Its words name slots, publications and logins here, never values.
pub fn refused(refusal: &Refusal) -> Failure {
    let why = format!("{} (SQLSTATE {})", refusal.text, refusal.code);
    match refusal.code.get(..2) {
        Some("08" | "28" | "40" | "53" | "55" | "57" | "58" | "XX") => Failure::Failed { why, retry: true, retry_after: None },
        _ => Failure::Unusable(why),
    }
}
