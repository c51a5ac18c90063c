//! Perplexity by the two protocols in use.

use gptq_compute::{Divergence, Tensor, cross_entropy, kl_divergence};
use gptq_model::{Ctx, HeadLayer, Model, ModelError, Sequence, Session};
use serde::{Deserialize, Serialize};

use crate::divergence::DivergenceSummary;
use crate::recording::{Recorder, Recording};

/// Tokens that run through the model at once: short windows are batched up to here.
const BATCH_TOKENS: usize = 2048;
/// Rows of logits that exist at a time.
const LOGIT_ROWS: usize = 256;

/// How windows are cut and scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// The GPTQ paper: non-overlapping windows of the joined text, all tokens of a window but its
    /// first.
    #[serde(rename = "gptq")]
    Gptq,
    /// llama.cpp's llama-perplexity: only the second half of each window; a window starts with the
    /// beginning-of-text token where the tokenizer asks for one.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl Protocol {
    /// The window length that users of the protocol expect, in tokens.
    pub fn default_seqlen(self) -> usize {
        match self {
            Self::Gptq => 2048,
            Self::LlamaCpp => 512,
        }
    }

    /// Position of the first token of a window that is scored.
    fn first_scored(self, seqlen: usize) -> usize {
        match self {
            Self::Gptq => 1,
            Self::LlamaCpp => seqlen / 2 + 1,
        }
    }
}

/// What to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// How windows are cut and scored.
    pub protocol: Protocol,
    /// Tokens per window.
    pub seqlen: usize,
    /// Only so many windows from the start.
    pub max_windows: Option<usize>,
    /// Replaces the first token of every window ([`Protocol::LlamaCpp`] only).
    pub bos: Option<u32>,
}

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// How windows were cut and scored.
    pub protocol: Protocol,
    /// Tokens per window.
    pub seqlen: usize,
    /// e to the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, from the variance over tokens.
    pub perplexity_stderr: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Windows run.
    pub windows: usize,
    /// Perplexity of the reference on the same windows.
    pub reference_perplexity: Option<f64>,
    /// Divergence from the reference.
    #[serde(flatten)]
    pub divergence: Option<DivergenceSummary>,
}

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The model could not run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The text is shorter than a window.
    #[error(
        "the text has {tokens} tokens, fewer than one window of {seqlen}; use a longer text or a smaller --seqlen"
    )]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens per window.
        seqlen: usize,
    },
    /// A window too short to score anything.
    #[error("windows of {seqlen} tokens leave nothing to score; use --seqlen {least} or more")]
    Window {
        /// Tokens per window.
        seqlen: usize,
        /// The shortest window that works.
        least: usize,
    },
    /// Windows longer than the model's positions.
    #[error("windows of {seqlen} tokens exceed the model's {max_positions} positions")]
    WindowTooLong {
        /// Tokens per window.
        seqlen: usize,
        /// Positions of the model.
        max_positions: usize,
    },
    /// The reference has another vocabulary.
    #[error(
        "the reference has a vocabulary of {reference} tokens, the model one of {model}: they cannot be compared"
    )]
    Vocabulary {
        /// Of the reference.
        reference: usize,
        /// Of the model.
        model: usize,
    },
    /// The model's logits are not numbers.
    #[error("window {window}: the logits of the {which} are not finite; its weights are damaged")]
    NotFinite {
        /// Index of the window.
        window: usize,
        /// `model` or `reference`.
        which: &'static str,
    },
}

/// A model with what it needs to run.
struct Runner<'a> {
    model: &'a Model,
    session: &'a mut Session,
    sequences: Vec<Sequence>,
    rows: Tensor,
    normalized: Tensor,
    logits: Tensor,
}

impl<'a> Runner<'a> {
    fn new(model: &'a Model, session: &'a mut Session, batch: usize) -> Self {
        let sequences = (0..batch).map(|_| Sequence::new(model.spec())).collect();
        let (rows, normalized, logits) = Default::default();
        Self { model, session, sequences, rows, normalized, logits }
    }

    fn forward(&mut self, windows: &[&[u32]]) -> Result<(), ModelError> {
        let sequences = &mut self.sequences[..windows.len()];
        sequences.iter_mut().for_each(Sequence::clear);
        self.model.forward(self.session, sequences, windows)
    }

