//! Which tags were invalidated since a load began: the cache keeps a log of the latest, for each pattern whose keys may be given tags.
//!
//! A load that began before a tag was invalidated is not stored with it, though nobody knew its tags as it began: it notes how many invalidations
//! the log had seen by then. Where that cannot be told any more (the log is lost, has been cut, or is at another server's process) nothing is
//! stored. There are no clocks in it.

use std::fmt;
use std::rc::Rc;

use crate::policy::KeyPattern;
use crate::policy::versions::Counter;
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::worker::Worker;

/// How many tags a log has: a load may be stored where no more than so many others were invalidated meanwhile.
const MOST_TAGS: &str = "4096";
/// For how many seconds a log is kept that nobody uses.
const LASTS: &str = "86400";
/// The digits of an era, and of a process.
const DIGITS: [usize; 2] = [16, 8];

macro_rules! common {
    () => {
        "\
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x%x%x%x%x%x%x%x)') or '00000000'
local function digest(tag) return ':' .. string.sub(redis.sha1hex(tag), 1, 24) end
local function head()
  local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  if last[1] and string.sub(last[1], 1, 1) == '@' then return string.sub(last[1], 2), tonumber(last[2]) end
end
"
    };
}

macro_rules! begun {
    () => {
        "\
local era, count = head()
if not era then
  redis.call('UNLINK', KEYS[1])
  era, count = ARGV[1], 0
  redis.call('ZADD', KEYS[1], 0, '@' .. era)
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
"
    };
}

/// ARGV: an era by chance, the log's life in seconds. The log is a sorted set: each tag by the number of its last invalidation, and the era, which
/// a log that is lost does not share with the next, by that of the last of all. The answer is a [`Moment`]'s text.
const LOOK: &str = concat!(common!(), begun!(), "return string.format('%.0f-%s-%s', count, era, run)");

/// ARGV: as [`LOOK`]'s, how many tags are kept, and a tag that is invalidated.
const NOTE: &str = concat!(
    common!(),
    begun!(),
    "\
redis.call('ZADD', KEYS[1], count + 1, '@' .. era, count + 1, digest(ARGV[4]))
local over = redis.call('ZCARD', KEYS[1]) - 1 - tonumber(ARGV[3])
if over > 0 then redis.call('ZREMRANGEBYRANK', KEYS[1], 0, over - 1) end
return 1"
);

/// ARGV: the three parts of a [`Moment`], how many tags are kept, and tags. The answer is 1 if none of them was invalidated since.
const SINCE: &str = concat!(
    common!(),
    "\
local era, count = head()
local since = tonumber(ARGV[1])
if era ~= ARGV[2] or run ~= ARGV[3] or count < since then return 0 end
if redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[4]) then
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  if tonumber(first[2]) > since + 1 then return 0 end
end
for i = 5, #ARGV do
  local at = redis.call('ZSCORE', KEYS[1], digest(ARGV[i]))
  if at and tonumber(at) > since then return 0 end
end
return 1"
);

/// How far the log of a pattern's tags was when a load began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    count: u64,
    era: String,
    run: String,
}

impl Moment {
    /// Reads its text. `None`: it is none.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (count, rest) = text.split_once('-')?;
        let (era, run) = rest.split_once('-')?;
        let is_hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_whole = is_hex(era, DIGITS[0]) && is_hex(run, DIGITS[1]);
        Some(Self { count: count.parse().ok()?, era: era.to_owned(), run: run.to_owned() }).filter(|_| is_whole)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.count, self.era, self.run)
    }
}

/// How far the log is now.
///
/// # Errors
/// The text of an error reply.
pub async fn look(worker: &Rc<Worker>, keys: &KeyPattern) -> Result<Moment, String> {
    let era = era();
    let answer = run(worker, LOOK, keys, &[era.as_bytes(), LASTS.as_bytes()]).await?;
    reply::text(&answer).and_then(Moment::parse).ok_or_else(|| "ERR the log of invalidated tags cannot be read".to_owned())
}

/// Notes that a tag is invalidated, before its version is drawn anew.
///
/// # Errors
/// The text of an error reply. It may be repeated.
pub async fn note(worker: &Rc<Worker>, keys: &KeyPattern, tag: &[u8]) -> Result<(), String> {
    let era = era();
    run(worker, NOTE, keys, &[era.as_bytes(), LASTS.as_bytes(), MOST_TAGS.as_bytes(), tag]).await.map(drop)
}

/// Whether none of `tags` was invalidated since a moment, as far as that can be told.
///
/// # Errors
/// The text of an error reply.
pub async fn is_unchanged(worker: &Rc<Worker>, keys: &KeyPattern, moment: &Moment, tags: &[Vec<u8>]) -> Result<bool, String> {
    let count = moment.count.to_string();
    let mut args: Vec<&[u8]> = vec![count.as_bytes(), moment.era.as_bytes(), moment.run.as_bytes(), MOST_TAGS.as_bytes()];
    args.extend(tags.iter().map(Vec::as_slice));
    let answer = run(worker, SINCE, keys, &args).await?;
    Ok(reply::integer(&answer) == Some(1))
}

/// The slot of a pattern's log.
pub fn slot_of(worker: &Worker, keys: &KeyPattern) -> u16 {
    invalidation_slot(worker, &Counter::log_of(keys))
}

async fn run(worker: &Rc<Worker>, script: &str, keys: &KeyPattern, args: &[&[u8]]) -> Result<Vec<u8>, String> {
    let name = Counter::log_of(keys);
    let mut command: Vec<&[u8]> = vec![b"EVAL", script.as_bytes(), b"1", &name];
    command.extend(args);
    ask(worker, invalidation_slot(worker, &name), Lane::default(), &command).await
}

fn era() -> String {
    format!("{:016x}", fastrand::u64(..))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_moment_is_read_as_it_is_written(count in any::<u64>(), era in "[0-9a-f]{16}", run in "[0-9a-f]{8}", other in "\\PC{0,40}") {
            let moment = Moment { count, era, run };
            prop_assert_eq!(Moment::parse(moment.to_string().as_bytes()), Some(moment));
            let _ = Moment::parse(other.as_bytes());
        }
    }
}
