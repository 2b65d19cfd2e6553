//! What changes a partition: scripts over its keys, each atomic.
//!
//! All answer an array of bulk strings whose first is a word. Numbers are decimal texts.
//!
//! Whoever applies entries holds a *fence*: a number that rises with each claim, and without which nothing is cleared or trimmed. Another
//! relay's claim thus ends what an earlier one still does here; what it still does at the origin is ended by the position that stands there
//! in the same transaction as the changes.

use super::entry::{Change, Held, Version, kind_of};
use super::place::Partition;

/// A script with its keys and arguments, to be sent by whatever client.
#[derive(Debug, Clone)]
pub struct Call {
    script: &'static str,
    keys: Vec<Vec<u8>>,
    args: Vec<Vec<u8>>,
}

impl Call {
    /// A script over these keys, all of one slot.
    pub const fn new(script: &'static str, keys: Vec<Vec<u8>>, args: Vec<Vec<u8>>) -> Self {
        Self { script, keys, args }
    }

    /// The whole command: `EVAL`, the script, the number of keys, the keys, the arguments.
    pub fn command(&self) -> Vec<Vec<u8>> {
        let head = [b"EVAL".to_vec(), self.script.as_bytes().to_vec(), self.keys.len().to_string().into_bytes()];
        head.into_iter().chain(self.keys.iter().cloned()).chain(self.args.iter().cloned()).collect()
    }
}

/// An answer that none of the scripts gives.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the cache gave an unexpected answer to a script of Larder's")]
pub struct AnswerError;

/// How full a partition may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Entries.
    pub depth: u64,
    /// Bytes, as [`weight`](super::weight) counts them.
    pub bytes: u64,
    /// The age of the oldest entry, in milliseconds.
    pub age_ms: u64,
}

/// What came of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// All entries stand, with these versions, in their order. Whether that is durable is for the caller to see to.
    Done(Vec<Version>),
    /// Nothing was appended: the partition is over this bound.
    Full(Bound),
    /// Nothing was appended: it came after its time.
    Late,
    /// Nothing was appended: a write of one of the keys goes past the journal.
    Busy,
}

/// Which bound a partition is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Entries.
    Depth,
    /// Bytes.
    Bytes,
    /// The oldest entry's age.
    Age,
}

macro_rules! clock {
    () => {
        "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local function text(number) return string.format('%.0f', number) end
"
    };
}

