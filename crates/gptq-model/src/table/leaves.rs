//! From a spec to a table: every value that a table can say.

use gptq_compute::{Activation, NormKind, RopeStyle};

use super::{
    AttentionTable, Experts, FamilyTable, HeadTable, MlpTable, Modules, NormName, Norms, OrderName,
    OverName, ResidualTable, RopeName, Stages,
};
use crate::fused::FusedOrder;
use crate::spec::{GateUp, Mlp, NormOver, Positions, Qkv, Spec};

impl FamilyTable {
    /// The table that says all of `spec` that a table can say.
    pub(super) fn of(spec: &Spec) -> Self {
        let text = |name: &str| Some(name.to_owned());
        let optional = |name: Option<&str>| text(name.unwrap_or(""));
        let Spec { embedding, attention, residual, head, norm, .. } = spec;
        let qk = attention.qk_norm;
        let (mlp_up, mlp_down) = linears(&spec.mlp);
        let (gated, activation) = form(&spec.mlp);
        Self {
            base: spec.family.to_owned(),
            modules: Modules {
                prefix: Some(spec.base.clone()),
                blocks: text(spec.blocks),
                embedding: text(embedding.name),
                positions: match spec.positions {
                    Positions::Learned { name, .. } => text(name),
                    Positions::Rotary(_) | Positions::Alibi { .. } | Positions::None => None,
                },
                token_types: embedding.types.and_then(|(name, _)| text(name)),
                embedding_norm: optional(embedding.norm),
                project_in: embedding.project_in.and_then(text),
                final_norm: optional(head.norm),
                project_out: head.project_out.and_then(text),
                head: head.name.and_then(text),
            },
            stages: Stages {
                qkv: Some(match attention.qkv {
                    Qkv::Separate { q, k, v } => [q, k, v].map(str::to_owned).to_vec(),
                    Qkv::Fused { name, .. } => vec![name.to_owned()],
                }),
                attention_out: text(attention.out),
                mlp_up: Some(mlp_up),
                mlp_down: text(mlp_down),
                transposed: Some(spec.conv1d),
            },
            experts: spec.moe.map_or_else(Experts::default, |moe| {
                let (up, down) = linears(&moe.expert);
                Experts {
                    router: text(moe.router),
                    list: text(moe.experts),
                    up: Some(up),
                    down: text(down),
                    renormalize: Some(moe.renormalize),
                }
            }),
            norms: Norms {
                kind: Some(match norm.kind {
                    NormKind::Rms => NormName::Rms,
                    NormKind::RmsPlusOne => NormName::RmsPlusOne,
                    NormKind::Layer => NormName::Layer,
                }),
                weight: Some(norm.weight),
                bias: Some(norm.bias),
                before_attention: optional(residual.attention.before),
                after_attention: optional(residual.attention.after),
                stream_attention: optional(residual.attention.stream),
                before_mlp: optional(residual.mlp.before),
                after_mlp: optional(residual.mlp.after),
                stream_mlp: optional(residual.mlp.stream),
                queries: optional(qk.map(|qk| qk.q)),
                keys: optional(qk.map(|qk| qk.k)),
                over: qk.map(|qk| match qk.over {
                    NormOver::Row => OverName::Row,
                    NormOver::Head => OverName::Head,
                    NormOver::OwnHead => OverName::OwnHead,
                    NormOver::ListedHead => OverName::ListedHead,
                }),
            },
            attention: AttentionTable {
                qkv_bias: Some(attention.qkv_bias),
                out_bias: Some(attention.out_bias),
                fused_order: match attention.qkv {
                    Qkv::Separate { .. } => None,
                    Qkv::Fused { order, .. } => Some(match order {
                        FusedOrder::Concat => OrderName::Concat,
                        FusedOrder::Grouped => OrderName::Grouped,
                        FusedOrder::Devices { .. } => OrderName::FourDevices,
                    }),
                },
                scale: Some(f64::from(attention.scale)),
                causal: Some(attention.causal),
                rope: match &spec.positions {
                    Positions::Rotary(ropes) => ropes.first().map(|rope| match rope.style {
                        RopeStyle::Half => RopeName::Half,
                        RopeStyle::Interleaved => RopeName::Interleaved,
                    }),
                    Positions::Learned { .. } | Positions::Alibi { .. } | Positions::None => None,
                },
            },
            mlp: MlpTable {
                gated: Some(gated),
                activation: text(name_of(activation)),
                bias: Some(spec.mlp.bias()),
            },
            residual: ResidualTable {
                parallel: Some(residual.parallel),
                from_norm: Some(residual.from_norm),
                multiplier: Some(f64::from(residual.multiplier)),
            },
            head: HeadTable {
                tied: Some(head.tied),
                bias: Some(head.bias),
                scale: Some(f64::from(head.scale)),
            },
            ..Self::default()
        }
    }
}

fn linears(mlp: &Mlp) -> (Vec<String>, &'static str) {
    match *mlp {
        Mlp::Gated { gate_up: GateUp::Separate { gate, up }, down, .. } => {
            (vec![gate.to_owned(), up.to_owned()], down)
        }
        Mlp::Gated { gate_up: GateUp::Fused(name), down, .. }
        | Mlp::Plain { up: name, down, .. } => (vec![name.to_owned()], down),
    }
}

fn form(mlp: &Mlp) -> (bool, Activation) {
    match *mlp {
        Mlp::Gated { activation, .. } => (true, activation),
        Mlp::Plain { activation, .. } => (false, activation),
    }
}

fn name_of(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::GeluQuick => "quick_gelu",
        Activation::Relu => "relu",
        Activation::ReluSquared => "relu2",
        Activation::Tanh => "tanh",
    }
}
