//! The `gptq` command: quantize, evaluate and run language models with GPTQ weights.

#![forbid(unsafe_code)]

mod commands;
mod output;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use output::progress::LogWriter;

/// Quantize, evaluate and run language models with GPTQ weights.
///
/// MODEL is a directory in Hugging Face layout (float or GPTQ), a .gguf file, or a hub id
/// (owner/name). Data go to stdout, progress and messages to stderr.
#[derive(Debug, Parser)]
#[command(name = "gptq", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: commands::Command,
}

/// What every command takes, in its help.
const COMMON: &str = "Options of all commands";

/// Options of every command.
#[derive(Debug, clap::Args)]
struct Global {
    /// Threads to use; one per physical core by default. Results do not depend on it.
    #[arg(long, global = true, help_heading = COMMON, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Description of an architecture that is not built in, or differs from it (see `gptq families`).
    #[arg(long, global = true, help_heading = COMMON, value_name = "FILE.toml")]
    family: Option<std::path::PathBuf>,
    /// No progress, only errors.
    #[arg(long, short, global = true, help_heading = COMMON)]
    quiet: bool,
    /// Log what happens inside; twice for more.
    #[arg(long, short, global = true, help_heading = COMMON, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info,gptq=debug,gptq_compute=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("GPTQ_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| LogWriter)
        .with_target(false)
        .without_time()
        .init();
    match cli.command.run(&cli.global) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::debug!("{error:?}");
            output::error(&error);
            output::progress::failure()
        }
    }
}

/// `gptq … | head` ends without a complaint.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|e| {
        e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
