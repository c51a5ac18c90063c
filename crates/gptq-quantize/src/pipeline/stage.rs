//! Linears that share their input: Hessian, factor, and the solution of each of them.

use gptq_format::{GptqLinear, ModuleSettings};
use gptq_model::{Block, LinearSpec, Stage};

use super::held_out::Regularization;
use super::inputs::StageInputs;
use super::linear::{Fitted, Task, runtime_linear};
use super::{Method, Run};
use crate::error::{QuantizeError, Result};
use crate::hessian::{Damping, Factor, Hessian};
use crate::order::OrderOptions;
use crate::solver::awq::unfactored;
use crate::solver::{Corrected, Shift};

/// What makes two linears of a stage share a factor.
#[derive(Debug, Clone, Copy, PartialEq)]
struct FactorKey {
    order: OrderOptions,
    damping: Damping,
    shrink: f64,
    /// They read distances beside the tokens.
    special: bool,
}

impl Run<'_> {
    /// Solves the linears of `stage` and puts them into the block as packed codes.
    pub(super) fn solve_stage(
        &mut self,
        block: &mut Block,
        layer: usize,
        stage: Stage,
        inputs: StageInputs,
    ) -> Result<()> {
        let linears = self.spec.stage_linears(layer, stage);
        self.solve_linears(layer, &linears, inputs, |index, packed| {
            let linear = runtime_linear(&linears[index].module, packed)?;
            Ok(block.set_linear(stage, index, linear)?)
        })
    }

    /// Solves those of `linears` that are quantized against the sum over their common input (or
    /// rounds them where there is none), writes them, and gives each with its index to `done`.
    pub(super) fn solve_linears(
        &mut self,
        layer: usize,
        linears: &[LinearSpec],
        inputs: StageInputs,
        mut done: impl FnMut(usize, GptqLinear) -> Result<()>,
    ) -> Result<()> {
        let StageInputs { gram, held, cross, distances, expert } = inputs;
        let quantized: Vec<(usize, &LinearSpec, ModuleSettings)> = linears
            .iter()
            .enumerate()
            .filter_map(|(index, l)| Some((index, l, *self.layout.settings(&l.module)?)))
            .collect();
        let Some((_, first, _)) = quantized.first() else { return Ok(()) };
        let mut hessian = gram.map(|gram| self.phases.time("hessian", || Hessian::new(gram)));
        let held = held.filter(|held| held.rows() > 0).map(Hessian::new);
        if hessian.iter().chain(&held).any(|h| !h.is_finite()) {
            return Err(QuantizeError::NotFinite { layer, module: first.module.clone() });
        }
        let mut chosen =
            Regularization { damp_percent: self.job.options.damp_percent, shrink: 0.0 };
        if let (Some(fit), Some(held)) = (&hessian, held) {
            if fit.tokens() > 0 {
                chosen = self.choose_regularization(&quantized, fit, &held)?;
            }
            hessian = Some(fit.join(&held));
        }
        let with_distances = hessian.as_ref().zip(distances).map(|(hessian, distances)| {
            self.phases.time("hessian", || (hessian.with(distances.gram), distances.linears))
        });
        let options = self.job.options;
        let shift = cross
            .filter(|_| hessian.is_some())
            .zip(options.correction_share())
            .map(|(cross, share)| Shift::new(cross, options.correction, share));
        self.progress.phase("solve");
        // One factor at a time is in memory; only overrides for single modules need another.
        let mut factor: Option<(FactorKey, Factor, Hessian)> = None;
        let mut passed_on: Option<Vec<f32>> = None;
        for (index, linear, settings) in &quantized {
            let special = with_distances.as_ref().filter(|(_, linears)| linears.contains(index));
            let inputs = special.map(|(hessian, _)| hessian).or(hessian.as_ref());
            if let Some(inputs) = inputs {
                let key = self.factor_key(settings, chosen, special.is_some());
                if factor.as_ref().is_none_or(|(made, ..)| *made != key) {
                    drop((factor.take(), passed_on.take()));
                    // Errors are measured with the inputs as they are.
                    let solved = inputs.shrunk(key.shrink);
                    let made = self.phases.time("factor", || match self.job.options.method {
                        Method::Awq => unfactored(&solved, settings.group_size),
                        _ => solved.factor(key.order, key.damping),
                    });
                    if let Some(shift) = &shift {
                        let pool = self.job.pool;
                        passed_on = self.phases.time("correct", || shift.passed_on(pool, &made));
                    }
                    factor = Some((key, made, solved));
                }
            }
            let fitted = factor.as_ref().zip(inputs).map(|((key, factor, solved), inputs)| {
                Fitted { factor, solved, inputs, shrink: key.shrink }
            });
            let expert = expert.as_ref();
            let passed_on = passed_on.as_deref();
            let corrected = shift.as_ref().map(|shift| Corrected { shift, passed_on });
            let task = Task { layer, linear, settings, fitted, corrected, expert };
            let packed = self.solve_linear(&task)?;
            done(*index, packed)?;
        }
        Ok(())
    }

    fn factor_key(
        &self,
        settings: &ModuleSettings,
        chosen: Regularization,
        special: bool,
    ) -> FactorKey {
        let options = self.job.options;
        // The shrink was chosen for the damping.
        let Regularization { damp_percent, shrink } = settings
            .damp_percent
            .map_or(chosen, |damp_percent| Regularization { damp_percent, shrink: 0.0 });
        FactorKey {
            // OBQ chooses its own order within the row.
            order: options.order_of(settings, options.method == Method::Gptq),
            damping: Damping { percent: damp_percent, auto_increment: options.damp_auto_increment },
            shrink,
            special,
        }
    }
}
