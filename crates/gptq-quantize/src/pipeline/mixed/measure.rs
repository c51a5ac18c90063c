//! The measurements: one pass over the float model.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use gptq_compute::{Linear, Tensor, kl_divergence};
use gptq_format::ModuleSettings;
use gptq_model::{
    Block, BlockState, Ctx, Embedder, HeadLayer, LinearRows, LinearSource, LinearSpec, Spec, Stage,
};

use super::PROBE_TOKENS;
use super::groups::{Family, Group, WIDTHS, groups};
use crate::calibration::{CalibrationReport, CalibrationSet};
use crate::error::{QuantizeError, Result};
use crate::hessian::{Damping, Factor, Hessian, OutputError};
use crate::pipeline::activations::Activations;
use crate::pipeline::layout::Layout;
use crate::pipeline::linear::{pack, runtime_linear, slab_rows, spread};
use crate::pipeline::memory::{Memory, total};
use crate::pipeline::plan::check_limit;
use crate::pipeline::{Job, Method, Phases, QuantizeOptions};
use crate::progress::Progress;
use crate::rss;
use crate::solver::{self, Correction, Joined, Solution};

/// Tokens of the Hessians, at most.
const FIT_TOKENS: usize = 32 << 10;
/// Tokens of one probe at most, so that there are several.
const PROBE_WINDOW: usize = 256;
/// Rows of a linear whose error is measured at each width, and the pieces that they come in.
const SAMPLE_ROWS: usize = 128;
const SAMPLE_PIECES: usize = 4;
/// Rows of logits that exist at a time.
const LOGIT_ROWS: usize = 128;

/// What the groups of a model cost.
#[derive(Debug, Clone)]
pub struct Sensitivity {
    pub(super) groups: Vec<Group>,
    /// Tokens whose logits were compared.
    pub(super) tokens: usize,
    pub(super) seconds: f64,
}

impl Sensitivity {
    /// What [`sensitivity`] depends on besides the model and the calibration, in words: it measures the float model,
    /// in f32, and no linear is corrected, refined, tuned or folded. Nor does it depend on where a run may write.
    pub fn key(options: &QuantizeOptions) -> String {
        let defaults = QuantizeOptions::default();
        let plain = QuantizeOptions {
            correction: Correction::None,
            correction_strength: None,
            damp_auto: false,
            true_sequential: true,
            activations: defaults.activations,
            max_shard_bytes: defaults.max_shard_bytes,
            refine: 0,
            tune_blocks: 0,
            awq_scales: false,
            max_memory: None,
            overwrite: false,
            resume: false,
            ..options.clone()
        };
        format!("{plain:?}")
    }
}

/// A linear at the probe's width, and its place in the block.
type Probed = (Stage, usize, Linear);

