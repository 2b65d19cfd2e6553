//! What cache-aside asks of the cache: three scripts over a key and its companions, which share its slot.
//!
//! The lease is a string of seven words: the generation (random digits, `@`, the first digits of the server's run id), the
//! sequence (rises with each taker), until when it is held (milliseconds of the server's clock, 0: by nobody), how many took it
//! since the last fill, its state, the nonce of the last taker, and whether another worker waits for it. Every covered write,
//! deletion and invalidation removes it in its own transaction: a lease that still has generation G proves that nothing was
//! written or invalidated since G began. So any fill under G is as good as any other, and every other fill is refused; a lease
//! that was evicted or lost refuses all.
//!
//! States: `l` leased (or given back), `s` shared (nobody fills this key: everyone may load), `f` filled (kept only so that
//! others who were told of the miss under the same generation may fill too).
//!
//! The run id ends every lease at a failover or a restart. A user that may not ask INFO has zeros there, and loses only that.

use std::fmt;

use crate::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, encode, reply};
use crate::sidecar::slots::{Companion, is_larder_key};

/// A key with this many takers since its last fill is hit-for-miss.
pub const MOST_LEADS: u32 = 3;
/// For how long it is, in milliseconds.
pub const SHARED_MS: u64 = 30_000;
/// For how many further leases a lease is remembered after its end.
pub const MEMORY_LEASES: u64 = 9;

macro_rules! common {
    () => {
        "\
local function read_lease()
  local text = redis.call('GET', KEYS[2])
  if not text then return nil end
  local generation, sequence, held, leads, state, nonce, awaited =
    string.match(text, '^(%x+@%x+) (%d+) (%d+) (%d+) (%a) (%x+) (%d)$')
  if not generation then return nil end
  return {generation = generation, sequence = tonumber(sequence), held = tonumber(held), leads = tonumber(leads),
    state = state, nonce = nonce, awaited = awaited}
end
local function write_lease(lease, ttl)
  local text = string.format('%s %.0f %.0f %.0f %s %s %s', lease.generation, lease.sequence, lease.held, lease.leads,
    lease.state, lease.nonce, lease.awaited)
  if ttl then redis.call('SET', KEYS[2], text, 'PX', ttl) else redis.call('SET', KEYS[2], text, 'KEEPTTL') end
end
local function announce() redis.pcall('SPUBLISH', KEYS[2], '') end
"
    };
}

macro_rules! run_id {
    () => {
        "\
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x%x%x%x%x%x%x%x)') or '00000000'
"
    };
}

/// ARGV: nonce, lease in ms, mode (`miss` or `early`), whether stale copies are served (`1`). A taker's own lease counts as
/// granted, so that the script may be repeated. What is no string is not missing either.
const BEGIN: &str = concat!(
    common!(),
    "\
local miss = ARGV[3] == 'miss'
if miss then
  local value = redis.pcall('GET', KEYS[1])
  if type(value) == 'table' then
    if string.find(value.err, 'WRONGTYPE', 1, true) then return {'other'} end
    return value
  end
  if value then return {'value', value} end
end
",
    run_id!(),
    "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local stale = miss and ARGV[4] == '1' and redis.call('GET', KEYS[3])
local lease = read_lease()
if lease and (lease.state == 'f' or string.sub(lease.generation, -8) ~= run) then lease = nil end
if lease and now < lease.held then
  local left = lease.held - now
  if lease.state == 's' then return {miss and 'shared' or 'busy', lease.generation, lease.sequence, left, stale} end
  if lease.nonce == ARGV[1] then return {'leased', lease.generation, lease.sequence, left, stale} end
  if miss and lease.awaited == '0' then lease.awaited = '1'; write_lease(lease) end
  return {'busy', lease.generation, lease.sequence, left, stale}
end
local length = tonumber(ARGV[2])
local memory = length * 9
if not lease then
  lease = {generation = ARGV[1] .. '@' .. run, sequence = 0, leads = 0, awaited = '0'}
elseif lease.state == 's' then
  lease.leads = 0
end
lease.sequence = lease.sequence + 1
lease.nonce = ARGV[1]
if miss and not stale and lease.leads >= 3 then
  lease.state, lease.held = 's', now + 30000
  write_lease(lease, 30000 + memory)
  if lease.awaited == '1' then announce() end
  return {'shared', lease.generation, lease.sequence, 30000, stale}
end
lease.state, lease.held, lease.leads = 'l', now + length, lease.leads + 1
write_lease(lease, length + memory)
return {'leased', lease.generation, lease.sequence, length, stale}"
);

