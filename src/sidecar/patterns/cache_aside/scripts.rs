//! What cache-aside asks of the cache: three scripts over a key and its companions, which share its slot.
//!
//! The lease is a string of six words: the generation (random digits, `@`, the first digits of the server's run id), until when
//! it is held (milliseconds of the server's clock, 0: by nobody), how many took it since the last fill while the key was missing,
//! its state (`l` leased, `s` shared: nobody fills this key, so everybody may load), its last taker, and whether another worker waits
//! for it.
//! [`engine::lease`](crate::sidecar::engine::lease) says what a generation is good for.
//!
//! The run id ends every lease at a failover or a restart. A user that may not ask INFO has zeros there, and loses only that.

use std::rc::Rc;

use smallvec::SmallVec;

use crate::sidecar::engine::lease::{Begun, EARLY_SLACK_MS, Generation, Mode, Rule, Token, Verdict, Written};
use crate::sidecar::resp::{CommandScan, CommandScanner, encode, reply};
use crate::sidecar::slots::{Companion, is_larder_key};

macro_rules! common {
    () => {
        "\
local function read_lease(name)
  local text = redis.call('GET', name)
  if not text then return nil end
  local generation, held, leads, state, taker, awaited = string.match(text, '^(%x+@%x+) (%d+) (%d+) (%a) (%x+) (%d)$')
  if not generation then return nil end
  return {generation = generation, held = tonumber(held), leads = tonumber(leads), state = state, taker = taker,
    awaited = awaited}
end
local function write_lease(name, lease, ttl)
  local text = string.format('%s %.0f %.0f %s %s %s', lease.generation, lease.held, lease.leads, lease.state, lease.taker,
    lease.awaited)
  if ttl then redis.call('SET', name, text, 'PX', ttl) else redis.call('SET', name, text, 'KEEPTTL') end
end
local function announce(name) redis.pcall('SPUBLISH', name, '') end
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), time[1] .. '.' .. time[2]
end
local function digest(text) return string.sub(redis.sha1hex(text), 1, 16) end
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

/// ARGV: taker, lease in ms, its whole memory in ms, mode (`miss`, or the longest life in ms of a key that is refreshed), whether
/// stale copies are served (`1`). What one has taken counts as granted, so that the script may be repeated; but what has ended
/// meanwhile is not begun again under the same generation. A missing key that three took since its last fill is everybody's for half
/// a minute, unless there is a stale copy for those who do not load. Who takes it before the key expires does not count: where clients
/// store by NX nothing comes of that, and three such would have all load when the key is gone.
const BEGIN: &str = concat!(
    common!(),
    "\
local miss = ARGV[4] == 'miss'
if miss then
",
    end_with_value!(),
    "\
else
  local left = redis.call('PTTL', KEYS[1])
  if left == -1 or left > tonumber(ARGV[4]) then return {'fresh'} end
end
",
    run_id!(),
    "\
local now, time = clock()
local stale = miss and ARGV[5] == '1' and redis.call('GET', KEYS[3])
local lease = read_lease(KEYS[2])
if lease and string.sub(lease.generation, -8) ~= run then lease = nil end
if lease and lease.state == 's' then return {'shared', lease.generation, 0, stale} end
if lease and now < lease.held then
  local left = lease.held - now
  if lease.taker == ARGV[1] then return {'leased', lease.generation, left, stale} end
  if miss and lease.awaited == '0' then lease.awaited = '1'; write_lease(KEYS[2], lease) end
  return {'busy', lease.generation, left, stale, lease.taker}
end
local length, memory = tonumber(ARGV[2]), tonumber(ARGV[3])
if not lease then
  lease = {generation = digest(ARGV[1] .. time) .. '@' .. run, leads = 0, awaited = '0'}
end
lease.taker = ARGV[1]
if miss and not stale and lease.leads >= 3 then
  if lease.awaited == '1' then announce(KEYS[2]) end
  lease.state, lease.held, lease.awaited = 's', 0, '0'
  write_lease(KEYS[2], lease, 30000)
  return {'shared', lease.generation, 0, stale}
end
if miss then lease.leads = lease.leads + 1 end
lease.state, lease.held = 'l', now + length
write_lease(KEYS[2], lease, memory)
return {'leased', lease.generation, length, stale}"
);

/// KEYS: four for each key. ARGV: for each key the generation (`*`: any will do, `-`: none will), the lifetime of its stale copy in
/// ms or 0, and its value; then whether the client's command has the option NX (`1`), and each command, with the number of its
/// arguments before it. The first is the client's, whose reply is given; the others see to TTLs. Under another generation than the
/// lease's, what was written is deleted at once, unless it was there before: a miss, never a wrong value. Of a refused write (NX, XX,
/// an error) nothing is done, but that without a valid generation it ends the lease's; an NX is refused too where the key had the very
/// value that was to be stored. A fill that is stored ends its generation. Where a generation ends otherwise, who holds the
/// lease holds it on, under a new one: those who wait do not load beside it.
const FILL: &str = concat!(
    common!(),
    run_id!(),
    "\
local keys = #KEYS / 4
local valid, before, leases = {}, {}, {}
local missing_only = ARGV[3 * keys + 1] == '1'
for i = 1, keys do
  local lease = read_lease(KEYS[4 * i - 2])
  local given = ARGV[3 * i - 2]
  valid[i] = given == '*' or (lease and lease.generation == given and string.sub(given, -8) == run)
  before[i] = (missing_only or not valid[i]) and redis.pcall('GET', KEYS[4 * i - 3])
  leases[i] = lease
end
local function finish(i)
  redis.call('UNLINK', KEYS[4 * i - 2])
  if leases[i] and leases[i].awaited == '1' then announce(KEYS[4 * i - 2]) end
end
local function renew(i)
  local lease = leases[i]
  if not lease or lease.state ~= 'l' or string.sub(lease.generation, -8) ~= run or clock() >= lease.held then return finish(i) end
  lease.generation, lease.leads = digest(lease.generation) .. '@' .. run, math.min(lease.leads, 1)
  write_lease(KEYS[4 * i - 2], lease)
end
local at = 3 * keys + 2
local function run_next()
  local count = tonumber(ARGV[at])
  local reply = redis.pcall(unpack(ARGV, at + 1, at + count))
  at = at + 1 + count
  return reply
end
local reply = run_next()
if type(reply) == 'table' and reply.err then
  for i = 1, keys do
    if not valid[i] then renew(i) end
  end
  return reply
end
while at <= #ARGV do run_next() end
local answer = {reply}
for i = 1, keys do
  local key, copy, absence = KEYS[4 * i - 3], KEYS[4 * i - 1], KEYS[4 * i]
  local value, lifetime = ARGV[3 * i], ARGV[3 * i - 1]
  local now = redis.pcall('GET', key)
  local stored = now == value
  local unmet = reply == 0 or (missing_only and before[i] and before[i] == now)
  if unmet or (not stored and (now or not reply)) then
    if not valid[i] then renew(i) end
    answer[i + 1] = 'refused'
  else
    if stored and valid[i] then
      finish(i)
      redis.call('UNLINK', absence)
      if lifetime ~= '0' then redis.call('SET', copy, value, 'PX', lifetime) else redis.call('UNLINK', copy) end
      answer[i + 1] = 'stored'
    elseif stored and before[i] == value then
      finish(i)
      redis.call('UNLINK', copy, absence)
      answer[i + 1] = 'stored'
    else
      if valid[i] then finish(i) else renew(i) end
      redis.call('UNLINK', key, copy, absence)
      answer[i + 1] = stored and 'ambiguous' or 'deleted'
    end
  end
end
return answer"
);

/// ARGV: generation, value, TTL in ms, lifetime of the stale copy in ms or 0. Stores nothing under another generation.
const FILL_IF: &str = concat!(
    common!(),
    run_id!(),
    "\
local lease = read_lease(KEYS[2])
if not lease or lease.generation ~= ARGV[1] or string.sub(ARGV[1], -8) ~= run then return false end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('UNLINK', KEYS[2], KEYS[4])
if ARGV[4] ~= '0' then redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[4]) else redis.call('UNLINK', KEYS[3]) end
if lease.awaited == '1' then announce(KEYS[2]) end
return redis.status_reply('OK')"
);

