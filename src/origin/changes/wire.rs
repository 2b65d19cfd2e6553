//! Postgres' protocol, as far as replication needs it: messages in both directions. Pure.
//!
//! As in [Postgres' documentation](https://www.postgresql.org/docs/current/protocol-message-formats.html).

use super::pgoutput::Lsn;

/// Asks for TLS before anything else is said. The answer is one byte.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
/// Version 3.0 of the protocol.
const VERSION: u32 = 3 << 16;
/// The longest text of a server's that is repeated.
const MOST_TEXT_CHARS: usize = 300;

/// A server sent what the protocol does not have at this place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server does not speak the protocol: {0}")]
pub struct WireError(pub &'static str);

/// The first message: who asks for what, and the settings of the session.
pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = VERSION.to_be_bytes().to_vec();
    for text in parameters.iter().flat_map(|(name, value)| [name, value]) {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    let mut message = (u32_of(body.len()) + 4).to_be_bytes().to_vec();
    message.append(&mut body);
    message
}

/// Any later message.
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend_from_slice(&(u32_of(body.len()) + 4).to_be_bytes());
    message.extend_from_slice(body);
    message
}

/// A statement, or a command of replication.
pub fn query(text: &str) -> Vec<u8> {
    message(b'Q', &zero_ended(text))
}

/// A password as it is.
pub fn password(text: &str) -> Vec<u8> {
    message(b'p', &zero_ended(text))
}

/// The first answer in a SASL exchange.
pub fn sasl_initial(mechanism: &str, response: &str) -> Vec<u8> {
    let mut body = zero_ended(mechanism);
    body.extend_from_slice(&u32_of(response.len()).to_be_bytes());
    body.extend_from_slice(response.as_bytes());
    message(b'p', &body)
}

/// A later one.
pub fn sasl_response(response: &str) -> Vec<u8> {
    message(b'p', response.as_bytes())
}

/// How far the stream was read, and up to where it is not needed any more. `time`: microseconds since 2000-01-01. With `reply`, the server
/// answers at once.
pub fn status(read: Lsn, done: Lsn, time: i64, reply: bool) -> Vec<u8> {
    let mut body = vec![b'r'];
    for place in [read, done, done] {
        body.extend_from_slice(&place.get().to_be_bytes());
    }
    body.extend_from_slice(&time.to_be_bytes());
    body.push(u8::from(reply));
    message(b'd', &body)
}

fn zero_ended(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn u32_of(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX - 4)
}

/// What a server says, without its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said<'a> {
    /// Who one is, is clear.
    LoggedIn,
    /// It wants a password as it is.
    WantsPassword,
    /// It wants one of these exchanges.
    WantsSasl(Vec<&'a str>),
    /// The exchange goes on with this.
    SaslContinue(&'a str),
    /// It ends with this.
    SaslFinal(&'a str),
    /// It wants another proof, by its number.
    WantsOther(u32),
    /// It refuses.
    Refuses(Refusal),
    /// A row of an answer: what can be read as text.
    Row(Vec<Option<&'a str>>),
    /// It waits for the next command.
    Ready,
    /// The stream begins.
    StreamBegins,
    /// A piece of the stream.
    Piece(&'a [u8]),
    /// The stream ends.
    StreamEnds,
    /// What nobody here needs: notices, settings, the end of a command.
    Other,
}

/// An error of the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its SQLSTATE.
    pub code: String,
    /// Its words, shortened.
    pub text: String,
}

impl<'a> Said<'a> {
    /// Reads the message of this kind.
    ///
    /// # Errors
    /// It has another form.
    pub fn parse(kind: u8, body: &'a [u8]) -> Result<Self, WireError> {
        Ok(match kind {
            b'R' => return authentication(body),
            b'E' => Self::Refuses(refusal(body)),
            b'D' => Self::Row(row(body).ok_or(WireError("a row that ends too early"))?),
            b'Z' => Self::Ready,
            b'W' => Self::StreamBegins,
            b'd' => Self::Piece(body),
            b'c' => Self::StreamEnds,
            _ => Self::Other,
        })
    }
}

fn authentication(body: &[u8]) -> Result<Said<'_>, WireError> {
    let wrong = WireError("a question for a proof that has another form");
    let (number, rest) = body.split_first_chunk().ok_or(wrong.clone())?;
    let text = |bytes| std::str::from_utf8(bytes).map_err(|_| wrong.clone());
    Ok(match u32::from_be_bytes(*number) {
        0 => Said::LoggedIn,
        3 => Said::WantsPassword,
        10 => Said::WantsSasl(text(rest)?.split('\0').filter(|name| !name.is_empty()).collect()),
        11 => Said::SaslContinue(text(rest)?),
        12 => Said::SaslFinal(text(rest)?),
        other => Said::WantsOther(other),
    })
}

/// The fields of an error that say which it is.
fn refusal(body: &[u8]) -> Refusal {
    let field = |kind: u8| {
        let fields = body.split(|byte| *byte == 0);
        let found = fields.filter_map(<[u8]>::split_first).find(|(first, _)| **first == kind);
        found.map(|(_, text)| String::from_utf8_lossy(text).chars().take(MOST_TEXT_CHARS).collect()).unwrap_or_default()
    };
    Refusal { code: field(b'C'), text: field(b'M') }
}

fn row(body: &[u8]) -> Option<Vec<Option<&str>>> {
    let (count, mut rest) = body.split_first_chunk()?;
    let mut cells = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, behind) = rest.split_first_chunk()?;
        rest = behind;
        // A negative length stands for null.
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            cells.push(None);
            continue;
        };
        let (cell, behind) = rest.split_at_checked(length)?;
        rest = behind;
        cells.push(std::str::from_utf8(cell).ok());
    }
    Some(cells)
}

