//! What is kept in the cache of a feed: which relay reads it, up to where its events were written, and for whom. Scripts, without I/O.
//!
//! It lies in the slot of the stream of events, so that one script writes events and moves the position. A cache that loses its latest
//! writes loses both, and whoever writes next finds another position than it left: then it is not known which events are gone.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::wanted::Entry;
use crate::journal::feed::begin;
use crate::journal::scripts::{AnswerError, Call};
use crate::origin::changes::pgoutput::Lsn;
use crate::origin::changes::{Identity, SlotOwner};
use crate::policy::events::{LAPSE_FIELD, STREAM, feed_claim_key, feed_state_key};
use crate::policy::slots::slot_of;

/// The most entries of the stream that are kept while nobody reads it. Its readers keep fewer.
const MOST_KEPT: &str = "100000";
/// The most that one script writes: entries, and bytes of them.
const MOST_ENTRIES: usize = 64;
const MOST_BYTES: usize = 512 * 1024;
/// How long it is known of a feed that was taken away.
pub const LEFT_FOR: Duration = Duration::from_secs(86_400);

/// KEYS: claim, state. ARGV: token, for how long in milliseconds. One's own claim is renewed under the same fence.
const CLAIM: &str = "\
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {'held', holder} end
local fence = redis.call('HGET', KEYS[2], 'fence')
if not holder or not fence then
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
  fence = string.format('%.0f', math.max(tonumber(fence or 0) + 1, now))
  redis.call('HSET', KEYS[2], 'fence', fence)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {'claimed', fence}";

/// KEYS: claim. ARGV: token.
const RELEASE: &str = "\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) return {'released'} end
return {'held'}";

/// What was noted of an earlier slot of this name does not count any more.
///
/// KEYS: claim, state. ARGV: token, whose the slot is.
const OWNED: &str = "\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {'held'} end
redis.call('HSET', KEYS[2], 'made', ARGV[2])
if redis.call('HDEL', KEYS[2], 'removed') == 1 then redis.call('PERSIST', KEYS[2]) end
return {'noted'}";

/// Whether the slot was made by a relay stays known to who takes it away, since one that has not heard of that may make it anew. Who reads it next
/// asks anew whose it is.
///
/// KEYS: claim, state. ARGV: token, or nothing where nobody has the feed, how long what is left stays, in milliseconds.
const REMOVED: &str = "\
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return {'held'} end
redis.call('HDEL', KEYS[2], 'position', 'follows', 'through', 'kept', 'trouble')
redis.call('HSET', KEYS[2], 'removed', '1')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return {'noted'}";

/// KEYS: claim, state. ARGV: token, what is wrong.
const TROUBLE: &str = "\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {'held'} end
redis.call('HSET', KEYS[2], 'trouble', ARGV[2])
return {'noted'}";

/// KEYS: state.
const LOOK: &str = "\
local state = redis.call('HMGET', KEYS[1], 'position', 'follows', 'made', 'removed')
return {'state', state[1] or '', state[2] or '', state[3] or '', state[4] or ''}";

/// Whose the slot is, as it is noted.
const MADE_BY_LARDER: &[u8] = b"1";
const MADE_BY_OTHER: &[u8] = b"0";

/// KEYS: stream, state. ARGV: fence, the position that was left or nothing, the next one, who follows or nothing, how many entries of the
/// stream are kept, how far behind that is in milliseconds or nothing, the bytes that the database keeps or nothing, and with these what is
/// wrong with tables or nothing, the field that notes the last entry where changes may have been lost or nothing, since when all is said by the
/// server's clock or nothing, then for each entry the number of its words and these.
///
/// A script may be carried out long after it was made: where the server stood still, or was asked again. How far behind that is would be too
/// little then, and the moment by the server's own clock is not; where that clock is another's, since servers have changed, the earlier counts.
const WRITE: &str = "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local state = redis.call('HMGET', KEYS[2], 'fence', 'position')
if (state[1] or '0') ~= ARGV[1] then return {'fenced'} end
if ARGV[2] ~= '' and state[2] ~= ARGV[2] then return {'lost'} end
local at, last = 11, nil
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  last = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], '*', unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
redis.call('HSET', KEYS[2], 'position', ARGV[3])
if ARGV[9] ~= '' and last then redis.call('HSET', KEYS[2], ARGV[9], last) end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[2], 'follows', ARGV[4]) end
if ARGV[6] ~= '' then
  local through = now - tonumber(ARGV[6])
  if ARGV[10] ~= '' then through = math.min(through, tonumber(ARGV[10])) end
  redis.call('HSET', KEYS[2], 'through', string.format('%.0f', through))
