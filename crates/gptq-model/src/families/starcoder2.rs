//! StarCoder 2: rotary positions, layer norms, a plain MLP, biases, a window in every block where one is set, tied head.

use serde_json::Value;

use super::read::{RopeDefaults, Sizes, USUAL, activation, rope, windowed};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Embedding, Head, Mlp, NormSpec, Positions, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    f.only("mlp_type", &Value::from("default"))?;
    f.only("norm_type", &Value::from("layer_norm"))?;
    f.only("scale_attn_weights", &Value::Bool(true))?;
    let bias = f.flag_or("use_bias", true)?;
    let sliding = vec![f.value("sliding_window").is_some(); sizes.layers];
    Ok(Spec {
        family: "starcoder2",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_tokens", sizes.hidden),
        positions: Positions::Rotary(vec![rope(f, &sizes, RopeDefaults::default())?]),
        norm: NormSpec::layer(f.eps_or("norm_epsilon", 1e-5)?),
        attention: Attention { qkv_bias: bias, out_bias: bias, ..sizes.attention() },
        mlp: Mlp::Plain {
            up: "mlp.c_fc",
            down: "mlp.c_proj",
            width: f.count("intermediate_size")?,
            activation: activation(f, "hidden_act", "gelu_pytorch_tanh")?,
            bias,
        },
        moe: None,
        residual: Residual::serial("input_layernorm", "post_attention_layernorm"),
        head: Head::plain("norm", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: windowed(f, &sliding)?,
    })
}