/// ARGV: generation (or `-`: none), sequence, whether the lease stays for others of its generation (`1`), lifetime of the stale
/// copy in ms or 0, the value, how many commands follow, and each with the number of its arguments before it. The first is the
/// client's, whose reply is given; the others see to its TTL. Under another generation than the lease's, what was written is
/// deleted at once: a miss, never a wrong value. Of a refused write (NX, XX, an error) nothing is done.
const FILL: &str = concat!(
    common!(),
    run_id!(),
    "\
local at = 7
local function run_next()
  local count = tonumber(ARGV[at])
  local reply = redis.pcall(unpack(ARGV, at + 1, at + count))
  at = at + 1 + count
  return reply
end
local lease = read_lease()
local valid = lease and lease.generation == ARGV[1] and string.sub(lease.generation, -8) == run
local reply = run_next()
if type(reply) == 'table' and reply.err then return reply end
for _ = 2, tonumber(ARGV[6]) do run_next() end
local now = redis.pcall('GET', KEYS[1])
local stored = now == ARGV[5]
if not stored and (now or not reply) then return {reply, 'refused'} end
if lease and lease.awaited == '1' then announce() end
if not valid or not stored then
  redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  return {reply, valid and 'deleted' or 'ambiguous'}
end
if lease.state == 'l' and lease.held > 0 and lease.sequence ~= tonumber(ARGV[2]) then
  lease.leads, lease.awaited = 1, '0'
  write_lease(lease)
elseif ARGV[3] == '1' or lease.awaited == '1' or lease.state ~= 'l' then
  lease.state, lease.held, lease.leads, lease.awaited = 'f', 0, 0, '0'
  write_lease(lease)
else
  redis.call('UNLINK', KEYS[2])
end
redis.call('UNLINK', KEYS[4])
if ARGV[4] ~= '0' then redis.call('SET', KEYS[3], ARGV[5], 'PX', ARGV[4]) else redis.call('UNLINK', KEYS[3]) end
return {reply, 'stored'}"
);

/// ARGV: generation, sequence. Gives the holder's own lease back, for the next to take.
const RELEASE: &str = concat!(
    common!(),
    "\
local lease = read_lease()
if not lease or lease.state ~= 'l' or lease.held == 0 or lease.generation ~= ARGV[1]
  or lease.sequence ~= tonumber(ARGV[2]) then return 0 end
local awaited = lease.awaited == '1'
lease.held, lease.awaited = 0, '0'
write_lease(lease)
if awaited then announce() end
return 1"
);

/// Under which nobody has written a key since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation {
    /// Chance.
    pub random: u64,
    /// The first digits of the server's run id.
    pub run: u32,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}@{:08x}", self.random, self.run)
    }
}

impl Generation {
    fn parse(text: &[u8]) -> Option<Self> {
        let (random, run) = std::str::from_utf8(text).ok()?.split_once('@')?;
        Some(Self { random: u64::from_str_radix(random, 16).ok()?, run: u32::from_str_radix(run, 16).ok()? })
    }
}

/// A key and what may stand beside it, by their names.
#[derive(Debug, Clone)]
pub struct Names([Vec<u8>; 4]);

impl Names {
    /// Those of `key`.
    pub fn of(key: &[u8]) -> Self {
        Self([key.to_vec(), Companion::Lease.name(key), Companion::Stale.name(key), Companion::Negative.name(key)])
    }

    /// The key's own.
    pub fn key(&self) -> &[u8] {
        &self.0[0]
    }

    /// The lease's, which is also the channel on which its end is announced.
    pub fn lease(&self) -> &[u8] {
        &self.0[1]
    }

    /// Appends the head of a script with `args` arguments.
    fn write_head(&self, script: &str, args: usize, out: &mut Vec<u8>) {
        encode::array(out, 3 + self.0.len() + args);
        encode::bulk(out, b"EVAL");
        encode::bulk(out, script.as_bytes());
        encode::bulk(out, b"4");
        self.0.iter().for_each(|name| encode::bulk(out, name));
    }
}

/// Why a lease is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The key was missing. `stale`: whether copies past their TTL are served.
    Miss {
        /// Whether they are.
        stale: bool,
    },
    /// The key will expire soon.
    Early,
}

/// Appends what asks for the lease. `nonce` names this question; a repeated one is granted again.
pub fn begin(names: &Names, nonce: u64, lease_ms: u64, mode: Mode, out: &mut Vec<u8>) {
    let (word, stale): (&[u8], &[u8]) = match mode {
        Mode::Miss { stale: true } => (b"miss", b"1"),
        Mode::Miss { stale: false } => (b"miss", b"0"),
        Mode::Early => (b"early", b"0"),
    };
    names.write_head(BEGIN, 4, out);
    encode::bulk(out, format!("{nonce:016x}").as_bytes());
    bulk_number(lease_ms, out);
    encode::bulk(out, word);
    encode::bulk(out, stale);
}

/// What the cache knows of a key. Values are whole RESP elements, as they are passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// It is there.
    Value(Vec<u8>),
    /// It is there, and no string.
    Other,
    /// The lease is ours.
    Leased(Lease),
    /// Everybody may load.
    Shared(Lease),
    /// Somebody else holds it.
    Busy(Lease),
}

/// A key's lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Since when nobody has written the key.
    pub generation: Generation,
    /// Which taker holds it.
    pub sequence: u32,
    /// For how long it is held, in milliseconds.
    pub left_ms: u64,
    /// The copy past its TTL, where there is one that may be served: a whole RESP element.
    pub stale: Option<Vec<u8>>,
}

