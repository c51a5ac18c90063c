//! What gradients of a block are of: its linears, and its norms by their places.

use std::ops::Range;

use gptq_compute::{Norm, NormGradient, Tensor};

use crate::block::Block;
use crate::spec::Spec;
use crate::stages::{Stage, StageSpec};
use crate::state::{BlockState, Ctx};
use crate::{ModelError, Result};

/// One of the norms around the sublayers of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormPlace {
    /// Before the attention.
    AttentionBefore,
    /// Of the attention's output.
    AttentionAfter,
    /// Of the stream behind the attention.
    AttentionStream,
    /// Before the MLP.
    MlpBefore,
    /// Of the MLP's output.
    MlpAfter,
    /// Of the stream behind the MLP.
    MlpStream,
}

impl NormPlace {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AttentionBefore,
        Self::AttentionAfter,
        Self::AttentionStream,
        Self::MlpBefore,
        Self::MlpAfter,
        Self::MlpStream,
    ];
}

/// What is done with the gradients of a block's parameters.
pub trait Gradients {
    /// Linear number `index` of `stage` read `x` `[rows, in]`, and `dy` `[rows, out]` is the gradient of its output:
    /// dyᵀx is that of its weight ([`gptq_compute::weight_gradient`]), the sum of the rows of `dy` that of its bias.
    fn linear(&mut self, ctx: &Ctx, stage: Stage, index: usize, x: &Tensor, dy: &Tensor);

    /// The gradient of a norm's parameters.
    fn norm(&mut self, place: NormPlace, gradient: NormGradient);
}

/// The states of a block's forward pass over whole sequences.
pub struct Trace {
    /// Rows of each sequence.
    pub(crate) windows: Vec<Range<usize>>,
    /// The stream that the block read.
    pub(crate) input: Tensor,
    /// The state before each stage, in their order.
    pub(crate) stages: Vec<BlockState>,
}

impl Trace {
    /// Bytes of a trace of block `layer` over `rows` rows, and of the gradients that exist beside it.
    pub fn bytes(spec: &Spec, layer: usize, rows: usize) -> usize {
        let Spec { hidden, attention, .. } = spec;
        let kept = if spec.residual.parallel { 3 * hidden } else { *hidden };
        let inputs = |stage: &StageSpec| stage.linears.first().map_or(0, |l| l.in_features);
        let stages = spec.stages(layer);
        let trace: usize = stages.iter().map(|stage| kept + inputs(stage)).sum();
        // Of gate and up and their product; of queries, keys and values, as they are and for each query head.
        let attended = attention.q_width() + 2 * attention.kv_width();
        let gradients = (5 * spec.mlp.width()).max(3 * attended + 3 * attention.q_width());
        rows * (trace + gradients + 4 * hidden) * size_of::<f32>()
    }
}

impl Spec {
    /// Whether [`Block::backward`] knows all parts of block `layer`.
    ///
    /// # Errors
    /// [`ModelError::NoGradient`] naming the part it does not know.
    pub fn check_gradients(&self, layer: usize) -> Result<()> {
        let residual = &self.residual;
        let [attention, mlp] = [&residual.attention, &residual.mlp];
        let behind = [attention.after, attention.stream, mlp.after, mlp.stream];
        let replaced =
            residual.from_norm && (residual.parallel || behind.iter().any(Option::is_some));
        let names: Vec<String> =
            NormPlace::ALL.into_iter().filter_map(|place| self.norm_name(layer, place)).collect();
        let shared = (1..names.len()).any(|i| names[..i].contains(&names[i]));
        let parts = [
            (
                replaced,
                "a stream that a norm replaces, with norms behind sublayers or side by side",
            ),
            (shared, "a norm in two places"),
            (self.moe(layer).is_some(), "a mixture of experts"),
            (self.attention.relative.is_some(), "scores of distances"),
            (self.residual.convolution.is_some() && layer == 0, "a convolution"),
        ];
        match parts.into_iter().find(|(has, _)| *has) {
            Some((_, part)) => Err(ModelError::NoGradient { layer, part }),
            None => Ok(()),
        }
    }

    /// Full name of the norm at `place` of block `layer`, if its family has one there; its tensors are named after it.
    pub fn norm_name(&self, layer: usize, place: NormPlace) -> Option<String> {
        let residual = &self.residual;
        let name = match place {
            NormPlace::AttentionBefore => residual.attention.before,
            NormPlace::AttentionAfter => residual.attention.after,
            NormPlace::AttentionStream => residual.attention.stream,
            NormPlace::MlpBefore => residual.mlp.before,
            NormPlace::MlpAfter => residual.mlp.after,
            NormPlace::MlpStream => residual.mlp.stream,
        };
        Some(format!("{}.{}", self.block_name(layer), name?))
    }
}

impl Block {
    /// The norm at `place`, if the block has one there.
    pub fn norm(&self, place: NormPlace) -> Option<&Norm> {
        let Self { attention_norms: attention, mlp_norms: mlp, .. } = self;
        match place {
            NormPlace::AttentionBefore => attention.before.as_ref(),
            NormPlace::AttentionAfter => attention.after.as_ref(),
            NormPlace::AttentionStream => attention.stream.as_ref(),
            NormPlace::MlpBefore => mlp.before.as_ref(),
            NormPlace::MlpAfter => mlp.after.as_ref(),
            NormPlace::MlpStream => mlp.stream.as_ref(),
        }
    }

    /// The norm at `place`, to be changed.
    pub fn norm_mut(&mut self, place: NormPlace) -> Option<&mut Norm> {
        let Self { attention_norms: attention, mlp_norms: mlp, .. } = self;
        match place {
            NormPlace::AttentionBefore => attention.before.as_mut(),
            NormPlace::AttentionAfter => attention.after.as_mut(),
            NormPlace::AttentionStream => attention.stream.as_mut(),
            NormPlace::MlpBefore => mlp.before.as_mut(),
            NormPlace::MlpAfter => mlp.after.as_mut(),
            NormPlace::MlpStream => mlp.stream.as_mut(),
        }
    }
}
