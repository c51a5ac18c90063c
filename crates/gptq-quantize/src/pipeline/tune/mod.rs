//! Block-wise tuning: when all linears of a block have their codes, its scales and the weights of its norms follow
//! the gradient towards the output of the float block.
//!
//! GPTQ fits each linear to its own output. What a block makes of the errors of its linears together (they add
//! up, cancel, pass activations and softmax) only its output shows. Codes, zero points and biases stay; every scale
//! and every weight of its norms is multiplied by a factor near 1, found with Adam (Kingma & Ba
//! 2015) on some of the calibration tokens. Both blocks read what the quantized blocks before them computed, and each
//! token counts by the error relative to its output, because the next norm divides by its length.

mod example;
mod tuned;

use std::collections::HashMap;
use std::time::Instant;

use gptq_compute::NormKind;
use gptq_format::{DType, GptqLinear};
use gptq_model::{Block, Ctx, LinearSource, NormPlace};

use super::activations::Activations;
use super::layout::Copied;
use super::linear::runtime_linear;
use super::{Phases, Run};
use crate::error::{QuantizeError, Result};
use crate::report::TuningRecord;
use example::{Example, mean_error};
use tuned::{Factors, Tuned, TunedLinear, TunedNorms, set_norms};

/// Calibration tokens that are tuned on, about: in whole chunks.
pub(super) const TOKENS: usize = 16_384;