/// ARGV: taker. Gives one's own lease back, for the next to take.
const RELEASE: &str = concat!(
    common!(),
    "\
local lease = read_lease(KEYS[2])
if not lease or lease.state ~= 'l' or lease.held == 0 or lease.taker ~= ARGV[1] then
  return 0
end
local awaited = lease.awaited == '1'
lease.held, lease.awaited = 0, '0'
write_lease(KEYS[2], lease)
if awaited then announce(KEYS[2]) end
return 1"
);

/// A key and what may stand beside it, by their names.
#[derive(Debug, Clone)]
pub struct Names([Vec<u8>; 4]);

impl Names {
    /// Those of `key`.
    pub fn of(key: &[u8]) -> Self {
        Self([key.to_vec(), Companion::Lease.name(key), Companion::Stale.name(key), Companion::Negative.name(key)])
    }

    /// The lease's, which is also the channel on which its end is announced.
    pub fn lease(&self) -> &[u8] {
        &self.0[1]
    }
}

/// Appends the head of a script over `keys` with `args` arguments.
fn write_head(script: &str, keys: &[&Names], args: usize, out: &mut Vec<u8>) {
    encode::array(out, 3 + 4 * keys.len() + args);
    encode::bulk(out, b"EVAL");
    encode::bulk(out, script.as_bytes());
    bulk_number(4 * keys.len() as u64, out);
    keys.iter().flat_map(|names| &names.0).for_each(|name| encode::bulk(out, name));
}

