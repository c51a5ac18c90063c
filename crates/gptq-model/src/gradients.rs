//! What gradients of a block are of: its linears, and its norms by their places.

use std::ops::Range;

use gptq_compute::{Norm, NormGradient, Tensor};

use crate::block::Block;
use crate::moe::MoeState;
use crate::spec::{Attention, Mlp, Spec};
use crate::stages::Stage;
use crate::state::Ctx;
use crate::{ModelError, Result};

/// Where norms of a block are: one, or of queries and keys one for each head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormPlace {
    /// Before the attention.
    AttentionBefore,
    /// Of the queries.
    Query,
    /// Of the keys.
    Key,
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
    pub const ALL: [Self; 8] = [
        Self::AttentionBefore,
        Self::Query,
        Self::Key,
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
    /// Not called for an expert that no token went to.
    fn linear(&mut self, ctx: &Ctx, stage: Stage, index: usize, x: &Tensor, dy: &Tensor);

    /// The gradients of the parameters of each norm at `place`.
    fn norms(&mut self, place: NormPlace, gradients: Vec<NormGradient>);
}

/// The states of a block's forward pass over whole sequences.
pub struct Trace {
    /// Rows of each sequence.
    pub(crate) windows: Vec<Range<usize>>,
    /// The stream that the block read.
    pub(crate) input: Tensor,
    /// The stream while the MLP runs.
    pub(crate) stream: Tensor,
    /// The attention's output in a block whose sublayers lie side by side.
    pub(crate) carry: Tensor,
    /// The input of each stage, in their order.
    pub(crate) inputs: Vec<Tensor>,
    /// Which tokens went to which expert.
    pub(crate) moe: MoeState,
}

impl Trace {
    /// Bytes of a trace of block `layer` over `rows` rows, and of the gradients that exist beside it.
    pub fn bytes(spec: &Spec, layer: usize, rows: usize) -> usize {
        let Spec { hidden, attention, .. } = spec;
        // Columns per row: of the parts of the MLP that it goes to, and of the widest of them.
        let part = |mlp: &Mlp| hidden + mlp.width();
        let (parts, width) = match spec.moe(layer) {
            Some(moe) => {
                let shared = moe.shared.map(|shared| shared.mlp);
                let experts = moe.top_k * part(&moe.expert) + shared.as_ref().map_or(0, part);
                // Input and sum of all experts, their gradients, and those of the scores.
                let all = 4 * hidden + 3 * moe.count;
                (experts + all, moe.expert.width().max(shared.map_or(0, |mlp| mlp.width())))
            }
            None => (part(&spec.mlp), spec.mlp.width()),
        };
        let streams = if spec.residual.parallel { 3 * hidden } else { 2 * hidden };
        let trace = streams + hidden + attention.q_width() + parts;
        // Of gate and up and their product; of queries, keys and values, as they are and for each query head.
        let attended = attention.q_width() + 2 * attention.kv_width();
        let gradients = (5 * width).max(3 * attended + 3 * attention.q_width());
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
        let names: Vec<&str> =
            NormPlace::ALL.into_iter().filter_map(|place| self.norm_name(layer, place)).collect();
        let shared = (1..names.len()).any(|i| names[..i].contains(&names[i]));
        let experts = self.moe(layer).is_some() && (mlp.after.is_some() || mlp.stream.is_some());
        let parts = [
            (
                replaced,
                "a stream that a norm replaces, with norms behind sublayers or side by side",
            ),
            (shared, "a norm in two places"),
            (experts, "a norm behind a mixture of experts"),
            (self.attention.relative.is_some(), "scores of distances"),
            (self.residual.convolution.is_some() && layer == 0, "a convolution"),
        ];
        match parts.into_iter().find(|(has, _)| *has) {
            Some((_, part)) => Err(ModelError::NoGradient { layer, part }),
            None => Ok(()),
        }
    }

    /// Name within the block of the norms at `place` of block `layer`, if its family has any there.
    fn norm_name(&self, layer: usize, place: NormPlace) -> Option<&'static str> {
        let Self { residual, attention, .. } = self;
        match place {
            NormPlace::AttentionBefore if self.layers[layer].bare => None,
            NormPlace::AttentionBefore => residual.attention.before,
            NormPlace::Query => attention.qk_norm.map(|qk| qk.q),
            NormPlace::Key => attention.qk_norm.map(|qk| qk.k),
            NormPlace::AttentionAfter => residual.attention.after,
            NormPlace::AttentionStream => residual.attention.stream,
            NormPlace::MlpBefore => residual.mlp.before,
            NormPlace::MlpAfter => residual.mlp.after,
            NormPlace::MlpStream => residual.mlp.stream,
        }
    }

    /// Full names of the norms at `place` of block `layer`, none if its family has none there. Tensors are named after
    /// them, and together hold the parameters of [`Block::norms`] in their order.
    pub fn norm_names(&self, layer: usize, place: NormPlace) -> Vec<String> {
        let Some(name) = self.norm_name(layer, place) else { return Vec::new() };
        let name = format!("{}.{name}", self.block_name(layer));
        let Attention { heads, kv_heads, qk_norm, .. } = self.attention;
        match (place, qk_norm) {
            (NormPlace::Query, Some(qk)) => qk.names(&name, heads),
            (NormPlace::Key, Some(qk)) => qk.names(&name, kv_heads),
            _ => vec![name],
        }
    }
}

impl Block {
    /// The norms at `place`: none, one, or of queries and keys one for each head.
    pub fn norms(&self, place: NormPlace) -> &[Norm] {
        let Self { attention_norms: attention, mlp_norms: mlp, qk_norms, .. } = self;
        let [queries, keys] = qk_norms;
        match place {
            NormPlace::AttentionBefore => attention.before.as_slice(),
            NormPlace::Query => queries,
            NormPlace::Key => keys,
            NormPlace::AttentionAfter => attention.after.as_slice(),
            NormPlace::AttentionStream => attention.stream.as_slice(),
            NormPlace::MlpBefore => mlp.before.as_slice(),
            NormPlace::MlpAfter => mlp.after.as_slice(),
            NormPlace::MlpStream => mlp.stream.as_slice(),
        }
    }

    /// The norms at `place`, to be changed.
    pub fn norms_mut(&mut self, place: NormPlace) -> &mut [Norm] {
        let Self { attention_norms: attention, mlp_norms: mlp, qk_norms, .. } = self;
        let [queries, keys] = qk_norms;
        match place {
            NormPlace::AttentionBefore => attention.before.as_mut_slice(),
            NormPlace::Query => queries,
            NormPlace::Key => keys,
            NormPlace::AttentionAfter => attention.after.as_mut_slice(),
            NormPlace::AttentionStream => attention.stream.as_mut_slice(),
            NormPlace::MlpBefore => mlp.before.as_mut_slice(),
            NormPlace::MlpAfter => mlp.after.as_mut_slice(),
            NormPlace::MlpStream => mlp.stream.as_mut_slice(),
        }
    }
}
