//! As much of Postgres' wire protocol (version 3) as one kind of client needs: prepared statements whose parameters and only column
//! are text. No I/O but the reading of one message.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest message that is read: no statement or parameter of the demo comes near it.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The type `text` in Postgres' catalogue.
const TEXT_OID: u32 = 25;
const PROTOCOL_3: u32 = 196_608;
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;

/// The first message of a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Startup {
    /// The client asks for encryption, and goes on in plain text where that is declined.
    Encryption,
    /// A session in protocol 3.
    Session,
    /// Anything else, such as a request to cancel.
    Other,
}

/// A message of a session.
#[derive(Debug, PartialEq, Eq)]
pub enum Frontend {
    /// Prepares `sql` under a name.
    Parse {
        /// Empty: the unnamed statement.
        statement: String,
        /// Its text.
        sql: String,
    },
    /// Gives a statement its parameters.
    Bind {
        /// Empty: the unnamed portal.
        portal: String,
        /// Which statement.
        statement: String,
        /// Text, in either format.
        parameters: Vec<String>,
    },
    /// Asks what a statement takes and gives.
    DescribeStatement(String),
    /// Asks what a portal gives.
    DescribePortal(String),
    /// Runs a portal.
    Execute(String),
    /// Forgets a statement or portal.
    Close,
    /// Runs a text without parameters.
    Query(String),
    /// Wants everything so far flushed.
    Flush,
    /// Ends a group of messages.
    Sync,
    /// Ends the session.
    Terminate,
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed Postgres message: {why}"))
}

async fn read_body(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    let length = length.checked_sub(4).filter(|length| *length <= MAX_MESSAGE_BYTES).ok_or_else(|| malformed("its length"))?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// Reads the first message.
///
/// # Errors
/// Where the stream ends or the message is malformed.
pub async fn read_startup(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Startup> {
    let body = read_body(stream).await?;
    Ok(match Fields(&body).u32()? {
        SSL_REQUEST | GSS_REQUEST => Startup::Encryption,
        PROTOCOL_3 => Startup::Session,
        _ => Startup::Other,
    })
}

/// Reads one message of a session, or `None` where the client closed the connection between two messages.
///
/// # Errors
/// Where the stream breaks, or the message is malformed or none that this server knows.
pub async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frontend>> {
    let kind = match stream.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        kind => kind?,
    };
    let body = read_body(stream).await?;
    parse(kind, &body).map(Some)
}

fn parse(kind: u8, body: &[u8]) -> io::Result<Frontend> {
    let mut fields = Fields(body);
    Ok(match kind {
        b'P' => Frontend::Parse { statement: fields.text()?, sql: fields.text()? },
        b'B' => parse_bind(&mut fields)?,
        b'D' => match fields.u8()? {
            b'S' => Frontend::DescribeStatement(fields.text()?),
            _ => Frontend::DescribePortal(fields.text()?),
        },
        b'E' => Frontend::Execute(fields.text()?),
        b'C' => Frontend::Close,
        b'Q' => Frontend::Query(fields.text()?),
        b'H' => Frontend::Flush,
        b'S' => Frontend::Sync,
        b'X' => Frontend::Terminate,
        other => return Err(malformed(&format!("type `{}` is not served here", char::from(other)))),
    })
}

fn parse_bind(fields: &mut Fields<'_>) -> io::Result<Frontend> {
    let (portal, statement) = (fields.text()?, fields.text()?);
    // Formats: of text, both are the same bytes.
    for _ in 0..fields.u16()? {
        fields.u16()?;
    }
    let count = fields.u16()?;
    let mut parameters = Vec::with_capacity(usize::from(count.min(64)));
    for _ in 0..count {
        let length = usize::try_from(fields.u32()?.cast_signed()).map_err(|_| malformed("a NULL parameter"))?;
        parameters
            .push(String::from_utf8(fields.take(length)?.to_vec()).map_err(|_| malformed("a parameter that is not UTF-8"))?);
    }
    Ok(Frontend::Bind { portal, statement, parameters })
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length).ok_or_else(|| malformed("it is cut short"))?;
        self.0 = tail;
        Ok(head)
    }

    fn u8(&mut self) -> io::Result<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take(4).map(|bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self) -> io::Result<String> {
        let end = memchr::memchr(0, self.0).ok_or_else(|| malformed("a text without its end"))?;
        let text = self.take(end)?;
        self.take(1)?;
        String::from_utf8(text.to_vec()).map_err(|_| malformed("a text that is not UTF-8"))
    }
}

