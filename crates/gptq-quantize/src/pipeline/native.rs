//! The second stream: the calibration tokens in the float model, stage by stage beside the quantized
//! one, and how far apart their inputs are.
//!
//! It needs the floats of a stage while it passes it; they are read from the model for each block and dropped behind. A
//! mixture routes each stream by itself, but an expert is compared on the tokens that the quantized stream sends to it:
//! what counts is what it should have computed for the tokens that it gets.

use std::sync::Arc;

use gptq_compute::{Cross, Matrix, Tensor};
use gptq_format::Checkpoint;
use gptq_model::{Block, BlockState, Ctx, HeadLayer, LinearSource, Spec, Stage, load_linear};

use super::Phases;
use super::activations::{Activations, run};
use super::float_stream::FloatStream;
use super::inputs::rounds;
use crate::error::Result;
use crate::token_weights::RowWeights;

/// The stream of the float model.
pub(super) struct Native<'a> {
    spec: Arc<Spec>,
    source: &'a Checkpoint,
    /// Index of the block that it is in.
    layer: usize,
    inputs: Inputs<'a>,
}

/// Where the inputs of its stages come from.
#[expect(clippy::large_enum_variant, reason = "a `Native` is boxed as a whole")]
pub(super) enum Inputs<'a> {
    Computed {
        /// As embedded by the float model.
        stream: Activations<'a>,
        /// The block that it is in, with the linears of the stage at work alone; `None` between blocks.
        block: Option<Block>,
        /// Where they are kept for other runs.
        keep: Option<&'a FloatStream>,
    },
    /// Another run kept them.
    Kept(&'a FloatStream),
}

impl<'a> Native<'a> {
    /// Before the first block of the float model `source`.
    pub(super) fn new(spec: Arc<Spec>, source: &'a Checkpoint, inputs: Inputs<'a>) -> Self {
        Self { spec, source, layer: 0, inputs }
    }

    /// Computes the inputs of the first stage of block `layer`.
    pub(super) fn begin(&mut self, ctx: &mut Ctx, layer: usize, phases: &mut Phases) -> Result<()> {
        self.layer = layer;
        let Inputs::Computed { stream, block, .. } = &mut self.inputs else { return Ok(()) };
        let (source, spec) = (self.source, &self.spec);
        let loaded =
            phases.time("inputs", || Block::load(source, spec, layer, LinearSource::Unset))?;
        stream.begin(ctx, block.insert(loaded), phases)
    }

    /// Takes all tokens through `stage`.
    pub(super) fn advance(
        &mut self,
        ctx: &mut Ctx,
        stage: Stage,
        phases: &mut Phases,
    ) -> Result<()> {
        let Inputs::Computed { stream, block: Some(block), .. } = &mut self.inputs else {
            return Ok(());
        };
        let linears = self.spec.stage_linears(block.layer(), stage);
        for (index, linear) in linears.iter().enumerate() {
            let (source, spec) = (self.source, &self.spec);
            let mut linear = phases
                .time("inputs", || load_linear(source, spec, linear, LinearSource::Copied))?;
            if rounds(ctx)
                && let Matrix::Dense(weight) = linear.weight
            {
                linear.weight = Matrix::Dense(phases.time("inputs", || weight.rounding(&ctx.pool)));
            }
            block.set_linear(stage, index, linear)?;
        }
        stream.advance(ctx, block, stage, phases)?;
        for index in 0..linears.len() {
            block.take_linear(stage, index);
        }
        Ok(())
    }

    /// X̂ᵀ(X - X̂) of `stage`, which comes next in both streams, with the weights of the tokens of
    /// `quantized`; `None` where it is not corrected.
    pub(super) fn cross(
        &mut self,
        ctx: &mut Ctx,
        quantized: &mut Activations<'_>,
        stage: Stage,
        phases: &mut Phases,
    ) -> Result<Option<Cross>> {
        if !is_corrected(stage) {
            return Ok(None);
        }
        let order = self.spec.stage_order(self.layer);
        let at = order.iter().position(|other| *other == stage).unwrap_or(order.len());
        let mut sum = ShiftSum::new(quantized.row_weights(stage));
        let mut float = BlockState::default();
        let buffers = &mut [BlockState::default(), BlockState::default()];
        for index in 0..quantized.chunks.len() {
            let [ours, theirs] = &mut *buffers;
            let ours = quantized.states.get(index, ours, phases)?;
            let place = (self.layer, at, index);
            match &self.inputs {
                Inputs::Computed { stream, block: Some(block), keep } => {
                    let theirs = stream.states.get(index, theirs, phases)?;
                    let float = &mut float.input;
                    phases.time("inputs", || {
                        block.input_as_routed(ctx, stage, theirs, ours, float);
                    });
                    if let Some(keep) = keep {
                        phases.time("scratch", || keep.put(place, float));
                    }
                }
                Inputs::Kept(kept) => {
                    phases.time("scratch", || kept.get(place, &mut float))?;
                }
                Inputs::Computed { block: None, .. } => return Ok(None),
            }
            let windows = &quantized.chunks[index];
            phases.time("hessian", || sum.add(ctx, &ours.input, &mut float.input, windows));
        }
        quantized.make_room(ctx);
        Ok(sum.cross)
    }

