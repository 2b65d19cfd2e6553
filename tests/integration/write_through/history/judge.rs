//! What is wrong with what clients have seen, by the changes that the database made.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::clients::{Heard, Read, Write};

/// Each change of each key, in the order in which they were made. `None`: a deletion.
pub type Log = Vec<Vec<Option<String>>>;

/// What was acknowledged of a key: when, and which place it has in the key's log at least.
type Acknowledged = Vec<(Instant, usize)>;

/// The last place that was acknowledged before a moment.
fn floor(acknowledged: &Acknowledged, before: Instant) -> Option<usize> {
    acknowledged.iter().filter(|(answered, _)| *answered < before).map(|(_, place)| *place).max()
}

/// Who hears of a write knows it is made, or is not; and no read gives what is older than what was acknowledged before it began, or what
/// there never was.
pub fn judge(log: &Log, writes: &[Write], reads: &[Read]) -> Vec<String> {
    let places: Vec<HashMap<&str, usize>> = log
        .iter()
        .map(|changes| changes.iter().enumerate().filter_map(|(place, value)| Some((value.as_deref()?, place))).collect())
        .collect();
    let (mut wrong, mut acknowledged) = (Vec::new(), vec![Acknowledged::new(); log.len()]);
    for write in writes {
        let Some(value) = &write.value else { continue };
        match (write.heard, places[write.key].get(value.as_str())) {
            (Heard::Made, Some(place)) => acknowledged[write.key].push((write.answered, *place)),
            (Heard::Made, None) => wrong.push(format!("{write:?} is not in Postgres")),
            (Heard::NotMade, Some(_)) => wrong.push(format!("{write:?} is in Postgres")),
            _ => {}
        }
    }
    let mut deleted = Vec::new();
    for write in writes.iter().filter(|write| write.value.is_none() && write.heard == Heard::Made) {
        // The log does not say whose a deletion is: it is this one at the soonest.
        let from = floor(&acknowledged[write.key], write.sent).map_or(0, |place| place + 1);
        match log[write.key][from..].iter().position(Option::is_none) {
            Some(behind) => deleted.push((write.key, (write.answered, from + behind))),
            None => wrong.push(format!("{write:?} is not in Postgres")),
        }
    }
    deleted.into_iter().for_each(|(key, place)| acknowledged[key].push(place));
    wrong.extend(reads.iter().filter_map(|read| {
        let (log, floor) = (&log[read.key], floor(&acknowledged[read.key], read.sent));
        wrong_read(log, &places[read.key], floor, read.value.as_deref()).map(|why| format!("{read:?} {why}"))
    }));
    wrong
}

fn wrong_read(
    log: &[Option<String>],
    places: &HashMap<&str, usize>,
    floor: Option<usize>,
    value: Option<&str>,
) -> Option<String> {
    let floor = floor.map(|floor| (floor, &log[floor]));
    match (value.map(|value| places.get(value)), floor) {
        (Some(None), _) => Some("gave what Postgres never had".to_owned()),
        (Some(Some(place)), Some((floor, change))) if *place < floor => {
            Some(format!("gave change {place}, and change {floor}, {change:?}, was acknowledged before"))
        }
        (None, Some((floor, _))) if log[floor..].iter().all(Option::is_some) => {
            Some(format!("gave nothing, and nothing was deleted since change {floor}"))
        }
        _ => None,
    }
}

struct Clock(Instant);

impl Clock {
    fn at(&self, millis: u64) -> Instant {
        self.0 + Duration::from_millis(millis)
    }

    fn write(&self, value: Option<&str>, millis: [u64; 2], heard: Heard) -> Write {
        Write { key: 0, value: value.map(str::to_owned), sent: self.at(millis[0]), answered: self.at(millis[1]), heard }
    }

    fn read(&self, value: Option<&str>, millis: u64) -> Read {
        Read { key: 0, sent: self.at(millis), value: value.map(str::to_owned) }
    }
}

#[test]
fn what_is_older_than_what_was_acknowledged_is_wrong() {
    let clock = Clock(Instant::now());
    let log: Log = vec![["v0", "v1", "", "v2"].map(|value| Some(value.to_owned()).filter(|value| !value.is_empty())).to_vec()];
    let made = |value, millis| clock.write(value, millis, Heard::Made);
    let writes = [made(Some("v0"), [0, 1]), made(Some("v1"), [2, 10]), made(None, [20, 30]), made(Some("v2"), [40, 50])];
    let is_right = |value, millis| judge(&log, &writes, &[clock.read(value, millis)]).is_empty();
    assert!(is_right(Some("v0"), 5), "the next is under way");
    assert!(!is_right(Some("v0"), 15));
    assert!(is_right(Some("v1"), 25) && is_right(None, 25), "it is being deleted");
    assert!(!is_right(Some("v1"), 35), "it is deleted");
    assert!(is_right(None, 45) && is_right(Some("v2"), 45));
    assert!(!is_right(None, 55) && !is_right(Some("v3"), 55));
}

#[test]
fn what_is_said_of_a_write_is_so() {
    let clock = Clock(Instant::now());
    let log: Log = vec![vec![Some("v0".to_owned())]];
    let is_right = |value, heard| judge(&log, &[clock.write(value, [0, 1], heard)], &[]).is_empty();
    assert!(is_right(Some("v0"), Heard::Made) && !is_right(Some("v1"), Heard::Made));
    assert!(!is_right(Some("v0"), Heard::NotMade) && is_right(Some("v1"), Heard::NotMade));
    assert!(is_right(Some("v0"), Heard::Nothing) && is_right(Some("v1"), Heard::Nothing));
    assert!(!is_right(None, Heard::Made) && is_right(None, Heard::NotMade));
}
