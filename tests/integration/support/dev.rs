//! `larder dev` as a process, with its manifests in a directory of its own.

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::resp::{Client, Value};
use super::server::Engine;
use super::wait_for;

/// How long bringing up and healing may take. Long: test machines are busy.
pub const LIMIT: Duration = Duration::from_secs(90);

/// How long a wait may be that goes on: slots move the slower the longer the machine takes for others.
const LONGEST: Duration = Duration::from_secs(600);

/// A manifest of one cluster.
pub fn cluster(engine: Engine, mode: &str, further: &str) -> String {
    let (kind, version) = match engine {
        Engine::Redis7 => ("Redis", "7.0"),
        Engine::Redis8 => ("Redis", "8.0"),
        Engine::Valkey9 => ("Valkey", "8.0"),
    };
    format!(
        "apiVersion: larder.dev/v1alpha1\nkind: CacheCluster\nmetadata: {{name: main}}\nspec:\n  \
         engine: {{kind: {kind}, version: \"{version}\"}}\n  mode: {mode}\n  memory: 64Mi\n{further}"
    )
}

/// A policy of one rule about it.
pub fn policy(keys: &str) -> String {
    format!(
        "apiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {{name: shop}}\nspec:\n  cacheCluster: main\n  \
         workloads: {{matchLabels: {{app: shop}}}}\n  rules:\n    - {{name: one, keys: \"{keys}\", strategy: CacheAside, ttl: 10m}}\n"
    )
}

/// One run. Dropping it ends it as Ctrl-C does, so that nothing is left of a failed test either.
pub struct Dev {
    child: Child,
    pub manifests: Arc<TempDir>,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
}

impl Dev {
    /// Starts it with these manifests, one file each, on free ports unless `arguments` name others.
    pub fn start(engine: Engine, files: &[(&str, String)], arguments: &[&str]) -> Self {
        let manifests = Arc::new(TempDir::new().unwrap());
        for (name, text) in files {
            fs::write(manifests.path().join(name), text).unwrap();
        }
        Self::start_in(engine, &manifests, arguments)
    }

    /// Starts it on manifests that are there.
    pub fn start_in(engine: Engine, manifests: &Arc<TempDir>, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        command.args(["dev", "-f"]).arg(manifests.path());
        for option in ["--listen", "--admin"] {
            if !arguments.contains(&option) {
                command.args([option, "127.0.0.1:0"]);
            }
        }
        if engine.binary().is_absolute() {
            command.arg("--server-bin").arg(engine.binary());
        }
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = collect(child.stderr.take().unwrap());
        Self { child, manifests: Arc::clone(manifests), stdout, stderr }
    }

    pub fn stdout(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until `done` holds, for as long as it goes on telling of progress, and [`LONGEST`] at most. Where that ends in vain, what it said is
    /// shown.
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let (longest, mut said) = (Instant::now() + LONGEST, 0);
        let mut deadline = Instant::now() + LIMIT;
        while !done() {
            let stderr = self.stderr();
            if stderr.len() > said {
                (deadline, said) = ((Instant::now() + LIMIT).min(longest), stderr.len());
            }
            assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?} of the last that larder dev said:\n{stderr}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for a text on standard error.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str) {
        wait_for(&format!("{text:?} on standard error"), LIMIT, || self.stderr().contains(text));
    }

    /// Waits until it is ready, and returns the ports that it names, in order.
    #[track_caller]
    pub fn ready(&mut self, lines: usize) -> Vec<u16> {
        wait_for("larder dev is ready", LIMIT, || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("larder dev ended: {status}\n{}", self.stderr());
            }
            self.stdout().lines().count() >= lines
        });
        let output = self.stdout();
        let urls = output.split_ascii_whitespace().filter_map(|word| word.strip_prefix("redis://127.0.0.1:"));
        urls.map(|port| port.parse().unwrap()).collect()
    }

    /// Where everything of the run lives.
    pub fn directory(&self) -> PathBuf {
        let stderr = self.stderr();
        let line = stderr.lines().find(|line| line.contains(") in ")).expect("the directory is told");
        PathBuf::from(line.rsplit_once(") in ").unwrap().1)
    }

    /// Its child processes.
    pub fn children(&self) -> Vec<u32> {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| stat(*pid).is_some_and(|(parent, _)| parent == self.child.id())).collect()
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("larder dev ends", LIMIT, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Ends it as Ctrl-C does.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal("INT");
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.stderr());
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal("TERM");
            // Killed, it would still leave nothing behind.
            for _ in 0..400 {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn collect(output: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let shared = Arc::clone(&text);
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let mut text = shared.lock().unwrap();
            text.push_str(&line);
            text.push('\n');
        }
    });
    text
}

/// A process's parent and state.
fn stat(pid: u32) -> Option<(u32, char)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = words.next()?.chars().next()?;
    Some((words.next()?.parse().ok()?, state))
}

/// Whether a process runs: one that only waits to be reaped does not.
pub fn runs(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != 'Z')
}

/// Waits until none of these runs and the directory is gone.
#[track_caller]
pub fn assert_gone(pids: &[u32], directory: &Path) {
    wait_for("every process and file is gone", LIMIT, || !pids.iter().any(|pid| runs(*pid)) && !directory.exists());
}

/// One field of INFO, if the server answers.
pub fn info(port: u16, field: &str) -> Option<String> {
    let reply = Client::connect(port).ok()?.try_call(&["INFO"]).ok()?;
    let Value::Bulk(text) = reply else { return None };
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':').map(str::to_owned))
}
