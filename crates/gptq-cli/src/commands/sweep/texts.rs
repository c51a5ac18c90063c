//! The evaluation texts and what the original model makes of them, once for all rows.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use gptq_compute::Pool;
use gptq_eval::{EvalOptions, Evaluation, Protocol, Recording, Reference, evaluate, record};
use gptq_format::{Checkpoint, Tokenizer};
use gptq_model::{Ctx, Embedder, HeadLayer, LinearSource, LoadOptions, Model, Session, Spec};
use gptq_quantize::Progress;
use serde::{Deserialize, Serialize};

use super::super::eval::tokenize;
use super::super::{bos_of, explain, read_text};
use crate::output::progress::ProgressView;

/// How texts are cut and scored.
#[derive(Debug, Clone, Copy)]
pub(super) struct EvalSettings {
    pub(super) protocol: Protocol,
    /// Tokens per window.
    pub(super) seqlen: usize,
    pub(super) max_windows: Option<usize>,
}

/// What was measured on one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TextResult {
    /// The file.
    pub(super) text: String,
    /// Wall time.
    pub(super) seconds: f64,
    #[serde(flatten)]
    pub(super) result: Evaluation,
}

/// A text and what the original computed on it.
struct Text {
    path: PathBuf,
    tokens: Vec<u32>,
    recording: Option<Recording>,
}

/// The texts, and the original as far as rows are compared with it.
pub(super) struct Texts<'a> {
    checkpoint: &'a Checkpoint,
    pool: Arc<Pool>,
    options: EvalOptions,
    inputs: Vec<Text>,
    head: HeadLayer,
    ctx: Ctx,
    /// Loaded while some text is too long to be kept.
    model: Option<(Model, Session)>,
    /// What the original has.
    pub(super) original: Vec<TextResult>,
}

impl<'a> Texts<'a> {
    /// Reads the texts and runs the original over them.
    ///
    /// # Errors
    /// If a text cannot be read or is too short, or the model does not run.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        pool: &Arc<Pool>,
        paths: &[PathBuf],
        settings: &EvalSettings,
        view: &ProgressView,
    ) -> anyhow::Result<Self> {
        if settings.max_windows == Some(0) {
            bail!("--max-windows 0 leaves nothing to score");
        }
        let tokenizer = checkpoint.tokenizer().context("the texts cannot be tokenized")?;
        let options = EvalOptions {
            protocol: settings.protocol,
            seqlen: settings.seqlen,
            max_windows: settings.max_windows,
            bos: bos_of(&tokenizer),
        };
        let spec = Arc::new(Spec::for_checkpoint(checkpoint)?);
        let embedder = Embedder::load(checkpoint, &spec, LinearSource::Mapped)?;
        let mut texts = Self {
            checkpoint,
            pool: Arc::clone(pool),
            options,
            inputs: Vec::new(),
            head: HeadLayer::load_on(pool, checkpoint, &spec, &embedder)?,
            ctx: Ctx::new(Arc::clone(pool)),
            model: None,
            original: Vec::new(),
        };
        texts.run_original(paths, &tokenizer, view)?;
        Ok(texts)
    }

    fn run_original(
        &mut self,
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        view: &ProgressView,
    ) -> anyhow::Result<()> {
        view.phase("load");
        let model = load(self.checkpoint, &self.pool)?;
        let mut session = Session::new(Arc::clone(&self.pool));
        let mut left = MOST_BYTES;
        for path in paths {
            let start = Instant::now();
            view.phase(&format!("original on {}", name(path)));
            let text = read_text(path)?;
            let tokens = tokenize(tokenizer, &text, &self.options)?;
            let bar = |done, total| view.phase_progress(done, total);
            let (result, recording) =
                record(&model, &mut session, &tokens, &self.options, left, bar)
                    .map_err(|error| explain(self.checkpoint, error))
                    .with_context(|| path.display().to_string())?;
            if recording.is_some() {
                left -= Recording::bytes_for(model.spec(), tokens.len(), &self.options);
            }
            let seconds = start.elapsed().as_secs_f64();
            self.original.push(TextResult { text: path.display().to_string(), seconds, result });
            self.inputs.push(Text { path: path.clone(), tokens, recording });
        }
        if self.inputs.iter().any(|text| text.recording.is_none()) {
            self.model = Some((model, session));
        }
        Ok(())
    }

    /// Measures a checkpoint on every text.
    ///
    /// # Errors
    /// If it cannot be loaded or does not run.
    pub(super) fn measure(
        &mut self,
        directory: &Path,
        view: &ProgressView,
    ) -> anyhow::Result<Vec<TextResult>> {
        let Self { inputs, head, ctx, model: original, options, pool, .. } = self;
        view.phase("load");
        let checkpoint = Checkpoint::open(directory)?;
        let model = load(&checkpoint, pool)?;
        let mut session = Session::new(Arc::clone(pool));
        let mut results = Vec::with_capacity(inputs.len());
        for text in inputs {
            let start = Instant::now();
            view.phase(&format!("evaluate on {}", name(&text.path)));
            let reference = match (&text.recording, original.as_mut()) {
                (Some(recording), _) => Reference::Recording(recording, head, ctx),
                (None, Some((model, session))) => Reference::Model(model, session),
                // The original stays loaded where a recording is missing.
                (None, None) => bail!("nothing to compare with"),
            };
            let bar = |done, total| view.phase_progress(done, total);
            let result =
                evaluate(&model, &mut session, Some(reference), &text.tokens, options, bar)
                    .map_err(|error| explain(&checkpoint, error))?;
            let seconds = start.elapsed().as_secs_f64();
            let text = text.path.display().to_string();
            results.push(TextResult { text, seconds, result });
        }
        Ok(results)
    }
}

fn load(checkpoint: &Checkpoint, pool: &Pool) -> anyhow::Result<Model> {
    let options = LoadOptions { pool: Some(pool), ..LoadOptions::default() };
    Ok(Model::load_with(checkpoint, &options)?)
}

/// A text as plots and bars name it.
pub(super) fn name(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// What may be kept of the original, in bytes; beyond, it runs again beside each row.
const MOST_BYTES: usize = 1 << 30;
