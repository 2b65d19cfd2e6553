//! What a sidecar tells of itself, and what it is told of all: the messages that pass between sidecars and the control plane
//! through the cache.
//!
//! A heartbeat is published and kept nowhere. It is bounded, and says what was left out. Counts rise from the process' beginning;
//! a process has an identity of its own, so that a restart is seen as one and not as a count that falls.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The newest form of these messages that this build writes. Readers ignore fields that they do not know.
///
/// Before form 2, [`RuleBeat::loads_saved`] held hits as well where sidecars load.
pub const VERSION: u32 = 2;
/// The largest heartbeat in bytes.
pub const MAX_BYTES: usize = 16 * 1024;
/// The most rules that one heartbeat tells of.
pub const MAX_RULES: usize = 64;
/// The longest text that one tells: why a snapshot was refused.
pub const MAX_REASON_CHARS: usize = 200;
/// The shortest time between two heartbeats of a sidecar.
const SHORTEST: Duration = Duration::from_secs(5);
/// How many heartbeats a second all sidecars of a binding together make at most.
const PER_SECOND: u32 = 500;

/// How long a sidecar waits from one heartbeat to the next, where there are so many.
pub fn interval(sidecars: u32) -> Duration {
    SHORTEST.max(Duration::from_secs(1) * sidecars / PER_SECOND)
}

/// How long a sidecar waits before the first of them, for a `chance` evenly spread from 0 to 1: sidecars that begin together, or that lose
/// their connections together, speak spread over one interval.
pub fn phase(sidecars: u32, chance: f64) -> Duration {
    interval(sidecars).mul_f64(chance)
}

/// What one sidecar tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// The form of this message.
    pub version: u32,
    /// Which process: the pod's name, and a part by chance.
    pub sidecar: String,
    /// Which binding.
    pub binding: String,
    /// Larder's version.
    pub larder: String,
    /// The newest form of snapshots that it understands.
    pub understands: u32,
    /// The generation of the snapshot in force. Absent: none has arrived yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The snapshot that it refused since the one in force, the last where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<RefusedSnapshot>,
    /// How long it has run.
    pub uptime_seconds: u64,
    /// How many clients are connected.
    pub clients: u64,
    /// How many clients have connected since it began.
    pub clients_ever: u64,
    /// What it counted, the busiest first: rules that never matched are left out. Keys that no rule covers have the name
    /// [`UNMATCHED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleBeat>,
    /// How many rules that did match there was no room for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rules_left_out: u64,
}

/// The name under which keys are counted that no rule covers.
pub const UNMATCHED: &str = "(unmatched)";

/// A snapshot that did not come into force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedSnapshot {
    /// Its generation, where it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Why, shortened.
    pub reason: String,
}

/// What a sidecar counted for one rule since it began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleBeat {
    /// The rule.
    pub name: String,
    /// Reads that the cache answered with a value.
    #[serde(skip_serializing_if = "is_zero")]
    pub hits: u64,
    /// Reads that the cache answered with nothing.
    #[serde(skip_serializing_if = "is_zero")]
    pub misses: u64,
    /// Loads from the origin.
    #[serde(skip_serializing_if = "is_zero")]
    pub loads: u64,
    /// Loads that failed.
    #[serde(skip_serializing_if = "is_zero")]
    pub load_errors: u64,
    /// Of the misses, those that were served without a load of their own, whoever loads.
    #[serde(skip_serializing_if = "is_zero")]
    pub loads_saved: u64,
    /// Reads that were served a value past its TTL.
    #[serde(skip_serializing_if = "is_zero")]
    pub stale: u64,
    /// Misses whose client may load while others wait.
    #[serde(skip_serializing_if = "is_zero")]
    pub leases: u64,
    /// Reads that waited for another client's load for too long.
    #[serde(skip_serializing_if = "is_zero")]
    pub wait_timeouts: u64,
    /// Reads of keys that nobody fills.
    #[serde(skip_serializing_if = "is_zero")]
    pub never_filled: u64,
    /// Values that were or might have been outdated, and were removed.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused_fills: u64,
    /// Keys without a TTL that were given one, as they were written or later.
    #[serde(skip_serializing_if = "is_zero")]
    pub without_ttl: u64,
    /// Under Observe: loads that would have been saved.
    #[serde(skip_serializing_if = "is_zero")]
    pub predicted_loads_saved: u64,
    /// Under Observe: writes that would have been given a TTL.
    #[serde(skip_serializing_if = "is_zero")]
    pub predicted_without_ttl: u64,
}

