//! Many CacheClusters under one operator: its memory, what it asks of the API server while nothing changes, and what a restart costs.
//!
//! `make apiserver-tests` writes the table to docs/benchmarks/operator.md. Absolute times are of one machine; what is judged is memory, and
//! counts of requests.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::audit::Entry;
use super::control_plane::User;
use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};

const PLACE: &str = "many";
/// How many CacheClusters there are, one after another.
const SIZES: [usize; 3] = [50, 100, 200];
/// The most memory that an operator may hold.
const MOST_MEMORY_KIB: u64 = 64 * 1024;
/// How long a window of counting is, at the least: several looks at everything.
const WINDOW: Duration = Duration::from_secs(40);

/// Requests of the operator.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    /// For the Lease.
    lease: usize,
    /// Watches that began.
    watches: usize,
    /// Lists and single objects that were read.
    reads: usize,
    /// Everything else.
    writes: usize,
}

impl Asked {
    fn count(audit: &[Entry]) -> Self {
        let mut asked = Self::default();
        for entry in audit.iter().filter(|entry| entry.user.username == User::Operator.name()) {
            match entry.verb.as_str() {
                // Each has a line for its beginning, and one for its end.
                "watch" => asked.watches += usize::from(!entry.is_end()),
                _ if entry.object_ref.resource == "leases" => asked.lease += 1,
                "get" | "list" => asked.reads += 1,
                _ => asked.writes += 1,
            }
        }
        asked
    }

    fn all(self) -> usize {
        self.lease + self.watches + self.reads + self.writes
    }
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    size: usize,
    formed_in: Duration,
    memory_kib: u64,
    peak_kib: u64,
    window: Duration,
    cpu: f64,
    steady: Asked,
    /// By `apiserver_request_total`: those of the API server itself among them.
    counted: u64,
    restart: Asked,
    restarted_in: Duration,
}

/// Makes as many as there are to be, and waits until all serve.
async fn form(scene: &Scene, operator: &Operator, from: usize, to: usize) -> Duration {
    let start = Instant::now();
    for number in from..to {
        scene.apply(&cache_cluster(PLACE, &format!("cache-{number:03}"))).await.expect("applied");
    }
    all_serve(operator, to).await;
    start.elapsed()
}

async fn all_serve(operator: &Operator, size: usize) {
    eventually(&format!("{size} CacheClusters"), Duration::from_secs(600), async || {
        let ready = operator.figure("larder_operator_clusters_ready", None).await;
        if ready == Some(size as f64) { Ok(()) } else { Err(format!("{ready:?} are ready\n{}", operator.log_end())) }
    })
    .await;
}

/// The operator as the sizes are gone through, and what was counted.
async fn measure(scene: &Scene, mut operator: Operator, size: usize, from: usize) -> (Operator, Row) {
    let formed_in = form(scene, &operator, from, size).await;
    scene.await_looks(&operator, size).await;

    let (counted, asked, cpu, start) =
        (scene.plane.requests().await, scene.plane.audit().len(), operator.cpu_seconds().await, Instant::now());
    while start.elapsed() < WINDOW {
        scene.await_looks(&operator, size).await;
    }
    let window = start.elapsed();
    let steady = Asked::count(&scene.plane.audit()[asked..]);
    let counted = scene.plane.requests().await.since(&counted).total();
    let cpu = (operator.cpu_seconds().await - cpu) / window.as_secs_f64();
    let (memory_kib, peak_kib) = operator.memory();

    operator.stop();
    let (asked, start) = (scene.plane.audit().len(), Instant::now());
    operator = scene.operator();
    all_serve(&operator, size).await;
    let restarted_in = start.elapsed();
    scene.await_looks(&operator, size).await;
    let restart = Asked::count(&scene.plane.audit()[asked..]);
    let peak_kib = peak_kib.max(operator.memory().1);
    let row = Row { size, formed_in, memory_kib, peak_kib, window, cpu, steady, counted, restart, restarted_in };
    println!("{row:?}");
    (operator, row)
}