    /// [`Native::cross`] of the stages of `block` that are `wanted`; both streams are taken through it in copies.
    pub(super) fn all_crosses(
        &mut self,
        ctx: &mut Ctx,
        quantized: &mut Activations<'_>,
        block: &Block,
        wanted: &[bool],
        phases: &mut Phases,
    ) -> Result<Vec<Option<Cross>>> {
        let Inputs::Computed { stream, .. } = &self.inputs else { return Ok(Vec::new()) };
        let stages = block.stages();
        let sum = |(&stage, &wanted): (&Stage, &bool)| {
            (wanted && is_corrected(stage)).then(|| ShiftSum::new(quantized.row_weights(stage)))
        };
        let mut sums: Vec<Option<ShiftSum>> = stages.iter().zip(wanted).map(sum).collect();
        let mut caches = [quantized.caches(ctx), quantized.caches(ctx)];
        let mut float = Tensor::default();
        let mut buffer = BlockState::default();
        for (index, windows) in quantized.chunks.iter().enumerate() {
            let mut copy = |activations: &Activations<'_>| -> Result<BlockState> {
                let state = activations.states.get(index, &mut buffer, phases)?;
                Ok(BlockState::new(state.hidden.clone()))
            };
            let mut states = [copy(quantized)?, copy(stream)?];
            for state in &mut states {
                phases.time("inputs", || block.begin(ctx, state));
            }
            for (&stage, sum) in stages.iter().zip(&mut sums) {
                let [ours, theirs] = &states;
                if let Some(sum) = sum {
                    phases.time("inputs", || {
                        block.input_as_routed(ctx, stage, theirs, ours, &mut float);
                    });
                    phases.time("hessian", || sum.add(ctx, &ours.input, &mut float, windows));
                }
                for (state, caches) in states.iter_mut().zip(&mut caches) {
                    phases.time("inputs", || run(ctx, block, stage, state, windows, caches))?;
                }
            }
        }
        quantized.make_room(ctx);
        Ok(sums.into_iter().map(|sum| sum?.cross).collect())
    }

    /// The same of the projection to logits, behind the last block.
    pub(super) fn head_cross(
        &mut self,
        ctx: &mut Ctx,
        quantized: &mut Activations<'_>,
        head: &HeadLayer,
        phases: &mut Phases,
    ) -> Result<Option<Cross>> {
        let Inputs::Computed { stream, .. } = &self.inputs else { return Ok(None) };
        let mut sum = ShiftSum::new(RowWeights::Uniform);
        let (mut input, mut float) = (Tensor::default(), Tensor::default());
        let mut buffer = BlockState::default();
        for index in 0..quantized.chunks.len() {
            for (activations, to) in [(&*quantized, &mut input), (stream, &mut float)] {
                let state = activations.states.get(index, &mut buffer, phases)?;
                phases.time("inputs", || head.normalize(ctx, &state.hidden, to));
            }
            phases.time("hessian", || sum.add(ctx, &input, &mut float, &[]));
        }
        quantized.make_room(ctx);
        Ok(sum.cross)
    }
}

/// Whether the inputs of `stage` are corrected: all but those of a down projection. They are the widest, so that their
/// D takes longer than all others together, and on text of another kind than the calibration's it does harm
/// (docs/concepts/corrections.md).
pub(super) fn is_corrected(stage: Stage) -> bool {
    !matches!(stage, Stage::MlpDown(_))
}

/// X̂ᵀ(X - X̂) as it grows.
struct ShiftSum {
    weights: RowWeights,
    cross: Option<Cross>,
}

impl ShiftSum {
    fn new(weights: RowWeights) -> Self {
        Self { weights, cross: None }
    }

    /// Adds a chunk; `float` is overwritten.
    fn add(
        &mut self,
        ctx: &Ctx,
        input: &Tensor,
        float: &mut Tensor,
        windows: &[std::ops::Range<usize>],
    ) {
        let new = if rounds(ctx) { Cross::rounding } else { Cross::new };
        let cross = self.cross.get_or_insert_with(|| new(input.cols()));
        self.weights.accumulate_shift(cross, &ctx.pool, input, float, windows);
    }
}
