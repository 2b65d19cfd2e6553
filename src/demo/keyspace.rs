//! The keys, what each means in SQL, and the order in which clients ask for them.

use std::collections::HashSet;
use std::time::Duration;

use super::data::{Code, Dataset, TODAY_DAY, TODAY_MONTH};
use crate::policy::{KeyPattern, PatternError};

/// The skew of the load: the key of rank r is asked for in proportion to 1 / r^0.99, as is usual for caches.
pub const ZIPF_EXPONENT: f64 = 0.99;
/// The seed of everything random, so that each phase and each run asks for the same keys at the same times.
pub const SEED: u64 = 0x1a2d_e201_3000_0001;

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entity {
    /// `board:{origin}`: today's departures of an airport, against its year and everybody's season. Live data, and the hottest
    /// keys.
    Board {
        /// The airport.
        origin: Code,
    },
    /// `flight:{carrier}:{number}:{month}`: how punctual a flight was in a month, against its airline's year and everybody's
    /// season. History.
    Flight {
        /// The airline.
        carrier: Code,
        /// Its number for the flight.
        number: u16,
        /// The month, 1 to 12.
        month: u8,
    },
}

/// The two families of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Departure boards.
    Board,
    /// Flights by month.
    Flight,
}

impl Family {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Board, Self::Flight];

    /// The name of the family's rule.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Board => "board",
            Self::Flight => "flight",
        }
    }

    /// The pattern that covers the family's keys, as a policy writes it.
    pub const fn pattern_text(self) -> &'static str {
        match self {
            Self::Board => "board:{origin}",
            Self::Flight => "flight:{carrier}:{number}:{month}",
        }
    }

    /// The pattern that covers the family's keys.
    ///
    /// # Errors
    /// None: a test holds that the texts are patterns.
    pub fn pattern(self) -> Result<KeyPattern, PatternError> {
        self.pattern_text().parse()
    }

    /// The statement that finds one key's value by the parts of [`Family::pattern_text`]; `schema` stands before the tables'
    /// names. Integers only, and one text column, so that SQLite and Postgres answer with the same bytes. `flights` has no index
    /// but its primary key: each run reads the whole table and joins every row of the airport or airline, and of the quarter of the
    /// year, to the weather of its hour.
    pub fn sql(self, schema: &str) -> String {
        let (mine, month, whole) = match self {
            Self::Board => {
                (format!("f.month = {TODAY_MONTH} AND f.day = {TODAY_DAY}"), TODAY_MONTH.to_string(), "f.origin = $origin")
            }
            Self::Flight => ("f.number = $number AND f.month = $month".to_owned(), "$month".to_owned(), "f.carrier = $carrier"),
        };
        let season = format!("(f.month - 1) / 3 = ({month} - 1) / 3");
        format!(
            "SELECT {VALUE_COLUMNS} AS value FROM (SELECT CASE WHEN {whole} AND {mine} THEN 1 ELSE 0 END AS mine, \
             CASE WHEN {whole} THEN 1 ELSE 0 END AS whole, CASE WHEN {season} THEN 1 ELSE 0 END AS season, f.dep_delay AS delay, \
             w.wet AS wet FROM {schema}flights f LEFT JOIN {schema}weather w ON w.origin = f.origin AND w.time_hour = f.time_hour \
             WHERE {whole} OR {season}) AS x HAVING SUM(mine) > 0"
        )
    }
}

