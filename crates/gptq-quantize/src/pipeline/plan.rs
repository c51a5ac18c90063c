//! What a run will need, before it starts.

use std::sync::Arc;

use gptq_format::DType;
use gptq_model::Spec;

use super::activations::CHUNK_TOKENS;
use super::layout::Layout;
use super::{Job, QuantizeOptions};
use crate::calibration::{CalibrationOptions, CalibrationReport, SELF};
use crate::error::{QuantizeError, Result};
use crate::report::PlanSummary;
use crate::rss;
use crate::self_calibration::SelfCalibration;

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
}

/// Plans a run without starting it.
///
/// # Errors
/// As [`super::quantize`], as far as headers and options tell.
pub fn plan(job: &Job<'_>) -> Result<Plan> {
    job.options.check()?;
    let spec = Arc::new(Spec::for_checkpoint(job.checkpoint)?);
    let layout = Layout::new(job.checkpoint, &spec, job.options)?;
    summarize(job, &spec, &layout)
}

pub(super) fn summarize(job: &Job<'_>, spec: &Spec, layout: &Layout) -> Result<Plan> {
    let calibration = job.calibration.filter(|_| job.options.method.needs_calibration());
    let (tokens, seqlen) = calibration.map_or((0, 0), |c| (c.report.tokens, c.report.seqlen));
    if seqlen > spec.max_positions && calibration.is_some() {
        return Err(QuantizeError::WindowTooLong { seqlen, max_positions: spec.max_positions });
    }
    let memory = memory(job.options, spec, tokens, seqlen);
    // What is resident already: the program, the tokenizer, the calibration text.
    let resident = rss::current_bytes().unwrap_or(0);
    let peak = resident + memory.iter().map(|(_, bytes)| bytes).sum::<u64>();
    let mut all = vec![("program, tokenizer and tokens", resident)];
    all.extend(memory);
    // Writing the calibration text needs the whole model, before the run and not beside it.
    let writing = calibration
        .filter(|c| c.report.sources.iter().any(|s| s.kind == SELF))
        .map_or(0, |c| self_calibration_bytes(job, spec, &c.report));
    if writing > 0 {
        all.push(("before the run: the model writes its text", writing));
    }
    let peak = peak.max(resident + writing);
    Ok(Plan {
        summary: PlanSummary {
            peak_rss_bytes: peak,
            output_bytes: layout.plan.total_bytes(),
            scratch_bytes: 0,
            seconds: seconds(job, spec, layout, tokens, seqlen),
        },
        blocks: spec.layer_count(),
        modules: layout.modules().count(),
        bits_per_weight: layout.bits_per_weight(),
        tokens,
        memory: all,
    })
}

/// Memory of [`crate::self_calibrate`]: all weights and the caches of a batch of windows.
fn self_calibration_bytes(job: &Job<'_>, spec: &Spec, report: &CalibrationReport) -> u64 {
    let tensors = &job.checkpoint.tensors;
    let infos = tensors.names().filter_map(|name| tensors.info(name).ok());
    let weights: u64 = infos
        .map(|info| match info.dtype {
            // The block types of GGUF are widened.
            DType::Ggml(_) => 4 * info.elements() as u64,
            _ => info.bytes as u64,
        })
        .sum();
    let windows =
        CalibrationOptions { nsamples: report.windows, seqlen: report.seqlen, seed: report.seed };
    let kv = spec.kv_bytes_per_token();
    let batch = SelfCalibration::new(windows).batch(kv).min(report.windows);
    weights + (batch * report.seqlen * kv) as u64
}

/// The largest of what blocks hold.
#[derive(Default)]
struct Largest {
    /// Inputs of a stage.
    inputs: u64,
    /// Outputs of a stage, of all its linears.
    outputs: u64,
    /// Weights of a linear.
    linear: u64,
    /// Weights of a block.
    block: u64,
    /// Elements of a block's Hessians.
    hessians: u64,
}

