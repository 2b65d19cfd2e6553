//! Names as the application calls them, where servers list keys.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::super::dispatch::{Request, own_keys};
use super::glob::matches;
use super::keeper;
use crate::policy::versions::{Counter, split};
use crate::sidecar::resp::{CommandArgs, encode, reply};
use crate::sidecar::slots::is_larder_key;
use crate::sidecar::upstream::sink::Answer;
use crate::sidecar::worker::Worker;

/// What the application calls a name that the cache has. `None`: it is none of its names, or not any more.
pub fn shown<'n>(worker: &Worker, name: &'n [u8]) -> Option<&'n [u8]> {
    if is_larder_key(name) {
        return None;
    }
    let policy = worker.policy();
    let id = policy.find(name);
    let Some(rule) = policy.rule(id).filter(|_| policy.is_versioned(id)) else { return Some(name) };
    // What has no version is from before the rule had them.
    let (key, version) = split(name)?;
    (worker.versions().known(&Counter::all_of(rule, key)) == Some(version)).then_some(key)
}

/// Hands a SCAN's answer to `then`, once the versions are known that the names in it are made of.
pub fn when_known(worker: &Rc<Worker>, answer: Answer<'_>, then: impl FnOnce(&Rc<Worker>, Answer<'_>) + 'static) {
    let Answer::Reply(bytes) = answer else { return then(worker, answer) };
    let unknown = unknown_in(worker, bytes);
    if unknown.is_empty() {
        return then(worker, answer);
    }
    let (worker, bytes) = (worker.clone(), bytes.to_vec());
    tokio::task::spawn_local(async move {
        keeper::fetch(&worker, unknown).await;
        then(&worker, Answer::Reply(&bytes));
        worker.flush_dirty();
    });
}

/// What has to be asked for before the names in a SCAN's answer can be shown.
fn unknown_in(worker: &Worker, answer: &[u8]) -> BTreeSet<Counter> {
    let policy = worker.policy();
    let parts = policy.has_versions().then(|| reply::elements(answer)).flatten().unwrap_or_default();
    let items = parts.get(1).and_then(|names| reply::elements(names)).unwrap_or_default();
    let counters = items.iter().filter_map(|item| {
        let name = reply::text(item)?;
        let id = policy.find(name);
        let rule = policy.rule(id).filter(|_| policy.is_versioned(id))?;
        Some(Counter::all_of(rule, split(name)?.0))
    });
    let all: BTreeSet<Counter> = counters.flatten().collect();
    worker.versions().unknown(all.iter())
}

/// Appends `list`, an array of names as it came, as the application sees it: those that match `glob`, where there is one.
pub fn shown_list(worker: &Worker, list: &[u8], glob: Option<&[u8]>, out: &mut Vec<u8>) {
    let Some(items) = worker.policy().has_versions().then(|| reply::elements(list)).flatten() else {
        return own_keys::hide(list, out);
    };
    let names = items.iter().filter_map(|item| shown(worker, reply::text(item)?));
    let names: Vec<&[u8]> = names.filter(|name| glob.is_none_or(|glob| matches(glob, name))).collect();
    encode::array(out, names.len());
    names.iter().for_each(|name| encode::bulk(out, name));
}

/// A SCAN, as the servers are to be asked: where names have versions, what they are to match is looked at here.
#[derive(Debug)]
pub struct Listing<'a> {
    /// The arguments.
    pub args: Vec<Cow<'a, [u8]>>,
    /// What names are to match.
    pub glob: Option<Vec<u8>>,
}

impl<'a> Listing<'a> {
    /// What is asked for `request`.
    pub fn of(worker: &Worker, request: &Request<'a>) -> Self {
        let mut args: Vec<Cow<'a, [u8]>> = request.args.iter().map(Cow::Borrowed).collect();
        let glob = worker.policy().has_versions().then(|| take_match(request.args, &mut args)).flatten();
        Self { args, glob }
    }
}

/// Takes MATCH and what follows it out of a SCAN's arguments.
fn take_match<'a>(given: CommandArgs<'a>, args: &mut Vec<Cow<'a, [u8]>>) -> Option<Vec<u8>> {
    let at = (2..given.len()).step_by(2).find(|at| given.get(*at).is_some_and(|word| word.eq_ignore_ascii_case(b"match")))?;
    let glob = given.get(at + 1)?.to_vec();
    args.drain(at..at + 2);
    Some(glob)
}
