//! ChatGLM 2 and 3, and GLM-4 as its authors publish it: `glm` under other names, with queries, keys and values in one linear.
//! Not the first ChatGLM, whose positions have two dimensions.

use gptq_compute::{Activation, RopeStyle};
use serde_json::Value;

use super::read::{Sizes, layer_count, never};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::rope::{Rope, RopeScaling};
use crate::spec::{
    Attention, Embedding, GateUp, Head, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

/// Vocabulary of ChatGLM 2 and 3.
const SMALL_VOCAB: usize = 65_024;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    refuse(f)?;
    let (sizes, order) = read_sizes(f)?;
    let ratio = f.positive_or("rope_ratio", 1.0)?;
    if ratio != 1.0 && sizes.vocab == SMALL_VOCAB {
        let reason = "1: ChatGLM 2 divides positions by it, ChatGLM 3 multiplies the base with it, and configs do not tell";
        return Err(f.bad("rope_ratio", reason));
    }
    let rope = Rope {
        theta: 10000.0 * ratio,
        rotary_dim: sizes.head_dim / 2,
        style: RopeStyle::Interleaved,
        scaling: RopeScaling::None,
    };
    let eps = f.eps_or("layernorm_epsilon", 1e-5)?;
    let bias = f.flag_or("add_bias_linear", false)?;
    let norm = "encoder.final_layernorm";
    Ok(Spec {
        family: "chatglm",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "encoder.layers",
        conv1d: false,
        embedding: Embedding::plain("embedding.word_embeddings", sizes.hidden),
        positions: Positions::Rotary(vec![rope]),
        norm: if f.flag_or("rmsnorm", true)? { NormSpec::rms(eps) } else { NormSpec::layer(eps) },
        attention: Attention {
            qkv: Qkv::Fused { name: "self_attention.query_key_value", order },
            qkv_bias: f.flag_or("add_qkv_bias", false)? || bias,
            out: "self_attention.dense",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Gated {
            gate_up: GateUp::Fused("mlp.dense_h_to_4h"),
            down: "mlp.dense_4h_to_h",
            width: f.count("ffn_hidden_size")?,
            activation: Activation::Silu,
            bias,
        },
        moe: None,
        residual: Residual {
            from_norm: f.flag_or("apply_residual_connection_post_layernorm", false)?,
            ..Residual::serial("input_layernorm", "post_attention_layernorm")
        },
        head: Head {
            norm: f.flag_or("post_layer_norm", true)?.then_some(norm),
            ..Head::plain(norm, "transformer.output_layer", false)
        },
        layers: sizes.alike(),
    })
}

/// Other models of this name, and what is not certain of these.
fn refuse(f: &Fields<'_>) -> Result<()> {
    // The first ChatGLM; the one that sees; prompts that were trained.
    for key in ["position_encoding_2d", "inner_hidden_size", "vision_config", "pre_seq_len"] {
        f.only(key, &Value::Null)?;
    }
    // Weights in a packing of its own.
    f.only("quantization_bit", &Value::from(0))?;
    never(f, "tie_word_embeddings")?;
    // The other rotation is in no definition of a text model.
    f.only("original_rope", &Value::Bool(true))?;
    f.ignore(&[
        // Divides scores by the number of the block and multiplies them again.
        "apply_query_key_layer_scaling",
        // Of trained prompts, which are refused.
        "prefix_projection",
        // How training fuses operations, and in which type it adds.
        "bias_dropout_fusion",
        "fp32_residual_connection",
    ]);
    Ok(())
}

fn read_sizes(f: &Fields<'_>) -> Result<(Sizes, FusedOrder)> {
    let heads = f.count("num_attention_heads")?;
    let groups = f.count_or("multi_query_group_num", 1)?;
    let grouped = f.flag_or("multi_query_attention", false)?;
    if grouped && !heads.is_multiple_of(groups) {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(f.bad("multi_query_group_num", expected));
    }
    let head_dim = f.count_or("kv_channels", 128)?;
    if !head_dim.is_multiple_of(4) {
        return Err(f.bad("kv_channels", "a multiple of 4, of which half is rotated in pairs"));
    }
    let sizes = Sizes {
        hidden: f.count("hidden_size")?,
        layers: layer_count(f, "num_layers")?,
        vocab: f.count("padded_vocab_size")?,
        max_positions: f.count_or("seq_length", 2048)?,
        heads,
        kv_heads: if grouped { groups } else { heads },
        head_dim,
    };
    Ok((sizes, if grouped { FusedOrder::Concat } else { FusedOrder::Grouped }))
}
