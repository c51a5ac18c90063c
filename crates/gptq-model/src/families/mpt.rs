//! MPT: ALiBi, one fused projection, no biases anywhere (norms included), tied head.

use gptq_compute::Activation;
use serde_json::Value;

use super::read::{SizeKeys, Sizes};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden: "d_model",
    layers: "n_layers",
    heads: "n_heads",
    max_positions: Some("max_seq_len"),
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &KEYS)?;
    f.only("no_bias", &Value::Bool(true))?;
    f.only("logit_scale", &Value::Null)?;
    // transformers always computes an ordinary layer norm in f32.
    f.ignore(&["norm_type"]);
    let mut attention = Attention {
        qkv: Qkv::Fused { name: "attn.Wqkv", order: FusedOrder::Concat },
        out: "attn.out_proj",
        ..sizes.attention()
    };
    if let Some(a) = f.opt_object("attn_config")? {
        a.only("attn_type", &Value::from("multihead_attention"))?;
        a.only("alibi", &Value::Bool(true))?;
        a.only("qk_ln", &Value::Bool(false))?;
        a.only("prefix_lm", &Value::Bool(false))?;
        // transformers ignores it, the original definition does not; all published models have this value.
        a.only("alibi_bias_max", &Value::from(8))?;
        attention.clip_qkv = a.switchable("clip_qkv", None)?;
        attention.scale = a.switchable("softmax_scale", None)?.unwrap_or(attention.scale);
    }
    Ok(Spec {
        family: "mpt",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "blocks",
        conv1d: false,
        embedding: Embedding::plain("wte", sizes.hidden),
        positions: Positions::Alibi { slopes: slopes(sizes.heads) },
        norm: NormSpec { bias: false, ..NormSpec::layer(f.eps_or("layer_norm_epsilon", 1e-5)?) },
        attention,
        mlp: Mlp::Plain {
            up: "ffn.up_proj",
            down: "ffn.down_proj",
            // transformers ignores expansion_ratio.
            width: 4 * sizes.hidden,
            activation: Activation::Gelu,
            bias: false,
        },
        moe: None,
        residual: Residual::serial("norm_1", "norm_2"),
        head: Head::plain("norm_f", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: vec![Layer::default(); sizes.layers],
    })
}

/// ALiBi slopes 2^(-8i / n) for the next power of two n; of these the odd places first where n is too many.
fn slopes(heads: usize) -> Vec<f32> {
    let power = heads.next_power_of_two();
    let slope = |i: usize| (1.0 / (i as f64 * 8.0 / power as f64).exp2()) as f32;
    if power == heads {
        return (1..=power).map(slope).collect();
    }
    (2..=power).step_by(2).chain((1..=power).step_by(2)).map(slope).take(heads).collect()
}