/// KEYS: log, dirty, head, away. ARGV: until when it counts, in microseconds since 1970 by this server's clock; most entries, bytes and
/// microseconds; then for each entry key, kind, value. All entries are appended, or none.
const APPEND: &str = concat!(
    clock!(),
    "\
if now > tonumber(ARGV[1]) then return {'late'} end
if redis.call('EXISTS', KEYS[4]) == 1 then
  for i = 5, #ARGV, 3 do
    local away = redis.call('HGET', KEYS[4], ARGV[i])
    if away and tonumber(string.match(away, '^%d+')) > now then return {'busy'} end
    if away then redis.call('HDEL', KEYS[4], ARGV[i]) end
  end
end
local head = redis.call('HMGET', KEYS[3], 'last', 'in', 'out')
local last, taken, trimmed = tonumber(head[1] or 0), tonumber(head[2] or 0), tonumber(head[3] or 0)
local weight = 0
for i = 5, #ARGV, 3 do weight = weight + #ARGV[i] + #ARGV[i + 2] + 128 end
if redis.call('XLEN', KEYS[1]) + (#ARGV - 4) / 3 > tonumber(ARGV[2]) then return {'full', 'depth'} end
if taken - trimmed + weight > tonumber(ARGV[3]) then return {'full', 'bytes'} end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if first and now - tonumber(string.match(first[1], '^%d+')) > tonumber(ARGV[4]) then return {'full', 'age'} end
local answer = {'appended'}
for i = 5, #ARGV, 3 do
  last = math.max(last + 1, now)
  taken = taken + #ARGV[i] + #ARGV[i + 2] + 128
  local version = text(last)
  redis.call('XADD', KEYS[1], version .. '-0', 'k', ARGV[i], 'c', ARGV[i + 1], 'v', ARGV[i + 2], 'b', text(taken))
  redis.call('HSET', KEYS[2], ARGV[i], version .. ARGV[i + 1] .. ARGV[i + 2])
  answer[#answer + 1] = version
end
redis.call('HSET', KEYS[3], 'last', text(last), 'in', text(taken))
return answer"
);

/// KEYS: dirty, head, away. ARGV: until when it counts, as for an append; how long the writes may take, in microseconds; the keys. Each gets a
/// version, and none is journalled meanwhile. Only keys of which the origin has all.
const LEAVE: &str = concat!(
    clock!(),
    "\
if now > tonumber(ARGV[1]) then return {'late'} end
for i = 3, #ARGV do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then return {'waits'} end
  local away = redis.call('HGET', KEYS[3], ARGV[i])
  if away and tonumber(string.match(away, '^%d+')) > now then return {'busy'} end
end
local last = tonumber(redis.call('HGET', KEYS[2], 'last') or 0)
local answer = {'left'}
for i = 3, #ARGV do
  last = math.max(last + 1, now)
  local version = text(last)
  redis.call('HSET', KEYS[3], ARGV[i], text(now + tonumber(ARGV[2])) .. ' ' .. version)
  answer[#answer + 1] = version
end
redis.call('HSET', KEYS[2], 'last', text(last))
return answer"
);

/// KEYS: away. ARGV: for each key, the key and its version. May be repeated.
const ARRIVE: &str = "\
local count = 0
for i = 1, #ARGV, 2 do
  local away = redis.call('HGET', KEYS[1], ARGV[i])
  if away and string.match(away, ' (%d+)$') == ARGV[i + 1] then count = count + redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return {'arrived', tostring(count)}";

/// KEYS: relay, head. ARGV: token, for how long in milliseconds. One's own claim is renewed under the same fence.
const CLAIM: &str = concat!(
    clock!(),
    "\
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {'held', holder} end
local head = redis.call('HMGET', KEYS[2], 'fence', 'position')
local fence = head[1]
if not holder or not fence then
  fence = text(math.max(tonumber(fence or 0) + 1, now))
  redis.call('HSET', KEYS[2], 'fence', fence)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {'claimed', fence, head[2] or '0'}"
);

/// KEYS: relay. ARGV: token.
const RELEASE: &str = "\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) return {'released'} end
return {'held'}";

/// KEYS: log, dirty, head, parked. ARGV: fence, the version up to which all is applied or parked, the bytes through it, then for each key
/// that the origin has now, the key and the version that it has. May be repeated. It trims first, which a full server
/// takes as well: what follows a script's first write is not refused.
const DONE: &str = "\
local fence = redis.call('HGET', KEYS[3], 'fence') or '0'
if fence ~= ARGV[1] then return {'fenced', fence} end
redis.call('XTRIM', KEYS[1], 'MINID', '=', ARGV[2] .. '-1')
local cleared = 0
for i = 4, #ARGV, 2 do
  local version = tonumber(ARGV[i + 1])
  local held = redis.call('HGET', KEYS[2], ARGV[i])
  if held and tonumber(string.match(held, '^%d+')) <= version then
    redis.call('HDEL', KEYS[2], ARGV[i])
    cleared = cleared + 1
  end
  local parked = redis.call('HGET', KEYS[4], ARGV[i])
  if parked and tonumber(parked) <= version then redis.call('HDEL', KEYS[4], ARGV[i]) end
end
local head = redis.call('HMGET', KEYS[3], 'position', 'out')
if tonumber(ARGV[2]) > tonumber(head[1] or 0) then redis.call('HSET', KEYS[3], 'position', ARGV[2]) end
if tonumber(ARGV[3]) > tonumber(head[2] or 0) then redis.call('HSET', KEYS[3], 'out', ARGV[3]) end
return {'done', tostring(cleared)}";

/// KEYS: head, dead, parked. ARGV: fence, the most dead letters, version, key, kind, value, why. May be repeated at once: a letter that is
/// among the last few is not made again.
const PARK: &str = "\
local fence = redis.call('HGET', KEYS[1], 'fence') or '0'
if fence ~= ARGV[1] then return {'fenced', fence} end
for _, letter in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 4)) do
  if letter[2][2] == ARGV[3] then return {'parked'} end
end
if redis.call('XLEN', KEYS[2]) >= tonumber(ARGV[2]) then return {'full'} end
redis.call('XADD', KEYS[2], '*', 'n', ARGV[3], 'k', ARGV[4], 'c', ARGV[5], 'v', ARGV[6], 'w', ARGV[7])
local known = redis.call('HGET', KEYS[3], ARGV[4])
if not known or tonumber(known) < tonumber(ARGV[3]) then redis.call('HSET', KEYS[3], ARGV[4], ARGV[3]) end
return {'parked'}";

/// KEYS: log, dirty, head, dead, parked, relay.
const STATUS: &str = concat!(
    clock!(),
    "\
local head = redis.call('HMGET', KEYS[3], 'last', 'in', 'out', 'position', 'fence')
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
return {
  'status', text(now), tostring(redis.call('XLEN', KEYS[1])), text(tonumber(head[2] or 0) - tonumber(head[3] or 0)),
  first and string.match(first[1], '^%d+') or '0', head[1] or '0', head[4] or '0', head[5] or '0',
  tostring(redis.call('HLEN', KEYS[2])), tostring(redis.call('XLEN', KEYS[4])), tostring(redis.call('HLEN', KEYS[5])),
  redis.call('GET', KEYS[6]) or ''
}"
);

/// Appends `changes`, all of which are keys of `partition`, in their order. `until`: microseconds since 1970 by the server's clock, after
/// which nothing is appended.
pub fn append(partition: &Partition, until: u64, bounds: Bounds, changes: &[Change]) -> Call {
    let mut args = vec![
        until.to_string().into_bytes(),
        bounds.depth.to_string().into_bytes(),
        bounds.bytes.to_string().into_bytes(),
        bounds.age_ms.saturating_mul(1_000).to_string().into_bytes(),
    ];
    for change in changes {
        args.push(change.key.clone());
        args.push(kind_of(change.value.as_deref()).to_vec());
        args.push(change.value.clone().unwrap_or_default());
    }
    Call { script: APPEND, keys: vec![partition.log(), partition.dirty(), partition.head(), partition.away()], args }
}

/// Reads APPEND's answer.
///
/// # Errors
/// It is none.
pub fn appended(answer: &[&[u8]]) -> Result<Appended, AnswerError> {
    match answer {
        [b"appended", versions @ ..] if !versions.is_empty() => {
            let versions: Result<Vec<_>, _> = versions.iter().map(|version| Version::parse(version)).collect();
            versions.map(Appended::Done).map_err(|_| AnswerError)
        }
        [b"late"] => Ok(Appended::Late),
        [b"busy"] => Ok(Appended::Busy),
        [b"full", b"depth"] => Ok(Appended::Full(Bound::Depth)),
        [b"full", b"bytes"] => Ok(Appended::Full(Bound::Bytes)),
        [b"full", b"age"] => Ok(Appended::Full(Bound::Age)),
        _ => Err(AnswerError),
    }
}

/// Whether writes may go past the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// They may, with these versions, in the order of their keys. Whether that is durable is for the caller to see to, before the origin is told.
    Done(Vec<Version>),
    /// The origin has not got all of a key: it has to come first.
    Waits,
    /// Another write of a key is past the journal already.
    Busy,
    /// It came after its time.
    Late,
}

