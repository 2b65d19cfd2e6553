//! Histories in which something dies, or stands still, at a named point of a write or of a load beside it. Each of their steps is an exchange
//! with a server or with Postgres, and a [`Trap`] stands before both. That the cache has a value and that its mark is gone is one step: between
//! these there is no point.

use std::fmt::Write as _;
use std::ops::Range;

use super::*;
use crate::support::trap::{Befallen, Fate, Hits, Point, Trap, When};

/// In the transaction of a write that stores. Loads have transactions, too, over the same connections.
const fn in_a_write(name: &'static str, when: When, text: &'static str) -> Point {
    Point::new(name, when, text).within("BEGIN READ", "INSERT INTO kv")
}

/// At the servers of the cache.
const AT_SERVERS: [Point; 9] = [
    Point::new("a write is to be marked", When::Asked, "return {'begun'"),
    Point::new("a write is marked", When::Replied, "begun"),
    Point::new("replicas are to confirm the mark", When::Asked, "\r\nWAIT\r\n"),
    Point::new("replicas have confirmed the mark", When::Answered, "\r\nWAIT\r\n"),
    Point::new("the cache is to have what was written", When::Asked, "return kept"),
    Point::new("the cache has what was written, and the client has no reply", When::Answered, "return kept"),
    Point::new("a load has the lease", When::Replied, "leased"),
    Point::new("what was loaded is to be stored", When::Asked, "put(KEYS[1], ARGV[3])"),
    Point::new("what was loaded is stored", When::Answered, "put(KEYS[1], ARGV[3])"),
];

/// From here on the next write of the key goes on at Postgres.
const COMMITTED: Point = in_a_write("the change is committed, and the cache does not know it", When::Answered, "COMMIT");

/// At Postgres.
const AT_POSTGRES: [Point; 5] = [
    Point::new("a transaction is to begin", When::Asked, "BEGIN READ WRITE"),
    in_a_write("the origin is to be told", When::Asked, "INSERT INTO kv"),
    Point::new("the origin has made the change, and has not committed it", When::Replied, "INSERT 0 1"),
    in_a_write("the change is to be committed", When::Asked, "COMMIT"),
    COMMITTED,
];

fn points() -> impl Iterator<Item = Point> {
    AT_SERVERS.into_iter().chain(AT_POSTGRES)
}

/// Each write of unknown outcome keeps its key from being cached for a while: here are many of them.
const KEYS: usize = 32;
/// How long it may take until somebody comes to a point.
const COMES_WITHIN: Duration = Duration::from_secs(120);

impl Stage {
    fn trapped(in_cluster: bool, trap: &Trap, database: (Versions, &[&str])) -> Self {
        let servers = if in_cluster {
            Servers::Cluster(RedisCluster::start_trapped(Engine::Valkey9, 3, 1, &[], trap))
        } else {
            Servers::Sentinel(SentinelCluster::start_trapped(Engine::Valkey9, 1, trap))
        };
        let postgres = Postgres::start();
        let door = trap.stand_before(Trap::open(), postgres.port());
        Self::set(servers, postgres, door, database)
    }
}

impl Befallen for Stage {
    type World = World;
    const STANDS_STILL: Range<u64> = 200..3_000;

    fn succeed(&mut self, dead: u32, world: &World) {
        let victim = self.sidecars.iter().position(|sidecar| sidecar.pid() == dead).expect("one of ours");
        self.replace(victim, world);
    }

    fn leave_alone(&mut self, server: u16, random: &mut fastrand::Rng) {
        if server == self.postgres.port() {
            self.postgres.restart();
        } else {
            self.servers.fail_over_at(server, random);
        }
    }
}

/// What happens where.
type Visits = Vec<(Point, Fate)>;

/// One history with these points, in another order each time. By turns under Sentinel and in Cluster.
fn play_points(seed: u64, visits: &Visits) -> Seen {
    let versions = if (seed / 2).is_multiple_of(2) { Versions::Column } else { Versions::None };
    play_points_at(seed, visits, (versions, &TABLES))
}

/// The same before this database.
fn play_points_at(seed: u64, visits: &Visits, database: (Versions, &[&str])) -> Seen {
    let elections =
        |(point, fate): &&(Point, Fate)| *fate == Fate::IsLeftAlone && AT_SERVERS.iter().any(|other| other.name == point.name);
    play_until_it_counts(visits.iter().filter(elections).count() as u64, || {
        let trap = Trap::default();
        Stage::trapped(seed % 2 == 1, &trap, database).play((seed, KEYS), |stage, world, random| {
            let mut visits = visits.clone();
            random.shuffle(&mut visits);
            for (point, fate) in visits {
                std::thread::sleep(Duration::from_millis(random.u64(100..300)));
                let sidecars: Vec<u32> = stage.sidecars.iter().map(Sidecar::pid).collect();
                let caught = trap.catch(point, &sidecars, COMES_WITHIN);
                stage.befall_at(fate, caught, (&trap, world), random);
            }
        })
    })
}

