//! One stage: Hessian, factors, and the solution of each of its linears.

use std::time::Instant;

use gptq_compute::sweep::Grid;
use gptq_compute::{GptqParts, Linear, Matrix, QuantizedMatrix};
use gptq_format::{CheckpointFormat, GptqLinear, ModuleSettings};
use gptq_model::{Block, LinearSource, LinearSpec, Stage, load_linear};
use half::f16;

use super::activations::StageInputs;
use super::{Method, QuantizeOptions, Run};
use crate::error::{QuantizeError, Result};
use crate::hessian::{Damping, Factor, Hessian};
use crate::order::OrderOptions;
use crate::report::{ExpertRecord, ModuleRecord};
use crate::rss;
use crate::solver::{self, Solution};

/// What makes two linears of a stage share a factor.
type FactorKey = (OrderOptions, Damping);

impl Run<'_> {
    /// Solves the linears of `stage` against the sum over its inputs (or rounds them where these
    /// say so), writes them, and puts them into the block as packed codes.
    pub(super) fn solve_stage(
        &mut self,
        block: &mut Block,
        layer: usize,
        stage: Stage,
        inputs: StageInputs,
    ) -> Result<()> {
        let StageInputs { gram, expert } = inputs;
        let Some(gram) = gram else {
            return self.round_linears(block, layer, stage, expert.as_ref());
        };
        let linears = self.quantized(layer, stage);
        let Some(((_, first), _)) = linears.split_first() else { return Ok(()) };
        let hessian = self.phases.time("hessian", || Hessian::new(gram));
        if !hessian.is_finite() {
            return Err(QuantizeError::NotFinite { layer, module: first.module.clone() });
        }
        let mut factors: Vec<(FactorKey, Factor)> = Vec::new();
        for (index, linear) in linears {
            let Some(settings) = self.layout.settings(&linear.module).copied() else { continue };
            let (order, damping) = self.factor_key(&settings);
            if !factors.iter().any(|(key, _)| *key == (order, damping)) {
                self.progress.phase("solve");
                let factor = self.phases.time("factor", || hessian.factor(order, damping));
                factors.push(((order, damping), factor));
            }
            let factor = factors.iter().find(|(key, _)| *key == (order, damping)).map(|(_, f)| f);
            self.solve_linear(
                block,
                layer,
                stage,
                index,
                &linear,
                &settings,
                factor.map(|f| (f, &hessian)),
                expert.as_ref(),
            )?;
        }
        Ok(())
    }

    /// Rounds the linears of `stage` to nearest.
    pub(super) fn round_stage(
        &mut self,
        block: &mut Block,
        layer: usize,
        stage: Stage,
    ) -> Result<()> {
        self.round_linears(block, layer, stage, None)
    }

    fn round_linears(
        &mut self,
        block: &mut Block,
        layer: usize,
        stage: Stage,
        expert: Option<&ExpertRecord>,
    ) -> Result<()> {
        self.progress.phase("solve");
        for (index, linear) in self.quantized(layer, stage) {
            if let Some(settings) = self.layout.settings(&linear.module).copied() {
                self.solve_linear(block, layer, stage, index, &linear, &settings, None, expert)?;
            }
        }
        Ok(())
    }

    /// The linears of a stage that are quantized, with their index.
    fn quantized(&self, layer: usize, stage: Stage) -> Vec<(usize, LinearSpec)> {
        let all = self.spec.stage_linears(layer, stage).into_iter().enumerate();
        all.filter(|(_, l)| self.layout.settings(&l.module).is_some()).collect()
    }

    fn factor_key(&self, settings: &ModuleSettings) -> FactorKey {
        let options = self.job.options;
        // OBQ chooses its own order within the row.
        let ordered = options.method == Method::Gptq;
        let order = OrderOptions {
            group_size: settings.group_size,
            desc_act: ordered && settings.desc_act,
            act_group_aware: ordered
                && !settings.desc_act
                && settings.act_group_aware.unwrap_or(options.act_group_aware),
            static_groups: settings.static_groups.unwrap_or(options.static_groups),
        };
        let damping = Damping {
            percent: settings.damp_percent.unwrap_or(options.damp_percent),
            auto_increment: options.damp_auto_increment,
        };
        (order, damping)
    }

    #[allow(clippy::too_many_arguments)]
    fn solve_linear(
        &mut self,
        block: &mut Block,
        layer: usize,
        stage: Stage,
        index: usize,
        linear: &LinearSpec,
        settings: &ModuleSettings,
        fitted: Option<(&Factor, &Hessian)>,
        expert: Option<&ExpertRecord>,
    ) -> Result<()> {
        let start = Instant::now();
        let (job, pool) = (self.job, self.job.pool);
        let source = self.phases.time("read", || {
            load_linear(job.checkpoint, self.spec, linear, LinearSource::Copied)
        })?;
        let Matrix::Dense(dense) = &source.weight else {
            return Err(QuantizeError::AlreadyQuantized {
                path: job.checkpoint.path.clone(),
                bits: settings.bits.as_u32(),
            });
        };
        let weights = dense.to_f32();
        if let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            return Err(QuantizeError::WeightNotFinite {
                path: job.checkpoint.path.clone(),
                tensor: format!("{}.weight", linear.module),
                index,
                value: weights[index],
            });
        }
        let v1 = self.layout.config.format == CheckpointFormat::Gptq;
        let grid = Grid {
            bits: settings.bits.as_u32(),
            sym: settings.sym,
            mse: QuantizeOptions::mse_of(settings),
            min_zero: u8::from(v1),
            f16_scales: true,
        };
        let group_size = settings.group_size;
        let solution = self.phases.time("solve", || match (fitted, job.options.method) {
            (Some((factor, _)), Method::Gptq) => solver::gptq(pool, &weights, factor, grid),
            (Some((factor, _)), Method::Obq) => {
                solver::obq(pool, &weights, factor, group_size, grid)
            }
            _ => solver::rtn(pool, &weights, linear.in_features, group_size, grid),
        });
        // The grid stops at the largest scale that can be stored; weights beyond it would be cut.
        if solution.scales.iter().any(|&scale| scale >= f16::MAX.to_f32()) {
            return Err(QuantizeError::ScaleTooLarge {
                path: job.checkpoint.path.clone(),
                tensor: format!("{}.weight", linear.module),
                largest: weights.iter().fold(0.0, |largest, w| w.abs().max(largest)),
            });
        }
        let relative_output_error = fitted.map(|(_, hessian)| {
            let error = || hessian.relative_error(pool, &weights, &solution.dequantize());
            self.phases.time("error", error)
        });
        drop(weights);
        let loss = solution.loss;
        let packed = self.phases.time("pack", || pack(linear, settings, solution, source.bias))?;
        let matrix = self.phases.time("pack", || runtime_matrix(linear, &packed))?;
        self.progress.phase("write");
        self.phases
            .time("write", || self.output.write_linear(&linear.module, &packed, self.layout))?;
        // The bias as it was saved.
        let bias = packed.bias.map(|b| b.iter().map(|&x| f16::from_f32(x).to_f32()).collect());
        block.set_linear(stage, index, Linear { weight: Matrix::Quantized(matrix), bias })?;
        let record = ModuleRecord {
            layer,
            module: linear.name.clone(),
            shape: [linear.out_features, linear.in_features],
            bits: settings.bits.as_u32(),
            group_size,
            loss,
            relative_output_error,
            damp_percent: fitted.map_or(0.0, |(factor, _)| factor.damp_percent),
            damp_tries: fitted.map_or(0, |(factor, _)| factor.tries),
            nsamples: fitted.map_or(0, |(_, hessian)| hessian.tokens() as u64),
            expert: expert.cloned(),
            seconds: start.elapsed().as_secs_f64(),
            rss_bytes: rss::current_bytes(),
        };
        self.progress.module_done(&record);
        self.records.push(record);
        Ok(())
    }
}

fn pack(
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

fn runtime_matrix(linear: &LinearSpec, packed: &GptqLinear) -> Result<QuantizedMatrix> {
    QuantizedMatrix::from_gptq(GptqParts {
        bits: packed.bits.as_u32(),
        in_features: packed.in_features,
        out_features: packed.out_features,
        qweight: &packed.qweight,
        scales: &packed.scales,
        zeros: &packed.zeros,
        g_idx: &packed.g_idx,
    })
    .map_err(|source| QuantizeError::Compute { module: linear.module.clone(), source })
}
