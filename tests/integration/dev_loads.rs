//! `larder dev` with more sidecars than an origin may have connections: its relay loads for them.

use std::time::Duration;

use crate::support::dev::{Dev, cluster};
use crate::support::postgres::Postgres;
use crate::support::resp::Client;
use crate::support::server::Engine;
use crate::support::wait_for;
use crate::write_through::block;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn sidecars_that_outnumber_connections_read_by_the_relay() {
    let server = Postgres::shared();
    let tables = [
        "CREATE TABLE users (id text PRIMARY KEY, name text NOT NULL)",
        "INSERT INTO users SELECT 'id-' || n, 'name ' || n FROM generate_series(0, 99) n",
    ];
    let url = block(server.database(&tables));
    let database = url.rsplit('/').next().expect("a name").to_owned();
    let policy = format!(
        "apiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {{name: shop}}\nspec:\n  cacheCluster: main\n  \
         workloads: {{matchLabels: {{app: shop}}}}\n  origins:\n    - {{name: db, sql: {{url: {{value: \"{url}\"}}, timeout: 10s, \
         maxConnections: 1, maxTotalConnections: 1}}}}\n  rules:\n    - {{name: users, keys: \"users:{{id}}\", strategy: ReadThrough, \
         origin: {{name: db, read: \"SELECT name FROM users WHERE id = $id\"}}}}\n"
    );
    let secured = "  auth: {password: {value: secret}}\n";
    let files = [("cache.yaml", cluster(Engine::Redis7, "Sentinel", secured)), ("policy.yaml", policy)];
    let mut dev = Dev::start(Engine::Redis7, &files, &["--sidecars", "3"]);
    let mut clients: Vec<Client> = dev.ready(3).into_iter().map(|port| Client::connect(port).expect("a sidecar")).collect();
    for n in 0..30 {
        assert_eq!(clients[n % 3].call(&["GET", &format!("users:id-{n}")]).text(), format!("name {n}"));
    }
    let connections = format!("SELECT count(*)::text FROM pg_stat_activity WHERE datname = '{database}'");
    assert_eq!(block(server.value("postgres", &connections)), "1", "the relay's");
    dev.stop();
    wait_for("no connection is left", LIMIT, || block(server.value("postgres", &connections)) == "0");
}
