//! Many policies under one operator: what they take of it when they come, when one of them changes, and while nothing does.
//!
//! `make apiserver-tests` writes the table to docs/benchmarks/policies.md. Absolute times are of one machine; what is judged is memory,
//! counts of requests and of merges, and how the work of one change grows with the number of policies.

mod sidecars;
mod speaker;

use std::collections::BTreeMap;
use std::env;
use std::fmt::{Debug, Write as _};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ConfigMap;
use larder::api::CacheCluster;
use larder::policy::binding::BindingName;
use serde_json::{Value, json};

use super::audit::Entry;
use super::control_plane::User;
use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};

/// All of them; the first alone where policies are of one namespace.
const PLACES: [&str; 5] = ["one", "two", "three", "four", "five"];
/// Policies of each workload, and rules of each policy.
const EACH: usize = 4;
const RULES: usize = 2;
/// Workloads of one namespace, one size after another, and of several.
const SIZES: [usize; 3] = [31, 62, 125];
const SPREAD: usize = 25;
/// How many changes are timed.
const CHANGES: usize = 100;
/// The most memory that an operator may hold, and the most for each policy that is more.
const MOST_MEMORY_KIB: u64 = 96 * 1024;
const MOST_FOR_EACH_KIB: f64 = 48.0;
/// The most workloads that are merged for one change, of one workload, on average.
const MOST_MERGES: f64 = 1.1;
/// How often something is measured at the most.
const TRIES: usize = 5;
/// How long nothing changes, at the least: each namespace is looked at about once a minute.
const WINDOW: Duration = Duration::from_secs(70);
const LONG: Duration = Duration::from_secs(600);
/// Longer than earlier keys work after a change of them.
const SETTLED: Duration = Duration::from_secs(1200);
/// Longer than a status is held back after another.
const QUIET: Duration = Duration::from_secs(15);
/// How often a ConfigMap is asked for while a change is timed.
const ASK_AGAIN: Duration = Duration::from_millis(5);
/// What begins the part of the report that is of sidecars.
const SECTION: &str = "\n## With ten thousand sidecars\n\n";

fn workload(number: usize) -> String {
    format!("app-{number:03}")
}

fn deployment(place: &str, name: &str) -> Value {
    let labels = json!({"app": name});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": place, "name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "app", "image": "app:1"}]}},
        },
    })
}

/// One of a workload's policies: the first loads from a database, the others know what the application stores.
fn policy(place: &str, app: &str, number: usize, ttl: &str) -> Value {
    let rule = |rule: usize| {
        let mut rule = json!({"name": format!("rule-{rule}"), "keys": format!("p{number}-{rule}:{{id}}"), "ttl": ttl,
            "strategy": if number == 0 { "ReadThrough" } else { "CacheAside" }});
        if number == 0 {
            rule["origin"] = json!({"name": "db", "read": "SELECT name, price, changed_at FROM items WHERE id = $id"});
        }
        rule
    };
    let mut policy = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
        "metadata": {"namespace": place, "name": format!("{app}-{number}")},
        "spec": {
            "cacheCluster": "main", "workloads": {"matchLabels": {"app": app}}, "rules": (0..RULES).map(rule).collect::<Vec<_>>(),
        },
    });
    if number == 0 {
        policy["spec"]["origins"] = json!([{"name": "db", "sql": {"url": {"secretKeyRef": {"name": "db", "key": "url"}}}}]);
    }
    policy
}

/// Requests of the operator.
#[derive(Debug, Clone, Default)]
struct Asked {
    reads: usize,
    writes: usize,
    /// Of the writes, those of the objects of bindings.
    objects: usize,
    /// How many of each kind, as `verb group/resource name`; names of bindings' objects and of policies are left out.
    kinds: BTreeMap<String, usize>,
}

