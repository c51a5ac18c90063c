//! An architecture as data. Reading a [`Spec`] tells how a family differs from the others; [`crate::Block`] obeys it.

use gptq_compute::{Activation, KvType, NormKind};

use crate::convolution::TokenConvolution;
use crate::fused::FusedOrder;
use crate::relative::Relative;
use crate::rope::{Rope, RopeScaling};
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
    /// The MLP sublayer of the blocks without experts.
    pub mlp: Mlp,
    /// The MLP sublayer of the blocks with experts ([`Layer::moe`]).
    pub moe: Option<Moe>,
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
    /// Bias-free linear `[hidden, width]` after the embedding.
    pub project_in: Option<&'static str>,
    /// It comes after types and positions are added, which have `width` columns too; else they have `hidden`.
    pub project_sum: bool,
    /// Tensor `[types, hidden]` of token types (sentence A or B), added to the embedding, and its number of rows.
    pub types: Option<(&'static str, usize)>,
    /// Norm of the sum of all embeddings.
    pub norm: Option<&'static str>,
}

impl Embedding {
    /// A plain lookup of full width.
    pub fn plain(name: &'static str, hidden: usize) -> Self {
        Self {
            name,
            width: hidden,
            scale: 1.0,
            project_in: None,
            project_sum: false,
            types: None,
            norm: None,
        }
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
        /// This token takes the row of its id and is not counted by the positions of the others (RoBERTa's padding).
        padding: Option<u32>,
        /// Tokens that a mask leaves out are counted (not so OPT's: its first real token is at position 0).
        masked: bool,
    },
    /// Scores grow with `slope * key position`, one slope per head.
    Alibi {
        /// One slope per head.
        slopes: Vec<f32>,
    },
    /// It does not, but for [`Attention::relative`].
    None,
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

impl Positions {
    /// A table of one row per position from 0 on.
    pub fn learned(name: &'static str) -> Self {
        Self::Learned { name, offset: 0, padding: None, masked: true }
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
    /// In block i, counted from 0, they are also divided by i + 1 (GPT-2 as Mistral trained it).
    pub scale_by_depth: bool,
    /// A query sees no later key.
    pub causal: bool,
    /// Scores have terms of the distance between query and key.
    pub relative: Option<Relative>,
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
    /// What is normalised together.
    pub over: NormOver,
}

impl QkNorm {
    /// Names of the norms of `heads` heads that are called `name`: of one for all, or of each head's.
    pub fn names(&self, name: &str, heads: usize) -> Vec<String> {
        match self.over {
            NormOver::ListedHead => (0..heads).map(|head| format!("{name}.norms.{head}")).collect(),
            NormOver::Row | NormOver::Head | NormOver::OwnHead => vec![name.to_owned()],
        }
    }
}

/// What a norm of queries or keys goes over, and how its parameters are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormOver {
    /// The whole row, with a weight of its width.
    Row,
    /// Each head by itself, all with one weight `[head_dim]`.
    Head,
    /// Each head by itself, with its row of a weight `[heads, head_dim]` (Command R+).
    OwnHead,
    /// Each head by itself, with a tensor `[head_dim]` of its own, named `NAME.norms.HEAD` (StableLM 2 12B).
    ListedHead,
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

impl Mlp {
    /// All projections have a bias.
    pub fn bias(&self) -> bool {
        let (Self::Gated { bias, .. } | Self::Plain { bias, .. }) = *self;
        bias
    }

    /// Width between the projections.
    pub fn width(&self) -> usize {
        let (Self::Gated { width, .. } | Self::Plain { width, .. }) = *self;
        width
    }
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

/// A mixture of experts (Shazeer et al. 2017; Mixtral): each token's MLP is the weighted sum of the `top_k` experts that
/// the router finds most likely, by softmax over all. Names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moe {
    /// The router, a linear `[count, hidden]` without bias; it is never quantized.
    pub router: &'static str,
    /// Name of the list of experts.
    pub experts: &'static str,
    /// Number of experts.
    pub count: usize,
    /// Experts per token.
    pub top_k: usize,
    /// The weights of a token's experts are divided by their sum.
    pub renormalize: bool,
    /// One expert; names relative to it.
    pub expert: Mlp,
    /// An expert that every token goes to.
    pub shared: Option<SharedExpert>,
}

/// An expert that every token of a mixture goes to; names relative to the block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedExpert {
    /// Name of the expert.
    pub name: &'static str,
    /// Its form; names relative to it.
    pub mlp: Mlp,
    /// A linear `[1, hidden]` without bias whose sigmoid is the expert's weight; it is never quantized.
    pub gate: &'static str,
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
    /// What is added to the output of the first block.
    pub convolution: Option<TokenConvolution>,
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
            convolution: None,
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
    /// What masked language models have between the final norm and the projection to logits.
    pub transform: Option<Transform>,
    /// The projection to logits (full name), used where it is not tied; `None` for a model that gives hidden states only.
    pub name: Option<&'static str>,
    /// The token embedding is the projection.
    pub tied: bool,
    /// The projection has a bias.
    pub bias: bool,
    /// The rows of the projection are scaled to length 1 (Baichuan 2).
    pub unit_rows: bool,
    /// Logits are multiplied by this.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
    /// Linear `[hidden, hidden]` with bias, then tanh, on each sequence's first row: the pooled output, beside the logits.
    /// Relative to [`Spec::base`].
    pub pooler: Option<&'static str>,
}

/// `norm(activation(dense(x)))`; full names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transform {
    /// A linear `[width, hidden]` to the width of the embedding.
    pub dense: &'static str,
    /// It has a bias.
    pub bias: bool,
    /// The function between.
    pub activation: Activation,
    /// A norm like the others of the model.
    pub norm: &'static str,
}

