//! The number of a Cluster's shards changes under load, and the operator ends in the middle of it: no client behind a sidecar meets an error, and
//! no value is lost.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;

use super::cluster::{condition, eventually, list, name};
use super::clusters;
use super::disruptions::Scene;
use super::install::PLACE;
use super::operator;
use super::sidecars::Counting;
use super::tier::{SETTLES_WITHIN, Tier};

/// What the status says of slots on their way, at this moment.
fn told(tier: &Tier) -> Option<String> {
    let found = condition(&tier.object(), "Progressing")?;
    let message = found["message"].as_str()?.to_owned();
    (found["reason"] == "Resharding" && message.contains("slots have moved")).then_some(message)
}

/// Asks for so many shards and waits until they are there, and nothing else. What the status said meanwhile.
fn resize(tier: &Tier, shards: u32, restarts: bool) -> BTreeSet<String> {
    tier.patch(&json!({"shards": shards}));
    let mut said = BTreeSet::new();
    eventually("slots move", SETTLES_WITHIN, || {
        said.extend(told(tier));
        if said.is_empty() { Err(tier.settled().err().unwrap_or_else(|| "it is settled".to_owned())) } else { Ok(()) }
    });
    if restarts {
        operator::restart();
    }
    eventually(&format!("{shards} shards"), SETTLES_WITHIN * 2, || {
        said.extend(told(tier));
        tier.settled()?;
        clusters::is_formed(tier, shards)
    });
    said
}

/// From three shards to five, and back.
pub fn come_and_go(scene: &Scene<'_>) {
    let tier = scene.tier;
    let counting = Counting::start(tier);
    let grown = resize(tier, 5, true);
    assert_eq!(tier.servers().len(), 10);
    let shrunk = resize(tier, 3, false);
    for said in grown.iter().chain(&shrunk) {
        eprintln!("{}: {said}", tier.name);
    }
    scene.note(format!("{} counts behind a sidecar, none refused, none lost", counting.finish()));
    let is_left = |claim: &String| ["-3-", "-4-"].iter().any(|shard| claim.contains(shard));
    eventually("the volumes of the shards that left are gone", Duration::from_secs(120), || {
        let claims = list(PLACE, "persistentvolumeclaims", &format!("larder.dev/cluster={}", tier.name));
        match claims.iter().map(name).find(is_left) {
            Some(claim) => Err(claim),
            None => Ok(()),
        }
    });
}
