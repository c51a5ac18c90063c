//! Llama 1 to 3, SmolLM, TinyLlama, Yi, DeepSeek LLM and the many others that publish as `llama`.
//! RMS norm, rotary positions, grouped-query attention, gated SiLU MLP, pre-norm.

use super::read::{RopeDefaults, Sizes, USUAL, gated, never, rope};
use crate::Result;
use crate::fields::Fields;
use crate::rope::Rope;
use crate::spec::{Embedding, Head, Mlp, NormSpec, Positions, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let ropes = vec![rope(f, &sizes, RopeDefaults::default())?];
    with_ropes(f, &sizes, ropes)
}

/// Llama with other ropes than those that `rope_theta` and `rope_scaling` describe.
pub(super) fn with_ropes(f: &Fields<'_>, sizes: &Sizes, ropes: Vec<Rope>) -> Result<Spec> {
    let mut attention = sizes.attention();
    attention.qkv_bias = f.flag_or("attention_bias", false)?;
    attention.out_bias = attention.qkv_bias;
    let mut mlp = gated(f, "hidden_act", "silu")?;
    if let Mlp::Gated { bias, .. } = &mut mlp {
        *bias = f.flag_or("mlp_bias", false)?;
    }
    // Written by some tools; transformers knows only the pairing of halves here.
    never(f, "rope_interleaved")?;
    Ok(Spec {
        family: "llama",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_tokens", sizes.hidden),
        positions: Positions::Rotary(ropes),
        norm: NormSpec::rms(f.eps_or("rms_norm_eps", 1e-6)?),
        attention,
        mlp,
        moe: None,
        residual: Residual::serial("input_layernorm", "post_attention_layernorm"),
        head: Head::plain("norm", "lm_head", f.flag_or("tie_word_embeddings", false)?),
        layers: sizes.alike(),
    })
}
