//! Side by side with other proxies: `make bench`, or `cargo bench --bench peers -- --help`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod account;
mod closed_loop;
mod environment;
mod instructions;
mod load;
mod memory;
mod open_loop;
mod picture;
mod processes;
mod report;
mod rounds;
mod stats;
mod targets;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use targets::{Kind, Programs, Target, Upstream};

/// Compares Larder's sidecar with other proxies in front of the same Redis, in one interleaved run.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to compare; `larder` stands for all of its rows.
    #[arg(long, value_delimiter = ',', default_value = "direct,nutcracker,haproxy,envoy,larder")]
    targets: Vec<String>,
    /// Commands sent at once on each connection.
    #[arg(long, value_delimiter = ',', default_value = "1,16", value_parser = clap::value_parser!(u16).range(1..=256))]
    pipeline: Vec<u16>,
    /// Which commands.
    #[arg(long, value_delimiter = ',', default_value = "get,set")]
    operations: Vec<String>,
    /// Client connections.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    connections: u16,
    /// How often everything is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// How long each sample is measured.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Commands a second of the open loop; 0 leaves it out.
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
    /// Leave out the memory of each proxy.
    #[arg(long)]
    no_memory: bool,
    /// Leave out the count of instructions.
    #[arg(long)]
    no_instructions: bool,
    /// Fail where others disturbed more than this share of the samples, instead of marking the report.
    #[arg(long)]
    refuse_noise: Option<f64>,
    /// Where RESULTS.md, results.json and the picture go. Absent: only the report is printed.
    #[arg(long)]
    output: Option<PathBuf>,
    /// The sidecar's program.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_larderd"))]
    larderd: PathBuf,
    #[arg(long, default_value = "redis-server")]
    redis_server: PathBuf,
    #[arg(long, default_value = "nutcracker")]
    nutcracker: PathBuf,
    #[arg(long, default_value = "haproxy")]
    haproxy: PathBuf,
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let kinds = Kind::select(&arguments.targets)?;
    let programs = Programs {
        redis_server: arguments.redis_server.clone(),
        nutcracker: arguments.nutcracker.clone(),
        haproxy: arguments.haproxy.clone(),
        envoy: arguments.envoy.clone(),
        larderd: arguments.larderd.canonicalize().unwrap_or_else(|_| arguments.larderd.clone()),
        wrapper: Vec::new(),
    };
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let upstream = Upstream::start(&programs, dir.path())?;
    let report = measure(arguments, &kinds, &programs, &upstream, dir.path())?;
    let verdicts = verdict::judge(&report);
    println!("{}", report.markdown(&verdicts));
    if arguments.refuse_noise.is_some_and(|most| report.disturbed() > most) {
        return Err(format!("others disturbed {:.0} % of the samples: run it on a quiet machine", report.disturbed() * 100.0));
    }
    arguments.output.as_deref().map_or(Ok(()), |output| write(output, &report, &verdicts))
}

fn measure(
    arguments: &Arguments,
    kinds: &[Kind],
    programs: &Programs,
    upstream: &Upstream,
    dir: &Path,
) -> Result<report::Report, String> {
    const SKIPPED: &str = "left out by an option";
    let memory = if arguments.no_memory { Err(SKIPPED.to_owned()) } else { memory::measure(kinds, programs, upstream, dir) };
    let counted = [Kind::LarderBypass, Kind::LarderTtl, Kind::LarderHundredRules, Kind::LarderCacheAside];
    let counted = counted.into_iter().filter(|kind| kinds.contains(kind)).collect::<Vec<_>>();
    let instructions = match counted.as_slice() {
        _ if arguments.no_instructions => Err(SKIPPED.to_owned()),
        [] => Err("Larder is not among the targets".to_owned()),
        counted => instructions::count(counted, programs, upstream, dir),
    };
    let targets: Vec<Target> =
        kinds.iter().map(|kind| Target::start(*kind, programs, upstream, dir)).collect::<Result<_, _>>()?;
    let plan = rounds::Plan {
        workloads: workloads(arguments)?,
        rounds: arguments.rounds.into(),
        measured: Duration::from_secs_f64(arguments.seconds.clamp(0.1, 60.0)),
        rate: arguments.rate,
    };
    let results = rounds::run(&plan, upstream, &targets)?;
    let environment = environment::describe(programs, &plan, arguments.connections);
    Ok(report::Report { results, memory, instructions, environment })
}

fn write(output: &Path, report: &report::Report, verdicts: &[verdict::Verdict]) -> Result<(), String> {
    let json = serde_json::to_string_pretty(&report.json(verdicts)).map_err(|error| error.to_string())?;
    fs::create_dir_all(output).map_err(|error| format!("{}: {error}", output.display()))?;
    for (name, text) in
        [("RESULTS.md", report.markdown(verdicts)), ("results.json", json + "\n"), ("peers.svg", picture::svg(report))]
    {
        let file = output.join(name);
        fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        eprintln!("wrote {}", file.display());
    }
    Ok(())
}

fn workloads(arguments: &Arguments) -> Result<Vec<load::Workload>, String> {
    let mut workloads = Vec::new();
    for operation in &arguments.operations {
        let operation = match operation.as_str() {
            "get" => load::Operation::Get,
            "set" => load::Operation::Set,
            other => return Err(format!("there is no operation `{other}`: use get, set")),
        };
        for pipeline in &arguments.pipeline {
            workloads.push(load::Workload::new(operation, usize::from(*pipeline), usize::from(arguments.connections)));
        }
    }
    Ok(workloads)
}
