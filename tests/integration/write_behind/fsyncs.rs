//! Acknowledgements compared with what servers write to disk, as strace sees it: a process that is killed loses nothing of what it wrote, so
//! kills cannot show a missing fsync.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tempfile::TempDir;

use super::{durable, rule};
use crate::read_through::{policy, sql_origin};
use crate::support::resp::Value;
use crate::support::server::{Engine, Redis};
use crate::support::sidecar::{Sidecar, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const WRITES: usize = 20;

/// From when to when something went on, in microseconds since 1970.
type During = (u64, u64);

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_micros()).expect("a number")
}

/// The fsyncs of a server, from now on.
struct Trace {
    strace: Child,
    directory: TempDir,
}

impl Trace {
    fn of(server: &Redis) -> Self {
        Self::with(server, &[])
    }

    /// [`Trace::of`], where each takes half a second longer.
    fn of_slow(server: &Redis) -> Self {
        Self::with(server, &["-e", "inject=fsync,fdatasync:delay_enter=500000"])
    }

    fn with(server: &Redis, arguments: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let strace = Command::new("strace")
            .args(["-f", "-ttt", "-T", "-e", "trace=fsync,fdatasync", "-p", &server.pid().to_string()])
            .args(arguments)
            .arg("-o")
            .arg(directory.path().join("trace"))
            .stderr(Stdio::null())
            .spawn()
            .expect("strace runs: install it");
        let status = format!("/proc/{}/status", server.pid());
        let tracer = format!("TracerPid:\t{}\n", strace.id());
        wait_for("strace to be attached", LIMIT, || std::fs::read_to_string(&status).is_ok_and(|text| text.contains(&tracer)));
        Self { strace, directory }
    }

    /// Those until now.
    fn end(mut self) -> Vec<During> {
        let ended = Command::new("kill").args(["-INT", &self.strace.id().to_string()]).status();
        assert!(ended.is_ok_and(|status| status.success()), "strace lives");
        self.strace.wait().expect("a child");
        let text = std::fs::read_to_string(self.directory.path().join("trace")).expect("a trace");
        text.lines().filter_map(during).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// When a call went on, from a line such as `17 1796010857.123456 fdatasync(8) = 0 <0.000123>`; one that was held up has `(DELAYED)` before
/// its duration. Where another thread's came in between, a second line tells its end.
fn during(line: &str) -> Option<During> {
    let mut words = line.split_whitespace().skip(1);
    let told = micros(words.next()?)?;
    let result = line.rsplit_once(" = 0 ")?.1;
    let took = result.trim_start_matches("(DELAYED) ").strip_prefix('<')?.strip_suffix('>').and_then(micros)?;
    if line.contains("resumed>") { Some((told - took, told)) } else { Some((told, told + took)) }
}

fn micros(seconds: &str) -> Option<u64> {
    let (whole, part) = seconds.split_once('.')?;
    Some(whole.parse::<u64>().ok()? * 1_000_000 + format!("{part:0<6}").parse::<u64>().ok()?)
}

/// How many of the writes were acknowledged without an fsync between their beginning and their end.
fn without(fsyncs: &[During], writes: &[During]) -> usize {
    let covers = |write: &During| fsyncs.iter().any(|fsync| write.0 <= fsync.0 && fsync.1 <= write.1);
    writes.iter().filter(|write| !covers(write)).count()
}

fn written(mut write: impl FnMut(usize)) -> Vec<During> {
    let during = |number| {
        let began = now();
        write(number);
        (began, now())
    };
    (0..WRITES).map(during).collect()
}

#[test]
fn between_a_write_and_its_acknowledgement_all_servers_write_to_disk() {
    for engine in Engine::ALL {
        let directory = TempDir::new().expect("a temporary directory");
        let servers = durable(engine, 1);
        let url = format!("sqlite://{}/none.db", directory.path().display());
        let rules = [rule("kv", "db", "SELECT 'x' WHERE $id = 'none'", &json!({}))];
        let sidecar = Sidecar::start(&policy(sentinel_topology(&servers), 1, &[sql_origin("db", &url)], &rules));
        let mut client = sidecar.client();
        assert_eq!(client.call(&["SET", "kv:1", "first"]), Value::Simple("OK".to_owned()));
        let traces: Vec<Trace> = servers.servers.iter().map(Trace::of).collect();
        let writes = written(|number| {
            assert_eq!(client.call(&["SET", "kv:1", &number.to_string()]), Value::Simple("OK".to_owned()));
        });
        for (index, trace) in traces.into_iter().enumerate() {
            let fsyncs = trace.end();
            println!("{engine:?}, server {index}: {} fsyncs", fsyncs.len());
            assert_eq!(without(&fsyncs, &writes), 0, "{engine:?}, server {index}: {fsyncs:?} {writes:?}");
        }
    }
}

/// What the sidecar does not rely on: `WAITAOF` alone. It confirms what is yet to be written to disk, which shows where that takes its time.
#[test]
fn it_is_noticed_where_servers_confirm_what_is_not_on_disk() {
    let server = Redis::start_with(Engine::Valkey9, &["--appendonly", "yes", "--appendfsync", "everysec"]);
    let (trace, mut client) = (Trace::of_slow(&server), server.client());
    let writes = written(|number| {
        client.call(&["SET", "k", &number.to_string()]);
        assert_eq!(client.line("WAITAOF 1 0 10000").items(), [Value::Int(1), Value::Int(0)]);
    });
    let missing = without(&trace.end(), &writes);
    println!("{missing} of {WRITES} confirmations had no fsync");
    assert!(missing > 0, "with everysec each confirmation had an fsync: the check shows nothing");
}

#[test]
fn a_line_tells_when_a_call_went_on() {
    assert_eq!(during("17 100.000050 fdatasync(8) = 0 <0.000020>"), Some((100_000_050, 100_000_070)));
    assert_eq!(during("17 100.000050 fdatasync(8)   = 0 (DELAYED) <0.500000>"), Some((100_000_050, 100_500_050)));
    assert_eq!(during("17 100.000050 <... fdatasync resumed>) = 0 <0.000020>"), Some((100_000_030, 100_000_050)));
    assert_eq!(during("17 100.000050 fdatasync(8 <unfinished ...>"), None);
}