end
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[2], 'kept', ARGV[7])
  if ARGV[8] == '' then redis.call('HDEL', KEYS[2], 'trouble') else redis.call('HSET', KEYS[2], 'trouble', ARGV[8]) end
end
if redis.call('HDEL', KEYS[2], 'removed') == 1 then redis.call('PERSIST', KEYS[2]) end
return {'written', string.format('%.0f', now)}";

/// Up to where all that a database committed was said in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The place in its log.
    pub lsn: Lsn,
    /// Whose log it is: the cluster, its timeline, and the database.
    source: String,
}

impl Position {
    /// A place in the log of this server.
    pub fn new(lsn: Lsn, identity: &Identity) -> Self {
        Self { lsn, source: format!("{}/{}", identity.system, identity.database) }
    }

    /// The same source's.
    pub fn at(&self, lsn: Lsn) -> Self {
        Self { lsn, source: self.source.clone() }
    }

    /// Whether both are places in one log.
    pub fn is_of(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.lsn, self.source)
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (lsn, source) = text.split_once(' ').ok_or(())?;
        Ok(Self { lsn: lsn.parse().map_err(|_| ())?, source: source.to_owned() })
    }
}

/// How a feed is at the moment of writing, for who asks the cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condition {
    /// How old the oldest change may be that is not said. `None`: that is not known yet.
    pub behind: Option<Duration>,
    /// The same as a moment by the cache's clock, in milliseconds since 1970, where that is known: see [`Clock`](super::clock::Clock).
    pub through: Option<u64>,
    /// How many bytes of its log the database keeps.
    pub kept: u64,
    /// What is wrong with a table that is followed; empty where nothing is.
    pub trouble: String,
}

/// What is noted with the first position of a reading.
#[derive(Debug, Clone, Copy)]
pub struct Beginning<'b> {
    /// For whom it is from then on.
    pub followers: &'b Followers,
    /// Whether changes may have been lost: then no sidecar shows what was cached before the entries, see [`LAPSE_FIELD`].
    pub is_lapse: bool,
}

/// Who followed which tables when the position was written: by rule, a digest of what it follows.
pub type Followers = BTreeMap<String, String>;

/// What the cache knows of a feed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    /// Up to where its events were written. `None`: nothing is known.
    pub position: Option<Position>,
    /// For whom.
    pub followers: Followers,
    /// Who has made the slot, or was about to. `None`: that was not noted, as no relay of an earlier build did.
    pub made_by: Option<SlotOwner>,
    /// Whether the slot was taken away, and nobody has begun to read one since.
    pub removed: bool,
}

impl Kept {
    /// Whether events were ever written.
    pub fn has_followed(&self) -> bool {
        self.position.is_some() || !self.followers.is_empty()
    }

    /// Whose the slot is, where that is known. One by which events were written that is not noted as somebody else's is Larder's.
    pub fn slot_owner(&self) -> Option<SlotOwner> {
        self.made_by.or_else(|| self.has_followed().then_some(SlotOwner::Larder))
    }
}

/// What came of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimed {
    /// The feed is the caller's, under this fence.
    Yes(u64),
    /// It is another's.
    Held,
}

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Everything is in the stream.
    Yes {
        /// When, by the server's clock, in milliseconds since 1970.
        at: u64,
    },
    /// Another relay has claimed the feed since: nothing was written.
    Fenced,
    /// The cache has lost what was written before: nothing was written.
    Lost,
}

/// The keys of a feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Register {
    claim: Vec<u8>,
    state: Vec<u8>,
}

