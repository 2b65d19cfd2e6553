//! Histories in which something dies, or stands still, at a named point of what a sidecar or a relay does: each of their steps is an
//! exchange with a server or with Postgres, and a [`Trap`] stands before both.

use std::ops::Range;

use super::clients::{Ends, KEYS_OF_A_WRITER, World};
use super::*;
use crate::support::sidecar::connect_to_any;
use crate::support::trap::{Befallen, Fate, Hits, Point, Trap, When};

/// In a relay's transactions. Loads are others', and so are those by which a relay takes a partition.
const fn in_a_batch(name: &'static str, when: When, text: &'static str) -> Point {
    Point::new(name, when, text).within("BEGIN", "FOR UPDATE")
}

/// Whoever asked does not know that it is made.
const COMMITTED: Point = in_a_batch("a batch is committed", When::Answered, "COMMIT");

/// At the servers of the cache.
const AT_SERVERS: [Point; 12] = [
    Point::new("a write is to be marked", When::Asked, "return {'begun'"),
    Point::new("a write is marked", When::Replied, "begun"),
    Point::new("writes are to be appended", When::Asked, "local answer = {'appended'}"),
    Point::new("writes are appended", When::Replied, "appended"),
    // Of UNLINK, WAIT and WAITAOF: a relay asks by the latter, too.
    Point::new("what was appended is on disk", When::Replied, ":1\r\n:1\r\n*2\r\n:1\r\n:1\r\n"),
    Point::new("a mark is to be taken away", When::Asked, "return kept"),
    Point::new("a mark is taken away", When::Answered, "return kept"),
    Point::new("a partition is claimed", When::Replied, "claimed"),
    Point::new("the front of a partition is read", When::Answered, "\r\nXRANGE\r\n"),
    Point::new("what a relay read is on disk", When::Answered, "$4\r\n1000\r\n*2\r\n$4\r\nINFO"),
    Point::new("the journal is to be trimmed", When::Asked, "return {'done'"),
    Point::new("the journal is trimmed", When::Answered, "return {'done'"),
];

/// Where it is on disk everywhere before WAITAOF is known: in the place of the same above.
const ON_DISK_BY_WAIT: Point = Point::new(AT_SERVERS[4].name, When::Replied, ":1\r\n:1\r\n*3\r\n$6\r\nmaster");

/// Of a write that goes past a full journal.
const PAST_THE_JOURNAL: [Point; 4] = [
    Point::new("a write is to leave the journal", When::Asked, "local answer = {'left'}"),
    Point::new("it has left", When::Replied, "\r\nleft\r\n"),
    Point::new("it is to arrive", When::Asked, "return {'arrived'"),
    Point::new("it has arrived", When::Replied, "arrived"),
];

/// Of a write that the origin refuses.
const PARKED: [Point; 2] = [
    Point::new("a refused write is to become a dead letter", When::Asked, "return {'parked'}"),
    Point::new("it is one", When::Replied, "\r\nparked\r\n"),
];

/// At Postgres.
const AT_POSTGRES: [Point; 6] = [
    in_a_batch("a batch begins", When::Asked, "FOR UPDATE"),
    in_a_batch("the position is known", When::Answered, "FOR UPDATE"),
    in_a_batch("a write is told", When::Answered, "INSERT INTO users"),
    in_a_batch("the position is to move", When::Asked, "UPDATE larder_journal SET position"),
    in_a_batch("a batch is to be committed", When::Asked, "COMMIT"),
    COMMITTED,
];

/// How long it may take until somebody comes to a point: test machines are busy.
const COMES_WITHIN: Duration = Duration::from_secs(180);

impl Stage {
    fn trapped(in_cluster: bool, trap: &Trap, setting: &Setting<'_>) -> Self {
        let servers = if in_cluster {
            Servers::Cluster(RedisCluster::start_trapped(setting.engine, 3, 1, &DURABLE, trap))
        } else {
            let servers = SentinelCluster::start_trapped(setting.engine, 1, trap);
            servers.servers.iter().for_each(write_to_disk);
            Servers::Sentinel(servers)
        };
        let postgres = Postgres::start();
        let door = trap.stand_before(Trap::open(), postgres.port());
        Self::set(servers, postgres, door, setting)
    }

    fn processes(&self) -> Vec<u32> {
        self.sidecars.iter().map(Sidecar::pid).chain(self.relays.iter().map(Relay::pid)).collect()
    }
}

impl Befallen for Stage {
    type World = World;
    /// Longer than a claim lasts.
    const STANDS_STILL: Range<u64> = 2_500..3_500;

    fn succeed(&mut self, dead: u32, world: &World) {
        if let Some(at) = self.sidecars.iter().position(|sidecar| sidecar.pid() == dead) {
            self.sidecars[at] = Sidecar::start(&self.scene.snapshot);
            world.ports.lock().unwrap()[at] = self.sidecars[at].port();
        }
        if let Some(at) = self.relays.iter().position(|relay| relay.pid() == dead) {
            self.relays[at] = self.scene.relay();
        }
    }

