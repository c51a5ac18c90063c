//! An architecture as data. Reading a [`Spec`] tells how a family differs from the others; [`crate::Block`] obeys it.

use gptq_compute::{Activation, NormKind};
use gptq_format::Checkpoint;

use crate::fused::FusedOrder;
use crate::rope::Rope;
use crate::{ModelError, Result};

/// Everything that distinguishes one model from another, apart from its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// `model_type` of the config.
    pub family: &'static str,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Number of token ids.
    pub vocab: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// Prefix of all tensors but the head's, for example `model.`.
    pub base: String,
    /// Name of the list of blocks after the prefix, for example `layers`.
    pub blocks: &'static str,
    /// Linears of the blocks are stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    pub conv1d: bool,
    /// Token embedding and what happens before the first block.
    pub embedding: Embedding,
    /// How a token's position enters.
    pub positions: Positions,
    /// Kind of all norms but those of [`QkNorm`].
    pub norm: NormSpec,
    /// The attention sublayer.
    pub attention: Attention,
    /// The MLP sublayer.
    pub mlp: Mlp,
    /// How sublayers, norms and the residual stream are wired.
    pub residual: Residual,
    /// What happens after the last block.
    pub head: Head,
    /// What differs from block to block; one entry per block.
    pub layers: Vec<Layer>,
}

/// Token embedding. Tensors are named relative to [`Spec::base`], without `.weight`.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Tensor `[vocab, width]`.
    pub name: &'static str,
    /// Width of the embedding; differs from the hidden width only with `project_in`.
    pub width: usize,
    /// The embedding is multiplied by this.
    pub scale: f32,
    /// Norm of the embedding.
    pub norm: Option<&'static str>,
    /// Bias-free linear `[hidden, width]` after the embedding.
    pub project_in: Option<&'static str>,
}

impl Embedding {
    /// A plain lookup of full width.
    pub fn plain(name: &'static str, hidden: usize) -> Self {
        Self { name, width: hidden, scale: 1.0, norm: None, project_in: None }
    }
}

/// How a token's position enters.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Queries and keys are rotated; [`Layer::rope`] picks the entry.
    Rotary(Vec<Rope>),
    /// A row of tensor `name` `[max_positions + offset, hidden]` is added to the embedding: row `position + offset`.
    Learned {
        /// Tensor relative to [`Spec::base`].
        name: &'static str,
        /// Rows at the start of the table that no position uses.
        offset: usize,
    },
    /// Scores grow with `slope * key position`, one slope per head.
    Alibi {
        /// One slope per head.
        slopes: Vec<f32>,
    },
}

/// A norm's formula and parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Formula.
    pub kind: NormKind,
    /// Added to the variance or mean square.
    pub eps: f32,
    /// Has a weight.
    pub weight: bool,
    /// Has a bias.
    pub bias: bool,
}

impl NormSpec {
    /// Root mean square with a weight.
    pub fn rms(eps: f32) -> Self {
        Self { kind: NormKind::Rms, eps, weight: true, bias: false }
    }

    /// Root mean square times `1 + weight` (Gemma).
    pub fn rms_plus_one(eps: f32) -> Self {
        Self { kind: NormKind::RmsPlusOne, ..Self::rms(eps) }
    }

    /// Layer norm with weight and bias.
    pub fn layer(eps: f32) -> Self {
        Self { kind: NormKind::Layer, eps, weight: true, bias: true }
    }
}

/// The attention sublayer.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// A query sees no later key.
    pub causal: bool,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Queries, keys and values are clamped to `[-limit, limit]`.
    pub clip_qkv: Option<f32>,
    /// The projections to queries, keys and values.
    pub qkv: Qkv,
    /// They have a bias.
    pub qkv_bias: bool,
    /// Norm of queries and keys before rotation.
    pub qk_norm: Option<QkNorm>,
    /// The output projection, relative to the block.
    pub out: &'static str,
    /// It has a bias.
    pub out_bias: bool,
}

