//! The queue by which sidecars have a relay load for them, where they outnumber the connections that an origin may have.
//!
//! It lies beside the journal of its name, in one slot:
//!
//! | key | type | what it holds |
//! |---|---|---|
//! | `…/loads:queue` | list | the [requests](Request) that nobody has taken yet, the oldest first, each behind the moment at which it is given up |
//! | `…/loads:bell` | list | one element from a request on until a relay has looked: relays wait for it |
//! | `…/loads:relay` | string | which relay takes requests, with a time to live |
//! | `…/loads:a:TOKEN` | string | the answer to a request, with a time to live |
//!
//! All of them have a time to live. A request or an answer that is lost, by an eviction or a failover, leaves its sidecar without an answer, which
//! then tells its clients so.
//!
//! One relay at a time takes requests, which its claim names. Whoever has the lease of a key asks after it got it, so that what a relay
//! loads then is as new as a load of the sidecar's own, and stores it under that lease.

use super::place::Partition;
use super::scripts::{AnswerError, Call};
use crate::policy::JournalName;
use crate::policy::slots;

/// The most requests that wait in one queue. More are refused.
pub const MOST_REQUESTS: u64 = 1_000;
/// The largest request in bytes.
pub const MOST_REQUEST_BYTES: usize = 32 * 1024;
/// The largest answer in bytes: the cache keeps it for a moment.
pub const MOST_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// How long an answer waits for its sidecar, in milliseconds.
pub const ANSWER_LASTS_MS: u64 = 5_000;

/// KEYS: queue, bell, relay. ARGV: the most requests, how long each lasts in ms, then the requests. What has no room is left out.
const PUSH: &str = "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local first = redis.call('LINDEX', KEYS[1], 0)
while first and tonumber(string.match(first, '^%d+')) <= now do
  redis.call('LPOP', KEYS[1])
  first = redis.call('LINDEX', KEYS[1], 0)
end
local room = math.max(tonumber(ARGV[1]) - redis.call('LLEN', KEYS[1]), 0)
local count = math.min(room, #ARGV - 2)
local ends = string.format('%.0f', now + tonumber(ARGV[2]))
for i = 3, count + 2 do redis.call('RPUSH', KEYS[1], ends .. ' ' .. ARGV[i]) end
if count > 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  redis.call('DEL', KEYS[2])
  redis.call('RPUSH', KEYS[2], '1')
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
return {'pushed', tostring(count), tostring(redis.call('EXISTS', KEYS[3]))}";

/// KEYS: queue, bell, relay. ARGV: the relay's token, the most requests. What is given up already is dropped.
const TAKE: &str = "\
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return {'lost'} end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local answer = {'taken'}
redis.call('DEL', KEYS[2])
while #answer <= 2 * tonumber(ARGV[2]) do
  local first = redis.call('LPOP', KEYS[1])
  if not first then break end
  local ends = string.match(first, '^%d+')
  if tonumber(ends) > now then
    answer[#answer + 1] = string.format('%.0f', tonumber(ends) - now)
    answer[#answer + 1] = string.sub(first, #ends + 2)
  end
end
return answer";

/// KEYS: relay. ARGV: token, how long the claim lasts in ms.
const CLAIM: &str = "\
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {'held'} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {'claimed'}";

/// KEYS: relay. ARGV: token.
const LEAVE: &str = "\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return {'left'}";

/// Keys that one sidecar asks for together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// By what its answer is found: letters and digits, drawn by chance.
    pub token: String,
    /// The keys, as the origin's rules call them.
    pub keys: Vec<Vec<u8>>,
}

impl Request {
    /// The form in the queue: the token, then each key behind its length.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = format!("{} ", self.token).into_bytes();
        for key in &self.keys {
            out.extend_from_slice(format!("{}:", key.len()).as_bytes());
            out.extend_from_slice(key);
        }
        out
    }

    /// Reads that form. `None`: it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let at = memchr::memchr(b' ', bytes)?;
        let token = std::str::from_utf8(&bytes[..at]).ok()?;
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return None;
        }
        let (mut rest, mut keys) = (&bytes[at + 1..], Vec::new());
        while !rest.is_empty() {
            let colon = memchr::memchr(b':', rest)?;
            let length: usize = std::str::from_utf8(&rest[..colon]).ok()?.parse().ok()?;
            let (key, behind) = rest[colon + 1..].split_at_checked(length)?;
            keys.push(key.to_vec());
            rest = behind;
        }
        Some(Self { token: token.to_owned(), keys })
    }

    /// How many bytes a key takes in a request, at most.
    pub fn weight(key: &[u8]) -> usize {
        key.len() + 21
    }
}

/// What became of requests that were pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// So many of them wait, the first ones; the others had no room.
    pub count: usize,
    /// Whether a relay takes requests now.
    pub is_tended: bool,
}

/// What came of a look for requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// These, each with how many milliseconds are left for it.
    Requests(Vec<(u64, Vec<u8>)>),
    /// Another relay takes them, or none.
    Lost,
}

/// Where a queue lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadQueue {
    slot: u16,
    base: Vec<u8>,
}

impl LoadQueue {
    /// The one of this name.
    pub fn new(name: &JournalName) -> Self {
        let slot = Partition::new(name, 0).slot();
        let base = format!("larder:j:{{{}}}{name}/loads", String::from_utf8_lossy(&slots::tag_of(slot))).into_bytes();
        Self { slot, base }
    }