/// The value as text: counts of the part that the key names, then of the whole that it is held against, then of the season.
const VALUE_COLUMNS: &str = "'{\"flights\":' || SUM(mine) \
    || ',\"late\":' || SUM(CASE WHEN mine = 1 AND delay > 15 THEN 1 ELSE 0 END) \
    || ',\"delay\":' || COALESCE(SUM(CASE WHEN mine = 1 THEN delay END), 0) \
    || ',\"cancelled\":' || SUM(CASE WHEN mine = 1 AND delay IS NULL THEN 1 ELSE 0 END) \
    || ',\"of\":{\"flights\":' || SUM(whole) \
    || ',\"late\":' || SUM(CASE WHEN whole = 1 AND delay > 15 THEN 1 ELSE 0 END) \
    || ',\"delay\":' || COALESCE(SUM(CASE WHEN whole = 1 THEN delay END), 0) \
    || ',\"wet\":' || SUM(CASE WHEN whole = 1 AND wet = 1 THEN 1 ELSE 0 END) \
    || ',\"wetLate\":' || SUM(CASE WHEN whole = 1 AND wet = 1 AND delay > 15 THEN 1 ELSE 0 END) \
    || '},\"season\":{\"flights\":' || SUM(season) \
    || ',\"late\":' || SUM(CASE WHEN season = 1 AND delay > 15 THEN 1 ELSE 0 END) \
    || ',\"delay\":' || COALESCE(SUM(CASE WHEN season = 1 THEN delay END), 0) \
    || ',\"wet\":' || SUM(CASE WHEN season = 1 AND wet = 1 THEN 1 ELSE 0 END) \
    || ',\"wetLate\":' || SUM(CASE WHEN season = 1 AND wet = 1 AND delay > 15 THEN 1 ELSE 0 END) || '}}'";

/// The statement that finds every key of [`Family::Flight`] with its value at once.
pub fn history_sql() -> String {
    let counts = "COUNT(*) AS flights, SUM(CASE WHEN delay > 15 THEN 1 ELSE 0 END) AS late, COALESCE(SUM(delay), 0) AS delay, \
        SUM(CASE WHEN delay IS NULL THEN 1 ELSE 0 END) AS cancelled, SUM(CASE WHEN wet = 1 THEN 1 ELSE 0 END) AS wet, \
        SUM(CASE WHEN wet = 1 AND delay > 15 THEN 1 ELSE 0 END) AS wet_late FROM rated GROUP BY";
    let against = |group: &str| {
        format!(
            "'\"flights\":' || {group}.flights || ',\"late\":' || {group}.late || ',\"delay\":' || {group}.delay \
             || ',\"wet\":' || {group}.wet || ',\"wetLate\":' || {group}.wet_late"
        )
    };
    format!(
        "WITH rated AS (SELECT f.carrier AS carrier, f.number AS number, f.month AS month, (f.month - 1) / 3 AS quarter, \
           f.dep_delay AS delay, w.wet AS wet \
           FROM flights f LEFT JOIN weather w ON w.origin = f.origin AND w.time_hour = f.time_hour), \
         part AS (SELECT carrier, number, month, quarter, {counts} carrier, number, month, quarter), \
         whole AS (SELECT carrier, {counts} carrier), \
         season AS (SELECT quarter, {counts} quarter) \
         SELECT 'flight:' || part.carrier || ':' || part.number || ':' || part.month AS key, \
           '{{\"flights\":' || part.flights || ',\"late\":' || part.late || ',\"delay\":' || part.delay \
           || ',\"cancelled\":' || part.cancelled || ',\"of\":{{' || {} || '}},\"season\":{{' || {} || '}}}}' AS value \
           FROM part JOIN whole ON whole.carrier = part.carrier JOIN season ON season.quarter = part.quarter",
        against("whole"),
        against("season")
    )
}

impl Entity {
    /// The family it belongs to.
    pub const fn family(&self) -> Family {
        match self {
            Self::Board { .. } => Family::Board,
            Self::Flight { .. } => Family::Flight,
        }
    }

    /// The cache key.
    pub fn key(&self) -> String {
        match self {
            Self::Board { origin } => format!("board:{origin}"),
            Self::Flight { carrier, number, month } => format!("flight:{carrier}:{number}:{month}"),
        }
    }
}

