//! Rules that only observe: nothing here changes a byte. What passes is told to
//! [`Forecast`](crate::sidecar::engine::observe::Forecast), and what it says is counted.

use std::hash::BuildHasher as _;
use std::rc::Rc;

use rustc_hash::FxBuildHasher;

use crate::sidecar::commands::{Access, CommandSpec, Effect, Ttl};
use crate::sidecar::engine::lease::Rule;
use crate::sidecar::engine::observe::Stored;
use crate::sidecar::engine::ttl::{self, Cover, Coverage};
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, reply};
use crate::sidecar::session::Session;
use crate::sidecar::worker::Worker;

/// The TTLs that observing rules would see to.
struct Observed<'a>(&'a ActivePolicy);

impl Coverage for Observed<'_> {
    fn cover(&self, key: &[u8]) -> Option<Cover> {
        let rule = self.0.observed(self.0.find(key))?;
        Some(Cover { lifetime: *rule.lifetime()?, companions: false, stale: Default::default(), writes_copy: false })
    }
}

/// The reply to a read of observed keys, whose bytes are `command`. A long array whose start has left already is not seen.
pub fn on_reply(session: &Rc<Session>, command: &[u8], found: &[u8]) {
    let mut scanner = CommandScanner::default();
    let Ok(CommandScan::Complete { .. }) = scanner.scan(command) else { return };
    let args = CommandArgs::new(command, scanner.ranges());
    match reply::elements(found) {
        Some(elements) if !reply::is_null(found) => {
            let missing = elements.iter().zip(args.iter().skip(1)).filter(|(element, _)| reply::is_null(element));
            missing.for_each(|(_, key)| missed(session, key));
        }
        _ if reply::is_null(found) => args.get(1).into_iter().for_each(|key| missed(session, key)),
        _ => {}
    }
}

fn missed(session: &Rc<Session>, key: &[u8]) {
    let worker = session.worker();
    let policy = worker.policy();
    let id = policy.find(key);
    let Some(rule) = lease_of(&policy, id) else { return };
    let told = worker.forecast().borrow_mut().missed(hash(session, key), session.id(), &rule, worker.now());
    worker.metrics().predicted_miss(id, told.saved, told.at_once);
}

/// A command that may write to observed keys is on its way.
#[inline]
pub fn on_write(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) {
    if spec.access == Access::Write && session.worker().policy().observes() {
        predict(session, spec, args);
    }
}

fn predict(session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) {
    let worker = session.worker();
    let policy = worker.policy();
    let stores = matches!(spec.ttl, Ttl::Set | Ttl::SetEx(_)) || matches!(spec.name, "setnx" | "getset" | "mset");
    let (mut first, mut is_sent) = (None, false);
    for at in spec.keys(args).unwrap_or_default() {
        let changes = matches!(at.effect, Effect::Update | Effect::Write | Effect::Delete);
        let Some(key) = args.get(at.index as usize).filter(|_| changes) else { continue };
        let id = policy.find(key);
        if policy.observed(id).is_none() {
            continue;
        }
        first.get_or_insert(id);
        let lease = lease_of(&policy, id);
        let mut forecast = worker.forecast().borrow_mut();
        let stored = match lease.filter(|_| stores) {
            Some(rule) => forecast.stored(hash(session, key), session.id(), &rule, worker.now()),
            None => {
                forecast.changed(hash(session, key));
                Stored::Update
            }
        };
        is_sent |= stored != Stored::Unsent;
        if stored == Stored::Ambiguous {
            worker.metrics().predicted_ambiguous_fill(id);
        }
    }
    if let Some(first) = first.filter(|_| is_sent) {
        let mut gives_default = false;
        let mut random = || {
            gives_default = true;
            0
        };
        ttl::plan(args, spec, &Observed(&policy), &mut random, &mut Vec::new());
        if gives_default {
            worker.metrics().predicted_ttl_added(first);
        }
    }
}

/// A key was invalidated.
pub fn on_invalidation(worker: &Worker, database: u8, key: &[u8]) {
    if worker.policy().observes() {
        worker.forecast().borrow_mut().changed(hash_of(database, key));
    }
}

/// A session is over.
pub fn on_end(worker: &Worker, session: u64) {
    if worker.policy().observes() {
        worker.forecast().borrow_mut().closed(session);
    }
}

/// The leases that an observing rule would take.
fn lease_of(policy: &ActivePolicy, id: RuleId) -> Option<Rule> {
    let (lease, wait) = policy.observed(id)?.lease()?;
    Some(Rule::new(id, lease.as_millis(), wait.as_millis()))
}

fn hash(session: &Rc<Session>, key: &[u8]) -> u64 {
    hash_of(session.lane().database, key)
}

fn hash_of(database: u8, key: &[u8]) -> u64 {
    FxBuildHasher.hash_one((database, key))
}
