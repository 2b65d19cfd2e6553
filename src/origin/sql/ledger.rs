//! The account that a database keeps of a journal: the table `larder_journal`, and transactions that move it along with the data.
//!
//! Whoever looks at a part's row in such a transaction holds it until the end, so a new consumer takes the part before the old one's
//! transaction or after it, never within. The server bounds how long that may be, whatever becomes of this process.

use sqlx::postgres::PgConnection;
use tokio::time::Instant;

use super::super::error::Failure;
use super::super::ledger::{Hold, Verdict};
use super::super::writer::Commits;
use super::own_table::OwnTable;
use super::postgres::{Fault, unnamed};
use super::sqlite::{self, Client};
use super::write::{self, Orders, Step};

const TABLE: OwnTable = OwnTable::new(
    "larder_journal",
    "CREATE TABLE IF NOT EXISTS larder_journal (part varchar(600) PRIMARY KEY, fence bigint NOT NULL, position bigint NOT NULL)",
);
const TAKE: &str = "INSERT INTO larder_journal (part, fence, position) VALUES ($1, $2, 0) ON CONFLICT (part) DO UPDATE SET fence = \
     CASE WHEN larder_journal.fence >= excluded.fence THEN larder_journal.fence + 1 ELSE excluded.fence END \
     RETURNING fence, position";
/// SQLite's transactions lock the file instead of the row.
const LOOK: &str = "SELECT fence, position FROM larder_journal WHERE part = $1";
const MOVE: &str = "UPDATE larder_journal SET position = $2 WHERE part = $1";

/// A batch of a part.
#[derive(Debug)]
pub(in crate::origin) struct Posting<'a> {
    pub(in crate::origin) part: &'a str,
    pub(in crate::origin) fence: i64,
    pub(in crate::origin) upto: i64,
    pub(in crate::origin) posts: Vec<Post<'a>>,
}

/// A change of it.
#[derive(Debug)]
pub(in crate::origin) struct Post<'a> {
    pub(in crate::origin) at: i64,
    pub(in crate::origin) orders: &'a Orders,
    pub(in crate::origin) step: Step,
}

/// A part's row.
struct Row {
    fence: i64,
    at: i64,
}

impl Row {
    fn hold(&self) -> Result<Hold, Failure> {
        let number = |number: i64| u64::try_from(number).map_err(|_| TABLE.foreign());
        Ok(Hold { fence: number(self.fence)?, position: number(self.at)? })
    }
}

impl Posting<'_> {
    /// What of it lies behind `row`. `None`: another holds the part.
    fn open(&self, row: Option<&Row>) -> Option<impl Iterator<Item = &Post<'_>>> {
        let row = row.filter(|row| row.fence == self.fence)?;
        let at = row.at;
        Some(self.posts.iter().filter(move |post| post.at > at))
    }

    /// Whether the position is to move.
    fn moves(&self, row: Option<&Row>) -> bool {
        row.is_some_and(|row| row.at < self.upto)
    }
}

/// Takes a part, and makes the table where there is none.
pub(super) async fn take_in_postgres(
    connection: &mut PgConnection,
    part: &str,
    least: i64,
    deadline: Instant,
) -> Result<Hold, Failure> {
    if let Some(hold) = try_to_take(connection, part, least, deadline).await? {
        return Ok(hold);
    }
    TABLE.create_in_postgres(connection).await?;
    try_to_take(connection, part, least, deadline).await?.ok_or_else(|| TABLE.not_made("it is not where the login looks for it"))
}

/// `None`: there is no table.
async fn try_to_take(connection: &mut PgConnection, part: &str, least: i64, deadline: Instant) -> Result<Option<Hold>, Failure> {
    let take = async {
        write::begin(connection, deadline).await?;
        let row = unnamed(TAKE).bind(part).bind(least).fetch_one(&mut *connection).await?;
        Ok::<_, Fault>(row_of(&row)?.hold()?)
    };
    let fault = match take.await {
        Ok(hold) => return write::commit(connection, Some(hold), &Commits::default()).await,
        Err(Fault::Sql(error)) => TABLE.fault(error),
        Err(fault) => Some(fault),
    };
    match fault {
        Some(fault) => write::undo(connection, write::refusal(fault)).await,
        None => write::roll_back(connection).await.map(|()| None),
    }
}

