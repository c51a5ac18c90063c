//! StableLM 2 and StableLM 3B: Llama with layer norms, a quarter of each head rotating, and optional biases on queries, keys
//! and values; the 12B model has a norm for each head of queries and keys.

use super::read::{RopeDefaults, Sizes, USUAL, gated, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, NormOver, NormSpec, Positions, QkNorm, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let defaults =
        RopeDefaults { partial: ("partial_rotary_factor", 0.25), ..RopeDefaults::default() };
    let norm = NormSpec::layer(f.eps_or("layer_norm_eps", 1e-5)?);
    let qk_norm = QkNorm {
        q: "self_attn.q_layernorm",
        k: "self_attn.k_layernorm",
        norm: NormSpec { bias: false, ..norm },
        over: NormOver::ListedHead,
    };
    Ok(Spec {
        family: "stablelm",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_tokens", sizes.hidden),
        positions: Positions::Rotary(vec![rope(f, &sizes, defaults)?]),
        norm,
        attention: Attention {
            qkv_bias: f.flag_or("use_qkv_bias", false)?,
            qk_norm: f.flag_or("qk_layernorm", false)?.then_some(qk_norm),
            ..sizes.attention()
        },
        mlp: gated(f, "hidden_act", "silu")?,
        moe: None,
        residual: if f.flag_or("use_parallel_residual", false)? {
            Residual::parallel("input_layernorm", None)
        } else {
            Residual::serial("input_layernorm", "post_attention_layernorm")
        },
        head: Head::plain("norm", "lm_head", f.flag_or("tie_word_embeddings", false)?),
        layers: sizes.alike(),
    })
}