    /// Logits of rows `first..first + count` of the last forward call.
    fn logits(&mut self, first: usize, count: usize) -> &Tensor {
        copy_rows(self.session.hidden(), first, count, &mut self.rows);
        let (head, ctx) = (self.model.head(), &mut self.session.ctx);
        head.normalize(ctx, &self.rows, &mut self.normalized);
        head.logits(ctx, &self.normalized, &mut self.logits);
        &self.logits
    }
}

fn copy_rows(from: &Tensor, first: usize, count: usize, to: &mut Tensor) {
    to.resize(count, from.cols());
    for row in 0..count {
        to.row_mut(row).copy_from_slice(from.row(first + row));
    }
}

/// What a model is compared with.
pub enum Reference<'a> {
    /// A model, which runs beside.
    Model(&'a Model, &'a mut Session),
    /// What a model computed before ([`record`]), its head, and buffers for that.
    Recording(&'a Recording, &'a HeadLayer, &'a mut Ctx),
}

/// The reference as the evaluation sees it.
enum Expected<'a> {
    Model(Runner<'a>),
    Recording {
        recording: &'a Recording,
        head: &'a HeadLayer,
        ctx: &'a mut Ctx,
        rows: Tensor,
        normalized: Tensor,
        logits: Tensor,
    },
}

impl<'a> Expected<'a> {
    fn new(reference: Reference<'a>, batch: usize) -> Self {
        match reference {
            Reference::Model(model, session) => Self::Model(Runner::new(model, session, batch)),
            Reference::Recording(recording, head, ctx) => {
                let (rows, normalized, logits) = Default::default();
                Self::Recording { recording, head, ctx, rows, normalized, logits }
            }
        }
    }

    fn forward(&mut self, windows: &[&[u32]]) -> Result<(), ModelError> {
        match self {
            Self::Model(runner) => runner.forward(windows),
            Self::Recording { .. } => Ok(()),
        }
    }

    /// Logits of `count` rows from `row` of window `window` on, which is row `of_batch` of the batch.
    fn logits(&mut self, window: usize, row: usize, of_batch: usize, count: usize) -> &Tensor {
        match self {
            Self::Model(runner) => runner.logits(of_batch, count),
            Self::Recording { recording, head, ctx, rows, normalized, logits } => {
                copy_rows(recording.hidden(window), row, count, rows);
                head.normalize(ctx, rows, normalized);
                head.logits(ctx, normalized, logits);
                logits
            }
        }
    }
}

/// As [`evaluate`] without a reference, and keeps what later evaluations of other models on the same
/// text compare with, if that takes at most `most_bytes` ([`Recording::bytes_for`]).
///
/// # Errors
/// As [`evaluate`].
pub fn record(
    model: &Model,
    session: &mut Session,
    text: &[u32],
    options: &EvalOptions,
    most_bytes: usize,
    progress: impl FnMut(usize, usize),
) -> Result<(Evaluation, Option<Recording>), EvalError> {
    let mut recorder = Recorder::new(model.spec(), text.len(), options, most_bytes);
    let evaluation = run(model, session, None, text, options, recorder.as_mut(), progress)?;
    Ok((evaluation, recorder.map(Recorder::finish)))
}

/// Scores `text` under `model`, and compares with a reference where one is given; of either kind, the results are the
/// same to the bit. `progress` is told the windows done and their number.
///
/// # Errors
/// [`EvalError`]: a text or window too short or too long, or a model that does not run.
///
/// # Panics
/// If the reference is a recording of another text or of other windows.
pub fn evaluate(
    model: &Model,
    session: &mut Session,
    reference: Option<Reference<'_>>,
    text: &[u32],
    options: &EvalOptions,
    progress: impl FnMut(usize, usize),
) -> Result<Evaluation, EvalError> {
    run(model, session, reference, text, options, None, progress)
}