impl Run<'_> {
    /// Tunes scales and norms of `block`, whose linears have their codes, if the options ask for it, and writes them if
    /// that lowers the error. Returns whether the block has changed.
    pub(super) fn tune(
        &mut self,
        ctx: &mut Ctx,
        block: &mut Block,
        activations: &mut Activations<'_>,
    ) -> Result<bool> {
        let passes = self.job.options.tune_blocks;
        let layer = block.layer();
        if passes == 0 || !self.has_codes(layer) {
            return Ok(false);
        }
        self.progress.phase("tune");
        let start = Instant::now();
        let examples = self.examples(ctx, layer, activations)?;
        let mut tuned = self.tuned(block)?;
        tuned.set(&ctx.pool, block)?;
        let before = mean_error(ctx, block, &examples)?;
        let steps = passes * examples.len();
        for step in 0..steps {
            let (gradient, trace) = examples[step % examples.len()].gradient(ctx, block)?;
            block.backward(ctx, &trace, gradient, &mut tuned)?;
            tuned.step(step, steps);
            tuned.set(&ctx.pool, block)?;
            self.progress.phase_progress(step + 1, steps);
        }
        for norms in &tuned.norms {
            set_norms(block, norms.place, &norms.stored().0);
        }
        let after = mean_error(ctx, block, &examples)?;
        let kept = after < before;
        self.finish(block, tuned, kept)?;
        let seconds = start.elapsed().as_secs_f64();
        self.phases.add("tune", seconds);
        if !before.is_finite() {
            let linears = self.spec.stages(layer).into_iter().flat_map(|stage| stage.linears);
            let module = linears.last().map_or_else(String::new, |linear| linear.module);
            return Err(QuantizeError::OutputNotFinite { layer, module });
        }
        let error_after = after.is_finite().then_some(after);
        let record = TuningRecord { layer, error_before: before, error_after, kept, seconds };
        self.progress.block_tuned(&record);
        self.tuning.push(record);
        Ok(kept)
    }

    /// Whether a linear of the block is quantized.
    fn has_codes(&self, layer: usize) -> bool {
        let mut linears = self.spec.stages(layer).into_iter().flat_map(|stage| stage.linears);
        linears.any(|linear| self.layout.settings(&linear.module).is_some())
    }

    /// What block `layer` is tuned on.
    fn examples(
        &self,
        ctx: &mut Ctx,
        layer: usize,
        activations: &Activations<'_>,
    ) -> Result<Vec<Example>> {
        let float = Block::load(self.job.checkpoint, self.spec, layer, LinearSource::Copied)?;
        // Their time is part of the tuning.
        let chunks = activations.some_chunks(TOKENS, &mut Phases::default())?;
        chunks.into_iter().map(|chunk| Example::new(ctx, &float, chunk)).collect()
    }

    /// Puts the linears back as codes, and writes what was tuned if it is `kept`; else the norms go back, too.
    fn finish(&mut self, block: &mut Block, tuned: Tuned, kept: bool) -> Result<()> {
        for norms in tuned.norms {
            if kept {
                let bytes = norms.stored().1;
                let mut rest = bytes.as_slice();
                for tensor in &norms.tensors {
                    let own = tensor.dtype.byte_len(&tensor.shape).unwrap_or_default();
                    let (own, others) = rest.split_at(own);
                    self.output.replace(&tensor.name, own)?;
                    rest = others;
                }
            } else {
                set_norms(block, norms.place, &norms.weight);
            }
        }
        for linear in tuned.linears {
            let scales = linear.scales();
            let mut packed = linear.packed;
            if kept {
                let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
                self.output.replace(&format!("{}.scales", linear.module), &bytes)?;
                packed.scales = scales;
            }
            let runtime = runtime_linear(&linear.module, packed)?;
            block.set_linear(linear.stage, linear.index, runtime)?;
        }
        Ok(())
    }

    /// What is tuned of `block`, as it was saved.
    fn tuned(&self, block: &Block) -> Result<Tuned> {
        let layer = block.layer();
        let mut linears = Vec::new();
        let mut places = HashMap::new();
        for stage in self.spec.stage_order(layer) {
            for (index, linear) in self.spec.stage_linears(layer, stage).into_iter().enumerate() {
                if self.layout.settings(&linear.module).is_none() {
                    continue;
                }
                let store = &self.output.checkpoint().tensors;
                let shape = Some([linear.out_features, linear.in_features]);
                let packed = GptqLinear::load(store, &linear.module, &self.layout.config, shape)?;
                places.insert((stage, index), linears.len());
                linears.push(TunedLinear::new(stage, index, linear.module, packed)?);
            }
        }
        let norms = NormPlace::ALL.into_iter().filter_map(|place| self.tuned_norms(block, place));
        Ok(Tuned { norms: norms.collect(), linears, places })
    }

    /// The weights of the norms at `place` as the output holds them.
    fn stored_norms(&self, layer: usize, place: NormPlace) -> Vec<Copied> {
        let stored = |name: String| {
            // Checkpoints converted from TensorFlow have the names of its layer norm.
            let copied = |name: &String| self.layout.copied.iter().find(|it| it.name == *name);
            let names = [format!("{name}.weight"), format!("{name}.gamma")];
            names.iter().find_map(copied).cloned()
        };
        self.spec.norm_names(layer, place).into_iter().filter_map(stored).collect()
    }

    /// Copies the norms of a block once more, where they may have been tuned before a run was interrupted.
    pub(super) fn restore_norms(&mut self, layer: usize) -> Result<()> {
        if self.job.options.tune_blocks > 0 {
            for place in NormPlace::ALL {
                for stored in self.stored_norms(layer, place) {
                    self.output.copy_again(self.job.checkpoint, &stored)?;
                }
            }
        }
        Ok(())
    }

    /// The norms at `place`, if they are there, have weights, and are stored as 16-bit floats.
    fn tuned_norms(&self, block: &Block, place: NormPlace) -> Option<TunedNorms> {
        let norms = block.norms(place);
        let tensors = self.stored_norms(block.layer(), place);
        let dtype = tensors.first()?.dtype;
        let weights: Option<Vec<_>> = norms.iter().map(|norm| norm.weight.as_deref()).collect();
        let weight = weights?.concat();
        let plus = if norms.first()?.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
        let factors = Factors::new(weight.len());
        let narrow = matches!(dtype, DType::F16 | DType::BF16);
        let same = tensors.iter().all(|tensor| tensor.dtype == dtype);
        (narrow && same).then_some(TunedNorms { place, tensors, dtype, weight, plus, factors })
    }
}
