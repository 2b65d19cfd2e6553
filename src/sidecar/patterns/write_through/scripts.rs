//! What write-through asks of the cache: two scripts over a key and its companions, which share its slot.
//!
//! A *mark* stands beside a key while writes of it are under way: a hash with a field for each, `t:` and its token, which holds until
//! when that write may still come to something (milliseconds of the server's clock). While any stands, nobody may store what he
//! loads. It has no TTL, so that no full server drops it. Two more fields tell of writes that overlap: `m`, that some did, and `v`, the
//! greatest version that one of them made, or `x` where that is not known. Of writes that overlap, at most the last to end is kept,
//! and only where its version is the greatest: any other order of commits is possible.
//!
//! A write that was made, and finds its mark gone, overlapped with those that are under way now, though these do not know it: none of them is
//! kept either.
//!
//! Where writes take heed of what the origin calls a value (its `ETag`), that stands in one more companion.
//!
//! A write whose sidecar dies, or of which nobody knows whether it was made, leaves its field until its time is over. It may have been
//! the last: so no other that it overlapped with is kept.

use smallvec::SmallVec;

use super::super::content::Content;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::slots::Companion;

/// So many writes of one key may be under way at once.
pub const MOST_AT_ONCE: usize = 64;

macro_rules! living {
    () => {
        "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local own, living, lost = 't:' .. ARGV[1], 0, false
local marks = redis.call('HGETALL', KEYS[5])
for i = 1, #marks, 2 do
  if string.sub(marks[i], 1, 2) == 't:' and marks[i] ~= own then
    if tonumber(marks[i + 1]) > now then
      living = living + 1
    else
      redis.call('HDEL', KEYS[5], marks[i])
      lost = true
    end
  end
end
"
    };
}

/// KEYS: key, lease, negative entry, stale copy, mark, perhaps what the origin calls the value. ARGV: token, how long the write may take
/// in ms, the most at once. Takes away the key and the right to store what is loaded, and tells the last of the keys. May be repeated.
const BEGIN: &str = concat!(
    living!(),
    "\
if living >= tonumber(ARGV[3]) then return {'many'} end
if living == 0 then redis.call('HDEL', KEYS[5], 'm', 'v') end
if living > 0 then redis.call('HSET', KEYS[5], 'm', '1') end
if living > 0 and lost then redis.call('HSET', KEYS[5], 'v', 'x') end
redis.call('HSET', KEYS[5], own, string.format('%.0f', now + tonumber(ARGV[2])))
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return {'begun', KEYS[6] and redis.call('GET', KEYS[6])}"
);

/// ARGV: token, outcome (`stored`, `deleted` or `refused`), version or nothing, value, its time in ms, whether that counts since 1970
/// (`1`), its longest time in ms, by how much the stale copy outlives it in ms or 0, what the origin calls the value now or nothing; of a
/// hash, from here on fields and values in turn; of a refused one what it was told instead of the value. Whether the value is kept.
const END: &str = concat!(
    put!(4, 10),
    living!(),
    "\
if redis.call('HDEL', KEYS[5], own) == 0 then
  if living == 0 then redis.call('UNLINK', KEYS[5]) elseif lost or ARGV[2] ~= 'refused' then redis.call('HSET', KEYS[5], 'v', 'x') end
  redis.call('UNLINK', unpack(KEYS, 1, 4))
  if KEYS[6] then redis.call('UNLINK', KEYS[6]) end
  return 0
end
local mixed, best = redis.call('HGET', KEYS[5], 'm'), redis.call('HGET', KEYS[5], 'v')
if lost then best = 'x' end
local function newer(a, b) return #a > #b or (#a == #b and a > b) end
local version, kept = ARGV[3], 0
if ARGV[2] == 'stored' and living == 0 and best ~= 'x' and (not mixed or (version ~= '' and (not best or newer(version, best)))) then
  local left = tonumber(ARGV[5])
  if ARGV[6] == '1' then left = left - now end
  left = math.min(left, tonumber(ARGV[7]))
  if left >= 1 then
    local copy = tonumber(ARGV[8])
    put(KEYS[1], string.format('%.0f', left))
    if copy > 0 then put(KEYS[4], string.format('%.0f', left + copy)) end
    kept = 1
  end
end
if KEYS[6] then
  local tag = redis.call('GET', KEYS[6])
  if ARGV[2] == 'stored' and ARGV[9] ~= '' and living == 0 and not mixed then
    redis.call('SET', KEYS[6], ARGV[9], 'PX', ARGV[7])
  elseif ARGV[2] ~= 'refused' or tag == ARGV[4] then
    redis.call('UNLINK', KEYS[6])
  end
end
if living == 0 then
  redis.call('UNLINK', KEYS[5])
elseif ARGV[2] == 'deleted' or (ARGV[2] == 'stored' and version == '') then
  redis.call('HSET', KEYS[5], 'v', 'x')
elseif ARGV[2] == 'stored' and best ~= 'x' and (not best or newer(version, best)) then
  redis.call('HSET', KEYS[5], 'v', version)
elseif best then
  redis.call('HSET', KEYS[5], 'v', best)
end
return kept"
);

