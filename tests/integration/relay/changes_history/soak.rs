//! Many histories, and a report of them.

use std::fmt::Write as _;
use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use super::{Plan, Seen, play};
use crate::read_through::Servers;
use crate::support::histories::{from_environment, play_all};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};

/// A Cluster, a Sentinel tier whose servers evict whatever key they meet, and one of the other engine, by turns.
fn servers(seed: u64) -> Servers {
    match seed % 3 {
        0 => Servers::Cluster(RedisCluster::start(Engine::Valkey9, 3, 1)),
        1 => Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1)),
        _ => Servers::Sentinel(SentinelCluster::start(Engine::Redis7, 1)),
    }
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.histories += other.histories;
        let (sum, more) = (&mut self.verdict, other.verdict);
        sum.reads += more.reads;
        sum.held += more.held;
        sum.commits += more.commits;
        sum.gaps += more.gaps;
        sum.wrong.extend(more.wrong);
        sum.delays.extend(more.delays);
        for (sum, more) in [(&mut self.errors, other.errors), (&mut self.evicted, other.evicted)] {
            more.into_iter().for_each(|(text, count)| *sum.entry(text).or_default() += count);
        }
    }

    /// How long it took of this share of commits at the most.
    fn delay(&self, share: f64) -> Duration {
        let at = (self.verdict.delays.len() as f64 * share) as usize;
        self.verdict.delays.get(at.min(self.verdict.delays.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// `LARDER_SOAK_SEED=1000` begins with another.
#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    let (first, seeds) = (from_environment("LARDER_SOAK_SEED", 1_000), from_environment("LARDER_SOAK_SEEDS", 200));
    let began = Instant::now();
    let mut sum = Seen::default();
    // One that a busy machine brings to no end takes no others with it.
    let play_fully = |seed| catch_unwind(|| play(servers(seed), &Plan::full(seed))).ok();
    let played = play_all(first..first + seeds, play_fully);
    let unended = played.iter().filter(|seen| seen.is_none()).count();
    played.into_iter().flatten().for_each(|seen| sum.add(seen));
    sum.verdict.delays.sort_unstable();
    if let Ok(file) = std::env::var("LARDER_SOAK_CHANGES_REPORT") {
        std::fs::write(&file, report(&sum, unended, began.elapsed())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    sum.assert_right();
    assert_eq!(unended, 0, "histories came to no end");
}

fn report(sum: &Seen, unended: usize, took: Duration) -> String {
    let mut text = format!(
        "# Soak: database changes under faults\n\n`make soak` writes this. {} histories against real servers, sidecars, relays and Postgres (two thirds \
         of them under Sentinel, one in Cluster; in one third servers evict keys at random), {} s.\nWhat happens in each, and what each read is held \
         to: `tests/integration/relay/changes_history`.\n\n| | |\n|---|---|\n",
        sum.histories,
        took.as_secs()
    );
    let evicted: u64 = sum.evicted.values().sum();
    let evicted_of = |kind: &str| sum.evicted.get(kind).copied().unwrap_or_default();
    let seconds = |span: Duration| format!("{:.2} s", span.as_secs_f64());
    for (what, figure) in [
        ("histories beside these that came to no end, since servers did not", unended.to_string()),
        ("commits", sum.verdict.commits.to_string()),
        ("reads", sum.verdict.reads.to_string()),
        ("reads that began behind the moment when some commit of their row was carried out", sum.verdict.held.to_string()),
        (
            "relays, sidecars and primaries that were killed, and relays and sidecars that stood still, of each",
            sum.histories.to_string(),
        ),
        (
            "databases restarted, readers of slots ended, slots dropped where nobody had gone on to read them yet, positions and states lost, of each",
            sum.histories.to_string(),
        ),
        ("keys evicted", evicted.to_string()),
        ("versions among them", evicted_of("larder:v").to_string()),
        (
            "of them what is kept of the feed, and the stream of events",
            format!("{}, {}", evicted_of("larder:cs"), evicted_of("larder:events")),
        ),
        ("from a commit until it is carried out, half of them", seconds(sum.delay(0.5))),
        ("ninety-nine in a hundred", seconds(sum.delay(0.99))),
        ("the longest", seconds(sum.delay(1.0))),
        ("time in which what is kept of the feed was lost, of all histories", seconds(sum.verdict.gaps)),
        (
            "**wrong: values older than what was carried out, or of what was never committed, and old values at the end**",
            sum.verdict.wrong.len().to_string(),
        ),
    ] {
        let _ = writeln!(text, "| {what} | {figure} |");
    }
    sum.verdict.wrong.iter().for_each(|wrong| {
        let _ = write!(text, "\n- {wrong}\n");
    });
    text
}