/// Has writes of `keys`, all of `partition`, go past the journal, for at most `micros`: nothing of them is appended meanwhile. `until` is as for
/// [`append`].
pub fn leave(partition: &Partition, until: u64, micros: u64, keys: &[Vec<u8>]) -> Call {
    let args = [until.to_string().into_bytes(), micros.to_string().into_bytes()].into_iter().chain(keys.iter().cloned());
    Call { script: LEAVE, keys: vec![partition.dirty(), partition.head(), partition.away()], args: args.collect() }
}

/// Reads LEAVE's answer.
///
/// # Errors
/// It is none.
pub fn left(answer: &[&[u8]]) -> Result<Left, AnswerError> {
    match answer {
        [b"left", versions @ ..] if !versions.is_empty() => {
            let versions: Result<Vec<_>, _> = versions.iter().map(|version| Version::parse(version)).collect();
            versions.map(Left::Done).map_err(|_| AnswerError)
        }
        [b"waits"] => Ok(Left::Waits),
        [b"busy"] => Ok(Left::Busy),
        [b"late"] => Ok(Left::Late),
        _ => Err(AnswerError),
    }
}

/// Ends what [`leave`] began, where it is known what came of the writes.
pub fn arrive(partition: &Partition, writes: &[(Vec<u8>, Version)]) -> Call {
    let args = writes.iter().flat_map(|(key, version)| [key.clone(), version.to_string().into_bytes()]);
    Call { script: ARRIVE, keys: vec![partition.away()], args: args.collect() }
}

