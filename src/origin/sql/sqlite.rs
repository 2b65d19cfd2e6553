//! SQLite. Parameters have no types there: a part that is the canonical text of a 64-bit integer is bound as an integer, any
//! other as text, and the column's affinity does the rest.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{
    AssertSqlSafe, Column as _, ConnectOptions as _, Executor as _, Row as _, SqlSafeStr as _, Statement as _, TypeInfo as _,
    ValueRef as _,
};

use tokio::time::Instant;

use super::super::error::Failure;
use super::super::{Changed, Commits, Loaded};
use super::batch::{Answer, Matching, Parts, several_rows};
use super::input::{Input, Inputs};
use super::shape::{Form, canonical_integer, hex, string};
use super::template::{Dialect, Template};
use super::write::{Orders, Returns, Step};
use super::{Question, Statements, versions};

/// A statement with what is bound to it.
type Asked<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

/// How long a statement waits for a writer's lock. The load's own deadline usually ends first.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// A running statement looks this often, in steps of SQLite's machine, whether it was abandoned.
const STEPS_BETWEEN_LOOKS: i32 = 4096;

/// A connection, which SQLite serves on a thread of its own.
#[derive(Debug)]
pub(super) struct Client {
    connection: SqliteConnection,
    abandoned: Arc<AtomicBool>,
}

/// Interrupts the running statement when the load that waits for it is dropped.
struct Interrupt<'a>(&'a AtomicBool, bool);

impl Drop for Interrupt<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Relaxed);
    }
}

pub(super) fn check_url(url: &str) -> Result<(), String> {
    if url.contains(":memory:") || url.contains("mode=memory") {
        return Err("a database in memory is empty: write sqlite://FILE".to_owned());
    }
    options(url, false).map(|_| ())
}

fn options(url: &str, writes: bool) -> Result<SqliteConnectOptions, String> {
    let options = SqliteConnectOptions::from_str(url.trim());
    let options = options.map_err(|_| "write sqlite://FILE, where ?immutable=1 and ?vfs=… may follow".to_owned())?;
    Ok(options.read_only(!writes).create_if_missing(false).busy_timeout(BUSY_TIMEOUT).disable_statement_logging())
}

/// Opens the file, for reading only unless it `writes`.
pub(super) async fn connect(url: &str, writes: bool) -> Result<Client, Failure> {
    let options = options(url, writes).map_err(Failure::Unusable)?;
    let mut connection = options.connect().await.map_err(|error| failure(&error))?;
    let abandoned = Arc::new(AtomicBool::new(false));
    let look = Arc::clone(&abandoned);
    let mut handle = connection.lock_handle().await.map_err(|error| failure(&error))?;
    handle.set_progress_handler(STEPS_BETWEEN_LOOKS, move || !look.load(Relaxed));
    drop(handle);
    Ok(Client { connection, abandoned })
}

pub(super) async fn load(client: &mut Client, question: &Question, parts: &Parts) -> Result<Loaded, Failure> {
    let Statements { read, .. } = question.statements(Dialect::Sqlite)?;
    let mut query = sqlx::query(AssertSqlSafe(numbered(read)));
    for used in read.parts() {
        query = match canonical_integer(&parts[used.index]) {
            Some(number) => query.bind(number),
            None => query.bind(parts[used.index].clone()),
        };
    }
    let rows = fetch(client, query, 2).await?;
    match rows.as_slice() {
        [] => Ok(Loaded::NotFound),
        [row] => {
            let columns: Vec<String> = row.columns().iter().map(|column| column.name().to_owned()).collect();
            let form = Form::of(&columns, question.reply)?;
            value(row, &form, 0..columns.len())
        }
        _ => Err(several_rows()),
    }
}

pub(super) async fn load_many(client: &mut Client, question: &Question, keys: &[Parts]) -> Result<Vec<Answer>, Failure> {
    let Statements { read, read_many } = question.statements(Dialect::Sqlite)?;
    let Some(many) = read_many else { return Ok(vec![None; keys.len()]) };
    // What `read` gives is what a value is made of, so that both give the same bytes for the same key.
    let prepared =
        client.connection.prepare(AssertSqlSafe(numbered(read)).into_sql_str()).await.map_err(|error| failure(&error))?;
    let columns: Vec<String> = prepared.columns().iter().map(|column| column.name().to_owned()).collect();
    let form = Form::of(&columns, question.reply)?;
    let mut query = sqlx::query(AssertSqlSafe(numbered(many)));
    for used in many.parts() {
        query = query.bind(json_array(keys, used.index));
    }
    let mut matching =
        Matching::new(keys.iter().map(|parts| Some(many.parts().iter().map(|u| parts[u.index].clone()).collect())));
    let rows = fetch(client, query, matching.asked() + 1).await?;
    let complete = rows.len() <= matching.asked();
    for row in &rows {
        let place = |name: &String| {
            let found = row.columns().iter().position(|column| column.name() == name);
            found.ok_or_else(|| Failure::Unusable(format!("`readMany` gives no column `{name}`: name one so with AS")))
        };
        let fields = columns.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let parts = many.parts().iter().map(|used| place(&used.name)).collect::<Result<Vec<_>, _>>()?;
        let parts = parts.into_iter().map(|index| Cell::of(row, index).ok()?.text()).collect::<Option<Vec<_>>>();
        matching.row(parts, value(row, &form, fields.into_iter()));
    }
    // A column without affinity equals an integer where `read` binds one, but no text.
    let certain = |parts: &[String]| parts.iter().all(|part| canonical_integer(part).is_none());
    Ok(matching.finish(complete, certain))
}

