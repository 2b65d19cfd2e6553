//! A database in the namespace of the tests: that of the shop of examples/, under another name.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cluster::{eventually, kubectl, name, run};
use super::install::PLACE;
use super::shop::file;
use super::tier::ready_pods;

/// The setting that the shop's own is started with.
pub const COUNTS_QUERIES: &str = "shared_preload_libraries=pg_stat_statements";
/// With which changes can be followed.
pub const TELLS_CHANGES: &str = "wal_level=logical";
/// One that died answers again.
const ANSWERS_WITHIN: Duration = Duration::from_secs(90);

/// A Deployment of one pod, its Service, and a Secret with its URL as `url`, all of one name.
#[derive(Clone, Copy)]
pub struct Database {
    pub name: &'static str,
}

impl Database {
    /// One that runs, and was started with this setting in the place of [`COUNTS_QUERIES`].
    pub fn open(name: &'static str, setting: &str) -> Self {
        let manifest = file("app/database.yaml").replace("shop-db", name).replace(COUNTS_QUERIES, setting);
        assert!(manifest.contains(setting), "{manifest}");
        run("kubectl", &["-n", PLACE, "apply", "-f", "-"], &manifest).expect("applied");
        let rollout = ["-n", PLACE, "rollout", "status", &format!("deployment/{name}"), "--timeout=180s"];
        kubectl(&rollout).unwrap_or_else(|error| panic!("{error}\n{}", super::cluster::describe(PLACE)));
        Self { name }
    }

    /// The pod that it runs in, which has to be ready.
    pub fn pod(&self) -> String {
        eventually(&format!("a pod of {}", self.name), ANSWERS_WITHIN, || {
            ready_pods(&format!("app={}", self.name)).first().map(name).ok_or_else(|| "none is ready".to_owned())
        })
    }

    /// Asks it once, from within its pod: also where nobody else reaches it.
    pub fn try_sql(&self, query: &str) -> Result<String, String> {
        let deployment = format!("deployment/{}", self.name);
        let place = ["-n", PLACE, "exec", &deployment, "--", "env", "PGPASSWORD=change-me"];
        kubectl(&[&place[..], &["psql", "-h", "127.0.0.1", "-U", "postgres", "-tAqc", query]].concat())
    }

    /// Asks it, once it answers.
    pub fn sql(&self, query: &str) -> String {
        eventually(&format!("the database answers {query}"), ANSWERS_WITHIN, || self.try_sql(query))
    }

    /// What a table with the columns `id` and `value` has, where that is a number.
    pub fn numbers(&self, table: &str) -> BTreeMap<String, u64> {
        let rows = self.sql(&format!("SELECT id || '=' || value FROM {table}"));
        let row = |row: &str| row.split_once('=').and_then(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
        rows.lines().filter_map(row).collect()
    }

    pub fn delete(&self) {
        let Self { name } = self;
        let ours = [format!("deployment/{name}"), format!("service/{name}"), format!("secret/{name}")];
        let _ = kubectl(&["-n", PLACE, "delete", "--ignore-not-found", "--wait", &ours[0], &ours[1], &ours[2]]);
    }
}
