//! Block-wise tuning: when all linears of a block have their codes, its scales and the weights of its norms follow
//! the gradient towards the output of the float block.
//!
//! GPTQ fits each linear to its own output. What a block makes of the errors of its linears together (they add
//! up, cancel, pass activations and softmax) only its output shows. Codes, zero points and biases stay; every scale
//! and norm weight is multiplied by a factor near 1, found with Adam (Kingma & Ba 2015) on some of the calibration
//! tokens. Both blocks read what the quantized blocks before them computed, and each token counts
//! by the error relative to its output, because the next norm divides by its length.

mod example;
mod tuned;

use std::collections::HashMap;
use std::time::Instant;

use gptq_compute::NormKind;
use gptq_format::{DType, GptqLinear};
use gptq_model::{Block, Ctx, LinearSource, NormPlace};

use super::Run;
use super::activations::Activations;
use super::layout::Copied;
use super::linear::runtime_linear;
use crate::error::Result;
use crate::report::TuningRecord;
use example::{Example, mean_error};
use tuned::{Factors, Tuned, TunedLinear, TunedNorm, set_norm};

/// Calibration tokens that are tuned on, in whole chunks.
pub(super) const TOKENS: usize = 16_384;
impl Run<'_> {
    /// Tunes scales and norms of `block`, whose linears are all quantized, and writes them, unless the options ask for
    /// none or it does not lower the error.
    pub(super) fn tune(
        &mut self,
        ctx: &mut Ctx,
        block: &mut Block,
        activations: &mut Activations<'_>,
    ) -> Result<()> {
        let epochs = self.job.options.tune_blocks;
        if epochs == 0 {
            return Ok(());
        }
        self.progress.phase("tune");
        let start = Instant::now();
        let layer = block.layer();
        let mut examples = Vec::new();
        {
            let float = Block::load(self.job.checkpoint, self.spec, layer, LinearSource::Copied)?;
            for chunk in activations.some_chunks(TOKENS, &mut self.phases)? {
                examples.push(Example::new(ctx, &float, chunk)?);
            }
        }
        let mut tuned = self.tuned(block)?;
        let norms: Vec<(NormPlace, Vec<f32>)> =
            tuned.norms.iter().map(|norm| (norm.place, norm.weight.clone())).collect();
        tuned.set(block)?;
        let before = mean_error(ctx, block, &examples)?;
        let steps = epochs * examples.len();
        for step in 0..steps {
            let example = &examples[step % examples.len()];
            let (_, gradient, trace) = example.error(ctx, block)?;
            block.backward(ctx, &trace, &example.chunk.windows, gradient, &mut tuned)?;
            tuned.step(step, steps);
            tuned.set(block)?;
            self.progress.phase_progress(step + 1, steps);
        }
        for norm in &tuned.norms {
            set_norm(block, norm.place, norm.stored().0);
        }
        let after = mean_error(ctx, block, &examples)?;
        let kept = after < before;
        if kept {
            for norm in &tuned.norms {
                self.output.replace(&norm.tensor, &norm.stored().1)?;
            }
        } else {
            for (place, weight) in norms {
                set_norm(block, place, weight);
            }
        }
        for tuned in tuned.linears {
            let scales = tuned.scales();
            let mut packed = tuned.packed;
            if kept {
                let bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
                self.output.replace(&format!("{}.scales", tuned.module), &bytes)?;
                packed.scales = scales;
            }
            let linear = runtime_linear(&tuned.module, packed)?;
            block.set_linear(tuned.stage, tuned.index, linear)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let record =
            TuningRecord { layer, error_before: before, error_after: after, kept, seconds };
        self.phases.add("tune", seconds);
        self.progress.block_tuned(&record);
        self.tuning.push(record);
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
        let norms = NormPlace::ALL.into_iter().filter_map(|place| self.tuned_norm(block, place));
        Ok(Tuned { norms: norms.collect(), linears, places })
    }

    /// The weight of a norm as the output holds it.
    fn stored_norm(&self, layer: usize, place: NormPlace) -> Option<&Copied> {
        let name = self.spec.norm_name(layer, place)?;
        // Checkpoints converted from TensorFlow have the names of its layer norm.
        let names = [format!("{name}.weight"), format!("{name}.gamma")];
        self.layout.copied.iter().find(|copied| names.contains(&copied.name))
    }

    /// Copies the norms of a block once more, where they may have been tuned before a run was interrupted.
    pub(super) fn restore_norms(&mut self, layer: usize) -> Result<()> {
        if self.job.options.tune_blocks > 0 {
            for place in NormPlace::ALL {
                if let Some(stored) = self.stored_norm(layer, place).cloned() {
                    self.output.copy_again(self.job.checkpoint, &stored)?;
                }
            }
        }
        Ok(())
    }

    /// The norm at `place`, if it is there, has a weight, and is stored as 16-bit floats.
    fn tuned_norm(&self, block: &Block, place: NormPlace) -> Option<TunedNorm> {
        let norm = block.norm(place)?;
        let (stored, weight) = (self.stored_norm(block.layer(), place)?, norm.weight.clone()?);
        let plus = if norm.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
        let factors = Factors::new(weight.len());
        let (tensor, dtype) = (stored.name.clone(), stored.dtype);
        let narrow = matches!(dtype, DType::F16 | DType::BF16);
        narrow.then_some(TunedNorm { place, tensor, dtype, weight, plus, factors })
    }
}
