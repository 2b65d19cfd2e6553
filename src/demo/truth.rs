//! What each key's value truly was, and when: the measure of every reply.
//!
//! The truth is computed here from the rows, without SQL and without the cache. An update is one row; before the statement is sent
//! its new values may be seen, and until it is acknowledged the old ones may be.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::data::{Code, Dataset, LATE_MINUTES, TODAY_DAY, TODAY_MONTH};
use super::keyspace::{Entity, Keyspace};

/// Counts over some flights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    flights: i64,
    late: i64,
    delay: i64,
    cancelled: i64,
    wet: i64,
    wet_late: i64,
}

impl Counts {
    /// Adds (`sign` 1) or takes away (`sign` −1) one flight.
    fn count(&mut self, delay: Option<i16>, wet: bool, sign: i64) {
        let late = delay.is_some_and(|minutes| minutes > LATE_MINUTES);
        self.flights += sign;
        self.late += sign * i64::from(late);
        self.delay += sign * i64::from(delay.unwrap_or_default());
        self.cancelled += sign * i64::from(delay.is_none());
        self.wet += sign * i64::from(wet);
        self.wet_late += sign * i64::from(wet && late);
    }
}

/// A set of flights that values count over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Group {
    Today(Code),
    Airport(Code),
    Flight(Code, u16, u8),
    Airline(Code),
    /// A quarter of the year, from 0.
    Season(u8),
}

/// What a value tells of: the group that the key names, and those that it is held against.
#[derive(Debug, Clone, Copy)]
struct Groups {
    part: usize,
    whole: usize,
    season: usize,
}

/// The counts of one group from an update on.
#[derive(Debug, Clone, Copy)]
struct Version {
    /// The number of the update, from 1; 0 is the beginning.
    since: usize,
    counts: Counts,
}

/// When an update took place: not before `sent`, not after `acknowledged`.
#[derive(Debug, Clone, Copy)]
struct UpdateTime {
    sent: Instant,
    acknowledged: Option<Instant>,
}

/// A row that updates may change: one of today's departures.
#[derive(Debug, Clone, Copy)]
struct Departure {
    id: u32,
    origin: Code,
    carrier: Code,
    number: u16,
    delay: Option<i16>,
    wet: bool,
}

/// What a reply is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was the key's value, this long before the request was sent. Zero: it was the value during the request.
    True {
        /// How old the reply was.
        age: Duration,
    },
    /// It never was the key's value.
    False,
}

/// A row to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Update {
    /// The flight's primary key.
    pub id: u32,
    /// Its new delay in minutes.
    pub delay: i16,
}

struct State {
    groups: Vec<Vec<Version>>,
    updates: Vec<UpdateTime>,
    departures: Vec<Departure>,
}

/// The true values of all keys over time. Memory grows by six small records an update.
pub struct Truth {
    /// Of each entity.
    entities: Vec<Groups>,
    index: HashMap<Group, usize>,
    state: RwLock<State>,
}

impl Truth {
    /// Counts the whole data set once.
    pub fn new(dataset: &Dataset, keyspace: &Keyspace) -> Self {
        let wet: HashMap<(Code, &str), bool> =
            dataset.weather.iter().map(|hour| ((hour.origin, &*hour.time_hour), hour.wet)).collect();
        let mut index = HashMap::new();
        let mut counts: Vec<Counts> = Vec::new();
        let mut departures = Vec::new();
        for row in &dataset.flights {
            let wet = wet.get(&(row.origin, &*row.time_hour)).copied().unwrap_or_default();
            let today = (row.month, row.day) == (TODAY_MONTH, TODAY_DAY);
            let always = [
                Group::Airport(row.origin),
                Group::Flight(row.carrier, row.number, row.month),
                Group::Airline(row.carrier),
                season_of(row.month),
            ];
            for group in always.into_iter().chain(today.then_some(Group::Today(row.origin))) {
                let place = *index.entry(group).or_insert_with(|| {
                    counts.push(Counts::default());
                    counts.len() - 1
                });
                counts[place].count(row.dep_delay, wet, 1);
            }
            if today {
                let (origin, carrier) = (row.origin, row.carrier);
                departures.push(Departure { id: row.id, origin, carrier, number: row.number, delay: row.dep_delay, wet });
            }
        }
        let entities = keyspace.entities.iter().map(|entity| groups_of(entity, &index)).collect();
        let groups = counts.into_iter().map(|counts| vec![Version { since: 0, counts }]).collect();
        Self { entities, index, state: RwLock::new(State { groups, updates: Vec::new(), departures }) }
    }

