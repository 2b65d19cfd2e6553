//! Slots that a person names: what somebody else has made stays when nobody follows any more, and what a relay has made goes.

use serde_json::{Value as Json, json};

use super::changes::{Shop, bulk, feed};
use super::{LONG, Relay};
use crate::support::postgres::Postgres;
use crate::support::resp::Value;
use crate::support::wait_for;

const SLOT: &str = "theirs";
const MAKES_SLOT: &str = "SELECT pg_create_logical_replication_slot('theirs', 'pgoutput')";
const MAKES_PUBLICATION: &str = "CREATE PUBLICATION also_theirs FOR TABLE users, orders, prices";
/// The names of slots, and of publications.
const LEFT: &str = "SELECT coalesce((SELECT string_agg(slot_name, ' ') FROM pg_replication_slots), '') || '|' \
                    || coalesce((SELECT string_agg(pubname, ' ') FROM pg_publication), '')";

/// A feed by [`SLOT`] and this publication, which somebody else makes, or one of Larder's own.
fn named(publication: Option<&str>) -> Json {
    let mut feed = feed();
    (feed["slot"], feed["publication"]) = (json!(SLOT), json!(publication.unwrap_or(SLOT)));
    if publication.is_some() {
        feed["given"] = json!(true);
    }
    feed
}

/// A shop whose relay reads by such a feed, once these statements were made.
fn reading(feed: &Json, made: &[&str]) -> (Shop, Relay) {
    let shop = Shop::of(Postgres::start_logical(), false, feed);
    shop.change(made);
    let relay = shop.reading();
    shop.wait_for_walks();
    assert_eq!(shop.cached("user:1"), bulk("old"));
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    shop.wait_to_see("user:1", Some("new"));
    (shop, relay)
}

#[test]
fn what_somebody_else_has_made_stays_and_what_a_relay_has_made_goes() {
    for (publication, made, left) in [
        (None, &[MAKES_SLOT][..], "theirs|"),
        (Some("also_theirs"), &[MAKES_SLOT, MAKES_PUBLICATION], "theirs|also_theirs"),
        (Some("also_theirs"), &[MAKES_PUBLICATION], "|also_theirs"),
        (None, &[], "|"),
    ] {
        let feed = named(publication);
        let (mut shop, relay) = reading(&feed, made);
        // Another relay is told no less.
        relay.kill();
        let relay = shop.reading();
        let mut ends = feed;
        ends["follows"] = json!([]);
        shop.scene.follow(&[ends]);
        let removed =
            || shop.kept(&["HGET", &format!("larder:cs:{{larder:events}}{SLOT}"), "removed"]) == Value::Bulk(b"1".to_vec());
        wait_for("the cache is told", LONG, removed);
        assert_eq!(shop.value(LEFT), left, "{made:?}: {}", relay.log());
    }
}

/// As under `larder dev`, where a feed is not in the snapshot any more.
#[test]
fn a_slot_that_somebody_else_has_made_stays_where_its_feed_is_gone() {
    let (mut shop, relay) = reading(&named(None), &[MAKES_SLOT]);
    shop.scene.follow(&[]);
    wait_for("the relay says so", LONG, || relay.log().contains("which somebody else has made, stays"));
    assert_eq!(shop.value(LEFT), "theirs|");
}