impl RuleBeat {
    /// Whether anything was counted.
    pub fn is_quiet(&self) -> bool {
        *self == Self { name: self.name.clone(), ..Self::default() }
    }

    fn reads(&self) -> u64 {
        self.hits.saturating_add(self.misses)
    }

    /// Brings what a sidecar told in form 1 to the present one. It did not say who loads; where sidecars do, some have loaded as a rule, or
    /// more was saved than there were misses.
    fn take_hits_out(&mut self) {
        if self.loads > 0 || self.loads_saved > self.misses {
            self.loads_saved = self.loads_saved.saturating_sub(self.hits);
        }
    }
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It is larger than [`MAX_BYTES`].
    #[error("the message has {0} bytes, more than {MAX_BYTES}")]
    TooLarge(usize),
    /// It is not JSON of the expected form.
    #[error("the message cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

impl Heartbeat {
    /// Reads a heartbeat. One in an older form comes out in the present one, but for its [`Heartbeat::version`].
    ///
    /// # Errors
    /// What is none, or is too large.
    pub fn parse(json: &[u8]) -> Result<Self, MessageError> {
        let mut heartbeat: Self = parse(json)?;
        if heartbeat.version < 2 {
            heartbeat.rules.iter_mut().for_each(RuleBeat::take_hits_out);
        }
        Ok(heartbeat)
    }

    /// As it is published: at most [`MAX_BYTES`], the quietest rules left out where need be.
    pub fn to_json(mut self) -> Vec<u8> {
        self.rules.retain(|rule| !rule.is_quiet());
        self.rules.sort_by(|a, b| b.reads().cmp(&a.reads()).then_with(|| a.name.cmp(&b.name)));
        self.leave_out(MAX_RULES);
        if let Some(refused) = &mut self.refused {
            refused.reason = refused.reason.chars().take(MAX_REASON_CHARS).collect();
        }
        loop {
            // Cannot fail: it is made of texts and numbers.
            let json = serde_json::to_vec(&self).unwrap_or_default();
            if json.len() <= MAX_BYTES || self.rules.is_empty() {
                return json;
            }
            self.leave_out(self.rules.len() / 2);
        }
    }

    fn leave_out(&mut self, keep: usize) {
        self.rules_left_out += self.rules.len().saturating_sub(keep) as u64;
        self.rules.truncate(keep);
    }
}

/// What the control plane tells the sidecars of a binding, under [`super::binding::BindingName::fleet_key`]. Where there is none,
/// a sidecar is the only one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fleet {
    /// The form of this message.
    pub version: u32,
    /// How many live sidecars there are.
    pub sidecars: u32,
}

impl Fleet {
    /// That there are so many.
    pub fn of(sidecars: u32) -> Self {
        Self { version: VERSION, sidecars }
    }

    /// Reads it.
    ///
    /// # Errors
    /// What is none, or is too large.
    pub fn parse(json: &[u8]) -> Result<Self, MessageError> {
        parse(json)
    }

    /// As it is stored.
    pub fn to_json(self) -> Vec<u8> {
        serde_json::to_vec(&self).unwrap_or_default()
    }
}

