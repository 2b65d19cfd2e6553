//! Reads that are too long to be held: what they do not find is loaded too, or they say that it is not.

use serde_json::json;

use super::{Servers, rule, sql_origin};
use crate::support::admin::rule_count;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};

const MIB: usize = 1024 * 1024;
const KEYS: usize = 3_000;
const FILLER: usize = 390;

/// Each third key has a row, those with a tag (which lie in one slot) as well as those without.
fn key(tag: &str, number: usize) -> String {
    format!("text:{tag}{}{number}", "p".repeat(FILLER))
}

fn rows(tag: &str) -> String {
    format!(
        "INSERT INTO texts SELECT '{tag}' || repeat('p', {FILLER}) || n, 'row ' || n FROM generate_series(0, {KEYS} - 1, 3) AS n"
    )
}

fn is_too_long(reply: &Value) -> bool {
    matches!(reply, Value::Error(text) if text.starts_with("ERR a key of ") && text.contains("origin"))
}

#[test]
fn what_a_long_mget_or_exists_does_not_find_is_loaded() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = Postgres::shared();
    let create = "CREATE TABLE texts (id text PRIMARY KEY, name text)";
    let url = runtime.block_on(server.database(&[create, &rows(""), &rows("{t}")]));
    let query = json!({"sql": {
        "read": "SELECT name FROM texts WHERE id = $id", "readMany": "SELECT id, name FROM texts WHERE id = ANY($id)",
    }});
    let mut text = rule("text", "db", query, json!({}));
    text["keys"] = json!("text:{id…}");
    for servers in [Servers::cluster(), Servers::sentinel()] {
        let sidecar = servers.sidecar(&[sql_origin("db", &url)], &[text.clone()]);
        let mut client = sidecar.client();
        assert_eq!(client.line("SET plain there"), Value::Simple("OK".to_owned()));
        for (tag, name) in [("", "MGET"), ("", "EXISTS"), ("{t}", "EXISTS"), ("{t}", "MGET")] {
            check(&mut client, tag, name);
        }
        assert_eq!(rule_count(&sidecar, "text", "hits") as usize, 6 * KEYS.div_ceil(3));
        too_long_keys(&mut client);
        assert_eq!(client.line("GET plain").text(), "there");
    }
}

/// Twice: what was loaded is found then.
fn check(client: &mut Client, tag: &str, name: &str) {
    let mut command = vec![name.to_owned(), "plain".to_owned(), "absent".to_owned()];
    command.extend((0..KEYS).map(|number| key(tag, number)));
    assert!(command.iter().map(String::len).sum::<usize>() > MIB);
    for _ in 0..2 {
        let reply = client.call(&command);
        if name == "EXISTS" {
            assert_eq!(reply, Value::Int(1 + KEYS.div_ceil(3) as i64), "{tag}");
            continue;
        }
        let values = reply.items();
        assert_eq!((values.len(), &values[0], &values[1]), (KEYS + 2, &Value::Bulk(b"there".to_vec()), &Value::Nil));
        for (number, value) in values[2..].iter().enumerate() {
            let row = Value::Bulk(format!("row {number}").into_bytes());
            assert_eq!(*value, if number % 3 == 0 { row } else { Value::Nil }, "{tag}{number}");
        }
    }
}

/// Nobody asks the origin for such a key: that it is missing must not look as if it had.
fn too_long_keys(client: &mut Client) {
    let key = format!("text:{}", "q".repeat(2 * MIB));
    let reads =
        [&["GET", &key][..], &["STRLEN", &key], &["GETRANGE", &key, "0", "-1"], &["EXISTS", &key], &["MGET", "plain", &key]];
    for read in reads {
        let reply = client.call(read);
        assert!(is_too_long(&reply), "{}: {reply:?}", read[0]);
    }
    assert_eq!(client.call(&["SET", &key, ""]), Value::Simple("OK".to_owned()));
    let replies: Vec<Value> = reads.iter().map(|read| client.call(read)).collect();
    let empty = Value::Bulk(Vec::new());
    let both = Value::Array(vec![Value::Bulk(b"there".to_vec()), empty.clone()]);
    assert_eq!(replies, [empty.clone(), Value::Int(0), empty, Value::Int(1), both]);
    assert_eq!(client.call(&["DEL", &key]), Value::Int(1));
}
