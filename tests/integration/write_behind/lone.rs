//! What a write waits for that nobody shares a round with.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{durable, rule};
use crate::read_through::{policy, sql_origin};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::Engine;
use crate::support::sidecar::{Sidecar, sentinel_topology};

const WRITES: u32 = 4;
/// As many exchanges as this a write may take, each as long as one of a client that has servers write to disk, and then asks.
const EXCHANGES: u32 = 20;

/// How long these commands take, sent at once.
fn timed(client: &mut Client, commands: &[&str]) -> Duration {
    let wire: Vec<u8> = commands.iter().flat_map(|command| encode(&command.split(' ').collect::<Vec<_>>())).collect();
    let began = Instant::now();
    client.send(&wire).expect("it takes commands");
    let answers: Vec<Value> = commands.iter().map(|_| client.read().expect("an answer")).collect();
    assert!(!answers.iter().any(Value::is_error), "{answers:?}");
    began.elapsed()
}

/// Servers that are asked by `WAITAOF` alone tell a second late that a replica has the only write there is, since it answered before it wrote to disk.
#[test]
fn it_waits_for_disks_and_for_nothing_else() {
    let servers = durable(Engine::Valkey9, 1);
    let rules = [rule("kv", "db", "SELECT 'x' WHERE $id = 'none'", &json!({}))];
    let sidecar = Sidecar::start(&policy(sentinel_topology(&servers), 1, &[sql_origin("db", "sqlite://none.db")], &rules));
    let (mut client, mut bare) = (sidecar.client(), servers.primary().client());
    timed(&mut client, &["SET kv:1 first"]);
    let (mut floor, mut late, mut written) = <(Duration, Duration, Duration)>::default();
    for number in 0..WRITES {
        floor += timed(&mut bare, &["SET other v", "WAIT 1 5000", "WAITAOF 1 1 5000"]);
        late += timed(&mut bare, &["SET other v", "WAITAOF 1 1 5000"]);
        written += timed(&mut client, &[&format!("SET kv:1 {number}")]);
    }
    println!("{WRITES} writes took {written:?}; of a bare client {floor:?}, and by WAITAOF alone {late:?}");
    assert!(written < late / 2 + EXCHANGES * floor, "{written:?} beside {floor:?} and {late:?}");
}
