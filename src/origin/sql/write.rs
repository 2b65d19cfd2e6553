//! What a rule writes to a database, and how Postgres is told.
//!
//! All changes of a command are one transaction, whose statements the server bounds in time, and the pauses between them as well: so
//! however long this process sleeps, a write is over within a few times the origin's timeout.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Column as _, Postgres, Row as _};
use tokio::time::Instant;

use super::super::changes;
use super::super::error::{Failure, OriginError};
use super::super::{Carriage, Changed, Commits};
use super::batch::Parts;
use super::input::{Input, Inputs};
use super::postgres::{Fault, Parameter, SETTINGS, cast, failure, parameters, plain, unnamed};
use super::template::{Dialect, Purpose, Template};
use super::versions;
use super::{by_dialect, text_of};
use crate::policy::snapshot::Sensitive;
use crate::policy::{KeyPattern, RowVersion};

/// After this time a statement is described anew: its tables may have changed.
const DESCRIPTION_LASTS: Duration = Duration::from_secs(60);
/// Notes something in the log, as a part of the transaction. The driver would look up the type of the answer otherwise, and lose the statement.
const NOTE: &str = "SELECT CAST(pg_catalog.pg_logical_emit_message(true, $1, $2) AS pg_catalog.text)";
/// The longest message of a server that is told to a client, in bytes.
const MAX_MESSAGE_BYTES: usize = 512;

/// What a rule writes to a database.
#[derive(Debug)]
pub(in crate::origin) struct Orders {
    /// Absent where the statements do not follow the dialect. One is always there.
    postgres: Option<Kit>,
    sqlite: Option<Kit>,
    version: Option<RowVersion>,
    deletes: bool,
    increments: bool,
    /// What a value must have, where values are hashes.
    fields: Option<Vec<String>>,
}

/// What a rule says of its writes.
#[derive(Debug)]
pub(in crate::origin) struct Texts<'t> {
    /// The statement for a value.
    pub(in crate::origin) write: &'t str,
    /// That for a deletion.
    pub(in crate::origin) delete: Option<&'t str>,
    /// What tells versions.
    pub(in crate::origin) version: Option<&'t RowVersion>,
    /// That which raises a number.
    pub(in crate::origin) increment: Option<&'t str>,
    /// How writes come to the database.
    pub(in crate::origin) carriage: Carriage,
    /// Whether values are hashes.
    pub(in crate::origin) is_of_hashes: bool,
}

#[derive(Debug)]
struct Kit {
    write: Template,
    delete: Option<Template>,
    increment: Option<Template>,
    described: [Described; 3],
}

/// What is done to a key's row.
#[derive(Debug)]
pub(in crate::origin) enum Deed {
    /// It stores this.
    Store(Vec<u8>),
    /// It goes.
    Delete,
    /// Its number is raised by so much.
    Increment(i64),
}

/// One change.
#[derive(Debug)]
pub(in crate::origin) struct Step {
    /// The key's parts.
    pub(super) parts: Parts,
    /// What is done to it.
    pub(super) deed: Deed,
    /// The number of the write, where it comes from a journal.
    pub(super) version: u64,
    /// The counter that its version is drawn from, where Larder keeps versions.
    pub(super) counter: Option<i64>,
    /// What is noted in the log of Postgres beside it.
    note: Option<Vec<u8>>,
}

impl Step {
    /// With this note.
    pub(in crate::origin) fn noted(self, note: Option<Vec<u8>>) -> Self {
        Self { note, ..self }
    }

    /// With this counter.
    pub(in crate::origin) fn counted(self, counter: Option<i64>) -> Self {
        Self { counter, ..self }
    }
}

/// How the server takes a statement's parameters.
#[derive(Debug, Default)]
struct Described(Mutex<Option<(Instant, Arc<Statement>)>>);

#[derive(Debug)]
struct Statement {
    sql: String,
    parameters: Vec<Parameter>,
}

