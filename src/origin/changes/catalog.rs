//! What a database must have for its changes to be told, and how that comes about: a publication of the tables, and a slot that keeps what
//! was not told yet.
//!
//! A publication is there before its slot. A slot that is older than its publication would tell of a time in which that was not there, and
//! Postgres then ends the stream with an error, each time anew. So such a slot is made anew, or moved past that time where somebody else has
//! made it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection as _, Postgres, Row as _};
use tokio::time::{Instant, sleep, timeout};

use super::pgoutput::Lsn;
use super::snapshot::Snapshot;
use crate::origin::error::Failure;
use crate::origin::sql::{postgres_connect, postgres_failure};
use crate::policy::changes::{OWN_SLOT_PREFIX, TableName};

/// How long one statement may take. A slot is made when all transactions have ended that were under way.
const STATEMENT_LIMIT: Duration = Duration::from_secs(60);
/// How long a lock on a table is waited for: behind such a wait others would stand.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
/// How often, and in which steps, the end of another reader is waited for.
const ENDS: (u32, Duration) = (50, Duration::from_millis(100));

/// What [`Catalog::tables`] asks of tables, by two lists of names: the kind, whether they are logged, and whether all that keep rows have
/// an identity.
const TABLES: &str = "\
SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence = 'p', NOT EXISTS (\
 SELECT 1 FROM (SELECT c.oid AS id WHERE c.relkind <> 'p' \
  UNION SELECT t.relid::oid FROM pg_catalog.pg_partition_tree(c.oid) AS t WHERE t.isleaf AND c.relkind = 'p') AS kept \
 JOIN pg_catalog.pg_class AS l ON l.oid = kept.id \
 WHERE l.relreplident = 'n' OR (l.relreplident = 'd' AND NOT EXISTS (\
  SELECT 1 FROM pg_catalog.pg_index AS i WHERE i.indrelid = l.oid AND i.indisprimary)))\
 FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
 JOIN (SELECT DISTINCT * FROM unnest($1::text[], $2::text[])) AS wanted (s, t) ON n.nspname = wanted.s AND c.relname = wanted.t";

/// What [`Catalog::columns`] asks of columns, by three lists of names: those whose old values are not told of
/// all rows, whether there are such, and whether the table has partitions.
const UNTOLD: &str = "\
SELECT wanted.s, wanted.t, wanted.c, known.there, c.relkind = 'p' FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (s, t, c) \
 JOIN pg_catalog.pg_namespace AS n ON n.nspname = wanted.s \
 JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.t \
 CROSS JOIN LATERAL (SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_attribute AS a \
  WHERE a.attrelid = c.oid AND a.attname = wanted.c AND a.attnum > 0 AND NOT a.attisdropped)) AS known (there) \
 WHERE NOT known.there OR EXISTS (\
  SELECT 1 FROM (SELECT c.oid AS id WHERE c.relkind <> 'p' \
   UNION SELECT t.relid::oid FROM pg_catalog.pg_partition_tree(c.oid) AS t WHERE t.isleaf AND c.relkind = 'p') AS kept \
  JOIN pg_catalog.pg_class AS l ON l.oid = kept.id \
  WHERE l.relreplident <> 'f' AND NOT EXISTS (\
   SELECT 1 FROM pg_catalog.pg_index AS i \
   JOIN pg_catalog.pg_attribute AS a ON a.attrelid = l.oid AND a.attnum = ANY (i.indkey) \
   WHERE i.indrelid = l.oid AND a.attname = wanted.c AND ((l.relreplident = 'd' AND i.indisprimary) \
    OR (l.relreplident = 'i' AND i.indisreplident)))) ORDER BY 1, 2, 3";

/// What a server says of what a login may not do.
const FORBIDDEN: &str = "42501";

/// Tables that are followed, each with the columns whose values are needed, of rows as they are and as they were.
pub type Needs = BTreeMap<TableName, BTreeSet<String>>;

/// Where a stream comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The slot's name: small letters, digits and `_`.
    pub slot: String,
    /// The publication's name.
    pub publication: String,
    /// Whether the publication is somebody else's: it is looked at, and never changed.
    pub given: bool,
}

impl Place {
    /// Whether the slot is Larder's own by its name.
    pub fn names_own_slot(&self) -> bool {
        self.slot.starts_with(OWN_SLOT_PREFIX)
    }
}

/// Whose a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotOwner {
    /// Larder's: it goes when nobody follows any more.
    Larder,
    /// Somebody else has made it: it stays.
    Other,
}

