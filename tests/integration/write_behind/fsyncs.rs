//! Acknowledgements compared with what servers write to disk, as strace sees it: a process that is killed loses nothing of what it wrote, so
//! kills cannot show a missing fsync.
//!
//! Any fsync during a write does not do: the mark before the entry and the script after it go to disk as well. It has to be one that began once
//! the very entry was in the file.

use std::collections::HashMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tempfile::TempDir;

use super::{DURABLE, durable, rule, write_to_disk};
use crate::read_through::{policy, sql_origin};
use crate::support::resp::{Client, Value};
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

/// A call that is about an append-only file.
#[derive(Debug)]
struct Call {
    name: String,
    /// Its descriptor, and the path behind it.
    file: String,
    /// The line with its arguments: what it writes is there, as strace escapes it.
    line: String,
    during: During,
}

impl Call {
    fn is_fsync(&self) -> bool {
        ["fsync", "fdatasync"].contains(&self.name.as_str())
    }

    /// Whether it writes the entry of the journal that has this value: an `XADD` whose field `v` that is, before the field `b`. The value alone
    /// would not tell: the dirty index, and at the end the key itself, get it by other commands.
    fn carries(&self, value: &str) -> bool {
        let fields = format!(r"$1\r\nv\r\n${}\r\n{value}\r\n$1\r\nb\r\n", value.len());
        !self.is_fsync() && ["XADD", "larder:j:", fields.as_str()].into_iter().all(|part| self.line.contains(part))
    }
}

/// What a server writes to its append-only files, and its fsyncs of them, from now on.
struct Trace {
    strace: Child,
    directory: TempDir,
}

impl Trace {
    fn of(server: &Redis) -> Self {
        Self::with(server, &[])
    }

    /// [`Trace::of`], where each fsync takes half a second longer.
    fn of_slow(server: &Redis) -> Self {
        Self::with(server, &["-e", "inject=fsync,fdatasync:delay_enter=500000"])
    }

    fn with(server: &Redis, arguments: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let strace = Command::new("strace")
            .args(["-f", "-y", "-ttt", "-T", "-s", "16384", "-e", "trace=fsync,fdatasync,write,pwrite64,writev"])
            .args(["-p", &server.pid().to_string()])
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
    fn end(mut self) -> Vec<Call> {
        let ended = Command::new("kill").args(["-INT", &self.strace.id().to_string()]).status();
        assert!(ended.is_ok_and(|status| status.success()), "strace lives");
        self.strace.wait().expect("a child");
        let text = std::fs::read_to_string(self.directory.path().join("trace")).expect("a trace");
        calls(&text)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// The calls of a trace that are about append-only files. Sockets are left out: replicas are sent the same bytes.
fn calls(trace: &str) -> Vec<Call> {
    let (mut begun, mut calls) = (HashMap::new(), Vec::new());
    for line in trace.lines() {
        let thread = line.split_whitespace().next();
        if line.ends_with("<unfinished ...>") {
            begun.insert(thread, line);
        } else {
            // The second line of a call that was held up has neither its file nor what it wrote.
            let first = begun.remove(&thread).unwrap_or(line);
            calls.extend(during(line).and_then(|(_, end)| call(first, end)));
        }
    }
    calls
}

/// The call that began with this line, such as `17 1796010857.123456 write(8</x/appendonly.aof.1.incr.aof>, "…", 5) = 5 <0.000123>`.
fn call(line: &str, end: u64) -> Option<Call> {
    let (before, arguments) = line.split_once('(')?;
    let (file, _) = arguments.split_once('>')?;
    let (name, file) = (before.split_whitespace().last()?.to_owned(), file.to_owned());
    file.contains("appendonly.aof").then_some(Call { name, file, line: line.to_owned(), during: (told(line)?, end) })
}

/// When a call went on, from a line such as `17 1796010857.123456 fdatasync(8) = 0 <0.000123>`; one that was held up has `(DELAYED)` before
/// its duration. Where another thread's came in between, a second line tells its end. `None` for one that failed: its result is negative.
fn during(line: &str) -> Option<During> {
    let told = told(line)?;
    let (result, took) = line.rsplit_once(" = ")?.1.split_once(' ')?;
    result.parse::<u64>().ok()?;
    let took = took.trim_start_matches("(DELAYED) ").strip_prefix('<')?.strip_suffix('>').and_then(micros)?;
    let is_second = line.split_whitespace().nth(2) == Some("<...");
    if is_second { Some((told - took, told)) } else { Some((told, told + took)) }
}

/// When strace wrote a line.
fn told(line: &str) -> Option<u64> {
    micros(line.split_whitespace().nth(1)?)
}

fn micros(seconds: &str) -> Option<u64> {
    let (whole, part) = seconds.split_once('.')?;
    Some(whole.parse::<u64>().ok()? * 1_000_000 + format!("{part:0<6}").parse::<u64>().ok()?)
}

/// What the client's write of this number sets. No other value has it in it.
fn value(number: usize) -> String {
    format!("value-{number}-of-{WRITES}")
}

/// The calls that wrote the journal's entry with this value.
fn entries<'a>(calls: &'a [Call], value: &str) -> Vec<&'a Call> {
    calls.iter().filter(|call| call.carries(value)).collect()
}

/// Whether the entry with this value was on disk before the write's end: whatever wrote it was followed by an fsync of the same file.
fn on_disk(calls: &[Call], value: &str, write: &During) -> bool {
    let entries = entries(calls, value);
    let follows = |call: &Call, entry: &Call| entry.file == call.file && entry.during.1 <= call.during.0;
    let synced = |entry: &Call| calls.iter().any(|call| call.is_fsync() && follows(call, entry) && call.during.1 <= write.1);
    !entries.is_empty() && entries.into_iter().all(synced)
}

/// The values whose writes were acknowledged before their entries were on disk.
fn not_on_disk(calls: &[Call], writes: &[During]) -> Vec<String> {
    let values = writes.iter().enumerate().map(|(number, write)| (value(number), write));
    values.filter(|(value, write)| !on_disk(calls, value, write)).map(|(value, _)| value).collect()
}

fn fsyncs(calls: &[Call]) -> Vec<During> {
    calls.iter().filter(|call| call.is_fsync()).map(|call| call.during).collect()
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
            assert_eq!(client.call(&["SET", "kv:1", &value(number)]), Value::Simple("OK".to_owned()));
        });
        for (index, trace) in traces.into_iter().enumerate() {
            let calls = trace.end();
            println!("{engine:?}, server {index}: {} fsyncs", fsyncs(&calls).len());
            let missing = not_on_disk(&calls, &writes);
            assert!(missing.is_empty(), "{engine:?}, server {index}: {missing:?} of {writes:?} in {calls:#?}");
        }
    }
}

