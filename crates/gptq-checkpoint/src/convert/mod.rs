//! Other forms of a checkpoint: GPTQ v1 and v2, floats, GGUF.
//!
//! Tensors are converted one at a time, and the output gets its name only when it is whole.

mod copy;
mod gguf;
mod gptq;
mod hf;

use std::path::{Path, PathBuf};

use gptq_format::fs::write_atomic;
use gptq_format::{
    Checkpoint, CheckpointFormat, CheckpointKind, Tokenizer, copy_custom_code, copy_sentence_files,
};
use serde::Serialize;
use serde_json::Value;

use crate::error::Result;

/// What to convert to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// GPTQ in the given zero-point convention; everything else stays to the bit.
    Gptq(CheckpointFormat),
    /// A Hugging Face directory of floats: quantized weights as f16.
    Hf,
    /// A GGUF file for llama.cpp.
    Gguf,
}

impl Target {
    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gptq(format) => format.as_str(),
            Self::Hf => "hf",
            Self::Gguf => "gguf",
        }
    }
}

/// How to convert.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// What to convert to.
    pub target: Target,
    /// Modules and features without an exact counterpart get the nearest instead of being refused.
    pub lossy: bool,
    /// An existing output is replaced.
    pub overwrite: bool,
    /// Largest size of a safetensors file in bytes.
    pub max_shard_bytes: u64,
}

/// What was converted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Converted {
    /// The directory or file that was written.
    pub output: PathBuf,
    /// Size of its tensors in bytes.
    pub output_bytes: u64,
    /// Every quantized linear of the source.
    pub modules: Vec<ConvertedModule>,
    /// What deserves a look.
    pub notes: Vec<String>,
}

/// What became of a quantized linear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConvertedModule {
    /// Its name.
    pub module: String,
    /// Its form in the output: `gptq`, `gptq_v2`, `F16`, `Q4_0`, `Q4_1` or `Q8_0`.
    pub to: &'static str,
    /// Whether its weights are the same real numbers as before.
    pub exact: bool,
}

/// Called with the number of tensors that are done and their total.
pub type Progress<'a> = &'a dyn Fn(usize, usize);

/// Converts a checkpoint.
///
/// # Errors
/// If the source cannot be read or is not of a kind that has the target's form, a module has no exact counterpart and
/// `lossy` is not set, or the output exists or cannot be written. Nothing is left behind then.
pub fn convert(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Converted> {
    match options.target {
        Target::Gptq(format) => gptq::convert(checkpoint, output, format, options, progress),
        Target::Hf => hf::convert(checkpoint, output, options, progress),
        Target::Gguf => gguf::convert(checkpoint, output, options, progress),
    }
}

/// Writes config.json, the tokenizer's files and generation_config.json of a directory.
fn write_side_files(checkpoint: &Checkpoint, config: &Value, to: &Path) -> Result<()> {
    write_json(&to.join("config.json"), config)?;
    if let Some(generation) = &checkpoint.generation_config {
        write_json(&to.join("generation_config.json"), generation)?;
    }
    match &checkpoint.kind {
        // Copied without a look: a tokenizer that cannot be read here may be readable elsewhere.
        CheckpointKind::HuggingFace => {
            Tokenizer::copy_files(&checkpoint.path, to)?;
            copy_sentence_files(&checkpoint.path, to)?;
            copy_custom_code(checkpoint.config.map(), &checkpoint.path, to)?;
        }
        CheckpointKind::Gguf(_) => checkpoint.tokenizer()?.save(to)?,
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomic(path, format!("{value:#}\n").as_bytes())?)
}

#[cfg(test)]
mod awq_tests;
#[cfg(test)]
mod tests;