impl Register {
    /// Those of the feed that reads this slot.
    pub fn new(slot: &str) -> Self {
        Self { claim: feed_claim_key(slot).into_bytes(), state: feed_state_key(slot).into_bytes() }
    }

    /// The slot of the cache in which they lie.
    pub fn slot(&self) -> u16 {
        slot_of(STREAM.as_bytes())
    }

    /// Claims the feed, or renews one's claim, under `token`, which nobody else has, for so many milliseconds.
    pub fn claim(&self, token: &str, millis: u64) -> Call {
        let args = vec![token.as_bytes().to_vec(), millis.to_string().into_bytes()];
        Call::new(CLAIM, vec![self.claim.clone(), self.state.clone()], args)
    }

    /// Gives a claim back.
    pub fn release(&self, token: &str) -> Call {
        Call::new(RELEASE, vec![self.claim.clone()], vec![token.as_bytes().to_vec()])
    }

    /// Notes whose the slot is that is about to be read, where the feed is still that of `token`. Larder's is made behind that.
    pub fn owned(&self, token: &str, owner: SlotOwner) -> Call {
        let owner = match owner {
            SlotOwner::Larder => MADE_BY_LARDER,
            SlotOwner::Other => MADE_BY_OTHER,
        };
        Call::new(OWNED, vec![self.claim.clone(), self.state.clone()], vec![token.as_bytes().to_vec(), owner.to_vec()])
    }

    /// Notes that nothing is left at the database that is Larder's, where the feed is still that of `token`, or nobody's without one. What is left of
    /// it goes after [`LEFT_FOR`].
    pub fn removed(&self, token: Option<&str>) -> Call {
        let args = vec![token.unwrap_or_default().as_bytes().to_vec(), LEFT_FOR.as_millis().to_string().into_bytes()];
        Call::new(REMOVED, vec![self.claim.clone(), self.state.clone()], args)
    }

    /// Notes what is wrong, where the feed is still that of `token`: the next that is written says otherwise.
    pub fn trouble(&self, token: &str, trouble: &str) -> Call {
        let args = vec![token.as_bytes().to_vec(), begin(trouble).into_bytes()];
        Call::new(TROUBLE, vec![self.claim.clone(), self.state.clone()], args)
    }

    /// Asks what is known.
    pub fn look(&self) -> Call {
        Call::new(LOOK, vec![self.state.clone()], Vec::new())
    }

    /// Writes entries, and moves the position from `left`, whatever it is where that is `None`, to `next`; with `beginning`, notes that.
    /// Several scripts where there is much: the position moves with the last.
    pub fn write(
        &self,
        fence: u64,
        left: Option<&Position>,
        next: &Position,
        beginning: Option<Beginning<'_>>,
        condition: &Condition,
        entries: Vec<Entry>,
    ) -> Vec<Call> {
        let mut parts = parts_of(entries);
        let last = parts.pop().unwrap_or_default();
        // Where it is not known what was left, nothing is until the last.
        let left = left.map_or_else(Vec::new, |position| position.to_string().into_bytes());
        let nothing = [const { Vec::new() }; 6];
        let mut calls: Vec<Call> = parts.into_iter().map(|part| self.write_once(fence, (&left, &left), &nothing, part)).collect();
        let Condition { behind, through, kept, trouble } = condition;
        let followers = beginning.and_then(|beginning| serde_json::to_vec(beginning.followers).ok()).unwrap_or_default();
        let lapse = if beginning.is_some_and(|beginning| beginning.is_lapse) { LAPSE_FIELD } else { "" };
        let behind = behind.map_or_else(Vec::new, |behind| behind.as_millis().to_string().into_bytes());
        let through = through.map_or_else(Vec::new, |through| through.to_string().into_bytes());
        let kept = kept.to_string().into_bytes();
        let said = [followers, behind, kept, begin(trouble).into_bytes(), lapse.as_bytes().to_vec(), through];
        calls.push(self.write_once(fence, (&left, next.to_string().as_bytes()), &said, last));
        calls
    }

