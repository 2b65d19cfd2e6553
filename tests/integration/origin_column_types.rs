//! docs/column-types.md is what Postgres and SQLite do: each line of its tables is asked of the real database.

use larder::origin::Loaded;
use larder::origin::fields::pack;
use larder::policy::ReplyForm;
use larder::policy::snapshot::Origin;

use crate::support::origin::{found, loader, reads, sql};
use crate::support::postgres::Postgres;

const DOCUMENT: &str = include_str!("../../docs/column-types.md");

#[derive(Debug)]
struct Line {
    column: String,
    as_it_is: Loaded,
    in_json: String,
}

/// The lines of the table under `heading`.
fn table(heading: &str) -> Vec<Line> {
    let section = DOCUMENT.split("\n## ").find(|section| section.starts_with(heading)).expect("the section");
    let rows = section.lines().filter(|line| line.starts_with("| ")).skip(1);
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, column, as_it_is, in_json] = cells[..] else { panic!("not four cells: {row}") };
        Line { column: code(column).to_owned(), as_it_is: expected(as_it_is), in_json: code(in_json).to_owned() }
    })
    .collect()
}

fn code(cell: &str) -> &str {
    cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`')).unwrap_or_else(|| panic!("not in backticks: {cell}"))
}

fn expected(cell: &str) -> Loaded {
    if cell == "not found" {
        return Loaded::NotFound;
    }
    match cell.strip_prefix("bytes ") {
        Some(hex) => {
            let hex = code(hex);
            let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
            found((0..hex.len()).step_by(2).map(byte).collect::<Vec<_>>())
        }
        None => found(code(cell)),
    }
}

async fn check(origin: &Origin, line: &Line, many: &str) {
    let Line { column, as_it_is, in_json } = line;
    let from = "FROM (SELECT 1 AS k) AS one WHERE k = $k";
    let many_from = format!("FROM (SELECT 1 AS k) AS one WHERE {many}");
    let keys = [b"x:1".to_vec(), b"x:2".to_vec()];

    let plain = reads(&format!("SELECT {column} AS v {from}"), Some(&format!("SELECT {column} AS v, k {many_from}")), None);
    let plain = loader(origin, "x:{k}", &plain);
    assert_eq!(plain.load(b"x:1").await.as_ref(), Ok(as_it_is), "{column} as it is");
    assert_eq!(plain.load_many(&keys).await, [Ok(as_it_is.clone()), Ok(Loaded::NotFound)], "{column} as it is, of many");

    let (read, read_many) =
        (format!("SELECT {column} AS v, 'x' AS w {from}"), format!("SELECT 'x' AS w, {column} AS v, k {many_from}"));
    let object = loader(origin, "x:{k}", &reads(&read, Some(&read_many), None));
    let text = format!(r#"{{"v":{in_json},"w":"x"}}"#);
    assert_eq!(object.load(b"x:1").await, Ok(found(&text)), "{column} in JSON");
    assert_eq!(object.load_many(&keys).await, [Ok(found(&text)), Ok(Loaded::NotFound)], "{column} in JSON, of many");
    serde_json::from_str::<serde_json::Value>(&text).expect("it is JSON");

    let forced = loader(origin, "x:{k}", &reads(&format!("SELECT {column} AS v {from}"), None, Some(ReplyForm::Json)));
    assert_eq!(forced.load(b"x:1").await, Ok(found(format!(r#"{{"v":{in_json}}}"#))), "{column} in JSON alone");

    let hash = loader(origin, "x:{k}", &reads(&format!("SELECT {column} AS v {from}"), None, Some(ReplyForm::Hash)));
    let field = match as_it_is {
        Loaded::Found { value, .. } => found(pack([(&b"v"[..], value.as_slice())])),
        Loaded::NotFound => Loaded::NotFound,
    };
    assert_eq!(hash.load(b"x:1").await, Ok(field), "{column} as a field");
}

#[tokio::test]
async fn postgres_columns_become_what_the_table_says() {
    let server = Postgres::shared();
    let origin = sql(&server.database(&["CREATE TYPE mood AS ENUM ('sad', 'ok')"]).await);
    let lines = table("Postgres");
    assert!(lines.len() > 30, "{lines:?}");
    for line in &lines {
        check(&origin, line, "k = ANY($k)").await;
    }
}

#[tokio::test]
async fn postgres_settings_of_a_database_do_not_show() {
    let server = Postgres::shared();
    let url = server.database(&["CREATE TYPE mood AS ENUM ('sad', 'ok')"]).await;
    let name = url.rsplit('/').next().expect("a name");
    for setting in [
        "DateStyle = 'German'",
        "TimeZone = 'Asia/Tokyo'",
        "IntervalStyle = 'iso_8601'",
        "bytea_output = 'escape'",
        "extra_float_digits = -10",
    ] {
        server.run("postgres", &[&format!("ALTER DATABASE {name} SET {setting}")]).await;
    }
    for line in &table("Postgres") {
        check(&sql(&url), line, "k = ANY($k)").await;
    }
}

#[tokio::test]
async fn sqlite_columns_become_what_the_table_says() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let origin = sql(&crate::origin_sqlite::database(directory.path(), &[]).await);
    let lines = table("SQLite");
    assert!(lines.len() > 10, "{lines:?}");
    for line in &lines {
        check(&origin, line, "k IN (SELECT value FROM json_each($k))").await;
    }
}
