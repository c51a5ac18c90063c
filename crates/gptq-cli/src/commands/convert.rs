//! `gptq convert`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use gptq_checkpoint::{ConvertOptions, Converted, Target};
use gptq_format::CheckpointFormat;
use gptq_quantize::Progress;
use serde_json::{Value, json};

use super::{open, progress};
use crate::Global;
use crate::output::{json as json_output, size};

/// Write a checkpoint in another format.
///
/// To gptq and gptq_v2 only the zero points change. hf has quantized weights and matrices of 32-bit
/// floats as f16, also from a .gguf file. gguf is for llama.cpp: symmetric 4 bits become Q4_0 and symmetric 8 bits Q8_0 to the
/// bit, where groups are multiples of 32 without activation order; other settings are refused
/// unless --lossy is given.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id.
    model: String,
    /// What to convert to.
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: TargetArg,
    /// Where to write: a directory, for gguf a file.
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// Round what has no exact counterpart, and say so.
    #[arg(long)]
    lossy: bool,
    /// Replace the output if it exists.
    #[arg(long)]
    overwrite: bool,
    /// Largest weight file of a directory.
    #[arg(long, default_value = "4GiB", value_parser = size::parse_bytes, value_name = "SIZE")]
    max_shard_size: u64,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TargetArg {
    /// GPTQ v1, zero points stored less one; known to all engines (asymmetric not to GPTQModel)
    Gptq,
    /// GPTQ v2, zero points as they are
    #[value(name = "gptq_v2")]
    GptqV2,
    /// Floats in Hugging Face layout
    Hf,
    /// llama.cpp's format
    Gguf,
}

impl From<TargetArg> for Target {
    fn from(target: TargetArg) -> Self {
        match target {
            TargetArg::Gptq => Self::Gptq(CheckpointFormat::Gptq),
            TargetArg::GptqV2 => Self::Gptq(CheckpointFormat::GptqV2),
            TargetArg::Hf => Self::Hf,
            TargetArg::Gguf => Self::Gguf,
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    if args.lossy && !matches!(args.to, TargetArg::Gguf) {
        bail!("--lossy is for --to gguf");
    }
    let start = Instant::now();
    let view = progress(global);
    let checkpoint = open(&args.model, &view)?;
    let options = ConvertOptions {
        target: args.to.into(),
        lossy: args.lossy,
        overwrite: args.overwrite,
        max_shard_bytes: args.max_shard_size,
    };
    view.phase("convert");
    let converted =
        gptq_checkpoint::convert(&checkpoint, &args.output, &options, &|done, total| {
            view.phase_progress(done, total);
        })?;
    view.finish();
    let seconds = start.elapsed();
    if args.json {
        let mut out = json!({
            "model": args.model,
            "to": options.target.as_str(),
            "input_bytes": checkpoint.tensors.total_bytes(),
            "seconds": seconds.as_secs_f64(),
        });
        if let (Value::Object(out), Value::Object(rest)) =
            (&mut out, serde_json::to_value(&converted)?)
        {
            out.extend(rest);
        }
        return json_output::print(&out);
    }
    let mut text = format!(
        "{}: {} in {}\n",
        converted.output.display(),
        size::bytes(converted.output_bytes),
        size::duration(seconds)
    );
    text.push_str(&modules(&converted));
    for note in &converted.notes {
        text.extend(["note: ", note, "\n"]);
    }
    crate::output::print(&text)
}

/// What became of the quantized modules, by type; those that were rounded by name.
fn modules(converted: &Converted) -> String {
    let mut kinds: BTreeMap<(&str, bool), Vec<&str>> = BTreeMap::new();
    for module in &converted.modules {
        kinds.entry((module.to, module.exact)).or_default().push(&module.module);
    }
    let mut text = String::new();
    for ((to, exact), names) in kinds {
        let how = if exact { "exact" } else { "rounded" };
        let count = names.len().to_string();
        text.extend([&count, " quantized modules to ", to, ", ", how, "\n"]);
        // Floats are rounded for all modules alike.
        if !exact && to != "F16" {
            for name in names {
                text.extend(["  ", name, "\n"]);
            }
        }
    }
    text
}
