//! Pods that read rows through the cache over and over, and are judged by when these changed.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::database::Database;
use super::install::PLACE;

/// Reads all rows over and over until each has shown a number that is the last one or later, for so many seconds at the most. Says that it reads
/// once it has read each, and in the end when each value of each was seen last, in milliseconds since 1970.
const READER: &str = "
import json, os, sys, time, redis
client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=15)
prefix, rows, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), time.time() + float(sys.argv[4])
seen, refused, left, reads = {}, 0, set(range(1, rows + 1)), False
while left and time.time() < end:
    for row in range(1, rows + 1):
        try:
            value = client.get('%s:%d' % (prefix, row))
        except redis.RedisError as error:
            refused += 1
            continue
        if value is not None:
            seen.setdefault(str(row), {})[value.decode()] = int(time.time() * 1000)
            if int(value) >= last: left.discard(row)
    if not reads and len(seen) == rows:
        reads = True
        print('reads', flush=True)
    time.sleep(0.02)
print(json.dumps({'seen': seen, 'refused': refused}))
";

/// For each row, each value that a pod saw, and when it saw that last; or each value that it had, and since when.
pub type Seen = BTreeMap<String, BTreeMap<u64, u64>>;

/// A pod that reads.
pub struct Reader {
    pod: String,
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl Reader {
    /// Has a pod read the keys `PREFIX:1` and so on, until each has shown `last` or more, for so long at the most.
    pub fn begin(pod: &str, prefix: &str, rows: u32, (last, most): (u64, Duration)) -> Self {
        let [rows, last, seconds] = [u64::from(rows), last, most.as_secs()].map(|number| number.to_string());
        let mut command = Command::new("kubectl");
        command.args(["-n", PLACE, "exec", pod, "-c", "app", "--", "python3", "-c", READER, prefix, &rows, &last, &seconds]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kubectl runs");
        let said = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        Self { pod: pod.to_owned(), child, said }
    }

    /// Waits until it has read every key once.
    pub fn await_reading(&mut self) {
        let line = self.line();
        assert_eq!(line, "reads", "{}", self.pod);
    }

    /// What it has seen, once it has ended.
    pub fn finish(mut self) -> Seen {
        let mut line = self.line();
        if line == "reads" {
            line = self.line();
        }
        self.child.wait().expect("a child");
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{}: {error}: {line}", self.pod));
        eprintln!("{}: {} reads were refused while something was away", self.pod, said["refused"]);
        let seen: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_value(said["seen"].clone()).expect("what was seen");
        let number = |(value, at): (String, u64)| (value.parse().expect("a number"), at);
        seen.into_iter().map(|(row, values)| (row, values.into_iter().map(number).collect())).collect()
    }

    fn line(&mut self) -> String {
        let line = self.said.next().unwrap_or_else(|| panic!("{} says no more", self.pod));
        line.unwrap_or_else(|error| panic!("{}: {error}", self.pod))
    }
}

/// What one pod sees while it reads for so long.
pub fn read(pod: &str, prefix: &str, rows: u32, lasts: Duration) -> Seen {
    Reader::begin(pod, prefix, rows, (u64::MAX, lasts)).finish()
}

/// What a table `(id, value, at)` has noted: for each row the values that it had, and since when, in milliseconds since 1970.
pub fn history(database: &Database, table: &str) -> Seen {
    let mut history = Seen::new();
    for line in database.sql(&format!("SELECT id || ' ' || value || ' ' || at FROM {table}")).lines() {
        let mut words = line.split(' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect("a number");
        let (row, value, at) = (number(), number(), number());
        history.entry(row.to_string()).or_default().insert(value, at);
    }
    history
}

/// What was seen for longer than `bound` after the next value was there: the row, the value, and for how long in milliseconds. What every pod
/// must have seen in the end is the last value, where it went on reading for long enough.
pub fn late(seen: &Seen, history: &Seen, bound: Duration) -> Vec<(String, u64, u64)> {
    let bound = u64::try_from(bound.as_millis()).expect("a bound");
    let mut late = Vec::new();
    let end = seen.values().flat_map(BTreeMap::values).max().copied().unwrap_or_default();
    for (row, values) in history {
        let seen = seen.get(row).unwrap_or_else(|| panic!("row {row} was never read"));
        for (value, last) in seen {
            if let Some((_, since)) = values.range(value + 1..).next()
                && last.saturating_sub(*since) > bound
            {
                late.push((row.clone(), *value, last - since));
            }
        }
        if let Some((newest, at)) = values.last_key_value()
            && !seen.contains_key(newest)
            && at + bound < end
        {
            late.push((row.clone(), *newest, *at));
        }
    }
    late
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(values: &[(u64, u64)]) -> Seen {
        Seen::from([("1".to_owned(), values.iter().copied().collect())])
    }

    #[test]
    fn what_is_seen_for_too_long_or_never_is_late() {
        let (history, bound) = (seen(&[(1, 10_000), (2, 20_000)]), Duration::from_secs(5));
        assert_eq!(late(&seen(&[(0, 14_000), (1, 25_000), (2, 40_000)]), &history, bound), []);
        let (row, too_long) = ("1".to_owned(), seen(&[(1, 25_001), (2, 40_000)]));
        assert_eq!(late(&too_long, &history, bound), [(row.clone(), 1, 5_001)]);
        assert_eq!(late(&seen(&[(1, 25_000)]), &history, bound), [], "it read no longer");
        assert_eq!(late(&seen(&[(1, 25_001)]), &history, bound), [(row.clone(), 1, 5_001), (row, 2, 20_000)]);
    }
}
