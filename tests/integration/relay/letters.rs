//! Writes that the database refuses, and what a person does with them.

use std::process::{Command, Output};

use serde_json::{Value as Json, json};

use super::together::{database, rows, rules};
use super::{LONG, Scene, sentinel};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::wait_for;
use crate::write_through::block;

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn listed(scene: &Scene) -> Vec<Json> {
    let list = scene.person(&["dead-letters", "list", "--output", "json"]);
    let found: Vec<Json> = serde_json::from_slice(&list.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&list)));
    assert_eq!(list.status.code(), Some(i32::from(!found.is_empty())), "{}", text(&list));
    found
}

fn name(letter: &Json) -> String {
    letter["letter"].as_str().expect("a name").to_owned()
}

#[test]
fn a_refused_write_holds_up_nothing_and_waits_for_a_person() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    for n in 0..200 {
        scene.append(format!("users:{n}").as_bytes(), Some(if n % 50 == 7 { "poison" } else { "good" }));
    }
    // What it had made needless is made instead.
    scene.append(b"users:7", Some("poison"));
    scene.append(b"users:1", Some("better"));
    scene.append(b"users:1", Some("poison"));
    let relay = scene.relay();
    scene.wait_until_drained();
    let all = rows(&server, &database);
    assert_eq!((all.len(), all["1"].as_str()), (196, "better"));
    // Those of key 7 are two.
    assert_eq!((scene.dead(), scene.dirty()), (6, 5));
    assert!(relay.figure("larder_relay_halvings_total") > 0);
    assert_eq!(relay.figure("larder_relay_dead_letters_total"), 6);
    let levels = || ["dead", "dirty", "depth"].map(|name| relay.figure(&format!("larder_journal_{name}")));
    wait_for("the levels are looked at again", LONG, || levels() == [6, 5, 0]);
    assert!(!relay.log().contains("poison"), "values are in no log: {}", relay.log());

    let letters = listed(&scene);
    assert_eq!(letters.len(), 6);
    assert!(
        letters.iter().all(|letter| letter["why"].as_str().is_some_and(|why| why.contains("users_name_check"))),
        "{letters:?}"
    );
    assert!(letters.iter().all(|letter| letter.get("value").is_none()), "a list shows no values");
    let of = |key: &str| letters.iter().filter(|letter| letter["key"] == key).map(name).collect::<Vec<_>>();
    let shown = scene.person(&["dead-letters", "show", &of("users:57")[0]]);
    assert!(shown.status.success() && text(&shown).contains("poison"), "{}", text(&shown));
    let drained = scene.person(&["journal", "drain", "--timeout", "5s"]);
    assert_eq!(drained.status.code(), Some(1), "{}", text(&drained));
    assert!(text(&drained).contains("6 dead letters"), "{}", text(&drained));

    // A later write of the key is made all the same, and ends the matter: the letter cannot come behind it.
    scene.append(b"users:57", Some("later"));
    scene.wait_until_drained();
    wait_for("the later write is made", LONG, || rows(&server, &database).get("57").is_some_and(|name| name == "later"));
    let replay = scene.person(&["dead-letters", "replay", &of("users:57")[0]]);
    assert_eq!(replay.status.code(), Some(1), "{}", text(&replay));
    assert!(text(&replay).contains("superseded"), "{}", text(&replay));
    assert!(scene.person(&["dead-letters", "drop", &of("users:57")[0]]).status.success());

    // Once the reason is mended, writes are made as they were meant.
    block(server.run(&database, &["ALTER TABLE users DROP CONSTRAINT users_name_check"]));
    let replay = scene.person(&["dead-letters", "replay", &of("users:107")[0], &of("users:1")[0]]);
    assert!(replay.status.success(), "{}", text(&replay));
    scene.wait_until_drained();
    let all = rows(&server, &database);
    assert_eq!((all["107"].as_str(), all["1"].as_str()), ("poison", "poison"));

    // What is given up is no longer dirty.
    assert_eq!((scene.dead(), scene.dirty()), (3, 2));
    assert!(scene.person(&["dead-letters", "drop", "--all"]).status.success());
    assert_eq!((scene.dead(), scene.dirty()), (0, 0));
    assert!(listed(&scene).is_empty());
    let absent = scene.person(&["dead-letters", "drop", &of("users:7")[0]]);
    assert_eq!(absent.status.code(), Some(1), "{}", text(&absent));
}

#[test]
fn a_person_sees_what_waits() {
    let server = Postgres::shared();
    let (url, _) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    scene.append(b"users:1", Some("a secret"));
    scene.append(b"users:\x1b[31m", None);
    let peek = scene.person(&["journal", "peek"]);
    assert!(peek.status.success() && text(&peek).contains("users:1") && !text(&peek).contains("a secret"), "{}", text(&peek));
    assert!(!text(&peek).contains('\x1b'), "what others wrote steers no terminal");
    assert!(text(&scene.person(&["journal", "peek", "--values"])).contains("a secret"));
    let status = scene.person(&["journal", "status", "--output", "json"]);
    let status: Json = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!((&status["depth"], &status["dirty"], &status["dead"]), (&json!(2), &json!(2), &json!(0)));
    assert!(text(&scene.person(&["journal", "status"])).contains("none"), "nobody drains it, and it says so");
    let drained = scene.person(&["journal", "drain", "--timeout", "1s"]);
    assert_eq!(drained.status.code(), Some(1));
    assert!(text(&drained).contains("2 writes are left") && text(&drained).contains("no relay"), "{}", text(&drained));
    let _relay = scene.relay();
    let drained = scene.person(&["journal", "drain", "--timeout", "50s"]);
    assert!(drained.status.success() && text(&drained).contains("nothing is left"), "{}", text(&drained));
    let missing = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["journal", "status", "--snapshot", "no-such-file.json"])
        .output()
        .expect("larder runs");
    let told = text(&missing);
    assert_eq!((missing.status.code(), told.matches("no-such-file.json").count()), (Some(2), 1), "{told}");
    assert!(told.contains("see that the file is there") && !told.contains("servers"), "{told}");
    let strange = scene.person(&["journal", "status", "--journal", "other"]);
    assert_eq!(strange.status.code(), Some(2), "{}", text(&strange));
    assert!(text(&strange).contains("name one of shop.users"), "{}", text(&strange));
}
