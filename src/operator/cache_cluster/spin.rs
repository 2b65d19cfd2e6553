//! Sentinels that spin: they use a processor as long as one of their connections lasts.
//!
//! A connection that a sentinel opened while nobody stood behind the address (a Service between two pods) may come about all the same,
//! with an error on the socket that Redis and Valkey never read: the socket is ready from then on, and nothing is ever read from it
//! (redis/redis#9956). The sentinel does its work, but takes what processor there is. Ending such a connection at its other side
//! makes the sentinel open another, within a second and without anybody noticing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::plan::SentinelId;
use crate::operator::admin::{Admin, AdminError, Entry};

/// Of one processor, what a sentinel may use: many times what one uses that watches a few servers.
const SHARE: f64 = 0.08;
/// Over how much time that is measured at least.
const INTERVAL: Duration = Duration::from_secs(5);
/// For how many intervals in a row: a failover is work, too.
const INTERVALS: u8 = 2;
/// How long after one was seen to, the next may be: they are not to lose sight of the servers together.
const APART: Duration = Duration::from_secs(20);
/// How long the connections of one sentinel to one server or sentinel may take to end.
const WITHIN: Duration = Duration::from_secs(2);

/// What sentinels have used, as it was last seen.
#[derive(Debug, Default)]
pub struct Spins {
    seen: BTreeMap<SentinelId, Seen>,
    seen_to: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    at: Instant,
    used: Duration,
    intervals: u8,
}

impl Spins {
    /// Notes the processor time that each sentinel has used since it started. One that spins and is to be seen to now.
    pub fn note(&mut self, used: &BTreeMap<SentinelId, Duration>, now: Instant) -> Option<SentinelId> {
        self.seen.retain(|id, _| used.contains_key(id));
        for (id, used) in used {
            let seen = self.seen.entry(*id).or_insert(Seen { at: now, used: *used, intervals: 0 });
            let passed = now.saturating_duration_since(seen.at);
            // One that was restarted has used less than before.
            if *used < seen.used {
                *seen = Seen { at: now, used: *used, intervals: 0 };
            } else if passed >= INTERVAL {
                let spins = (*used - seen.used).as_secs_f64() > SHARE * passed.as_secs_f64();
                let intervals = if spins { seen.intervals.saturating_add(1) } else { 0 };
                *seen = Seen { at: now, used: *used, intervals };
            }
        }
        if self.seen_to.is_some_and(|at| now.saturating_duration_since(at) < APART) {
            return None;
        }
        let (id, seen) = self.seen.iter_mut().find(|(_, seen)| seen.intervals >= INTERVALS)?;
        seen.intervals = 0;
        self.seen_to = Some(now);
        Some(*id)
    }
}

/// Reads `INFO cpu`: the processor time that a process has used, its children's left out.
pub fn used(info: &str) -> Option<Duration> {
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<f64>().ok();
    Duration::try_from_secs_f64(field("used_cpu_sys:")? + field("used_cpu_user:")?).ok()
}

/// Ends the connections that the sentinel of this identity has opened to these servers and sentinels. How many there were; those who do not
/// answer are left out.
pub async fn end_connections(identity: &str, others: &[SocketAddr], entry: Entry<'_>) -> usize {
    let ended = others.iter().map(|other| async { timeout(WITHIN, end_at(identity, *other, entry)).await.ok()?.ok() });
    futures_util::future::join_all(ended).await.into_iter().flatten().sum()
}

async fn end_at(identity: &str, other: SocketAddr, entry: Entry<'_>) -> Result<usize, AdminError> {
    let mut admin = Admin::connect(other, entry).await?;
    let clients: String = admin.ask("CLIENT LIST", &[]).await?;
    let mut ended = 0;
    for id in opened_by(identity, &clients) {
        ended += admin.ask::<usize>("CLIENT KILL", &["ID", id]).await?;
    }
    Ok(ended)
}

/// The connections that a sentinel has opened, in the words of `CLIENT LIST`: it names them after the first digits of its identity.
fn opened_by<'a>(identity: &str, clients: &'a str) -> Vec<&'a str> {
    let name = format!("name=sentinel-{}-", identity.get(..8).unwrap_or(identity));
    let id = |line: &'a str| {
        let mut words = line.split(' ');
        let id = words.next()?.strip_prefix("id=")?;
        words.any(|word| word.starts_with(&name)).then_some(id)
    };
    clients.lines().filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: SentinelId = SentinelId(0);
    const SECOND: SentinelId = SentinelId(1);

    /// Looks every ten seconds at sentinels that have used so many milliseconds each; who is to be seen to at each look.
    fn looks(used: &[[u64; 2]]) -> Vec<Option<SentinelId>> {
        let (mut spins, start) = (Spins::default(), Instant::now());
        let look = |(number, used): (u64, &[u64; 2])| {
            let used = [FIRST, SECOND].into_iter().zip(used.map(Duration::from_millis)).collect();
            spins.note(&used, start + Duration::from_secs(10) * u32::try_from(number).unwrap())
        };
        (0..).zip(used).map(look).collect()
    }

    #[test]
    fn one_that_spins_is_told_after_two_intervals() {
        let found = looks(&[[0, 0], [2000, 50], [4000, 100], [6000, 150], [8000, 200]]);
        assert_eq!(found, [None, None, Some(FIRST), None, Some(FIRST)]);
    }

    #[test]
    fn what_a_failover_takes_is_no_spin() {
        assert_eq!(looks(&[[0, 0], [2000, 0], [2050, 0], [4000, 0], [4050, 0]]), [None; 5]);
    }

    #[test]
    fn one_that_was_restarted_begins_anew() {
        assert_eq!(looks(&[[50_000, 0], [52_000, 0], [0, 0], [2000, 0], [2050, 0]]), [None; 5]);
    }

    #[test]
    fn two_are_seen_to_one_after_the_other() {
        let found = looks(&[[0, 0], [2000, 2000], [4000, 4000], [4050, 6000], [4100, 8000]]);
        assert_eq!(found, [None, None, Some(FIRST), None, Some(SECOND)]);
    }

    #[test]
    fn looks_that_follow_one_another_closely_count_as_one() {
        let (mut spins, start) = (Spins::default(), Instant::now());
        let mut at = |millis: u64, used: u64| {
            spins.note(&BTreeMap::from([(FIRST, Duration::from_millis(used))]), start + Duration::from_millis(millis))
        };
        assert_eq!([at(0, 0), at(1500, 900), at(3000, 950), at(4500, 960), at(6000, 970)], [None; 5], "a burst of a second");
    }

    #[test]
    fn processor_time_is_read() {
        let info = "# CPU\r\nused_cpu_sys:82.577384\r\nused_cpu_user:19.837565\r\nused_cpu_sys_children:0.002844\r\n";
        assert_eq!(used(info).map(|used| used.as_millis()), Some(102_414));
        assert_eq!(used("# CPU\r\n"), None);
    }

    #[test]
    fn a_sentinels_own_connections_are_found() {
        let clients = "id=47 addr=10.244.2.59:39012 name=sentinel-21ef7001-cmd age=51\n\
                       id=48 addr=10.244.2.59:39014 name=sentinel-21ef7001-pubsub age=51\n\
                       id=157 addr=10.244.1.94:59786 name=sentinel-b3d2c674-cmd age=19\nid=9 addr=10.244.1.94:1 name= age=19\n";
        assert_eq!(opened_by("21ef7001d68c5d39faec662279c5a800936649f6", clients), ["47", "48"]);
    }
}