/// The profile by which the operator is built.
pub fn profile() -> String {
    let directory = Path::new(env!("CARGO_BIN_EXE_larder")).parent().and_then(Path::file_name);
    directory.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn table(rows: &[Row]) -> String {
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let mut text = format!(
        "# The operator with many CacheClusters\n\n\
         `make apiserver-tests` writes this. `larder operator`, built by Cargo's profile `{}`, keeps CacheClusters of two servers and three\n\
         sentinels each, which are played (`tests/apiserver/stage`), on a real API server. That, its etcd, and those who play run beside it on\n\
         a machine of {processors} processors: times are of all of them together.\n\n",
        profile()
    );
    text += "\
        | CacheClusters | the last of them formed within | memory | at most | processor | requests a minute, nothing changing | of them for the Lease | writes | counted by the API server | requests of a restart | a CacheCluster | until all were seen again |\n\
        |---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        let minute = |count: f64| count * 60.0 / row.window.as_secs_f64();
        let mib = |kib: u64| kib as f64 / 1024.0;
        let _ = writeln!(
            text,
            "| {} | {:.0} s | {:.1} MiB | {:.1} MiB | {:.1} % | {:.0} | {:.0} | {} | {:.0} | {} | {:.1} | {:.0} s |",
            row.size,
            row.formed_in.as_secs_f64(),
            mib(row.memory_kib),
            mib(row.peak_kib),
            row.cpu * 100.0,
            minute(row.steady.all() as f64),
            minute(row.steady.lease as f64),
            row.steady.writes,
            minute(row.counted as f64),
            row.restart.all(),
            row.restart.all() as f64 / row.size as f64,
            row.restarted_in.as_secs_f64(),
        );
    }
    text + "\nThe operator's own requests are counted in the API server's audit log. \"Counted by the API server\" is `apiserver_request_total` over\n\
            the same time, which also holds what the API server asks of itself. While nothing changes the operator asks servers and sentinels,\n\
            not the API server: what is left is the Lease, and watches that begin anew every few minutes. After a restart it writes each object\n\
            once more, since somebody may have changed any of them.\n"
}

#[tokio::test]
async fn two_hundred_are_kept_in_little_memory_and_with_few_requests() {
    let scene = Scene::start(&[PLACE]).await;
    let (mut operator, mut rows, mut from) = (scene.operator(), Vec::new(), 0);
    for size in SIZES {
        let (next, row) = measure(&scene, operator, size, from).await;
        (operator, from) = (next, size);
        rows.push(row);
    }
    let clusters = scene.list("apis/larder.dev/v1alpha1/cacheclusters", PLACE).await;
    let ready = clusters.iter().filter(|cluster| cluster["status"]["summary"] == "Ready").count();
    assert_eq!(ready, SIZES[2], "as their own status says");
    assert_eq!(scene.stage.unknown_commands(), Vec::<String>::new());

    for row in &rows {
        assert!(row.peak_kib <= MOST_MEMORY_KIB, "too much memory: {row:?}");
        assert_eq!((row.steady.writes, row.steady.reads), (0, 0), "nothing changes, and the operator asks: {row:?}");
        // The Lease every three seconds, less a tenth at random, and each watch anew after five minutes at the most.
        let seconds = row.window.as_secs_f64();
        assert!((row.steady.lease as f64) < seconds / 2.5 + 2.0, "{row:?}");
        assert!((row.steady.watches as f64) < 13.0 * (seconds / 200.0 + 1.0), "{row:?}");
    }
    // A start has its lists and watches, and otherwise as much to do for each CacheCluster.
    let each = |row: &Row| row.restart.writes as f64 / row.size as f64;
    let (least, most) = (rows.iter().map(each).fold(f64::MAX, f64::min), rows.iter().map(each).fold(0.0, f64::max));
    assert!(
        most <= least * 1.15,
        "the work of a restart grows faster than the number of CacheClusters: {least} to {most} writes each"
    );
    if let Some(file) = env::var_os("LARDER_OPERATOR_REPORT") {
        fs::write(file, table(&rows)).expect("the report");
    }
}
