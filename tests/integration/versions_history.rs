//! Histories of clients that load what they miss, some of whom give it tags, and of others that change the data and invalidate it by key, tag and
//! rule, while sidecars are killed, versions are lost and a primary dies.
//!
//! Nobody reads what is older than an invalidation that was acknowledged, or seen to be carried out, before the read began; of single keys of a
//! versioned rule, a second before.

use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::cache_aside::rule;
use crate::read_through::{Servers, policy};
use crate::support::histories::{from_environment, offset, play_all};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, connect_to_any};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const LOADERS: usize = 4;
const GROUPS: usize = 4;
const IDS: usize = 10;
const KEYS: usize = GROUPS * IDS;
/// For how long a version is believed, and some for the way.
const LEASE: Duration = Duration::from_millis(1_100);

/// How a history goes.
#[derive(Debug, Clone, Copy)]
struct Plan {
    seed: u64,
    /// Whether the rule is versioned.
    versioned: bool,
    /// Whether each key has a version of its own as well, and values are given their tags as they are stored.
    given: bool,
    /// Whether a primary is killed, and its replica takes over: then single keys are invalidated by what waits for replicas alone.
    failover: bool,
    /// Whether there are three shards, or one primary under Sentinel.
    cluster: bool,
    lasts: Duration,
}

impl Plan {
    fn new(seed: u64, versioned: bool, given: bool, failover: bool) -> Self {
        Self { seed, versioned, given, failover, cluster: false, lasts: Duration::from_secs(15) }
    }

    /// Each kind of history by turns, first under Sentinel and then in a Cluster.
    fn of(seed: u64) -> Self {
        let (versioned, given) = match seed % 3 {
            0 => (true, false),
            1 => (false, false),
            _ => (true, true),
        };
        Self { cluster: (seed / 6) % 2 == 1, ..Self::new(seed, versioned, given, (seed / 3) % 2 == 1) }
    }
}

struct World {
    plan: Plan,
    over: AtomicBool,
    ports: Mutex<Vec<u16>>,
    sockets: Mutex<Vec<PathBuf>>,
    /// What each key stands for. It rises with each change.
    origin: [AtomicU64; KEYS],
    /// From when on a key is nothing less.
    demands: Mutex<Vec<(Instant, usize, u64)>>,
    reads: Mutex<Vec<(Instant, usize, u64)>>,
    /// What was done about keys, for a person.
    trace: Mutex<Vec<(Instant, usize, String)>>,
    carried_out: AtomicU64,
}

fn key(index: usize) -> String {
    format!("page:{}:{index}", index % GROUPS)
}

impl World {
    fn new(plan: Plan) -> Self {
        Self {
            plan,
            over: AtomicBool::new(false),
            ports: Mutex::default(),
            sockets: Mutex::default(),
            origin: std::array::from_fn(|_| AtomicU64::new(1)),
            demands: Mutex::default(),
            reads: Mutex::default(),
            trace: Mutex::default(),
            carried_out: AtomicU64::new(0),
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn connect(&self, random: &mut fastrand::Rng) -> Client {
        connect_to_any(&self.ports, random, LIMIT)
    }

    fn change(&self, key: usize) -> u64 {
        self.origin[key].fetch_add(1, Ordering::SeqCst) + 1
    }

    fn note(&self, key: usize, what: String) {
        self.trace.lock().unwrap().push((Instant::now(), key, what));
    }

    /// What was done about a key around a read of it.
    fn around(&self, (sent, key): (Instant, usize)) -> String {
        let trace = self.trace.lock().unwrap();
        let (before, after) = (Duration::from_secs(5), Duration::from_millis(500));
        let near = trace.iter().filter(|(at, of, _)| *of == key && *at + before >= sent && *at <= sent + after);
        near.map(|(at, _, what)| format!("{}: {what}", offset(*at, sent))).collect::<Vec<_>>().join("; ")
    }

    /// Reads, and loads what is missing.
    fn load(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            let (at, sent) = (random.usize(..KEYS), Instant::now());
            match client.try_call(&["GET", &key(at)]) {
                Ok(Value::Nil) => {
                    let value = self.origin[at].load(Ordering::SeqCst).to_string();
                    std::thread::sleep(Duration::from_micros(random.u64(0..8_000)));
                    let loaded = sent.elapsed();
                    let stored = client.try_call(&["SET", &key(at), &value]);
                    self.note(
                        at,
                        format!("SET {value} {loaded:?} behind its GET: {stored:?} at {:?}", client.stream().peer_addr()),
                    );
                    if stored.is_err() {
                        client = self.connect(&mut random);
                    }
                }
                Ok(Value::Error(_)) => {}
                Ok(value) => {
                    let value = value.text().parse().expect("a number");
                    self.reads.lock().unwrap().push((sent, at, value));
                }
                Err(_) => client = self.connect(&mut random),
            }
            std::thread::sleep(Duration::from_micros(random.u64(0..3_000)));
        }
    }

    /// Reads, and gives what is missing its group as a tag.
    fn load_with_tags(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            let (at, sent) = (random.usize(..KEYS), Instant::now());
            match client.try_call(&["LARDER.FETCH", &key(at), "WAIT", "100"]) {
                Ok(Value::Array(told)) => match (told[0].text().as_str(), &told[1], &told[2]) {
                    ("value", value, _) => {
                        self.reads.lock().unwrap().push((sent, at, value.text().parse().expect("a number")));
                    }
                    ("load", _, token) if *token != Value::Nil => {
                        let value = self.origin[at].load(Ordering::SeqCst).to_string();
                        std::thread::sleep(Duration::from_micros(random.u64(0..8_000)));
                        let tag = format!("group:{}", at % GROUPS);
                        if client.try_call(&["LARDER.FILL", &key(at), &token.text(), &value, "TAGS", &tag]).is_err() {
                            client = self.connect(&mut random);
                        }
                    }
                    _ => {}
                },
                Ok(_) => {}
                Err(_) => client = self.connect(&mut random),
            }
            std::thread::sleep(Duration::from_micros(random.u64(0..3_000)));
        }
    }

