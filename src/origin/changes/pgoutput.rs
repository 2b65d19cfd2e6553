//! The messages of `pgoutput`, protocol version 1: which rows of which tables a committed transaction changed.
//!
//! As in [Postgres' documentation](https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html). A message is read from
//! bytes that are there as a whole, and borrows from them; nothing is trusted: a length is held against what is left, and what is not
//! understood is a [`DecodeError`]. Pure.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

/// A place in the write-ahead log: bytes since the cluster was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// The place behind so many bytes.
    pub fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// How many bytes are before it.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// As Postgres writes it: `16/B374D848`.
impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let (high, low) = text.split_once('/').unwrap_or((text, "-"));
        let half = |digits| u32::from_str_radix(digits, 16).map(u64::from);
        Ok(Self(half(high)? << 32 | half(low)?))
    }
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They end within it.
    #[error("a message ends too early")]
    Short,
    /// They go on behind it.
    #[error("a message has {0} bytes too many")]
    Trailing(usize),
    /// Its kind is none of version 1.
    #[error("a message of the unknown kind {0:#04x}")]
    Kind(u8),
    /// A row is introduced by a letter that stands for no row.
    #[error("a row of the unknown kind {0:#04x}")]
    Row(u8),
    /// A cell is neither null, nor unchanged, nor text.
    #[error("a cell of the unknown kind {0:#04x}")]
    Cell(u8),
    /// A name is no text.
    #[error("a name that is not UTF-8")]
    Name,
    /// A table's identity is none that is known.
    #[error("the unknown replica identity {0:#04x}")]
    Identity(u8),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins, which was committed.
    Begin {
        /// Where its commit is.
        commit: Lsn,
        /// When it was committed, in microseconds since 2000-01-01, by the database's clock.
        time: i64,
        /// Its number, without the epoch.
        xid: u32,
    },
    /// It ends.
    Commit {
        /// Where the log goes on behind it: what is confirmed when all of it has been carried out.
        end: Lsn,
        /// As in [`Message::Begin`].
        time: i64,
    },
    /// Where the transaction was replicated from.
    Origin,
    /// What is about to be said of a table's rows refers to this. Said once in a stream, and again when it has changed.
    Relation(Relation),
    /// A type that a column has.
    Type,
    /// A row was added.
    Insert {
        /// The table's number.
        table: u32,
        /// The row.
        new: Row<'a>,
    },
    /// A row was changed.
    Update {
        /// The table's number.
        table: u32,
        /// The row as it was. `None`: the columns of its identity did not change.
        old: Option<Old<'a>>,
        /// The row as it is.
        new: Row<'a>,
    },
    /// A row was removed.
    Delete {
        /// The table's number.
        table: u32,
        /// The row as it was.
        old: Old<'a>,
    },
    /// All rows of these tables were removed.
    Truncate(Vec<u32>),
    /// What `pg_logical_emit_message` wrote into the log.
    Note {
        /// Whether it is part of the transaction.
        transactional: bool,
        /// For whom it is.
        prefix: &'a [u8],
        /// What it says.
        content: &'a [u8],
    },
}

/// A table as the rows that follow have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Its number.
    pub id: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Which columns are told of a row as it was.
    pub identity: Identity,
    /// Its columns, in the order of the cells.
    pub columns: Vec<Column>,
}

/// A table's `REPLICA IDENTITY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The primary key.
    Default,
    /// No column: such a table's rows cannot be changed while it is published.
    Nothing,
    /// All columns.
    Full,
    /// Those of a unique index.
    Index,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Whether it belongs to the identity: whether its old value is told.
    pub identity: bool,
    /// The number of its type.
    pub kind: u32,
}

