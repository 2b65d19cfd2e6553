//! What read-through asks of the cache: three scripts over a key and its companions, which share its slot.

use std::cell::Cell;
use std::rc::Rc;

use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::super::content::{Content, Form};
use super::FlightKey;
use crate::origin::Writer;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::slots::{self, Companion};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

/// Lua that ends with what is known of the key, and the lease where it is free.
macro_rules! ask_for_lease {
    () => {
        "\
if redis.call('EXISTS', KEYS[3]) == 1 then return {'nothing'} end
if KEYS[5] and redis.call('EXISTS', KEYS[5]) == 1 then
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  local marks = redis.call('HGETALL', KEYS[5])
  for i = 1, #marks, 2 do
    if string.sub(marks[i], 1, 2) == 't:' and tonumber(marks[i + 1]) > now then return {'written'} end
  end
  redis.call('UNLINK', KEYS[5])
end
local holder = redis.call('GET', KEYS[2])
local state = 'busy'
if not holder then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
  state = 'leased'
elseif holder == ARGV[1] then
  state = 'leased'
end
return {state, copy, holder, redis.call('PTTL', KEYS[2])}"
    };
}

/// KEYS: key, lease, negative entry, stale copy, where the rule writes through the mark of writes under way, and where these take heed
/// of it what the origin calls the value. ARGV: token, lease in
/// ms. One's own lease counts as granted, so that the script may be repeated. While a write may still come to something, nobody gets
/// the lease: what he loads could be older than it. A copy of another form than the rule's is none.
const BEGIN: &str = concat!(
    end_with_value!(),
    "\
local copy = redis.pcall('GET', KEYS[4])
if type(copy) == 'table' then copy = false end
",
    ask_for_lease!()
);

/// The same of a hash.
const BEGIN_HASH: &str = concat!(
    end_with_hash!(),
    "\
local copy = redis.pcall('HGETALL', KEYS[4])
if copy.err or #copy == 0 then copy = false end
",
    ask_for_lease!()
);

/// ARGV: token, value, TTL in ms, lifetime of the stale copy in ms or 0, what the origin calls the value or nothing; of a hash, from here on
/// fields and values in turn. Stores nothing without the lease.
const FILL: &str = concat!(
    put!(2, 6),
    "\
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2], KEYS[3])
put(KEYS[1], ARGV[3])
if ARGV[4] ~= '0' then put(KEYS[4], ARGV[4]) else redis.call('DEL', KEYS[4]) end
if KEYS[6] then
  if ARGV[5] ~= '' then redis.call('SET', KEYS[6], ARGV[5], 'PX', ARGV[3]) else redis.call('DEL', KEYS[6]) end
end
return 1"
);

/// ARGV: token, lifetime of the negative entry in ms or 0. The origin does not know the key: neither does the cache.
const NOTHING: &str = "\
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2], KEYS[4])
if KEYS[6] then redis.call('DEL', KEYS[6]) end
if ARGV[2] ~= '0' then redis.call('SET', KEYS[3], '', 'PX', ARGV[2]) end
return 1";

/// ARGV: token, lease in ms or 0. Renews the lease, or gives it back.
const HOLD: &str = "\
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[2]) end
return redis.call('PEXPIRE', KEYS[2], ARGV[2])";