    /// What each sidecar shows of each key.
    fn read_all(&self) {
        let command: Vec<String> = std::iter::once("MGET".to_owned()).chain((0..KEYS).map(key)).collect();
        for port in self.ports.lock().unwrap().clone() {
            let mut client = Client::connect(port).expect("the sidecar accepts");
            let (mut sent, mut shown) = (Instant::now(), Vec::new());
            wait_for("all keys to be read", LIMIT, || {
                sent = Instant::now();
                let answer = client.call(&command);
                shown = if answer.is_error() { Vec::new() } else { answer.items() };
                !shown.is_empty()
            });
            let found = shown.into_iter().enumerate().filter(|(_, value)| matches!(value, Value::Bulk(_)));
            let read = found.map(|(at, value)| (sent, at, value.text().parse().expect("a number")));
            self.reads.lock().unwrap().extend(read);
        }
    }

    /// Changes single keys, and invalidates them.
    fn invalidate_keys(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            let at = random.usize(..KEYS);
            let value = self.change(at);
            let command = if self.plan.failover || random.bool() { "LARDER.INVALIDATE" } else { "DEL" };
            let asked = Instant::now();
            let answer = client.try_call(&[command, &key(at)]);
            self.note(
                at,
                format!("{command} for {value}: {answer:?} within {:?} at {:?}", asked.elapsed(), client.stream().peer_addr()),
            );
            match answer {
                Ok(Value::Int(_)) => {
                    let from = Instant::now() + if self.plan.versioned { LEASE } else { Duration::ZERO };
                    self.demands.lock().unwrap().push((from, at, value));
                }
                Ok(_) => {}
                Err(_) => client = self.connect(&mut random),
            }
            std::thread::sleep(Duration::from_millis(random.u64(20..80)));
        }
    }

    /// Changes many keys at once, and invalidates what they have in common.
    fn invalidate_many(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.is_over() {
            let group = Some(random.usize(..GROUPS)).filter(|_| random.bool());
            let changed = (0..KEYS).filter(|at| group.is_none_or(|group| at % GROUPS == group));
            let changed: Vec<(usize, u64)> = changed.map(|at| (at, self.change(at))).collect();
            let what = group.map_or("rule=page".to_owned(), |group| format!("tag=group:{group}"));
            let asked = Instant::now();
            if self.carry_out(&what, &mut random).is_some() {
                let now = Instant::now();
                for (at, value) in &changed {
                    self.note(*at, format!("{what} for {value}: carried out within {:?}", asked.elapsed()));
                }
                self.demands.lock().unwrap().extend(changed.into_iter().map(|(at, value)| (now, at, value)));
                self.carried_out.fetch_add(1, Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(random.u64(200..1_500)));
        }
    }

    /// Asks any sidecar, and waits until it is carried out. `None`: nobody says so.
    fn carry_out(&self, what: &str, random: &mut fastrand::Rng) -> Option<()> {
        let asked = self.ask("POST", &format!("/invalidate?{what}"), random)?;
        let event = asked["event"].as_str()?.to_owned();
        let until = Instant::now() + LIMIT;
        while Instant::now() < until && !self.is_over() {
            let told = self.ask("GET", &format!("/invalidate?{what}&event={event}"), random);
            match told.as_ref().and_then(|told| told["state"].as_str()) {
                Some("ended") => return Some(()),
                Some("unknown") => return None,
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        None
    }

    fn ask(&self, method: &str, path: &str, random: &mut fastrand::Rng) -> Option<Json> {
        let sockets = self.sockets.lock().unwrap().clone();
        let mut stream = UnixStream::connect(&sockets[random.usize(..sockets.len())]).ok()?;
        stream.set_read_timeout(Some(LIMIT)).ok()?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: local\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200").then(|| serde_json::from_str(body).ok()).flatten()
    }

    /// The first read that is older than what was demanded before it.
    fn broken(&self) -> Option<String> {
        let (mut demands, mut reads) = (self.demands.lock().unwrap().clone(), self.reads.lock().unwrap().clone());
        demands.sort_unstable();
        reads.sort_unstable();
        let (mut least, mut due) = ([0; KEYS], demands.into_iter().peekable());
        for (sent, at, value) in reads {
            while let Some((_, at, value)) = due.next_if(|(from, ..)| *from <= sent) {
                least[at] = least[at].max(value);
            }
            if value < least[at] {
                let around = self.around((sent, at));
                return Some(format!("{} is {value}, and {} was demanded: {around}", key(at), least[at]));
            }
        }
        None
    }
}

struct Scene {
    servers: Servers,
    snapshot: Json,
    directory: TempDir,
    sidecars: Vec<Sidecar>,
    started: usize,
}

impl Scene {
    fn open(plan: Plan) -> Self {
        let replicas = usize::from(plan.failover);
        let servers = match plan.cluster {
            false => Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, replicas)),
            true => Servers::Cluster(RedisCluster::start(Engine::Valkey9, 3, replicas)),
        };
        let mut page = rule("page", json!({"lease": "2s", "wait": "1s", "atWaitEnd": "miss"}), json!({}));
        page["keys"] = json!("page:{group}:{id}");
        if plan.given {
            page["versioned"] = json!("entity");
        } else {
            (page["tags"], page["versioned"]) = (json!(["group:{group}"]), json!(plan.versioned));
        }
        let snapshot = policy(servers.topology(), 1, &[], &[page]);
        Self { servers, snapshot, directory: TempDir::new().unwrap(), sidecars: Vec::new(), started: 0 }
    }

    fn start_sidecar(&mut self, world: &World) {
        self.started += 1;
        let socket = self.directory.path().join(format!("{}.sock", self.started));
        let sidecar = Sidecar::start_with(&self.snapshot, &["--admin-socket", &socket.display().to_string()]);
        world.ports.lock().unwrap().push(sidecar.port());
        world.sockets.lock().unwrap().push(socket);
        self.sidecars.push(sidecar);
    }

    fn replace_sidecar(&mut self, world: &World, at: usize) {
        let port = self.sidecars[at].port();
        (0..KEYS).for_each(|key| world.note(key, format!("the sidecar at {port} is replaced")));
        self.start_sidecar(world);
        world.ports.lock().unwrap().remove(at);
        world.sockets.lock().unwrap().remove(at);
        drop(self.sidecars.remove(at));
    }

    /// A version is evicted.
    fn lose_version(&self, world: &World, random: &mut fastrand::Rng) {
        let servers = match &self.servers {
            Servers::Sentinel(servers) => std::slice::from_ref(servers.primary()),
            Servers::Cluster(servers) => &servers.servers[..servers.shards()],
        };
        let mut server = servers[random.usize(..servers.len())].client();
        let names = server.line("KEYS larder:v:*").items();
        if !names.is_empty() {
            let name = names[random.usize(..names.len())].text();
            let lost = server.call(&["DEL", &name]);
            assert!(!lost.is_error(), "{lost:?}");
            (0..KEYS).for_each(|at| world.note(at, format!("{name} is lost")));
        }
    }

    /// A primary dies, and its replica takes its place.
    fn lose_primary(&mut self, world: &World, random: &mut fastrand::Rng) {
        match &mut self.servers {
            Servers::Sentinel(servers) => servers.servers[0].kill(),
            Servers::Cluster(servers) => servers.servers[random.usize(..3)].kill(),
        }
        let mut client = world.connect(random);
        wait_for("the failover", LIMIT, || {
            // Some of these are in each shard.
            (0..20).all(|at| client.try_call(&["SET", &format!("free:{at}"), "v"]).is_ok_and(|reply| !reply.is_error()))
        });
    }
}

