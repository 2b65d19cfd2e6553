//! Slots that a person names: what somebody else has made stays when nobody follows any more, and what a relay has made goes.

use serde_json::{Value as Json, json};

use super::changes::{Shop, bulk, feed, figure};
use super::{LONG, Relay};
use crate::support::postgres::Postgres;
use crate::support::resp::Value;
use crate::support::wait_for;

const SLOT: &str = "theirs";
const STATE: &str = "larder:cs:{larder:events}theirs";
/// A slot as Larder makes none, so that it is known again, which is older than any publication, and has something to tell of before.
const MAKES_SLOT: &str = "SELECT pg_create_logical_replication_slot('theirs', 'pgoutput', false, true); \
                          INSERT INTO users VALUES (90, 'before')";
const MAKES_PUBLICATION: &str = "CREATE PUBLICATION also_theirs FOR TABLE users, orders, prices";
/// The names of slots, each with whether it is as [`MAKES_SLOT`] makes it, and of publications.
const LEFT: &str = "SELECT coalesce((SELECT string_agg(slot_name || ' ' || two_phase, ' ') FROM pg_replication_slots), '') || '|' \
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
        (None, &[MAKES_SLOT][..], "theirs true|"),
        (Some("also_theirs"), &[MAKES_SLOT, MAKES_PUBLICATION], "theirs true|also_theirs"),
        (Some("also_theirs"), &[MAKES_PUBLICATION], "|also_theirs"),
        (None, &[], "|"),
    ] {
        let feed = named(publication);
        let (mut shop, relay) = reading(&feed, made);
        // Another relay is told no less.
        relay.kill();
        let relay = shop.reading();
        end(&mut shop, feed);
        assert_eq!(shop.value(LEFT), left, "{made:?}: {}", relay.log());
    }
}

/// Has nobody follow any more, until what is Larder's is taken away.
fn end(shop: &mut Shop, mut feed: Json) {
    feed["follows"] = json!([]);
    shop.scene.follow(&[feed]);
    wait_until_removed(shop);
}

fn wait_until_removed(shop: &Shop) {
    wait_for("the cache is told", LONG, || shop.kept(&["HGET", STATE, "removed"]) == bulk("1"));
}

#[test]
fn the_publication_of_a_slot_that_somebody_else_has_made_may_vanish() {
    let (shop, relay) = reading(&named(None), &[MAKES_SLOT]);
    relay.kill();
    assert_eq!(shop.cached("user:2"), bulk("old"));
    shop.change(&["DROP PUBLICATION theirs", "UPDATE users SET name = 'untold' WHERE id = 2"]);
    let relay = shop.reading();
    shop.wait_to_see("user:2", Some("untold"));
    shop.change(&["UPDATE users SET name = 'told' WHERE id = 2"]);
    shop.wait_to_see("user:2", Some("told"));
    assert_eq!(shop.value(LEFT), "theirs true|theirs", "{}", relay.log());
    assert_eq!(figure(&relay, "losses_total"), 1);
}

#[test]
fn a_slot_goes_that_a_relay_of_an_earlier_build_has_made() {
    let (mut shop, relay) = reading(&named(None), &[]);
    relay.kill();
    // These note nothing.
    assert_eq!(shop.kept(&["HDEL", STATE, "made"]), Value::Int(1));
    let relay = shop.reading();
    end(&mut shop, named(None));
    assert_eq!(shop.value(LEFT), "|", "{}", relay.log());
}

#[test]
fn a_slot_stays_that_somebody_makes_where_one_of_larders_was() {
    for is_told in [true, false] {
        let (mut shop, relay) = reading(&named(None), &[]);
        // Taken away as the operator asks for it, or as under `larder dev`.
        match is_told {
            true => end(&mut shop, named(None)),
            false => {
                shop.scene.follow(&[]);
                wait_until_removed(&shop);
            }
        }
        assert_eq!(shop.value(LEFT), "|", "{}", relay.log());
        relay.stop();
        shop.change(&[MAKES_SLOT]);
        shop.scene.follow(&[named(None)]);
        let relay = shop.reading();
        shop.change(&["UPDATE users SET name = 'newer' WHERE id = 1"]);
        shop.wait_to_see("user:1", Some("newer"));
        end(&mut shop, named(None));
        assert_eq!(shop.value(LEFT), "theirs true|", "{}", relay.log());
    }
}

/// As under `larder dev`, where a feed is not in the snapshot any more.
#[test]
fn a_slot_that_somebody_else_has_made_stays_where_its_feed_is_gone() {
    let (mut shop, relay) = reading(&named(None), &[MAKES_SLOT]);
    shop.scene.follow(&[]);
    wait_for("the relay says so", LONG, || relay.log().contains("which somebody else has made, stays"));
    wait_for("its publication goes", LONG, || shop.value(LEFT) == "theirs true|");
}
