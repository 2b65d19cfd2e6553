//! Ten thousand sidecars, by their heartbeats, before the operator's part in caches: what it costs in time and memory, and what the cache
//! is asked.
//!
//! The operator's part runs in a process of its own, so that all that is measured is its. `LARDER_FLEET_REPORT` names the file for the
//! table. Absolute times are of one machine; what is judged is memory, and counts.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;

use super::*;
use crate::support::crowd::{Crowd, Load, Tally, Voice};

/// Bindings, and sidecars of each.
const SIZES: [(usize, usize); 2] = [(500, 20), (1, 10_000)];
/// How many rules a policy has, of which a sidecar tells.
const RULES: usize = 10;
/// How often each sidecar speaks, in all.
const ROUNDS: u64 = 4;
/// The most memory that the operator's part may take for them.
const MOST_MEMORY_KIB: u64 = 64 * 1024;

fn binding(number: usize) -> BindingName {
    BindingName::of("Deployment", &format!("shop-{number:03}"), "main")
}

/// All sidecars, by what they say.
fn crowd((bindings, sidecars): (usize, usize)) -> Crowd {
    let rules: Vec<String> = (0..RULES).map(|number| format!("rule-{number}")).collect();
    let voices = (0..bindings).map(|number| Voice::new(binding(number), rules.clone(), 1)).collect();
    Crowd { voices, each: sidecars, reads: false }
}

/// What each rule has counted by a round.
fn tally(round: u64) -> Tally {
    Tally { round, hits: (round + 1) * 1000, misses: round * 10 }
}

fn wanted(port: u16, bindings: usize, generation: u64) -> Wanted {
    let rule = |number: usize| {
        json!({"name": format!("rule-{number}"), "keys": format!("r{number}:{{id}}"),
            "strategy": {"cacheAside": {"ttl": {"default": "5m", "max": "24h", "jitter": "10%"}}}})
    };
    let rules: Vec<Json> = (0..RULES).map(rule).collect();
    let cluster = json!({"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["10.96.0.7:26379"]}}});
    let snapshot: Arc<str> = Arc::from(policy(cluster, generation, &[], &rules).to_string());
    Wanted {
        servers: Servers { servers: vec![at(port)], ..Servers::default() },
        keys: Keys::from(Entry::default()),
        bindings: (0..bindings).map(|number| (binding(number), snapshot.clone())).collect(),
    }
}

/// The operator's part, started by the test below: it answers each line of its input.
#[test]
#[ignore = "a test of scale starts it as a process of its own"]
fn the_operators_part() {
    let number = |name: &str| env::var(name).expect("the test of scale tells").parse::<usize>().expect("a number");
    let (port, bindings) = (u16::try_from(number("LARDER_FLEET_PORT")).unwrap(), number("LARDER_FLEET_BINDINGS"));
    let (lines, mut asked) = tokio::sync::mpsc::channel(1);
    thread::spawn(move || std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| lines.blocking_send(line)));
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let caches = Caches::new(Leadership::for_good(), Arc::default(), move |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        while let Some(line) = asked.recv().await {
            if let Some(generation) = line.strip_prefix("set ") {
                caches.set(&key(), Some(wanted(port, bindings, generation.parse().expect("a number"))));
                continue;
            }
            let all: Vec<Figures> = (0..bindings).filter_map(|number| caches.figures(&key(), &binding(number))).collect();
            let hits = |figures: &Figures| figures.rules.values().map(|rule| rule.hits).sum::<u64>();
            let answer = json!({
                "cpuNanos": cpu_nanos(), "memoryKib": memory_kib("VmRSS:"), "peakKib": memory_kib("VmHWM:"),
                "live": all.iter().map(|figures| figures.live).sum::<u32>(), "hits": all.iter().map(hits).sum::<u64>(),
                "least": all.iter().map(|figures| figures.live).min(), "bindings": all.len(),
                "told": told.load(Ordering::Relaxed),
            });
            println!("\n{answer}");
        }
    });
}

