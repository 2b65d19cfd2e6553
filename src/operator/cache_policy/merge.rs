//! The policies of one workload become one snapshot.
//!
//! Policies are taken by age, then name, and each either has a part in the snapshot as a whole, or none:
//! - The oldest decides over the CacheCluster; another's is refused (`TwoClusters`).
//! - No key may be covered by rules of two policies; the younger one is refused (`Overlap`). Within one policy the first rule that covers
//!   a key decides, as ever. A policy that only observes overlaps as others do: it would see nothing.
//! - One that names a replication slot which an older policy of the namespace has is refused (`SlotTaken`), whatever workloads that one selects.
//! - One that makes the snapshot too large is refused (`TooLarge`, `TooManyKeys`); smaller ones behind it may still find room.
//!
//! What policies say of all keys at once is settled so that no younger policy weakens an older one: `unmatched` is said by the oldest
//! that says it; the sweep takes no longer than any asks for; a command is tried for as long as any that takes effect asks for; FLUSHALL and
//! KEYS are allowed where each policy that takes effect does.
//!
//! A policy whose URL is missing goes on with the one that it had, where that still lies ready for the workload's sidecars. Any other that
//! names something that is missing keeps its place, so that none of its rivals takes it over meanwhile. The snapshot is then not complete, and
//! stands only where there is no earlier one.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::path::PathBuf;

use super::origins::{self, Files, KnownSecrets, Urls};
use super::place::Place;
use super::slots::SlotTaken;
use super::user;
use super::verdict::{Clash, Judgement, Missing, Refusal};
use super::workload::Workload;
use crate::api::cache_policy::{AllowSpec, PolicyMode, UnmatchedMode};
use crate::api::compile::{compile_about, in_order};
use crate::api::{CachePolicy, ObjectRef, Problems, SecretKeyRef};
use crate::policy::binding::BindingName;
use crate::policy::snapshot::{Allow, MAX_BYTES, MAX_RULES, Sensitive, Topology};
use crate::policy::{Rule, Snapshot};

/// What there is in a namespace that policies may name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// The CacheClusters, each with its place once that is known.
    pub clusters: BTreeMap<String, Option<Place>>,
    /// The Secrets.
    pub secrets: KnownSecrets,
    /// Of each binding the files of origins that lie ready for its sidecars.
    pub lying: BTreeMap<BindingName, Files>,
    /// Of policies that name a slot which an older one has, by their names: that.
    pub taken: BTreeMap<String, SlotTaken>,
}

/// What came of the policies that a workload follows.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Of each of them, in their order.
    pub judgements: Vec<Judgement>,
    /// What is to be delivered. `None`: no policy is accepted.
    pub merged: Option<Merged>,
}

/// What is to be delivered to a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The CacheCluster.
    pub cluster: String,
    /// What ties the workload to it.
    pub binding: BindingName,
    /// The rules of all policies that have what they name, or had it. `None`: none has.
    pub snapshot: Option<Snapshot>,
    /// Whether those are all accepted ones. Otherwise an earlier snapshot, if there is one, stays in force.
    pub is_complete: bool,
    /// The files that the snapshot names besides the login's.
    pub files: Files,
}

/// Merges the policies that a workload follows. `generation` becomes the snapshot's. `None`: it follows none.
pub fn merge(workload: &Workload, policies: &[&CachePolicy], namespace: &Namespace, generation: u64) -> Option<Outcome> {
    let followed: Vec<&CachePolicy> = policies.iter().copied().filter(|policy| workload.follows(policy)).collect();
    if followed.is_empty() {
        return None;
    }
    let followed = in_order(&followed);
    let take_all = |measure: Measure| {
        let mut merging = Merging::new(workload, namespace, measure);
        followed.iter().for_each(|policy| merging.take(policy));
        merging
    };
    // What has room as a whole has room at each step. Only where it has not, is it to be known which policy was too much.
    let mut merging = take_all(Measure::AtTheEnd);
    if !merging.has_room() {
        merging = take_all(Measure::AtEachStep);
    }
    merging.remark_on_allow();
    let merged = merging.merged(generation);
    Some(Outcome { judgements: merging.judgements, merged })
}