/// What the sidecar does not rely on: `WAITAOF` alone. It confirms what is yet to be written to disk, which shows where that takes its time.
#[test]
fn it_is_noticed_where_servers_confirm_what_is_not_on_disk() {
    let server = Redis::start_with(Engine::Valkey9, &["--appendonly", "yes", "--appendfsync", "everysec"]);
    let (trace, mut client) = (Trace::of_slow(&server), server.client());
    let writes = written(|number| {
        client.call(&["SET", "k", &value(number)]);
        assert_eq!(client.line("WAITAOF 1 0 10000").items(), [Value::Int(1), Value::Int(0)]);
    });
    let missing = without(&fsyncs(&trace.end()), &writes);
    println!("{missing} of {WRITES} confirmations had no fsync");
    assert!(missing > 0, "with everysec each confirmation had an fsync: the check shows nothing");
}

/// A replica in step that writes all to disk. It is done with its files: while they are made, the path behind a descriptor changes.
fn replica_of(primary: &Redis) -> Redis {
    let port = primary.port().to_string();
    let follow = ["--replicaof", "127.0.0.1", port.as_str()];
    let replica = Redis::start_with(primary.engine(), &[&DURABLE[..], &follow[..]].concat());
    wait_for("a replica in step", LIMIT, || replica.follows());
    wait_for("what it was sent to be in its file", LIMIT, || {
        let told = replica.client().line("INFO persistence").text();
        ["aof_rewrite_in_progress:0", "aof_rewrite_scheduled:0"].into_iter().all(|field| told.contains(field))
    });
    replica
}

/// Has the replica confirm a command.
fn confirmed(primary: &mut Client, command: &str) {
    assert!(!primary.line(command).is_error(), "{command}");
    assert_eq!(primary.line("WAIT 1 10000"), Value::Int(1), "{command}");
}

/// What a missing fsync of an entry looks like where others hide it: each write has a mark go to disk everywhere, and then an entry that the
/// replica only hands to the system. It brings that to disk at the next write, before that one's own entry.
#[test]
fn it_is_noticed_where_an_fsync_at_the_replica_is_not_the_entrys() {
    for engine in Engine::ALL {
        let primary = Redis::start_with(engine, &DURABLE);
        let replica = replica_of(&primary);
        let mut client = primary.client();
        let traces = [Trace::of(&primary), Trace::of(&replica)];
        let writes = written(|number| {
            write_to_disk(&replica);
            confirmed(&mut client, "SET mark is");
            assert_eq!(replica.client().line("CONFIG SET appendfsync no"), Value::Simple("OK".to_owned()));
            confirmed(&mut client, &format!("XADD larder:j:{{x}}bare/1:log * k kv:1 c s v {} b 1", value(number)));
        });
        let [at_primary, at_replica] = traces.map(Trace::end);
        assert_eq!(not_on_disk(&at_primary, &writes), Vec::<String>::new(), "{engine:?}: {writes:?} in {at_primary:#?}");
        assert_eq!(without(&fsyncs(&at_replica), &writes), 0, "{engine:?}: no fsync hides that one is missing: {at_replica:#?}");
        let all: Vec<String> = (0..WRITES).map(value).collect();
        assert!(all.iter().all(|value| entries(&at_replica, value).len() == 1), "{engine:?}: {at_replica:#?}");
        assert_eq!(not_on_disk(&at_replica, &writes), all, "{engine:?}: the check shows nothing: {writes:?} in {at_replica:#?}");
    }
}

