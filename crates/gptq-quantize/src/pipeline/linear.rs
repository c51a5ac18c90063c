//! One linear: read, solved, measured, packed and written, a slab of its outputs at a time.
//!
//! The outputs of a linear do not interact, so the codes are the same for any slabs; what has to be
//! in memory as floats is a slab.

use std::borrow::Cow;
use std::ops::Range;
use std::time::Instant;

use gptq_compute::{GptqParts, Linear, Matrix, QuantizedMatrix};
use gptq_format::{GptqLinear, ModuleSettings};
use gptq_model::{LinearRows, LinearSpec};
use half::f16;

use super::{Method, Run};
use crate::error::{QuantizeError, Result};
use crate::hessian::{Factor, Hessian, OutputError};
use crate::report::{ExpertRecord, ModuleRecord};
use crate::rss;
use crate::solver::{self, Corrected, Joined, Solution};

/// Weights of a slab, if that is more than half as many rows as the linear has inputs.
const SLAB_WEIGHTS: usize = 8 << 20;
/// Weights whose output error is computed together.
pub(crate) const ERROR_WEIGHTS: usize = 4 << 20;
/// Outputs that one task of the sweep takes.
const TASK_ROWS: usize = 64;

/// Outputs of a slab of a linear: enough tasks for many threads, and half the size of the Hessian or
/// less unless that is small.
pub(crate) fn slab_rows(inputs: usize, outputs: usize) -> usize {
    let rows = (inputs / 2).max(SLAB_WEIGHTS / inputs.max(1));
    rows.next_multiple_of(TASK_ROWS).min(outputs).max(1)
}

/// What the calibration tells of the inputs of a linear.
#[derive(Clone, Copy)]
pub(super) struct Fitted<'t> {
    /// Of `solved`.
    pub(super) factor: &'t Factor,
    /// The Hessian that the loss is taken with: `inputs` with its off-diagonals reduced by `shrink`.
    pub(super) solved: &'t Hessian,
    /// The Hessian of the inputs.
    pub(super) inputs: &'t Hessian,
    pub(super) shrink: f64,
}

/// What a linear is solved with.
pub(super) struct Task<'t> {
    /// Index of its block; the number of blocks for the head.
    pub(super) layer: usize,
    pub(super) linear: &'t LinearSpec,
    pub(super) settings: &'t ModuleSettings,
    /// `None`: it is rounded to nearest.
    pub(super) fitted: Option<Fitted<'t>>,
    /// How it makes up for the errors of its inputs.
    pub(super) corrected: Option<Corrected<'t>>,
    /// Of an expert: how it was calibrated.
    pub(super) expert: Option<&'t ExpertRecord>,
}

impl Run<'_> {
    /// Solves a linear, writes it and enters it into the report.
    pub(super) fn solve_linear(&mut self, task: &Task<'_>) -> Result<GptqLinear> {
        let Task { layer, linear, settings, fitted, expert, .. } = *task;
        let start = Instant::now();
        let mut rows = LinearRows::open(self.job.checkpoint, self.spec, linear)?;
        let mut bias = rows.take_bias();
        if let Some(bias) = &mut bias {
            self.folded.scale_bias(&linear.module, bias);
        }
        let (solution, error) = self.solve_slabs(task, &rows)?;
        drop(rows);
        let loss = solution.loss;
        let packed = self.phases.time("pack", || pack(linear, settings, solution, bias))?;
        self.progress.phase("write");
        self.phases
            .time("write", || self.output.write_linear(&linear.module, &packed, self.layout))?;
        let record = ModuleRecord {
            layer,
            module: linear.name.clone(),
            shape: [linear.out_features, linear.in_features],
            bits: settings.bits.as_u32(),
            group_size: settings.group_size,
            loss,
            relative_output_error: fitted.map(|_| error.relative()),
            damp_percent: fitted.map_or(0.0, |fitted| fitted.factor.damp_percent),
            damp_tries: fitted.map_or(0, |fitted| fitted.factor.tries),
            shrink: fitted.map_or(0.0, |fitted| fitted.shrink),
            nsamples: fitted.map_or(0, |fitted| fitted.inputs.tokens() as u64),
            expert: expert.cloned(),
            awq: self.folded.record(&linear.module),
            seconds: start.elapsed().as_secs_f64(),
            rss_bytes: rss::current_bytes(),
        };
        self.progress.module_done(&record);
        self.records.push(record);
        Ok(packed)
    }

    fn solve_slabs(
        &mut self,
        task: &Task<'_>,
        rows: &LinearRows<'_>,
    ) -> Result<(Solution, OutputError)> {
        let Task { linear, settings, fitted, corrected, .. } = *task;
        let (pool, options) = (self.job.pool, self.job.options);
        let (inputs, outputs) = (linear.in_features, linear.out_features);
        let grid = self.job.options.grid_of(settings);
        let group_size = settings.group_size;
        let slab = slab_rows(inputs, outputs);
        let (mut joined, mut error) = (Joined::new(outputs), OutputError::default());
        for first in (0..outputs).step_by(slab) {
            let range = first..(first + slab).min(outputs);
            let mut weights = self.phases.time("read", || rows.read(range.clone()))?;
            self.folded.scale(&linear.module, range, &mut weights);
            // What the codes are meant to come near to.
            let mut targets = Cow::from(&weights);
            let mut part = self.phases.time("solve", || match (fitted, options.method) {
                (Some(Fitted { factor, .. }), Method::Gptq) => match corrected {
                    None => solver::gptq(pool, &weights, factor, grid),
                    Some(corrected) => {
                        let (part, aimed_at) = corrected.gptq(pool, &weights, factor, grid);
                        targets = aimed_at;
                        part
                    }
                },
                (Some(Fitted { factor, .. }), Method::Obq) => {
                    if let Some(corrected) = corrected {
                        targets = corrected.weights(pool, &weights, factor);
                    }
                    solver::obq(pool, &targets, factor, group_size, grid)
                }
                (Some(Fitted { solved, .. }), Method::Awq) => {
                    solver::clipped(pool, &weights, solved, group_size, grid)
                }
                _ => solver::rtn(pool, &weights, inputs, group_size, grid),
            });
            if let Some(Fitted { factor, solved, .. }) = fitted.filter(|_| options.refine > 0) {
                part = self.phases.time("refine", || {
                    solver::refine(pool, &targets, solved, factor, grid, options.refine, part)
                });
            }
            // The grid stops at the largest scale that can be stored; weights beyond it would be cut.
            if part.scales.iter().any(|scale| scale.abs() >= f16::MAX.to_f32()) {
                return Err(QuantizeError::ScaleTooLarge {
                    path: self.job.checkpoint.path.clone(),
                    tensor: format!("{}.weight", linear.module),
                    largest: weights.iter().fold(0.0, |largest, w| w.abs().max(largest)),
                });
            }
            if let Some(Fitted { inputs: hessian, .. }) = fitted {
                self.phases.time("error", || {
                    let piece = (ERROR_WEIGHTS / inputs.max(1)).max(1);
                    for (index, targets) in targets.chunks(piece * inputs).enumerate() {
                        let first = index * piece;
                        let rows = first..first + targets.len() / inputs;
                        hessian.add_error(pool, targets, part.dequantize_rows(rows), &mut error);
                    }
                });
            }
            drop(targets);
            drop(weights);
            joined.push(part);
        }
        // The slabs cover all outputs; a linear without outputs has no shape to be stored in.
        let solution = joined.finish().ok_or_else(|| QuantizeError::Option {
            option: "model",
            reason: format!("{} has no outputs", linear.module),
        })?;
        Ok((solution, error))
    }
}

