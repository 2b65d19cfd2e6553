//! How fast a million keys are rebalanced, beside `redis-cli --cluster rebalance`, and what other clients notice meanwhile.

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{LIMIT, Rig, STAYING};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};
use crate::support::wait_for;

const KEYS: usize = 1_000_000;
const VALUE: usize = 100;
const SHARDS: u16 = 4;
/// Other clients, and the pause of each between two commands.
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(2);
/// How long they are measured while no slot moves, in each round.
const QUIET: Duration = Duration::from_secs(10);
const ROUNDS: usize = 2;
const PIPELINE: usize = 1000;

/// Who moves slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mover {
    Nobody,
    Larder,
    Tool,
    ToolByHundreds,
}

impl Mover {
    const ALL: [Self; 4] = [Self::Nobody, Self::Larder, Self::Tool, Self::ToolByHundreds];

    fn name(self, engine: Engine) -> &'static str {
        match self {
            Self::Nobody => "no slot moves",
            Self::Larder if engine == Engine::Redis7 => "Larder, key by key",
            Self::Larder => "Larder, by the engine's own migration",
            Self::Tool => "`redis-cli --cluster rebalance`",
            Self::ToolByHundreds => "the same with `--cluster-pipeline 100`",
        }
    }
}

/// What was measured of one mover.
#[derive(Debug, Clone, Default)]
struct Figures {
    /// Keys that were moved, and in which time.
    keys: u64,
    lasted: Duration,
    /// How long each command of another client took, in microseconds.
    took: Vec<u32>,
    refused: Vec<String>,
}

impl Figures {
    fn quantile(&self, part: f64) -> f64 {
        let at = ((self.took.len() - 1) as f64 * part) as usize;
        f64::from(self.took[at]) / 1000.0
    }

    fn add(&mut self, other: &Self) {
        self.took.extend(&other.took);
        self.refused.extend(other.refused.iter().cloned());
    }
}

fn key(number: usize) -> String {
    format!("user:{number}")
}

fn fill(client: &mut Client) {
    let value = "x".repeat(VALUE);
    for first in (0..KEYS).step_by(PIPELINE) {
        let batch: Vec<u8> = (first..first + PIPELINE).flat_map(|number| encode(&["SET", &key(number), &value])).collect();
        client.send(&batch).expect("the sidecar reads");
        (0..PIPELINE).for_each(|_| assert_eq!(client.read().expect("a reply"), Value::Simple("OK".to_owned())));
    }
}

/// Reads and writes keys at a pace until `moving` is past all movers, and notes what it meets under the mover that is at work.
fn load(port: u16, seed: u64, moving: &AtomicUsize) -> [Figures; 4] {
    let (mut client, mut random) = (Client::connect(port).expect("the sidecar accepts"), fastrand::Rng::with_seed(seed));
    let (mut all, value): ([Figures; 4], _) = (Default::default(), "y".repeat(VALUE));
    loop {
        let at = moving.load(Ordering::Relaxed);
        let Some(figures) = all.get_mut(at) else { return all };
        let (key, began) = (key(random.usize(..KEYS)), Instant::now());
        let reply = if random.bool() { client.call(&["GET", &key]) } else { client.call(&["SET", &key, &value]) };
        figures.took.push(u32::try_from(began.elapsed().as_micros()).expect("seconds"));
        match reply {
            Value::Error(text) => figures.refused.push(text),
            Value::Nil => figures.refused.push(format!("{key} is lost")),
            _ => {}
        }
        sleep(PAUSE);
    }
}