    /// Draws the next row to change. `None` where no flight leaves today.
    pub fn next_update(&self, random: &mut fastrand::Rng) -> Option<Update> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let row = random.choice(&state.departures)?;
        let delay = row.delay.map_or(0, |minutes| (minutes + random.i16(1..30)) % 240);
        Some(Update { id: row.id, delay })
    }

    /// Notes that `update` is about to be sent. One update at a time.
    pub fn update_sent(&self, update: Update, now: Instant) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.updates.push(UpdateTime { sent: now, acknowledged: None });
        let since = state.updates.len();
        let Some(row) = state.departures.iter_mut().find(|row| row.id == update.id) else {
            return;
        };
        let before = *row;
        row.delay = Some(update.delay);
        let touched = [
            Group::Today(before.origin),
            Group::Airport(before.origin),
            Group::Flight(before.carrier, before.number, TODAY_MONTH),
            Group::Airline(before.carrier),
            season_of(TODAY_MONTH),
        ];
        for place in touched.iter().filter_map(|group| self.index.get(group)) {
            let versions = &mut state.groups[*place];
            let mut counts = versions.last().map(|version| version.counts).unwrap_or_default();
            counts.count(before.delay, before.wet, -1);
            counts.count(Some(update.delay), before.wet, 1);
            versions.push(Version { since, counts });
        }
    }

    /// Notes that the last update is done.
    pub fn update_acknowledged(&self, now: Instant) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = state.updates.last_mut() {
            last.acknowledged = Some(now);
        }
    }

    /// The present value of an entity.
    pub fn current(&self, entity: usize) -> String {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.value(self.entities[entity], state.updates.len())
    }

    /// Holds a reply to a request, sent and received at these times, against every value that the entity ever had.
    pub fn check(&self, entity: usize, reply: &str, sent: Instant, received: Instant) -> Verdict {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let groups = self.entities[entity];
        let newest = state.updates.len();
        let settled = state.updates.last().is_none_or(|update| update.sent <= received);
        if settled && state.value(groups, newest) == reply {
            return Verdict::True { age: Duration::ZERO };
        }
        let mut changes: Vec<usize> =
            [groups.part, groups.whole, groups.season].iter().flat_map(|group| &state.groups[*group]).map(|v| v.since).collect();
        changes.sort_unstable();
        changes.dedup();
        // The newest first.
        let mut until: Option<Instant> = None;
        for since in changes.into_iter().rev() {
            let begun = since.checked_sub(1).map(|update| state.updates[update]);
            let visible = begun.is_none_or(|update| update.sent <= received);
            if visible && state.value(groups, since) == reply {
                let age = until.map_or(Duration::ZERO, |until| sent.saturating_duration_since(until));
                return Verdict::True { age };
            }
            // An update that is not acknowledged yet leaves the value before it true.
            until = begun.and_then(|update| update.acknowledged);
        }
        Verdict::False
    }
}

impl State {
    fn counts(&self, group: usize, at: usize) -> Counts {
        let versions = &self.groups[group];
        let after = versions.partition_point(|version| version.since <= at);
        versions[..after].last().map(|version| version.counts).unwrap_or_default()
    }

