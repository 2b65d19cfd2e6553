//! What the sidecar sends for a client's write, and what its client is to get.

use larder::policy::{Lifetime, Percent, Span};
use larder::sidecar::commands::resolve;
use larder::sidecar::engine::lease::model::{Condition, Set};
use larder::sidecar::engine::lease::{Millis, Verdict};
use larder::sidecar::engine::ttl::{self, Cover, Coverage};
use larder::sidecar::patterns::cache_aside::scripts::{self, Names, Part};
use larder::sidecar::patterns::cache_aside::writes;
use larder::sidecar::resp::{CommandArgs, CommandScan, CommandScanner};

use super::super::{bulk, ok};
use super::steps::{Form, KEYS};
use crate::support::resp::{Value, encode};

/// How long a value lives where nothing is said.
pub const DEFAULT_MS: Millis = 1_000_000;
/// How long a stale copy outlives it.
pub const COPY_MS: Millis = 300_000;

/// One rule for all keys.
struct Rules;

impl Coverage for Rules {
    fn cover(&self, key: &[u8]) -> Option<Cover> {
        let (default, max) = (Span::from_millis(DEFAULT_MS), Span::from_millis(2 * DEFAULT_MS));
        let lifetime = Lifetime { default, max, jitter: Percent::new(0) };
        let cover = Cover { lifetime, companions: true, stale: Span::from_millis(COPY_MS), writes_copy: true };
        KEYS.iter().any(|own| own.as_bytes() == key).then_some(cover)
    }
}

/// What is sent for a command, as the sidecar makes it: a transaction where all keys are updated, else a script. `keys` says for each
/// key with companions where it is among the arguments, where its value is, and its verdict. How many replies there will be.
pub fn sent(words: &[&str], keys: &[(usize, usize, Verdict)]) -> (Vec<u8>, u32) {
    let raw = encode(words);
    let mut scanner = CommandScanner::default();
    assert!(matches!(scanner.scan(&raw), Ok(CommandScan::Complete { .. })), "{words:?}");
    let args = CommandArgs::new(&raw, scanner.ranges());
    let spec = resolve(&args).expect("a command");
    let (mut planned, mut wire) = (Vec::new(), Vec::new());
    let plan = ttl::plan(&args, spec, &Rules, &mut || 0, &mut planned);
    if keys.iter().all(|(.., verdict)| *verdict == Verdict::Update) {
        let replies = plan.write(&raw, args.len(), &planned, &mut wire);
        return (wire, replies);
    }
    let mut queued = Vec::new();
    plan.write_queued(&raw, args.len(), &planned, &mut queued);
    let arg = |at: usize| args.get(at).expect("as many arguments");
    let part = |(key, value, verdict): &(usize, usize, Verdict)| Part {
        names: Names::of(arg(*key)),
        verdict: *verdict,
        value: arg(*value),
    };
    let parts: Vec<Part<'_>> = keys.iter().map(part).collect();
    scripts::fill(&parts, &queued, &mut wire).expect("whole commands");
    (wire, 1)
}

pub fn text(value: u8) -> String {
    format!("v{value}")
}

impl Form {
    /// The command.
    pub fn words(self, key: &str, value: u8, span: Millis) -> Vec<String> {
        let (value, seconds, span) = (text(value), (span / 1000).to_string(), span.to_string());
        let (value, seconds, span) = (value.as_str(), seconds.as_str(), span.as_str());
        let words = match self {
            Form::Plain => vec!["SET", key, value],
            Form::Px => vec!["SET", key, value, "PX", span],
            Form::SetEx => vec!["SETEX", key, seconds, value],
            Form::PSetEx => vec!["PSETEX", key, span, value],
            Form::Nx => vec!["SET", key, value, "nx", "PX", span],
            Form::NxGet => vec!["SET", key, value, "PX", span, "NX", "GET"],
            Form::Xx => vec!["SET", key, value, "PX", span, "XX"],
            Form::Get => vec!["SET", key, value, "GET", "PX", span],
            Form::GetSet => vec!["GETSET", key, value],
            Form::SetNx => vec!["SETNX", key, value],
            Form::KeepTtl => vec!["SET", key, value, "KEEPTTL"],
            Form::Past => vec!["SET", key, value, "PXAT", "1"],
            Form::Invalid => vec!["SET", key, value, "EX", "0"],
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// Where its value is among its arguments.
    pub fn value_at(self, words: &[&str]) -> usize {
        writes::value_at(&words[0].to_lowercase()).expect("one that may fill")
    }

    /// What the model is told. `left`: how long the key lives yet, if it is there.
    pub fn set(self, value: u8, span: Millis, left: Option<Millis>) -> Set<String> {
        let (condition, ttl) = match self {
            Form::Nx | Form::NxGet => (Condition::Missing, span),
            Form::SetNx => (Condition::Missing, DEFAULT_MS),
            Form::Xx => (Condition::Present, span),
            Form::Plain | Form::GetSet => (Condition::Always, DEFAULT_MS),
            Form::KeepTtl => (Condition::Always, left.unwrap_or(DEFAULT_MS)),
            Form::Past => (Condition::Always, 0),
            // As a condition that is not met.
            Form::Invalid => (unmet(left.is_some()), span),
            Form::Px | Form::SetEx | Form::PSetEx | Form::Get => (Condition::Always, span),
        };
        let may_return_it = matches!(self, Form::Get | Form::GetSet | Form::NxGet);
        let stale_ttl = if may_return_it || self == Form::KeepTtl { 0 } else { COPY_MS };
        Set { value: text(value), condition, ttl, stale_ttl }
    }

    /// Whether the client got what is right, where `before` was there.
    pub fn is_answer(self, reply: &Value, before: Option<&str>, is_met: bool) -> bool {
        let old = before.map_or(Value::Nil, bulk);
        match self {
            Form::Invalid => matches!(reply, Value::Error(text) if text.starts_with("ERR invalid expire time")),
            Form::NxGet | Form::Get | Form::GetSet => *reply == old,
            Form::SetNx => *reply == Value::Int(i64::from(is_met)),
            _ => *reply == if is_met { ok() } else { Value::Nil },
        }
    }
}

/// A condition that is not met.
pub fn unmet(is_there: bool) -> Condition {
    if is_there { Condition::Missing } else { Condition::Present }
}