/// When it is measured how much all that is accepted takes: each time costs as much as all of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Measure {
    AtEachStep,
    AtTheEnd,
}

struct Merging<'a> {
    workload: &'a Workload,
    namespace: &'a Namespace,
    measure: Measure,
    accepted: Vec<Accepted>,
    /// The rules of those, each as the numbers of its policy and its own, by what their keys begin with.
    beginnings: BTreeMap<Vec<u8>, Vec<(usize, usize)>>,
    judgements: Vec<Judgement>,
}

/// A policy that has a part in the snapshot.
struct Accepted {
    /// As it is compiled: without what others decide.
    policy: CachePolicy,
    /// Its rules, under their own names.
    rules: Vec<Rule>,
    /// What of it lies in files. `None`: something that it names is missing, and nothing goes on in its place.
    files: Option<Files>,
}

impl Accepted {
    fn name(&self) -> String {
        name_of(&self.policy)
    }
}

fn name_of(policy: &CachePolicy) -> String {
    policy.metadata.name.clone().unwrap_or_default()
}

fn takes_effect(policy: &CachePolicy) -> bool {
    policy.spec.mode != Some(PolicyMode::Observe)
}

/// What a policy says of unmatched keys, where that takes effect.
fn unmatched(policy: &CachePolicy) -> Option<UnmatchedMode> {
    policy.spec.defaults.as_ref().filter(|_| takes_effect(policy))?.unmatched
}

impl<'a> Merging<'a> {
    fn new(workload: &'a Workload, namespace: &'a Namespace, measure: Measure) -> Self {
        Self { workload, namespace, measure, accepted: Vec::new(), beginnings: BTreeMap::new(), judgements: Vec::new() }
    }
}

