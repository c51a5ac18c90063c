//! Phi 1, 1.5 and 2: attention and a plain MLP side by side behind one layer norm, biases everywhere, half of each head
//! rotates.

use super::read::{RopeDefaults, Sizes, USUAL, activation, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Embedding, Head, Mlp, NormOver, NormSpec, Positions, QkNorm, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let norm = NormSpec::layer(f.eps_or("layer_norm_eps", 1e-5)?);
    let qk_norm = QkNorm {
        q: "self_attn.q_layernorm",
        k: "self_attn.k_layernorm",
        norm,
        over: NormOver::Head,
    };
    let mut attention = sizes.attention();
    attention.qkv_bias = true;
    attention.out = "self_attn.dense";
    attention.out_bias = true;
    attention.qk_norm = f.flag_or("qk_layernorm", false)?.then_some(qk_norm);
    let defaults =
        RopeDefaults { partial: ("partial_rotary_factor", 0.5), ..RopeDefaults::default() };
    Ok(Spec {
        family: "phi",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_tokens", sizes.hidden),
        positions: Positions::Rotary(vec![rope(f, &sizes, defaults)?]),
        norm,
        attention,
        mlp: Mlp::Plain {
            up: "mlp.fc1",
            down: "mlp.fc2",
            width: f.count("intermediate_size")?,
            activation: activation(f, "hidden_act", "gelu_new")?,
            bias: true,
        },
        moe: None,
        residual: Residual::parallel("input_layernorm", None),
        head: Head {
            bias: true,
            ..Head::plain("final_layernorm", "lm_head", f.flag_or("tie_word_embeddings", false)?)
        },
        layers: sizes.alike(),
    })
}
