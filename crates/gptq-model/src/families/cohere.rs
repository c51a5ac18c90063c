//! Command R: attention and gated MLP side by side behind one bias-free layer norm, neighbouring columns rotate as pairs,
//! scaled logits, tied head. Command R+ has a norm for each head of queries and keys.

use gptq_compute::RopeStyle;

use super::read::{RopeDefaults, Sizes, USUAL, gated, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, NormOver, NormSpec, Positions, QkNorm, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let bias = f.flag_or("attention_bias", false)?;
    let defaults = RopeDefaults {
        theta: ("rope_theta", 500_000.0),
        style: RopeStyle::Interleaved,
        ..RopeDefaults::default()
    };
    let norm = NormSpec { bias: false, ..NormSpec::layer(f.eps_or("layer_norm_eps", 1e-5)?) };
    let qk_norm =
        QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", norm, over: NormOver::OwnHead };
    Ok(Spec {
        family: "cohere",
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
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: f.flag_or("use_qk_norm", false)?.then_some(qk_norm),
            ..sizes.attention()
        },
        mlp: gated(f, "hidden_act", "silu")?,
        moe: None,
        residual: Residual::parallel("input_layernorm", None),
        head: Head {
            scale: f.number_or("logit_scale", 0.0625)? as f32,
            ..Head::plain("norm", "lm_head", f.flag_or("tie_word_embeddings", true)?)
        },
        layers: sizes.alike(),
    })
}