/// A key and what stands beside it, by their names.
#[derive(Debug, Clone)]
pub struct Names(SmallVec<[Vec<u8>; 6]>);

impl Names {
    /// Those of `key`. `tagged`: writes take heed of what the origin calls the value.
    pub fn of(key: &[u8], tagged: bool) -> Self {
        let companions = [Companion::Lease, Companion::Negative, Companion::Stale, Companion::Intent];
        let last = tagged.then_some(Companion::Versions);
        let names = companions.into_iter().chain(last).map(|companion| companion.name(key));
        Self(std::iter::once(key.to_vec()).chain(names).collect())
    }
}

/// What came of a write at the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It has the value.
    Stored {
        /// Which version that is, where that is known.
        version: Option<u64>,
        /// The value.
        value: &'a Content<'a>,
        /// How long the cache keeps it, in milliseconds, and whether that counts since 1970.
        life: (u64, bool),
        /// The longest that the rule lets it.
        most: u64,
        /// By how much a stale copy outlives it. Zero: there is none.
        stale: u64,
        /// What the origin calls it.
        tag: Option<&'a str>,
    },
    /// It has the key no longer.
    Deleted,
    /// Nothing has changed, perhaps since the origin calls it otherwise than this.
    Refused(Option<&'a str>),
}

fn write(script: &str, names: &Names, args: &[&[u8]], out: &mut Vec<u8>) {
    encode::array(out, 3 + names.0.len() + args.len());
    encode::bulk(out, b"EVAL");
    encode::bulk(out, script.as_bytes());
    encode::bulk(out, names.0.len().to_string().as_bytes());
    names.0.iter().for_each(|name| encode::bulk(out, name));
    args.iter().for_each(|arg| encode::bulk(out, arg));
}

/// Appends what begins a write, which comes to something within `millis` or not at all.
pub fn begin(names: &Names, token: &str, millis: u64, out: &mut Vec<u8>) {
    let (millis, most) = (millis.to_string(), MOST_AT_ONCE.to_string());
    write(BEGIN, names, &[token.as_bytes(), millis.as_bytes(), most.as_bytes()], out);
}

/// A command that answers 1 where the mark of a write stands.
pub fn stands(names: &Names, token: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    let mark = names.0.get(4).map_or(&[][..], Vec::as_slice);
    encode::command(&mut wire, &[&b"HEXISTS"[..], mark, format!("t:{token}").as_bytes()]);
    wire
}

/// Reads BEGIN's answer: what the origin last called the value.
///
/// # Errors
/// The text of an error reply, its code first: nothing has begun.
pub fn begun(answer: &[u8]) -> Result<Option<String>, String> {
    let parts = reply::elements(answer).unwrap_or_default();
    match parts.first().and_then(|part| reply::text(part)) {
        Some(b"begun") => {
            let tag = parts.get(1).and_then(|part| reply::text(part)).map(|tag| String::from_utf8_lossy(tag).into_owned());
            Ok(tag)
        }
        Some(b"many") => Err(format!("TRYAGAIN {MOST_AT_ONCE} writes of the key are under way: repeat it later")),
        _ => Err(unexpected(answer)),
    }
}

/// Appends what ends a write.
pub fn end(names: &Names, token: &str, outcome: Outcome<'_>, out: &mut Vec<u8>) {
    let token = token.as_bytes();
    match outcome {
        Outcome::Stored { version, value, life: (life, since_epoch), most, stale, tag } => {
            let version = version.map(|version| version.to_string()).unwrap_or_default();
            let (life, most, stale) = (life.to_string(), most.to_string(), stale.to_string());
            let since_epoch: &[u8] = if since_epoch { b"1" } else { b"0" };
            let (most, stale, tag) = (most.as_bytes(), stale.as_bytes(), tag.unwrap_or_default().as_bytes());
            let args = [token, b"stored", version.as_bytes(), value.text(), life.as_bytes(), since_epoch, most, stale, tag];
            let args: Vec<&[u8]> = args.into_iter().chain(value.pairs()).collect();
            write(END, names, &args, out);
        }
        Outcome::Deleted => write(END, names, &[token, b"deleted", b""], out),
        Outcome::Refused(tag) => write(END, names, &[token, b"refused", b"", tag.unwrap_or_default().as_bytes()], out),
    }
}

/// Reads END's answer: whether the value is kept.
///
/// # Errors
/// The text of an error reply, its code first.
pub fn ended(answer: &[u8]) -> Result<bool, String> {
    reply::integer(answer).map(|kept| kept == 1).ok_or_else(|| unexpected(answer))
}

fn unexpected(answer: &[u8]) -> String {
    match answer.strip_prefix(b"-") {
        Some(error) => String::from_utf8_lossy(error).trim_end().to_owned(),
        None => "ERR the cache gave an unexpected answer to a script of Larder's".to_owned(),
    }
}