/// Reads ARRIVE's answer: how many were still past the journal.
///
/// # Errors
/// It is none.
pub fn arrived(answer: &[&[u8]]) -> Result<u64, AnswerError> {
    match answer {
        [b"arrived", count] => number(count),
        _ => Err(AnswerError),
    }
}

/// What came of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// The partition is the caller's, for the time it asked for.
    Yes {
        /// With which it clears, trims and parks. Another than before: nothing that was read before counts any more.
        fence: u64,
        /// Up to where all is applied, as far as the journal knows; the origin may know better.
        position: Version,
    },
    /// It is another's, who is called this.
    Held(Vec<u8>),
}

/// Claims a partition, or renews one's claim, under `token`, which nobody else has, for so many milliseconds.
pub fn claim(partition: &Partition, token: &str, millis: u64) -> Call {
    let args = vec![token.as_bytes().to_vec(), millis.to_string().into_bytes()];
    Call { script: CLAIM, keys: vec![partition.relay(), partition.head()], args }
}

/// Reads CLAIM's answer.
///
/// # Errors
/// It is none.
pub fn claimed(answer: &[&[u8]]) -> Result<Claimed, AnswerError> {
    match answer {
        [b"claimed", fence, position] => {
            Ok(Claimed::Yes { fence: number(fence)?, position: Version::parse(position).map_err(|_| AnswerError)? })
        }
        [b"held", holder] => Ok(Claimed::Held(holder.to_vec())),
        _ => Err(AnswerError),
    }
}

/// Gives a claim back.
pub fn release(partition: &Partition, token: &str) -> Call {
    Call { script: RELEASE, keys: vec![partition.relay()], args: vec![token.as_bytes().to_vec()] }
}

/// Whether a fenced script was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced<T> {
    /// It was.
    Done(T),
    /// Another relay has claimed the partition since: nothing was done.
    Lost,
}

/// Trims what stands up to `upto`, all of which is applied or parked, with `through` of that entry (of the last one that is
/// trimmed), and clears keys from the dirty index of which the origin has the version that is told, or that were superseded there.
pub fn done(partition: &Partition, fence: u64, upto: Version, through: u64, cleared: &[(Vec<u8>, Version)]) -> Call {
    let mut args = vec![fence.to_string().into_bytes(), upto.to_string().into_bytes(), through.to_string().into_bytes()];
    args.extend(cleared.iter().flat_map(|(key, version)| [key.clone(), version.to_string().into_bytes()]));
    Call { script: DONE, keys: vec![partition.log(), partition.dirty(), partition.head(), partition.parked()], args }
}

/// Reads DONE's answer: how many keys are clean now.
///
/// # Errors
/// It is none.
pub fn done_answer(answer: &[&[u8]]) -> Result<Fenced<u64>, AnswerError> {
    match answer {
        [b"done", cleared] => Ok(Fenced::Done(number(cleared)?)),
        [b"fenced", _] => Ok(Fenced::Lost),
        _ => Err(AnswerError),
    }
}

