//! Qwen (1): GPT-2's names, RMS norm, rotary positions, a gated MLP whose gate is `w2`, biases on queries, keys and values
//! only. Beyond `seq_length` tokens it changes its frequencies and scales its queries, which is not implemented.

use gptq_compute::Activation;
use serde_json::Value;

use super::read::{RopeDefaults, SizeKeys, Sizes, rope};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::rope::RopeScaling;
use crate::spec::{
    Attention, Embedding, GateUp, Head, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    max_positions: Some("seq_length"),
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &KEYS)?;
    let sizes = Sizes { head_dim: f.count_or("kv_channels", sizes.head_dim)?, ..sizes };
    f.only("scale_attn_weights", &Value::Bool(true))?;
    f.ignore(&["attn_dropout_prob"]);
    let defaults = RopeDefaults {
        theta: ("rotary_emb_base", 10000.0),
        partial: ("rotary_pct", 1.0),
        ..RopeDefaults::default()
    };
    let mut rope = rope(f, &sizes, defaults)?;
    if f.flag_or("use_dynamic_ntk", true)? | f.flag_or("use_logn_attn", true)? {
        rope.scaling = RopeScaling::Limited { max_positions: sizes.max_positions };
    }
    let bias = !f.flag_or("no_bias", true)?;
    // Both factors of the MLP together.
    let width = f.count("intermediate_size")?;
    if !width.is_multiple_of(2) {
        return Err(f.bad("intermediate_size", "an even number"));
    }
    Ok(Spec {
        family: "qwen",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "h",
        conv1d: false,
        embedding: Embedding::plain("wte", sizes.hidden),
        positions: Positions::Rotary(vec![rope]),
        norm: NormSpec::rms(f.eps_or("layer_norm_epsilon", 1e-6)?),
        attention: Attention {
            qkv: Qkv::Fused { name: "attn.c_attn", order: FusedOrder::Concat },
            qkv_bias: true,
            out: "attn.c_proj",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Gated {
            gate_up: GateUp::Separate { gate: "mlp.w2", up: "mlp.w1" },
            down: "mlp.c_proj",
            width: width / 2,
            activation: Activation::Silu,
            bias,
        },
        moe: None,
        residual: Residual::serial("ln_1", "ln_2"),
        head: Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", false)?),
        layers: sizes.alike(),
    })
}