impl Attention {
    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads, together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The projections to queries, keys and values; names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// Three linears.
    Separate {
        /// Queries.
        q: &'static str,
        /// Keys.
        k: &'static str,
        /// Values.
        v: &'static str,
    },
    /// One linear whose outputs are ordered by `order`.
    Fused {
        /// The linear.
        name: &'static str,
        /// Order of its outputs.
        order: FusedOrder,
    },
}

/// Norm of queries and keys; names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    /// Norm of the queries.
    pub q: &'static str,
    /// Norm of the keys.
    pub k: &'static str,
    /// Formula and parameters.
    pub norm: NormSpec,
    /// Each head by itself with one weight `[head_dim]`, else the whole row with a weight of its width.
    pub per_head: bool,
}

/// The MLP sublayer; names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mlp {
    /// `down(activation(gate(x)) * up(x))`.
    Gated {
        /// The projections to gate and up.
        gate_up: GateUp,
        /// The projection back.
        down: &'static str,
        /// Width between the projections.
        width: usize,
        /// Of the gate.
        activation: Activation,
        /// All projections have a bias.
        bias: bool,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// The projection to the wide side.
        up: &'static str,
        /// The projection back.
        down: &'static str,
        /// Width between the projections.
        width: usize,
        /// Between the projections.
        activation: Activation,
        /// Both projections have a bias.
        bias: bool,
    },
}

/// The two projections of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUp {
    /// Two linears.
    Separate {
        /// The gate.
        gate: &'static str,
        /// The other factor.
        up: &'static str,
    },
    /// One linear with the gate's outputs first.
    Fused(&'static str),
}

/// Norms around one sublayer; names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SublayerNorms {
    /// Of the sublayer's input.
    pub before: Option<&'static str>,
    /// Of the sublayer's output, before it is added to the residual stream.
    pub after: Option<&'static str>,
    /// Of the residual stream after the addition.
    pub stream: Option<&'static str>,
}

/// How sublayers, norms and the residual stream are wired. With `f` a sublayer and `x` the stream:
/// `x <- stream(x + multiplier * after(f(before(x))))`, first with attention, then with the MLP.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Residual {
    /// Norms around the attention.
    pub attention: SublayerNorms,
    /// Norms around the MLP. In a parallel block without `before` the MLP reads what the attention reads.
    pub mlp: SublayerNorms,
    /// Both sublayers read the same stream and their outputs are added together.
    pub parallel: bool,
    /// The sublayer's output is added to its normalised input (BLOOM's post-layernorm residual).
    pub from_norm: bool,
    /// Factor of each sublayer's output.
    pub multiplier: f32,
}

impl Residual {
    /// Pre-norm: each sublayer has a norm before it.
    pub fn serial(attention: &'static str, mlp: &'static str) -> Self {
        Self {
            attention: SublayerNorms { before: Some(attention), ..SublayerNorms::default() },
            mlp: SublayerNorms { before: Some(mlp), ..SublayerNorms::default() },
            parallel: false,
            from_norm: false,
            multiplier: 1.0,
        }
    }

    /// Attention and MLP side by side; without a norm of its own the MLP shares the attention's.
    pub fn parallel(attention: &'static str, mlp: Option<&'static str>) -> Self {
        let mut residual = Self { parallel: true, ..Self::serial(attention, attention) };
        residual.mlp.before = mlp;
        residual
    }

    /// The original transformer: the stream is normalised after each addition.
    pub fn post_norm(attention: &'static str, mlp: &'static str) -> Self {
        Self {
            attention: SublayerNorms { stream: Some(attention), ..SublayerNorms::default() },
            mlp: SublayerNorms { stream: Some(mlp), ..SublayerNorms::default() },
            ..Self::serial(attention, mlp)
        }
    }

