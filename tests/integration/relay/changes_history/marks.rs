//! What the cache shows of how far changes are told and carried out, read past Larder all the time.

use std::str::FromStr;
use std::time::{Duration, Instant};

use larder::origin::changes::pgoutput::Lsn;
use larder::sidecar::slots::slot_of;
use serde_json::Value as Json;

use super::checker::SECOND;
use super::clients::World;
use crate::relay::changes::{PLACE, STATE};
use crate::support::resp::{Client, Value};

/// KEYS: one that is written, so that no replica answers, the feed's state, the stream, the sidecars' place in it.
const LOOK: &str = "\
redis.call('SET', KEYS[1], '1')
local state = redis.call('HMGET', KEYS[2], 'position', 'lapse')
local place = redis.call('HMGET', KEYS[4], 'position', 'jobs')
local last, added = '', 0
if redis.call('EXISTS', KEYS[3]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[3])
  for at = 1, #info, 2 do
    if info[at] == 'last-generated-id' then last = info[at + 1] end
    if info[at] == 'entries-added' then added = info[at + 1] end
  end
end
return {state[1] or '', state[2] or '', last, tostring(added), place[1] or '', place[2] or ''}";
const EVENTS: &str = "larder:events";
/// How long a replica may take to confirm.
const CONFIRMS_WITHIN: &str = "100";

/// The id of an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(u64, u64);

impl FromStr for Id {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, seq) = text.split_once('-').ok_or(())?;
        Ok(Self(ms.parse().map_err(|_| ())?, seq.parse().map_err(|_| ())?))
    }
}

/// How far sidecars are, where it cannot be lost any more.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// Another each time that another server is asked, or that something may have been lost.
    pub era: u64,
    place: Id,
    walks: Walks,
}

impl Shown {
    pub fn has_carried_out(&self, event: Id) -> bool {
        self.place >= event && !self.walks.all && self.walks.since.is_none_or(|since| since > event)
    }
}

/// Walks that are wanted or under way, but for those about followed rules: what these are to remove is not shown meanwhile.
#[derive(Debug, Clone, Default)]
struct Walks {
    /// Since which event.
    since: Option<Id>,
    /// Whether one is about all that there is, since events were lost.
    all: bool,
}

impl Walks {
    fn read(jobs: &str) -> Self {
        let jobs: Json = serde_json::from_str(jobs).unwrap_or_default();
        let mut walks = Self::default();
        let wishes = [&jobs["current"]["wishes"], &jobs["next"]].into_iter().filter_map(Json::as_array).flatten();
        for wish in wishes {
            let is_followed = ["user", "orders", "total"].into_iter().any(|rule| wish["target"]["rule"] == rule);
            if wish["target"] == "leased" {
                walks.all = true;
            } else if !is_followed {
                let from: Id = wish["from"].as_str().and_then(|from| from.parse().ok()).unwrap_or_default();
                walks.since = Some(walks.since.map_or(from, |since| since.min(from)));
            }
        }
        walks
    }
}

/// What one look showed.
#[derive(Debug, Clone)]
struct Look {
    /// Up to where all was said. `None`: the cache does not know.
    said: Option<u64>,
    lapse: String,
    /// The last event, where there is a stream, and how many there were.
    last: Option<Id>,
    added: u64,
    place: Id,
    /// How many there were by then.
    count: u64,
    walks: Walks,
}

impl Look {
    fn read(answer: &Value) -> Option<Self> {
        let Value::Array(fields) = answer else { return None };
        let texts: Vec<String> = fields.iter().map(Value::text).collect();
        let [position, lapse, last, added, place, jobs] = &texts[..] else { return None };
        let said = position.split_once(' ').filter(|(_, source)| *source != "elsewhere");
        let (place, count) = place.split_once(' ').unwrap_or(("", "0"));
        Some(Self {
            said: said.and_then(|(lsn, _)| lsn.parse::<Lsn>().ok()).map(Lsn::get),
            lapse: lapse.clone(),
            last: last.parse().ok(),
            added: added.parse().ok()?,
            place: place.parse().unwrap_or_default(),
            count: count.parse().ok()?,
            walks: Walks::read(jobs),
        })
    }

    /// Whether all events that there were at an earlier look were carried out.
    fn has_carried_out(&self, earlier: &Self) -> bool {
        // A stream that is gone, or is another than sidecars have read, tells of nothing.
        let is_same = self.last.is_some() && self.count <= self.added && !self.walks.all;
        is_same && earlier.last.is_some_and(|last| self.place >= last)
    }
}

/// A shard, wherever its primary is.
struct Eye<'a> {
    ports: &'a [u16],
    at: usize,
    client: Option<Client>,
    /// A key of the shard.
    key: String,
}

impl<'a> Eye<'a> {
    /// The shards of these servers, that of the events first.
    fn all(ports: &'a [u16], shards: usize) -> Vec<Self> {
        let shard_of = |key: &str| usize::from(slot_of(key.as_bytes())) * shards / 16384;
        let events = format!("seen:{{{EVENTS}}}");
        let others = (0..shards).filter(|shard| *shard != shard_of(&events));
        let others: Vec<String> =
            others.filter_map(|shard| (0..1_000).map(|at| format!("seen:{at}")).find(|key| shard_of(key) == shard)).collect();
        [vec![events], others].concat().into_iter().map(|key| Self { ports, at: 0, client: None, key }).collect()
    }

