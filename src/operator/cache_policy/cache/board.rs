//! What is known of the bindings of one CacheCluster: heard by one task, and read by whoever writes status. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Pace;
use super::figures::{Figures, Notice};
use super::fleet::Count;
use super::heard::{Heard, Taken};
use super::room::Room;
use crate::policy::binding::BindingName;

/// How long a change waits for others before it is told.
const CHANGE_EVERY: Duration = Duration::from_secs(2);
/// How long it waits where nothing but counts has changed.
const COUNTS_EVERY: Duration = Duration::from_secs(30);
/// How a channel's name begins: see [`BindingName::heartbeat_channel`].
const CHANNEL: &str = "larder:hb:";

/// The bindings of one CacheCluster.
#[derive(Debug)]
pub struct Board {
    room: Arc<Room>,
    pace: Pace,
    bindings: BTreeMap<BindingName, Entry>,
    by_channel: BTreeMap<String, BindingName>,
}

#[derive(Debug)]
struct Entry {
    heard: Heard,
    count: Count,
    newer: Option<u64>,
    /// Whether something was heard since it was told last.
    is_fresh: bool,
    /// What was told last, and when.
    told: Option<(Figures, Instant)>,
}

/// A number that the sidecars of a binding are to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetDue {
    /// Which.
    pub binding: BindingName,
    /// How many they are.
    pub sidecars: u32,
    /// Whether they are more than was told: their shares are too big until they know.
    pub rises: bool,
}

impl Board {
    /// Without a binding.
    pub fn new(room: Arc<Room>, pace: Pace) -> Self {
        Self { room, pace, bindings: BTreeMap::new(), by_channel: BTreeMap::new() }
    }

    /// This is a binding's snapshot now.
    pub fn expect<'a>(&mut self, now: Instant, binding: &BindingName, generation: u64, rules: impl Iterator<Item = &'a str>) {
        let entry = self.bindings.entry(binding.clone()).or_insert_with(|| {
            let (heard, count) = (Heard::new(self.room.clone(), now), Count::new(self.pace.hold));
            Entry { heard, count, newer: None, is_fresh: true, told: None }
        });
        entry.heard.expect(now, generation, rules);
        entry.is_fresh = true;
        self.by_channel.insert(binding.heartbeat_channel(), binding.clone());
    }

    /// A binding is gone.
    pub fn remove(&mut self, binding: &BindingName) {
        self.bindings.remove(binding);
        self.by_channel.remove(&binding.heartbeat_channel());
    }

    /// All channels are heard, these bindings' at the least.
    pub fn listen<'a>(&mut self, now: Instant, bindings: impl Iterator<Item = &'a BindingName>) {
        for binding in bindings {
            if let Some(entry) = self.bindings.get_mut(binding) {
                entry.heard.listen(now);
            }
        }
    }

    /// No channel is heard any more.
    pub fn deaf(&mut self, now: Instant) {
        for entry in self.bindings.values_mut() {
            entry.heard.deaf(now);
            entry.count.deaf();
        }
    }

    /// Takes a message. `None`: nobody's.
    pub fn beat(&mut self, now: Instant, channel: &str, message: &[u8]) -> Option<Taken> {
        let entry = self.bindings.get_mut(self.by_channel.get(channel)?)?;
        let taken = entry.heard.beat(now, channel.strip_prefix(CHANNEL)?, message);
        entry.is_fresh = true;
        Some(taken)
    }

    /// Time has passed. Tells which figures are worth to be told anew.
    pub fn tick(&mut self, now: Instant) -> Vec<BindingName> {
        let mut changed = Vec::new();
        for (binding, entry) in &mut self.bindings {
            entry.age(now);
            if entry.is_worth_telling(now) {
                entry.told = Some((entry.state(now), now));
                entry.is_fresh = false;
                changed.push(binding.clone());
            }
        }
        changed
    }

    /// Which sidecars are to be told of another number.
    pub fn fleets_due(&mut self, now: Instant) -> Vec<FleetDue> {
        let due = |(binding, entry): (&BindingName, &mut Entry)| {
            entry.saw(now);
            let sidecars = entry.count.due(now)?;
            let rises = entry.count.told().is_none_or(|told| told < sidecars);
            Some(FleetDue { binding: binding.clone(), sidecars, rises })
        };
        self.bindings.iter_mut().filter_map(due).collect()
    }

    /// Sidecars were told of their number.
    pub fn fleet_told(&mut self, now: Instant, binding: &BindingName, sidecars: u32) {
        if let Some(entry) = self.bindings.get_mut(binding) {
            entry.count.tell(now, sidecars);
            entry.heard.told(now, sidecars);
            entry.is_fresh = true;
        }
    }

    /// The cache says that sidecars were told of this number, or of none. What it is to be, where that is another one.
    pub fn fleet_found(&mut self, now: Instant, binding: &BindingName, found: Option<u32>) -> Option<u32> {
        let entry = self.bindings.get_mut(binding)?;
        if let Some(found) = found {
            entry.count.found(found);
        }
        let told = entry.count.told()?;
        entry.heard.told(now, told);
        (found != Some(told)).then_some(told)
    }

    /// What sidecars are told of their number.
    pub fn fleet(&self, binding: &BindingName) -> Option<u32> {
        self.bindings.get(binding)?.count.told()
    }

    /// Whether a newer snapshot than the wanted one lies in the cache.
    pub fn newer(&mut self, binding: &BindingName, generation: Option<u64>) {
        if let Some(entry) = self.bindings.get_mut(binding) {
            entry.is_fresh |= entry.newer != generation;
            entry.newer = generation;
        }
    }

    /// All that is known of a binding.
    pub fn figures(&self, now: Instant, binding: &BindingName) -> Option<Figures> {
        let entry = self.bindings.get(binding)?;
        Some(entry.complete(entry.heard.figures(now)))
    }
}

