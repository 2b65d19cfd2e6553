//! `larder crds`: the CustomResourceDefinitions.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Failure, Outcome};
use crate::api::crd;

/// Write the CustomResourceDefinitions of CacheCluster and CachePolicy
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larder crds | kubectl apply --server-side -f -     install them in a cluster
  larder crds --output crds                          write one file each")]
pub struct Args {
    /// A directory, which gets one file for each, or - for standard output
    #[arg(long, short, value_name = "DIR", default_value = "-")]
    output: PathBuf,
}

/// Writes the definitions.
pub fn run(args: Args) -> Outcome {
    let files = crd::files().map_err(|error| Failure::new(error, "report this: the definitions cannot be written as YAML"))?;
    if args.output == Path::new("-") {
        let text: Vec<&str> = files.iter().map(|file| file.yaml.as_str()).collect();
        return match io::stdout().lock().write_all(text.join("---\n").as_bytes()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Failure::new(format!("standard output cannot be written: {error}"), "write to a directory with --output"))
            }
            _ => Ok(ExitCode::SUCCESS),
        };
    }
    let refuse = |path: &Path, error: io::Error| {
        Failure::new(format!("{} cannot be written: {error}", path.display()), "name a directory that can be, with --output")
    };
    fs::create_dir_all(&args.output).map_err(|error| refuse(&args.output, error))?;
    for file in &files {
        let path = args.output.join(file.name);
        fs::write(&path, &file.yaml).map_err(|error| refuse(&path, error))?;
    }
    Ok(ExitCode::SUCCESS)
}