impl Begun {
    /// Reads BEGIN's answer.
    ///
    /// # Errors
    /// The text of an error reply, its code first.
    pub fn parse(answer: &[u8]) -> Result<Self, String> {
        let parts = reply::elements(answer).unwrap_or_default();
        let word = parts.first().and_then(|part| reply::text(part)).unwrap_or_default();
        match (word, parts.as_slice()) {
            (b"value", [_, value]) => Some(Self::Value(value.to_vec())),
            (b"other", _) => Some(Self::Other),
            (b"leased", _) => lease(&parts).map(Self::Leased),
            (b"shared", _) => lease(&parts).map(Self::Shared),
            (b"busy", _) => lease(&parts).map(Self::Busy),
            _ => None,
        }
        .ok_or_else(|| unexpected(answer))
    }
}

fn lease(parts: &[&[u8]]) -> Option<Lease> {
    let [_, generation, sequence, left, stale] = parts else { return None };
    Some(Lease {
        generation: Generation::parse(reply::text(generation)?)?,
        sequence: u32::try_from(reply::integer(sequence)?).ok()?,
        left_ms: u64::try_from(reply::integer(left)?).ok()?,
        stale: (!reply::is_null(stale)).then(|| stale.to_vec()),
    })
}

/// What a fill is made under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Under {
    /// The generation; `None` is never valid.
    pub generation: Option<Generation>,
    /// The holder's sequence; 0 where the filler is not the holder.
    pub sequence: u32,
    /// Whether others were told of the miss under the same generation and may fill too.
    pub keep: bool,
    /// How long the stale copy lives, in milliseconds. 0: there is none.
    pub stale_ms: u64,
}

/// Appends a fill. `queued` holds the client's command, whose value is the argument at `value_at`, and behind it those that see
/// to its TTL, as a plan has them. What they remove beside the key is left out: the script sees to it. `None`: that is no such
/// thing.
pub fn fill(names: &Names, under: &Under, value_at: usize, queued: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut tail = Vec::with_capacity(queued.len() + 64);
    let (mut count, mut commands, mut value) = (0usize, 0u64, None);
    let mut rest = queued;
    while !rest.is_empty() {
        let mut scanner = CommandScanner::default();
        let Ok(CommandScan::Complete { length }) = scanner.scan(rest) else { return None };
        let args = CommandArgs::new(rest, scanner.ranges());
        if commands == 0 {
            value = scanner.ranges().get(value_at).map(|range| &rest[range.start as usize..range.end as usize]);
        }
        if !args.get(1).is_some_and(is_larder_key) {
            bulk_number(args.len() as u64, &mut tail);
            args.iter().for_each(|arg| encode::bulk(&mut tail, arg));
            count += 1 + args.len();
            commands += 1;
        }
        rest = &rest[length..];
    }
    let value = value?;
    names.write_head(FILL, 6 + count, out);
    match under.generation {
        Some(generation) => encode::bulk(out, generation.to_string().as_bytes()),
        None => encode::bulk(out, b"-"),
    }
    bulk_number(u64::from(under.sequence), out);
    encode::bulk(out, if under.keep { b"1" } else { b"0" });
    bulk_number(under.stale_ms, out);
    encode::bulk(out, value);
    bulk_number(commands, out);
    out.extend_from_slice(&tail);
    Some(())
}

/// What became of a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// It is stored.
    Stored,
    /// The command wrote nothing: a condition did not hold.
    Refused,
    /// The command itself deleted the key: its moment lay in the past.
    Deleted,
    /// The generation did not hold: what was written is deleted.
    Ambiguous,
}

/// Reads FILL's answer: the reply to the client's own command, and what became of it. `None`: it is an error, which is the
/// client's.
pub fn filled(answer: &[u8]) -> Option<(&[u8], Filled)> {
    let parts = reply::elements(answer)?;
    let [own, outcome] = parts.as_slice() else { return None };
    let outcome = match reply::text(outcome)? {
        b"stored" => Filled::Stored,
        b"refused" => Filled::Refused,
        b"deleted" => Filled::Deleted,
        b"ambiguous" => Filled::Ambiguous,
        _ => return None,
    };
    Some((own, outcome))
}

/// Appends what gives a lease back.
pub fn release(names: &Names, generation: Generation, sequence: u32, out: &mut Vec<u8>) {
    names.write_head(RELEASE, 2, out);
    encode::bulk(out, generation.to_string().as_bytes());
    bulk_number(u64::from(sequence), out);
}

fn bulk_number(number: u64, out: &mut Vec<u8>) {
    encode::bulk(out, number.to_string().as_bytes());
}

/// The text of an error reply, its code first.
pub fn unexpected(answer: &[u8]) -> String {
    match answer.strip_prefix(b"-") {
        Some(error) => String::from_utf8_lossy(error).trim_end().to_owned(),
        None => "ERR the cache gave an unexpected answer to a script of Larder's".to_owned(),
    }
}
