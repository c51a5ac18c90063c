//! `gptq sweep`: many settings over one model, each quantized and measured, one table.

mod report;
mod rows;
mod runner;
mod store;
mod texts;

use std::path::PathBuf;

use anyhow::bail;
use clap::ValueEnum;
use gptq_eval::Protocol;

use super::eval::ProtocolArg;
use super::{open, pool, progress};
use crate::Global;
use crate::output::json as json_output;
use crate::output::progress::catch_interrupts;
use rows::{Axis, Matrix};
use runner::Runner;
use store::Store;
use texts::EvalSettings;

/// Quantize a model with every combination of settings, measure each, and write a table and plots.
///
/// Options with several values, as --bits 4,3,2, make a row for each combination; --rows FILE gives
/// them as a list. A row is what `gptq quantize` with these options writes, to the bit, and `gptq eval
/// --reference` says of it. What rows share is done once per call: the calibration windows, the original's run
/// over the evaluation texts, the sensitivities that --target-bpw chooses from, and the original's run
/// over the calibration windows, which --correction follows: its inputs lie in a scratch file of the
/// results' disk (SmolLM2-135M: 0.2 MB per token; rows compute them themselves where it has no room for
/// them, in mixtures of experts, with --lm-head and with --no-true-sequential). Hessians are not
/// shared: each stage sees what the row's own quantized stages before it compute, so that two rows have in common those of the first alone. A row that is
/// finished is not run again; one that fails is told and left behind. Options that do not matter to a
/// method make no rows of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Float model: directory, .gguf file or hub id.
    model: String,
    /// Directory of the results: `results.json`, `results.md`, plots/, and a file for each row in
    /// rows/.
    #[arg(long, short, value_name = "DIR", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// TOML or JSON file of rows: tables of options of `gptq quantize` under `row`, and `defaults`. A
    /// list of values stands for alternatives. Values given as options here are alternatives for all
    /// rows that do not set them.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Values of --method of `gptq quantize`.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    method: Vec<String>,
    /// Values of --bits.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    bits: Vec<String>,
    /// Values of --target-bpw, in place of bits: mixed precision.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    target_bpw: Vec<String>,
    /// Values of --group-size.
    #[arg(long, value_delimiter = ',', value_name = "LIST", allow_hyphen_values = true)]
    group_size: Vec<String>,
    /// Symmetric grids, asymmetric ones, or both.
    #[arg(long, value_enum)]
    sym: Option<SymArg>,
    /// Values of --order.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    order: Vec<String>,
    /// Values of --scale-search.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    scale_search: Vec<String>,
    /// Values of --token-weights.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    token_weights: Vec<String>,
    /// Values of --damp-percent.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    damp_percent: Vec<String>,
    /// A calibration source, or several that are mixed, joined by `+` (a.txt+self@0.5); each
    /// occurrence is an alternative.
    #[arg(long, value_name = "SOURCE[+SOURCE...]")]
    calibration: Vec<String>,
    /// Values of any other option of `gptq quantize`: `--set refine=0,3`, `--set
    /// signed-scales=true,false`.
    #[arg(long, value_name = "OPTION=LIST")]
    set: Vec<String>,
    /// Values of --nsamples.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    nsamples: Vec<String>,
    /// Values of --seqlen.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    seqlen: Vec<String>,
    /// Values of --seed.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    seed: Vec<String>,
    /// Text to evaluate on: perplexity, and divergence from the original. May be given several times.
    #[arg(long = "eval", value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Protocol of the evaluation, as of `gptq eval`.
    #[arg(long, value_enum, default_value_t = ProtocolArg::Gptq)]
    protocol: ProtocolArg,
    /// Tokens per window of the evaluation; 2048 for gptq, 512 for llama.cpp.
    #[arg(long, value_name = "N")]
    eval_seqlen: Option<usize>,
    /// Only the first N windows of each text.
    #[arg(long, value_name = "N")]
    max_windows: Option<usize>,
    /// Keep the checkpoint of each row, in checkpoints/.
    #[arg(long)]
    keep: bool,
    /// Show the rows and what they would need, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SymArg {
    Sym,
    Asym,
    Both,
}

impl Args {
    /// The alternatives given as options.
    fn axes(&self) -> anyhow::Result<Vec<Axis>> {
        let sym = match self.sym {
            None => &[][..],
            Some(SymArg::Sym) => &["true"],
            Some(SymArg::Asym) => &["false"],
            Some(SymArg::Both) => &["true", "false"],
        };
        let sym: Vec<String> = sym.iter().map(|&value| value.to_owned()).collect();
        let named = |option: &'static str, values: &[String]| -> Axis {
            values.iter().map(|value| (option.to_owned(), value.clone())).collect()
        };
        let sizes = [named("bits", &self.bits), named("target-bpw", &self.target_bpw)].concat();
        let mut axes = vec![named("method", &self.method), sizes];
        for (option, values) in [
            ("group-size", &self.group_size),
            ("sym", &sym),
            ("order", &self.order),
            ("scale-search", &self.scale_search),
            ("token-weights", &self.token_weights),
            ("damp-percent", &self.damp_percent),
            ("calibration", &self.calibration),
            ("nsamples", &self.nsamples),
            ("seqlen", &self.seqlen),
            ("seed", &self.seed),
        ] {
            axes.push(named(option, values));
        }
        for set in &self.set {
            let Some((option, values)) = set.split_once('=') else {
                bail!("--set {set}: expected OPTION=VALUE,VALUE");
            };
            let values = values.split(',').map(|value| (option.to_owned(), value.to_owned()));
            axes.push(values.collect());
        }
        axes.retain(|axis| !axis.is_empty());
        Ok(axes)
    }

    fn rows(&self) -> anyhow::Result<Vec<rows::Row>> {
        let axes = self.axes()?;
        let matrices = match &self.rows {
            None => vec![Matrix { name: None, axes }],
            Some(path) => {
                let mut matrices = rows::read(path)?;
                for matrix in &mut matrices {
                    for axis in &axes {
                        matrix.add_default(axis);
                    }
                }
                matrices
            }
        };
        rows::rows(&self.model, &matrices)
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let rows = args.rows()?;
    if rows.is_empty() {
        bail!("the sweep has no rows");
    }
    Runner::check(&rows)?;
    let protocol: Protocol = args.protocol.into();
    let settings = EvalSettings {
        protocol,
        seqlen: args.eval_seqlen.unwrap_or(protocol.default_seqlen()),
        max_windows: args.max_windows,
    };
    catch_interrupts();
    let view = progress(global);
    let checkpoint = open(&args.model, &view)?;
    Runner::check_targets(&rows, &checkpoint)?;
    let output = args.output.clone().unwrap_or_else(|| "dry-run".into());
    let store = Store::new(&output, &args.model, &checkpoint, &settings, &args.texts)?;
    let pool = pool(global);
    let mut runner = Runner::new(&args.model, &checkpoint, &pool, &store, global, args.keep);
    if args.dry_run {
        let planned = runner.plan(&rows)?;
        if args.json {
            return json_output::print(&planned);
        }
        return report::print_plan(&planned);
    }
    store.create()?;
    let (results, end) = runner.run(&rows, &args.texts, &settings)?;
    report::write(&output, &results)?;
    if args.json {
        json_output::print(&results)?;
    } else {
        report::print(&results)?;
    }
    end
}
