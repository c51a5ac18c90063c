//! `--calibration self`: the model writes its own calibration text.
//!
//! From the beginning-of-text token alone, tokens are sampled at temperature 1 from the `top_k`
//! most likely ones: text as likely as the model thinks text is, in the proportions in which it
//! saw it (the data-free generation of LLM-QAT, Liu et al. 2023). An end-of-text token does not
//! end a window: what the model writes behind it, a new text as a rule, fills the rest. Many
//! windows are decoded at once, so that the weights are read once for all of them, with keys and
//! values in f16 and, where weights are codes, int8 activations, as `gptq generate` does: what that changes is small beside
//! the sampling. Needs no data and no network; the same seed gives the same windows.

use gptq_compute::{Activations, KvType};
use gptq_format::Tokenizer;
use gptq_model::{BatchOptions, Model, Sampling, Session, Spec, generate_batch};

use crate::calibration::{
    CalibrationOptions, CalibrationReport, CalibrationSet, SELF, SourceReport,
};
use crate::error::{QuantizeError, Result};
use crate::progress::Progress;

/// Memory for keys and values of the windows that are decoded at once, in bytes.
const CACHE_BYTES: usize = 1 << 30;
/// How keys and values are held meanwhile.
pub(crate) const KV: KvType = KvType::F16;
/// Most windows decoded at once; more gain nothing.
const MAX_BATCH: usize = 96;

/// How the model writes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelfCalibration {
    /// Windows, their length and the seed.
    pub windows: CalibrationOptions,
    /// Logits are divided by this before sampling.
    pub temperature: f32,
    /// Only so many of the most likely tokens; 0 for all.
    pub top_k: usize,
}

impl SelfCalibration {
    /// Temperature 1, the 50 most likely tokens.
    pub fn new(windows: CalibrationOptions) -> Self {
        Self { windows, temperature: 1.0, top_k: 50 }
    }

    /// Windows that are decoded at once.
    pub fn batch(&self, spec: &Spec) -> usize {
        let window = spec.kv_bytes_per_token(KV).max(1) * self.windows.seqlen.max(1);
        (CACHE_BYTES / window).clamp(1, MAX_BATCH)
    }
}

/// Lets `model` write calibration windows.
///
/// # Errors
/// If the model reads in both directions, the tokenizer has no token to begin with, or the model's
/// output is not finite.
pub fn self_calibrate(
    model: &Model,
    session: &mut Session,
    tokenizer: &Tokenizer,
    options: &SelfCalibration,
    progress: &dyn Progress,
) -> Result<CalibrationSet> {
    let CalibrationOptions { nsamples, seqlen, seed } = options.windows;
    if nsamples == 0 || seqlen < 2 {
        return Err(QuantizeError::Option {
            option: "nsamples",
            reason: format!(
                "self calibration needs windows of 2 tokens or more, not {nsamples} of {seqlen}"
            ),
        });
    }
    if !model.spec().attention.causal {
        return Err(QuantizeError::Option {
            option: "calibration",
            reason: format!(
                "family {} reads in both directions and writes no text of its own; give a text file",
                model.spec().family
            ),
        });
    }
    let first = tokenizer.bos_id().or(tokenizer.eos_id()).ok_or_else(|| QuantizeError::Option {
        option: "calibration",
        reason: "`self` starts from the beginning-of-text token, and this tokenizer has none; \
                 give a text file instead"
            .into(),
    })?;
    progress.phase("calibration");
    let prompt = [first];
    let batch = BatchOptions {
        max_new_tokens: seqlen - 1,
        sampling: Sampling {
            temperature: options.temperature,
            top_k: options.top_k,
            seed,
            ..Sampling::default()
        },
        eos_ids: Vec::new(),
        ignore_eos: true,
        kv_cache: KV,
        batch: options.batch(model.spec()),
    };
    let prompts = vec![&prompt[..]; nsamples];
    let (mut done, total) = (0, nsamples * (seqlen - 1));
    let before = session.ctx.scratch.activations();
    session.ctx.scratch.set_activations(Activations::Int8);
    let texts = generate_batch(model, session, &prompts, &batch, |tokens| {
        done += tokens;
        progress.phase_progress(done, total);
    });
    session.ctx.scratch.set_activations(before);
    let texts = texts?;
    let windows: Vec<Vec<u32>> = texts
        .into_iter()
        .map(|text| prompt.iter().copied().chain(text).collect())
        .filter(|window: &Vec<u32>| window.len() == seqlen)
        .collect();
    if windows.len() < nsamples {
        return Err(QuantizeError::WindowTooLong {
            seqlen,
            max_positions: model.spec().max_positions,
        });
    }
    let source = SourceReport {
        name: SELF.into(),
        kind: SELF.into(),
        documents: nsamples,
        tokens: nsamples * seqlen,
        windows: nsamples,
        coverage: 1.0,
        ..SourceReport::default()
    };
    let report =
        CalibrationReport::new(vec![source], &windows, &options.windows, model.spec().vocab);
    Ok(CalibrationSet::from_windows(windows, report))
}
