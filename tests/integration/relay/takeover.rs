//! Several relays: they share, die, stand still, and come back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::together::{assert_in_order, database, rows, rules};
use super::{LONG, Scene, sentinel};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::wait_for;

/// Ends a writer, also where the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes rising numbers to ten keys until `done`, and tells the last of each.
fn write_until(scene: &Scene, done: &AtomicBool) -> BTreeMap<String, String> {
    let mut last = BTreeMap::new();
    for n in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let (id, name) = (format!("id-{}", n % 10), format!("{n}"));
        scene.append(format!("users:{id}").as_bytes(), Some(&name));
        last.insert(id, name);
        std::thread::sleep(Duration::from_millis(2));
    }
    last
}

#[test]
fn relays_share_the_partitions_and_take_over_from_one_that_is_killed() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    let done = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(&scene, &done));
        let ends = Ends(&done);
        let mut first = scene.relay();
        let mut second = scene.relay();
        for _ in 0..3 {
            wait_for("both have their share", LONG, || scene.holders() == [8, 8]);
            first.kill();
            wait_for("the other has everything", LONG, || scene.holders() == [16]);
            (first, second) = (second, scene.relay());
        }
        wait_for("both have their share", LONG, || scene.holders() == [8, 8]);
        drop(ends);
        let last = writer.join().expect("the writer writes");
        scene.wait_until_drained();
        drop((first, second));
        last
    });
    assert_eq!(rows(&server, &database), last);
    assert_eq!((scene.dirty(), scene.dead()), (0, 0));
    assert_in_order(&server, &database);
}

#[test]
fn a_relay_that_stood_still_changes_nothing_of_what_another_has_taken() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    let done = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(&scene, &done));
        let ends = Ends(&done);
        let relays = [scene.relay(), scene.relay()];
        wait_for("both have their share", LONG, || scene.holders() == [8, 8]);
        for turn in 0..4 {
            let still = &relays[turn % 2];
            still.signal("STOP");
            wait_for("the other has everything", LONG, || scene.holders() == [16]);
            still.signal("CONT");
            wait_for("both have their share again", LONG, || scene.holders() == [8, 8]);
        }
        drop(ends);
        let last = writer.join().expect("the writer writes");
        scene.wait_until_drained();
        last
    });
    assert_eq!(rows(&server, &database), last);
    assert_eq!((scene.dirty(), scene.dead()), (0, 0));
    assert_in_order(&server, &database);
}