impl Orders {
    pub(in crate::origin) fn new(keys: &KeyPattern, url: &Sensitive, texts: &Texts<'_>) -> Result<Self, OriginError> {
        let Texts { delete, version, carriage, is_of_hashes, .. } = *texts;
        let (postgres, sqlite) = by_dialect(url, |dialect| Kit::parse(keys, dialect, texts))?;
        let compares = postgres.iter().chain(&sqlite).all(|kit| kit.write.compares());
        if let (Carriage::Behind, Some(RowVersion::Column(column)), false) = (carriage, version, compares) {
            let why =
                format!("it takes no heed of the version: end it with … WHERE t.{column} < $version, and store $version there");
            return Err(OriginError::Template { place: "write", why });
        }
        // Told from a journal, a write compares the version and need not tell it.
        let version = version.filter(|_| carriage == Carriage::Through).cloned();
        let fields = postgres.iter().chain(&sqlite).next().map(|kit| kit.write.fields()).filter(|_| is_of_hashes);
        Ok(Self { postgres, sqlite, version, deletes: delete.is_some(), increments: texts.increment.is_some(), fields })
    }

    /// What a value must have, where values are hashes.
    pub(in crate::origin) fn fields(&self) -> Option<&[String]> {
        self.fields.as_deref()
    }

    /// Whether there is a statement for deletions.
    pub(in crate::origin) fn deletes(&self) -> bool {
        self.deletes
    }

    /// Whether there is a statement that raises a number.
    pub(in crate::origin) fn increments(&self) -> bool {
        self.increments
    }

    /// The counter that versions of this key are drawn from, where Larder keeps versions.
    pub(in crate::origin) fn counter_of(&self, key: &[u8]) -> Option<i64> {
        matches!(self.version, Some(RowVersion::Kept {})).then(|| versions::counter_of(key))
    }

    /// One change. `None` where a part of the key cannot be in a database.
    pub(in crate::origin) fn step(parts: &[&[u8]], value: Option<Vec<u8>>, version: u64) -> Option<Step> {
        Self::step_of(parts, value.map_or(Deed::Delete, Deed::Store), version)
    }

    /// A number that is raised. `None` where a part of the key cannot be in a database.
    pub(in crate::origin) fn increment(parts: &[&[u8]], by: i64) -> Option<Step> {
        Self::step_of(parts, Deed::Increment(by), 0)
    }

    fn step_of(parts: &[&[u8]], deed: Deed, version: u64) -> Option<Step> {
        let parts = parts.iter().map(|part| text_of(part)).collect::<Option<Parts>>()?;
        Some(Step { parts, deed, version, counter: None, note: None })
    }

    fn kit(&self, dialect: Dialect) -> Result<&Kit, Failure> {
        let kit = match dialect {
            Dialect::Postgres => self.postgres.as_ref(),
            Dialect::Sqlite => self.sqlite.as_ref(),
        };
        kit.ok_or_else(|| Failure::Unusable(format!("the statement is not {dialect:?}'s SQL, and the url is")))
    }

    /// Whether a write compares versions, so that it changes nothing where a newer one is there.
    pub(super) fn compares(&self) -> bool {
        self.postgres.iter().chain(&self.sqlite).any(|kit| kit.write.compares())
    }

    /// The statements may no longer be what was described.
    pub(super) fn forget(&self) {
        self.postgres.iter().flat_map(|kit| &kit.described).for_each(|described| described.set(None));
    }

    /// The statement for a change, and what it is to return.
    pub(super) fn order(&self, dialect: Dialect, step: &Step) -> Result<(&Template, Returns<'_>), Failure> {
        let kit = self.kit(dialect)?;
        let version = self.version.as_ref().and_then(RowVersion::column);
        let absent = |name: &str| Failure::Unusable(format!("there is no `{name}`: write one"));
        Ok(match step.deed {
            Deed::Store(_) => (&kit.write, Returns { version, number: false }),
            Deed::Delete => (kit.delete.as_ref().ok_or_else(|| absent("delete"))?, Returns { version: None, number: false }),
            Deed::Increment(_) => (kit.increment.as_ref().ok_or_else(|| absent("increment"))?, Returns { version, number: true }),
        })
    }
}

/// What a statement is to return of each row that it changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Returns<'o> {
    /// The column that tells the row's version.
    version: Option<&'o str>,
    /// Whether the other column, of which there is one, is a number.
    number: bool,
}