impl Largest {
    fn of(spec: &Spec) -> Self {
        let mut found = Self::default();
        for layer in 0..spec.layer_count() {
            let (mut block, mut hessians) = (0, 0);
            for stage in spec.stages(layer) {
                let inputs = stage.linears.first().map_or(0, |l| l.in_features) as u64;
                let outputs = stage.linears.iter().map(|l| l.out_features).sum::<usize>() as u64;
                let sizes = stage.linears.iter().map(|l| (l.in_features * l.out_features) as u64);
                found.inputs = found.inputs.max(inputs);
                found.outputs = found.outputs.max(outputs);
                found.linear = found.linear.max(sizes.max().unwrap_or(0));
                block += inputs * outputs;
                hessians += inputs * inputs;
            }
            found.block = found.block.max(block);
            found.hessians = found.hessians.max(hessians);
        }
        found
    }
}

fn memory(
    options: &QuantizeOptions,
    spec: &Spec,
    tokens: usize,
    seqlen: usize,
) -> Vec<(&'static str, u64)> {
    const F32: u64 = 4;
    let largest = Largest::of(spec);
    let widest = largest.inputs;
    let hidden = spec.hidden as u64;
    let tokens = tokens as u64;
    // Weights of one linear: as stored, as f32, in panels and codes of the sweep, packed twice;
    // the error takes three float copies once the sweep has freed its own.
    let solving = largest.linear * (2 * F32 + 3 * F32 + 2);
    // The block's quantized linears stay until it is finished.
    let block = largest.block * u64::from(options.bits.as_u32()) / 8;
    let mut parts = vec![("one block and the linear being solved", block + solving)];
    if tokens > 0 {
        let chunk = (CHUNK_TOKENS.max(seqlen) as u64).min(tokens);
        // Stream and stage input of every token; with experts also the MLP's input and output.
        let experts = if spec.layers.iter().any(|layer| layer.moe) { 2 * hidden } else { 0 };
        parts.push(("activations", tokens * (hidden + widest + experts) * F32));
        // Outputs of a stage, the packed inputs and the cache of one chunk.
        let kv = spec.kv_bytes_per_token() as u64 / spec.layer_count().max(1) as u64;
        parts.push((
            "temporaries of a chunk",
            chunk * ((largest.outputs + 2 * widest + hidden) * F32 + kv),
        ));
        // H, the factor, and two matrices while it is computed.
        // Without true-sequential order the block's Hessians exist together.
        let others = if options.true_sequential { 0 } else { largest.hessians };
        parts.push(("Hessian and factor", (4 * widest * widest + others) * F32));
        // Rows of the embedding that were touched stay mapped.
        parts.push(("embedding", (spec.vocab as u64 * hidden * 2).min(tokens * 4096)));
    }
    parts
}

/// A rough time from the operations and this machine's rate for products, measured on the spot.
fn seconds(job: &Job<'_>, spec: &Spec, layout: &Layout, tokens: usize, seqlen: usize) -> f64 {
    let weights = layout.quantized_weights() as f64;
    // Reading, rounding and packing.
    let solving = weights / 2e7 / job.pool.threads() as f64;
    if tokens == 0 {
        return solving;
    }
    let rate = gptq_compute::gemm_peak_rate(job.pool, 512);
    let mut per_token = 0.0;
    for layer in 0..spec.layer_count() {
        // The share of the tokens that one expert sees.
        let share = spec.moe(layer).map_or(1.0, |moe| moe.top_k as f64 / moe.count as f64);
        for stage in spec.stages(layer) {
            let inputs = stage.linears.first().map_or(0.0, |l| l.in_features as f64);
            let outputs: f64 = stage.linears.iter().map(|l| l.out_features as f64).sum();
            let share = if stage.stage.expert().is_some() { share } else { 1.0 };
            per_token += share * inputs * (inputs + 2.0 * outputs);
        }
        let attention = spec.attention.heads * spec.attention.head_dim;
        per_token += 2.0 * (seqlen * attention) as f64;
    }
    solving + per_token * tokens as f64 / (0.75 * rate)
}