/// Every entity of the data set by its popularity, the most popular first.
#[derive(Debug)]
pub struct Keyspace {
    /// By rank.
    pub entities: Vec<Entity>,
    /// How many of the first ranks are boards.
    pub boards: usize,
}

impl Keyspace {
    /// The boards come first: what is live is what is asked for most. The flights follow in an order shuffled from [`SEED`].
    pub fn of(dataset: &Dataset) -> Self {
        let (mut boards, mut flights) = (Vec::new(), Vec::new());
        let (mut known_boards, mut known_flights) = (HashSet::new(), HashSet::new());
        for row in &dataset.flights {
            let today = (row.month, row.day) == (TODAY_MONTH, TODAY_DAY);
            if today && known_boards.insert(row.origin) {
                boards.push(Entity::Board { origin: row.origin });
            }
            if known_flights.insert((row.carrier, row.number, row.month)) {
                flights.push(Entity::Flight { carrier: row.carrier, number: row.number, month: row.month });
            }
        }
        boards.sort_by_key(Entity::key);
        fastrand::Rng::with_seed(SEED).shuffle(&mut flights);
        let count = boards.len();
        boards.append(&mut flights);
        Self { entities: boards, boards: count }
    }
}

/// When which key is asked for.
#[derive(Debug)]
pub struct Schedule {
    /// Time since the phase began, and the index of the entity.
    pub arrivals: Vec<(Duration, usize)>,
    /// How long the phase lasts.
    pub length: Duration,
}

impl Schedule {
    /// Poisson arrivals of `rate` a second over `length`, for keys by [`ZIPF_EXPONENT`]. The same arguments give the same schedule.
    pub fn new(keys: usize, rate: f64, length: Duration) -> Self {
        let mut random = fastrand::Rng::with_seed(SEED);
        let ranks = cumulative_weights(keys);
        let mut arrivals = Vec::with_capacity((rate * length.as_secs_f64() * 1.1) as usize);
        let mut at = 0.0;
        loop {
            at += -(1.0 - random.f64()).ln() / rate;
            if at >= length.as_secs_f64() {
                break;
            }
            let point = random.f64() * ranks.last().copied().unwrap_or_default();
            arrivals.push((Duration::from_secs_f64(at), ranks.partition_point(|sum| *sum <= point).min(keys - 1)));
        }
        Self { arrivals, length }
    }
}

fn cumulative_weights(keys: usize) -> Vec<f64> {
    let weights = (1..=keys).map(|rank| (rank as f64).powf(-ZIPF_EXPONENT));
    weights
        .scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn each_key_is_covered_by_its_familys_pattern() {
        let keyspace = Keyspace::of(&Dataset::generate(2000));
        assert_eq!(keyspace.boards, 3);
        for entity in &keyspace.entities {
            let key = entity.key();
            let parts = entity.family().pattern().expect("valid").captures(key.as_bytes()).expect("covered");
            let parts: Vec<_> = parts.into_iter().map(|range| key[range].to_owned()).collect();
            let expected = match entity {
                Entity::Board { origin } => vec![origin.to_string()],
                Entity::Flight { carrier, number, month } => vec![carrier.to_string(), number.to_string(), month.to_string()],
            };
            assert_eq!(parts, expected);
        }
    }

    #[test]
    fn the_schedule_is_the_same_each_time_and_skewed() {
        let schedule = Schedule::new(20_000, 1000.0, Duration::from_secs(20));
        assert_eq!(schedule.arrivals, Schedule::new(20_000, 1000.0, Duration::from_secs(20)).arrivals);
        assert!(schedule.arrivals.is_sorted_by_key(|(at, _)| *at));
        let count = schedule.arrivals.len() as f64;
        assert!((19_000.0..21_000.0).contains(&count));
        let share = schedule.arrivals.iter().filter(|(_, index)| *index == 0).count() as f64 / count;
        assert!((0.08..0.11).contains(&share), "the first rank has {share}");
    }
}