/// A piece of a stream of replication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A message of the plugin's.
    Data {
        /// When the server sent it, in microseconds since 2000-01-01.
        sent: i64,
        /// What it says.
        message: &'a [u8],
    },
    /// The server is there.
    Alive {
        /// Up to where it has looked through the log for this stream.
        end: Lsn,
        /// When it said so.
        sent: i64,
        /// Whether it wants to hear of this side at once.
        reply: bool,
    },
}

impl<'a> Piece<'a> {
    /// Reads one.
    ///
    /// # Errors
    /// It has another form.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WireError> {
        let read = || {
            let (kind, rest) = bytes.split_first()?;
            let (first, rest) = rest.split_first_chunk::<8>()?;
            match kind {
                b'w' => {
                    let (_end, rest) = rest.split_first_chunk::<8>()?;
                    let (sent, message) = rest.split_first_chunk()?;
                    Some(Self::Data { sent: i64::from_be_bytes(*sent), message })
                }
                b'k' => {
                    let (sent, rest) = rest.split_first_chunk()?;
                    let end = Lsn::new(u64::from_be_bytes(*first));
                    Some(Self::Alive { end, sent: i64::from_be_bytes(*sent), reply: *rest.first()? == 1 })
                }
                _ => None,
            }
        };
        read().ok_or(WireError("a piece of the stream that has another form"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_are_written_as_the_protocol_has_them() {
        assert_eq!(query("A"), b"Q\0\0\0\x06A\0");
        assert_eq!(sasl_initial("M", "n,,"), b"p\0\0\0\x0dM\0\0\0\0\x03n,,");
        assert_eq!(startup(&[("user", "u")]), b"\0\0\0\x10\0\x03\0\0user\0u\0\0");
        let status = status(Lsn::new(2), Lsn::new(1), 3, true);
        assert_eq!((status.len(), &status[..6], status.last()), (39, &b"d\0\0\0\x26r"[..], Some(&1)));
    }

    #[test]
    fn what_a_server_says_is_read() {
        let said = |kind, body| Said::parse(kind, body).expect("a message");
        assert_eq!(said(b'R', b"\0\0\0\0"), Said::LoggedIn);
        assert_eq!(said(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"), {
            Said::WantsSasl(vec!["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"])
        });
        assert_eq!(said(b'R', b"\0\0\0\x05salt"), Said::WantsOther(5));
        let refused = said(b'E', b"SERROR\0VERROR\0C42704\0Mreplication slot \"s\" does not exist\0\0");
        let text = "replication slot \"s\" does not exist".to_owned();
        assert_eq!(refused, Said::Refuses(Refusal { code: "42704".to_owned(), text }));
        let row = said(b'D', b"\0\x03\0\0\0\x011\xff\xff\xff\xff\0\0\0\x02\xff\xff");
        assert_eq!(row, Said::Row(vec![Some("1"), None, None]));
        assert!(Said::parse(b'D', b"\0\x02\0\0\0\x01").is_err());
        assert_eq!(said(b'S', b"TimeZone\0UTC\0"), Said::Other);
    }

    #[test]
    fn pieces_of_a_stream_are_read() {
        let data = [b"w".as_slice(), &7u64.to_be_bytes(), &8u64.to_be_bytes(), &9i64.to_be_bytes(), b"B"].concat();
        assert_eq!(Piece::parse(&data), Ok(Piece::Data { sent: 9, message: b"B" }));
        let alive = [b"k".as_slice(), &7u64.to_be_bytes(), &9i64.to_be_bytes(), &[1]].concat();
        assert_eq!(Piece::parse(&alive), Ok(Piece::Alive { end: Lsn::new(7), sent: 9, reply: true }));
        assert!(Piece::parse(&alive[..17]).is_err() && Piece::parse(b"").is_err() && Piece::parse(b"x12345678").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(kind in any::<u8>(), body in any::<Vec<u8>>()) {
            let _ = (Said::parse(kind, &body), Piece::parse(&body));
            for kind in *b"REDd" {
                let _ = Said::parse(kind, &body);
            }
        }
    }
}
