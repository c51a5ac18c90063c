//! Falcon: 7B (multi-query, one norm, side by side), 40B and 180B (grouped queries, a norm for each sublayer), and RW (ALiBi,
//! biases, one after the other).

use half::bf16;

use super::read::{RopeDefaults, SizeKeys, Sizes, activation, alibi_slopes, inverse_root, rope};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // Old configs say n_layer and n_head.
    let either = |new, old| if f.has(new) { new } else { old };
    let keys = SizeKeys {
        hidden: "hidden_size",
        layers: either("num_hidden_layers", "n_layer"),
        heads: either("num_attention_heads", "n_head"),
        max_positions: Some("max_position_embeddings"),
    };
    let sizes = Sizes::read(f, &keys)?;
    let grouped = f.flag_or("new_decoder_architecture", false)?;
    let written_kv_heads = f.count_or("num_kv_heads", sizes.heads)?;
    // Only the new architecture has a free number of key heads.
    let (kv_heads, order) = match (grouped, f.flag_or("multi_query", true)?) {
        (true, _) => (written_kv_heads, FusedOrder::Grouped),
        (false, true) => (1, FusedOrder::Concat),
        (false, false) => (sizes.heads, FusedOrder::Grouped),
    };
    if !sizes.heads.is_multiple_of(kv_heads) {
        return Err(
            f.bad("num_kv_heads", format!("a divisor of the number of heads ({})", sizes.heads))
        );
    }
    let bias = f.flag_or("bias", false)?;
    let alibi = f.flag_or("alibi", false)?;
    let rope = rope(f, &sizes, RopeDefaults::default())?;
    Ok(Spec {
        family: "falcon",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "h",
        conv1d: false,
        embedding: Embedding::plain("word_embeddings", sizes.hidden),
        positions: if alibi { scaled_alibi(&sizes) } else { Positions::Rotary(vec![rope]) },
        norm: NormSpec::layer(f.eps_or("layer_norm_epsilon", 1e-5)?),
        attention: Attention {
            kv_heads,
            qkv: Qkv::Fused { name: "self_attention.query_key_value", order },
            qkv_bias: bias,
            out: "self_attention.dense",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.dense_h_to_4h",
            down: "mlp.dense_4h_to_h",
            width: f.count_or("ffn_hidden_size", 4 * sizes.hidden)?,
            activation: activation(f, "activation", "gelu")?,
            bias,
        },
        moe: None,
        residual: residual(f, grouped)?,
        head: Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: vec![Layer { rope: (!alibi).then_some(0), ..Layer::default() }; sizes.layers],
    })
}

fn residual(f: &Fields<'_>, grouped: bool) -> Result<Residual> {
    let parallel = f.flag_or("parallel_attn", true)? || grouped;
    let norms = f.count_or("num_ln_in_parallel_attn", if grouped { 2 } else { 1 })?;
    Ok(match (parallel, grouped && norms == 2) {
        (true, true) => Residual::parallel("ln_attn", Some("ln_mlp")),
        (true, false) => Residual::parallel("input_layernorm", None),
        (false, _) => Residual::serial("input_layernorm", "post_attention_layernorm"),
    })
}

/// Falcon keeps slopes in bfloat16 and scales them together with the scores. transformers also rounds the product of slope and
/// position to bfloat16, by up to 2 at position 1000, so that distances of some tokens run together; here they are exact, as
/// in llama.cpp.
fn scaled_alibi(sizes: &Sizes) -> Positions {
    let scale = inverse_root(sizes.head_dim as f64);
    let slope = |slope: f32| bf16::from_f32(slope).to_f32() * scale;
    Positions::Alibi { slopes: alibi_slopes(sizes.heads).into_iter().map(slope).collect() }
}
