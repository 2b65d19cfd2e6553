//! The continuous client of the end-to-end tests: several writers that find the primary by Sentinel, or that of a shard as clients of a
//! Cluster do, and write unique values, and a reader that afterwards looks for every value that was acknowledged.
//!
//!     e2e-client serve                  waits for runs; configured by the environment, below
//!     e2e-client console                answers questions from its standard input, those to the one that serves among them: see there
//!
//! It is a program of its own, without the library and without any crate: it shares no fault with what it tests, and the compiler makes
//! it in a second.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod console;
mod resp;
mod route;
mod run;

use std::env;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use run::Run;

const CONTROL: &str = "127.0.0.1:7700";

/// Who says where a primary is: at `HOST:PORT`, that of a Service in front of all of them.
#[derive(Clone)]
pub enum Guide {
    /// Any sentinel, by the name under which the primary is watched.
    Sentinels { address: String, master: String },
    /// Any server of a Cluster.
    Cluster { address: String },
}

impl Guide {
    fn from_environment() -> Self {
        if let Ok(address) = env::var("CLUSTER") {
            return Self::Cluster { address };
        }
        let address = env::var("SENTINELS").expect("SENTINELS=HOST:PORT or CLUSTER=HOST:PORT");
        Self::Sentinels { address, master: env::var("MASTER").unwrap_or_else(|_| "main".to_owned()) }
    }
}

/// Where the cache is, and how it is written to.
#[derive(Clone)]
pub struct Target {
    pub guide: Guide,
    /// The login: a directory with `username` and `password`, as a mounted Secret, read at each connection.
    pub login: Option<PathBuf>,
    /// How many write at once.
    pub writers: u32,
    /// What each writes at most, a second.
    pub rate: u32,
    /// After how many writes each connects anew. 0: never of itself.
    pub reconnect: u32,
}

impl Target {
    fn from_environment() -> Self {
        let number = |name: &str, default: u32| env::var(name).map_or(default, |text| text.parse().expect(name));
        Self {
            guide: Guide::from_environment(),
            login: env::var_os("LOGIN").map(PathBuf::from),
            writers: number("WRITERS", 4),
            rate: number("RATE", 250),
            reconnect: number("RECONNECT", 0),
        }
    }
}

fn main() -> ExitCode {
    match env::args().nth(1).unwrap_or_default().as_str() {
        "serve" => serve(&Target::from_environment()),
        "console" => console::serve(),
        other => {
            eprintln!("error: {other:?} is neither serve nor console");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Answers one request after the other: they come from one test.
fn serve(target: &Target) {
    let listener = TcpListener::bind(CONTROL).expect(CONTROL);
    let mut running: Option<Run> = None;
    let mut runs = 0;
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut request = String::new();
        if stream.set_read_timeout(Some(Duration::from_secs(5))).is_err() || stream.read_to_string(&mut request).is_err() {
            continue;
        }
        let answer = match (request.as_str(), running.take()) {
            ("start", None) => {
                runs += 1;
                running = Some(Run::start(target.clone(), runs));
                format!("{{\"run\":{runs}}}")
            }
            ("status", Some(run)) => {
                let status = run.status();
                running = Some(run);
                status
            }
            ("stop", Some(run)) => run.stop(),
            (_, before) => {
                running = before;
                "{\"error\":\"not now\"}".to_owned()
            }
        };
        println!("{request}: {answer}");
        // Where nobody listens any more, the log has it.
        let _ = stream.write_all(answer.as_bytes());
    }
}

fn password(target: &Target) -> Result<String, String> {
    let login = target.login.as_ref().ok_or("there is no login")?;
    std::fs::read_to_string(login.join("password")).map(|text| text.trim().to_owned()).map_err(|error| error.to_string())
}

fn ask(command: &str) -> Result<String, String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(CONTROL)?;
        stream.write_all(command.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let text = exchange().map_err(|error| format!("{CONTROL}: {error}"))?;
    if text.starts_with("{\"error\"") { Err(text) } else { Ok(text) }
}
