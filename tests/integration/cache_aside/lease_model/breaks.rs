//! What is changed, to see that the comparison notices it: a script on its way to the server, or what the model holds after a step.

use std::borrow::Cow;

use larder::sidecar::engine::lease::model::Slot;

use super::steps::{Ask, Right, Step};

/// A change.
#[derive(Debug, Clone, Copy)]
pub enum Break {
    Nothing,
    /// What is found in a script, and what goes on in its stead: no longer, blanks fill it up.
    Script(&'static str, &'static str),
    /// What the model holds, by what it held before the step.
    Model(fn(&Step, &Slot<String>, &mut Slot<String>)),
}

impl Break {
    /// What the server is sent.
    pub fn on_the_way<'a>(&self, wire: &'a [u8]) -> Cow<'a, [u8]> {
        let Break::Script(from, to) = self else { return Cow::Borrowed(wire) };
        let Ok(text) = std::str::from_utf8(wire) else { return Cow::Borrowed(wire) };
        assert!(to.len() <= from.len(), "{to} is longer than {from}");
        Cow::Owned(text.replace(from, &format!("{to:0$}", from.len())).into_bytes())
    }

    /// Changes what the model holds after a step.
    pub fn in_the_model(&self, step: &Step, before: &Slot<String>, after: &mut Slot<String>) {
        if let Break::Model(change) = self {
            change(step, before, after);
        }
    }
}

/// Each change, and what it does.
pub const ALL: [(&str, Break); 30] = [
    (
        "a fill is stored under any generation",
        Break::Script("(lease and lease.generation == given and string.sub(given, -8) == run)", "given ~= '-'"),
    ),
    (
        "a fill is stored under that of another run",
        Break::Script("lease.generation == given and string.sub(given, -8) == run", "lease.generation == given"),
    ),
    ("what is doubtful is stored", Break::Script("valid[i] = given == '*' or", "valid[i] = #given == 1 or")),
    ("a fill that is there already is removed", Break::Script("elseif stored and before[i] == value then", "elseif false then")),
    (
        "an NX of the value that is there counts as a fill",
        Break::Script("(missing_only and before[i] and before[i] == now)", "false"),
    ),
    ("a refused MSETNX counts as written", Break::Script("local unmet = reply == 0 or", "local unmet = false or")),
    (
        "a refused SET leaves the generation",
        Break::Script("if valid[i] then finish(i) else renew(i) end", "if valid[i] then finish(i) end"),
    ),
    (
        "a condition that fails leaves the generation",
        Break::Script("if not valid[i] then renew(i) end\n    answer", "\n    answer"),
    ),
    ("a refused lease begins to count from one", Break::Script("math.min(lease.leads, 1)", "1")),
    ("a fill leaves the negative entry", Break::Script("redis.call('UNLINK', absence)", "")),
    ("a fill leaves the stale copy", Break::Script("else redis.call('UNLINK', copy) end", "end")),
    ("a lease that is written again lives long", Break::Script("'KEEPTTL'", "'PX',2e7")),
    ("leases are taken before they end", Break::Script("if lease and now < lease.held then", "if false then")),
    ("a BEGIN that is repeated is not granted", Break::Script("if lease.taker == ARGV[1] then", "if false then")),
    ("leases outlive a failover", Break::Script("~= run then lease = nil end", "~= run then end")),
    ("a key is everybody's after two", Break::Script("lease.leads >= 3", "lease.leads >= 2")),
    ("a key is everybody's though there is a copy", Break::Script("if miss and not stale and", "if miss and")),
    (
        "who refreshes a key counts",
        Break::Script("if miss then lease.leads = lease.leads + 1 end", "lease.leads = lease.leads + 1"),
    ),
    ("a key that lives long is refreshed", Break::Script("left > tonumber(ARGV[4])", "false")),
    ("a lease is given back by anybody", Break::Script("or lease.taker ~= ARGV[1] then", "then")),
    ("a lease is given back twice", Break::Script("or lease.held == 0 or", "or")),
    ("LARDER.FILL stores under any generation", Break::Script("or lease.generation ~= ARGV[1] or", "or")),
    ("nobody is told", Break::Script("redis.pcall('SPUBLISH', name, '')", "")),
    (
        "in the model, a deletion leaves the lease",
        Break::Model(|step, before, after| {
            if let Step::Remove { .. } = step {
                after.lease.clone_from(&before.lease);
            }
        }),
    ),
    (
        "in the model, an update leaves the stale copy",
        Break::Model(|step, before, after| {
            if let Step::Write { right: Right::Update, .. } = step
                && after.stale.is_none()
            {
                after.stale.clone_from(&before.stale);
            }
        }),
    ),
    (
        "in the model, a refused SET ends the lease",
        Break::Model(|step, before, after| {
            let generation = |slot: &Slot<String>| slot.lease.as_ref().map(|lease| lease.generation);
            if let Step::Write { .. } = step
                && generation(before) != generation(after)
            {
                after.lease = None;
            }
        }),
    ),
    (
        "in the model, whoever refreshes a key counts",
        Break::Model(|step, before, after| {
            let until = |slot: &Slot<String>| slot.lease.as_ref().map(|lease| lease.until);
            if let Step::Begin { ask: Ask::Early, .. } = step
                && until(before) != until(after)
                && let Some(lease) = &mut after.lease
            {
                lease.leads += 1;
            }
        }),
    ),
    (
        "in the model, the next to take a lease forgets who waits",
        Break::Model(|_, before, after| {
            if let (Some(before), Some(after)) = (&before.lease, &mut after.lease)
                && before.taker != after.taker
            {
                after.waited_for = false;
            }
        }),
    ),
    (
        "in the model, a stale copy lives no longer than its value",
        Break::Model(|step, _, after| {
            if let (Step::Write { .. }, Some(value), Some(copy)) = (step, &after.value, &mut after.stale) {
                copy.until = value.until;
            }
        }),
    ),
    ("in the model, nobody is told", Break::Model(|_, _, after| after.announced = false)),
];
