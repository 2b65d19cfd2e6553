//! Tables that Larder keeps for itself in somebody's database.

use sqlx::postgres::PgConnection;

use super::super::error::Failure;
use super::postgres::{self, Fault};

/// One of them.
#[derive(Debug)]
pub(super) struct OwnTable {
    name: &'static str,
    create: &'static str,
}

impl OwnTable {
    /// The table `name`, which `create` makes in either dialect where there is none. It may also be run beforehand.
    pub(super) const fn new(name: &'static str, create: &'static str) -> Self {
        Self { name, create }
    }

    /// The statement that makes it.
    pub(super) const fn create(&self) -> &'static str {
        self.create
    }

    /// Makes it in Postgres, beside any transaction.
    pub(super) async fn create_in_postgres(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        match sqlx::raw_sql(self.create).execute(&mut *connection).await {
            Ok(_) => Ok(()),
            Err(sqlx::Error::Database(error)) => match error.code().as_deref().and_then(|code| code.get(..2)) {
                // Two that make it at the same moment: one of them has.
                Some("23") => Ok(()),
                Some("42" | "3F" | "25") => Err(self.not_made(error.message())),
                _ => Err(postgres::failure(&sqlx::Error::Database(error))),
            },
            Err(error) => Err(postgres::failure(&error)),
        }
    }

    /// What an error of Postgres means, met by a statement about this table alone. `None`: there is no such table.
    pub(super) fn fault(&self, error: sqlx::Error) -> Option<Fault> {
        const UNDEFINED_TABLE: &str = "42P01";
        const NO_PRIVILEGE: &str = "42501";
        /// A column, or the primary key.
        const UNDEFINED_PART: [&str; 2] = ["42703", "42P10"];
        let sqlx::Error::Database(database) = &error else { return Some(error.into()) };
        match database.code().as_deref() {
            Some(UNDEFINED_TABLE) => None,
            Some(NO_PRIVILEGE) => Some(self.not_allowed(database.message()).into()),
            Some(code) if UNDEFINED_PART.contains(&code) => Some(self.foreign().into()),
            _ => Some(error.into()),
        }
    }

    /// It holds what Larder did not write.
    pub(super) fn foreign(&self) -> Failure {
        Failure::Unusable(format!("its table {} holds what Larder did not write there: drop it, or its rows", self.name))
    }

    /// What to do where it cannot be made.
    pub(super) fn not_made(&self, why: &str) -> Failure {
        let Self { name, create } = self;
        Failure::Unusable(format!(
            "it has no table {name}, and the login cannot make one ({why}): run {create}, and let the login SELECT, INSERT and UPDATE it"
        ))
    }

    /// What to do where it is there, and not for this login.
    fn not_allowed(&self, why: &str) -> Failure {
        let name = self.name;
        Failure::Unusable(format!(
            "the login may not use its table {name} ({why}): run GRANT SELECT, INSERT, UPDATE ON {name} TO the login"
        ))
    }
}
