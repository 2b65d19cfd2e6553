//! What reads are loaded for, and how their answers look.

use std::io::{Read as _, Write as _};

use serde_json::{Value as Json, json};

use super::{Servers, http_origin, rule, sql_origin, web_rule};
use crate::support::admin::rule_count;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::web::Web;

const ROWS: [&str; 2] = [
    "CREATE TABLE rows (id bigint PRIMARY KEY, name text)",
    "INSERT INTO rows SELECT n, 'row ' || n FROM generate_series(0, 199) AS n WHERE n % 10 <> 9",
];

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// A rule `row:{id}` whose statements carry `mark` into the server's log.
fn row_rule(mark: &str) -> Json {
    let read = format!("SELECT name FROM rows WHERE id = $id AND '{mark}_one' <> ''");
    let many = format!("SELECT id, name FROM rows WHERE id = ANY($id) AND '{mark}_many' <> ''");
    rule("row", "db", json!({"sql": {"read": read, "readMany": many}}), json!({"negativeTtl": "1h"}))
}

/// How often statements with `mark`, which stands in their second line, were executed.
fn executions(server: &Postgres, mark: &str) -> usize {
    let log = server.log();
    let executed = log.split("execute <unnamed>: ").skip(1);
    executed.filter(|statement| statement.lines().take(2).any(|line| line.contains(mark))).count()
}

fn bulk(text: impl Into<String>) -> Value {
    Value::Bulk(text.into().into_bytes())
}

#[test]
fn mget_of_a_hundred_keys_is_one_query() {
    let server = Postgres::shared();
    let url = block_on(server.database(&ROWS));
    for (servers, mark) in [(Servers::cluster(), "hundred_apart"), (Servers::sentinel(), "hundred_together")] {
        let sidecar = servers.sidecar(&[sql_origin("db", &url)], &[row_rule(mark)]);
        let mut client = sidecar.client();
        // Each tenth row is missing, and some keys are there twice.
        let ids: Vec<usize> = (0..90).chain(0..10).collect();
        let command: Vec<String> = ["MGET".to_owned()].into_iter().chain(ids.iter().map(|id| format!("row:{id}"))).collect();
        let expected: Vec<Value> =
            ids.iter().map(|id| if id % 10 == 9 { Value::Nil } else { bulk(format!("row {id}")) }).collect();
        for _ in 0..3 {
            assert_eq!(client.call(&command).items(), expected);
            assert_eq!(executions(&server, &format!("{mark}_many")), 1);
        }
        assert_eq!(executions(&server, &format!("{mark}_one")), 0);
        assert_eq!(rule_count(&sidecar, "row", "loads"), 90);
        // The first MGET found nothing; the next two all but the missing ones.
        assert_eq!(rule_count(&sidecar, "row", "hits"), 2 * 90);
        assert_eq!(rule_count(&sidecar, "row", "misses"), 100 + 2 * 10);
    }
}

/// A sidecar with a row rule, a rule `item:{id}`, and both origins.
struct Mixed {
    web: Web,
    sidecar: Sidecar,
    servers: Servers,
}

impl Mixed {
    fn start(server: &Postgres, mark: &str, servers: Servers) -> Self {
        let web = Web::start();
        let url = block_on(server.database(&ROWS));
        let origins = [sql_origin("db", &url), http_origin("web", &web, "20s")];
        let sidecar = servers.sidecar(&origins, &[row_rule(mark), web_rule("item", json!({}))]);
        Self { web, sidecar, servers }
    }
}

