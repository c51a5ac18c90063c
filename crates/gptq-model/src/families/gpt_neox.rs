//! GPT-NeoX (Pythia, Dolly, StableLM alpha): query, key and value interleaved head by head, a quarter of each head rotates,
//! attention and MLP side by side with a norm each (or one after the other).

use serde_json::Value;

use super::read::{RopeDefaults, Sizes, USUAL, activation, rope};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Attention, Embedding, Head, Mlp, NormSpec, Positions, Qkv, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let defaults = RopeDefaults {
        theta: ("rotary_emb_base", 10000.0),
        partial: ("rotary_pct", 0.25),
        ..RopeDefaults::default()
    };
    let ropes = vec![rope(f, &sizes, defaults)?];
    also(f, "partial_rotary_factor", "rotary_pct", 0.25)?;
    also(f, "rope_theta", "rotary_emb_base", 10000.0)?;
    let bias = f.flag_or("attention_bias", true)?;
    let (attention_norm, mlp_norm) = ("input_layernorm", "post_attention_layernorm");
    Ok(Spec {
        family: "gpt_neox",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "gpt_neox.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding::plain("embed_in", sizes.hidden),
        positions: Positions::Rotary(ropes),
        norm: NormSpec::layer(f.eps_or("layer_norm_eps", 1e-5)?),
        attention: Attention {
            qkv: Qkv::Fused { name: "attention.query_key_value", order: FusedOrder::Grouped },
            qkv_bias: bias,
            out: "attention.dense",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.dense_h_to_4h",
            down: "mlp.dense_4h_to_h",
            width: f.count("intermediate_size")?,
            activation: activation(f, "hidden_act", "gelu")?,
            bias: true,
        },
        moe: None,
        residual: if f.flag_or("use_parallel_residual", true)? {
            Residual::parallel(attention_norm, Some(mlp_norm))
        } else {
            Residual::serial(attention_norm, mlp_norm)
        },
        head: Head::plain(
            "final_layer_norm",
            "embed_out",
            f.flag_or("tie_word_embeddings", false)?,
        ),
        layers: sizes.alike(),
    })
}

/// Late versions of transformers 4 write the value of `key` under another name, too: it has to be the same.
fn also(f: &Fields<'_>, name: &str, key: &str, default: f64) -> Result<()> {
    let number = |key: &str| f.value(key).and_then(Value::as_f64);
    let value = number(key).unwrap_or(default);
    if number(name) == Some(value) { Ok(()) } else { f.only(name, &value.into()) }
}
