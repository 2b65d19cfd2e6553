//! `larder check`: manifests, judged without a cluster.

mod report;
mod review;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use super::Outcome;

/// Check manifests as the API server and the operator would, and warn of anti-patterns
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  nothing was found
  1  warnings only: the objects work, and their users will regret something
  2  errors: the objects are refused, a file cannot be read, or the command line is wrong

Examples:
  larder check cache.yaml                        one file
  larder check deploy/                           every .yaml, .yml and .json file in a directory
  kustomize build . | larder check -             standard input
  larder check --allow no-stampede-protection .  leave out a warning, by its code
  larder check --output json . | jq .findings    for machines")]
pub struct Args {
    /// Files and directories with CacheClusters, CachePolicies and Secrets; - for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How findings are written, on standard output
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Leave out warnings of this code; may be given several times
    #[arg(long, value_name = "CODE")]
    allow: Vec<String>,
}

/// How findings are written.
#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    /// For people: where, what, why, and the remedy
    #[default]
    Text,
    /// One JSON document
    Json,
}

/// Checks the files and says what was found.
pub fn run(args: Args) -> Outcome {
    // A code of 1 would say that there are only warnings.
    judge(&args).map_err(|failure| failure.with_code(2))
}

fn judge(args: &Args) -> Outcome {
    let mut review = review::review(&args.files);
    review.allow(&args.allow)?;
    match args.output {
        Output::Text => report::text(&review)?,
        Output::Json => report::json(&review)?,
    }
    Ok(ExitCode::from(match (review.errors(), review.warnings()) {
        (0, 0) => 0,
        (0, _) => 1,
        _ => 2,
    }))
}
