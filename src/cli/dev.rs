//! `larder dev`: the manifests' CacheCluster as real processes on this machine.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Outcome};
use crate::dev::manifests::ManifestError;
use crate::dev::{DevError, Endpoint, Event, Options, Session};
use crate::telemetry::logs::{self, LogFormat};

/// Run the manifests' CacheCluster on this machine: real servers with replicas, a sidecar before them, and a relay where rules write behind
#[derive(clap::Args)]
#[command(after_help = "\
Once commands work, one line per sidecar says where: `ready: redis://127.0.0.1:6379 ...`. Policies, and the servers' shards, memory, eviction
and parameters, are applied when their files are saved; a server that dies is started again. Ctrl-C ends everything, and leaves
nothing behind but what is in --data; what was written behind is carried to its origin first, which a second Ctrl-C cuts short.

Examples:
  larder dev -f examples/first-policy              the servers, and a sidecar at 127.0.0.1:6379
  larder dev -f cache.yaml --sidecars 3            three sidecars on consecutive ports, as three pods would have
  larder dev -f cache.yaml --data ./cache-data     what is cached survives a restart
  larder dev -f cache.yaml --sidecar-logs . --log info,larder::origin::query=debug
                                                   each query to an origin is logged to sidecar-0.log")]
pub struct Args {
    /// Manifests: YAML or JSON files, or directories of them; they may hold Secrets
    #[arg(short, long = "file", value_name = "PATH", required = true, num_args = 1..)]
    file: Vec<PathBuf>,
    /// Where the first sidecar listens; the others follow on the next ports. Port 0: free ones
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:6379")]
    listen: SocketAddr,
    /// A Unix socket where the first sidecar listens too; the others append .1, .2 and so on
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where the first sidecar's /metrics and /readyz are; the others follow on the next ports. Port 0: free ones
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9121")]
    admin: SocketAddr,
    /// How many sidecars; 0: the servers alone
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    sidecars: u16,
    /// The server program; otherwise redis-server or valkey-server from the PATH
    #[arg(long, value_name = "PATH")]
    server_bin: Option<PathBuf>,
    /// A directory where data and topology survive this run; otherwise nothing does
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// An existing directory for the logs of the sidecars, which log as --log and --log-format say; otherwise they are where everything
    /// else of the run is
    #[arg(long, value_name = "DIR")]
    sidecar_logs: Option<PathBuf>,
}

/// Runs until a signal comes.
pub fn run(args: Args) -> Outcome {
    let sidecar_program = env::current_exe().map_err(|error| Failure::new(error, "start larder by its full path"))?;
    let Args { file, listen, socket, admin, sidecars, server_bin, data, sidecar_logs } = args;
    let log_options = log_options();
    let options = Options {
        manifests: file,
        listen,
        socket,
        admin,
        sidecars,
        server_bin,
        data,
        sidecar_logs,
        log_options,
        sidecar_program,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, "see that the system has file descriptors left"))?;
    runtime.block_on(serve(options)).map_err(explain)?;
    Ok(ExitCode::SUCCESS)
}

/// Sidecars log as this command does.
fn log_options() -> Vec<String> {
    let Some((format, filter)) = logs::chosen() else { return Vec::new() };
    let format = match format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    ["--log", filter, "--log-format", format].map(str::to_owned).to_vec()
}

async fn serve(options: Options) -> Result<(), DevError> {
    let mut signals = Signals::new().map_err(|source| DevError::Start { what: "signal handling".to_owned(), source })?;
    let mut console = Console::new();
    let mut session = Session::prepare(options).await?;
    console.line(&format!("{} in {}", session.engine(), session.directory().display()));
    let outcome = tokio::select! {
        outcome = keep(&mut session, &mut console) => outcome,
        () = signals.next() => Ok(()),
    };
    if outcome.is_ok() {
        let mut tell = |event: Event<'_>| console.tell(&event);
        let is_cut_short = tokio::select! {
            () = session.drain(&mut tell) => false,
            () = signals.next() => true,
        };
        if is_cut_short {
            console.line("what the journals still hold is not waited for");
        }
    }
    console.waiting("everything to end");
    session.stop().await;
    console.clear();
    outcome
}

async fn keep(session: &mut Session, console: &mut Console) -> Result<(), DevError> {
    session.bring_up(&mut |event| console.tell(&event)).await?;
    console.clear();
    for endpoint in session.endpoints() {
        console.answer(&ready_line(&endpoint));
    }
    if session.endpoints().is_empty() {
        let servers: Vec<String> = session.servers().addresses().iter().map(|address| format!("redis://{address}")).collect();
        console.answer(&format!("ready: {}", servers.join(" ")));
    }
    session.tend(&mut |event| console.tell(&event)).await
}

fn ready_line(endpoint: &Endpoint) -> String {
    let socket = endpoint.socket.as_ref().map(|path| format!(" unix://{}", path.display())).unwrap_or_default();
    format!("ready: redis://{}{socket} admin http://{}", endpoint.listen, endpoint.admin)
}

fn explain(error: DevError) -> Failure {
    let text = error.to_string();
    match &error {
        DevError::Manifest(ManifestError::Refused(_)) => {
            Failure::new(text, "correct the manifests; `larder check` finds the same without starting anything")
        }
        DevError::Manifest(ManifestError::SeveralClusters(_)) => {
            Failure::new(text, "keep each CacheCluster in a file of its own")
        }
        DevError::Hopeless(_) => Failure::new(text, "correct what it complains of, such as a line of spec.parameters"),
        _ => match text.rsplit_once(": ") {
            Some((what, next)) => Failure::new(what, next),
            None => Failure::new(text, "see the log above"),
        },
    }
}

/// The signals that end a run.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// What is said while running: answers on standard output, the rest on standard error.
struct Console {
    spinner: Option<ProgressBar>,
}

impl Console {
    fn new() -> Self {
        let spinner = io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                spinner.set_style(style);
            }
            spinner
        });
        Self { spinner }
    }

    fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Waiting(what) => self.waiting(what),
            Event::Ended(ended) => {
                self.line(&format!("{} ended ({}) and is started again", ended.name, ended.how));
            }
            Event::Reloaded { generation } => self.line(&format!("the manifests were saved: generation {generation} is applied")),
            Event::Refused(error) => self.line(&format!("the manifests were saved and refused; the earlier ones stay\n{error}")),
            Event::Note(note) => self.line(note),
        }
    }

    fn waiting(&mut self, what: &str) {
        match &self.spinner {
            Some(spinner) => {
                spinner.enable_steady_tick(Duration::from_millis(100));
                spinner.set_message(format!("waiting for {what}"));
            }
            None => self.line(&format!("waiting for {what}")),
        }
    }

    fn clear(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.disable_steady_tick();
            spinner.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        // Where standard error is gone, nobody is left to tell.
        let write = || drop(writeln!(io::stderr().lock(), "{text}"));
        match &self.spinner {
            Some(spinner) => spinner.suspend(write),
            None => write(),
        }
    }

    fn answer(&self, text: &str) {
        let write = || {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{text}");
            let _ = out.flush();
        };
        match &self.spinner {
            Some(spinner) => spinner.suspend(write),
            None => write(),
        }
    }
}