    /// From one position to another. `said`: the followers, the condition, and what notes a lapse.
    fn write_once(&self, fence: u64, (left, next): (&[u8], &[u8]), said: &[Vec<u8>; 6], entries: Vec<Entry>) -> Call {
        let [followers, behind, kept, trouble, lapse, through] = said.clone();
        let (fence, most) = (fence.to_string().into_bytes(), MOST_KEPT.as_bytes().to_vec());
        let mut args = vec![fence, left.to_vec(), next.to_vec(), followers, most, behind, kept, trouble, lapse, through];
        for entry in entries {
            args.push((entry.len() * 2).to_string().into_bytes());
            args.extend(entry.into_iter().flat_map(|(kind, what)| [kind.to_vec(), what]));
        }
        Call::new(WRITE, vec![STREAM.as_bytes().to_vec(), self.state.clone()], args)
    }
}

/// Entries in portions for one script each.
fn parts_of(entries: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut parts: Vec<Vec<Entry>> = Vec::new();
    let mut bytes = 0;
    for entry in entries {
        let size: usize = entry.iter().map(|(_, what)| what.len()).sum();
        match parts.last_mut().filter(|part| part.len() < MOST_ENTRIES && bytes + size <= MOST_BYTES) {
            Some(part) => {
                bytes += size;
                part.push(entry);
            }
            None => {
                bytes = size;
                parts.push(vec![entry]);
            }
        }
    }
    parts
}

/// Reads CLAIM's answer.
///
/// # Errors
/// It is none.
pub fn claimed(answer: &[&[u8]]) -> Result<Claimed, AnswerError> {
    match answer {
        [b"claimed", fence] => {
            let fence = std::str::from_utf8(fence).ok().and_then(|digits| digits.parse().ok());
            fence.map(Claimed::Yes).ok_or(AnswerError)
        }
        [b"held", _] => Ok(Claimed::Held),
        _ => Err(AnswerError),
    }
}

/// Reads LOOK's answer. What cannot be read was written by another build: it counts as nothing.
///
/// # Errors
/// It is none.
pub fn looked(answer: &[&[u8]]) -> Result<Kept, AnswerError> {
    let [b"state", position, followers, made, removed] = answer else { return Err(AnswerError) };
    let position = std::str::from_utf8(position).ok().and_then(|text| text.parse().ok());
    let made_by = match *made {
        MADE_BY_LARDER => Some(SlotOwner::Larder),
        MADE_BY_OTHER => Some(SlotOwner::Other),
        _ => None,
    };
    let followers = serde_json::from_slice(followers).unwrap_or_default();
    Ok(Kept { position, followers, made_by, removed: !removed.is_empty() })
}

/// Reads the answer of OWNED, REMOVED and TROUBLE: whether it is noted.
///
/// # Errors
/// It is none.
pub fn noted(answer: &[&[u8]]) -> Result<bool, AnswerError> {
    match answer {
        [b"noted"] => Ok(true),
        [b"held"] => Ok(false),
        _ => Err(AnswerError),
    }
}