    /// The slot in which all its keys lie.
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// The bell.
    pub fn bell(&self) -> Vec<u8> {
        self.key(":bell")
    }

    /// Where the answer to a request is.
    pub fn answer(&self, token: &str) -> Vec<u8> {
        self.key(&format!(":a:{token}"))
    }

    /// Which relay takes requests.
    pub fn relay(&self) -> Vec<u8> {
        self.key(":relay")
    }

    fn key(&self, part: &str) -> Vec<u8> {
        [&self.base, part.as_bytes()].concat()
    }

    fn keys(&self) -> Vec<Vec<u8>> {
        vec![self.key(":queue"), self.bell(), self.relay()]
    }

    /// Adds requests, each for `lasts_ms`.
    pub fn push(&self, lasts_ms: u64, requests: &[Request]) -> Call {
        let bounds = [MOST_REQUESTS, lasts_ms.max(1)].map(decimal);
        Call::new(PUSH, self.keys(), bounds.into_iter().chain(requests.iter().map(Request::to_bytes)).collect())
    }

    /// Takes at most so many requests, for the relay of this token.
    pub fn take(&self, token: &str, most: usize) -> Call {
        Call::new(TAKE, self.keys(), vec![token.as_bytes().to_vec(), decimal(most as u64)])
    }

    /// Claims the queue for so long, or renews the claim.
    pub fn claim(&self, token: &str, lasts_ms: u64) -> Call {
        Call::new(CLAIM, vec![self.relay()], vec![token.as_bytes().to_vec(), decimal(lasts_ms.max(1))])
    }

    /// Gives up the claim.
    pub fn leave(&self, token: &str) -> Call {
        Call::new(LEAVE, vec![self.relay()], vec![token.as_bytes().to_vec()])
    }
}

fn decimal(number: u64) -> Vec<u8> {
    number.to_string().into_bytes()
}

/// Reads what [`LoadQueue::push`] answers.
///
/// # Errors
/// It is none of its answers.
pub fn pushed(answer: &[&[u8]]) -> Result<Pushed, AnswerError> {
    let [b"pushed", count, tended] = answer else { return Err(AnswerError) };
    let count = number(count).and_then(|count| usize::try_from(count).ok()).ok_or(AnswerError)?;
    Ok(Pushed { count, is_tended: *tended == b"1" })
}

/// Reads what [`LoadQueue::take`] answers.
///
/// # Errors
/// It is none of its answers.
pub fn taken(answer: &[&[u8]]) -> Result<Taken, AnswerError> {
    match answer {
        [b"lost"] => Ok(Taken::Lost),
        [b"taken", rest @ ..] => {
            let (pairs, rest) = rest.as_chunks::<2>();
            let read = |[left, request]: &[&[u8]; 2]| Some((number(left)?, request.to_vec()));
            let requests: Option<Vec<_>> = pairs.iter().map(read).collect();
            requests.filter(|_| rest.is_empty()).map(Taken::Requests).ok_or(AnswerError)
        }
        _ => Err(AnswerError),
    }
}

/// Reads what [`LoadQueue::claim`] answers: whether it is ours.
///
/// # Errors
/// It is none of its answers.
pub fn claimed(answer: &[&[u8]]) -> Result<bool, AnswerError> {
    match answer {
        [b"claimed"] => Ok(true),
        [b"held"] => Ok(false),
        _ => Err(AnswerError),
    }
}

/// Reads what [`LoadQueue::leave`] answers.
///
/// # Errors
/// It is none of its answers.
pub fn left(answer: &[&[u8]]) -> Result<(), AnswerError> {
    if let [b"left"] = answer { Ok(()) } else { Err(AnswerError) }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn its_keys_lie_in_one_slot_beside_the_journal() {
        let name: JournalName = "store.shop.db".parse().expect("a name");
        let queue = LoadQueue::new(&name);
        for key in queue.keys().into_iter().chain([queue.answer("a1")]) {
            let text = String::from_utf8(key.clone()).expect("a text");
            assert_eq!(slots::slot_of(&key), queue.slot(), "{text}");
            assert!(slots::is_larder_key(&key) && slots::Companion::parse(&key).is_none(), "{text}");
            assert!(text.starts_with("larder:j:{") && text[13..].starts_with("}store.shop.db/loads:"), "{text}");
        }
    }

    #[test]
    fn answers_are_read() {
        assert_eq!(pushed(&[b"pushed", b"3", b"0"]), Ok(Pushed { count: 3, is_tended: false }));
        assert_eq!(taken(&[b"lost"]), Ok(Taken::Lost));
        assert_eq!(taken(&[b"taken", b"70", b"a x"]), Ok(Taken::Requests(vec![(70, b"a x".to_vec())])));
        assert!(taken(&[b"taken", b"70"]).is_err() && pushed(&[b"pushed"]).is_err());
        assert_eq!((claimed(&[b"claimed"]), claimed(&[b"held"]), left(&[b"left"])), (Ok(true), Ok(false), Ok(())));
    }

    proptest! {
        #[test]
        fn a_request_is_read_as_it_was_written(keys in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..5)) {
            let request = Request { token: "0af".to_owned(), keys };
            let bytes = request.to_bytes();
            let most = request.keys.iter().map(|key| Request::weight(key)).sum::<usize>() + 4;
            prop_assert!(bytes.len() <= most);
            prop_assert_eq!(Request::parse(&bytes), Some(request));
        }

        #[test]
        fn nothing_else_is_a_request_that_breaks(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Request::parse(&bytes);
        }
    }
}