/// Answers, gathered until they are written.
#[derive(Debug, Default)]
pub struct Answers(pub Vec<u8>);

impl Answers {
    fn message(&mut self, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
        self.0.push(kind);
        let at = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        body(&mut self.0);
        let length = (self.0.len() - at) as u32;
        self.0[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// The session is open: no password, and what clients want to know of the server.
    pub fn welcome(&mut self) {
        self.message(b'R', |body| body.extend_from_slice(&0u32.to_be_bytes()));
        for (name, value) in [("server_version", "15.0"), ("server_encoding", "UTF8"), ("client_encoding", "UTF8")] {
            self.message(b'S', |body| {
                text(body, name);
                text(body, value);
            });
        }
        self.message(b'K', |body| body.extend_from_slice(&[0; 8]));
        self.ready();
    }

    /// All is answered; no transaction is open.
    pub fn ready(&mut self) {
        self.message(b'Z', |body| body.push(b'I'));
    }

    /// A statement is prepared.
    pub fn parsed(&mut self) {
        self.message(b'1', |_| {});
    }

    /// Parameters are taken.
    pub fn bound(&mut self) {
        self.message(b'2', |_| {});
    }

    /// A statement or portal is forgotten.
    pub fn closed(&mut self) {
        self.message(b'3', |_| {});
    }

    /// A statement takes `count` texts.
    pub fn parameters(&mut self, count: u16) {
        self.message(b't', |body| {
            body.extend_from_slice(&count.to_be_bytes());
            (0..count).for_each(|_| body.extend_from_slice(&TEXT_OID.to_be_bytes()));
        });
    }

    /// The rows have one column of type text, called `value`.
    pub fn columns(&mut self) {
        self.message(b'T', |body| {
            body.extend_from_slice(&1u16.to_be_bytes());
            text(body, "value");
            body.extend_from_slice(&[0; 6]);
            body.extend_from_slice(&TEXT_OID.to_be_bytes());
            body.extend_from_slice(&(-1i16).to_be_bytes());
            body.extend_from_slice(&(-1i32).to_be_bytes());
            body.extend_from_slice(&0u16.to_be_bytes());
        });
    }

    /// There are no rows to describe.
    pub fn no_columns(&mut self) {
        self.message(b'n', |_| {});
    }

    /// One row.
    pub fn row(&mut self, value: &str) {
        self.message(b'D', |body| {
            body.extend_from_slice(&1u16.to_be_bytes());
            body.extend_from_slice(&(value.len() as u32).to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        });
    }

    /// A statement is done.
    pub fn complete(&mut self, tag: &str) {
        self.message(b'C', |body| text(body, tag));
    }

    /// A statement failed: an SQLSTATE and a sentence.
    pub fn error(&mut self, code: &str, sentence: &str) {
        self.message(b'E', |body| {
            for (field, value) in [(b'S', "ERROR"), (b'V', "ERROR"), (b'C', code), (b'M', sentence)] {
                body.push(field);
                text(body, value);
            }
            body.push(0);
        });
    }
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend(text.bytes().filter(|byte| *byte != 0));
    body.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bind_takes_its_parameters_as_text() {
        let mut body = b"\0s1\0\0\x01\0\x01\0\x02\0\0\0\x02UA\0\0\0\x017\0\x01\0\x01".to_vec();
        let expected = Frontend::Bind {
            portal: String::new(),
            statement: "s1".to_owned(),
            parameters: vec!["UA".to_owned(), "7".to_owned()],
        };
        assert_eq!(parse(b'B', &body).expect("well formed"), expected);
        for length in 0..body.len() - 4 {
            assert!(parse(b'B', &body[..length]).is_err(), "cut at {length}");
        }
        body[13] = 0xff;
        assert!(parse(b'B', &body).is_err());
    }

    #[tokio::test]
    async fn a_message_too_long_is_refused_before_it_is_read() {
        let mut input: &[u8] = b"Q\xff\xff\xff\xff";
        assert_eq!(read_message(&mut input).await.expect_err("too long").kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_message(&mut &b""[..]).await.expect("a clean end"), None);
    }
}