/// What there is for a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ready {
    /// Whether the slot was made just now, or moved: what was committed before is not told.
    pub is_new: bool,
    /// Up to where the slot was confirmed.
    pub confirmed: Lsn,
    /// Tables that are told of from now on, and were not before.
    pub added: Vec<TableName>,
    /// What is wrong with single tables, which are not told of, or not in full. The texts name the remedy.
    pub troubles: Vec<String>,
}

/// How far a slot is behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// How many bytes of the log are kept for it.
    pub bytes: u64,
    /// Whether it was lost: what it kept is gone.
    pub lost: bool,
}

/// An ordinary connection to a database, for questions about its changes.
pub(super) struct Catalog(PgConnection);

impl Catalog {
    pub async fn open(url: &str) -> Result<Self, Failure> {
        let mut connection = postgres_connect(url).await?;
        let (statement, lock) = (STATEMENT_LIMIT.as_millis(), LOCK_LIMIT.as_millis());
        let settings = format!("SET statement_timeout = {statement}; SET lock_timeout = {lock}; SET search_path = pg_catalog");
        sqlx::raw_sql(AssertSqlSafe(settings)).execute(&mut connection).await.map_err(|error| postgres_failure(&error))?;
        Ok(Self(connection))
    }

    /// Sees to it that there is all that a stream of `tables` needs, and that nobody else reads the slot, which is `owner`'s. With `anew`,
    /// what it keeps is of no use.
    pub async fn prepare(&mut self, place: &Place, tables: &Needs, owner: SlotOwner, anew: bool) -> Result<Ready, Failure> {
        let mut ready = Ready::default();
        let fit = self.tables(tables, &mut ready.troubles).await?;
        self.columns(tables, &fit, &mut ready.troubles).await?;
        let was_made = self.publish(place, &fit, &mut ready).await?;
        let begins = self.begin(place, owner, anew || was_made).await;
        if begins.is_err() && was_made {
            // Whoever tries again is to see that the slot is older. Where this fails as well, the server says so in the stream.
            let _ = self.unpublish(place).await;
        }
        (ready.is_new, ready.confirmed) = begins?;
        Ok(ready)
    }

    /// Whether the slot tells of nothing that was committed before, and from where on it tells. With `anew`, what it keeps is of no use: it is
    /// made anew where it is Larder's, and moved where it is not.
    async fn begin(&mut self, place: &Place, owner: SlotOwner, anew: bool) -> Result<(bool, Lsn), Failure> {
        match self.slot(place, anew && owner == SlotOwner::Larder).await? {
            Some(confirmed) if !anew => Ok((false, confirmed)),
            Some(_) => Ok((true, self.pass(&place.slot).await?)),
            None => {
                let row =
                    self.row("SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')", &[&place.slot]).await?;
                Ok((true, lsn(row.as_ref(), 0)?))
            }
        }
    }

    /// Moves a slot past all that is committed, once the transactions have ended that are under way, as one that is made begins: what these
    /// changed before there was a publication could not be told. Up to where.
    async fn pass(&mut self, slot: &str) -> Result<Lsn, Failure> {
        const NEXT: &str = "SELECT txid_snapshot_xmax(txid_current_snapshot())::text";
        const ENDED: &str = "SELECT txid_snapshot_xmin(txid_current_snapshot()) >= $1::bigint";
        const PASS: &str = "SELECT end_lsn::text FROM pg_replication_slot_advance($1, pg_current_wal_lsn())";
        let next = text(self.row(NEXT, &[]).await?.as_ref(), 0).unwrap_or_default();
        let began = Instant::now();
        while self.row(ENDED, &[&next]).await?.and_then(|row| row.try_get::<bool, _>(0).ok()) != Some(true) {
            if began.elapsed() > STATEMENT_LIMIT {
                let why = format!("its slot `{slot}` cannot be moved: transactions that were under way do not end");
                return Err(Failure::Failed { why, retry: true, retry_after: None });
            }
            sleep(ENDS.1).await;
        }
        lsn(self.row(PASS, &[slot]).await?.as_ref(), 0)
    }

    /// Looks again at what may have changed since. [`Ready::is_new`]: the publication had gone, and what the slot keeps is of no use.
    pub async fn look_after(&mut self, place: &Place, tables: &Needs) -> Result<Ready, Failure> {
        let mut ready = Ready::default();
        let fit = self.tables(tables, &mut ready.troubles).await?;
        self.columns(tables, &fit, &mut ready.troubles).await?;
        ready.is_new = self.publish(place, &fit, &mut ready).await?;
        Ok(ready)
    }

