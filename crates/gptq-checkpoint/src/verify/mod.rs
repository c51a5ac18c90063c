//! Whether a GPTQ checkpoint is sound, and which engines read from it what was meant.
//!
//! An error is something that no reader gets right, a warning something that some readers do not, a note something to know.
//! What each code means is told in `docs/reference/verify.md`.

mod config;
mod engines;
mod files;
mod finding;
mod model;
mod module;
mod siblings;
mod zeros;

use std::path::Path;

use gptq_format::{Checkpoint, CheckpointKind, FormatError, QuantizeConfig};
use serde::Serialize;

use crate::error::{CheckpointError, Result};
pub use engines::{Engine, Verdict};
use finding::Findings;
pub use finding::{Finding, Severity};
use module::Module;

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// `gptq`, `gptq_v2` or `awq`; `None` if the checkpoint could not be opened.
    pub format: Option<&'static str>,
    /// Number of quantized linears.
    pub modules: usize,
    /// Number of tensors.
    pub tensors: usize,
    /// All findings: errors, warnings, notes.
    pub findings: Vec<Finding>,
    /// For each engine whether it opens the checkpoint and computes what was meant.
    pub engines: Vec<Verdict>,
}

impl Report {
    /// Number of findings of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    /// Whether there is no error.
    pub fn is_sound(&self) -> bool {
        self.count(Severity::Error) == 0
    }
}

/// What the engines' rules look at.
struct Facts<'a> {
    config: &'a QuantizeConfig,
    /// `quantization_config` of config.json, as given.
    in_config_json: Option<&'a serde_json::Map<String, serde_json::Value>>,
    /// Quantized modules.
    modules: Vec<Module>,
    /// Linears that some engines fuse.
    fused: Vec<siblings::Group>,
    /// The head is quantized.
    quantized_head: bool,
    /// The head is the embedding.
    tied: bool,
    /// Every safetensors header says that it was written for PyTorch.
    headers_say_pt: bool,
    /// config.json says that the model runs in bfloat16.
    bf16: bool,
    /// The findings hold an error.
    broken: bool,
}

/// Checks a checkpoint directory. Reads all tensors but the codes, one at a time.
///
/// # Errors
/// If there is nothing at `path` or it is not a GPTQ checkpoint. What is wrong with one is in the report.
pub fn verify(path: &Path) -> Result<Report> {
    let mut findings = Findings::default();
    let checkpoint = match Checkpoint::open(path) {
        Ok(checkpoint) => checkpoint,
        Err(error @ FormatError::NoCheckpoint { .. }) if !path.join("config.json").exists() => {
            return Err(error.into());
        }
        Err(error) if path.is_dir() => {
            findings.error("open", None, error.to_string(), None);
            return Ok(Report {
                format: None,
                modules: 0,
                tensors: 0,
                findings: findings.sorted(),
                engines: engines::none_open(),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let not_gptq = |reason| CheckpointError::NotGptq { path: path.to_owned(), reason };
    if matches!(checkpoint.kind, CheckpointKind::Gguf(_)) {
        return Err(not_gptq("it is a GGUF file; `gptq inspect` tells what it holds"));
    }
    let Some(config) = &checkpoint.quantize_config else {
        let packed = checkpoint.tensors.names().any(|name| name.ends_with(".qweight"));
        return Err(not_gptq(if packed {
            "it has packed weights, but neither config.json (quantization_config) nor quantize_config.json says how"
        } else {
            "its weights are floats; `gptq quantize` makes a GPTQ checkpoint of it"
        }));
    };
    config::check(&checkpoint, config, &mut findings);
    let headers_say_pt = files::check(&checkpoint, &mut findings);
    let layout = model::Layout::of(&checkpoint, &mut findings);
    let modules = module::read_all(&checkpoint, config, &layout, &mut findings);
    zeros::check(config, &modules, &mut findings);
    let fused = siblings::check(&layout, &modules, &mut findings);
    model::check(&checkpoint, config, &layout, &mut findings);
    let quantized_head = layout
        .head
        .as_ref()
        .is_some_and(|head| checkpoint.tensors.contains(&format!("{}.qweight", head.module)));
    let dtype = |key| checkpoint.config.opt_str(key).ok().flatten();
    let facts = Facts {
        config,
        bf16: dtype("dtype").or(dtype("torch_dtype")) == Some("bfloat16"),
        in_config_json: checkpoint
            .config
            .value("quantization_config")
            .and_then(serde_json::Value::as_object),
        fused,
        quantized_head,
        tied: layout.tied,
        headers_say_pt,
        broken: findings.has_errors(),
        modules,
    };
    Ok(Report {
        format: Some(config.format.as_str()),
        modules: facts.modules.len(),
        tensors: checkpoint.tensors.names().count(),
        engines: engines::judge(&facts),
        findings: findings.sorted(),
    })
}

#[cfg(test)]
mod tests;
