//! Child processes that end with the test, and places that they need.

use std::env;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A process that is killed when this is dropped, and by the system when the test itself is killed.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program whose output goes to `log`. Called on the thread of the test: the process ends with that.
    pub fn start(program: &Path, arguments: &[String], environment: &[(&str, &Path)], log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).expect("a log");
        let parent = std::process::id().to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_larderd"))
            .args(["agent", "become", "--parent", &parent, "--"])
            .arg(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a log"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        Self { child, log: log.to_owned() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// All that it wrote, and those before it that had the same log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last lines that it wrote.
    pub fn log_end(&self) -> String {
        let text = self.log();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        let _ = kill_process(pid, signal);
    }

    /// SIGTERM, and the end that follows.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.has_ended() {
            assert!(Instant::now() < deadline, "a process does not end on SIGTERM: {}", self.log_end());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("loopback has a free port").port()
}

/// A program of the path, or one that tests/kind/tools built.
pub fn tool(name: &str) -> PathBuf {
    let cache = env::var_os("LARDER_KIND_CACHE").map(PathBuf::from).or_else(|| {
        let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        caches.or_else(|| env::home_dir().map(|home| home.join(".cache"))).map(|dir| dir.join("larder-kind"))
    });
    let path = env::var_os("PATH").unwrap_or_default();
    let built = cache.map(|cache| cache.join("bin"));
    let mut places = built.into_iter().chain(env::split_paths(&path)).map(|dir| dir.join(name));
    places
        .find(|place| place.is_file())
        .unwrap_or_else(|| panic!("there is no {name}: run `make apiserver-tests`, which builds it"))
}