impl Returns<'_> {
    /// Whether that is nothing.
    pub(super) fn is_nothing(self) -> bool {
        self.version.is_none() && !self.number
    }

    /// What came of a change, by the rows that it returned: `columns` are the names of theirs, and `whole` reads a whole number out of one.
    pub(super) fn changed<R>(
        self,
        rows: &[R],
        columns: impl Fn(&R) -> Vec<String>,
        whole: impl Fn(&R, usize) -> Option<i64>,
    ) -> Result<Changed, Failure> {
        let mut changed = Changed { rows: rows.len() as u64, ..Changed::default() };
        for row in rows {
            let names = columns(row);
            if let Some(column) = self.version {
                let at = names.iter().position(|name| name == column);
                let version = at.and_then(|at| whole(row, at)).ok_or_else(|| no_version(column))?;
                changed.version = changed.version.max(u64::try_from(version).ok());
            }
            if self.number {
                let mut others = (0..names.len()).filter(|at| Some(names[*at].as_str()) != self.version);
                let (Some(at), None) = (others.next(), others.next()) else { return Err(no_number()) };
                let null = || Failure::Rejected("what `increment` returned is no whole number".to_owned());
                changed.number = Some(whole(row, at).ok_or_else(null)?);
            }
        }
        Ok(changed)
    }
}

impl Kit {
    fn parse(keys: &KeyPattern, dialect: Dialect, texts: &Texts<'_>) -> Result<Self, OriginError> {
        let Texts { write, delete, carriage, is_of_hashes, .. } = *texts;
        let parse = |place, text, purpose| {
            Template::parse(text, keys, dialect, purpose).map_err(|why| OriginError::Template { place, why })
        };
        let (purpose, parameters) = match (is_of_hashes, carriage) {
            (false, _) => (Purpose::Write(carriage), "$value, or $value.name for a member of its JSON object"),
            (true, Carriage::Through) => (Purpose::WriteFields, "$value.name for each of its fields"),
            (true, Carriage::Behind) => {
                return Err(OriginError::Template { place: "write", why: "hashes cannot be written behind".to_owned() });
            }
        };
        let write = parse("write", write, purpose)?;
        if !write.stores() {
            let why = format!("it stores nothing of the value: write {parameters}");
            return Err(OriginError::Template { place: "write", why });
        }
        let delete = delete.map(|text| parse("delete", text, Purpose::Delete(carriage))).transpose()?;
        let increment = texts.increment.map(|text| parse("increment", text, Purpose::Increment)).transpose()?;
        if let Some(increment) = &increment {
            let refuse = |why: &str| Err(OriginError::Template { place: "increment", why: why.to_owned() });
            if !increment.raises() {
                return refuse("it raises nothing: write $by for how much, as in SET n = n + $by");
            }
            // Without it no row would seem to have changed.
            if !increment.mentions("returning") {
                return refuse("it returns nothing: end it with RETURNING and the number");
            }
        }
        for (place, template) in [("write", Some(&write)), ("delete", delete.as_ref()), ("increment", increment.as_ref())] {
            let names_all =
                |template: &Template| (0..keys.parts().count()).all(|at| template.parts().iter().any(|u| u.index == at));
            if template.is_some_and(|template| !names_all(template)) {
                let parts = keys.parts().map(|part| format!("${part}")).collect::<Vec<_>>().join(", ");
                let why = format!("it leaves out a part of the key, and could touch other keys' rows: use {parts}");
                return Err(OriginError::Template { place, why });
            }
        }
        Ok(Self { write, delete, increment, described: Default::default() })
    }
}

impl Changed {
    /// A write that changed nothing was not made, unless it `compares` versions and a newer one is there.
    pub(super) fn checked(self, step: &Step, compares: bool) -> Result<Self, Failure> {
        match (self.rows, &step.deed) {
            (0, Deed::Store(_) | Deed::Increment(_)) if !compares => {
                Err(Failure::Rejected("the statement changed no row: none is there, or it is newer than this".to_owned()))
            }
            (2.., Deed::Increment(_)) => Err(Failure::Rejected("the statement changed several rows".to_owned())),
            _ => Ok(self),
        }
    }
}

/// Why a number that was raised is not known.
fn no_number() -> Failure {
    Failure::Unusable(
        "`increment` does not return one column beside the version's: end it with RETURNING and the number".to_owned(),
    )
}

/// Why a write told no version.
fn no_version(column: &str) -> Failure {
    Failure::Unusable(format!("`write` gives no column `{column}` that is a whole number: end it with RETURNING {column}"))
}