    /// Norms on the sublayers' outputs only (OLMo 2).
    pub fn output_norm(attention: &'static str, mlp: &'static str) -> Self {
        Self {
            attention: SublayerNorms { after: Some(attention), ..SublayerNorms::default() },
            mlp: SublayerNorms { after: Some(mlp), ..SublayerNorms::default() },
            ..Self::serial(attention, mlp)
        }
    }

    /// Norms before and after each sublayer (Gemma 2).
    pub fn sandwich(attention: [&'static str; 2], mlp: [&'static str; 2]) -> Self {
        let mut residual = Self::serial(attention[0], mlp[0]);
        residual.attention.after = Some(attention[1]);
        residual.mlp.after = Some(mlp[1]);
        residual
    }
}

/// What happens after the last block.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Norm after the last block, relative to [`Spec::base`].
    pub norm: Option<&'static str>,
    /// Bias-free linear `[width, hidden]` before the head, relative to [`Spec::base`].
    pub project_out: Option<&'static str>,
    /// The projection to logits (full name), used where it is not tied.
    pub name: &'static str,
    /// The token embedding is the projection.
    pub tied: bool,
    /// The projection has a bias.
    pub bias: bool,
    /// Logits are multiplied by this.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
}

impl Head {
    /// A norm and a projection without bias.
    pub fn plain(norm: &'static str, name: &'static str, tied: bool) -> Self {
        Self {
            norm: Some(norm),
            project_out: None,
            name,
            tied,
            bias: false,
            scale: 1.0,
            soft_cap: None,
        }
    }
}

/// What differs from block to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layer {
    /// A query sees only the last `window` keys, itself included.
    pub window: Option<usize>,
    /// Index into [`Positions::Rotary`]; `None`: no rotation in this block.
    pub rope: Option<usize>,
}

impl Spec {
    /// Number of blocks.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Full name of block `layer`, for example `model.layers.3`.
    pub fn block_name(&self, layer: usize) -> String {
        format!("{}{}.{layer}", self.base, self.blocks)
    }

    /// The rope of block `layer`.
    pub fn rope(&self, layer: usize) -> Option<&Rope> {
        match &self.positions {
            Positions::Rotary(ropes) => self.layers[layer].rope.and_then(|index| ropes.get(index)),
            Positions::Learned { .. } | Positions::Alibi { .. } => None,
        }
    }

    /// Bytes of keys and values that one token keeps in all blocks.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.attention.kv_width() * size_of::<f32>() * self.layer_count()
    }

    /// Whether sequences of `length` tokens can be placed: learned positions limit them, the other schemes do not.
    pub(crate) fn check_positions(&self, length: usize) -> Result<()> {
        match self.positions {
            Positions::Learned { .. } if length > self.max_positions => Err(ModelError::Position {
                position: self.max_positions,
                limit: self.max_positions,
            }),
            _ => Ok(()),
        }
    }

    /// The architecture of a checkpoint: its config, with the prefix of the tensors' names taken from the tensors, since
    /// checkpoints of the bare model leave it (or its first part) out.
    ///
    /// # Errors
    /// As [`Spec::from_config`].
    pub fn for_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let mut spec = Self::from_config(&checkpoint.config)?;
        let tensors = &checkpoint.tensors;
        let has = |base: &str| tensors.contains(&format!("{base}{}.weight", spec.embedding.name));
        let shorter = spec.base.split_once('.').map_or("", |(_, rest)| rest);
        let base =
            [spec.base.as_str(), shorter, ""].into_iter().find(|base| has(base)).map(str::to_owned);
        spec.base = base.unwrap_or(spec.base);
        let beyond = format!("{}.", spec.block_name(spec.layer_count()));
        if let Some(name) = tensors.names().find(|name| name.starts_with(&beyond)) {
            let (file, layers) = (checkpoint.path.display(), spec.layer_count());
            tracing::warn!(
                "{file} holds {name}, but its config has {layers} blocks; the rest is left out"
            );
        }
        Ok(spec)
    }
}
