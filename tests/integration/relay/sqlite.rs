//! A relay and SQLite.

use super::{Scene, sentinel, sql_rule};
use crate::read_through::sql_origin;
use crate::{origin_sqlite, write_through::block};

#[test]
fn a_file_of_sqlite_gets_the_last_writes_and_keeps_the_position_beside_them() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let table = "CREATE TABLE users (id TEXT PRIMARY KEY, name TEXT CHECK (name <> 'poison'), row_version INTEGER)";
    let url = block(origin_sqlite::database(directory.path(), &[table]));
    let write = "INSERT INTO users VALUES ($id, $value, $version) \
         ON CONFLICT (id) DO UPDATE SET name = $value, row_version = $version WHERE row_version < $version";
    let rule = sql_rule("users", "db", write, "DELETE FROM users WHERE id = $id");
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &[rule]);
    for n in 0..100 {
        scene.append(format!("users:{}", n % 30).as_bytes(), Some(&format!("name {n}")));
    }
    scene.append(b"users:29", None);
    scene.append(b"users:0", Some("poison"));
    let relay = scene.relay();
    scene.wait_until_drained();
    let ask = |query: &'static str| {
        block(async {
            let mut connection = origin_sqlite::write(&directory.path().join("shop.db")).await;
            sqlx::query_scalar::<_, i64>(query).fetch_one(&mut connection).await.expect(query)
        })
    };
    assert_eq!(ask("SELECT count(*) FROM users"), 29);
    assert_eq!(ask("SELECT count(*) FROM users WHERE name = 'name 99' AND id = '9'"), 1);
    assert_eq!(
        ask("SELECT count(*) FROM users WHERE name = 'name 90' AND id = '0'"),
        1,
        "what a refused write had made needless"
    );
    assert!(ask("SELECT count(*) FROM larder_journal WHERE position > 0") > 0);
    assert_eq!(scene.dead(), 1, "{}", relay.log());
}