fn parse<T: for<'de> Deserialize<'de>>(json: &[u8]) -> Result<T, MessageError> {
    if json.len() > MAX_BYTES {
        return Err(MessageError::TooLarge(json.len()));
    }
    Ok(serde_json::from_slice(json)?)
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heartbeat(rules: Vec<RuleBeat>) -> Heartbeat {
        Heartbeat {
            version: VERSION,
            sidecar: "shop-1-5f3a".to_owned(),
            binding: "shop".to_owned(),
            larder: "0.1.0".to_owned(),
            understands: 3,
            generation: Some(7),
            refused: None,
            uptime_seconds: 60,
            clients: 2,
            clients_ever: 5,
            rules,
            rules_left_out: 0,
        }
    }

    fn rule(name: &str, hits: u64) -> RuleBeat {
        RuleBeat { name: name.to_owned(), hits, ..RuleBeat::default() }
    }

    #[test]
    fn rules_that_never_matched_are_not_told() {
        let json = heartbeat(vec![rule("idle", 0), rule("few", 1), rule("many", 9)]).to_json();
        let told = Heartbeat::parse(&json).expect("reads back");
        assert_eq!(told, heartbeat(vec![rule("many", 9), rule("few", 1)]));
    }

    #[test]
    fn fields_of_a_newer_sidecar_are_no_obstacle() {
        let mut json = serde_json::to_value(heartbeat(vec![rule("user", 1)])).expect("serialises");
        json["version"] = 9.into();
        json["more"] = "x".into();
        json["rules"][0]["more"] = 1.into();
        let told = Heartbeat::parse(json.to_string().as_bytes()).expect("it reads");
        assert_eq!(told, Heartbeat { version: 9, ..heartbeat(vec![rule("user", 1)]) });
        assert!(Heartbeat::parse(&vec![b' '; MAX_BYTES + 1]).is_err());
        assert_eq!(Fleet::parse(&Fleet::of(12).to_json()).expect("reads back"), Fleet::of(12));
        assert!(Fleet::parse(b"12").is_err());
    }

    #[test]
    fn what_older_sidecars_saved_is_told_from_their_hits() {
        let saved = |version, hits, misses, loads, loads_saved| {
            let rule = RuleBeat { misses, loads, loads_saved, ..rule("user", hits) };
            let told = Heartbeat { version, ..heartbeat(vec![rule]) };
            Heartbeat::parse(&told.to_json()).expect("reads back").rules[0].loads_saved
        };
        assert_eq!(saved(1, 90, 10, 4, 96), 6, "they load");
        assert_eq!(saved(1, 90, 10, 0, 100), 10, "others did all that they needed");
        assert_eq!(saved(1, 90, 10, 0, 6), 6, "the application loads");
        assert_eq!([saved(2, 90, 10, 4, 6), saved(9, 2, 10, 4, 6)], [6, 6]);
    }

    #[test]
    fn many_sidecars_speak_seldom() {
        let secs = [0, 1, 1000, 2500, 5000, 10_000].map(|sidecars| interval(sidecars).as_secs());
        assert_eq!(secs, [5, 5, 5, 5, 10, 20]);
    }

    #[test]
    fn who_begins_together_speaks_spread_over_an_interval() {
        let mut random = fastrand::Rng::with_seed(7);
        for (sidecars, busiest) in [(1000, 1000 / 5), (10_000, PER_SECOND as usize)] {
            let mut seconds = vec![0; interval(sidecars).as_secs() as usize];
            for _ in 0..sidecars {
                seconds[phase(sidecars, random.f64()).as_secs() as usize] += 1;
            }
            let bounds = busiest * 3 / 4..=busiest * 5 / 4;
            assert!(seconds.iter().all(|spoken| bounds.contains(spoken)), "{seconds:?}");
        }
    }

    proptest! {
        #[test]
        fn heartbeats_are_bounded_and_say_what_is_left_out(
            names in proptest::collection::vec("\\PC{0,300}", 0..200), reason in "\\PC{0,500}"
        ) {
            let rules: Vec<RuleBeat> = names.iter().enumerate().map(|(at, name)| rule(name, at as u64)).collect();
            let matched = names.len().saturating_sub(1) as u64;
            let whole = Heartbeat { refused: Some(RefusedSnapshot { generation: None, reason }), ..heartbeat(rules) };
            let json = whole.to_json();
            prop_assert!(json.len() <= MAX_BYTES);
            let told = Heartbeat::parse(&json).expect("reads back");
            prop_assert_eq!(told.rules.len() as u64 + told.rules_left_out, matched);
            prop_assert!(told.rules.is_sorted_by(|a, b| a.hits >= b.hits));
        }
    }
}