/// `redis-cli --cluster rebalance`, to so many of the shards.
fn rebalance(cluster: &RedisCluster, shards: u16, further: &[&str]) {
    let address = cluster.servers[0].address();
    let mut command = Command::new("redis-cli");
    command.args(["--cluster", "rebalance", &address, "--cluster-threshold", "1"]).args(further);
    if shards == SHARDS {
        command.arg("--cluster-use-empty-masters");
    } else {
        let last = cluster.servers[usize::from(shards)].client().line("CLUSTER MYID").text();
        command.args(["--cluster-weight".to_owned(), format!("{last}=0")]);
    }
    let output = command.stdin(Stdio::null()).output().expect("redis-cli runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn keys_of_last(cluster: &RedisCluster) -> u64 {
    cluster.servers[usize::from(SHARDS) - 1].client().line("DBSIZE").int().unsigned_abs()
}

/// Empties the last shard and fills it again.
fn there_and_back(cluster: &RedisCluster, rig: &Rig, mover: Mover, figures: &mut Figures) {
    for shards in [SHARDS - 1, SHARDS] {
        let (before, began) = (keys_of_last(cluster), Instant::now());
        match mover {
            Mover::Nobody => sleep(QUIET),
            Mover::Larder => rig.settle(shards),
            Mover::Tool => rebalance(cluster, shards, &[]),
            Mover::ToolByHundreds => rebalance(cluster, shards, &["--cluster-pipeline", "100"]),
        }
        figures.lasted += began.elapsed();
        figures.keys += if mover == Mover::Nobody { 0 } else { before.max(keys_of_last(cluster)) };
        // The tool leaves shares that differ by some slots, and engines drop what they have moved after a while.
        rig.settle(shards);
        wait_for("all nodes to agree", LIMIT, || is_agreed(cluster));
    }
}

/// Whether all nodes name the same owners: the tool refuses to begin before.
fn is_agreed(cluster: &RedisCluster) -> bool {
    let told = cluster.servers.iter().map(|server| {
        let ranges = server.client().line("CLUSTER SLOTS").items().into_iter().map(|range| range.items());
        let mut ranges: Vec<[i64; 3]> = ranges.map(|range| [range[0].int(), range[1].int(), range[2].items()[1].int()]).collect();
        ranges.sort_unstable();
        ranges
    });
    told.collect::<std::collections::BTreeSet<_>>().len() == 1
}

fn measure(engine: Engine) -> [Figures; 4] {
    let cluster = RedisCluster::start_with(engine, usize::from(SHARDS), 0, &STAYING);
    let (rig, sidecar) = (Rig::over(&cluster, None), Sidecar::start(&bypass(cluster_topology(&cluster))));
    fill(&mut sidecar.client());
    let moving = AtomicUsize::new(0);
    let mut all: [Figures; 4] = Default::default();
    std::thread::scope(|scope| {
        let (port, moving) = (sidecar.port(), &moving);
        let clients: Vec<_> = (0..CLIENTS).map(|seed| scope.spawn(move || load(port, seed as u64, moving))).collect();
        for _ in 0..ROUNDS {
            for (at, (mover, figures)) in Mover::ALL.into_iter().zip(&mut all).enumerate() {
                moving.store(at, Ordering::Relaxed);
                there_and_back(&cluster, &rig, mover, figures);
            }
        }
        moving.store(Mover::ALL.len(), Ordering::Relaxed);
        for client in clients {
            let seen = client.join().expect("it reads and writes");
            all.iter_mut().zip(&seen).for_each(|(figures, seen)| figures.add(seen));
        }
    });
    let count = || cluster.servers.iter().map(|server| server.client().line("DBSIZE").int()).sum::<i64>();
    wait_for("every key to be in one place", LIMIT, || count() == KEYS as i64);
    all.iter_mut().for_each(|figures| figures.took.sort_unstable());
    all
}

fn table(engine: Engine, all: &[Figures; 4]) -> String {
    let mut text = "| | keys moved a second | p50 | p99 | p99.9 | longest | errors |\n|---|---|---|---|---|---|---|\n".to_owned();
    for (mover, figures) in Mover::ALL.into_iter().zip(all) {
        let rate = if mover == Mover::Nobody { 0.0 } else { figures.keys as f64 / figures.lasted.as_secs_f64() };
        let [p50, p99, p999, longest] = [0.5, 0.99, 0.999, 1.0].map(|part| figures.quantile(part));
        let (name, errors) = (mover.name(engine), figures.refused.len());
        let _ = writeln!(text, "| {name} | {rate:.0} | {p50:.2} ms | {p99:.2} ms | {p999:.1} ms | {longest:.0} ms | {errors} |");
    }
    text
}

/// The machine's load average of the last five minutes.
fn load_before() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").expect("the system tells");
    text.split(' ').nth(1).expect("three averages").to_owned()
}

#[test]
#[ignore = "`make bench-resharding` runs it"]
fn a_million_keys_are_rebalanced() {
    let mut text = format!(
        "# A million keys are rebalanced\n\n`make bench-resharding` writes this. {KEYS} keys with values of {VALUE} bytes over {SHARDS} primaries without replicas. The last shard is \
         emptied and filled again, by turns {ROUNDS} times by each mover, so that a quarter of all keys moves twice in each turn; the time is that from the beginning of a move until \
         every slot has its owner, and for `redis-cli` that of the command. Meanwhile {CLIENTS} clients read and write random keys through one sidecar, each a command every {} ms: \
         the other columns are what they see. All on one machine of two processors, whose load before was {}: what counts is how the lines compare.\n",
        PAUSE.as_millis(),
        load_before()
    );
    let redis_8 = Engine::redis_8().map(|engine| (engine, "Redis 8"));
    for (engine, name) in [(Engine::Redis7, "Redis 7.0"), (Engine::Valkey9, "Valkey 9.1")].into_iter().chain(redis_8) {
        let all = measure(engine);
        let _ = write!(text, "\n## {name}\n\n{}", table(engine, &all));
        println!("{text}");
        let refused: Vec<&String> = all.iter().flat_map(|figures| figures.refused.iter().take(3)).collect();
        println!("{refused:?}");
        assert!(all[..2].iter().all(|figures| figures.refused.is_empty()), "clients met errors, or keys were lost");
    }
    if let Ok(file) = std::env::var("LARDER_RESHARDING_REPORT") {
        std::fs::write(&file, &text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}