#[test]
fn a_line_tells_when_a_call_went_on() {
    assert_eq!(during("17 100.000050 fdatasync(8) = 0 <0.000020>"), Some((100_000_050, 100_000_070)));
    assert_eq!(during("17 100.000050 fdatasync(8)   = 0 (DELAYED) <0.500000>"), Some((100_000_050, 100_500_050)));
    assert_eq!(during("17 100.000050 <... fdatasync resumed>) = 0 <0.000020>"), Some((100_000_030, 100_000_050)));
    assert_eq!(during("17 100.000050 fdatasync(8 <unfinished ...>"), None);
    assert_eq!(during(r#"17 100.000050 write(8</x/y>, "a = 0 <b", 8) = 8 <0.000020>"#), Some((100_000_050, 100_000_070)));
    assert_eq!(during("17 100.000050 <... write resumed>) = 8 <0.000020>"), Some((100_000_030, 100_000_050)));
    assert_eq!(during(r#"17 100.000050 write(8</x/y>, "a = 0 <b", 8 <unfinished ...>"#), None);
    assert_eq!(during("17 100.000050 fdatasync(8</x/y>) = -1 EIO (Input/output error) <0.000020>"), None);
    assert_eq!(during("17 100.000050 +++ exited with 0 +++"), None);
}

/// What strace shows of an `XADD` to a key of the journal.
const ENTRY: &str = r#""XADD\r\n$22\r\nlarder:j:{x}bare/1:log\r\n$1\r\nv\r\n$13\r\nvalue-7-of-20\r\n$1\r\nb\r\n$1\r\n1\r\n", 90"#;

#[test]
fn an_entry_is_told_from_what_else_has_its_value() {
    let count = |line: &str| entries(&calls(line), &value(7)).len();
    assert_eq!(count(&format!("17 100.000010 write(8</x/appendonly.aof.1.incr.aof>, {ENTRY}) = 90 <0.000010>")), 1);
    assert_eq!(count(&format!("17 100.000010 write(9<socket:[4]>, {ENTRY}) = 90 <0.000010>")), 0);
    assert_eq!(count(&format!("17 100.000010 write(8</x/appendonly.aof.1.incr.aof>, {ENTRY}) = -1 EIO (…) <0.000010>")), 0);
    for other in [
        r"SET\r\n$4\r\nkv:7\r\n$13\r\nvalue-7-of-20\r\n",
        r"HSET\r\n$23\r\nlarder:j:{x}bare/1:dirty\r\n$16\r\n17svalue-7-of-20\r\n",
    ] {
        assert_eq!(count(&format!("17 100.000010 write(8</x/appendonly.aof.1.incr.aof>, \"{other}\", 90) = 90 <0.000010>")), 0);
    }
}

#[test]
fn an_entry_is_on_disk_by_an_fsync_of_its_file_between_it_and_the_acknowledgement() {
    let file = "8</x/appendonly.aof.1.incr.aof>";
    let begun = format!("17 100.000010 write({file}, {ENTRY} <unfinished ...>");
    let between = "18 100.000012 fdatasync(9</x/appendonly.aof.manifest>) = 0 <0.000001>";
    let judged = |fsync: &str| {
        let trace = [begun.as_str(), between, "17 100.000020 <... write resumed>) = 90 <0.000010>", fsync].join("\n");
        on_disk(&calls(&trace), &value(7), &(100_000_000, 100_000_100))
    };
    assert!(judged(&format!("17 100.000020 fdatasync({file}) = 0 <0.000080>")));
    assert!(judged(&format!("18 100.000030 fsync({file} <unfinished ...>\n18 100.000100 <... fsync resumed>) = 0 <0.000070>")));
    assert!(!judged(""), "none");
    assert!(!judged(&format!("18 100.000019 fdatasync({file}) = 0 <0.000020>")), "began before the entry was written");
    assert!(!judged(&format!("17 100.000030 fdatasync({file}) = 0 <0.000071>")), "ended after the acknowledgement");
    assert!(!judged(&format!("17 100.000030 fdatasync({file}) = -1 EIO (…) <0.000020>")), "failed");
    assert!(!judged("17 100.000030 fdatasync(9</x/appendonly.aof.2.incr.aof>) = 0 <0.000020>"), "of another file");
    let calls = calls(&format!("17 100.000030 fdatasync({file}) = 0 <0.000020>"));
    assert!(!on_disk(&calls, &value(7), &(100_000_000, 100_000_100)), "of no entry");
}