pub(super) fn pack(
    linear: &LinearSpec,
    settings: &ModuleSettings,
    solution: Solution,
    bias: Option<Vec<f32>>,
) -> Result<GptqLinear> {
    let Solution { codes, scales, zeros, g_idx, .. } = solution;
    let scales = scales.into_iter().map(f16::from_f32).collect();
    let shape = [linear.in_features, linear.out_features];
    Ok(GptqLinear::from_codes(settings.bits, shape, &codes, scales, zeros, g_idx, bias)?)
}

/// The linear as it will be loaded from the output.
pub(super) fn runtime_linear(module: &str, packed: GptqLinear) -> Result<Linear> {
    let matrix = QuantizedMatrix::from_gptq(GptqParts {
        bits: packed.bits.as_u32(),
        in_features: packed.in_features,
        out_features: packed.out_features,
        qweight: &packed.qweight,
        scales: &packed.scales,
        zeros: &packed.zeros,
        g_idx: &packed.g_idx,
    })
    .map_err(|source| QuantizeError::Compute { module: module.to_owned(), source })?;
    // The bias as it was saved.
    let bias = packed.bias.map(|b| b.iter().map(|&x| f16::from_f32(x).to_f32()).collect());
    Ok(Linear { weight: Matrix::Quantized(matrix), bias })
}

/// Some `rows` of the `outputs` of a linear that stand for all, in `pieces`, evenly spread; all if they are no more.
pub(super) fn spread(outputs: usize, rows: usize, pieces: usize) -> Vec<Range<usize>> {
    let (pieces, piece) = if outputs <= rows { (1, outputs) } else { (pieces, rows / pieces) };
    let first = |index: usize| index * (outputs - piece) / (pieces - 1).max(1);
    (0..pieces).map(|index| first(index)..first(index) + piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_stand_for_all_are_spread_over_them() {
        assert_eq!(spread(200, 256, 4), vec![0..200; 1]);
        assert_eq!(spread(256, 256, 4), vec![0..256; 1]);
        assert_eq!(spread(576, 128, 4), [0..32, 181..213, 362..394, 544..576]);
        assert!(spread(257, 256, 4).iter().all(|piece| piece.len() == 64 && piece.end <= 257));
    }

    #[test]
    fn slabs_are_whole_tasks_and_at_most_the_linear() {
        for (inputs, outputs, rows) in [
            (64, 256, 256),
            (2048, 32_000, 4096),
            (5632, 2048, 2048),
            (11_008, 32_000, 5504),
            (1, 7, 7),
            (1 << 24, 3, 3),
        ] {
            assert_eq!(slab_rows(inputs, outputs), rows, "{inputs} x {outputs}");
        }
    }
}