    /// Asks the primary. `None`: none answers, and the next server is asked another time.
    fn ask(&mut self, command: &[&str]) -> Option<Value> {
        if self.client.is_none() {
            self.client = Client::connect(self.ports[self.at]).ok();
        }
        let answer = self.client.as_mut().and_then(|client| client.try_call(command).ok()).filter(|answer| !answer.is_error());
        if answer.is_none() {
            (self.client, self.at) = (None, (self.at + 1) % self.ports.len());
        }
        answer
    }

    /// Whether replicas have all that the primary had before.
    fn confirms(&mut self, replicas: usize) -> bool {
        if replicas == 0 {
            return true;
        }
        let key = self.key.clone();
        self.ask(&["SET", &key, "1"]).is_some()
            && self
                .ask(&["WAIT", &replicas.to_string(), CONFIRMS_WITHIN])
                .is_some_and(|heard| usize::try_from(heard.int()).is_ok_and(|heard| heard >= replicas))
    }
}

/// Where looks are gathered.
struct Watch<'a> {
    world: &'a World,
    era: u64,
    before: Option<Look>,
    /// Since when it is all known.
    looked_at: Instant,
    /// When the lapse that the cache notes was first seen.
    lapsed_at: Option<Instant>,
    /// Since when something may be lost.
    gap: Option<Instant>,
    /// What is to be carried out.
    earlier: Option<Look>,
}

impl Watch<'_> {
    fn take(&mut self, look: Look) {
        let before = self.before.replace(look.clone());
        let lapsed = before.as_ref().is_some_and(|before| before.lapse != look.lapse);
        if lapsed {
            self.lapsed_at = Some(Instant::now());
        }
        if lapsed || look.said.is_none() {
            self.lose();
        }
        let went_back = before.filter(|before| before.lapse == look.lapse && self.gap.is_none() && before.said > look.said);
        if let Some(before) = went_back {
            let wrong = format!("the position went back from {:?} to {:?}", before.said, look.said);
            self.world.history.lock().unwrap().wrong.push(wrong);
        }
        self.looked_at = Instant::now();
        self.trace(|| format!("{look:?}"));
    }

    fn trace(&self, what: impl FnOnce() -> String) {
        self.world.history.lock().unwrap().trace.push((Instant::now(), what()));
    }

    /// From the last look on, what was told may be lost.
    fn lose(&mut self) {
        (self.era, self.earlier) = (self.era + 1, None);
        self.gap.get_or_insert(self.looked_at);
    }

    /// A look that cannot be lost any more.
    fn settle(&mut self, look: Look) {
        *self.world.shown.lock().unwrap() = Shown { era: self.era, place: look.place, walks: look.walks.clone() };
        match self.earlier.take() {
            Some(earlier) if !look.has_carried_out(&earlier) => self.earlier = Some(earlier),
            earlier => {
                if let Some(lsn) = earlier.and_then(|earlier| earlier.said) {
                    self.tell(lsn);
                }
                self.earlier = Some(look).filter(|look| look.said.is_some());
            }
        }
    }

    fn tell(&mut self, lsn: u64) {
        self.trace(|| format!("all up to {lsn} is carried out"));
        let now = Instant::now();
        let from = self.lapsed_at.map_or(now, |since| now.max(since + SECOND));
        let mut history = self.world.history.lock().unwrap();
        if lsn < history.furthest() {
            return;
        }
        if let Some(since) = self.gap.take() {
            history.add_gap(since, from);
        }
        history.tell(from, lsn);
    }
}

/// Looks on and on. `ports`: those of all servers, in so many shards with so many replicas each.
pub fn watch(world: &World, ports: &[u16], shards: usize, replicas: usize) {
    let mut eyes = Eye::all(ports, shards);
    let (era, looked_at) = (0, Instant::now());
    let mut watch = Watch { world, era, before: None, looked_at, lapsed_at: None, gap: None, earlier: None };
    let keys = [eyes[0].key.clone(), STATE.to_owned(), EVENTS.to_owned(), PLACE.to_owned()];
    let command = [&["EVAL", LOOK, "4"][..], &keys.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    while !world.is_over() {
        std::thread::sleep(Duration::from_millis(10));
        let places: Vec<usize> = eyes.iter().map(|eye| eye.at).collect();
        let look = eyes[0].ask(&command).and_then(|answer| Look::read(&answer));
        let confirmed = look.is_some() && eyes.iter_mut().all(|eye| eye.confirms(replicas));
        if eyes.iter().zip(places).any(|(eye, at)| eye.at != at) {
            // Another server: what was asked of the former counts as far as it was confirmed.
            (watch.era, watch.earlier) = (watch.era + 1, None);
            watch.before = None;
            watch.trace(|| "another server is asked".to_owned());
            continue;
        }
        let Some(look) = look else { continue };
        watch.take(look.clone());
        if confirmed {
            watch.settle(look);
        }
    }
    if let Some(since) = watch.gap {
        world.history.lock().unwrap().add_gap(since, Instant::now());
    }
}
