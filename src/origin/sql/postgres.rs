//! Postgres, directly or behind PgBouncer in transaction mode.
//!
//! Each load is one read-only transaction with unnamed statements, so that a pooler may hand every load another server
//! connection. The server tells the types of a statement's parameters once (`PREPARE` in a transaction, then
//! `pg_prepared_statements`); from then on every part is bound as text and cast to its type, and the statement runs as a subquery
//! whose columns the server turns into text or JSON. So any type works that Postgres can read and write as text, and the text
//! is Postgres' own.

use std::io::ErrorKind;
use std::str::FromStr as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgColumn, PgConnectOptions, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Column as _, ConnectOptions as _, Postgres, Row as _, ValueRef as _};
use tokio::time::Instant;

use super::super::Loaded;
use super::super::error::Failure;
use super::batch::{Answer, Matching, Parts, several_rows};
use super::shape::{Form, canonical_integer};
use super::template::{Dialect, Template, Used};
use super::{Question, Statements};

/// After this time a statement is described anew: its tables may have changed.
const DESCRIPTION_LASTS: Duration = Duration::from_secs(60);

/// The parameters of a URL that mean something.
const URL_PARAMETERS: [&str; 19] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "statement-cache-capacity",
    "connect_timeout",
];

/// Settings that decide how values are written. A role or a database may have set others.
pub(super) const SETTINGS: &str = "SET LOCAL DateStyle = 'ISO, MDY'; SET LOCAL TimeZone = 'UTC'; SET LOCAL IntervalStyle = 'postgres'; \
     SET LOCAL bytea_output = 'hex'; SET LOCAL extra_float_digits = 1; SET LOCAL standard_conforming_strings = on";

const BYTEA: u32 = 17;
const BPCHAR: u32 = 1042;

/// What the server told about a rule's statements.
#[derive(Debug, Default)]
pub(super) struct Described {
    current: Mutex<Option<(Instant, Arc<Description>)>>,
}

#[derive(Debug)]
struct Description {
    form: Form,
    read: Statement,
    many: Option<Statement>,
}

#[derive(Debug)]
struct Statement {
    sql: String,
    parameters: Vec<Parameter>,
}

/// How a part of the key is bound.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    /// Its place among the pattern's parts.
    pub(super) index: usize,
    check: Check,
    /// The type as SQL names it; for `readMany` an array's.
    pub(super) cast: String,
}

/// Which texts a type takes. One value has one spelling as far as possible: else one row would be cached under many keys, and
/// an invalidation would miss all but one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    Integer {
        least: i64,
        most: i64,
    },
    Text,
    Uuid,
    Bool,
    /// Only the server knows.
    Server,
}

#[derive(Debug)]
struct Column {
    name: String,
    oid: Option<u32>,
}

/// Why a transaction ended.
#[derive(Debug)]
pub(super) enum Fault {
    Sql(sqlx::Error),
    Failure(Failure),
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl Described {
    /// Whether the parts can be what the statement asks for, as far as is known without asking the server.
    pub(super) fn admits(&self, parts: &Parts) -> bool {
        self.get().is_none_or(|description| description.read.admits(parts))
    }

    fn get(&self) -> Option<Arc<Description>> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().filter(|(since, _)| since.elapsed() < DESCRIPTION_LASTS).map(|(_, description)| Arc::clone(description))
    }

    fn set(&self, description: Option<Arc<Description>>) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = description.map(|description| (Instant::now(), description));
    }
}

impl Statement {
    fn admits(&self, parts: &Parts) -> bool {
        self.parameters.iter().all(|parameter| parameter.check.accepts(&parts[parameter.index]).is_some())
    }

    /// Whether this side can tell which texts are the same value.
    fn is_exact(&self) -> bool {
        self.parameters.iter().all(|parameter| parameter.check != Check::Server)
    }
}

impl Check {
    fn of(oid: u32) -> Self {
        match oid {
            20 => Self::Integer { least: i64::MIN, most: i64::MAX },
            21 => Self::Integer { least: i64::from(i16::MIN), most: i64::from(i16::MAX) },
            23 => Self::Integer { least: i64::from(i32::MIN), most: i64::from(i32::MAX) },
            25 | 1043 => Self::Text,
            2950 => Self::Uuid,
            16 => Self::Bool,
            _ => Self::Server,
        }
    }

