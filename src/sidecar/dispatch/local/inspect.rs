//! LARDER.EXPLAIN and LARDER.STATS: what the policy does with a key, what is there now, and how often it did what.

use std::rc::Rc;

use super::super::{Flow, Request, refuse};
use super::invalidate::COMPANIONS;
use super::quoted;
use crate::policy::{AtWaitEnd, Lifetime, Mode, Rule, Span, Stampede, Strategy};
use crate::sidecar::engine::lease::load_times::LEAST_LOADS;
use crate::sidecar::policy::ActivePolicy;
use crate::sidecar::resp::{Protocol, encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::Sink;
use crate::sidecar::versions;
use crate::sidecar::worker::Worker;
use crate::telemetry::metrics::UNMATCHED_RULE;

/// What the policy says of a key, in order. All values are text.
type Facts = Vec<(&'static str, String)>;

/// What is told of one key.
struct Explanation {
    protocol: Protocol,
    facts: Facts,
    counts: Vec<(&'static str, u64)>,
    /// The names under which Larder may keep something beside the key.
    companions: Vec<Vec<u8>>,
}

/// Tells which rule covers a key, why, and what that means for it; and what the server holds of it now.
pub fn explain(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let policy = worker.policy();
    let key = request.args.get(1).unwrap_or_default();
    let (name, given) = versions::told_of(worker, key).unzip();
    // What the cache has it by.
    let held: &[u8] = name.as_deref().unwrap_or(key);
    let mut facts = facts_of(worker, &policy, key, held);
    facts.extend(name.as_ref().map(|name| ("name", quoted(name))));
    facts.extend(given.filter(|tags| !tags.is_empty()).map(|tags| ("givenTags", tags.join(" "))));
    let explanation = Explanation {
        protocol: session.protocol(),
        facts,
        counts: worker.metrics().rule_totals(rule_label(&policy, key)),
        companions: COMPANIONS.into_iter().map(|companion| companion.name(held)).collect(),
    };
    let mut questions: Vec<[&[u8]; 2]> = vec![[b"TYPE", held], [b"PTTL", held]];
    let names = explanation.companions.clone();
    questions.extend(names.iter().map(|name| [&b"PTTL"[..], name]));
    let assembly = Assembly::By(Box::new(move |answers, out| explanation.write(answers, out)));
    let meeting = Meeting::new(session.clone(), session.take_place(), assembly, false, questions.len());
    let slot = if worker.is_cluster() { slots::slot_of(held) } else { ANY_SLOT };
    let mut room = true;
    for (index, question) in (0..).zip(&questions) {
        let mut wire = Vec::new();
        encode::command(&mut wire, question);
        let sink = Sink::Part { meeting: meeting.clone(), index };
        room &= worker.submit(&[&wire], Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now()));
    }
    if room { Flow::Continue } else { Flow::Wait }
}

impl Explanation {
    /// `answers`: the key's type and PTTL, then its companions' PTTLs.
    fn write(&self, answers: &[Vec<u8>], out: &mut Vec<u8>) {
        let failed = answers.iter().find_map(|answer| answer.strip_prefix(b"-"));
        encode::map(out, self.protocol, self.facts.len() + if failed.is_some() { 2 } else { 4 });
        for (name, value) in &self.facts {
            encode::bulk(out, name.as_bytes());
            encode::bulk(out, value.as_bytes());
        }
        match (failed, answers) {
            (None, [kind, ttl, companions @ ..]) => self.write_held(kind, ttl, companions, out),
            (error, _) => {
                encode::bulk(out, b"error");
                encode::bulk(out, error.unwrap_or_default().trim_ascii_end());
            }
        }
        encode::bulk(out, b"counters");
        write_counts(out, self.protocol, &self.counts);
    }

    /// What the server holds: the key's type and TTL, and those of its companions that exist.
    fn write_held(&self, kind: &[u8], ttl: &[u8], companions: &[Vec<u8>], out: &mut Vec<u8>) {
        const MISSING: i64 = -2;
        encode::bulk(out, b"type");
        encode::bulk(out, reply::text(kind).unwrap_or_default());
        encode::bulk(out, b"pttl");
        encode::integer(out, reply::integer(ttl).unwrap_or(MISSING));
        let ttls = companions.iter().map(|answer| reply::integer(answer).unwrap_or(MISSING));
        let there: Vec<(&Vec<u8>, i64)> = self.companions.iter().zip(ttls).filter(|(_, ttl)| *ttl != MISSING).collect();
        encode::bulk(out, b"companions");
        encode::map(out, self.protocol, there.len());
        for (name, ttl) in there {
            encode::bulk(out, name);
            encode::integer(out, ttl);
        }
    }
}

fn rule_label<'a>(policy: &'a ActivePolicy, key: &[u8]) -> &'a str {
    policy.rule(policy.find(key)).map_or(UNMATCHED_RULE, |rule| &rule.name)
}