impl Head {
    /// A norm and a projection without bias.
    pub fn plain(norm: &'static str, name: &'static str, tied: bool) -> Self {
        Self {
            norm: Some(norm),
            project_out: None,
            transform: None,
            name: Some(name),
            tied,
            bias: false,
            unit_rows: false,
            scale: 1.0,
            soft_cap: None,
            pooler: None,
        }
    }

    /// The head of a masked language model (with a bias) and the pooler, both of which a checkpoint may leave out.
    pub fn masked(
        transform: Transform,
        name: &'static str,
        tied: bool,
        pooler: Option<&'static str>,
    ) -> Self {
        Self {
            norm: None,
            transform: Some(transform),
            bias: true,
            pooler,
            ..Self::plain("", name, tied)
        }
    }
}

/// What differs from block to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layer {
    /// A query sees only the last `window` keys, itself included; without causality also the next `window - 1`.
    pub window: Option<usize>,
    /// Index into [`Positions::Rotary`]; `None`: no rotation in this block.
    pub rope: Option<usize>,
    /// The MLP is [`Spec::moe`].
    pub moe: bool,
    /// The attention has no norm before it, whatever [`Residual`] says (ModernBERT's first block).
    pub bare: bool,
}

impl Spec {
    /// Number of blocks.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Full name of block `layer`, for example `model.layers.3`.
    pub fn block_name(&self, layer: usize) -> String {
        format!("{}.{layer}", self.blocks_name())
    }

    /// Name of the list of blocks, for example `model.layers`.
    pub fn blocks_name(&self) -> String {
        format!("{}{}", self.base, self.blocks)
    }

    /// The rope of block `layer`.
    pub fn rope(&self, layer: usize) -> Option<&Rope> {
        match &self.positions {
            Positions::Rotary(ropes) => self.layers[layer].rope.and_then(|index| ropes.get(index)),
            Positions::Learned { .. } | Positions::Alibi { .. } | Positions::None => None,
        }
    }

    /// Bytes of keys and values that one token keeps in all blocks with a cache of `kind`, padding and scales included.
    pub fn kv_bytes_per_token(&self, kind: KvType) -> usize {
        kind.bytes_per_token(self.attention.kv_heads, self.attention.head_dim) * self.layer_count()
    }

    /// Tokens of the longest sequences that the model is made for; `None` where positions go on beyond those of its
    /// training (ALiBi, dynamic NTK).
    pub fn length_limit(&self) -> Option<usize> {
        let grows = |rope: &Rope| matches!(rope.scaling, RopeScaling::Dynamic { .. });
        let unlimited = match &self.positions {
            Positions::Alibi { .. } => true,
            Positions::Rotary(ropes) => ropes.iter().any(grows),
            Positions::Learned { .. } | Positions::None => false,
        };
        (!unlimited).then_some(self.max_positions)
    }

    /// Whether sequences of `length` tokens can be placed: learned positions limit them, most other schemes do not.
    pub(crate) fn check_positions(&self, length: usize) -> Result<()> {
        let limited = |rope: &Rope| matches!(rope.scaling, RopeScaling::Limited { .. });
        let bounded = match &self.positions {
            Positions::Learned { .. } => true,
            Positions::Rotary(ropes) => ropes.iter().any(limited),
            Positions::Alibi { .. } | Positions::None => false,
        };
        if bounded && length > self.max_positions {
            let limit = self.max_positions;
            return Err(ModelError::Position { position: limit, limit });
        }
        Ok(())
    }
}
