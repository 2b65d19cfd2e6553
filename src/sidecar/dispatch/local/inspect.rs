//! LARDER.EXPLAIN and LARDER.STATS: what the policy does with a key, and how often it did.

use std::rc::Rc;

use super::super::{Flow, Request, refuse};
use super::quoted;
use crate::policy::Lifetime;
use crate::sidecar::policy::ActivePolicy;
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots::{self, Companion};
use crate::telemetry::metrics::UNMATCHED_RULE;

/// What is told of a key, in order. All values are text.
type Facts = Vec<(&'static str, String)>;

/// Tells which rule covers a key, why, and what that means for it. Asks no server.
pub fn explain(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let policy = worker.policy();
    let key = request.args.get(1).unwrap_or_default();
    let facts = facts_of(&policy, key, worker.is_cluster());
    let companions = companions_of(&policy, key);
    let counts = worker.metrics().rule_totals(rule_label(&policy, key));
    let protocol = session.protocol();
    session.answer_now(|out| {
        encode::map(out, protocol, facts.len() + 2);
        for (name, value) in &facts {
            encode::bulk(out, name.as_bytes());
            encode::bulk(out, value.as_bytes());
        }
        encode::bulk(out, b"companions");
        encode::array(out, companions.len());
        companions.iter().for_each(|name| encode::bulk(out, name));
        encode::bulk(out, b"counters");
        write_counts(out, protocol, &counts);
    });
    Flow::Continue
}

fn rule_label<'a>(policy: &'a ActivePolicy, key: &[u8]) -> &'a str {
    policy.rule(policy.find(key)).map_or(UNMATCHED_RULE, |rule| &rule.name)
}

fn facts_of(policy: &ActivePolicy, key: &[u8], cluster: bool) -> Facts {
    let id = policy.find(key);
    let mut facts: Facts = vec![("key", quoted(key))];
    if cluster {
        facts.push(("slot", slots::slot_of(key).to_string()));
    }
    facts.push(("generation", policy.snapshot().generation.to_string()));
    match policy.rule(id) {
        Some(rule) => {
            facts.push(("rule", rule.name.clone()));
            facts.push((
                "why",
                format!("its pattern `{}` is the first, of {} rules, that covers the key", rule.keys, count(policy)),
            ));
            facts.push(("strategy", rule.strategy.name().to_owned()));
        }
        None => {
            facts.push(("rule", UNMATCHED_RULE.to_owned()));
            facts.push(("why", format!("no pattern of the {} rules covers the key", count(policy))));
            facts.push(("strategy", policy.snapshot().unmatched.name().to_owned()));
        }
    }
    if let Some(lifetime) = policy.lifetime_of(id) {
        push_lifetime(&mut facts, &lifetime);
    }
    if let Some(read_through) = policy.read_through(id) {
        facts.push(("stale", read_through.stale.to_string()));
        facts.push(("negativeTtl", read_through.negative_ttl.to_string()));
        facts.push(("lease", read_through.lease.to_string()));
        facts.push(("wait", read_through.wait.to_string()));
        facts.push(("origin", read_through.load.origin.clone()));
    }
    facts
}

fn count(policy: &ActivePolicy) -> usize {
    policy.snapshot().rules.len()
}

fn push_lifetime(facts: &mut Facts, lifetime: &Lifetime) {
    facts.push(("ttl", lifetime.default.to_string()));
    facts.push(("maxTtl", lifetime.max.to_string()));
    facts.push(("jitter", lifetime.jitter.to_string()));
}

/// The keys of Larder's own that may stand beside the key.
fn companions_of(policy: &ActivePolicy, key: &[u8]) -> Vec<Vec<u8>> {
    if !policy.loads(policy.find(key)) {
        return Vec::new();
    }
    [Companion::Lease, Companion::Stale, Companion::Negative].into_iter().map(|companion| companion.name(key)).collect()
}

/// The counters of every rule, or of the one that is named.
pub fn stats(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let policy = session.worker().policy();
    let rules = policy.snapshot().rules.iter().map(|rule| rule.name.as_str());
    let mut names: Vec<&str> = rules.chain([UNMATCHED_RULE]).collect();
    if let Some(wanted) = request.args.get(1) {
        names.retain(|name| name.as_bytes() == wanted);
        if names.is_empty() || request.args.len() > 2 {
            return refuse(session, &format!("ERR the policy has no rule `{}`: LARDER.STATS alone lists all", quoted(wanted)));
        }
    }
    let protocol = session.protocol();
    session.answer_now(|out| {
        encode::map(out, protocol, names.len());
        for name in names {
            encode::bulk(out, name.as_bytes());
            write_counts(out, protocol, &session.worker().metrics().rule_totals(name));
        }
    });
    Flow::Continue
}

fn write_counts(out: &mut Vec<u8>, protocol: Protocol, counts: &[(&'static str, u64)]) {
    encode::map(out, protocol, counts.len());
    for (name, value) in counts {
        encode::bulk(out, name.as_bytes());
        encode::integer(out, (*value).cast_signed());
    }
}
