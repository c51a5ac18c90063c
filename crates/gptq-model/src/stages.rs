//! Stages: the linears of a block that share one input, in the order in which they run.

use crate::spec::{GateUp, Mlp, Qkv, Spec};

/// A group of linears that share one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Projections to queries, keys and values.
    Qkv,
    /// Projection of the attention's output.
    AttnOut,
    /// Projections to the wide side of the MLP.
    MlpUp,
    /// Projection back from the wide side.
    MlpDown,
}

impl Stage {
    /// All stages in the order in which they run, which is true-sequential order.
    pub const ALL: [Stage; 4] = [Stage::Qkv, Stage::AttnOut, Stage::MlpUp, Stage::MlpDown];
}

/// The linears of one stage of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageSpec {
    /// Which stage.
    pub stage: Stage,
    /// Its linears; all have the same `in_features`.
    pub linears: Vec<LinearSpec>,
}

/// One linear of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Name within the block, for example `self_attn.q_proj`.
    pub name: &'static str,
    /// Full module name, for example `model.layers.3.self_attn.q_proj`; tensors are named after it.
    pub module: String,
    /// Output width.
    pub out_features: usize,
    /// Input width.
    pub in_features: usize,
    /// Has a bias `[out_features]`.
    pub bias: bool,
    /// A dense weight is stored `[in, out]` instead of `[out, in]`.
    pub transposed: bool,
}

impl Spec {
    /// The stages of block `layer` in the order in which they run.
    pub fn stages(&self, layer: usize) -> Vec<StageSpec> {
        Stage::ALL
            .iter()
            .map(|&stage| StageSpec { stage, linears: self.stage_linears(layer, stage) })
            .collect()
    }

    /// The linears of one stage of block `layer`.
    pub fn stage_linears(&self, layer: usize, stage: Stage) -> Vec<LinearSpec> {
        let block = self.block_name(layer);
        let linear =
            |name: &'static str, out_features: usize, in_features: usize, bias: bool| LinearSpec {
                name,
                module: format!("{block}.{name}"),
                out_features,
                in_features,
                bias,
                transposed: self.conv1d,
            };
        let attention = &self.attention;
        let (q_width, kv_width) = (attention.q_width(), attention.kv_width());
        match stage {
            Stage::Qkv => match attention.qkv {
                Qkv::Separate { q, k, v } => vec![
                    linear(q, q_width, self.hidden, attention.qkv_bias),
                    linear(k, kv_width, self.hidden, attention.qkv_bias),
                    linear(v, kv_width, self.hidden, attention.qkv_bias),
                ],
                Qkv::Fused { name, .. } => {
                    vec![linear(name, q_width + 2 * kv_width, self.hidden, attention.qkv_bias)]
                }
            },
            Stage::AttnOut => vec![linear(attention.out, self.hidden, q_width, attention.out_bias)],
            Stage::MlpUp => match self.mlp {
                Mlp::Gated { gate_up: GateUp::Separate { gate, up }, width, bias, .. } => {
                    vec![
                        linear(gate, width, self.hidden, bias),
                        linear(up, width, self.hidden, bias),
                    ]
                }
                Mlp::Gated { gate_up: GateUp::Fused(name), width, bias, .. } => {
                    vec![linear(name, 2 * width, self.hidden, bias)]
                }
                Mlp::Plain { up, width, bias, .. } => vec![linear(up, width, self.hidden, bias)],
            },
            Stage::MlpDown => match self.mlp {
                Mlp::Gated { down, width, bias, .. } | Mlp::Plain { down, width, bias, .. } => {
                    vec![linear(down, self.hidden, width, bias)]
                }
            },
        }
    }
}