impl Asked {
    /// But for watches, and for the Lease, which is asked for whatever there is.
    fn count(audit: &[Entry]) -> Self {
        let mut asked = Self::default();
        let of_operator = audit.iter().filter(|entry| entry.user.username == User::Operator.name());
        for entry in of_operator.filter(|entry| entry.verb != "watch" && entry.object_ref.resource != "leases") {
            // One that is made has its name in the request alone, which is not part of its address.
            let is_object = entry.object_ref.name.starts_with("larder-b-");
            let is_one_of_many = is_object || entry.object_ref.resource == "cachepolicies";
            let name = if is_one_of_many { "" } else { entry.object_ref.name.as_str() };
            *asked.kinds.entry(format!("{} {name}", entry.right())).or_default() += 1;
            match entry.verb.as_str() {
                "get" | "list" => asked.reads += 1,
                _ => {
                    asked.writes += 1;
                    asked.objects += usize::from(is_object);
                }
            }
        }
        asked
    }
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    places: usize,
    workloads: usize,
    arrived_in: Duration,
    arrival: Asked,
    /// How many policies came, of all that there are.
    came: usize,
    changing: Changing,
    steady: Peace,
    memory_kib: u64,
    peak_kib: u64,
    restart: Asked,
}

/// While policies changed, one after another.
#[derive(Debug)]
struct Changing {
    /// From the answer to an apply to the ConfigMap, sorted.
    took: Vec<Duration>,
    /// Seconds of a processor for each.
    cpu: f64,
    /// For all of them.
    asked: Asked,
    /// Workloads for each.
    merges: f64,
}

/// While nothing changed.
#[derive(Debug)]
struct Peace {
    /// The share of a processor.
    cpu: f64,
    asked: Asked,
    counted_a_minute: f64,
    merges: f64,
}

impl Peace {
    fn is_quiet(&self) -> bool {
        self.merges < 1.0 && self.asked.reads + self.asked.writes == 0
    }
}

impl Row {
    fn policies(&self) -> usize {
        self.workloads * EACH
    }

    fn quantile(&self, share: f64) -> Duration {
        let took = &self.changing.took;
        took[((took.len() - 1) as f64 * share).round() as usize]
    }
}

/// Policies at work in some namespaces, with one operator.
struct Many {
    scene: Scene,
    operator: Option<Operator>,
    places: &'static [&'static str],
    /// Workloads of each namespace.
    each: usize,
    /// How many policies were changed so far: each change is another.
    changes: usize,
}