impl Entry {
    fn age(&mut self, now: Instant) {
        let before = self.heard.live(now);
        self.heard.age(now);
        self.is_fresh |= self.heard.live(now) != before;
    }

    fn saw(&mut self, now: Instant) {
        if self.heard.is_listening() {
            self.count.saw(now, self.heard.live(now));
        }
    }

    fn complete(&self, figures: Figures) -> Figures {
        Figures { fleet: self.count.told(), newer_in_cache: self.newer, ..figures }
    }

    /// Without what differs at each look.
    fn state(&self, now: Instant) -> Figures {
        Figures { clients: 0, ..self.complete(self.heard.state(now)) }
    }

    fn is_worth_telling(&self, now: Instant) -> bool {
        let Some((told, at)) = &self.told else { return true };
        let since = now.duration_since(*at);
        let is_due = since >= CHANGE_EVERY && (self.is_fresh || told.listening != self.heard.is_listening());
        is_due && (since >= COUNTS_EVERY || !same(told, &self.state(now)))
    }
}

/// Whether nothing has changed that a person would look for.
fn same(one: &Figures, other: &Figures) -> bool {
    let rest = |figures: &Figures| Figures { notices: Vec::new(), ..figures.clone() };
    one.notices.iter().map(Notice::subject).eq(other.notices.iter().map(Notice::subject)) && rest(one) == rest(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::heartbeat::{Heartbeat, RuleBeat, VERSION};

    const TICK: Duration = Duration::from_secs(2);

    fn binding() -> BindingName {
        BindingName::parse("shop").unwrap()
    }

    fn beat(sidecar: &str, generation: u64, hits: u64) -> Vec<u8> {
        let rule = RuleBeat { name: "user".to_owned(), hits, ..RuleBeat::default() };
        let beat = Heartbeat {
            version: VERSION,
            sidecar: sidecar.to_owned(),
            binding: "shop".to_owned(),
            larder: "0.1.0".to_owned(),
            understands: 3,
            generation: Some(generation),
            refused: None,
            uptime_seconds: 10,
            clients: 1,
            clients_ever: 1,
            rules: vec![rule],
            rules_left_out: 0,
        };
        beat.to_json()
    }

    /// A board that listens to one binding, and the seconds in which its figures were told, where `sidecars` speak each 5 s.
    fn told(seconds: std::ops::Range<u64>, start: Instant, board: &mut Board, sidecars: &[&str], generation: u64) -> Vec<u64> {
        let told = |second: u64| {
            let now = start + Duration::from_secs(second);
            for sidecar in sidecars.iter().filter(|_| second.is_multiple_of(5)) {
                board.beat(now, "larder:hb:shop", &beat(sidecar, generation, second)).expect("it is known");
            }
            (second.is_multiple_of(TICK.as_secs()) && !board.tick(now).is_empty()).then_some(second)
        };
        seconds.filter_map(told).collect()
    }

    #[test]
    fn figures_are_told_when_they_change_and_now_and_then() {
        let start = Instant::now();
        let mut board = Board::new(Arc::default(), Pace::default());
        board.expect(start, &binding(), 1, ["user"].into_iter());
        board.listen(start, [binding()].iter());
        assert_eq!(told(0..100, start, &mut board, &["a", "b"], 1), [0, 10, 40, 70], "at 10 what all understand");
        assert_eq!(told(100..120, start, &mut board, &["a", "b"], 2), [100]);
        // One ends, and is missed after three intervals.
        assert_eq!(told(120..150, start, &mut board, &["a"], 2), [130, 132]);
        board.deaf(start + Duration::from_secs(150));
        assert_eq!(told(151..300, start, &mut board, &[], 2), [152]);
        let figures = board.figures(start + Duration::from_secs(300), &binding()).unwrap();
        assert_eq!((figures.listening, figures.live, figures.generations), (false, 1, vec![(2, 1)]));
    }

    #[test]
    fn silence_is_told_once_nobody_is_left() {
        let start = Instant::now();
        let mut board = Board::new(Arc::default(), Pace::default());
        board.expect(start, &binding(), 1, ["user"].into_iter());
        board.listen(start, [binding()].iter());
        assert_eq!(told(0..31, start, &mut board, &["a", "b"], 1), [0, 10]);
        // The last words are of the thirtieth second, and count for three intervals.
        assert_eq!(told(31..300, start, &mut board, &[], 1), [40, 46]);
        let figures = board.figures(start + Duration::from_secs(300), &binding()).unwrap();
        assert_eq!((figures.listening, figures.live, figures.current), (true, 0, 0));
    }

    #[test]
    fn a_stranger_is_nobodys() {
        let now = Instant::now();
        let mut board = Board::new(Arc::default(), Pace::default());
        board.expect(now, &binding(), 1, std::iter::empty());
        assert_eq!(board.beat(now, "larder:hb:other", &beat("a", 1, 1)), None);
        assert_eq!(board.beat(now, "other", b""), None);
        assert_eq!(board.beat(now, "larder:hb:shop", b"{"), Some(Taken::Nonsense));
        board.remove(&binding());
        assert_eq!(board.beat(now, "larder:hb:shop", &beat("a", 1, 1)), None);
        assert_eq!(board.figures(now, &binding()), None);
    }

    #[test]
    fn a_fleet_that_the_cache_lost_is_written_again() {
        let start = Instant::now();
        let mut board = Board::new(Arc::default(), Pace::default());
        board.expect(start, &binding(), 1, std::iter::empty());
        assert_eq!(board.fleet_found(start, &binding(), None), None);
        board.listen(start, [binding()].iter());
        board.beat(start, "larder:hb:shop", &beat("a", 1, 1));
        let due = FleetDue { binding: binding(), sidecars: 1, rises: true };
        assert_eq!(board.fleets_due(start), [due]);
        board.fleet_told(start, &binding(), 1);
        assert_eq!(board.fleets_due(start), []);
        assert_eq!(board.fleet_found(start, &binding(), Some(1)), None);
        assert_eq!(board.fleet_found(start, &binding(), Some(9)), Some(1));
        assert_eq!(board.fleet_found(start, &binding(), None), Some(1));
    }
}