/// Measures what each group of linears costs the model at low precision. Depends on the job's
/// calibration and settings, not on its bits; not on the number of threads.
///
/// # Errors
/// [`QuantizeError::Option`] for methods other than GPTQ, else as a run.
pub fn sensitivity(job: &Job<'_>, progress: &dyn Progress) -> Result<Sensitivity> {
    let refuse = |reason: String| Err(QuantizeError::Option { option: "target_bpw", reason });
    job.options.check()?;
    let Some(set) = job.calibration.filter(|_| job.options.method == Method::Gptq) else {
        return refuse("chooses bits for --method gptq, from calibration data".into());
    };
    let start = Instant::now();
    let spec = Arc::new(Spec::for_checkpoint(job.checkpoint)?);
    let layout = Layout::new(job.checkpoint, &spec, job.options)?;
    let (fit, probes) = split(set);
    if probes.is_empty() {
        return refuse("needs calibration windows of two tokens or more (--seqlen)".into());
    }
    let mut rows = 0;
    let window = |probe: &Vec<u32>| {
        rows += probe.len();
        rows - probe.len()..rows
    };
    let windows = probes.iter().map(window).collect();
    let groups = groups(&spec, &layout);
    if job.options.max_memory.is_some() {
        // Neither corrected nor tuned, and nothing is held out.
        let options = QuantizeOptions {
            correction: Correction::None,
            tune_blocks: 0,
            damp_auto: false,
            ..job.options.clone()
        };
        let plain = Job { options: &options, ..*job };
        let CalibrationReport { tokens, seqlen, .. } = fit.report;
        let memory = Memory::new(&plain, &spec, &layout, tokens.min(FIT_TOKENS + seqlen), seqlen);
        let streams = ((groups.len() + 1) * rows * spec.hidden * size_of::<f32>()) as u64;
        let resident = rss::current_bytes().unwrap_or(0);
        let need = resident + total(&memory.measuring(streams));
        let what = "measuring what --target-bpw chooses from";
        check_limit(job.options.max_memory, need, what, "; fewer windows (--nsamples) need less")?;
    }
    let mut ctx = Ctx::new(Arc::clone(job.pool));
    let (spec, layout, probes) = (&spec, &layout, &*probes);
    let mut pass = Pass { job, spec, layout, probes, windows, groups, streams: Vec::new() };
    let clean = pass.run(&mut ctx, &fit, progress)?;
    pass.divergences(&mut ctx, &clean)?;
    Ok(Sensitivity { groups: pass.groups, tokens: rows, seconds: start.elapsed().as_secs_f64() })
}

/// The windows that the Hessians are summed over, and others whose logits are compared; the same
/// where there are few. Both come from all sources, whose windows lie one behind the other.
fn split(set: &CalibrationSet) -> (CalibrationSet, Vec<Vec<u32>>) {
    let windows: Vec<&Vec<u32>> =
        scattered(set.windows.len()).map(|index| &set.windows[index]).collect();
    let (mut probes, mut tokens) = (Vec::new(), 0);
    for window in &windows {
        let len = window.len().min(PROBE_WINDOW).min(PROBE_TOKENS - tokens);
        if len > 1 {
            probes.push(window[..len].to_vec());
            tokens += len;
        }
    }
    let rest = if windows.len() >= 4 * probes.len() { probes.len() } else { 0 };
    let mut left = FIT_TOKENS;
    let fit = windows[rest..].iter().take_while(|window| {
        let before = left;
        left = left.saturating_sub(window.len());
        before > 0
    });
    let fit = fit.map(|&window| window.clone()).collect();
    (CalibrationSet::from_windows(fit, set.report.clone()), probes)
}

/// The numbers below `count`, each once, in steps of about the golden section: any run of them is spread over all.
fn scattered(count: usize) -> impl Iterator<Item = usize> {
    let common = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = (count * 618 / 1000).max(1);
    while common(step, count) > 1 {
        step += 1;
    }
    (0..count).map(move |index| index * step % count)
}

struct Pass<'a> {
    job: &'a Job<'a>,
    spec: &'a Arc<Spec>,
    layout: &'a Layout,
    probes: &'a [Vec<u32>],
    /// The rows of each probe.
    windows: Vec<Range<usize>>,
    groups: Vec<Group>,
    /// The stream of the probes with one group quantized, for each group so far.
    streams: Vec<Tensor>,
}