impl Many {
    async fn begin(places: &'static [&'static str]) -> Self {
        let scene = Scene::start(places).await;
        let operator = scene.operator();
        for place in places {
            scene.apply(&cache_cluster(place, "main")).await.expect("applied");
            let database = json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": place, "name": "db"},
                "stringData": {"url": "postgres://app:hidden@db/shop"},
            });
            scene.apply(&database).await.expect("a Secret");
        }
        for place in places {
            scene.await_ready(&operator, place, "main").await;
        }
        Self { scene, operator: Some(operator), places, each: 0, changes: 0 }
    }

    fn operator(&self) -> &Operator {
        self.operator.as_ref().expect("it runs")
    }

    /// Waits until the operator's own figures say that all is as it is to be, and then sees for itself.
    async fn await_delivered(&self) {
        let wanted = (self.places.len() * self.each * EACH) as f64;
        eventually("all policies are kept", LONG, async || {
            let policies = self.operator().figure("larder_operator_policies", None).await;
            if policies == Some(wanted) { Ok(()) } else { Err(format!("{policies:?}\n{}", self.operator().log_end())) }
        })
        .await;
        for place in self.places {
            eventually("all policies are delivered", LONG, async || {
                // Half a megabyte each time: this is not to be what the API server is busy with.
                tokio::time::sleep(Duration::from_millis(900)).await;
                let policies = self.scene.list("apis/larder.dev/v1alpha1/cachepolicies", place).await;
                let is_told = |policy: &&Value| {
                    let status = &policy["status"];
                    status["summary"] == "Delivered" && status["observedGeneration"] == policy["metadata"]["generation"]
                };
                let open = policies.iter().find(|policy| !is_told(policy));
                match open {
                    None => Ok(()),
                    Some(policy) => Err(format!("{policy:#}\n{}", self.operator().log_end())),
                }
            })
            .await;
        }
    }

    /// Waits until every namespace has been looked at once more.
    async fn await_looks(&self) {
        let looks = async || self.operator().figure("larder_operator_policy_looks_total", Some("ok")).await.unwrap_or_default();
        let wanted = looks().await + self.places.len() as f64;
        eventually("looks at policies", LONG, async || {
            let looks = looks().await;
            if looks >= wanted { Ok(()) } else { Err(format!("{looks} of {wanted}")) }
        })
        .await;
    }

    /// Waits until the operator has written nothing for longer than it holds a status back.
    async fn await_quiet(&self) {
        let (mut seen, mut since) = (usize::MAX, Instant::now());
        eventually("nothing is written", LONG, async || {
            tokio::time::sleep(Duration::from_millis(900)).await;
            let writes = self.asked_since(0).writes;
            if writes != seen {
                (seen, since) = (writes, Instant::now());
            }
            if since.elapsed() > QUIET { Ok(()) } else { Err(format!("{writes} writes so far")) }
        })
        .await;
    }

    fn asked_since(&self, from: usize) -> Asked {
        Asked::count(&self.scene.plane.audit()[from..])
    }

    /// Workloads and policies come, until there are `each` workloads in each namespace.
    async fn arrive(&mut self, each: usize) -> (Duration, Asked) {
        let (from, asked) = (self.each, self.scene.plane.audit().len());
        for place in self.places {
            for number in from..each {
                self.scene.apply(&deployment(place, &workload(number))).await.expect("a Deployment");
            }
        }
        let start = Instant::now();
        for place in self.places {
            for (app, number) in (from..each).flat_map(|app| (0..EACH).map(move |number| (app, number))) {
                self.scene.apply(&policy(place, &workload(app), number, "10m")).await.expect("a policy");
            }
        }
        self.each = each;
        self.await_delivered().await;
        let arrived_in = start.elapsed();
        self.await_quiet().await;
        (arrived_in, self.asked_since(asked))
    }

    /// Changes the TTL of one policy. How long it took until the ConfigMap of its workload said so.
    async fn change(&mut self) -> Duration {
        let number = self.changes;
        self.changes += 1;
        let place = self.places[number % self.places.len()];
        let app = workload(number / self.places.len() % self.each);
        let ttl = format!("{}s", 1000 + number);
        self.scene.apply(&policy(place, &app, 1 + number % (EACH - 1), &ttl)).await.expect("a policy");
        let (start, maps) = (Instant::now(), self.scene.api::<ConfigMap>(place));
        let name = BindingName::of("Deployment", &app, "main").object_name();
        // As the snapshot writes it.
        let wanted = format!(r#""default":"{}""#, ttl.parse::<larder::policy::Span>().expect("a span"));
        loop {
            let map = maps.get(&name).await.expect("a ConfigMap");
            if map.data.into_iter().flatten().any(|(_, text)| text.contains(&wanted)) {
                return start.elapsed();
            }
            assert!(start.elapsed() < LONG, "{place}/{app} has no {wanted}: {}", self.operator().log_end());
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    async fn merges(&self) -> f64 {
        self.operator().figure("larder_operator_policy_merges_total", None).await.unwrap_or_default()
    }

    /// Measures again, a few times, what does not fit while the operator got no answers for seconds, as on a machine that stands still: that
    /// is of something else. Whatever else was measured counts.
    async fn undisturbed<T: Debug>(&mut self, mut measure: impl AsyncFnMut(&mut Self) -> T, fits: impl Fn(&T) -> bool) -> T {
        for _ in 1..TRIES {
            let silences = self.operator().silences();
            let measured = measure(self).await;
            if fits(&measured) || self.operator().silences() == silences {
                return measured;
            }
            println!("once more, after {measured:#?}");
        }
        measure(self).await
    }

    async fn change_all(&mut self) -> Changing {
        let (asked, cpu, merges) = (self.scene.plane.audit().len(), self.operator().cpu_seconds().await, self.merges().await);
        let mut took = Vec::new();
        for _ in 0..CHANGES {
            took.push(self.change().await);
        }
        took.sort_unstable();
        self.await_delivered().await;
        self.await_quiet().await;
        let each = |sum: f64| sum / CHANGES as f64;
        let cpu = each(self.operator().cpu_seconds().await - cpu);
        Changing { took, cpu, asked: self.asked_since(asked), merges: each(self.merges().await - merges) }
    }

    /// Waits until no user can do anything any more that it could do before its keys changed: ten minutes after servers have proved a change, one
    /// Secret is written for that, and two statuses, which are of the change and not of the time without one.
    async fn await_settled_users(&self) {
        for place in self.places {
            let clusters = self.scene.api::<CacheCluster>(place);
            eventually("users lose what they could do before", SETTLED, async || {
                tokio::time::sleep(Duration::from_millis(900)).await;
                let status = clusters.get("main").await.map_err(|error| error.to_string())?.status;
                let phase = status.and_then(|status| status.users).map(|users| users.phase);
                if phase.as_deref() == Some("Settled") { Ok(()) } else { Err(format!("{place}: {phase:?}")) }
            })
            .await;
        }
    }

    async fn watch_peace(&self) -> Peace {
        self.await_quiet().await;
        let (counted, from, merges) = (self.scene.plane.requests().await, self.scene.plane.audit().len(), self.merges().await);
        let (cpu, start) = (self.operator().cpu_seconds().await, Instant::now());
        while start.elapsed() < WINDOW {
            self.await_looks().await;
        }
        let seconds = start.elapsed().as_secs_f64();
        Peace {
            cpu: (self.operator().cpu_seconds().await - cpu) / seconds,
            asked: self.asked_since(from),
            counted_a_minute: self.scene.plane.requests().await.since(&counted).total() as f64 * 60.0 / seconds,
            merges: self.merges().await - merges,
        }
    }

    async fn measure(&mut self, each: usize) -> Row {
        let came = self.places.len() * (each - self.each) * EACH;
        let (arrived_in, arrival) = self.arrive(each).await;

        let changing = self.undisturbed(Self::change_all, |changing| changing.merges <= MOST_MERGES).await;
        self.await_settled_users().await;
        let steady = self.undisturbed(async |many| many.watch_peace().await, Peace::is_quiet).await;
        let (memory_kib, mut peak_kib) = self.operator().memory();

        self.operator.take().expect("it runs").stop();
        let asked = self.scene.plane.audit().len();
        self.operator = Some(self.scene.operator());
        self.await_delivered().await;
        self.await_quiet().await;
        let restart = self.asked_since(asked);
        peak_kib = peak_kib.max(self.operator().memory().1);
        let (places, workloads) = (self.places.len(), self.places.len() * each);
        let row = Row { places, workloads, arrived_in, arrival, came, changing, steady, memory_kib, peak_kib, restart };
        println!("{row:?}");
        row
    }
}

fn table(rows: &[Row]) -> String {
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let mut text = format!(
        "# The operator with many CachePolicies\n\n\
         `make apiserver-tests TEST_ARGS=five_hundred` writes this. `larder operator`, built by Cargo's profile `{}`, keeps policies of {RULES} rules, {EACH} for each\n\
         workload, one of them with an origin, on a real API server. That, its etcd, and those who play servers, sentinels and kubelets run\n\
         beside it on a machine of {processors} processors: times are of all of them together.\n\n",
        super::many::profile()
    );
    text += "\
        | policies | workloads | namespaces | until the last that came was delivered | requests of the operator for each that came | a changed policy is in its ConfigMap, p50 | p99 | processor for a change | requests for a change | workloads merged for a change | memory | at most | processor, nothing changing | requests, nothing changing | counted by the API server, a minute | objects of bindings written by a restart |\n\
        |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        let mib = |kib: u64| kib as f64 / 1024.0;
        let each = |count: usize, of: usize| count as f64 / of as f64;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} policies within {:.0} s | {:.1} | {} ms | {} ms | {:.1} ms | {:.1} | {:.1} | {:.1} MiB | {:.1} MiB | {:.1} % | {} | {:.0} | {} |",
            row.policies(),
            row.workloads,
            row.places,
            row.came,
            row.arrived_in.as_secs_f64(),
            each(row.arrival.reads + row.arrival.writes, row.came),
            row.quantile(0.5).as_millis(),
            row.quantile(0.99).as_millis(),
            row.changing.cpu * 1000.0,
            each(row.changing.asked.reads + row.changing.asked.writes, CHANGES),
            row.changing.merges,
            mib(row.memory_kib),
            mib(row.peak_kib),
            row.steady.cpu * 100.0,
            row.steady.asked.reads + row.steady.asked.writes,
            row.steady.counted_a_minute,
            row.restart.objects,
        );
    }
    text + "\nThe operator's own requests are counted in the API server's audit log, without its watches and its Lease. A change is of a TTL, one policy\n\
            at a time; it is timed from the API server's answer. For it the operator keeps the snapshot as it was, writes the ConfigMap, deletes the\n\
            snapshot of long ago, and writes the status of each policy of that workload, at most one in ten seconds. A change of keys also waits until every server\n\
            knows them. \"Counted by the API server\" is `apiserver_request_total` over the time in which nothing changes, and also holds what the\n\
            API server asks of itself. No sidecar speaks here: what follows is with them.\n"
}