/// Makes all changes in one transaction of Postgres, or none. Makes the table of versions where it is needed and the login may.
pub(super) async fn in_postgres(
    connection: &mut PgConnection,
    orders: &Orders,
    steps: &[Step],
    deadline: Instant,
    commits: &Commits,
) -> Result<Vec<Changed>, Failure> {
    if let Some(changed) = try_in_postgres(connection, orders, steps, deadline, commits).await? {
        return Ok(changed);
    }
    versions::create_in_postgres(connection).await?;
    try_in_postgres(connection, orders, steps, deadline, commits).await?.ok_or_else(versions::not_found)
}

/// `None`: nothing has changed, since there is no table of versions.
async fn try_in_postgres(
    connection: &mut PgConnection,
    orders: &Orders,
    steps: &[Step],
    deadline: Instant,
    commits: &Commits,
) -> Result<Option<Vec<Changed>>, Failure> {
    let outcome = match begin(connection, deadline).await {
        Ok(()) => run_all(connection, orders, steps).await,
        Err(fault) => Err(fault),
    };
    match outcome {
        Ok(None) => roll_back(connection).await.map(|()| None),
        Ok(changed) if Instant::now() < deadline => commit(connection, changed, commits).await,
        Ok(_) => undo(connection, Failure::Timeout).await,
        Err(fault) => {
            orders.forget();
            undo(connection, refusal(fault)).await
        }
    }
}

pub(super) async fn begin(connection: &mut PgConnection, deadline: Instant) -> Result<(), Fault> {
    let millis = deadline.saturating_duration_since(Instant::now()).as_millis().clamp(1, i32::MAX as u128);
    let sql = format!(
        "BEGIN READ WRITE; SET LOCAL statement_timeout = {millis}; \
         SET LOCAL idle_in_transaction_session_timeout = {millis}; {SETTINGS}"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
    Ok(())
}

/// As [`try_in_postgres`], within the transaction.
async fn run_all(connection: &mut PgConnection, orders: &Orders, steps: &[Step]) -> Result<Option<Vec<Changed>>, Fault> {
    let Some(drawn) = versions::draw_in_postgres(connection, steps).await? else { return Ok(None) };
    let mut changed = Vec::with_capacity(steps.len());
    for step in steps {
        let made = run_one(connection, orders, step).await?.checked(step, false)?;
        changed.push(drawn.complete(made, step));
    }
    Ok(Some(changed))
}

/// Makes one change within a transaction.
pub(super) async fn run_one(connection: &mut PgConnection, orders: &Orders, step: &Step) -> Result<Changed, Fault> {
    if let Some(note) = &step.note {
        // Before the change: whoever reads the log knows of it when it comes to the row.
        unnamed(NOTE).bind(changes::NOTE_PREFIX).bind(note.clone()).execute(&mut *connection).await?;
    }
    let (template, returns) = orders.order(Dialect::Postgres, step)?;
    let place = match step.deed {
        Deed::Store(_) => 0,
        Deed::Delete => 1,
        Deed::Increment(_) => 2,
    };
    let described = &orders.kit(Dialect::Postgres)?.described[place];
    let statement = describe(connection, described, template).await?;
    let inputs = Inputs::new(template, step).map_err(Failure::Rejected)?;
    let mut query = unnamed(&statement.sql);
    for (used, parameter) in template.parts().iter().zip(&statement.parameters) {
        query = bind(query, parameter, inputs.get(used.index), &used.name)?;
    }
    run(connection, query, returns).await
}

async fn describe(connection: &mut PgConnection, described: &Described, template: &Template) -> Result<Arc<Statement>, Fault> {
    if let Some(statement) = described.get() {
        return Ok(statement);
    }
    let parameters = parameters(connection, template).await?;
    let sql = cast(template, &parameters, |index| format!("${}", index + 1));
    let statement = Arc::new(Statement { sql, parameters });
    described.set(Some(Arc::clone(&statement)));
    Ok(statement)
}

type Asked<'q> = Query<'q, Postgres, PgArguments>;

/// Each parameter is bound as text and cast by the server, but for bytes, which go as they are.
fn bind<'q>(query: Asked<'q>, parameter: &Parameter, input: Input, name: &str) -> Result<Asked<'q>, Fault> {
    let text = match input {
        Input::Null => return Ok(query.bind(None::<String>)),
        Input::Whole(bytes) if parameter.cast == "bytea" => return Ok(query.bind(bytes)),
        Input::Whole(bytes) => match String::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => text,
            _ => {
                let why = format!("the value is no text, and ${name} is a {}: store it in a bytea", parameter.cast);
                return Err(Failure::Rejected(why).into());
            }
        },
        Input::Part(text) | Input::Text(text) | Input::Number(text) => text,
        Input::Truth(truth) => truth.to_string(),
    };
    Ok(query.bind(text))
}