impl Pass<'_> {
    /// Measures errors and takes the variants through all blocks; gives the float model's stream.
    fn run(
        &mut self,
        ctx: &mut Ctx,
        fit: &CalibrationSet,
        progress: &dyn Progress,
    ) -> Result<Tensor> {
        let (job, spec) = (self.job, self.spec);
        progress.phase("sensitivity");
        let (mut phases, mut clean) = (Phases::default(), Tensor::default());
        let kept = (job.options.token_weights, job.options.activation_dtype);
        let mut activations = Activations::embed(ctx, job.checkpoint, spec, fit, kept, None)?;
        let embedder = Embedder::load(job.checkpoint, spec, LinearSource::Copied)?;
        let positions: Vec<u32> = self.probes.iter().flat_map(|w| 0..w.len() as u32).collect();
        embedder.forward(ctx, &self.probes.concat(), &positions, &mut clean)?;
        drop(embedder);
        for layer in 0..spec.layer_count() {
            let mut block = Block::load(job.checkpoint, spec, layer, LinearSource::Copied)?;
            let mut streams = std::mem::take(&mut self.streams);
            for stream in &mut streams {
                self.forward(ctx, &block, stream)?;
            }
            let mut probed = Vec::new();
            activations.begin(ctx, &block, &mut phases)?;
            for stage in spec.stage_order(layer) {
                if let Some(place) = self.group_of(layer, stage) {
                    let fallback = job.options.moe_fallback;
                    let inputs = activations.inputs(ctx, &block, stage, fallback, &mut phases)?;
                    let hessian = inputs.gram.map(Hessian::new);
                    self.solve(place, stage, hessian.as_ref(), &mut probed)?;
                }
                activations.advance(ctx, &block, stage, &mut phases)?;
            }
            for group in 0..self.groups.len() {
                let Group { layer: of, family, .. } = self.groups[group];
                if of != layer {
                    continue;
                }
                let floats = swap(&mut block, &mut probed, family)?;
                let mut stream = clean.clone();
                self.forward(ctx, &block, &mut stream)?;
                streams.push(stream);
                for (stage, index, linear) in floats {
                    block.set_linear(stage, index, linear)?;
                }
            }
            self.streams = streams;
            self.forward(ctx, &block, &mut clean)?;
            progress.phase_progress(layer + 1, spec.layer_count());
            if progress.interrupted() {
                return Err(QuantizeError::Interrupted { done: 0, total: spec.layer_count() });
            }
        }
        Ok(clean)
    }

    /// Takes a stream of the probes through a block.
    fn forward(&self, ctx: &mut Ctx, block: &Block, stream: &mut Tensor) -> Result<()> {
        let mut state = BlockState::new(std::mem::take(stream));
        block.run_whole(ctx, &mut state, &self.windows)?;
        *stream = state.hidden;
        Ok(())
    }

    /// The place of the group that the linears of a stage belong to; `None` where they are not free.
    fn group_of(&self, layer: usize, stage: Stage) -> Option<usize> {
        let family = Family::of(stage);
        self.groups.iter().position(|group| group.layer == layer && group.family == family)
    }

    /// Solves the linears of a stage of group `place` at the probe's width, and samples of them at each.
    fn solve(
        &mut self,
        place: usize,
        stage: Stage,
        hessian: Option<&Hessian>,
        probed: &mut Vec<Probed>,
    ) -> Result<()> {
        let (layer, probe) = (self.groups[place].layer, WIDTHS[self.groups[place].probe()]);
        let linears = self.spec.stage_linears(layer, stage);
        if let (Some(hessian), Some(first)) = (hessian, linears.first())
            && !hessian.is_finite()
        {
            return Err(QuantizeError::NotFinite { layer, module: first.module.clone() });
        }
        let mut factor: Option<Factor> = None;
        for (index, linear) in linears.iter().enumerate() {
            // A group is free as a whole.
            let Some(&settings) = self.layout.settings(&linear.module) else { continue };
            if let (None, Some(hessian)) = (&factor, hessian) {
                factor =
                    Some(hessian.factor(
                        self.job.options.order_of(&settings, true),
                        self.damping(&settings),
                    ));
            }
            let mut rows = LinearRows::open(self.job.checkpoint, self.spec, linear)?;
            let bias = rows.take_bias();
            if let Some(fitted) = factor.as_ref().zip(hessian) {
                let errors = self.sampled(linear, &rows, &settings, fitted)?;
                let weights = (linear.in_features * linear.out_features) as u64;
                let group = &mut self.groups[place];
                group.measured += weights;
                for (sum, error) in group.errors.iter_mut().zip(errors) {
                    *sum += weights as f64 * error;
                }
            }
            let settings = ModuleSettings { bits: probe, ..settings };
            let mut joined = Joined::new(linear.out_features);
            let slab = slab_rows(linear.in_features, linear.out_features);
            for first in (0..linear.out_features).step_by(slab) {
                let range = first..(first + slab).min(linear.out_features);
                joined.push(self.solution(&rows.read(range)?, &settings, linear, factor.as_ref()));
            }
            let Some(solution) = joined.finish() else { continue };
            let packed = pack(linear, &settings, solution, bias)?;
            probed.push((stage, index, runtime_linear(&linear.module, packed)?));
        }
        Ok(())
    }

    /// Relative output error of a sample of rows at each width.
    fn sampled(
        &self,
        linear: &LinearSpec,
        rows: &LinearRows<'_>,
        settings: &ModuleSettings,
        (factor, hessian): (&Factor, &Hessian),
    ) -> Result<[f64; 4]> {
        let mut weights = Vec::new();
        for range in spread(linear.out_features, SAMPLE_ROWS, SAMPLE_PIECES) {
            weights.extend(rows.read(range)?);
        }
        Ok(WIDTHS.map(|bits| {
            let settings = ModuleSettings { bits, ..*settings };
            let solution = self.solution(&weights, &settings, linear, Some(factor));
            let mut error = OutputError::default();
            hessian.add_error(self.job.pool, &weights, solution.dequantize(), &mut error);
            error.relative()
        }))
    }

    /// Solves with the grid, order and damping of the run.
    fn solution(
        &self,
        weights: &[f32],
        settings: &ModuleSettings,
        linear: &LinearSpec,
        factor: Option<&Factor>,
    ) -> Solution {
        let options = self.job.options;
        let grid = options.grid_of(settings);
        match factor {
            Some(factor) => solver::gptq(self.job.pool, weights, factor, grid),
            None => {
                solver::rtn(self.job.pool, weights, linear.in_features, settings.group_size, grid)
            }
        }
    }

    fn damping(&self, settings: &ModuleSettings) -> Damping {
        let options = self.job.options;
        Damping {
            percent: settings.damp_percent.unwrap_or(options.damp_percent),
            auto_increment: options.damp_auto_increment,
        }
    }

    /// Compares the variants' logits (of a model without logits: its output) with the float model's.
    fn divergences(&mut self, ctx: &mut Ctx, clean: &Tensor) -> Result<()> {
        let (checkpoint, spec) = (self.job.checkpoint, self.spec);
        let embedder = Embedder::load(checkpoint, spec, LinearSource::Copied)?;
        let head = HeadLayer::load_on(self.job.pool, checkpoint, spec, &embedder)?;
        let (mut part, mut normalized) = (Tensor::default(), Tensor::default());
        let (mut expected, mut got) = (Tensor::default(), Tensor::default());
        let mut sums = vec![0.0; self.groups.len()];
        for first in (0..clean.rows()).step_by(LOGIT_ROWS) {
            let count = LOGIT_ROWS.min(clean.rows() - first);
            let mut logits = |ctx: &mut Ctx, stream: &Tensor, out: &mut Tensor| {
                part.resize(count, stream.cols());
                for row in 0..count {
                    part.row_mut(row).copy_from_slice(stream.row(first + row));
                }
                head.normalize(ctx, &part, &mut normalized);
                head.logits(ctx, &normalized, out);
                if out.cols() == 0 {
                    std::mem::swap(out, &mut normalized);
                }
            };
            logits(ctx, clean, &mut expected);
            for (sum, stream) in sums.iter_mut().zip(&self.streams) {
                logits(ctx, stream, &mut got);
                *sum += if spec.head.name.is_some() {
                    kl_divergence(&ctx.pool, &expected, &got).iter().map(|d| d.kl).sum::<f64>()
                } else {
                    distance(&expected, &got)
                };
            }
        }
        for (group, sum) in self.groups.iter_mut().zip(sums) {
            group.kl = sum / clean.rows().max(1) as f64;
            if !group.kl.is_finite() {
                let module = group.names.join(", ");
                return Err(QuantizeError::NotFinite { layer: group.layer, module });
            }
        }
        self.streams.clear();
        Ok(())
    }
}