/// Writes one part of the report, and leaves the other as it is: what policies cost by themselves, and what they cost with sidecars.
fn write_report(file: &Path, alone: Option<String>, with_sidecars: Option<String>) {
    let there = fs::read_to_string(file).unwrap_or_default();
    let (before, after) = there.split_once(SECTION).unwrap_or((&there, ""));
    let (alone, with_sidecars) = (alone.unwrap_or_else(|| before.to_owned()), with_sidecars.unwrap_or_else(|| after.to_owned()));
    fs::write(file, alone + SECTION + &with_sidecars).expect("the report");
}

/// What is the same for every number of policies, and what grows no faster than it.
fn check(rows: &[Row]) {
    for row in rows {
        assert!(row.peak_kib <= MOST_MEMORY_KIB, "too much memory: {row:?}");
        assert!(row.steady.is_quiet(), "nothing changes, and the operator asks or merges: {row:?}");
        assert!(row.changing.merges <= MOST_MERGES, "a change concerns one workload: {row:?}");
        let writes = row.changing.asked.writes as f64 / CHANGES as f64;
        // The snapshot as it was kept, the one that is mounted, the one of long ago, and a status of each policy of the workload.
        assert!((2.0..=4.0 + EACH as f64).contains(&writes), "{writes} writes for a change: {row:?}");
        assert!(row.changing.asked.reads <= CHANGES, "{row:?}");
        assert_eq!(row.restart.objects, 0, "a restart writes what is there already: {row:?}");
    }
    let (first, last) = (&rows[0], &rows[SIZES.len() - 1]);
    let for_each = last.peak_kib.saturating_sub(first.peak_kib) as f64 / (last.policies() - first.policies()) as f64;
    assert!(for_each <= MOST_FOR_EACH_KIB, "{for_each} KiB for each policy that is more");
    let growth = last.policies() as f64 / first.policies() as f64;
    let work = last.changing.cpu / first.changing.cpu;
    assert!(work <= growth * 1.5, "{growth} times as many policies make a change cost {work} times as much");
}

#[tokio::test]
async fn five_hundred_policies_cost_little_to_keep_and_little_to_change() {
    let mut rows = Vec::new();
    let mut many = Many::begin(&PLACES[..1]).await;
    for size in SIZES {
        rows.push(many.measure(size).await);
    }
    drop(many);
    let mut many = Many::begin(&PLACES).await;
    rows.push(many.measure(SPREAD).await);
    check(&rows);
    if let Some(file) = env::var_os("LARDER_POLICIES_REPORT") {
        write_report(file.as_ref(), Some(table(&rows)), None);
    }
}