    /// Whether the server can tell of changes, or why not; and whether its plugin knows to tell notes.
    pub async fn check_server(&mut self) -> Result<bool, Failure> {
        const SERVER: &str =
            "SELECT current_setting('wal_level'), pg_is_in_recovery(), current_setting('server_version_num')::int >= 140000";
        let row = self.row(SERVER, &[]).await?;
        let is = |at| row.as_ref().and_then(|row| row.try_get::<bool, _>(at).ok());
        let (level, follows) = (text(row.as_ref(), 0), is(1));
        if follows != Some(false) {
            return Err(Failure::Unusable(
                "it follows another server: its changes are told by the primary, so name that one".to_owned(),
            ));
        }
        if level.as_deref() != Some("logical") {
            let level = level.unwrap_or_default();
            return Err(Failure::Unusable(format!("its wal_level is {level}: set wal_level = logical, and restart it")));
        }
        Ok(is(2) == Some(true))
    }

    /// Which of `wanted` can be told of; what is wrong with the others goes to `troubles`.
    async fn tables(&mut self, wanted: &Needs, troubles: &mut Vec<String>) -> Result<BTreeSet<TableName>, Failure> {
        let (schemas, names): (Vec<_>, Vec<_>) =
            wanted.keys().map(|name| (name.schema().to_owned(), name.table().to_owned())).unzip();
        let query = sqlx::query::<Postgres>(TABLES).persistent(false).bind(schemas).bind(names);
        let rows = query.fetch_all(&mut self.0).await.map_err(|error| postgres_failure(&error))?;
        let mut fit = BTreeSet::new();
        for name in wanted.keys() {
            let row = rows.iter().find(|row| {
                let said = |at| row.try_get::<String, _>(at).unwrap_or_default();
                name.is(&said(0), &said(1))
            });
            let is = |at| row.and_then(|row| row.try_get::<bool, _>(at).ok()) == Some(true);
            match text(row, 2).as_deref() {
                None => troubles.push(format!("there is no table `{name}`: name one as the catalogue has it")),
                Some("r" | "p") if !is(3) => {
                    troubles.push(format!("the table `{name}` is unlogged or temporary: its changes are told to nobody"));
                }
                Some("r" | "p") if !is(4) => troubles.push(format!(
                    "the table `{name}` has no primary key, and Postgres would refuse to change its rows while it is published: \
                     ALTER TABLE {name} REPLICA IDENTITY FULL, or add a primary key"
                )),
                Some("r" | "p") => drop(fit.insert(name.clone())),
                Some(_) => troubles.push(format!("`{name}` is no table: name the tables that it is made from")),
            }
        }
        Ok(fit)
    }

