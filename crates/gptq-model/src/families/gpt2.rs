//! GPT-2: learned positions, layer norms, a plain MLP, biases everywhere, weights stored transposed (Conv1D), tied head.

use super::read::{GPT2, Sizes, activation, inverse_root};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let gpt2 = like(f, "gpt2", "gelu_new")?;
    let scale_by_depth = f.flag_or("scale_attn_by_inverse_layer_idx", false)?;
    let attention = Attention { scale_by_depth, ..gpt2.attention.clone() };
    Ok(Spec { conv1d: true, attention, ..gpt2 })
}

/// What GPT-2 and GPTBigCode share.
pub(super) fn like(f: &Fields<'_>, family: &'static str, activation_name: &str) -> Result<Spec> {
    let sizes = Sizes::read(f, &GPT2)?;
    // Changes the order of the arithmetic only.
    f.ignore(&["reorder_and_upcast_attn"]);
    let scaled = f.flag_or("scale_attn_weights", true)?;
    Ok(Spec {
        family,
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "h",
        conv1d: false,
        embedding: Embedding::plain("wte", sizes.hidden),
        positions: Positions::learned("wpe"),
        norm: NormSpec::layer(f.eps_or("layer_norm_epsilon", 1e-5)?),
        attention: Attention {
            scale: if scaled { inverse_root(sizes.head_dim as f64) } else { 1.0 },
            qkv: Qkv::Fused { name: "attn.c_attn", order: FusedOrder::Concat },
            qkv_bias: true,
            out: "attn.c_proj",
            out_bias: true,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.c_fc",
            down: "mlp.c_proj",
            width: f.count_or("n_inner", 4 * sizes.hidden)?,
            activation: activation(f, "activation_function", activation_name)?,
            bias: true,
        },
        moe: None,
        residual: Residual::serial("ln_1", "ln_2"),
        head: Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: vec![Layer::default(); sizes.layers],
    })
}
