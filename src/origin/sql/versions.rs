//! Versions that Larder keeps in a database: the table `larder_versions`, whose counters rise in the transactions that write.
//!
//! A write draws its version before its own statement, and holds the row that it drew from until its transaction ends. Whoever writes the key
//! next draws after that: so of two writes of a key the one that is committed later has the greater version, which no counter can promise
//! that is drawn elsewhere. What is undone gives its version back. A deletion draws none, and takes none away.
//!
//! Keys share a fixed number of counters, by their hash. Two that share one wait for each other's transactions, and each is in order all the
//! same. So the table stays small without ever being pruned, and has no names of keys. It is one for all rules: whoever else writes the key,
//! under a rule of another name or by another policy, draws from the same counter.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::postgres::PgConnection;

use super::super::error::Failure;
use super::super::writer::Changed;
use super::own_table::OwnTable;
use super::postgres::{Fault, unnamed};
use super::sqlite::{self, Client};
use super::write::{Deed, Step};
use crate::policy::digest::digest;

const TABLE: OwnTable = OwnTable::new(
    "larder_versions",
    "CREATE TABLE IF NOT EXISTS larder_versions (counter bigint PRIMARY KEY, version bigint NOT NULL)",
);
const DRAW: &str = "INSERT INTO larder_versions (counter, version) VALUES ($1, 1) \
     ON CONFLICT (counter) DO UPDATE SET version = larder_versions.version + 1 RETURNING counter, version";
/// The rows are locked in the order in which they come.
const DRAW_ALL: &str = "INSERT INTO larder_versions (counter, version) \
     SELECT asked.counter, 1 FROM pg_catalog.unnest(CAST($1 AS bigint[])) AS asked (counter) ORDER BY asked.counter \
     ON CONFLICT (counter) DO UPDATE SET version = larder_versions.version + 1 RETURNING counter, version";

/// The counter of a key, of which there are 65,536. All sidecars that ever write to one database must find the same.
pub(super) fn counter_of(key: &[u8]) -> i64 {
    let [high, low, ..] = digest(key);
    i64::from(u16::from_be_bytes([high, low]))
}

/// The versions that a transaction has drawn, by counter.
#[derive(Debug, Default)]
pub(super) struct Drawn(BTreeMap<i64, u64>);

impl Drawn {
    /// What came of a change, with the version that was drawn for it, if any was.
    pub(super) fn complete(&self, changed: Changed, step: &Step) -> Changed {
        let drawn = step.counter.and_then(|counter| self.0.get(&counter).copied());
        Changed { version: drawn.or(changed.version), ..changed }
    }
}

/// The counters that `steps` draw from, in the order that is everybody's: no two transactions wait for each other in a circle.
fn counters(steps: &[Step]) -> BTreeSet<i64> {
    steps.iter().filter(|step| !matches!(step.deed, Deed::Delete)).filter_map(|step| step.counter).collect()
}

/// Draws the versions of what `steps` write, within their transaction. `None`: there is no table yet.
pub(super) async fn draw_in_postgres(connection: &mut PgConnection, steps: &[Step]) -> Result<Option<Drawn>, Fault> {
    let counters: Vec<i64> = counters(steps).into_iter().collect();
    if counters.is_empty() {
        return Ok(Some(Drawn::default()));
    }
    match unnamed(DRAW_ALL).bind(counters).fetch_all(&mut *connection).await {
        Ok(rows) => Ok(Some(Drawn(rows.iter().map(drawn).collect::<Result<_, _>>()?))),
        Err(error) => TABLE.fault(error).map_or(Ok(None), Err),
    }
}

/// Makes the table that [`draw_in_postgres`] has missed.
pub(super) async fn create_in_postgres(connection: &mut PgConnection) -> Result<(), Failure> {
    TABLE.create_in_postgres(connection).await
}

/// Why there are no versions although the table was made.
pub(super) fn not_found() -> Failure {
    TABLE.not_made("it is not where the login looks for it")
}

/// As [`draw_in_postgres`], and makes the table where there is none.
pub(super) async fn draw_in_sqlite(client: &mut Client, steps: &[Step]) -> Result<Drawn, Failure> {
    let counters = counters(steps);
    let mut all = Drawn::default();
    if !counters.is_empty() {
        client.execute(TABLE.create()).await.map_err(|error| sqlite::refusal(&error))?;
    }
    for counter in counters {
        let row = sqlx::query(DRAW).bind(counter).fetch_one(client.connection()).await;
        let (counter, version) = drawn(&row.map_err(|error| sqlite::refusal(&error))?)?;
        all.0.insert(counter, version);
    }
    Ok(all)
}

/// A counter and its version, as [`DRAW`] and [`DRAW_ALL`] give them.
fn drawn<'r, R>(row: &'r R) -> Result<(i64, u64), Failure>
where
    R: sqlx::Row,
    usize: sqlx::ColumnIndex<R>,
    i64: sqlx::Decode<'r, R::Database> + sqlx::Type<R::Database>,
{
    let number = |index: usize| row.try_get::<i64, _>(index).map_err(|_| TABLE.foreign());
    Ok((number(0)?, u64::try_from(number(1)?).map_err(|_| TABLE.foreign())?))
}

#[cfg(test)]
mod tests {
    use super::super::write::Orders;
    use super::*;

    fn step(key: &[u8], value: Option<&[u8]>) -> Step {
        let step = Orders::step(&[key], value.map(<[u8]>::to_vec), 0).expect("a text");
        step.counted(Some(counter_of(key)))
    }

    /// Sidecars of several ages write to one database: what this says must never change.
    #[test]
    fn a_key_has_the_same_counter_everywhere() {
        assert_eq!([counter_of(b"one"), counter_of(b"user:42")], [0x7692, 0xea3f]);
    }

    #[test]
    fn keys_spread_over_the_counters() {
        let used: BTreeSet<i64> = (0..10_000).map(|at| counter_of(format!("{{shop}}:{at}").as_bytes())).collect();
        assert!(used.len() > 9_000 && used.iter().all(|counter| (0..65_536).contains(counter)), "{}", used.len());
    }

    #[test]
    fn what_is_stored_draws_once_from_each_counter_and_in_order_and_what_is_deleted_does_not() {
        let steps = [step(b"b", Some(b"1")), step(b"a", Some(b"2")), step(b"b", Some(b"3")), step(b"c", None)];
        let asked: Vec<i64> = counters(&steps).into_iter().collect();
        let mut sorted = vec![counter_of(b"a"), counter_of(b"b")];
        sorted.sort_unstable();
        assert_eq!(asked, sorted);
        let uncounted = Orders::step(&[b"a"], Some(Vec::new()), 0).expect("a text");
        assert!(counters(&[uncounted]).is_empty());
    }

    #[test]
    fn a_change_has_the_version_of_its_counter_or_its_column_s() {
        let drawn = Drawn([(counter_of(b"a"), 7)].into());
        let column = || Changed { rows: 1, version: Some(3), ..Changed::default() };
        assert_eq!(drawn.complete(Changed::default(), &step(b"a", Some(b"1"))).version, Some(7));
        assert_eq!(drawn.complete(column(), &step(b"b", Some(b"1"))), column());
    }
}
