//! StableLM 2 and StableLM 3B: Llama with layer norms, a quarter of each head rotating, and optional biases on queries, keys
//! and values.

use super::read::{RopeDefaults, Sizes, USUAL, gated, never, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Embedding, Head, NormSpec, Positions, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // A norm with separate weights for each head.
    never(f, "qk_layernorm")?;
    let sizes = Sizes::read(f, &USUAL)?;
    let defaults =
        RopeDefaults { partial: ("partial_rotary_factor", 0.25), ..RopeDefaults::default() };
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
        norm: NormSpec::layer(f.eps_or("layer_norm_eps", 1e-5)?),
        attention: Attention { qkv_bias: f.flag_or("use_qkv_bias", false)?, ..sizes.attention() },
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
