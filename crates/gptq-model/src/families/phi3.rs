//! Phi 3, 3.5 and 4: Llama with fused projections (`qkv_proj`, `gate_up_proj`), a window where one is set, and LongRoPE.

use super::read::{RopeDefaults, Sizes, USUAL, activation, rope, windowed};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Embedding, GateUp, Head, Mlp, NormSpec, Positions, Qkv, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let mut attention = sizes.attention();
    attention.qkv = Qkv::Fused { name: "self_attn.qkv_proj", order: FusedOrder::Concat };
    let sliding = vec![f.value("sliding_window").is_some(); sizes.layers];
    // Configs of the first release say "su" or "yarn".
    let defaults = RopeDefaults { longrope_aliases: &["su", "yarn"], ..RopeDefaults::default() };
    Ok(Spec {
        family: "phi3",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_tokens", sizes.hidden),
        positions: Positions::Rotary(vec![rope(f, &sizes, defaults)?]),
        norm: NormSpec::rms(f.eps_or("rms_norm_eps", 1e-5)?),
        attention,
        mlp: Mlp::Gated {
            gate_up: GateUp::Fused("mlp.gate_up_proj"),
            down: "mlp.down_proj",
            width: f.count("intermediate_size")?,
            activation: activation(f, "hidden_act", "silu")?,
            bias: false,
        },
        moe: None,
        residual: Residual::serial("input_layernorm", "post_attention_layernorm"),
        head: Head::plain("norm", "lm_head", f.flag_or("tie_word_embeddings", false)?),
        layers: windowed(f, &sliding)?,
    })
}