/// Makes an entry that the origin refuses a dead letter, unless there are `most` already. Its key stays dirty: reads go on to see what was
/// acknowledged, until a later write is applied. Only then is the entry trimmed, by [`done`].
pub fn park(partition: &Partition, fence: u64, most: u64, version: Version, change: &Change, why: &str) -> Call {
    let args = vec![
        fence.to_string().into_bytes(),
        most.to_string().into_bytes(),
        version.to_string().into_bytes(),
        change.key.clone(),
        kind_of(change.value.as_deref()).to_vec(),
        change.value.clone().unwrap_or_default(),
        why.as_bytes().to_vec(),
    ];
    Call { script: PARK, keys: vec![partition.head(), partition.dead(), partition.parked()], args }
}

/// Reads PARK's answer: whether the entry is a dead letter now, or there is no room for more.
///
/// # Errors
/// It is none.
pub fn parked(answer: &[&[u8]]) -> Result<Fenced<bool>, AnswerError> {
    match answer {
        [b"parked"] => Ok(Fenced::Done(true)),
        [b"full"] => Ok(Fenced::Done(false)),
        [b"fenced", _] => Ok(Fenced::Lost),
        _ => Err(AnswerError),
    }
}

/// A command that tells what the dirty index has of a key: a bulk string as [`Held::parse`] reads it, or null.
pub fn look_up(partition: &Partition, key: &[u8]) -> [Vec<u8>; 3] {
    [b"HGET".to_vec(), partition.dirty(), key.to_vec()]
}

/// How a partition is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// The server's clock, in microseconds since 1970.
    pub now: u64,
    /// How many entries are not trimmed.
    pub depth: u64,
    /// How many bytes they take, as [`weight`](super::weight) counts them.
    pub bytes: u64,
    /// The oldest of them.
    pub oldest: Option<Version>,
    /// The greatest version ever given.
    pub last: Version,
    /// Up to where all is applied or parked.
    pub position: Version,
    /// The latest claim's fence. Zero: there was none.
    pub fence: u64,
    /// How many keys the origin has an older value of.
    pub dirty: u64,
    /// How many dead letters there are.
    pub dead: u64,
    /// How many keys have one that no later write has overtaken.
    pub parked: u64,
    /// Who applies its entries.
    pub relay: Option<Vec<u8>>,
}

impl Status {
    /// How old the oldest entry is, in milliseconds. Zero: there is none.
    pub fn age_ms(&self) -> u64 {
        self.oldest.map_or(0, |oldest| self.now.saturating_sub(oldest.get()) / 1_000)
    }
}

/// Asks how a partition is.
pub fn status(partition: &Partition) -> Call {
    let keys =
        vec![partition.log(), partition.dirty(), partition.head(), partition.dead(), partition.parked(), partition.relay()];
    Call { script: STATUS, keys, args: Vec::new() }
}

/// Reads STATUS's answer.
///
/// # Errors
/// It is none.
pub fn status_answer(answer: &[&[u8]]) -> Result<Status, AnswerError> {
    let [b"status", numbers @ .., relay] = answer else { return Err(AnswerError) };
    let numbers: Vec<u64> = numbers.iter().map(|digits| number(digits)).collect::<Result<_, _>>()?;
    let [now, depth, bytes, oldest, last, position, fence, dirty, dead, parked] = numbers[..] else { return Err(AnswerError) };
    Ok(Status {
        now,
        depth,
        bytes,
        oldest: (oldest > 0).then(|| Version::new(oldest)),
        last: Version::new(last),
        position: Version::new(position),
        fence,
        dirty,
        dead,
        parked,
        relay: (!relay.is_empty()).then(|| relay.to_vec()),
    })
}

/// What the dirty index said of a key, where it said anything.
///
/// # Errors
/// It has another form.
pub fn looked_up(value: Option<&[u8]>) -> Result<Option<Held>, AnswerError> {
    value.map(Held::parse).transpose().map_err(|_| AnswerError)
}

fn number(digits: &[u8]) -> Result<u64, AnswerError> {
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or(AnswerError)
}