/// Reads WRITE's answer.
///
/// # Errors
/// It is none.
pub fn written(answer: &[&[u8]]) -> Result<Written, AnswerError> {
    match answer {
        [b"written", at] => {
            let at = std::str::from_utf8(at).ok().and_then(|digits| digits.parse().ok());
            at.map(|at| Written::Yes { at }).ok_or(AnswerError)
        }
        [b"fenced"] => Ok(Written::Fenced),
        [b"lost"] => Ok(Written::Lost),
        _ => Err(AnswerError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::feed::MOST_TROUBLE_CHARS;

    /// Behind `EVAL`, the script and its two keys.
    fn args(call: &Call) -> Vec<Vec<u8>> {
        call.command().split_off(5)
    }

    fn position(lsn: u64) -> Position {
        Position { lsn: Lsn::new(lsn), source: "7/1/shop".to_owned() }
    }

    #[test]
    fn positions_are_read_back() {
        assert_eq!(position(0x1_0000_00ff).to_string(), "1/FF 7/1/shop");
        assert_eq!("1/FF 7/1/shop".parse(), Ok(position(0x1_0000_00ff)));
        assert!(position(1).is_of(&position(2)));
        let kept = looked(&[b"state", b"1/FF 7/1/shop", br#"{"user":"ab"}"#, b"", b""]).expect("an answer");
        assert_eq!(kept.slot_owner(), Some(SlotOwner::Larder), "an earlier build noted nothing, and made it");
        assert_eq!((kept.position, kept.followers.get("user").map(String::as_str)), (Some(position(0x1_0000_00ff)), Some("ab")));
        assert_eq!(looked(&[b"state", b"", b"", b"", b""]), Ok(Kept::default()));
        assert_eq!(Kept::default().slot_owner(), None);
        let made = looked(&[b"state", b"", b"", b"1", b"1"]).expect("an answer");
        assert!(made.slot_owner() == Some(SlotOwner::Larder) && made.removed && !made.has_followed());
        let theirs = looked(&[b"state", b"1/FF 7/1/shop", b"", b"0", b""]).expect("an answer");
        assert!(theirs.slot_owner() == Some(SlotOwner::Other) && !theirs.removed && theirs.has_followed());
        assert_eq!(looked(&[b"states", b"", b"", b"", b""]), Err(AnswerError));
    }

    #[test]
    fn the_position_moves_with_the_last_of_several_scripts() {
        let register = Register::new("larder_main_db");
        let entries: Vec<Entry> = (0..MOST_ENTRIES * 2 + 1).map(|at| vec![(&b"key"[..], at.to_string().into_bytes())]).collect();
        let calls = register.write(3, Some(&position(1)), &position(2), None, &Condition::default(), entries);
        let moves: Vec<_> = calls.iter().map(|call| (args(call)[1].clone(), args(call)[2].clone())).collect();
        let (left, next) = (position(1).to_string().into_bytes(), position(2).to_string().into_bytes());
        assert_eq!(moves, [(left.clone(), left.clone()), (left.clone(), left.clone()), (left, next)]);
        let words: usize = calls.iter().map(|call| args(call).len() - 10).sum();
        assert_eq!(words, (MOST_ENTRIES * 2 + 1) * 3);
        // Nothing to be said moves it too, and from wherever it is.
        let trouble = "é".repeat(MOST_TROUBLE_CHARS + 1);
        let condition = Condition { behind: Some(Duration::from_millis(70)), through: Some(12), kept: 9, trouble };
        let beginning = Beginning { followers: &Followers::new(), is_lapse: true };
        let calls = register.write(3, None, &position(2), Some(beginning), &condition, Vec::new());
        let [only] = &calls[..] else { panic!("one") };
        assert_eq!((args(only)[1].as_slice(), args(only)[3].as_slice()), (&b""[..], &b"{}"[..]));
        assert_eq!((args(only)[5].as_slice(), args(only)[6].as_slice()), (&b"70"[..], &b"9"[..]));
        assert_eq!(args(only)[7].len(), MOST_TROUBLE_CHARS * 2);
        assert_eq!((args(only)[8].as_slice(), args(only)[9].as_slice()), (LAPSE_FIELD.as_bytes(), &b"12"[..]));
    }

    #[test]
    fn answers_are_read() {
        assert_eq!(claimed(&[b"claimed", b"17"]), Ok(Claimed::Yes(17)));
        assert_eq!(claimed(&[b"held", b"x"]), Ok(Claimed::Held));
        assert_eq!((written(&[b"fenced"]), written(&[b"lost"])), (Ok(Written::Fenced), Ok(Written::Lost)));
        assert_eq!(written(&[b"written", b"1700000000000"]), Ok(Written::Yes { at: 1_700_000_000_000 }));
        assert!(claimed(&[b"claimed", b"x"]).is_err() && written(&[]).is_err() && written(&[b"written", b"x"]).is_err());
        assert_eq!((noted(&[b"noted"]), noted(&[b"held"]), noted(&[])), (Ok(true), Ok(false), Err(AnswerError)));
    }
}
