//! BLOOM: ALiBi, a norm on the embedding, query, key and value interleaved head by head, biases everywhere, tied head.

use gptq_compute::Activation;

use super::read::{SizeKeys, Sizes, alibi_slopes};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // Old configs say n_embed and num_attention_heads.
    let either = |new, old| if f.has(new) { new } else { old };
    let keys = SizeKeys {
        hidden: either("hidden_size", "n_embed"),
        layers: either("n_layer", "num_hidden_layers"),
        heads: either("n_head", "num_attention_heads"),
        max_positions: None,
    };
    let sizes = Sizes::read(f, &keys)?;
    // Left by the training code; transformers reads none of them.
    f.ignore(&[
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "bias_dropout_fusion",
        "num_attention_heads",
    ]);
    Ok(Spec {
        family: "bloom",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: f.count_or("seq_length", sizes.max_positions)?,
        base: "transformer.".to_owned(),
        blocks: "h",
        conv1d: false,
        embedding: Embedding {
            norm: Some("word_embeddings_layernorm"),
            ..Embedding::plain("word_embeddings", sizes.hidden)
        },
        positions: Positions::Alibi { slopes: alibi_slopes(sizes.heads) },
        norm: NormSpec::layer(f.eps_or("layer_norm_epsilon", 1e-5)?),
        attention: Attention {
            qkv: Qkv::Fused { name: "self_attention.query_key_value", order: FusedOrder::Grouped },
            qkv_bias: true,
            out: "self_attention.dense",
            out_bias: true,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.dense_h_to_4h",
            down: "mlp.dense_4h_to_h",
            width: 4 * sizes.hidden,
            activation: Activation::GeluTanh,
            bias: true,
        },
        moe: None,
        residual: Residual {
            from_norm: f.flag_or("apply_residual_connection_post_layernorm", false)?,
            ..Residual::serial("input_layernorm", "post_attention_layernorm")
        },
        head: Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: vec![Layer::default(); sizes.layers],
    })
}