impl Merging<'_> {
    fn take(&mut self, policy: &CachePolicy) {
        let resolved = self.resolve(policy);
        let (compiled, remarks) = self.without_what_others_decide(policy);
        let accepted = self.judge(&compiled);
        let (accepted, rules) = match accepted {
            Ok(rules) => (Ok(()), Some(rules)),
            Err(refusal) => (Err(refusal), None),
        };
        let remarks = if accepted.is_ok() { remarks } else { Vec::new() };
        let (resolved, files) = match resolved {
            Ok(Urls { files, missing: None }) => (Ok(()), files),
            Ok(Urls { files, missing: Some(missing) }) => (Err(missing.into()), files),
            Err(missing) => (Err(missing), None),
        };
        let goes_on = resolved.is_err() && files.is_some();
        if let Some(rules) = rules {
            for (number, rule) in rules.iter().enumerate() {
                let place = (self.accepted.len(), number);
                self.beginnings.entry(rule.keys.literal_prefix().to_vec()).or_default().push(place);
            }
            self.accepted.push(Accepted { policy: compiled, rules, files });
        }
        self.judgements.push(Judgement { policy: name_of(policy), accepted, resolved, goes_on, remarks });
    }

    /// Whether all is there that a policy names, and what of it lies in files.
    fn resolve(&self, policy: &CachePolicy) -> Result<Urls, Missing> {
        let cluster = &policy.spec.cache_cluster;
        match self.namespace.clusters.get(cluster) {
            None => Err(Missing::CacheCluster(cluster.clone())),
            Some(None) => Err(Missing::Address(cluster.clone())),
            Some(Some(_)) => {
                let lying = self.namespace.lying.get(&self.workload.binding(cluster));
                Ok(origins::urls(policy, &self.namespace.secrets, lying))
            }
        }
    }

    /// The oldest policy that says something of unmatched keys decides.
    fn without_what_others_decide(&self, policy: &CachePolicy) -> (CachePolicy, Vec<String>) {
        let mut compiled = policy.clone();
        let said = self.accepted.iter().find_map(|earlier| Some((earlier, unmatched(&earlier.policy)?)));
        let (Some((earlier, theirs)), Some(ours)) = (said, unmatched(policy)) else { return (compiled, Vec::new()) };
        if let Some(defaults) = &mut compiled.spec.defaults {
            defaults.unmatched = None;
        }
        let remark =
            format!("spec.defaults.unmatched is {theirs:?}, as the CachePolicy `{}` says, which is older", earlier.name());
        (compiled, if theirs == ours { Vec::new() } else { vec![remark] })
    }

    /// The policy's rules, if it can have a part in the snapshot.
    fn judge(&self, policy: &CachePolicy) -> Result<Vec<Rule>, Refusal> {
        let workload = self.workload.to_string();
        if let Some(first) = self.accepted.first()
            && first.policy.spec.cache_cluster != policy.spec.cache_cluster
        {
            let cluster = first.policy.spec.cache_cluster.clone();
            return Err(Refusal::TwoClusters { workload, winner: first.name(), cluster });
        }
        let alone = self.compile(&[policy], u64::MAX).map_err(Refusal::Invalid)?;
        if let Some(taken) = self.namespace.taken.get(&name_of(policy)) {
            return Err(Refusal::SlotTaken(Box::new(taken.clone())));
        }
        self.check_overlap(&alone.rules)?;
        match self.measure {
            Measure::AtEachStep => self.measure_with(policy, &alone)?,
            Measure::AtTheEnd => {}
        }
        Ok(alone.rules)
    }

    /// Whether there is room for a policy besides those that are accepted; `alone` is what it says.
    fn measure_with(&self, policy: &CachePolicy, alone: &Snapshot) -> Result<(), Refusal> {
        let workload = self.workload.to_string();
        let all: Vec<&CachePolicy> = self.accepted.iter().map(|accepted| &accepted.policy).chain([policy]).collect();
        let rules = alone.rules.len() + self.accepted.iter().map(|accepted| accepted.rules.len()).sum::<usize>();
        if rules > MAX_RULES {
            let bytes = bytes_of(alone);
            return Err(Refusal::TooLarge { workload, bytes, rules });
        }
        let together = self.compile(&all, u64::MAX).map_err(Refusal::Invalid)?;
        let bytes = bytes_of(&together);
        if bytes > MAX_BYTES {
            return Err(Refusal::TooLarge { workload, bytes, rules });
        }
        let (bytes, most) = (user::size(&user::globs(&together)), user::MAX_GLOB_BYTES);
        if bytes > most {
            return Err(Refusal::TooManyKeys { workload, bytes, most });
        }
        Ok(())
    }

    /// Whether there is room for all that is accepted.
    fn has_room(&self) -> bool {
        let all: Vec<&CachePolicy> = self.accepted.iter().map(|accepted| &accepted.policy).collect();
        let rules: usize = self.accepted.iter().map(|accepted| accepted.rules.len()).sum();
        let fits =
            |together: Snapshot| bytes_of(&together) <= MAX_BYTES && user::size(&user::globs(&together)) <= user::MAX_GLOB_BYTES;
        all.is_empty() || (rules <= MAX_RULES && self.compile(&all, u64::MAX).is_ok_and(fits))
    }

    /// The rules of accepted policies that may have a key in common with these, each as the numbers of its policy and its own, the
    /// oldest first: of two whose keys do not begin alike, no key is both's.
    fn near(&self, rules: &[Rule]) -> Vec<(usize, usize)> {
        let mut places = Vec::new();
        for rule in rules {
            let prefix = rule.keys.literal_prefix();
            let shorter = (0..prefix.len()).filter_map(|length| self.beginnings.get(&prefix[..length]));
            let from = (Bound::Included(prefix), Bound::Unbounded);
            let as_long = self.beginnings.range::<[u8], _>(from).take_while(|(other, _)| other.starts_with(prefix));
            places.extend(shorter.chain(as_long.map(|(_, places)| places)).flatten());
        }
        places.sort_unstable();
        places.dedup();
        places
    }

    fn check_overlap(&self, rules: &[Rule]) -> Result<(), Refusal> {
        for (number, of_it) in self.near(rules) {
            let earlier = &self.accepted[number];
            let theirs = &earlier.rules[of_it];
            let shared = rules.iter().find_map(|ours| Some((ours, ours.keys.common_key(&theirs.keys)?)));
            let Some((ours, key)) = shared else { continue };
            return Err(Refusal::Overlap(Box::new(Clash {
                workload: self.workload.to_string(),
                rule: ours.name.clone(),
                keys: ours.keys.to_string(),
                winner: earlier.name(),
                winning_rule: theirs.name.clone(),
                winning_keys: theirs.keys.to_string(),
                key: String::from_utf8_lossy(&key).into_owned(),
            })));
        }
        Ok(())
    }

    /// A snapshot of these policies, which are about one CacheCluster.
    fn compile(&self, policies: &[&CachePolicy], generation: u64) -> Result<Snapshot, Problems> {
        let name = policies.first().map(|policy| policy.spec.cache_cluster.clone()).unwrap_or_default();
        let place = self.namespace.clusters.get(&name).cloned().flatten();
        // Whether a policy is valid does not depend on whether its CacheCluster is there already.
        let nowhere = || Topology::Sentinel { master: name.clone(), sentinels: vec!["localhost:26379".to_owned()] };
        let place = place.unwrap_or_else(|| Place { topology: nowhere(), tls: false, keeping: None });
        let cluster = ObjectRef { kind: "CacheCluster", namespace: self.workload.namespace.clone(), name };
        // Which file it is comes later, and what is in it is seen apart.
        let in_file = |_: &str, _: &SecretKeyRef| -> Result<Sensitive, String> { Ok(Sensitive::File(PathBuf::new())) };
        let mut snapshot = compile_about(&cluster, place.keeping, policies, generation, place.reach(), &in_file)?;
        snapshot = snapshot.vouched_for(place.is_durable());
        origins::read_from_files(&mut snapshot, policies);
        snapshot.allow = allow(policies);
        Ok(snapshot)
    }

    fn remark_on_allow(&mut self) {
        let policies: Vec<&CachePolicy> = self.accepted.iter().map(|accepted| &accepted.policy).collect();
        let together = allow(&policies);
        let by_name: HashMap<&str, &CachePolicy> =
            policies.iter().filter_map(|policy| Some((policy.metadata.name.as_deref()?, *policy))).collect();
        for judgement in self.judgements.iter_mut().filter(|judgement| judgement.accepted.is_ok()) {
            let policy = by_name.get(judgement.policy.as_str());
            let AllowSpec { flush, keys } = policy.and_then(|policy| policy.spec.allow).unwrap_or_default();
            for (what, wanted, allowed) in [("flush", flush, together.flush), ("keys", keys, together.keys)] {
                if wanted && !allowed {
                    let why =
                        format!("spec.allow.{what} has no effect, since not every CachePolicy of {} says it", self.workload);
                    judgement.remarks.push(why);
                }
            }
        }
    }

    fn merged(&self, generation: u64) -> Option<Merged> {
        let cluster = self.accepted.first()?.policy.spec.cache_cluster.clone();
        let resolved: Vec<(&CachePolicy, &Files)> =
            self.accepted.iter().filter_map(|accepted| Some((&accepted.policy, accepted.files.as_ref()?))).collect();
        let policies: Vec<&CachePolicy> = resolved.iter().map(|(policy, _)| *policy).collect();
        let snapshot = if policies.is_empty() { None } else { self.compile(&policies, generation).ok() };
        let files = resolved.iter().flat_map(|(_, files)| files.0.clone()).collect();
        Some(Merged {
            binding: self.workload.binding(&cluster),
            cluster,
            is_complete: snapshot.is_some() && resolved.len() == self.accepted.len(),
            snapshot,
            files: Files(files),
        })
    }
}

/// What each policy that takes effect allows; where none does, what each does.
fn allow(policies: &[&CachePolicy]) -> Allow {
    let in_effect: Vec<&CachePolicy> = policies.iter().copied().filter(|policy| takes_effect(policy)).collect();
    let deciding = if in_effect.is_empty() { policies } else { &in_effect };
    let each = |allows: fn(AllowSpec) -> bool| deciding.iter().all(|policy| allows(policy.spec.allow.unwrap_or_default()));
    Allow { flush: each(|allow| allow.flush), keys: each(|allow| allow.keys) }
}

fn bytes_of(snapshot: &Snapshot) -> usize {
    serde_json::to_vec(snapshot).map_or(usize::MAX, |json| json.len())
}

#[cfg(test)]
mod tests;
