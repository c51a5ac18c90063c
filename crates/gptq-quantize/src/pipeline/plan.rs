//! What a run will need, before it starts.

use std::sync::Arc;

use gptq_compute::Activations;
use gptq_compute::arch::{Isa, isa};
use gptq_format::QuantizeConfig;
use gptq_model::{LinearSpec, LoadedBytes, Spec, block_parts, loaded_bytes};

use super::activations::{chunks_of, windows_per_chunk};
use super::layout::Layout;
use super::memory::{Memory, total};
use super::native::is_corrected;
use super::{Job, check_tuning, tune};
use crate::calibration::{CalibrationOptions, CalibrationReport, SELF};
use crate::error::{QuantizeError, Result};
use crate::report::PlanSummary;
use crate::rss;
use crate::self_calibration::{self, SelfCalibration};
use crate::solver::Correction;

/// What writing a text token by token reaches of the f32 rate, from floats and from the codes of GGUF's blocks, but for its
/// attention, which reads all keys and values before the token: a byte takes as long as so many operations.
const WRITING: f64 = 0.35;
const WRITING_FROM_CODES: f64 = 1.25;
const OPERATIONS_PER_KV_BYTE: f64 = 17.0;

/// What tuning reaches of the f32 rate.
const TUNING: f64 = 0.8;

/// The needs of a run, in total and by what they are for.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The totals.
    pub summary: PlanSummary,
    /// Blocks of the model.
    pub blocks: usize,
    /// Modules that will be quantized.
    pub modules: usize,
    /// Bits per quantized weight, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Calibration tokens.
    pub tokens: usize,
    /// What the peak of memory consists of, in bytes.
    pub memory: Vec<(&'static str, u64)>,
    /// The settings that the checkpoint will record.
    pub config: QuantizeConfig,
    /// Whether the activations go to a scratch file.
    pub(crate) spill: bool,
}

impl Plan {
    /// Counts what the process has needed so far, where that was to read the model and the text for this run alone.
    ///
    /// # Errors
    /// [`QuantizeError::Memory`] if it was more than `limit`.
    pub fn after_reading(mut self, limit: Option<u64>) -> Result<Self> {
        let so_far = rss::peak_bytes().unwrap_or(0);
        check_limit(limit, so_far, "reading the model and the calibration text", "")?;
        self.summary.peak_rss_bytes = self.summary.peak_rss_bytes.max(so_far);
        Ok(self)
    }
}

/// Plans a run without starting it.
///
/// # Errors
/// As [`super::quantize`], as far as headers and options tell.
pub fn plan(job: &Job<'_>) -> Result<Plan> {
    job.options.check()?;
    let spec = Arc::new(Spec::for_checkpoint(job.checkpoint)?);
    check_tuning(job.options, &spec)?;
    let layout = Layout::new(job.checkpoint, &spec, job.options)?;
    summarize(job, &spec, &layout)
}