    /// The text that the server would show for `part`, or `None` where the type has no such value.
    fn accepts(self, part: &str) -> Option<String> {
        let accepted = match self {
            Self::Integer { least, most } => canonical_integer(part).is_some_and(|number| (least..=most).contains(&number)),
            Self::Uuid => is_uuid(part),
            Self::Bool => part == "true" || part == "false",
            Self::Text | Self::Server => true,
        };
        accepted.then(|| if self == Self::Uuid { part.to_ascii_lowercase() } else { part.to_owned() })
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

pub(super) fn check_url(url: &str) -> Result<(), String> {
    options(url).map(|_| ())
}

pub(in crate::origin) fn options(url: &str) -> Result<PgConnectOptions, String> {
    let wrong = || "write postgres://USER:PASSWORD@HOST:PORT/DATABASE, where ?sslmode=… and the like may follow".to_owned();
    let parsed = reqwest::Url::parse(url.trim()).map_err(|_| wrong())?;
    for (name, _) in parsed.query_pairs() {
        if !URL_PARAMETERS.contains(&name.as_ref()) && !name.starts_with("options[") {
            let name: String = name.chars().take(40).collect();
            return Err(format!("it has an unknown parameter `{name}`: the known ones are {}", URL_PARAMETERS.join(", ")));
        }
    }
    let options = PgConnectOptions::from_str(url.trim()).map_err(|_| wrong())?;
    let options = if options.get_application_name().is_none() { options.application_name("larder") } else { options };
    // PgBouncer refuses extra_float_digits as a start-up parameter and cannot keep named statements.
    Ok(options.statement_cache_capacity(0).extra_float_digits(None).disable_statement_logging())
}

pub(in crate::origin) async fn connect(url: &str) -> Result<PgConnection, Failure> {
    let options = options(url).map_err(Failure::Unusable)?;
    options.connect().await.map_err(|error| unconnected(&error))
}

/// Why there is no connection. What TLS says names certificates and hosts, no secrets.
fn unconnected(error: &sqlx::Error) -> Failure {
    let tls =
        |why: &dyn std::fmt::Display| Failure::Unreachable(format!("TLS failed: {why}: check sslmode and the certificates"));
    match error {
        sqlx::Error::Tls(why) => tls(why),
        sqlx::Error::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => tls(error),
        sqlx::Error::Io(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            Failure::Unreachable(format!("a file or a socket that the url names cannot be opened: {}", error.kind()))
        }
        error => failure(error),
    }
}

pub(super) async fn load(
    connection: &mut PgConnection,
    question: &Question,
    parts: &Parts,
    deadline: Instant,
) -> Result<Loaded, Failure> {
    let statements = question.statements(Dialect::Postgres)?;
    let outcome = read(connection, question, statements, parts, deadline).await;
    match outcome {
        Ok(loaded) => finish(connection, loaded).await,
        Err(fault) => {
            let failure = undo(connection, question, &fault).await?;
            if is_data_exception(&fault) && !parses(connection, question, parts, deadline).await? {
                return Ok(Loaded::NotFound);
            }
            Err(failure)
        }
    }
}

async fn read(
    connection: &mut PgConnection,
    question: &Question,
    statements: &Statements,
    parts: &Parts,
    deadline: Instant,
) -> Result<Loaded, Fault> {
    begin(connection, deadline).await?;
    let description = describe(connection, question, statements).await?;
    let statement = &description.read;
    if !statement.admits(parts) {
        return Ok(Loaded::NotFound);
    }
    let mut query = unnamed(&statement.sql);
    for parameter in &statement.parameters {
        query = query.bind(parts[parameter.index].as_str());
    }
    let rows = query.fetch_all(&mut *connection).await?;
    match rows.as_slice() {
        [] => Ok(Loaded::NotFound),
        [row] => Ok(value(row, &description.form)?),
        _ => Err(several_rows().into()),
    }
}

pub(super) async fn load_many(
    connection: &mut PgConnection,
    question: &Question,
    keys: &[Parts],
    deadline: Instant,
) -> Result<Vec<Answer>, Failure> {
    let statements = question.statements(Dialect::Postgres)?;
    match read_many(connection, question, statements, keys, deadline).await {
        Ok(answers) => finish(connection, answers).await,
        Err(fault) => Err(undo(connection, question, &fault).await?),
    }
}

async fn read_many(
    connection: &mut PgConnection,
    question: &Question,
    statements: &Statements,
    keys: &[Parts],
    deadline: Instant,
) -> Result<Vec<Answer>, Fault> {
    begin(connection, deadline).await?;
    let description = describe(connection, question, statements).await?;
    let Some(many) = description.many.as_ref().filter(|many| many.is_exact() && description.read.is_exact()) else {
        return Ok(vec![None; keys.len()]);
    };
    let normal = |parts: &Parts| many.parameters.iter().map(|p| p.check.accepts(&parts[p.index])).collect::<Option<Vec<_>>>();
    let mut matching = Matching::new(keys.iter().map(normal));
    let asked: Vec<Vec<String>> = keys.iter().filter_map(normal).collect();
    if asked.is_empty() {
        return Ok(matching.finish(true, |_| true));
    }
    let mut query = unnamed(&many.sql);
    for column in 0..many.parameters.len() {
        query = query.bind(asked.iter().map(|parts| parts[column].clone()).collect::<Vec<_>>());
    }
    let most = matching.asked() + 1;
    query = query.bind(i64::try_from(most).unwrap_or(i64::MAX));
    let rows = query.fetch_all(&mut *connection).await?;
    let fields = description.form.width();
    for row in &rows {
        let parts = (0..many.parameters.len()).map(|at| text(row, fields + at)).collect::<Option<Vec<_>>>();
        matching.row(parts, value(row, &description.form));
    }
    Ok(matching.finish(rows.len() < most, |_| true))
}

/// The rule's description, from the server where it is not known or too old.
async fn describe(
    connection: &mut PgConnection,
    question: &Question,
    statements: &Statements,
) -> Result<Arc<Description>, Fault> {
    if let Some(description) = question.described.get() {
        return Ok(description);
    }
    let parameters = parameters(connection, &statements.read).await?;
    let columns = columns(connection, &statements.read, &parameters).await?;
    let names: Vec<String> = columns.iter().map(|column| column.name.clone()).collect();
    let form = Form::of(&names, question.reply)?;
    let all: Vec<usize> = (0..columns.len()).collect();
    let sql = wrapped(&statements.read, &parameters, &columns, &form, &all, &[], "2");
    let read = Statement { sql, parameters };
    let many = match &statements.read_many {
        Some(template) => Some(describe_many(connection, template, &form, &columns).await?),
        None => None,
    };
    let description = Arc::new(Description { form, read, many });
    question.described.set(Some(Arc::clone(&description)));
    Ok(description)
}

/// `readMany` gives what `read` gives, found by name, and the parts.
async fn describe_many(
    connection: &mut PgConnection,
    template: &Template,
    form: &Form,
    read: &[Column],
) -> Result<Statement, Fault> {
    let refuse = |why: String| Fault::from(Failure::Unusable(why));
    let parameters = parameters(connection, template).await?;
    if let Some((used, scalar)) = template.parts().iter().zip(&parameters).find(|(_, parameter)| !parameter.cast.ends_with("[]"))
    {
        let Used { name, .. } = used;
        return Err(refuse(format!("in `readMany` ${name} is an array, not a {}: write = ANY(${name})", scalar.cast)));
    }
    let columns = columns(connection, template, &parameters).await?;
    let place = |name: &String| {
        let found = columns.iter().position(|column| column.name == *name);
        found.ok_or_else(|| refuse(format!("`readMany` gives no column `{name}`: name one so with AS")))
    };
    let mut fields = Vec::with_capacity(read.len());
    for column in read {
        let field = place(&column.name)?;
        if columns[field].oid != column.oid {
            let name = &column.name;
            return Err(refuse(format!(
                "`read` and `readMany` give `{name}` different types: give what is not the same another name"
            )));
        }
        fields.push(field);
    }
    let parts = template.parts().iter().map(|used| place(&used.name)).collect::<Result<Vec<_>, _>>()?;
    let limit = format!("CAST(${} AS bigint)", parameters.len() + 1);
    let sql = wrapped(template, &parameters, &columns, form, &fields, &parts, &limit);
    Ok(Statement { sql, parameters })
}

/// Asks the server which types the placeholders have.
pub(super) async fn parameters(connection: &mut PgConnection, template: &Template) -> Result<Vec<Parameter>, Fault> {
    if template.parts().is_empty() {
        return Ok(Vec::new());
    }
    // A name that no other client of a shared pooler uses.
    let name = format!("larder_{:016x}", fastrand::u64(..));
    let statement = template.render(|index| format!("${}", index + 1));
    let sql = format!(
        "PREPARE {name} AS {statement}\n; \
         SELECT pg_catalog.format_type(t.oid, -1), (CASE t.typcategory WHEN 'A' THEN t.typelem ELSE t.oid END)::pg_catalog.text \
         FROM pg_catalog.pg_prepared_statements AS s, \
              pg_catalog.unnest(s.parameter_types::pg_catalog.oid[]) WITH ORDINALITY AS p (type, place), pg_catalog.pg_type AS t \
         WHERE s.name = '{name}' AND t.oid = p.type ORDER BY p.place; \
         DEALLOCATE {name}"
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *connection).await?;
    let parameter = |(used, row): (&Used, &PgRow)| {
        let element = text(row, 1).and_then(|oid| oid.parse().ok()).unwrap_or(0);
        Some(Parameter { index: used.index, check: Check::of(element), cast: text(row, 0)? })
    };
    let parameters: Option<Vec<_>> = template.parts().iter().zip(&rows).map(parameter).collect();
    match parameters {
        Some(parameters) if parameters.len() == template.parts().len() => Ok(parameters),
        _ => Err(Failure::Unusable("the server does not tell the types of the statement's parameters".to_owned()).into()),
    }
}

/// Asks the server which columns the statement gives, without running it: no row is asked of it. This takes the simple protocol,
/// with NULL for each part, because sqlx looks up types that it does not know between preparing and running, which would
/// discard an unnamed statement.
async fn columns(connection: &mut PgConnection, template: &Template, parameters: &[Parameter]) -> Result<Vec<Column>, Fault> {
    let statement = cast(template, parameters, |_| "NULL".to_owned());
    let sql = format!(
        "SELECT larder_row.* FROM (VALUES (1)) AS larder_one \
         LEFT JOIN (SELECT * FROM (\n{statement}\n) AS larder_all LIMIT 0) AS larder_row ON true"
    );
    let row = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(&mut *connection).await?;
    let column = |column: &PgColumn| Column { name: column.name().to_owned(), oid: column.type_info().oid().map(|oid| oid.0) };
    Ok(row.columns().iter().map(column).collect())
}

/// The statement with `value(n)`, cast to the parameter's type, for the n-th parameter.
pub(super) fn cast(template: &Template, parameters: &[Parameter], value: impl Fn(usize) -> String) -> String {
    template.render(|index| {
        let cast = parameters.get(index).map_or("text", |parameter| parameter.cast.as_str());
        format!("CAST({} AS {cast})", value(index))
    })
}

/// The statement as a subquery, of which `fields` are taken in the value's form and `parts` as text.
fn wrapped(
    template: &Template,
    parameters: &[Parameter],
    columns: &[Column],
    form: &Form,
    fields: &[usize],
    parts: &[usize],
    limit: &str,
) -> String {
    let as_text = |index: &usize| format!("CAST(c{index} AS pg_catalog.text)");
    let field = |index: &usize| match (form.is_json(), columns[*index].oid) {
        (false, Some(BYTEA)) => format!("c{index}"),
        (false, _) => as_text(index),
        (true, Some(BPCHAR)) => format!("CAST(pg_catalog.to_json({}) AS pg_catalog.text)", as_text(index)),
        (true, _) => format!("CAST(pg_catalog.to_json(c{index}) AS pg_catalog.text)"),
    };
    let taken = fields.iter().map(field).chain(parts.iter().map(as_text)).collect::<Vec<_>>().join(", ");
    let names = (0..columns.len()).map(|index| format!("c{index}")).collect::<Vec<_>>().join(", ");
    let statement = cast(template, parameters, |index| format!("${}", index + 1));
    format!("SELECT {taken} FROM (\n{statement}\n) AS larder_row ({names}) LIMIT {limit}")
}

pub(super) fn unnamed(sql: &str) -> Query<'_, Postgres, PgArguments> {
    sqlx::query(AssertSqlSafe(sql.to_owned())).persistent(false)
}

fn value(row: &PgRow, form: &Form) -> Result<Loaded, Failure> {
    form.value((0..form.width()).map(|index| bytes(row, index)))
}

fn bytes(row: &PgRow, index: usize) -> Option<&[u8]> {
    let raw = row.try_get_raw(index).ok()?;
    if raw.is_null() { None } else { raw.as_bytes().ok() }
}

fn text(row: &PgRow, index: usize) -> Option<String> {
    String::from_utf8(bytes(row, index)?.to_vec()).ok()
}

/// Begins a read-only transaction which the server ends itself when the load's time is over.
async fn begin(connection: &mut PgConnection, deadline: Instant) -> Result<(), Fault> {
    let millis = deadline.saturating_duration_since(Instant::now()).as_millis().clamp(1, i32::MAX as u128);
    let sql = format!("BEGIN READ ONLY; SET LOCAL statement_timeout = {millis}; {SETTINGS}");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
    Ok(())
}

async fn finish<T>(connection: &mut PgConnection, outcome: T) -> Result<T, Failure> {
    // What was read is already certain: that the transaction ends is the connection's business.
    match sqlx::raw_sql("COMMIT").execute(&mut *connection).await {
        Ok(_) => Ok(outcome),
        Err(error) => Err(failure(&error)),
    }
}

/// Ends a transaction that failed, and says how. The error is that the connection cannot be used any more.
async fn undo(connection: &mut PgConnection, question: &Question, fault: &Fault) -> Result<Failure, Failure> {
    let failure = match fault {
        Fault::Failure(failure) => failure.clone(),
        Fault::Sql(error) => failure_of(error, question),
    };
    match sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await {
        Ok(_) => Ok(failure),
        // The first failure says more than that the connection is gone too.
        Err(_) if failure.is_trouble() => Err(failure),
        Err(error) => Err(self::failure(&error)),
    }
}

fn failure_of(error: &sqlx::Error, question: &Question) -> Failure {
    // The statement may no longer be what was described: the next load asks again.
    question.described.set(None);
    failure(error)
}

fn is_data_exception(fault: &Fault) -> bool {
    matches!(fault, Fault::Sql(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code.starts_with("22")))
}

/// Whether every part can be read as its parameter's type. Only the server can tell for types such as dates and enums.
async fn parses(connection: &mut PgConnection, question: &Question, parts: &Parts, deadline: Instant) -> Result<bool, Failure> {
    let template = &question.statements(Dialect::Postgres)?.read;
    begin(connection, deadline).await.map_err(plain)?;
    let outcome = probe(connection, template, parts).await;
    sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.map_err(|error| failure(&error))?;
    match outcome {
        Ok(()) => Ok(true),
        Err(fault) if is_data_exception(&fault) => Ok(false),
        Err(fault) => Err(plain(fault)),
    }
}

async fn probe(connection: &mut PgConnection, template: &Template, parts: &Parts) -> Result<(), Fault> {
    let parameters = parameters(connection, template).await?;
    let casts =
        parameters.iter().enumerate().map(|(at, parameter)| format!("CAST(CAST(${} AS {}) AS text)", at + 1, parameter.cast));
    let sql = format!("SELECT {}", casts.collect::<Vec<_>>().join(", "));
    let mut query = unnamed(&sql);
    for parameter in &parameters {
        query = query.bind(parts[parameter.index].as_str());
    }
    query.fetch_all(&mut *connection).await?;
    Ok(())
}

pub(super) fn plain(fault: Fault) -> Failure {
    match fault {
        Fault::Sql(error) => failure(&error),
        Fault::Failure(failure) => failure,
    }
}

/// What an error means for the load. Texts of the server are repeated only for classes that speak of names, not of values.
pub(in crate::origin) fn failure(error: &sqlx::Error) -> Failure {
    const QUERY_CANCELED: &str = "57014";
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            let why = match code.get(..2) {
                Some("08" | "0A" | "25" | "28" | "3D" | "3F" | "42" | "53" | "57") => {
                    format!("{} (SQLSTATE {code})", error.message())
                }
                _ => format!("SQLSTATE {code}"),
            };
            match code.get(..2) {
                _ if code == QUERY_CANCELED => Failure::Timeout,
                // Connections, log-in, missing database, conflicts, resources, operator intervention, internal.
                Some("08" | "28" | "3D" | "40" | "53" | "55" | "57" | "58" | "XX") => {
                    Failure::Failed { why, retry: true, retry_after: None }
                }
                _ => Failure::Unusable(why),
            }
        }
        sqlx::Error::Io(error) => Failure::Unreachable(error.kind().to_string()),
        sqlx::Error::Tls(_) => Failure::Unreachable("no TLS: check sslmode and the certificates".to_owned()),
        _ => Failure::Unreachable("the connection broke".to_owned()),
    }
}
