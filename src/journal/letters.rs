//! What people do with dead letters, and how relays know of each other: scripts like those of [`super::scripts`].

use super::entry::{FormError, Version};
use super::place::Partition;
use super::scripts::{AnswerError, Call};
use super::{Change, Entry};

/// KEYS: log, dirty, head, dead, parked. ARGV: the letter's ID. The write is appended once more, as the newest of its key, unless a later one
/// was acknowledged meanwhile.
const REPLAY: &str = "\
local letter = redis.call('XRANGE', KEYS[4], ARGV[1], ARGV[1])[1]
if not letter then return {'absent'} end
local field = {}
for i = 1, #letter[2], 2 do field[letter[2][i]] = letter[2][i + 1] end
local held = redis.call('HGET', KEYS[2], field.k)
if not held or string.match(held, '^%d+') ~= field.n then return {'superseded'} end
local time = redis.call('TIME')
local head = redis.call('HMGET', KEYS[3], 'last', 'in')
local last = math.max(tonumber(head[1] or 0) + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
local version = string.format('%.0f', last)
local taken = string.format('%.0f', tonumber(head[2] or 0) + #field.k + #field.v + 128)
redis.call('XADD', KEYS[1], version .. '-0', 'k', field.k, 'c', field.c, 'v', field.v, 'b', taken)
redis.call('HSET', KEYS[2], field.k, version .. field.c .. field.v)
redis.call('HSET', KEYS[3], 'last', version, 'in', taken)
if redis.call('HGET', KEYS[5], field.k) == field.n then redis.call('HDEL', KEYS[5], field.k) end
redis.call('XDEL', KEYS[4], ARGV[1])
return {'replayed', version}";

/// KEYS: dirty, dead, parked. ARGV: the letter's ID. Where no later write of the key was acknowledged, it is no longer dirty: reads see what
/// the origin has.
const DROP: &str = "\
local letter = redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1])[1]
if not letter then return {'absent'} end
local field = {}
for i = 1, #letter[2], 2 do field[letter[2][i]] = letter[2][i + 1] end
redis.call('XDEL', KEYS[2], ARGV[1])
if redis.call('HGET', KEYS[3], field.k) == field.n then redis.call('HDEL', KEYS[3], field.k) end
local held = redis.call('HGET', KEYS[1], field.k)
if not held or string.match(held, '^%d+') ~= field.n then return {'dropped', 'superseded'} end
redis.call('HDEL', KEYS[1], field.k)
return {'dropped', 'last'}";

/// KEYS: relays. ARGV: token, for how long in milliseconds. Answers who lives, by this server's clock.
const HERE: &str = "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
local answer = redis.call('ZRANGE', KEYS[1], 0, -1)
table.insert(answer, 1, 'living')
return answer";

/// The sorted set of relays that live, each with the moment until which that holds. Of a journal's first partition alone.
pub fn relays(first: &Partition) -> Vec<u8> {
    [first.relay(), b"s".to_vec()].concat()
}

/// Says that the relay with this token lives, for so many milliseconds.
pub fn here(first: &Partition, token: &str, millis: u64) -> Call {
    Call::new(HERE, vec![relays(first)], vec![token.as_bytes().to_vec(), millis.to_string().into_bytes()])
}

/// Reads HERE's answer: the tokens of the relays that live.
///
/// # Errors
/// It is none.
pub fn living(answer: &[&[u8]]) -> Result<Vec<String>, AnswerError> {
    match answer {
        [b"living", tokens @ ..] => Ok(tokens.iter().map(|token| String::from_utf8_lossy(token).into_owned()).collect()),
        _ => Err(AnswerError),
    }
}

/// An entry that its origin refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// Its ID in the stream of dead letters, by which it is replayed or dropped.
    pub id: String,
    /// The refused entry's place in the journal.
    pub version: Version,
    /// What was to be written.
    pub change: Change,
    /// What the origin said.
    pub why: String,
}

impl Letter {
    /// Reads a letter by its ID and its fields with their values.
    ///
    /// # Errors
    /// Where it has another form.
    pub fn parse(id: &[u8], fields: &[(&[u8], &[u8])]) -> Result<Self, FormError> {
        let wrong = || FormError("a dead letter");
        let field = |name: &[u8]| fields.iter().find(|(found, _)| *found == name).map(|(_, value)| *value).ok_or_else(wrong);
        let entry_id = [field(b"n")?, b"-0"].concat();
        let through: &[u8] = b"0";
        let Entry { version, change, .. } = Entry::parse(&entry_id, fields.iter().copied().chain([(&b"b"[..], through)]))?;
        let id = String::from_utf8(id.to_vec()).map_err(|_| wrong())?;
        Ok(Self { id, version, change, why: String::from_utf8_lossy(field(b"w")?).into_owned() })
    }

    /// When it became one, in milliseconds since 1970 by the server's clock.
    pub fn since_ms(&self) -> u64 {
        self.id.split('-').next().and_then(|millis| millis.parse().ok()).unwrap_or(0)
    }
}

/// What came of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replayed {
    /// The write stands in the journal again.
    Yes(Version),
    /// A later write of the key was acknowledged, or made: this one must not come behind it.
    Superseded,
    /// There is no such letter.
    Absent,
}

