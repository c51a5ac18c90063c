//! Stages: the linears of a block that share one input, in the order in which they run.

use crate::spec::{GateUp, Mlp, Moe, Qkv, Spec};

/// A group of linears that share one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Projections to queries, keys and values.
    Qkv,
    /// Projection of the attention's output.
    AttnOut,
    /// Projections to the wide side of (a part of) the MLP.
    MlpUp(Part),
    /// Projection back from the wide side.
    MlpDown(Part),
}

/// A part of a block's MLP. The parts of a mixture of experts run one after the other on their own rows of one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The whole MLP of a block without experts.
    Dense,
    /// One expert; its rows are the tokens that are routed to it, which may be none.
    Expert(u32),
    /// The expert that every token goes to.
    Shared,
}

impl Stage {
    /// The expert whose linears these are.
    pub fn expert(self) -> Option<u32> {
        match self {
            Self::MlpUp(Part::Expert(expert)) | Self::MlpDown(Part::Expert(expert)) => Some(expert),
            _ => None,
        }
    }

    /// Place in [`Spec::stage_order`] of a block that has the stage.
    pub(crate) fn place(self, moe: Option<&Moe>) -> usize {
        let part = |part| match part {
            Part::Dense => 0,
            Part::Expert(expert) => expert as usize,
            Part::Shared => moe.map_or(0, |moe| moe.count),
        };
        match self {
            Self::Qkv => 0,
            Self::AttnOut => 1,
            Self::MlpUp(of) => 2 + 2 * part(of),
            Self::MlpDown(of) => 3 + 2 * part(of),
        }
    }
}

/// The linears of one stage of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageSpec {
    /// Which stage.
    pub stage: Stage,
    /// Its linears; all have the same `in_features`.
    pub linears: Vec<LinearSpec>,
}

/// One linear of a block, or the projection to logits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Name within the block, for example `self_attn.q_proj`.
    pub name: String,
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
    /// The mixture of experts of block `layer`, if it has one.
    pub fn moe(&self, layer: usize) -> Option<&Moe> {
        self.moe.as_ref().filter(|_| self.layers[layer].moe)
    }

    /// The stages of block `layer` in the order in which they run, which is true-sequential order.
    pub fn stage_order(&self, layer: usize) -> Vec<Stage> {
        let mut stages = vec![Stage::Qkv, Stage::AttnOut];
        let mut add = |part| stages.extend([Stage::MlpUp(part), Stage::MlpDown(part)]);
        match self.moe(layer) {
            Some(moe) => {
                (0..moe.count as u32).map(Part::Expert).for_each(&mut add);
                moe.shared.iter().for_each(|_| add(Part::Shared));
            }
            None => add(Part::Dense),
        }
        stages
    }

    /// The stages of block `layer` with their linears, in the order in which they run.
    pub fn stages(&self, layer: usize) -> Vec<StageSpec> {
        let linears = |stage| StageSpec { stage, linears: self.stage_linears(layer, stage) };
        self.stage_order(layer).into_iter().map(linears).collect()
    }

    /// The linears of one stage of block `layer`; none if the block has no such stage.
    pub fn stage_linears(&self, layer: usize, stage: Stage) -> Vec<LinearSpec> {
        let block = self.block_name(layer);
        let linear = |name: String, out_features: usize, in_features: usize, bias: bool| {
            let module = format!("{block}.{name}");
            LinearSpec { name, module, out_features, in_features, bias, transposed: self.conv1d }
        };
        let attention = &self.attention;
        let (hidden, q_width, kv_width) = (self.hidden, attention.q_width(), attention.kv_width());
        match stage {
            Stage::Qkv => match attention.qkv {
                Qkv::Separate { q, k, v } => [(q, q_width), (k, kv_width), (v, kv_width)]
                    .map(|(name, width)| linear(name.into(), width, hidden, attention.qkv_bias))
                    .into(),
                Qkv::Fused { name, .. } => {
                    let width = q_width + 2 * kv_width;
                    vec![linear(name.into(), width, hidden, attention.qkv_bias)]
                }
            },
            Stage::AttnOut => {
                vec![linear(attention.out.into(), hidden, q_width, attention.out_bias)]
            }
            Stage::MlpUp(part) => {
                let Some((prefix, mlp)) = self.part(layer, part) else { return Vec::new() };
                let up = |name: &str, width| {
                    linear(format!("{prefix}{name}"), width, hidden, mlp.bias())
                };
                match *mlp {
                    Mlp::Gated { gate_up: GateUp::Separate { gate, up: other }, width, .. } => {
                        vec![up(gate, width), up(other, width)]
                    }
                    Mlp::Gated { gate_up: GateUp::Fused(name), width, .. } => {
                        vec![up(name, 2 * width)]
                    }
                    Mlp::Plain { up: name, width, .. } => vec![up(name, width)],
                }
            }
            Stage::MlpDown(part) => {
                let Some((prefix, mlp)) = self.part(layer, part) else { return Vec::new() };
                let (Mlp::Gated { down, width, .. } | Mlp::Plain { down, width, .. }) = *mlp;
                vec![linear(format!("{prefix}{down}"), hidden, width, mlp.bias())]
            }
        }
    }

    /// The projection to logits as a linear of its own, tied or not, if the model has one.
    pub fn head_linear(&self) -> Option<LinearSpec> {
        let name = self.head.name?;
        Some(LinearSpec {
            name: name.to_owned(),
            module: name.to_owned(),
            out_features: self.vocab,
            in_features: self.embedding.width,
            bias: self.head.bias,
            transposed: false,
        })
    }

    /// Prefix of the names and form of one part of the MLP of block `layer`, if the block has it.
    pub(crate) fn part(&self, layer: usize, part: Part) -> Option<(String, &Mlp)> {
        match (part, self.moe(layer)) {
            (Part::Dense, None) => Some((String::new(), &self.mlp)),
            (Part::Expert(expert), Some(moe)) if (expert as usize) < moe.count => {
                Some((format!("{}.{expert}.", moe.experts), &moe.expert))
            }
            (Part::Shared, Some(Moe { shared: Some(shared), .. })) => {
                Some((format!("{}.", shared.name), &shared.mlp))
            }
            _ => None,
        }
    }
}