/// Puts the quantized linears of a family into the block; gives the floats that were there.
fn swap(block: &mut Block, probed: &mut Vec<Probed>, family: Family) -> Result<Vec<Probed>> {
    let (of, rest) =
        std::mem::take(probed).into_iter().partition(|(stage, ..)| Family::of(*stage) == family);
    *probed = rest;
    let of: Vec<Probed> = of;
    let mut floats = Vec::with_capacity(of.len());
    for (stage, index, linear) in of {
        if let Some(float) = block.take_linear(stage, index) {
            floats.push((stage, index, float));
        }
        block.set_linear(stage, index, linear)?;
    }
    Ok(floats)
}

/// Σ over rows of ‖a - b‖² / ‖a‖².
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let row = |index: usize| {
        let pairs = || a.row(index).iter().zip(b.row(index));
        let apart: f64 = pairs().map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let energy: f64 = pairs().map(|(x, _)| f64::from(*x).powi(2)).sum();
        if energy > 0.0 { apart / energy } else { apart }
    };
    (0..a.rows()).map(row).sum()
}

#[cfg(test)]
mod tests {
    use gptq_format::CheckpointFormat;

    use super::*;
    use crate::calibration::{CalibrationOptions, CalibrationReport};

    fn set(windows: usize, seqlen: usize) -> CalibrationSet {
        let windows: Vec<Vec<u32>> = (0..windows).map(|w| vec![w as u32; seqlen]).collect();
        let options = CalibrationOptions { nsamples: windows.len(), seqlen, seed: 0 };
        let report = CalibrationReport::new(Vec::new(), &windows, &options, 10);
        CalibrationSet::from_windows(windows, report)
    }

