//! An engine's own migration of slots, all keys of them at once.
//!
//! Valkey 9 begins one at the node that gives slots (`CLUSTER MIGRATESLOTS`) and tells of both ends (`CLUSTER GETSLOTMIGRATIONS`). Redis 8.4
//! begins one at the node that gets them (`CLUSTER MIGRATION IMPORT`), and tells of both ends, too (`CLUSTER MIGRATION STATUS`). Which of the two
//! an engine has, if any, only trying tells.

use std::collections::HashMap;

use super::observe::parse_slots;
use super::plan::{NodeId, SlotRange, SlotSet};
use crate::operator::admin::{Admin, AdminError};

/// What a server tells of one migration, by field.
type Account = HashMap<String, String>;

/// How an engine is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Valkey,
    Redis,
}

/// A server's end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It gives the slots.
    Giver,
    /// It gets them.
    Getter,
}

/// A migration, as one of its two nodes tells of it.
#[derive(Debug, PartialEq, Eq)]
struct Migration {
    end: End,
    is_over: bool,
    /// Why it came to nothing, where it did.
    failure: Option<String>,
    /// When it began, in milliseconds since 1970.
    created: u64,
    slots: Vec<SlotRange>,
}

impl Migration {
    fn read(account: &Account) -> Option<Self> {
        let field = |name: &str| account.get(name).map(String::as_str);
        let end = match field("operation")? {
            "EXPORT" | "migrate" => End::Giver,
            "IMPORT" | "import" => End::Getter,
            _ => return None,
        };
        let state = field("state")?;
        let told = || field("message").or(field("last_error")).unwrap_or_default().to_owned();
        let slots = field("slot_ranges").or(field("slots")).unwrap_or_default();
        Some(Self {
            end,
            is_over: matches!(state, "success" | "completed" | "failed" | "cancelled" | "canceled"),
            failure: (state == "failed").then(told),
            created: field("create_time").and_then(|time| time.parse().ok()).unwrap_or(0),
            slots: slots.split_ascii_whitespace().filter_map(parse_slots).collect(),
        })
    }
}

/// Asks for all migrations that a server remembers, in its engine's own words. `None` where it has none of the two.
async fn ask(admin: &mut Admin) -> Result<Option<(Dialect, Vec<Migration>)>, AdminError> {
    let asked: [(Dialect, &str, &[&str]); 2] =
        [(Dialect::Valkey, "CLUSTER GETSLOTMIGRATIONS", &[]), (Dialect::Redis, "CLUSTER MIGRATION", &["STATUS", "ALL"])];
    for (dialect, command, arguments) in asked {
        match admin.ask::<Vec<Account>>(command, arguments).await {
            Ok(accounts) => return Ok(Some((dialect, accounts.iter().filter_map(Migration::read).collect()))),
            Err(error) if matches!(error.code(), Some("ERR" | "NOPERM")) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The slots that are on their way from or to a node at this moment; `None` where its engine moves none by itself.
pub async fn under_way(admin: &mut Admin) -> Result<Option<Vec<SlotRange>>, AdminError> {
    let migrations = ask(admin).await?.map(|(_, migrations)| migrations);
    Ok(migrations.map(|all| all.into_iter().filter(|one| !one.is_over).flat_map(|one| one.slots).collect()))
}

/// Why the youngest migration failed that a server was this end of; `None` where it did not, or there was none.
pub async fn last_failure(admin: &mut Admin, end: End) -> Option<String> {
    let (_, migrations) = ask(admin).await.ok()??;
    // The youngest comes first; of those of one millisecond the first is as good as another.
    let of_end = migrations.into_iter().filter(|one| one.end == end);
    of_end.reduce(|youngest, one| if one.created > youngest.created { one } else { youngest })?.failure
}

/// Has the engine move slots from `giver` to `getter`, whose name is `getter_id`. They are on their way from then on, or will not move; which of
/// the two is observed.
pub async fn begin(giver: &mut Admin, getter: &mut Admin, getter_id: &NodeId, slots: &SlotSet) -> Result<(), AdminError> {
    let dialect = ask(giver).await?.map_or(Dialect::Valkey, |(dialect, _)| dialect);
    let mut command = redis::cmd("CLUSTER");
    match dialect {
        Dialect::Valkey => command.arg("MIGRATESLOTS").arg("SLOTSRANGE"),
        Dialect::Redis => command.arg("MIGRATION").arg("IMPORT"),
    };
    for range in slots.ranges() {
        command.arg(range.first).arg(range.last);
    }
    match dialect {
        Dialect::Valkey => {
            command.arg("NODE").arg(&getter_id.0);
            giver.ask_all::<()>("CLUSTER MIGRATESLOTS", vec![command]).await?;
        }
        // The answer names the task.
        Dialect::Redis => {
            getter.ask_all::<String>("CLUSTER MIGRATION IMPORT", vec![command]).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(fields: &[(&str, &str)]) -> Account {
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn accounts_of_both_engines_are_read() {
        let slots = vec![SlotRange { first: 5, last: 5 }, SlotRange { first: 100, last: 460 }];
        let valkey = |operation, state| {
            let fields = [("operation", operation), ("state", state), ("slot_ranges", "5-5 100-460"), ("message", "gone")];
            Migration::read(&account(&[&fields[..], &[("create_time", "7")]].concat())).unwrap()
        };
        let redis = |operation, state| {
            let fields = [("operation", operation), ("state", state), ("slots", "5 100-460"), ("last_error", "gone")];
            Migration::read(&account(&[&fields[..], &[("create_time", "7")]].concat())).unwrap()
        };
        let under_way = |end| Migration { end, is_over: false, failure: None, created: 7, slots: slots.clone() };
        assert_eq!(valkey("EXPORT", "snapshotting"), under_way(End::Giver));
        assert_eq!(valkey("IMPORT", "waiting-for-paused"), under_way(End::Getter));
        assert_eq!(redis("migrate", "streaming-buf"), under_way(End::Giver));
        assert_eq!(redis("import", "accumulate-buf"), under_way(End::Getter));
        let failed = Migration { is_over: true, failure: Some("gone".to_owned()), ..under_way(End::Giver) };
        assert_eq!(
            (valkey("EXPORT", "failed"), redis("migrate", "failed")),
            (failed, Migration { is_over: true, failure: Some("gone".to_owned()), ..under_way(End::Giver) })
        );
        let over = Migration { is_over: true, ..under_way(End::Getter) };
        for one in [
            valkey("IMPORT", "success"),
            valkey("IMPORT", "cancelled"),
            redis("import", "completed"),
            redis("import", "canceled"),
        ] {
            assert_eq!(one, over);
        }
        assert_eq!(Migration::read(&account(&[("state", "success")])), None);
    }
}