/// Makes all changes in one transaction, or none.
pub(super) async fn write(
    client: &mut Client,
    orders: &Orders,
    steps: &[Step],
    deadline: Instant,
    commits: &Commits,
) -> Result<Vec<Changed>, Failure> {
    // Whoever writes takes the lock at once: two that had begun to read could not both go on.
    client.execute("BEGIN IMMEDIATE").await.map_err(|error| failure(&error))?;
    match steps_of(client, orders, steps).await {
        Ok(changed) if Instant::now() < deadline => {
            commits.begin();
            // The file is on this machine: where the commit fails, nothing is committed.
            client.execute("COMMIT").await.map_err(|error| refusal(&error))?;
            Ok(changed)
        }
        outcome => {
            client.execute("ROLLBACK").await.map_err(|error| failure(&error))?;
            Err(outcome.err().unwrap_or(Failure::Timeout))
        }
    }
}

impl Client {
    /// Runs a statement without parameters.
    pub(super) async fn execute(&mut self, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(sql).execute(self.connection()).await.map(|_| ())
    }

    /// The connection, for statements of which each takes no time.
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        self.abandoned.store(false, Relaxed);
        &mut self.connection
    }
}

async fn steps_of(client: &mut Client, orders: &Orders, steps: &[Step]) -> Result<Vec<Changed>, Failure> {
    let drawn = versions::draw_in_sqlite(client, steps).await?;
    let mut changed = Vec::with_capacity(steps.len());
    for step in steps {
        let made = run_one(client, orders, step).await?.checked(step, false)?;
        changed.push(drawn.complete(made, step));
    }
    Ok(changed)
}

/// Makes one change within a transaction.
pub(super) async fn run_one(client: &mut Client, orders: &Orders, step: &Step) -> Result<Changed, Failure> {
    let (template, returns) = orders.order(Dialect::Sqlite, step)?;
    let mut query = sqlx::query(AssertSqlSafe(numbered(template)));
    let inputs = Inputs::new(template, step).map_err(Failure::Rejected)?;
    for used in template.parts() {
        query = bind(query, inputs.get(used.index));
    }
    run(client, query, returns).await
}

fn bind<'q>(query: Asked<'q>, input: Input) -> Asked<'q> {
    match input {
        Input::Null => query.bind(None::<String>),
        Input::Part(text) => match canonical_integer(&text) {
            Some(number) => query.bind(number),
            None => query.bind(text),
        },
        Input::Truth(truth) => query.bind(truth),
        Input::Text(text) => query.bind(text),
        Input::Number(text) => match (canonical_integer(&text), text.parse::<f64>()) {
            (Some(number), _) => query.bind(number),
            (None, Ok(number)) => query.bind(number),
            (None, Err(_)) => query.bind(text),
        },
        Input::Whole(bytes) => match String::from_utf8(bytes) {
            Ok(text) => query.bind(text),
            Err(bytes) => query.bind(bytes.into_bytes()),
        },
    }
}

async fn run(client: &mut Client, query: Asked<'_>, returns: Returns<'_>) -> Result<Changed, Failure> {
    let mut interrupt = Interrupt(&client.abandoned, true);
    client.abandoned.store(false, Relaxed);
    let changed = match returns.is_nothing() {
        true => {
            let done = query.execute(&mut client.connection).await.map_err(|error| refusal(&error))?;
            Changed { rows: done.rows_affected(), ..Changed::default() }
        }
        false => {
            let rows = query.fetch_all(&mut client.connection).await.map_err(|error| refusal(&error))?;
            let columns = |row: &SqliteRow| row.columns().iter().map(|column| column.name().to_owned()).collect::<Vec<_>>();
            let whole = |row: &SqliteRow, at: usize| match Cell::of(row, at) {
                Ok(Cell::Integer(number)) => Some(number),
                _ => None,
            };
            returns.changed(&rows, columns, whole)?
        }
    };
    interrupt.1 = false;
    Ok(changed)
}

/// What a failure means for a write: what the database refuses is told in its own words, which are about the client's own values.
pub(super) fn refusal(error: &sqlx::Error) -> Failure {
    const CONSTRAINT: u32 = 19;
    /// Mismatch of types, and too big.
    const VALUE: [u32; 2] = [20, 18];
    const READ_ONLY: u32 = 8;
    let sqlx::Error::Database(database) = error else { return failure(error) };
    let code = database.code().and_then(|code| code.parse::<u32>().ok()).unwrap_or(0);
    match code & 0xff {
        CONSTRAINT => Failure::Rejected(database.message().to_owned()),
        primary if VALUE.contains(&primary) => Failure::Rejected(database.message().to_owned()),
        READ_ONLY => Failure::Unusable("the file can only be read: let the sidecar write to it and to its directory".to_owned()),
        _ => failure(error),
    }
}

