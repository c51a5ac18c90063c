//! GLM-4 (`glm`) and GLM-4-0414 (`glm4`): Llama with half of each head rotating in neighbouring pairs, biases on queries, keys
//! and values, and gate and up in one linear; the later one also normalises the sublayers' outputs.

use gptq_compute::RopeStyle;

use super::llama;
use super::read::{RopeDefaults, Sizes, USUAL, activation, never, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, GateUp, Mlp, NormSpec, Residual, Spec};

pub(super) fn glm(f: &Fields<'_>) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let sizes = Sizes { head_dim: f.count_or("head_dim", 128)?, ..Sizes::read(f, &USUAL)? };
    let defaults = RopeDefaults {
        partial: ("partial_rotary_factor", 0.5),
        style: RopeStyle::Interleaved,
        ..RopeDefaults::default()
    };
    let llama = llama::with_ropes(f, &sizes, vec![rope(f, &sizes, defaults)?])?;
    Ok(Spec {
        family: "glm",
        norm: NormSpec::rms(f.eps_or("rms_norm_eps", 1.5625e-7)?),
        attention: Attention {
            qkv_bias: f.flag_or("attention_bias", true)?,
            out_bias: false,
            ..llama.attention.clone()
        },
        mlp: Mlp::Gated {
            gate_up: GateUp::Fused("mlp.gate_up_proj"),
            down: "mlp.down_proj",
            width: llama.mlp.width(),
            activation: activation(f, "hidden_act", "silu")?,
            bias: false,
        },
        ..llama
    })
}

pub(super) fn glm4(f: &Fields<'_>) -> Result<Spec> {
    let residual = Residual::sandwich(
        ["input_layernorm", "post_self_attn_layernorm"],
        ["post_attention_layernorm", "post_mlp_layernorm"],
    );
    Ok(Spec { family: "glm4", residual, ..glm(f)? })
}