/// What the cache knows of a key that was just missing.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is there now.
    Value(Content<'static>),
    /// It is there now, in another form than the rule's.
    Other,
    /// It is known to be nowhere.
    Nothing,
    /// The lease is ours. With the stale copy, where there is one.
    Leased(Option<Content<'static>>),
    /// Somebody else has the lease.
    Busy {
        /// The stale copy, where there is one.
        stale: Option<Content<'static>>,
        /// The other's token.
        holder: Vec<u8>,
        /// For how many milliseconds the lease still stands.
        left_ms: u64,
    },
    /// A write is under way: whatever is loaded now may not be stored.
    Written,
    /// The server is there, and takes no lease: it is full, say, or the login may not write.
    Refused,
}

/// Codes of errors by which a server that is there and knows what it does takes no writes.
const REFUSALS: [&str; 4] = ["OOM ", "NOPERM ", "MISCONF ", "NOREPLICAS "];

/// One key's place in the cache, under one token.
#[derive(Debug, Clone)]
pub struct Entry {
    lane: Lane,
    slot: u16,
    names: SmallVec<[Vec<u8>; 4]>,
    token: String,
    form: Form,
    /// Becomes true at the moment in which the answer to [`Entry::begin`] or a fill is read, which is before anybody heeds it.
    is_answered: Rc<Cell<bool>>,
}

impl Entry {
    /// The entry of `key` under a fresh token, which tells `is_answered` when its key's state has been read. `writer`: who
    /// writes the rule's keys. `form`: that of their values.
    pub fn new(worker: &Worker, key: &FlightKey, writer: Option<&Writer>, form: Form, is_answered: Rc<Cell<bool>>) -> Self {
        let (lane, key) = key;
        let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
        let mut names: SmallVec<[Vec<u8>; 4]> = SmallVec::new();
        names.push(key.clone());
        names.extend([Companion::Lease, Companion::Negative, Companion::Stale].map(|companion| companion.name(key)));
        names.extend(writer.map(|_| Companion::Intent.name(key)));
        names.extend(writer.filter(|writer| writer.takes_tags()).map(|_| Companion::Versions.name(key)));
        let token = format!("{:08x}{:08x}{:08x}", worker.random(), worker.random(), worker.random());
        Self { lane: *lane, slot, names, token, form, is_answered }
    }

    /// Looks again, and asks for the lease for `lease_ms` milliseconds.
    pub async fn begin(&self, worker: &Rc<Worker>, lease_ms: u64) -> Result<Begun, String> {
        let script = match self.form {
            Form::Text => BEGIN,
            Form::Hash => BEGIN_HASH,
        };
        let answer = match self.decide(worker, script, &[lease_ms.to_string().as_bytes()]).await {
            Err(text) if REFUSALS.iter().any(|code| text.starts_with(code)) => return Ok(Begun::Refused),
            answer => answer?,
        };
        let parts = reply::elements(&answer).unwrap_or_default();
        let second = parts.get(1).and_then(|part| Content::read(self.form, part));
        match (parts.first().and_then(|part| reply::text(part)), second) {
            (Some(b"value"), Some(value)) => Ok(Begun::Value(value)),
            (Some(b"other"), _) => Ok(Begun::Other),
            (Some(b"nothing"), _) => Ok(Begun::Nothing),
            (Some(b"written"), _) => Ok(Begun::Written),
            (Some(b"leased"), stale) => Ok(Begun::Leased(stale)),
            (Some(b"busy"), stale) => {
                let holder = parts.get(2).and_then(|part| reply::text(part)).unwrap_or_default().to_vec();
                let left_ms = parts.get(3).and_then(|part| reply::integer(part)).and_then(|left| u64::try_from(left).ok());
                Ok(Begun::Busy { stale, holder, left_ms: left_ms.unwrap_or(0) })
            }
            _ => Err(unexpected(&answer)),
        }
    }

    /// Stores a loaded value, which the origin calls `tag`. `false`: the lease was gone, nothing is stored.
    pub async fn fill(
        &self,
        worker: &Rc<Worker>,
        value: &Content<'_>,
        tag: Option<&str>,
        ttl_ms: u64,
        stale_ms: u64,
    ) -> Result<bool, String> {
        let (ttl, stale, tag) = (ttl_ms.to_string(), stale_ms.to_string(), tag.unwrap_or_default());
        let args = [value.text(), ttl.as_bytes(), stale.as_bytes(), tag.as_bytes()];
        let args: Vec<&[u8]> = args.into_iter().chain(value.pairs()).collect();
        self.decide(worker, FILL, &args).await.and_then(|answer| flag(&answer))
    }

    /// Remembers that the origin does not know the key. `false`: the lease was gone, nothing is stored.
    pub async fn fill_nothing(&self, worker: &Rc<Worker>, negative_ms: u64) -> Result<bool, String> {
        self.decide(worker, NOTHING, &[negative_ms.to_string().as_bytes()]).await.and_then(|answer| flag(&answer))
    }

    /// Keeps the lease for another `lease_ms` milliseconds. `false`: it was gone.
    pub async fn renew(&self, worker: &Rc<Worker>, lease_ms: u64) -> Result<bool, String> {
        self.run(worker, HOLD, &[lease_ms.to_string().as_bytes()], None).await.and_then(|answer| flag(&answer))
    }

    /// Gives the lease back, for somebody else to load. Nobody waits for the answer.
    pub fn give_back(&self, worker: &Rc<Worker>) {
        self.send(worker, HOLD, &[b"0"], Sink::Drop);
    }

    /// Runs a script whose answer decides over the flight.
    async fn decide(&self, worker: &Rc<Worker>, script: &str, args: &[&[u8]]) -> Result<Vec<u8>, String> {
        self.is_answered.set(false);
        self.run(worker, script, args, Some(self.is_answered.clone())).await
    }

    async fn run(
        &self,
        worker: &Rc<Worker>,
        script: &str,
        args: &[&[u8]],
        is_answered: Option<Rc<Cell<bool>>>,
    ) -> Result<Vec<u8>, String> {
        let (sender, receiver) = oneshot::channel();
        let sink = Sink::Call(Box::new(move |_, answer| {
            if let Some(is_answered) = is_answered {
                is_answered.set(true);
            }
            let answer = match answer {
                Answer::Reply(bytes) if bytes.first() == Some(&b'-') => Err(unexpected(bytes)),
                Answer::Reply(bytes) => Ok(bytes.to_vec()),
                Answer::Failed(text) => Err(text.to_owned()),
            };
            // Whoever asked may have gone.
            let _ = sender.send(answer);
        }));
        self.send(worker, script, args, sink);
        receiver.await.unwrap_or_else(|_| Err("TRYAGAIN the sidecar is stopping".to_owned()))
    }

    fn send(&self, worker: &Rc<Worker>, script: &str, args: &[&[u8]], sink: Sink) {
        let mut wire = Vec::with_capacity(script.len() + 256 + args.iter().map(|arg| arg.len()).sum::<usize>());
        encode::array(&mut wire, 3 + self.names.len() + 1 + args.len());
        encode::bulk(&mut wire, b"EVAL");
        encode::bulk(&mut wire, script.as_bytes());
        encode::bulk(&mut wire, self.names.len().to_string().as_bytes());
        self.names.iter().for_each(|name| encode::bulk(&mut wire, name));
        encode::bulk(&mut wire, self.token.as_bytes());
        args.iter().for_each(|arg| encode::bulk(&mut wire, arg));
        worker.submit(&[&wire], Pending::new(sink, self.slot, Retry::Safe, self.lane, worker.now()));
    }
}

/// Whether a script did what it was to do.
fn flag(answer: &[u8]) -> Result<bool, String> {
    reply::integer(answer).map(|flag| flag == 1).ok_or_else(|| unexpected(answer))
}

/// The text of an error reply, its code first.
fn unexpected(answer: &[u8]) -> String {
    match answer.strip_prefix(b"-") {
        Some(error) => String::from_utf8_lossy(error).trim_end().to_owned(),
        None => "ERR the cache gave an unexpected answer to a script of Larder's".to_owned(),
    }
}