    /// The value as [`super::keyspace::Family::sql`] writes it, after update `at`.
    fn value(&self, groups: Groups, at: usize) -> String {
        let (part, whole, season) = (self.counts(groups.part, at), self.counts(groups.whole, at), self.counts(groups.season, at));
        let against = |of: Counts| {
            format!(
                "{{\"flights\":{},\"late\":{},\"delay\":{},\"wet\":{},\"wetLate\":{}}}",
                of.flights, of.late, of.delay, of.wet, of.wet_late
            )
        };
        format!(
            "{{\"flights\":{},\"late\":{},\"delay\":{},\"cancelled\":{},\"of\":{},\"season\":{}}}",
            part.flights,
            part.late,
            part.delay,
            part.cancelled,
            against(whole),
            against(season)
        )
    }
}

/// The quarter of the year that a month, 1 to 12, is in.
fn season_of(month: u8) -> Group {
    Group::Season(month.saturating_sub(1) / 3)
}

fn groups_of(entity: &Entity, index: &HashMap<Group, usize>) -> Groups {
    let place = |group: Group| index.get(&group).copied().unwrap_or_default();
    let (part, whole, month) = match *entity {
        Entity::Board { origin } => (Group::Today(origin), Group::Airport(origin), TODAY_MONTH),
        Entity::Flight { carrier, number, month } => (Group::Flight(carrier, number, month), Group::Airline(carrier), month),
    };
    Groups { part: place(part), whole: place(whole), season: place(season_of(month)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting() -> (Keyspace, Truth) {
        let dataset = Dataset::generate(2000);
        let keyspace = Keyspace::of(&dataset);
        let truth = Truth::new(&dataset, &keyspace);
        (keyspace, truth)
    }

    /// An update of a flight from the first board's airport.
    fn update_first_board(truth: &Truth, delay: i16, sent: Instant, acknowledged: Option<Instant>) {
        let board_group = truth.entities[0].part;
        let origin = truth.index.iter().find(|(_, place)| **place == board_group).map(|(group, _)| *group);
        let Some(Group::Today(origin)) = origin else { panic!("the first entity is a board") };
        let id =
            truth.state.read().unwrap().departures.iter().find(|row| row.origin == origin && row.delay.is_some()).unwrap().id;
        truth.update_sent(Update { id, delay }, sent);
        if let Some(at) = acknowledged {
            truth.update_acknowledged(at);
        }
    }

    #[test]
    fn a_reply_ages_from_the_moment_the_next_value_is_certain() {
        let (_, truth) = setting();
        let old = truth.current(0);
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        update_first_board(&truth, 777, at(100), Some(at(110)));
        let new = truth.current(0);
        assert_ne!(old, new);
        let fresh = Verdict::True { age: Duration::ZERO };
        assert_eq!(truth.check(0, &new, at(105), at(106)), fresh);
        assert_eq!(truth.check(0, &old, at(105), at(106)), fresh);
        assert_eq!(truth.check(0, &old, at(1110), at(1111)), Verdict::True { age: Duration::from_secs(1) });
        // Nobody can know a value before it is sent.
        assert_eq!(truth.check(0, &new, at(10), at(20)), Verdict::False);
        assert_eq!(truth.check(0, "{}", at(105), at(106)), Verdict::False);
    }

    #[test]
    fn an_unacknowledged_update_leaves_both_values_true() {
        let (_, truth) = setting();
        let old = truth.current(0);
        let start = Instant::now();
        update_first_board(&truth, 778, start, None);
        let later = start + Duration::from_secs(9);
        for value in [old, truth.current(0)] {
            assert_eq!(truth.check(0, &value, later, later), Verdict::True { age: Duration::ZERO });
        }
    }

    #[test]
    fn another_keys_value_is_false() {
        let (keyspace, truth) = setting();
        let now = Instant::now();
        let last = keyspace.entities.len() - 1;
        assert_eq!(truth.check(0, &truth.current(last), now, now), Verdict::False);
    }

    #[test]
    fn updates_touch_only_today() {
        let (_, truth) = setting();
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..50 {
            let update = truth.next_update(&mut random).expect("flights leave today");
            assert!(truth.state.read().unwrap().departures.iter().any(|row| row.id == update.id));
        }
    }
}