/// A row as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Old<'a> {
    /// Of the identity's columns alone; the others' cells are null.
    Key(Row<'a>),
    /// Of all columns.
    Full(Row<'a>),
}

/// The cells of a row, one for each column.
pub type Row<'a> = Vec<Cell<'a>>;

/// What a row has in a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'a> {
    /// Nothing.
    Null,
    /// A large value that is kept outside the row, and did not change: it is not told again.
    Unchanged,
    /// A value, as its type writes it.
    Text(&'a [u8]),
}

impl<'a> Message<'a> {
    /// Reads a message, which is all of `bytes`.
    ///
    /// # Errors
    /// They are none.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut rest = Rest(bytes);
        let message = match rest.byte()? {
            b'B' => Self::Begin { commit: rest.lsn()?, time: rest.i64()?, xid: rest.u32()? },
            b'C' => {
                // Flags, of which there are none, and where the commit is.
                rest.take(1 + 8)?;
                Self::Commit { end: rest.lsn()?, time: rest.i64()? }
            }
            b'O' => {
                rest.take(8)?;
                rest.name()?;
                Self::Origin
            }
            b'R' => Self::Relation(rest.relation()?),
            b'Y' => {
                rest.take(4)?;
                rest.name()?;
                rest.name()?;
                Self::Type
            }
            b'I' => Self::Insert { table: rest.u32()?, new: rest.new_row()? },
            b'U' => rest.update()?,
            b'D' => {
                let table = rest.u32()?;
                let kind = rest.byte()?;
                Self::Delete { table, old: rest.old_row(kind)? }
            }
            b'T' => {
                let count = rest.u32()?;
                // CASCADE and RESTART IDENTITY, which change nothing here.
                rest.take(1)?;
                Self::Truncate((0..count).map(|_| rest.u32()).collect::<Result<_, _>>()?)
            }
            b'M' => {
                let transactional = rest.byte()? & 1 == 1;
                rest.take(8)?;
                let prefix = rest.until_zero()?;
                let length = rest.length()?;
                Self::Note { transactional, prefix, content: rest.take(length)? }
            }
            kind => return Err(DecodeError::Kind(kind)),
        };
        match rest.0.len() {
            0 => Ok(message),
            more => Err(DecodeError::Trailing(more)),
        }
    }
}

/// What is left of a message.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.array().map(i64::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.array().map(u64::from_be_bytes).map(Lsn)
    }

    fn length(&mut self) -> Result<usize, DecodeError> {
        usize::try_from(self.u32()?).map_err(|_| DecodeError::Short)
    }

    fn until_zero(&mut self) -> Result<&'a [u8], DecodeError> {
        let end = memchr::memchr(0, self.0).ok_or(DecodeError::Short)?;
        let text = self.take(end)?;
        self.take(1)?;
        Ok(text)
    }

    fn name(&mut self) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.until_zero()?).map_err(|_| DecodeError::Name)
    }

    fn relation(&mut self) -> Result<Relation, DecodeError> {
        let id = self.u32()?;
        let (schema, name) = (self.name()?.to_owned(), self.name()?.to_owned());
        // What is in pg_catalog is told without its schema.
        let schema = if schema.is_empty() { "pg_catalog".to_owned() } else { schema };
        let identity = match self.byte()? {
            b'd' => Identity::Default,
            b'n' => Identity::Nothing,
            b'f' => Identity::Full,
            b'i' => Identity::Index,
            other => return Err(DecodeError::Identity(other)),
        };
        let count = self.u16()?;
        let columns = (0..count).map(|_| self.column()).collect::<Result<_, _>>()?;
        Ok(Relation { id, schema, name, identity, columns })
    }

    fn column(&mut self) -> Result<Column, DecodeError> {
        let identity = self.byte()? & 1 == 1;
        let name = self.name()?.to_owned();
        let kind = self.u32()?;
        // The type's modifier, such as a length.
        self.take(4)?;
        Ok(Column { name, identity, kind })
    }

    fn update(&mut self) -> Result<Message<'a>, DecodeError> {
        let table = self.u32()?;
        match self.byte()? {
            b'N' => Ok(Message::Update { table, old: None, new: self.row()? }),
            kind => {
                let old = Some(self.old_row(kind)?);
                Ok(Message::Update { table, old, new: self.new_row()? })
            }
        }
    }

    fn new_row(&mut self) -> Result<Row<'a>, DecodeError> {
        match self.byte()? {
            b'N' => self.row(),
            kind => Err(DecodeError::Row(kind)),
        }
    }

    fn old_row(&mut self, kind: u8) -> Result<Old<'a>, DecodeError> {
        match kind {
            b'K' => self.row().map(Old::Key),
            b'O' => self.row().map(Old::Full),
            kind => Err(DecodeError::Row(kind)),
        }
    }

    fn row(&mut self) -> Result<Row<'a>, DecodeError> {
        let count = self.u16()?;
        (0..count).map(|_| self.cell()).collect()
    }

    fn cell(&mut self) -> Result<Cell<'a>, DecodeError> {
        match self.byte()? {
            b'n' => Ok(Cell::Null),
            b'u' => Ok(Cell::Unchanged),
            b't' => {
                let length = self.length()?;
                self.take(length).map(Cell::Text)
            }
            kind => Err(DecodeError::Cell(kind)),
        }
    }
}

#[cfg(test)]
mod tests;