/// The time that this thread has run, which is the runtime's.
fn cpu_nanos() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel counts");
    text.split_ascii_whitespace().next().and_then(|nanos| nanos.parse().ok()).expect("a number")
}

fn memory_kib(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("the kernel counts");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The process with the operator's part.
struct Part {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Part {
    fn start(server: &Redis, bindings: usize) -> Self {
        let mut child = Command::new(env::current_exe().expect("this program has a file"))
            .args(["--exact", "operator_cache::scale::the_operators_part", "--ignored", "--nocapture"])
            .env("LARDER_FLEET_PORT", server.port().to_string())
            .env("LARDER_FLEET_BINDINGS", bindings.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it runs");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        Self { child, answers }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().expect("it is piped"), "{line}").expect("it reads");
    }

    fn ask(&mut self) -> Json {
        self.say("report");
        let mut line = String::new();
        while !line.starts_with('{') {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).expect("it writes"), 0, "the operator's part ended");
        }
        serde_json::from_str(&line).expect("JSON")
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every sidecar speaks until each was heard. How many heartbeats were.
fn whole_round(server: &mut Client, crowd: &Crowd, number: u64) -> usize {
    let mut heard = 0;
    for _ in 0..10 {
        let once = crowd.speak(server, tally(number));
        heard += once;
        if once == crowd.len() {
            return heard;
        }
    }
    panic!("nobody listens for as long as a round takes");
}

#[derive(Debug)]
struct Row {
    bindings: usize,
    sidecars: usize,
    written_in: Duration,
    changed_in: Duration,
    beats: u64,
    window: Duration,
    cpu_nanos: u64,
    memory_kib: u64,
    peak_kib: u64,
    load: Load,
    told: u64,
}

fn measure(size: (usize, usize)) -> Row {
    let ((bindings, sidecars), crowd) = (size, crowd(size));
    let server = Redis::start(Engine::Redis7);
    let mut client = server.client();
    let mut part = Part::start(&server, bindings);
    let empty = part.ask();
    let began = Instant::now();
    part.say("set 1");
    wait_for("all snapshots", LIMIT, || client.line("SCARD larder:bindings").int() == bindings as i64);
    let written_in = began.elapsed();
    wait_for("all channels", LIMIT, || {
        let channels = (0..bindings).map(|number| binding(number).heartbeat_channel());
        let command: Vec<String> = ["PUBSUB".to_owned(), "NUMSUB".to_owned()].into_iter().chain(channels).collect();
        client.call(&command).items().chunks(2).all(|pair| pair[1].int() == 1)
    });
    whole_round(&mut client, &crowd, 0);
    wait_for("all sidecars", LIMIT, || part.ask()["live"] == (bindings * sidecars) as u64);

    let (load, first, began) = (Load::of(&mut client), part.ask(), Instant::now());
    let beats: usize = (1..=ROUNDS).map(|number| whole_round(&mut client, &crowd, number)).sum();
    let hits = tally(ROUNDS).hits * (RULES * bindings * sidecars) as u64;
    wait_for("all counts", LIMIT, || part.ask()["hits"] == hits);
    let (last, window) = (part.ask(), began.elapsed());
    let load = Load::of(&mut client).since(load);
    assert_eq!((&last["live"], &last["least"]), (&json!(bindings * sidecars), &json!(sidecars)), "{last}");
    let fleets = (0..bindings).all(|number| {
        let told = client.call(&["GET", &binding(number).fleet_key()]);
        Fleet::parse(told.text().as_bytes()).is_ok_and(|fleet| fleet.sidecars as usize >= sidecars)
    });
    assert!(fleets, "some sidecars take too big a share");

    let mut hears = server.client();
    hears.call(&["PSUBSCRIBE", "larder:p:*"]);
    let began = Instant::now();
    part.say("set 2");
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut waiting: std::collections::BTreeSet<String> =
            (0..bindings).map(|number| binding(number).snapshot_key()).collect();
        while !waiting.is_empty() {
            let message = hears.read().expect("a message").items();
            if message[3].text() == "2" {
                waiting.remove(&message[2].text());
            }
        }
        tell.send(began.elapsed())
    });
    let changed_in = told.recv_timeout(LIMIT).expect("all are told of the change");
    let figure = |json: &Json, name: &str| json[name].as_u64().expect("a number");
    Row {
        bindings,
        sidecars,
        written_in,
        changed_in,
        beats: beats as u64,
        window,
        cpu_nanos: figure(&last, "cpuNanos") - figure(&first, "cpuNanos"),
        memory_kib: figure(&last, "memoryKib").saturating_sub(figure(&empty, "memoryKib")),
        peak_kib: figure(&last, "peakKib"),
        load,
        told: figure(&last, "told") - figure(&first, "told"),
    }
}

/// The profile by which the operator's part is built.
fn profile() -> String {
    let directory = std::path::Path::new(env!("CARGO_BIN_EXE_larder")).parent().and_then(std::path::Path::file_name);
    directory.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn table(rows: &[Row]) -> String {
    let processors = thread::available_parallelism().map_or(0, usize::from);
    let mut text = format!(
        "# Ten thousand sidecars\n\n\
         `LARDER_FLEET_REPORT=docs/benchmarks/fleet.md cargo test --profile quick --test integration operator_cache::scale` writes this. The\n\
         heartbeats of {} sidecars, each with {RULES} rules, go through a real server ({:?}) to the operator's part in caches, which runs in a\n\
         process of its own, built by Cargo's profile `{}`. That, the server and who speaks for the sidecars share a machine of {processors}\n\
         processors.\n\n\
         | bindings | sidecars of each | heartbeats | a second | processor, of one | a heartbeat | memory for all | at most, the whole process | commands a second | calls within scripts a second | figures told of | first snapshots within | a change of all within |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        SIZES[0].0 * SIZES[0].1,
        Engine::Redis7,
        profile(),
    );
    for row in rows {
        let seconds = row.window.as_secs_f64();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.0} | {:.1} % | {:.1} µs | {:.1} MiB | {:.1} MiB | {:.1} | {:.0} | {} | {:.2} s | {:.2} s |",
            row.bindings,
            row.sidecars,
            row.beats,
            row.beats as f64 / seconds,
            row.cpu_nanos as f64 / 1e9 / seconds * 100.0,
            row.cpu_nanos as f64 / 1e3 / row.beats as f64,
            row.memory_kib as f64 / 1024.0,
            row.peak_kib as f64 / 1024.0,
            row.load.commands as f64 / seconds,
            row.load.within as f64 / seconds,
            row.told,
            row.written_in.as_secs_f64(),
            row.changed_in.as_secs_f64(),
        );
    }
    text + "\nThe processor's time is that of the thread that does all of it: reading, summing, looking after the cache, and making figures. The\n\
            commands are the operator's own, without what is published on behalf of sidecars; within a script the server makes several calls for\n\
            each binding. \"A change of all\" is from saying what is wanted to the last message that tells sidecars of it. A thousand sidecars of one\n\
            binding speak every five seconds, ten thousand every twenty: here they speak four times as often as they would.\n"
}

#[test]
fn ten_thousand_sidecars_cost_little() {
    let rows: Vec<Row> = SIZES.into_iter().map(measure).collect();
    for row in &rows {
        println!("{row:?}");
        assert!(row.memory_kib <= MOST_MEMORY_KIB, "too much memory: {row:?}");
        assert!((row.load.commands as f64) <= Load::most(row.bindings, row.window), "the cache is asked too often: {row:?}");
    }
    if let Some(file) = env::var_os("LARDER_FLEET_REPORT") {
        fs::write(file, table(&rows)).expect("the report");
    }
}