#[test]
fn mget_mixes_rules_types_and_plain_keys() {
    let server = Postgres::shared();
    for (index, servers) in [Servers::cluster(), Servers::sentinel()].into_iter().enumerate() {
        let mixed = Mixed::start(&server, &format!("mixed{index}"), servers);
        mixed.web.put("/item/1", "one");
        let mut client = mixed.sidecar.client();
        assert_eq!(client.line("SET plain there"), Value::Simple("OK".to_owned()));
        assert_eq!(client.line("HSET row:5 field value"), Value::Int(1));
        let reply = client.line("MGET row:1 item:1 plain item:2 row:1 absent row:9 row:5 row:x");
        let expected = vec![
            bulk("row 1"),
            bulk("one"),
            bulk("there"),
            Value::Nil,
            bulk("row 1"),
            Value::Nil,
            Value::Nil,
            Value::Nil,
            Value::Nil,
        ];
        assert_eq!(reply.items(), expected);
        assert_eq!(mixed.servers.holder_of("row:5").line("TYPE row:5").text(), "hash");
        assert_eq!(mixed.web.visits("/item/1"), 1);
        // EXISTS counts what the origin has, each time it is named, and what is no string.
        let exists = "EXISTS row:21 row:21 item:1 plain item:2 absent row:29 row:5 row:22";
        assert_eq!((client.line(exists), client.line(exists)), (Value::Int(6), Value::Int(6)));
        // One key's failure is no absence.
        mixed.web.fail("/item/3", 500);
        let Value::Error(text) = client.line("MGET row:1 item:3") else { panic!("an error") };
        assert!(text.starts_with("ORIGIN origin `web` failed"), "{text}");
        assert!(client.line("EXISTS row:1 item:3").is_error());
    }
}

/// The bytes that answer `command`, which are as many as `expected`.
#[track_caller]
fn assert_bytes(client: &mut Client, command: &str, expected: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let mut stream = client.stream();
    stream.write_all(&encode(&words)).unwrap();
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), expected, "{command}");
}

#[test]
fn nulls_are_those_of_the_clients_protocol() {
    let server = Postgres::shared();
    for (index, servers) in [Servers::cluster(), Servers::sentinel()].into_iter().enumerate() {
        let mixed = Mixed::start(&server, &format!("nulls{index}"), servers);
        let (mut resp2, mut resp3) = (mixed.sidecar.client(), mixed.sidecar.client());
        resp3.line("HELLO 3");
        for _ in 0..2 {
            assert_bytes(&mut resp2, "MGET row:1 row:9 item:9", "*3\r\n$5\r\nrow 1\r\n$-1\r\n$-1\r\n");
            assert_bytes(&mut resp3, "MGET row:1 row:9 item:9", "*3\r\n$5\r\nrow 1\r\n_\r\n_\r\n");
            assert_bytes(&mut resp2, "GET row:9", "$-1\r\n");
            assert_bytes(&mut resp3, "GET row:19", "_\r\n");
            assert_bytes(&mut resp3, "GET row:2", "$5\r\nrow 2\r\n");
        }
    }
}

#[test]
fn other_reads_are_answered_from_the_loaded_value() {
    let server = Postgres::shared();
    let mixed = Mixed::start(&server, "others", Servers::cluster());
    let mut client = mixed.sidecar.client();
    for (command, reply) in [
        ("EXISTS row:10", Value::Int(1)),
        ("STRLEN row:11", Value::Int(6)),
        ("GETRANGE row:12 4 -1", bulk("12")),
        ("SUBSTR row:13 0 2", bulk("row")),
        ("EXISTS row:19", Value::Int(0)),
        ("STRLEN row:29", Value::Int(0)),
        ("GETRANGE row:39 0 -1", bulk("")),
        ("GETRANGE row:14 x 1", Value::Error("ERR value is not an integer or out of range".to_owned())),
    ] {
        assert_eq!(client.line(command), reply, "{command}");
        assert_eq!(client.line(command), reply, "{command} again");
    }
    assert_eq!(executions(&server, "others_one"), 7);
    // An empty value is a value.
    mixed.web.put("/item/1", "");
    for _ in 0..3 {
        assert_eq!(client.line("GET item:1").text(), "");
        assert_eq!(client.line("STRLEN item:1"), Value::Int(0));
        assert_eq!(client.line("EXISTS item:1"), Value::Int(1));
        assert_eq!(client.line("GETRANGE item:1 0 -1").text(), "");
    }
    assert_eq!(mixed.web.visits("/item/1"), 1);
}