/// Has a dead letter's write told to its origin once more.
pub fn replay(partition: &Partition, id: &str) -> Call {
    let keys = vec![partition.log(), partition.dirty(), partition.head(), partition.dead(), partition.parked()];
    Call::new(REPLAY, keys, vec![id.as_bytes().to_vec()])
}

/// Reads REPLAY's answer.
///
/// # Errors
/// It is none.
pub fn replayed(answer: &[&[u8]]) -> Result<Replayed, AnswerError> {
    match answer {
        [b"replayed", version] => Version::parse(version).map(Replayed::Yes).map_err(|_| AnswerError),
        [b"superseded"] => Ok(Replayed::Superseded),
        [b"absent"] => Ok(Replayed::Absent),
        _ => Err(AnswerError),
    }
}

/// What came of a drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The letter is gone, and with it the key's last acknowledged write: what the cache has of the key is to go too.
    Last,
    /// The letter is gone; a later write of the key was acknowledged.
    Superseded,
    /// There is no such letter.
    Absent,
}

/// Gives a dead letter's write up.
pub fn drop(partition: &Partition, id: &str) -> Call {
    Call::new(DROP, vec![partition.dirty(), partition.dead(), partition.parked()], vec![id.as_bytes().to_vec()])
}

/// Reads DROP's answer.
///
/// # Errors
/// It is none.
pub fn dropped(answer: &[&[u8]]) -> Result<Dropped, AnswerError> {
    match answer {
        [b"dropped", b"last"] => Ok(Dropped::Last),
        [b"dropped", b"superseded"] => Ok(Dropped::Superseded),
        [b"absent"] => Ok(Dropped::Absent),
        _ => Err(AnswerError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_read_as_the_script_writes_them() {
        let fields: [(&[u8], &[u8]); 5] = [(b"n", b"17"), (b"k", b"user:\xff"), (b"c", b"s"), (b"v", b"x"), (b"w", b"no \xff")];
        let letter = Letter::parse(b"1700-3", &fields).expect("a letter");
        assert_eq!((letter.version, letter.since_ms(), letter.why.as_str()), (Version::new(17), 1700, "no \u{fffd}"));
        assert_eq!(letter.change, Change { key: b"user:\xff".to_vec(), value: Some(b"x".to_vec()) });
        for missing in 0..4 {
            let rest: Vec<_> =
                fields.iter().enumerate().filter(|(at, _)| *at != missing && *at != 3).map(|(_, pair)| *pair).collect();
            assert!(missing == 3 || Letter::parse(b"1700-3", &rest).is_err(), "{missing}");
        }
    }
}
