//! How long the API server waits for the webhook that gives pods their sidecar: its own histogram, and the table that is made of it.

use std::fmt::Write as _;

use reqwest::Method;

use super::scene::Scene;

const SERIES: &str = "apiserver_admission_webhook_admission_duration_seconds";
const WEBHOOK: &str = "pods.injector.larder.dev";

/// `apiserver_admission_webhook_admission_duration_seconds` of the pods' webhook, over all labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Waited {
    /// Upper bounds in seconds, ascending, the last without end; and how many questions took no longer.
    buckets: Vec<(f64, f64)>,
    seconds: f64,
    count: f64,
}

impl Waited {
    /// Up to now.
    pub async fn until_now(scene: &Scene) -> Self {
        let (_, text) = scene.plane.request(Method::GET, "/metrics", &[], None).await;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let mut waited = Self { buckets: Vec::new(), seconds: 0.0, count: 0.0 };
        for line in text.lines().filter(|line| line.contains(&format!("name=\"{WEBHOOK}\""))) {
            let Some((series, value)) = line.strip_prefix(SERIES).and_then(|rest| rest.rsplit_once(' ')) else { continue };
            let value: f64 = value.parse().expect("a number");
            match series.split_once('{') {
                Some(("_sum", _)) => waited.seconds += value,
                Some(("_count", _)) => waited.count += value,
                Some(("_bucket", labels)) => waited.add(bound(labels), value),
                _ => {}
            }
        }
        waited.buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        waited
    }

    fn add(&mut self, bound: f64, count: f64) {
        match self.buckets.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += count,
            None => self.buckets.push((bound, count)),
        }
    }

    /// What came since an earlier time.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bound: f64| earlier.buckets.iter().find(|(known, _)| *known == bound).map_or(0.0, |(_, count)| *count);
        Self {
            buckets: self.buckets.iter().map(|(bound, count)| (*bound, count - before(*bound))).collect(),
            seconds: self.seconds - earlier.seconds,
            count: self.count - earlier.count,
        }
    }

    /// How many questions.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// The bounds in seconds between which this share of the questions ended: one bucket.
    pub fn quantile(&self, share: f64) -> (f64, f64) {
        let wanted = self.count * share;
        let above = self.buckets.iter().position(|(_, count)| *count >= wanted).expect("the last bucket has all");
        (if above == 0 { 0.0 } else { self.buckets[above - 1].0 }, self.buckets[above].0)
    }

    /// As a document, where it was asked about so many pods.
    pub fn report(&self, pods: u32) -> String {
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        let mut text = format!(
            "# How long the API server waits for the injector\n\n\
             `make apiserver-tests TEST_ARGS=injected` writes this. A real API server is asked to make {pods} pods that a policy selects, one after another and as\n\
             a trial, and asks `larder operator`, built by Cargo's profile `{}`, about each. Both, and etcd, run on one machine of {processors} processors. The times\n\
             are the API server's own: `{SERIES}` of the webhook\n\
             `{WEBHOOK}`, from its question to the answer, by TLS. It tells buckets alone, so a quantile lies between two bounds.\n\n",
            super::many::profile()
        );
        let told = |(from, to): (f64, f64)| match (from * 1000.0, to * 1000.0) {
            (0.0, to) => format!("{to} ms at most"),
            (from, to) if to.is_infinite() => format!("more than {from} ms"),
            (from, to) => format!("{from} to {to} ms"),
        };
        text += "| questions | mean | p50 | p99 |\n|---|---|---|---|\n";
        let _ = writeln!(
            text,
            "| {} | {:.1} ms | {} | {} |\n",
            self.count,
            self.seconds * 1000.0 / self.count,
            told(self.quantile(0.5)),
            told(self.quantile(0.99))
        );
        text += "| answered within | questions |\n|---|---|\n";
        for (bound, count) in self.buckets.iter().filter(|(bound, _)| bound.is_finite()) {
            let _ = writeln!(text, "| {} ms | {count} |", bound * 1000.0);
        }
        text
    }
}

/// The label `le`.
fn bound(labels: &str) -> f64 {
    let text = labels.split_once("le=\"").and_then(|(_, rest)| rest.split('"').next()).expect("a bound");
    text.parse().expect("a number")
}

#[test]
fn quantiles_lie_between_two_bounds() {
    let bucket = |operation: &str, bound: &str, count: u32| {
        format!("{SERIES}_bucket{{name=\"{WEBHOOK}\",operation=\"{operation}\",type=\"admit\",le=\"{bound}\"}} {count}\n")
    };
    let text = |counts: [u32; 3]| {
        let [few, more, all] = counts;
        let of = |operation: &str| {
            bucket(operation, "0.005", few) + &bucket(operation, "0.025", more) + &bucket(operation, "+Inf", all)
        };
        let sums = format!("{SERIES}_sum{{name=\"{WEBHOOK}\"}} {}\n{SERIES}_count{{name=\"{WEBHOOK}\"}} {}\n", all * 2, all * 2);
        let other = format!("{SERIES}_count{{name=\"other\"}} 7\n");
        of("CREATE") + &of("UPDATE") + &sums + &other
    };
    let before = Waited::parse(&text([1, 1, 1]));
    let waited = Waited::parse(&text([61, 100, 101])).since(&before);
    assert_eq!((waited.count(), waited.seconds), (200.0, 200.0));
    assert_eq!((waited.quantile(0.5), waited.quantile(0.95)), ((0.0, 0.005), (0.005, 0.025)));
    assert_eq!(waited.quantile(1.0), (0.025, f64::INFINITY));
    let report = waited.report(100);
    assert!(report.contains("| 200 | 1000.0 ms | 5 ms at most | 5 to 25 ms |") && report.contains("| 25 ms | 198 |"), "{report}");
}