/// Appends what asks for the lease of a key. `taker` names this question; a repeated one is granted again.
pub fn begin(names: &Names, taker: u64, mode: Mode, rule: &Rule, out: &mut Vec<u8>) {
    write_head(BEGIN, &[names], 5, out);
    encode::bulk(out, format!("{taker:016x}").as_bytes());
    bulk_number(rule.lease, out);
    bulk_number(rule.memory, out);
    match mode {
        Mode::Miss => encode::bulk(out, b"miss"),
        Mode::Early { left } => bulk_number(left.saturating_add(EARLY_SLACK_MS), out),
    }
    encode::bulk(out, if rule.stale { b"1" } else { b"0" });
}

/// Reads BEGIN's answer to `taker`. Values are whole RESP elements, as they are passed on.
///
/// # Errors
/// The text of an error reply, its code first.
pub fn begun(answer: &[u8], taker: u64) -> Result<Begun<Rc<[u8]>>, String> {
    let parts = reply::elements(answer).unwrap_or_default();
    let word = parts.first().and_then(|part| reply::text(part)).unwrap_or_default();
    let begun = match (word, parts.as_slice()) {
        (b"value", [_, value]) => Some(Begun::Value(Rc::from(*value))),
        (b"other", _) => Some(Begun::Other),
        (b"fresh", _) => Some(Begun::Fresh),
        (b"busy", [_, generation, left, stale, taker]) => busy(generation, left, stale, taker),
        (word, [_, generation, _, stale]) => lease_of(word, taker, generation, stale),
        _ => None,
    };
    begun.ok_or_else(|| unexpected(answer))
}

fn busy(generation: &[u8], left: &[u8], stale: &[u8], taker: &[u8]) -> Option<Begun<Rc<[u8]>>> {
    let generation = Generation::parse(reply::text(generation)?)?;
    let remaining = u64::try_from(reply::integer(left)?).ok()?;
    let taker = u64::from_str_radix(std::str::from_utf8(reply::text(taker)?).ok()?, 16).ok()?;
    Some(Begun::Busy { generation, taker, stale: copy_of(stale), remaining })
}

fn lease_of(word: &[u8], taker: u64, generation: &[u8], stale: &[u8]) -> Option<Begun<Rc<[u8]>>> {
    let generation = Generation::parse(reply::text(generation)?)?;
    match word {
        b"leased" => Some(Begun::Leased { token: Token { generation, taker }, stale: copy_of(stale) }),
        b"shared" => Some(Begun::Shared { generation }),
        _ => None,
    }
}

fn copy_of(stale: &[u8]) -> Option<Rc<[u8]>> {
    (!reply::is_null(stale)).then(|| Rc::from(stale))
}

/// One key that a fill writes.
#[derive(Debug)]
pub struct Part<'a> {
    /// It and what is beside it.
    pub names: Names,
    /// How it may be written.
    pub verdict: Verdict,
    /// What it is to hold.
    pub value: &'a [u8],
}