    fn leave_alone(&mut self, server: u16, random: &mut fastrand::Rng) {
        if server == self.postgres.port() {
            return self.postgres.restart();
        }
        write_to_disk(self.scene.servers.fail_over_at(server, random));
    }
}

/// One history with these points, in another order each time.
fn play_points(seed: u64, in_cluster: bool, setting: &Setting<'_>, visits: &[(Point, Fate)]) -> (Seen, Hits) {
    let trap = Trap::default();
    let mut stage = Stage::trapped(in_cluster, &trap, setting);
    let world = World::new(stage.sidecars.iter().map(Sidecar::port).collect(), WRITERS * KEYS_OF_A_WRITER);
    let (seed, servers) = (seed * 1000, stage.scene.servers.ports());
    let mut random = fastrand::Rng::with_seed(seed);
    let mut visits = visits.to_vec();
    random.shuffle(&mut visits);
    let mut hits = Hits::new();
    std::thread::scope(|scope| {
        let (world, servers) = (&world, &servers);
        let _ends = Ends(world);
        (0..WRITERS).for_each(|index| drop(scope.spawn(move || world.write(index, seed + index as u64))));
        (0..READERS).for_each(|index| drop(scope.spawn(move || world.read(seed + 500 + index as u64))));
        scope.spawn(move || world.evict(servers, seed + 900));
        for (point, fate) in visits {
            std::thread::sleep(Duration::from_millis(random.u64(100..400)));
            let caught = trap.catch(point, &stage.processes(), COMES_WITHIN);
            stage.befall_at(fate, caught, (&trap, world), &mut random);
            *hits.entry((point.name, fate)).or_default() += 1;
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    let plan = Plan { seed: seed / 1000, faults: Vec::new(), rest: Duration::ZERO };
    (judge(&stage, &world, &plan), hits)
}

fn points() -> impl Iterator<Item = Point> {
    AT_SERVERS.into_iter().chain(AT_POSTGRES)
}

/// Each point once, with one of the fates: after three rounds it has met all. By turns under Sentinel and in Cluster.
fn play_round(number: u64) -> (Seen, Hits) {
    let fate = |at: usize| Fate::ALL[(at + number as usize) % Fate::ALL.len()];
    let visits: Vec<_> = points().enumerate().map(|(at, point)| (point, fate(at))).collect();
    play_points(number, number % 2 == 1, &Setting::USUAL, &visits)
}

/// `SEED=100` plays another.
#[test]
fn what_was_acknowledged_comes_to_the_database_whatever_dies_at_whichever_point() {
    let (first, rounds) = (from_environment("SEED", 1), from_environment("HISTORIES", 10));
    let mut sum = Seen::default();
    for (seen, hits) in play_all(first..first + rounds, play_round) {
        assert_eq!(hits.values().sum::<usize>(), points().count());
        sum.add(seen);
    }
    sum.assert_right();
    sum.assert_busy();
}

/// Before Redis 7.2 `WAIT` tells who has a write.
#[test]
fn so_it_does_where_servers_do_not_count_fsyncs() {
    let fate = |at: usize| Fate::ALL[at % Fate::ALL.len()];
    let visits = points().map(|point| if point.name == ON_DISK_BY_WAIT.name { ON_DISK_BY_WAIT } else { point });
    let visits: Vec<_> = visits.enumerate().map(|(at, point)| (point, fate(at))).collect();
    let (seen, hits) = play_points(50, false, &Setting { engine: Engine::Redis7, ..Setting::USUAL }, &visits);
    assert_eq!(hits.values().sum::<usize>(), visits.len());
    seen.assert_right();
}

/// [`play_round`], of what goes past a full journal.
fn play_round_past_the_journal(number: u64) -> (Seen, Hits) {
    let fate = |at: usize| Fate::ALL[(at + number as usize) % Fate::ALL.len()];
    let visits: Vec<_> = PAST_THE_JOURNAL.into_iter().enumerate().map(|(at, point)| (point, fate(at))).collect();
    play_points(60 + number, number % 2 == 1, &Setting { spills: true, ..Setting::USUAL }, &visits)
}

#[test]
fn so_does_what_goes_past_a_full_journal() {
    let mut sum = Seen::default();
    for (seen, hits) in play_all(0..10, play_round_past_the_journal) {
        assert_eq!(hits.values().sum::<usize>(), PAST_THE_JOURNAL.len());
        sum.add(seen);
    }
    sum.assert_right();
}

/// What an origin refuses meets one of the fates at each of its points.
fn park(number: u64) -> Hits {
    let fate = Fate::ALL[number as usize % Fate::ALL.len()];
    let trap = Trap::default();
    let mut stage = Stage::trapped(number % 2 == 1, &trap, &Setting::USUAL);
    let world = World::new(stage.sidecars.iter().map(Sidecar::port).collect(), 0);
    let mut random = fastrand::Rng::with_seed(number);
    for (at, point) in PARKED.into_iter().enumerate() {
        let mut client = connect_to_any(&world.ports, &mut random, LONG);
        let caught = std::thread::scope(|scope| {
            scope.spawn(|| {
                trap.wait_until_armed();
                for (key, value) in [("bad", "poison"), ("good", "1")] {
                    let answer = client.call(&["SET", &format!("users:{key}-{at}"), value]);
                    assert_eq!(answer, Value::Simple("OK".to_owned()), "{key}");
                }
            });
            trap.catch(point, &stage.processes(), COMES_WITHIN)
        });
        stage.befall_at(fate, caught, (&trap, &world), &mut random);
        wait_for("nothing is left", LONG, || stage.scene.depth() == 0);
        wait_for("a dead letter more", LONG, || stage.scene.dead() == at as u64 + 1);
        let told: Vec<String> = rows(&stage.postgres, &stage.database).into_keys().collect();
        assert_eq!(told, (0..=at).map(|at| format!("good-{at}")).collect::<Vec<_>>());
    }
    PARKED.into_iter().map(|point| ((point.name, fate), 1)).collect()
}

#[test]
fn what_an_origin_refuses_becomes_one_dead_letter_whatever_dies_meanwhile() {
    let visits: usize = play_all(0..10, park).iter().flat_map(Hits::values).sum();
    assert_eq!(visits, 10 * PARKED.len());
}

#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    // Each point ten times with each fate.
    let (rounds, began) = (from_environment("LARDER_SOAK_ROUNDS", 10 * Fate::ALL.len() as u64), Instant::now());
    let (mut sum, mut all) = (Seen::default(), Hits::new());
    let mut played = play_all(2000..2000 + rounds, play_round);
    played.extend(play_all(2000..2000 + rounds, play_round_past_the_journal));
    for (seen, hits) in played.into_iter().chain(play_all(0..rounds, park).into_iter().map(|hits| (Seen::default(), hits))) {
        sum.add(seen);
        hits.into_iter().for_each(|(at, count)| *all.entry(at).or_default() += count);
    }
    if let Ok(file) = std::env::var("LARDER_SOAK_POINTS_REPORT") {
        std::fs::write(&file, report(&sum, &all, began.elapsed())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    sum.assert_right();
}

fn report(sum: &Seen, hits: &Hits, took: Duration) -> String {
    let mut text = format!(
        "# Soak: write-behind and its points\n\n`make soak` writes this. {} histories, half of them under Sentinel, half in Cluster, against real servers, sidecars, relays and \
         Postgres, {} s: at each of these\npoints whoever comes there is killed, or stands still for longer than a claim lasts, or whom it asks is \
         killed. `tests/integration/relay/history/points.rs`.\n\n{} writes were acknowledged, {} refused, {} left unheard; {} reads. Wrong: {}.\n\n\
         | point | dies | stands still | is left alone |\n|---|---|---|---|\n",
        sum.histories,
        took.as_secs(),
        sum.acknowledged,
        sum.refused,
        sum.unheard,
        sum.reads,
        sum.wrong.len()
    );
    for point in points().chain(PAST_THE_JOURNAL).chain(PARKED) {
        let count = |fate| hits.get(&(point.name, fate)).copied().unwrap_or(0);
        let [dies, still, alone] = Fate::ALL.map(count);
        let _ = writeln!(text, "| {} | {dies} | {still} | {alone} |", point.name);
    }
    sum.wrong.iter().for_each(|wrong| {
        let _ = write!(text, "\n- {wrong}\n");
    });
    text
}

/// What a database that forgets makes twice is a batch of which the relay did not hear that it was committed. Where a batch is one write, whoever
/// comes next begins with that very write; else it might tell a later one of the key in its stead.
#[test]
fn it_is_noticed_where_a_database_forgets_how_far_it_is() {
    let forgets = [
        "CREATE TABLE larder_journal (part varchar(600) PRIMARY KEY, fence bigint NOT NULL, position bigint NOT NULL)",
        "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.position := 0; RETURN NEW; END $$",
        "CREATE TRIGGER forget BEFORE UPDATE ON larder_journal FOR EACH ROW EXECUTE FUNCTION forget()",
    ];
    let (seen, _) = play_points(1, false, &Setting { tables: &forgets, batch: 1, ..Setting::USUAL }, &[(COMMITTED, Fate::Dies)]);
    assert!(seen.wrong.iter().any(|wrong| wrong.contains("made twice")), "it is not noticed: {:?}", seen.wrong);
}
