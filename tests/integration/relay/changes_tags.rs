//! Rows whose changes are about tags: all values that have the tag go, whichever rule they are under, and by whichever way they came by it.

use serde_json::{Value as Json, json};

use super::LONG;
use super::changes::{Shop, bulk, figure};
use crate::cache_aside;
use crate::read_through::{Servers, rule};
use crate::support::resp::{Client, Value};
use crate::support::wait_for;

/// `page:{id}`, whose values are given tags as they are stored, and `face:{user}:{size}`, whose keys have them by their parts.
fn rules() -> [Json; 2] {
    let mut page = cache_aside::rule("page", json!({}), json!({}));
    page["versioned"] = json!("entity");
    let read = "SELECT name || ' ' || $size::text FROM users WHERE id = $user";
    let mut face = rule("face", "db", json!({"sql": {"read": read}}), json!({}));
    (face["keys"], face["tags"]) = (json!("face:{user}:{size}"), json!(["user:{user}"]));
    [page, face]
}

fn shop(servers: Servers) -> Shop {
    let follow = |rule: &str, table: &str, columns: Json| json!({"rule": rule, "table": table, "touches": {"tag": {"tag": "user:{id}", "columns": columns}}});
    let follows =
        ["page", "face"].map(|rule| [follow(rule, "users", json!({})), follow(rule, "orders", json!({"id": "user_id"}))]);
    Shop::following(&rules(), &json!(follows.concat()), servers, 2)
}

/// Stores a page with the tag of a user. Refused while its rule's keys are being invalidated.
#[track_caller]
fn fill(client: &mut Client, key: &str, user: u32) {
    wait_for("a page is stored", LONG, || {
        let fetched = client.call(&["LARDER.FETCH", key]).items();
        let token = fetched.get(2).map(Value::text).unwrap_or_default();
        client.call(&["LARDER.FILL", key, &token, "v", "TAGS", &format!("user:{user}")]) == cache_aside::ok()
    });
}

/// Which of these pages each sidecar has.
fn pages(shop: &Shop, keys: &[&'static str]) -> Vec<Vec<&'static str>> {
    let there = |client: &mut Client| keys.iter().copied().filter(|key| client.call(&["EXISTS", key]) == Value::Int(1)).collect();
    shop.clients().iter_mut().map(there).collect()
}

#[track_caller]
fn wait_for_pages(shop: &Shop, keys: &[&'static str], left: &[&'static str]) {
    wait_for(&format!("of {keys:?} only {left:?} is left"), LONG, || pages(shop, keys).iter().all(|there| there == left));
}

fn is_cached(shop: &Shop, key: &str) -> bool {
    shop.scene.servers.holder_of(key).call(&["EXISTS", key]) == Value::Int(1)
}

#[test]
fn a_row_takes_with_it_what_has_the_tag_that_it_had_and_has_under_sentinel() {
    check_tags(Servers::sentinel());
}

#[test]
fn a_row_takes_with_it_what_has_the_tag_that_it_had_and_has_in_a_cluster() {
    check_tags(Servers::cluster());
}

fn check_tags(servers: Servers) {
    let shop = shop(servers);
    let relay = shop.reading();
    shop.wait_for_walks_of(&["face"]);
    let mut client = shop.clients().remove(0);
    // Events are carried out one after another: those of the beginning are behind once a later one has been.
    fill(&mut client, "page:0", 20);
    shop.change(&["UPDATE users SET name = 'settled' WHERE id = 20"]);
    wait_for_pages(&shop, &["page:0"], &[]);
    for (key, user) in [("page:1", 1), ("page:2", 2), ("page:3", 3), ("page:4", 1)] {
        fill(&mut client, key, user);
    }
    let pages = ["page:1", "page:2", "page:3", "page:4"];
    let faces = ["face:1:small", "face:2:small", "face:3:small"];
    faces.iter().for_each(|face| assert_eq!(shop.cached(face), bulk("old small")));
    wait_for_pages(&shop, &pages, &pages);

    shop.change(&["UPDATE users SET name = 'new' WHERE id = 3"]);
    shop.wait_to_see("face:3:small", Some("new small"));
    wait_for_pages(&shop, &pages, &["page:1", "page:2", "page:4"]);
    assert!(is_cached(&shop, "face:1:small") && is_cached(&shop, "face:2:small"), "others have another tag");

    shop.change(&["INSERT INTO orders VALUES (1, 1, 'tea')"]);
    wait_for_pages(&shop, &pages, &["page:2"]);
    wait_for("what has the tag goes", LONG, || !is_cached(&shop, "face:1:small"));
    assert!(is_cached(&shop, "face:2:small") && is_cached(&shop, "face:3:small"));

    // The user that the order had, and the one that it has.
    fill(&mut client, "page:1", 1);
    fill(&mut client, "page:3", 3);
    assert_eq!(shop.cached("face:1:small"), bulk("old small"));
    shop.change(&["UPDATE orders SET user_id = 2 WHERE id = 1"]);
    wait_for_pages(&shop, &pages, &["page:3"]);
    wait_for("what has either tag goes", LONG, || !is_cached(&shop, "face:1:small") && !is_cached(&shop, "face:2:small"));
    assert!(is_cached(&shop, "face:3:small"));

    fill(&mut client, "page:2", 2);
    shop.change(&["DELETE FROM orders WHERE id = 1"]);
    wait_for_pages(&shop, &pages, &["page:3"]);
    assert_eq!(figure(&relay, "troubles"), 0);

    // Where the old row's tag is not told, all keys of all rules go that might have it, and it is said how to mend that.
    shop.change(&["INSERT INTO orders VALUES (2, 4, 'jam')", "ALTER TABLE orders REPLICA IDENTITY DEFAULT"]);
    assert_eq!(shop.cached("face:5:small"), bulk("old small"));
    shop.change(&["DELETE FROM orders WHERE id = 2"]);
    wait_for_pages(&shop, &pages, &[]);
    wait_for("all keys of the other rule go", LONG, || !is_cached(&shop, "face:3:small") && !is_cached(&shop, "face:5:small"));
    wait_for("the relay says so", LONG, || figure(&relay, "troubles") == 1);
    assert!(relay.log().contains("ALTER TABLE orders REPLICA IDENTITY FULL"), "{}", relay.log());
}
