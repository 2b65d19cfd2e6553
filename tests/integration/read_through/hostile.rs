//! Keys made by an adversary, on their way to a real database.

use serde_json::json;

use super::{Servers, rule, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::Value;

/// Occurs in each hostile text, so that the server's log can be searched for it. Bound parameters are not logged.
const MARK: &str = "hostile_7f3a";

fn hostile_texts() -> Vec<Vec<u8>> {
    let mut texts: Vec<Vec<u8>> = [
        "'; DROP TABLE names; --",
        "' OR '1'='1",
        "\"; DELETE FROM names; --",
        "\\'; DROP TABLE names; --",
        "$1",
        "$id",
        "$$; DROP TABLE names; $$",
        "%s %d {id} ${id}",
        "/* */ -- ;",
        "ünï¢ødé",
        "line\r\n+OK\r\n",
    ]
    .iter()
    .map(|text| format!("{text}{MARK}").into_bytes())
    .collect();
    texts.push([b"nul\0".as_slice(), MARK.as_bytes()].concat());
    texts.push([b"\xff\xfe\xc3\x28".as_slice(), MARK.as_bytes()].concat());
    texts.push([vec![b'x'; 60_000].as_slice(), MARK.as_bytes()].concat());
    texts.push([vec![b'x'; 1_000_000].as_slice(), MARK.as_bytes()].concat());
    texts
}

#[test]
fn hostile_key_parts_never_reach_sql_as_text() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = Postgres::shared();
    let url = runtime.block_on(server.database(&[
        "CREATE TABLE names (name text, value text)",
        "CREATE TABLE numbers (id bigint PRIMARY KEY, value text)",
        "INSERT INTO names VALUES (chr(39) || '; DROP TABLE names; --hostile' || '_7f3a', 'found')",
        "INSERT INTO names VALUES (repeat('x', 1000000) || 'hostile' || '_7f3a', 'long'), ('ünï¢ødéhostile' || '_7f3a', 'foreign')",
        "INSERT INTO numbers VALUES (7, 'seven'), (9223372036854775807, 'greatest')",
    ]));
    let read = |table: &str, column: &str| json!({"sql": {"read": format!("SELECT value FROM {table} WHERE {column} = $id")}});
    let mut rules =
        [rule("name", "db", read("names", "name"), json!({})), rule("number", "db", read("numbers", "id"), json!({}))];
    rules[0]["keys"] = json!("name:{id…}");
    rules[1]["keys"] = json!("number:{id…}");
    let servers = Servers::cluster();
    let sidecar = servers.sidecar(&[sql_origin("db", &url)], &rules);
    let mut client = sidecar.client();
    for text in hostile_texts() {
        let shown = String::from_utf8_lossy(&text[..text.len().min(60)]).into_owned();
        // What is there is found, however it looks.
        let value = match text.as_slice() {
            text if text.starts_with(b"'; DROP") => Some("found"),
            text if text.len() > 1_000_000 => Some("long"),
            text if text.starts_with("ünï".as_bytes()) => Some("foreign"),
            _ => None,
        };
        let expected = value.map_or(Value::Nil, |value| Value::Bulk(value.into()));
        for rule in ["name:", "number:"] {
            let key = [rule.as_bytes(), &text].concat();
            let expected = if rule == "name:" { expected.clone() } else { Value::Nil };
            assert_eq!(client.call(&[b"GET", key.as_slice()]), expected, "{rule}{shown}");
            if key.len() < 500_000 {
                assert_eq!(client.call(&[b"MGET", key.as_slice(), key.as_slice()]).items(), vec![expected; 2], "{rule}{shown}");
            }
        }
    }
    for (number, expected) in [
        ("7", Value::Bulk(b"seven".to_vec())),
        ("9223372036854775807", Value::Bulk(b"greatest".to_vec())),
        ("9223372036854775808", Value::Nil),
        ("-9223372036854775809", Value::Nil),
        ("99999999999999999999999999999999999999", Value::Nil),
        ("7.0", Value::Nil),
        ("7e0", Value::Nil),
        ("0x7", Value::Nil),
        ("7 ", Value::Nil),
        ("7;", Value::Nil),
        ("NaN", Value::Nil),
    ] {
        assert_eq!(client.call(&["GET", &format!("number:{number}")]), expected, "{number}");
    }
    assert!(!server.log().contains(MARK), "a part of a key reached SQL as text");
    let database = url.rsplit('/').next().unwrap();
    assert_eq!(runtime.block_on(server.value(database, "SELECT count(*)::text FROM names")), "3");
}