    /// Which columns of the tables that are `fit` are not there, or not told of rows as they were: what is wrong with them goes to `troubles`.
    async fn columns(&mut self, wanted: &Needs, fit: &BTreeSet<TableName>, troubles: &mut Vec<String>) -> Result<(), Failure> {
        let (mut schemas, mut tables, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (table, columns) in wanted.iter().filter(|(table, _)| fit.contains(table)) {
            for column in columns {
                schemas.push(table.schema().to_owned());
                tables.push(table.table().to_owned());
                names.push(column.clone());
            }
        }
        let query = sqlx::query::<Postgres>(UNTOLD).persistent(false).bind(schemas).bind(tables).bind(names);
        for row in query.fetch_all(&mut self.0).await.map_err(|error| postgres_failure(&error))? {
            let said = |at| text(Some(&row), at).unwrap_or_default();
            let table = fit.iter().find(|table| table.is(&said(0), &said(1)));
            let (table, column) = (table.map(ToString::to_string).unwrap_or_default(), said(2));
            let is = |at| row.try_get::<bool, _>(at).unwrap_or(false);
            let why = match (is(3), is(4)) {
                (false, _) => format!("the table `{table}` has no column `{column}`: name another in columns"),
                (true, has_parts) => format!(
                    "the old value of `{column}` is not told when a row of `{table}` changes: ALTER TABLE {} REPLICA IDENTITY FULL, or USING \
                     INDEX one with that column",
                    if has_parts { "each of its partitions" } else { table.as_str() }
                ),
            };
            troubles.push(format!("{why}. Until then all keys of the rules go that need it"));
        }
        Ok(())
    }

    /// Whether the publication was made just now.
    async fn publish(&mut self, place: &Place, tables: &BTreeSet<TableName>, ready: &mut Ready) -> Result<bool, Failure> {
        let name = &place.publication;
        let kinds = "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_publication WHERE pubname = $1";
        let Some(row) = self.row(kinds, &[name]).await? else {
            if place.given {
                return Err(Failure::Unusable(format!(
                    "there is no publication `{name}`: CREATE PUBLICATION {name} FOR TABLE …"
                )));
            }
            let list = tables.iter().map(quoted).collect::<Vec<_>>().join(", ");
            let list = if list.is_empty() { list } else { format!("FOR TABLE {list}") };
            let create = format!("CREATE PUBLICATION \"{name}\" {list} WITH (publish_via_partition_root = true)");
            self.publish_by(&create, true, tables.iter()).await?;
            ready.added = tables.iter().cloned().collect();
            return Ok(true);
        };
        if !row.try_get::<bool, _>(0).unwrap_or(false) {
            ready.troubles.push(format!("the publication `{name}` leaves out kinds of changes: ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')"));
        }
        let published = self.published(name).await?;
        let has = |table: &&TableName| published.iter().any(|(schema, name)| table.is(schema, name));
        for table in tables.iter().filter(|table| !has(table)) {
            if place.given {
                ready
                    .troubles
                    .push(format!("the publication `{name}` has no table `{table}`: ALTER PUBLICATION {name} ADD TABLE {table}"));
                continue;
            }
            self.publish_by(&format!("ALTER PUBLICATION \"{name}\" ADD TABLE {}", quoted(table)), false, [table].into_iter())
                .await?;
            ready.added.push(table.clone());
        }
        // What nobody follows any more, and what has lost its identity: its rows could not be changed.
        let is_wanted = |(schema, name): &&(String, String)| tables.iter().any(|table| table.is(schema, name));
        for (schema, table) in published.iter().filter(|published| !place.given && !is_wanted(published)) {
            let table = format!("\"{}\".\"{}\"", schema.replace('"', "\"\""), table.replace('"', "\"\""));
            self.run(&format!("ALTER PUBLICATION \"{name}\" DROP TABLE {table}")).await?;
        }
        Ok(false)
    }

    /// Makes the publication of these tables, or adds them to it. Where the login may not, the error says what it lacks.
    async fn publish_by(&mut self, sql: &str, makes: bool, tables: impl Iterator<Item = &TableName>) -> Result<(), Failure> {
        let Err(error) = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.0).await else { return Ok(()) };
        let failure = postgres_failure(&error);
        if error.as_database_error().is_none_or(|error| error.code().as_deref() != Some(FORBIDDEN)) {
            return Err(failure);
        }
        let lacks = self.lacks(makes, tables).await?;
        Err(match lacks.is_empty() {
            true => failure,
            false => Failure::Unusable(format!(
                "its login may not publish the tables: {}; or name a publication that somebody else makes in sql.changes.publication",
                lacks.join("; ")
            )),
        })
    }

    /// The statements that give the login what it lacks to publish tables.
    async fn lacks(&mut self, makes: bool, tables: impl Iterator<Item = &TableName>) -> Result<Vec<String>, Failure> {
        const LOGIN: &str = "SELECT quote_ident(current_user), quote_ident(current_database()), \
             has_database_privilege(current_database(), 'CREATE')";
        const TABLE: &str = "SELECT pg_has_role(c.relowner, 'USAGE'), has_schema_privilege(n.oid, 'USAGE') \
             FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";
        let is = |row: Option<&PgRow>, at: usize| row.and_then(|row| row.try_get::<bool, _>(at).ok()) == Some(true);
        let row = self.row(LOGIN, &[]).await?;
        let said = |at| text(row.as_ref(), at).unwrap_or_default();
        let (login, database, may_make) = (said(0), said(1), is(row.as_ref(), 2));
        let mut lacks = Vec::new();
        if makes && !may_make {
            lacks.push(format!("GRANT CREATE ON DATABASE {database} TO {login}"));
        }
        for table in tables {
            let row = self.row(TABLE, &[table.schema(), table.table()]).await?;
            if !is(row.as_ref(), 1) {
                lacks.push(format!("GRANT USAGE ON SCHEMA {} TO {login}", table.schema()));
            }
            if !is(row.as_ref(), 0) {
                lacks.push(format!("ALTER TABLE {table} OWNER TO {login}"));
            }
        }
        lacks.dedup();
        Ok(lacks)
    }

    /// The schemas and names of what a publication has.
    async fn published(&mut self, publication: &str) -> Result<Vec<(String, String)>, Failure> {
        const TABLES: &str = "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = $1";
        let query = sqlx::query::<Postgres>(TABLES).persistent(false).bind(publication.to_owned());
        let rows = query.fetch_all(&mut self.0).await.map_err(|error| postgres_failure(&error))?;
        Ok(rows.iter().filter_map(|row| Some((text(Some(row), 0)?, text(Some(row), 1)?))).collect())
    }