async fn run(connection: &mut PgConnection, query: Asked<'_>, returns: Returns<'_>) -> Result<Changed, Fault> {
    if returns.is_nothing() {
        let done = query.execute(&mut *connection).await?;
        return Ok(Changed { rows: done.rows_affected(), ..Changed::default() });
    }
    let rows = query.fetch_all(&mut *connection).await?;
    let columns = |row: &PgRow| row.columns().iter().map(|column| column.name().to_owned()).collect::<Vec<_>>();
    Ok(returns.changed(&rows, columns, whole)?)
}

/// The whole number in a column.
fn whole(row: &PgRow, at: usize) -> Option<i64> {
    let wide = row.try_get::<i64, _>(at);
    let narrow = || row.try_get::<i32, _>(at).map(i64::from);
    let narrowest = || row.try_get::<i16, _>(at).map(i64::from);
    wide.or_else(|_| narrow()).or_else(|_| narrowest()).ok()
}

/// From here on it may be that the write is made and nobody hears of it.
pub(super) async fn commit<T>(connection: &mut PgConnection, made: T, commits: &Commits) -> Result<T, Failure> {
    commits.begin();
    match sqlx::raw_sql("COMMIT").execute(&mut *connection).await {
        Ok(_) => Ok(made),
        // What is checked at the end of the transaction, a deferred constraint for example, undoes it.
        Err(error) if matches!(class_of(&error).as_deref(), Some("22" | "23" | "40" | "44" | "54" | "P0")) => {
            Err(refusal(error.into()))
        }
        Err(error) => Err(Failure::Unknown { why: unknown(&error), retry: false }),
    }
}

fn unknown(error: &sqlx::Error) -> String {
    match failure(error) {
        Failure::Failed { why, .. } | Failure::Unreachable(why) | Failure::Unusable(why) => format!("at its end, {why}"),
        _ => "its end was not confirmed".to_owned(),
    }
}

/// Ends a transaction that has changed nothing.
pub(super) async fn roll_back(connection: &mut PgConnection) -> Result<(), Failure> {
    sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.map(|_| ()).map_err(|error| failure(&error))
}

/// Ends a transaction that failed. The failure stays what it is, unless the connection is gone as well.
pub(super) async fn undo<T>(connection: &mut PgConnection, failure: Failure) -> Result<T, Failure> {
    match sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await {
        Ok(_) => Err(failure),
        Err(_) if failure.is_trouble() => Err(failure),
        // Without its COMMIT the transaction is undone, and the connection must serve nobody.
        Err(_) => Err(Failure::Failed { why: message_of(&failure), retry: false, retry_after: None }),
    }
}

fn message_of(failure: &Failure) -> String {
    match failure {
        Failure::Rejected(why) | Failure::Unusable(why) => why.clone(),
        _ => "the transaction was undone".to_owned(),
    }
}

fn class_of(error: &sqlx::Error) -> Option<String> {
    let sqlx::Error::Database(error) = error else { return None };
    error.code()?.get(..2).map(str::to_owned)
}

/// What a failure means for a write. What the database refuses is told in its own words: they are about the client's own values.
pub(super) fn refusal(fault: Fault) -> Failure {
    match fault {
        Fault::Sql(sqlx::Error::Database(error))
            if matches!(
                error.code().as_deref().and_then(|code| code.get(..2)),
                Some("22" | "23" | "27" | "44" | "54" | "P0")
            ) =>
        {
            let mut message = error.message().to_owned();
            let end = (0..=MAX_MESSAGE_BYTES.min(message.len())).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
            Failure::Rejected(format!("{message} (SQLSTATE {})", error.code().unwrap_or_default()))
        }
        fault => plain(fault),
    }
}

impl Described {
    fn get(&self) -> Option<Arc<Statement>> {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().filter(|(since, _)| since.elapsed() < DESCRIPTION_LASTS).map(|(_, statement)| Arc::clone(statement))
    }

    fn set(&self, statement: Option<Arc<Statement>>) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *current = statement.map(|statement| (Instant::now(), statement));
    }
}
