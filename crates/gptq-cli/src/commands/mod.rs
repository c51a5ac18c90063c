//! One file per verb, and what they share.

mod bench;
mod calibration;
mod convert;
mod embed;
mod eval;
mod families;
mod generate;
mod inspect;
mod logits;
mod quantize;
mod runtime;
mod sweep;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use gptq_compute::{Pool, physical_cores};
use gptq_eval::EvalError;
use gptq_format::{Checkpoint, hub};
use gptq_model::{FamilyTable, HeadBits, LoadOptions, Model, ModelError};
use gptq_quantize::{Progress, QuantizeError};

use crate::Global;
use crate::output::progress::ProgressView;

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Quantize(Box<quantize::Args>),
    Eval(eval::Args),
    Generate(generate::Args),
    Embed(embed::Args),
    Bench(bench::Args),
    Logits(logits::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Convert(convert::Args),
    Sweep(Box<sweep::Args>),
    Families(families::Args),
}

impl Command {
    pub(crate) fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if let Some(file) = &global.family {
            FamilyTable::from_file(file)?.install();
        }
        match self {
            Self::Quantize(args) => quantize::run(&args, global),
            Self::Eval(args) => eval::run(&args, global),
            Self::Generate(args) => generate::run(&args, global),
            Self::Embed(args) => embed::run(&args, global),
            Self::Bench(args) => bench::run(&args, global),
            Self::Logits(args) => logits::run(&args, global),
            Self::Inspect(args) => inspect::run(&args, global),
            Self::Verify(args) => return verify::run(&args, global),
            Self::Convert(args) => convert::run(&args, global),
            Self::Sweep(args) => sweep::run(&args, global),
            Self::Families(args) => families::run(&args),
        }
        .map(|()| ExitCode::SUCCESS)
    }
}

/// The threads of the command.
fn pool(global: &Global) -> Arc<Pool> {
    Arc::new(Pool::new(global.threads.map_or_else(physical_cores, usize::from)))
}

fn progress(global: &Global) -> ProgressView {
    ProgressView::new(global.quiet, global.verbose > 0)
}

/// The directory or file that `model` names; a hub id is looked up in the cache or downloaded.
fn resolve(model: &str, view: &ProgressView) -> anyhow::Result<PathBuf> {
    let path = hub::resolve(model, &|file, done, total| {
        view.phase(&format!("download {file}"));
        view.phase_progress(done as usize, total as usize);
    })?;
    Ok(path)
}

fn open(model: &str, view: &ProgressView) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(&resolve(model, view)?)?)
}

fn load(
    model: &str,
    head: HeadBits,
    pool: &Pool,
    view: &ProgressView,
) -> anyhow::Result<(Checkpoint, Model)> {
    let checkpoint = open(model, view)?;
    view.phase("load");
    // A bar is worth its line; in a log it would be ten of them.
    let bar = |done: usize, total: usize| view.phase_progress(done, total);
    let progress: Option<&(dyn Fn(usize, usize) + Sync)> =
        if view.has_bars() { Some(&bar) } else { None };
    let model = Model::load_with(&checkpoint, &LoadOptions { pool: Some(pool), head, progress })?;
    Ok((checkpoint, model))
}

/// Adds to an error of running a model what its files tell of the reason.
fn explain(checkpoint: &Checkpoint, error: impl Into<anyhow::Error>) -> anyhow::Error {
    let error = error.into();
    let model_error = model_error(&error);
    let path = checkpoint.path.display();
    if let Some(ModelError::Token { id, vocab, .. }) = model_error {
        let message = format!(
            "`{path}`: its tokenizer gives token {id}, which is not among the {vocab} tokens of the model: the two do not \
             belong together, or tokens were added without making the embedding larger"
        );
        return error.context(message);
    }
    let not_finite = matches!(error.downcast_ref(), Some(EvalError::NotFinite { .. }));
    if !not_finite && !matches!(model_error, Some(ModelError::BadLogits { .. })) {
        return error;
    }
    let tensors = &checkpoint.tensors;
    match tensors.names().find_map(|name| tensors.check_finite(name).err()) {
        Some(damage) => error.context(damage),
        None => error.context(format!(
            "`{path}`: all its weights are finite, but some are so large that what it computes is not"
        )),
    }
}

/// What the model said, where an error is about it.
fn model_error(error: &anyhow::Error) -> Option<&ModelError> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(EvalError::Model(inner)), _) | (_, Some(QuantizeError::Model(inner))) => Some(inner),
        _ => error.downcast_ref(),
    }
}

/// The beginning-of-text token, where encoding with special tokens puts it: llama.cpp's protocol does
/// as well.
fn bos_of(tokenizer: &gptq_format::Tokenizer) -> Option<u32> {
    let puts = |id: &u32| tokenizer.encode("a", true).is_ok_and(|ids| ids.first() == Some(id));
    tokenizer.bos_id().filter(puts)
}

/// A whole text file.
fn read_text(path: &std::path::Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))
}

/// The end-of-text tokens of a model: generation_config.json, else config.json, else the tokenizer.
fn eos_ids(checkpoint: &Checkpoint, tokenizer: Option<&gptq_format::Tokenizer>) -> Vec<u32> {
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        match value.get("eos_token_id") {
            Some(serde_json::Value::Array(ids)) => {
                ids.iter().filter_map(|v| v.as_u64()?.try_into().ok()).collect()
            }
            Some(id) => id.as_u64().and_then(|id| id.try_into().ok()).into_iter().collect(),
            None => Vec::new(),
        }
    };
    let config = serde_json::Value::Object(checkpoint.config.map().clone());
    let mut found = checkpoint.generation_config.as_ref().map(ids).unwrap_or_default();
    if found.is_empty() {
        found = ids(&config);
    }
    if found.is_empty() {
        found.extend(tokenizer.and_then(gptq_format::Tokenizer::eos_id));
    }
    found
}