fn summarize(job: &Job<'_>, spec: &Spec, layout: &Layout) -> Result<Plan> {
    let calibration = job.calibration.filter(|_| job.options.method.needs_calibration());
    let (tokens, seqlen) = calibration.map_or((0, 0), |c| (c.report.tokens, c.report.seqlen));
    if seqlen > spec.max_positions && calibration.is_some() {
        return Err(QuantizeError::WindowTooLong { seqlen, max_positions: spec.max_positions });
    }
    if job.options.damp_auto && calibration.is_some_and(|c| c.windows.len() < 2) {
        let reason = "auto holds windows out and needs two or more (--nsamples)".to_owned();
        return Err(QuantizeError::Option { option: "damp_percent", reason });
    }
    let memory = Memory::new(job, spec, layout, tokens, seqlen);
    // What is resident already: the program, the tokenizer, the calibration text.
    let resident = rss::current_bytes().unwrap_or(0);
    let limit = job.options.max_memory;
    let need = |spill| resident + total(&memory.peak(spill));
    let (free, spilled) = (need(false), need(true));
    // Without a limit the machine's memory is one, but the run is not refused for it. Few tokens gain nothing from a file.
    let room = limit.or_else(|| Some(resident + rss::available_bytes()?));
    let spill = room.is_some_and(|room| free > room) && spilled < free;
    let mut peak = if spill { spilled } else { free };
    let mut parts = vec![("program, tokenizer and tokens", resident)];
    parts.extend(memory.peak(spill).into_iter().filter(|(_, bytes)| *bytes > 0));
    let hint = if spill { ", with the activations on disk" } else { "" };
    check_limit(limit, peak, "the run", hint)?;
    // Writing the calibration text needs the whole model, before the run and not beside it.
    let writing = calibration
        .filter(|c| c.report.sources.iter().any(|s| s.kind == SELF))
        .map_or(0, |c| self_calibration_bytes(job, spec, &c.report));
    if writing > 0 {
        parts.push(("before the run: the model writes its text", writing));
        peak = peak.max(resident + writing);
        check_limit(
            limit,
            peak,
            "the model that writes its own calibration text",
            "; a text file given with --calibration needs less",
        )?;
    }
    let time = Time::new(job, spec, layout, tokens, seqlen);
    Ok(Plan {
        summary: PlanSummary {
            peak_rss_bytes: peak,
            output_bytes: layout.plan.total_bytes(),
            scratch_bytes: if spill { memory.scratch_bytes() } else { 0 },
            seconds: time.seconds,
            writing_seconds: calibration.map_or(0.0, |c| written(&c.report) * time.per_written),
            operations: time.operations,
            f32_operations_per_second: time.rate,
        },
        blocks: spec.layer_count(),
        modules: layout.modules().count(),
        bits_per_weight: layout.bits_per_weight(),
        tokens,
        memory: parts,
        config: layout.config.clone(),
        spill,
    })
}

/// Refuses a limit below `bytes`, and names the least that will do, in steps of 16 MiB: what is
/// resident differs a little from run to run.
pub(super) fn check_limit(
    limit: Option<u64>,
    bytes: u64,
    what: &'static str,
    hint: &'static str,
) -> Result<()> {
    match limit {
        Some(limit) if bytes > limit => {
            let least_mib = ((bytes >> 20) + 8).next_multiple_of(16);
            Err(QuantizeError::Memory { limit, what, least_mib, hint })
        }
        _ => Ok(()),
    }
}

/// Tokens that the model is to write.
fn written(report: &CalibrationReport) -> f64 {
    let windows: usize = report.sources.iter().filter(|s| s.kind == SELF).map(|s| s.windows).sum();
    (windows * report.seqlen) as f64
}

/// Memory of [`crate::self_calibrate`]: all weights and the caches of a batch of windows.
fn self_calibration_bytes(job: &Job<'_>, spec: &Spec, report: &CalibrationReport) -> u64 {
    let tensors = &job.checkpoint.tensors;
    let embedding = format!("{}{}.weight", spec.base, spec.embedding.name);
    let bytes = |name: &str| {
        let LoadedBytes { mapped, owned } = loaded_bytes(job.checkpoint, name);
        if name != embedding || block_parts(job.checkpoint, name).is_none() {
            return mapped + owned;
        }
        // Tokens are looked up in GGUF's blocks; a tied head is made of them.
        let stored = tensors.info(name).map_or(0, |info| info.bytes as u64);
        stored + if spec.head.tied { owned } else { 0 }
    };
    let mut weights: u64 = tensors.names().map(bytes).sum();
    if spec.head.unit_rows {
        weights += 4 * (spec.vocab * spec.embedding.width) as u64;
    }
    let turned = |linear: &LinearSpec| 4 * (linear.in_features * linear.out_features) as u64;
    let stages = (0..spec.layer_count()).flat_map(|layer| spec.stages(layer));
    let linears = stages.flat_map(|stage| stage.linears);
    weights += linears.filter(|l| l.transposed).map(|l| turned(&l)).sum::<u64>();
    let count = report.sources.iter().filter(|s| s.kind == SELF).map(|s| s.windows).sum();
    let windows = CalibrationOptions { nsamples: count, seqlen: report.seqlen, seed: report.seed };
    let kv = spec.kv_bytes_per_token(self_calibration::KV);
    let batch = SelfCalibration::new(windows).batch(spec).min(count);
    weights + (batch * (report.seqlen * kv + gptq_compute::KvMemory::SLACK)) as u64
}