    /// Up to where the slot was confirmed. None: there is none, or none any more. Whoever reads it is ended: this side has the claim.
    async fn slot(&mut self, place: &Place, anew: bool) -> Result<Option<Lsn>, Failure> {
        const SLOT: &str = "SELECT plugin::text, database = current_database(), active_pid::text, confirmed_flush_lsn::text, wal_status = 'lost' \
             FROM pg_replication_slots WHERE slot_name = $1";
        let name = &place.slot;
        for _ in 0..ENDS.0 {
            let Some(row) = self.row(SLOT, &[name]).await? else { return Ok(None) };
            let is = |at| row.try_get::<Option<bool>, _>(at).ok().flatten() == Some(true);
            if text(Some(&row), 0).as_deref() != Some("pgoutput") || !is(1) {
                let why = format!("its slot `{name}` is for something else: give the origin another slot in changes.slot");
                return Err(Failure::Unusable(why));
            }
            if let Some(pid) = text(Some(&row), 2) {
                self.row("SELECT pg_terminate_backend($1::int)", &[&pid]).await?;
                sleep(ENDS.1).await;
                continue;
            }
            if anew || is(4) {
                self.row("SELECT pg_drop_replication_slot($1)", &[name]).await?;
                return Ok(None);
            }
            return lsn(Some(&row), 3).map(Some);
        }
        Err(Failure::Failed { why: format!("another reads its slot `{name}`"), retry: true, retry_after: None })
    }

    /// Which transactions everybody sees by now.
    pub async fn snapshot(&mut self) -> Result<Snapshot, Failure> {
        let row = self.row("SELECT txid_current_snapshot()::text", &[]).await?;
        let unknown = || Failure::Unreachable("the server does not say which transactions can be seen".to_owned());
        text(row.as_ref(), 0).and_then(|text| text.parse().ok()).ok_or_else(unknown)
    }

    /// How far the slot is behind. None: it is gone.
    pub async fn lag(&mut self, slot: &str) -> Result<Option<Lag>, Failure> {
        const LAG: &str = "SELECT GREATEST(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint, wal_status = 'lost' \
             FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.row(LAG, &[slot]).await?;
        Ok(row.map(|row| Lag {
            bytes: row
                .try_get::<Option<i64>, _>(0)
                .ok()
                .flatten()
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or_default(),
            lost: row.try_get::<Option<bool>, _>(1).ok().flatten() == Some(true),
        }))
    }

    /// Takes away what is Larder's own of slot and publication.
    pub async fn remove(&mut self, place: &Place, owner: SlotOwner) -> Result<(), Failure> {
        let is_gone = match owner {
            SlotOwner::Larder => self.slot(place, true).await?.is_none(),
            SlotOwner::Other => true,
        };
        if is_gone && !place.given {
            self.unpublish(place).await?;
        }
        Ok(())
    }

    async fn unpublish(&mut self, place: &Place) -> Result<(), Failure> {
        self.run(&format!("DROP PUBLICATION IF EXISTS \"{}\"", place.publication)).await
    }

    /// Ends the connection in peace.
    pub async fn close(self) {
        let _ = timeout(Duration::from_secs(1), self.0.close()).await;
    }

    async fn row(&mut self, sql: &'static str, texts: &[&str]) -> Result<Option<PgRow>, Failure> {
        let query =
            texts.iter().fold(sqlx::query::<Postgres>(sql).persistent(false), |query, text| query.bind((*text).to_owned()));
        query.fetch_optional(&mut self.0).await.map_err(|error| postgres_failure(&error))
    }

    async fn run(&mut self, sql: &str) -> Result<(), Failure> {
        let outcome = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.0).await;
        outcome.map(|_| ()).map_err(|error| postgres_failure(&error))
    }
}

fn text(row: Option<&PgRow>, at: usize) -> Option<String> {
    row?.try_get::<Option<String>, _>(at).ok().flatten()
}

fn lsn(row: Option<&PgRow>, at: usize) -> Result<Lsn, Failure> {
    let unknown = || Failure::Unreachable("the server does not say how far its slot is".to_owned());
    text(row, at).and_then(|text| text.parse().ok()).ok_or_else(unknown)
}

/// A table as SQL names it, whatever letters it has.
fn quoted(table: &TableName) -> String {
    format!("\"{}\".\"{}\"", table.schema(), table.table())
}