/// Plays one history: what was broken in it, and how much was carried out and read.
fn play(plan: Plan) -> (Option<String>, u64, usize) {
    let (mut scene, world) = (Scene::open(plan), World::new(plan));
    (0..3).for_each(|_| scene.start_sidecar(&world));
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let until = Instant::now() + plan.lasts;
    std::thread::scope(|scope| {
        let seed = |number: usize| plan.seed * 100 + number as u64;
        let world = &world;
        (0..LOADERS).for_each(|number| {
            scope.spawn(move || if plan.given { world.load_with_tags(seed(number)) } else { world.load(seed(number)) });
        });
        scope.spawn(move || world.invalidate_keys(seed(50)));
        (60..62).for_each(|number| drop(scope.spawn(move || world.invalidate_many(seed(number)))));
        let mut kills = usize::from(plan.failover);
        while Instant::now() < until || kills > 0 {
            std::thread::sleep(Duration::from_millis(random.u64(500..2_500)));
            match random.u8(..3) {
                0 if plan.versioned && !plan.failover => scene.lose_version(world, &mut random),
                1 if kills == 1 => {
                    kills = 0;
                    scene.lose_primary(world, &mut random);
                }
                _ => {
                    let at = random.usize(..scene.sidecars.len());
                    scene.replace_sidecar(world, at);
                }
            }
        }
        world.over.store(true, Ordering::SeqCst);
    });
    // All that was demanded holds by then.
    std::thread::sleep(LEASE);
    world.read_all();
    let reads = world.reads.lock().unwrap().len();
    (world.broken(), world.carried_out.into_inner(), reads)
}