/// Rounds in which points meet what `visits` says.
fn play_rounds(rounds: Range<u64>, visits: impl Fn(u64) -> Visits + Sync) -> (Seen, Hits) {
    let played = play_all(rounds, |round| {
        let visits = visits(round);
        (play_points(round, &visits), visits)
    });
    let (seen, visits): (Vec<Seen>, Vec<Visits>) = played.into_iter().unzip();
    let mut hits = Hits::new();
    visits.into_iter().flatten().for_each(|(point, fate)| *hits.entry((point.name, fate)).or_default() += 1);
    (Seen::sum(seen), hits)
}

/// Each point once, with the fate that is `fates`' turn.
fn by_turns(fates: &[Fate], round: u64) -> Visits {
    points().zip(0..).map(|(point, at)| (point, fates[(at + round as usize) % fates.len()])).collect()
}

/// How often a sidecar is killed at each point: twice in a round.
const KILLS: u64 = 10;
/// The other fates take longer. In these rounds each point meets both.
const OTHERS: u64 = 2;

/// `SEED=100` plays others.
#[test]
fn no_history_shows_what_is_older_whatever_dies_at_whichever_point() {
    let first = from_environment("SEED", 0);
    let (sum, hits) = play_rounds(first..first + OTHERS + KILLS / 2, |round| match round - first {
        0..OTHERS => by_turns(&[Fate::StandsStill, Fate::IsLeftAlone], round),
        _ => [by_turns(&[Fate::Dies], round), by_turns(&[Fate::Dies], round)].concat(),
    });
    for point in points() {
        assert_eq!(Fate::ALL.map(|fate| hits[&(point.name, fate)]), [KILLS as usize, 1, 1], "{}", point.name);
    }
    sum.assert_right();
    sum.assert_busy();
}

/// A sidecar stands still where its write is committed, while another's writes of the key come to their ends.
#[test]
fn the_order_of_versions_that_larder_keeps_counts() {
    let falling = [
        "CREATE TABLE larder_versions (counter bigint PRIMARY KEY, version bigint NOT NULL)",
        "CREATE FUNCTION fall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         IF TG_OP = 'INSERT' THEN NEW.version := 1000000; ELSE NEW.version := OLD.version - 1; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER fall BEFORE INSERT OR UPDATE ON larder_versions FOR EACH ROW EXECUTE FUNCTION fall()",
    ];
    let play = |seed, tables: &[&str]| play_points_at(seed, &vec![(COMMITTED, Fate::StandsStill); 6], (Versions::Kept, tables));
    (0..2).for_each(|seed| play(seed, &TABLES).assert_right());
    let is_noticed = (0..10).any(|seed| !play(seed, &[&TABLES[..], &falling].concat()).wrong.is_empty());
    assert!(is_noticed, "that versions fall is not noticed");
}

#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    // Each point ten times with each fate.
    let (rounds, began) = (from_environment("LARDER_SOAK_ROUNDS", 10 * Fate::ALL.len() as u64), Instant::now());
    let (sum, hits) = play_rounds(2000..2000 + rounds, |round| by_turns(&Fate::ALL, round));
    if let Ok(file) = std::env::var("LARDER_SOAK_THROUGH_POINTS_REPORT") {
        std::fs::write(&file, report(&sum, &hits, began.elapsed())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    sum.assert_right();
}

fn report(sum: &Seen, hits: &Hits, took: Duration) -> String {
    let mut text = format!(
        "# Soak: write-through and its points\n\n`make soak` writes this. {} histories, half of them under Sentinel, half in Cluster, against real \
         servers, sidecars and Postgres, {} s: at each of these\npoints the sidecar that comes there is killed, or stands still, or whom it asks is \
         killed. `tests/integration/write_through/history/points.rs`.\n\n| point | dies | stands still | is left alone |\n|---|---|---|---|\n",
        sum.histories,
        took.as_secs()
    );
    for point in points() {
        let [dies, still, alone] = Fate::ALL.map(|fate| hits.get(&(point.name, fate)).copied().unwrap_or(0));
        let _ = writeln!(text, "| {} | {dies} | {still} | {alone} |", point.name);
    }
    text + "\n" + &sum.table(&[])
}