fn numbered(template: &Template) -> String {
    template.render(|index| format!("?{}", index + 1))
}

/// The parts as texts: compared with a column of `json_each`, a column of integers takes texts for numbers, but one of texts does
/// not take numbers for texts.
fn json_array(keys: &[Parts], index: usize) -> String {
    let elements = keys.iter().map(|parts| serde_json::Value::from(parts[index].as_str()));
    serde_json::Value::Array(elements.collect()).to_string()
}

/// At most `most` rows.
async fn fetch(
    client: &mut Client,
    query: sqlx::query::Query<'_, sqlx::Sqlite, SqliteArguments>,
    most: usize,
) -> Result<Vec<SqliteRow>, Failure> {
    client.abandoned.store(false, Relaxed);
    let mut interrupt = Interrupt(&client.abandoned, true);
    let mut stream = query.fetch(&mut client.connection);
    let mut rows = Vec::new();
    while rows.len() < most
        && let Some(row) = stream.try_next().await.map_err(|error| failure(&error))?
    {
        rows.push(row);
    }
    drop(stream);
    interrupt.1 = false;
    Ok(rows)
}

fn value(row: &SqliteRow, form: &Form, fields: impl Iterator<Item = usize>) -> Result<Loaded, Failure> {
    let cells = fields.map(|index| {
        let cell = Cell::of(row, index)?;
        Ok(if form.is_json() { cell.json() } else { cell.bytes() })
    });
    let cells = cells.collect::<Result<Vec<_>, Failure>>()?;
    form.value(cells.iter().map(Option::as_deref))
}

/// A value in the storage class that it has, whatever its column was declared as.
enum Cell {
    Null,
    Integer(i64),
    Real(f64),
    Text(Vec<u8>),
    Blob(Vec<u8>),
}

impl Cell {
    fn of(row: &SqliteRow, index: usize) -> Result<Self, Failure> {
        let unreadable = |_| Failure::Unusable("a column cannot be read".to_owned());
        let raw = row.try_get_raw(index).map_err(unreadable)?;
        if raw.is_null() {
            return Ok(Self::Null);
        }
        let class = raw.type_info();
        Ok(match class.name() {
            "INTEGER" => Self::Integer(row.try_get_unchecked(index).map_err(unreadable)?),
            "REAL" => Self::Real(row.try_get_unchecked(index).map_err(unreadable)?),
            "TEXT" => Self::Text(row.try_get_unchecked(index).map_err(unreadable)?),
            _ => Self::Blob(row.try_get_unchecked(index).map_err(unreadable)?),
        })
    }

    fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Null => None,
            Self::Integer(number) => Some(number.to_string().into_bytes()),
            Self::Real(number) => Some(real(number).into_bytes()),
            Self::Text(bytes) | Self::Blob(bytes) => Some(bytes),
        }
    }

    fn json(self) -> Option<Vec<u8>> {
        let text = match self {
            Self::Null => return None,
            Self::Integer(number) => number.to_string(),
            Self::Real(number) if number.is_finite() => real(number),
            Self::Real(number) => string(&real(number)),
            Self::Text(bytes) => string(&String::from_utf8_lossy(&bytes)),
            Self::Blob(bytes) => string(&hex(&bytes)),
        };
        Some(text.into_bytes())
    }

    fn text(self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }
}

/// The shortest text that reads back as the same number. SQLite has no NaN.
fn real(number: f64) -> String {
    match serde_json::Number::from_f64(number) {
        Some(number) => number.to_string(),
        None if number > 0.0 => "Infinity".to_owned(),
        None => "-Infinity".to_owned(),
    }
}

/// What SQLite's primary result code means for the load.
pub(super) fn failure(error: &sqlx::Error) -> Failure {
    const ERROR: u32 = 1;
    const BUSY_OR_LOCKED: [u32; 2] = [5, 6];
    const INTERRUPT: u32 = 9;
    /// I/O error, corrupt, cannot open, not a database.
    const FILE: [u32; 4] = [10, 11, 14, 26];
    let sqlx::Error::Database(error) = error else {
        return Failure::Unreachable("the connection broke".to_owned());
    };
    let code = error.code().and_then(|code| code.parse::<u32>().ok()).unwrap_or(0);
    match code & 0xff {
        // The message is about names in the statement, not about values.
        ERROR => Failure::Unusable(error.message().to_owned()),
        INTERRUPT => Failure::Timeout,
        primary if BUSY_OR_LOCKED.contains(&primary) => failed("the database is locked by a writer", true),
        primary if FILE.contains(&primary) => failed(&format!("the file cannot be read (SQLite code {code})"), false),
        _ => Failure::Unusable(format!("SQLite code {code}")),
    }
}

fn failed(why: &str, retry: bool) -> Failure {
    Failure::Failed { why: why.to_owned(), retry, retry_after: None }
}