fn run(
    model: &Model,
    session: &mut Session,
    reference: Option<Reference<'_>>,
    text: &[u32],
    options: &EvalOptions,
    mut recorder: Option<&mut Recorder>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Evaluation, EvalError> {
    let EvalOptions { protocol, seqlen, max_windows, bos } = *options;
    let first = protocol.first_scored(seqlen);
    if seqlen <= first {
        return Err(EvalError::Window {
            seqlen,
            least: if protocol == Protocol::Gptq { 2 } else { 3 },
        });
    }
    if let Some(max_positions) = model.spec().length_limit().filter(|limit| seqlen > *limit) {
        return Err(EvalError::WindowTooLong { seqlen, max_positions });
    }
    if text.len() < seqlen {
        return Err(EvalError::TooShort { tokens: text.len(), seqlen });
    }
    if let Some(reference) = &reference {
        let (reference, model) = (reference.vocab(), model.spec().vocab);
        if reference != model {
            return Err(EvalError::Vocabulary { reference, model });
        }
    }
    let total = windows(text.len(), seqlen, max_windows);
    let batch = (BATCH_TOKENS / seqlen).max(1);
    let mut runner = Runner::new(model, session, batch);
    let mut reference = reference.map(|reference| Expected::new(reference, batch));
    let mut scores = Scores::default();
    let mut reference_scores = Scores::default();
    let mut divergences: Vec<Divergence> = Vec::new();

    progress(0, total);
    for start in (0..total).step_by(batch) {
        let count = batch.min(total - start);
        let mut tokens = text[start * seqlen..(start + count) * seqlen].to_vec();
        let targets = tokens.clone();
        if let (Protocol::LlamaCpp, Some(bos)) = (protocol, bos) {
            tokens.iter_mut().step_by(seqlen).for_each(|t| *t = bos);
        }
        let windows: Vec<&[u32]> = tokens.chunks_exact(seqlen).collect();
        runner.forward(&windows)?;
        if let Some(reference) = &mut reference {
            reference.forward(&windows)?;
        }
        for window in 0..count {
            if let Some(recorder) = &mut recorder {
                recorder.add(runner.session.hidden(), window * seqlen);
            }
            // The logits at a position score the token behind it.
            let end = window * seqlen + seqlen - 1;
            let mut row = window * seqlen + first - 1;
            while row < end {
                let rows = LOGIT_ROWS.min(end - row);
                let targets = &targets[row + 1..row + 1 + rows];
                let pool = std::sync::Arc::clone(&runner.session.ctx.pool);
                let logits = runner.logits(row, rows);
                let error = |which| EvalError::NotFinite { window: start + window, which };
                scores.add(&cross_entropy(&pool, logits, targets)).ok_or_else(|| error("model"))?;
                if let Some(reference) = &mut reference {
                    let within = row - window * seqlen;
                    let expected = reference.logits(start + window, within, row, rows);
                    reference_scores
                        .add(&cross_entropy(&pool, expected, targets))
                        .ok_or_else(|| error("reference"))?;
                    divergences.extend(kl_divergence(&pool, expected, &runner.logits));
                }
                row += rows;
            }
        }
        progress(start + count, total);
    }
    let (perplexity, perplexity_stderr) = scores.perplexity();
    Ok(Evaluation {
        protocol,
        seqlen,
        perplexity,
        perplexity_stderr,
        tokens: scores.count,
        windows: total,
        reference_perplexity: reference.map(|_| reference_scores.perplexity().0),
        divergence: DivergenceSummary::new(&divergences),
    })
}

/// Windows that are cut from `tokens` tokens.
pub(crate) fn windows(tokens: usize, seqlen: usize, most: Option<usize>) -> usize {
    (tokens / seqlen.max(1)).min(most.unwrap_or(usize::MAX))
}

impl Reference<'_> {
    fn vocab(&self) -> usize {
        match self {
            Self::Model(model, _) => model.spec().vocab,
            Self::Recording(recording, ..) => recording.vocab,
        }
    }
}

/// Sums of negative log-likelihoods.
#[derive(Debug, Default)]
struct Scores {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Scores {
    /// `None` if one is not finite.
    fn add(&mut self, nll: &[f64]) -> Option<()> {
        for &x in nll {
            self.sum += x;
            self.squares += x * x;
        }
        self.count += nll.len();
        self.sum.is_finite().then_some(())
    }

    /// Perplexity and its standard error.
    fn perplexity(&self) -> (f64, f64) {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        let perplexity = mean.exp();
        (perplexity, perplexity * (variance / (n - 1.0).max(1.0)).sqrt())
    }
}

#[cfg(test)]
mod tests;