fn facts_of(worker: &Worker, policy: &ActivePolicy, key: &[u8], held: &[u8]) -> Facts {
    let id = policy.find(key);
    let mut facts: Facts = vec![("key", quoted(key))];
    if worker.is_cluster() {
        facts.push(("slot", slots::slot_of(held).to_string()));
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
    if policy.leases(id) {
        let armed = worker.aside().is_armed(worker, id);
        let leases = if armed {
            "one client loads a missing key, the others wait for it"
        } else {
            "none for a while: misses of this rule were seldom filled, as if its keys were locks or existence checks"
        };
        facts.push(("leases", leases.to_owned()));
    }
    match policy.rule(id) {
        Some(rule) => push_rule(&mut facts, rule),
        None => policy.lifetime_of(id).iter().for_each(|lifetime| push_lifetime(&mut facts, lifetime)),
    }
    if let Some((wait, p99)) = worker.aside().wait_now(worker, id) {
        let why = match p99 {
            Some(p99) => format!("99 of 100 loads of late took at most {}", Span::from_millis(p99)),
            None => format!("fewer than {LEAST_LOADS} loads are known of late"),
        };
        facts.push(("waitNow", format!("{}: {why}", Span::from_millis(wait))));
    }
    facts
}

fn push_rule(facts: &mut Facts, rule: &Rule) {
    if rule.mode == Mode::Observe {
        facts.push((
            "mode",
            "Observe: nothing is changed; the counters under predicted say what the rule would have done".to_owned(),
        ));
    }
    if let Some(lifetime) = rule.lifetime() {
        push_lifetime(facts, lifetime);
    }
    match &rule.strategy {
        Strategy::Bypass {} => {}
        Strategy::CacheAside(cache_aside) => {
            facts.push(("stale", cache_aside.stale.to_string()));
            match &cache_aside.stampede {
                Some(stampede) => push_stampede(facts, stampede),
                None => facts.push(("stampede", "disabled: every client that misses loads".to_owned())),
            }
        }
        Strategy::ReadThrough(_) | Strategy::WriteThrough(_) | Strategy::WriteBehind(_) => {
            let Some(read_through) = rule.strategy.loads() else { return };
            facts.push(("stale", read_through.stale.to_string()));
            facts.push(("negativeTtl", read_through.negative_ttl.to_string()));
            facts.push(("lease", read_through.lease.to_string()));
            facts.push(("wait", read_through.wait.to_string()));
            facts.push(("origin", read_through.load.origin.clone()));
            if rule.is_of_hashes() {
                facts.push(("as", "Hash".to_owned()));
            }
        }
    }
}

fn push_stampede(facts: &mut Facts, stampede: &Stampede) {
    let Stampede { lease, wait, wait_follows_loads, early_expiry, at_wait_end } = stampede;
    facts.push(("lease", lease.to_string()));
    facts.push(("wait", if *wait_follows_loads { format!("at most {wait}") } else { wait.to_string() }));
    facts.push(("earlyExpiry", early_expiry.map_or(0.0, |beta| beta.get()).to_string()));
    let end = match at_wait_end {
        AtWaitEnd::Error => "Error",
        AtWaitEnd::Miss => "Miss",
    };
    facts.push(("atWaitEnd", end.to_owned()));
}

fn count(policy: &ActivePolicy) -> usize {
    policy.snapshot().rules.len()
}

fn push_lifetime(facts: &mut Facts, lifetime: &Lifetime) {
    facts.push(("ttl", lifetime.default.to_string()));
    facts.push(("maxTtl", lifetime.max.to_string()));
    facts.push(("jitter", lifetime.jitter.to_string()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_policy_says_is_told_also_where_no_server_answers() {
        let facts: Facts = vec![("rule", "user".to_owned())];
        let explanation = Explanation { protocol: Protocol::Resp3, facts, counts: vec![("hits", 3)], companions: vec![] };
        let mut out = Vec::new();
        explanation.write(&[b"+none\r\n".to_vec(), b"-TRYAGAIN no server\r\n".to_vec()], &mut out);
        let expected = "%3\r\n$4\r\nrule\r\n$4\r\nuser\r\n$5\r\nerror\r\n$18\r\nTRYAGAIN no server\r\n\
                        $8\r\ncounters\r\n%1\r\n$4\r\nhits\r\n:3\r\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }
}