    #[test]
    fn probes_are_not_fitted_to_where_there_is_enough() {
        let (fit, probes) = split(&set(32, 512));
        let first: Vec<_> = probes.iter().map(|p| (p[0], p.len())).collect();
        assert_eq!(first, [(0, 256), (19, 256)]);
        assert_eq!(fit.windows.len(), 30);
        assert!(fit.windows.iter().all(|window| probes.iter().all(|p| p[0] != window[0])));
        let (fit, probes) = split(&set(3, 64));
        assert_eq!((probes.len(), fit.windows.len()), (3, 3));
        let (fit, _) = split(&set(128, 2048));
        assert_eq!(fit.windows.len(), FIT_TOKENS / 2048);
    }

    #[test]
    fn what_decides_the_grids_is_part_of_the_key() {
        let key = Sensitivity::key(&QuantizeOptions::default());
        let format = CheckpointFormat::GptqV2;
        let other = QuantizeOptions { format, ..QuantizeOptions::default() };
        assert_ne!(Sensitivity::key(&other), key);
        assert_eq!(Sensitivity::key(&QuantizeOptions { refine: 2, ..Default::default() }), key);
    }

    #[test]
    fn a_few_windows_come_from_all_sources() {
        let (fit, probes) = split(&set(128, 2048));
        // Four sources, of 32 windows each.
        for source in 0..4 {
            let of = |window: &&Vec<u32>| window[0] / 32 == source;
            assert!(fit.windows.iter().filter(of).count() >= 3);
        }
        assert!(probes[0][0] / 64 != probes[1][0] / 64, "both halves are judged on");
        for count in 0..40 {
            let mut all: Vec<usize> = scattered(count).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
        }
    }
}