/// Makes what of the batch lies behind the part's position, and moves that.
pub(super) async fn post_in_postgres(
    connection: &mut PgConnection,
    batch: &Posting<'_>,
    deadline: Instant,
    commits: &Commits,
) -> Result<Verdict, Failure> {
    let outcome = match write::begin(connection, deadline).await {
        Ok(()) => run_in_postgres(connection, batch).await,
        Err(fault) => Err(fault),
    };
    match outcome {
        Ok(Verdict::Applied) if Instant::now() < deadline => write::commit(connection, Verdict::Applied, commits).await,
        Ok(Verdict::Applied) => write::undo(connection, Failure::Timeout).await,
        Ok(Verdict::Fenced) => write::roll_back(connection).await.map(|()| Verdict::Fenced),
        Err(fault) => {
            // The statements may no longer be what was described.
            batch.posts.iter().for_each(|post| post.orders.forget());
            write::undo(connection, write::refusal(fault)).await
        }
    }
}

async fn run_in_postgres(connection: &mut PgConnection, batch: &Posting<'_>) -> Result<Verdict, Fault> {
    let sql = format!("{LOOK} FOR UPDATE");
    let row = unnamed(&sql).bind(batch.part).fetch_optional(&mut *connection).await?;
    let row = row.map(|row| row_of(&row)).transpose()?;
    let Some(open) = batch.open(row.as_ref()) else { return Ok(Verdict::Fenced) };
    for post in open {
        write::run_one(connection, post.orders, &post.step).await?.checked(&post.step, post.orders.compares())?;
    }
    if batch.moves(row.as_ref()) {
        unnamed(MOVE).bind(batch.part).bind(batch.upto).execute(&mut *connection).await?;
    }
    Ok(Verdict::Applied)
}

/// The row that [`TAKE`] and [`LOOK`] give.
fn row_of<'r, R>(row: &'r R) -> Result<Row, Failure>
where
    R: sqlx::Row,
    usize: sqlx::ColumnIndex<R>,
    i64: sqlx::Decode<'r, R::Database> + sqlx::Type<R::Database>,
{
    let number = |index: usize| row.try_get::<i64, _>(index).map_err(|_| TABLE.foreign());
    Ok(Row { fence: number(0)?, at: number(1)? })
}

/// As [`take_in_postgres`].
pub(super) async fn take_in_sqlite(client: &mut Client, part: &str, least: i64) -> Result<Hold, Failure> {
    client.execute(TABLE.create()).await.map_err(|error| sqlite::refusal(&error))?;
    let row = sqlx::query(TAKE).bind(part).bind(least).fetch_one(client.connection()).await;
    row_of(&row.map_err(|error| sqlite::refusal(&error))?)?.hold()
}

/// As [`post_in_postgres`].
pub(super) async fn post_in_sqlite(
    client: &mut Client,
    batch: &Posting<'_>,
    deadline: Instant,
    commits: &Commits,
) -> Result<Verdict, Failure> {
    // Nobody else writes to the file from here on.
    client.execute("BEGIN IMMEDIATE").await.map_err(|error| sqlite::failure(&error))?;
    match run_in_sqlite(client, batch).await {
        Ok(Verdict::Applied) if Instant::now() < deadline => {
            commits.begin();
            client.execute("COMMIT").await.map_err(|error| sqlite::refusal(&error))?;
            Ok(Verdict::Applied)
        }
        outcome => {
            client.execute("ROLLBACK").await.map_err(|error| sqlite::failure(&error))?;
            match outcome? {
                Verdict::Fenced => Ok(Verdict::Fenced),
                Verdict::Applied => Err(Failure::Timeout),
            }
        }
    }
}

async fn run_in_sqlite(client: &mut Client, batch: &Posting<'_>) -> Result<Verdict, Failure> {
    let failed = |error: sqlx::Error| sqlite::failure(&error);
    let row = sqlx::query(LOOK).bind(batch.part).fetch_optional(client.connection()).await.map_err(failed)?;
    let row = row.map(|row| row_of(&row)).transpose()?;
    let Some(open) = batch.open(row.as_ref()) else { return Ok(Verdict::Fenced) };
    for post in open {
        sqlite::run_one(client, post.orders, &post.step).await?.checked(&post.step, post.orders.compares())?;
    }
    if batch.moves(row.as_ref()) {
        sqlx::query(MOVE).bind(batch.part).bind(batch.upto).execute(client.connection()).await.map_err(failed)?;
    }
    Ok(Verdict::Applied)
}