#[track_caller]
fn check(plan: Plan) {
    let (broken, carried_out, reads) = play(plan);
    assert_eq!(broken, None, "{plan:?}");
    assert!(carried_out > 2 && reads > 1_000, "{carried_out} were carried out, and {reads} reads found something");
}

fn any_seed() -> u64 {
    fastrand::u64(..1_000_000)
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_versions() {
    check(Plan::new(any_seed(), true, false, false));
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_versions_before_a_failover_in_a_cluster() {
    check(Plan { cluster: true, ..Plan::new(any_seed(), true, false, true) });
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_walks() {
    check(Plan::new(any_seed(), false, false, false));
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_walks_before_a_failover() {
    check(Plan::new(any_seed(), false, false, true));
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_tags_that_values_were_given() {
    check(Plan::new(any_seed(), true, true, false));
}

#[test]
fn nothing_is_read_that_is_older_than_what_was_invalidated_by_such_tags_before_a_failover() {
    check(Plan::new(any_seed(), true, true, true));
}

/// `LARDER_SOAK_SEED=1000` begins with another.
#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    let (first, seeds) = (from_environment("LARDER_SOAK_SEED", 1_000), from_environment("LARDER_SOAK_SEEDS", 200));
    let began = Instant::now();
    let played = play_all(first..first + seeds, |seed| (seed, play(Plan::of(seed))));
    let wrong: Vec<String> =
        played.iter().filter_map(|(seed, (broken, ..))| Some(format!("{:?}: {}", Plan::of(*seed), broken.as_ref()?))).collect();
    if let Ok(file) = std::env::var("LARDER_SOAK_VERSIONS_REPORT") {
        let carried_out = played.iter().map(|(_, (_, carried_out, _))| *carried_out).sum();
        let reads = played.iter().map(|(_, (.., reads))| *reads).sum();
        let text = report(first..first + seeds, began.elapsed(), carried_out, reads, &wrong);
        std::fs::write(&file, text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    assert_eq!(wrong, [""; 0]);
}

fn report(seeds: Range<u64>, took: Duration, carried_out: u64, reads: usize, wrong: &[String]) -> String {
    let histories = seeds.end - seeds.start;
    let failovers = seeds.filter(|seed| Plan::of(*seed).failover).count();
    let mut text = format!(
        "# Soak: versions, tags and walks under faults\n\n`make soak` writes this. {histories} histories against real servers and sidecars (by sixes under \
         Sentinel and in Cluster), {} s.\nWhat happens in each: `tests/integration/versions_history.rs`.\n\n| | |\n|---|---|\n",
        took.as_secs()
    );
    for (what, count) in [
        ("histories in which a primary was killed", failovers.to_string()),
        ("rules and tags that were invalidated, and told of as carried out", carried_out.to_string()),
        ("reads that found something", reads.to_string()),
        ("**histories in which a read was older than what was invalidated before**", wrong.len().to_string()),
    ] {
        text.extend(["| ", what, " | ", &count, " |\n"]);
    }
    wrong.iter().for_each(|wrong| text.extend(["\n- ", wrong, "\n"]));
    text
}