/// A rough time from the operations and this machine's rate for products, measured on the spot.
#[derive(Default)]
struct Time {
    /// Of the run.
    seconds: f64,
    /// To write a token after the others.
    per_written: f64,
    operations: f64,
    rate: f64,
}

impl Time {
    fn new(job: &Job<'_>, spec: &Spec, layout: &Layout, tokens: usize, seqlen: usize) -> Self {
        let weights = layout.quantized_weights() as f64;
        // Reading, rounding and packing.
        let solving = weights / 2e7 / job.pool.threads() as f64;
        if tokens == 0 {
            return Self { seconds: solving, ..Self::default() };
        }
        let rate = gptq_compute::gemm_peak_rate(job.pool, 512);
        let corrects = job.options.correction != Correction::None;
        let (mut forward, mut sums) = (0.0, 0.0);
        for layer in 0..spec.layer_count() {
            // The share of the tokens that one expert sees.
            let share = spec.moe(layer).map_or(1.0, |moe| moe.top_k as f64 / moe.count as f64);
            for stage in spec.stages(layer) {
                let inputs = stage.linears.first().map_or(0.0, |l| l.in_features as f64);
                let outputs: f64 = stage.linears.iter().map(|l| l.out_features as f64).sum();
                let share = if stage.stage.expert().is_some() { share } else { 1.0 };
                forward += share * inputs * 2.0 * outputs;
                sums += share * inputs * inputs;
                if corrects && is_corrected(stage.stage) {
                    // The sum of both streams has no symmetry.
                    sums += share * inputs * 2.0 * inputs;
                }
            }
            let attention = spec.attention.heads * spec.attention.head_dim;
            forward += 2.0 * (seqlen * attention) as f64;
        }
        let mut logits = 0.0;
        if let Some(head) = spec.head_linear() {
            logits = 2.0 * (head.in_features * head.out_features) as f64;
            if layout.config.lm_head {
                sums += (head.in_features * head.in_features) as f64;
            }
        }
        let stages = spec.stages(0);
        let first = stages.iter().flat_map(|stage| &stage.linears).next();
        let weight = first.map(|linear| format!("{}.weight", linear.module));
        let codes = weight.and_then(|weight| block_parts(job.checkpoint, &weight)).is_some();
        let writing = if codes { WRITING_FROM_CODES } else { WRITING };
        let kv_read = (spec.kv_bytes_per_token(self_calibration::KV) * seqlen / 2) as f64;
        let per_written = (forward + logits) / writing + OPERATIONS_PER_KV_BYTE * kv_read;
        // How often the tokens of a stream pass through a block.
        let walks = match (job.options.true_sequential, corrects) {
            (true, _) => 1 + usize::from(job.options.runs_blocks_again()) + usize::from(corrects),
            // For the inputs and for the outputs; of both streams side by side, and the float one once more.
            (false, false) => 2,
            (false, true) => 5,
        };
        let operations = (walks as f64 * forward + sums) * tokens as f64;
        // A step is a pass, most of it once more, and the gradients of inputs and of weights, in f32; before and behind
        // the steps are three passes.
        let passes = match job.options.tune_blocks {
            0 => 0,
            passes => 4 * passes + 3,
        };
        let chunk = (windows_per_chunk(seqlen) * seqlen).min(tokens).max(1);
        let tuned = chunks_of(tune::TOKENS, chunk, tokens.div_ceil(chunk)) * chunk;
        let tuning = forward * (passes * tuned) as f64;
        Self {
            seconds: solving
                + operations / (efficiency(job.options.activations) * rate)
                + tuning / (TUNING * rate),
            per_written: per_written / rate,
            operations: operations + tuning,
            rate,
        }
    }
}

/// What a run reaches of the f32 rate, as measured on a processor with AVX-512.
fn efficiency(activations: Activations) -> f64 {
    match (activations, isa()) {
        (Activations::Bf16, Isa::Avx512Bf16) => 1.35,
        (Activations::Int8, Isa::Avx512Bf16) => 1.5,
        (Activations::Bf16, Isa::Avx512Vnni | Isa::AvxVnni) => 1.0,
        (Activations::Int8, Isa::Avx512Vnni | Isa::AvxVnni) => 1.05,
        _ => 0.75,
    }
}
