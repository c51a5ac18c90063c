//! InternLM 2 and 2.5: Llama under other names, with queries, keys and values of each group in one linear.

use super::llama;
use super::read::{activation, never};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Attention, Embedding, GateUp, Head, Mlp, Qkv, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "attention_bias")?;
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let bias = f.flag_or("bias", true)?;
    Ok(Spec {
        family: "internlm2",
        embedding: Embedding::plain("tok_embeddings", llama.hidden),
        attention: Attention {
            qkv: Qkv::Fused { name: "attention.wqkv", order: FusedOrder::Grouped },
            qkv_bias: bias,
            out: "attention.wo",
            out_bias: bias,
            ..llama.attention.clone()
        },
        mlp: Mlp::Gated {
            gate_up: GateUp::Separate { gate: "feed_forward.w1", up: "feed_forward.w3" },
            down: "feed_forward.w2",
            width: llama.mlp.width(),
            activation: activation(f, "hidden_act", "silu")?,
            bias: false,
        },
        residual: Residual::serial("attention_norm", "ffn_norm"),
        head: Head::plain("norm", "output", llama.head.tied),
        ..llama
    })
}
