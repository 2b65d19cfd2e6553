//! Writes of hashes: a whole one is carried to its origin, part of one is not.

use std::collections::BTreeMap;

use super::super::content::Form;
use super::wish::{Answer, Life, Order, name_of};
use crate::origin::Writer;
use crate::origin::fields::pack;
use crate::sidecar::commands::CommandSpec;
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::CommandArgs;

/// The commands that make a hash of some fields where there is none.
const MAKE_PARTS: [&str; 6] = ["hincrby", "hincrbyfloat", "hmset", "hset", "hsetex", "hsetnx"];
/// The most bytes of a field's name that an error repeats.
const MAX_QUOTED: usize = 64;

/// What HSET, or HMSET, of a hash asks of the origin of its rule. It has all that the origin stores, and nothing else: of part of a
/// hash nobody knows the rest, and what the origin does not store would be lost when the cache forgets it. The error is the reply's text.
pub fn order(policy: &ActivePolicy, rule: RuleId, name: &str, args: &CommandArgs<'_>) -> Result<Order, String> {
    let (Some(key), true) = (args.get(1), args.len().is_multiple_of(2)) else {
        return Err(format!("ERR wrong number of arguments for '{name}' command"));
    };
    let mut texts = args.iter().skip(2);
    let mut fields: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    while let (Some(field), Some(value)) = (texts.next(), texts.next()) {
        fields.insert(field, value);
    }
    let stored = policy.writer(rule).and_then(Writer::fields).unwrap_or_default();
    let wrong = |what: String| {
        let (command, rule) = (name.to_ascii_uppercase(), name_of(policy, rule));
        let all = stored.join(", ");
        format!(
            "NOPERM {command} of a key of the rule `{rule}` {what}: its origin stores a hash as a whole, send all of {all} and no others"
        )
    };
    if let Some(field) = stored.iter().find(|field| !fields.contains_key(field.as_bytes())) {
        return Err(wrong(format!("lacks `{field}`")));
    }
    if let Some(field) = fields.keys().find(|field| !stored.iter().any(|known| known.as_bytes() == **field)) {
        let shown = String::from_utf8_lossy(&field[..field.len().min(MAX_QUOTED)]).into_owned();
        return Err(wrong(format!("cannot be carried to its origin, which has no field `{shown}`")));
    }
    let answer = if name == "hset" { Answer::Number(i64::try_from(fields.len()).unwrap_or(i64::MAX)) } else { Answer::Ok };
    let keys = vec![(key.to_vec(), Some(pack(fields)))];
    Ok(Order { rule, keys, life: Life::Default, form: Form::Hash, answer, raise: None })
}

/// Why a command that writes part of a hash is refused where hashes are loaded, and writes are the cache's own business: of a key that is
/// missing it would leave that part, which reads take for the whole. `None`: it is none.
pub fn refusal_of_parts(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Option<String> {
    let rule = policy.find(spec.only_key(args).filter(|_| MAKE_PARTS.contains(&spec.name))?);
    policy.loads_hashes(rule).then(|| {
        format!(
            "NOPERM {} of a key of the rule `{}` could leave a hash of some of its fields, which reads take for the whole: DEL the key, and the \
             next read loads it, or write strategy: WriteThrough",
            spec.name.to_ascii_uppercase(),
            name_of(policy, rule)
        )
    })
}