/// Appends a fill. `queued` holds the client's command, and behind it those that see to its TTL, as a plan has them. What they
/// do beside the keys is left out: the script sees to it, with the lifetime of a stale copy as the plan has it. `None`: that is no
/// such thing.
pub fn fill(parts: &[Part<'_>], queued: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut tail = Vec::with_capacity(queued.len() + 64);
    let (mut count, mut missing_only) = (0usize, false);
    let mut lifetimes: SmallVec<[&[u8]; 1]> = SmallVec::from_elem(&b"0"[..], parts.len());
    let mut rest = queued;
    while !rest.is_empty() {
        let mut scanner = CommandScanner::default();
        let Ok(CommandScan::Complete { length }) = scanner.scan(rest) else { return None };
        let ranges = scanner.ranges();
        let arg = |index: usize| ranges.get(index).map(|range| &rest[range.start as usize..range.end as usize]);
        match arg(1) {
            Some(name) if is_larder_key(name) => {
                // SET copy value PX lifetime
                if let (Some(lifetime), Some(part)) = (arg(4), parts.iter().position(|part| part.names.0[2] == name)) {
                    lifetimes[part] = lifetime;
                }
            }
            _ => {
                missing_only |= count == 0 && has_nx((0..ranges.len()).filter_map(arg));
                bulk_number(ranges.len() as u64, &mut tail);
                (0..ranges.len()).filter_map(arg).for_each(|arg| encode::bulk(&mut tail, arg));
                count += 1 + ranges.len();
            }
        }
        rest = &rest[length..];
    }
    let names: SmallVec<[&Names; 1]> = parts.iter().map(|part| &part.names).collect();
    write_head(FILL, &names, 3 * parts.len() + 1 + count, out);
    for (part, lifetime) in parts.iter().zip(lifetimes) {
        match part.verdict {
            Verdict::Update => encode::bulk(out, b"*"),
            Verdict::Fill(generation) => encode::bulk(out, generation.to_string().as_bytes()),
            Verdict::Ambiguous(_) => encode::bulk(out, b"-"),
        }
        encode::bulk(out, lifetime);
        encode::bulk(out, part.value);
    }
    encode::bulk(out, if missing_only { b"1" } else { b"0" });
    out.extend_from_slice(&tail);
    Some(())
}

/// Whether a command is a SET with the option NX. The script sees for itself whether anything changed: what is taken for the option
/// and is none does no harm. SETNX and MSETNX say in their reply whether they stored.
fn has_nx<'a>(mut args: impl Iterator<Item = &'a [u8]>) -> bool {
    args.next().is_some_and(|name| name.eq_ignore_ascii_case(b"set")) && args.skip(2).any(|arg| arg.eq_ignore_ascii_case(b"nx"))
}

/// Reads FILL's answer: the reply to the client's own command, and what became of each key. `None`: it is an error, which is the
/// client's.
pub fn filled(answer: &[u8]) -> Option<(&[u8], SmallVec<[Written; 1]>)> {
    let parts = reply::elements(answer)?;
    let (own, outcomes) = parts.split_first()?;
    let outcome = |part: &&[u8]| match reply::text(part)? {
        b"stored" => Some(Written::Stored),
        b"refused" => Some(Written::Unchanged),
        b"deleted" | b"ambiguous" => Some(Written::Removed),
        _ => None,
    };
    Some((own, outcomes.iter().map(outcome).collect::<Option<_>>()?))
}

/// Appends what stores a value, with its TTL and that of its stale copy (0: there is none), if its key's lease still has this
/// generation. The answer is OK, or nil.
pub fn fill_if(names: &Names, generation: Generation, value: &[u8], ttl_ms: u64, copy_ms: u64, out: &mut Vec<u8>) {
    write_head(FILL_IF, &[names], 4, out);
    encode::bulk(out, generation.to_string().as_bytes());
    encode::bulk(out, value);
    bulk_number(ttl_ms, out);
    bulk_number(copy_ms, out);
}

/// Appends what gives a lease back.
pub fn release(names: &Names, token: &Token, out: &mut Vec<u8>) {
    write_head(RELEASE, &[names], 1, out);
    encode::bulk(out, format!("{:016x}", token.taker).as_bytes());
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
