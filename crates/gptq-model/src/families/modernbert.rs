//! ModernBERT: an encoder with rotary positions, pre-norm, a fused gated MLP, and windows of `local_attention` tokens in two
//! of three blocks, which have a rope of their own.

use serde_json::Value;

use super::read::{
    RopeDefaults, Sizes, USUAL, activation, ropes_by_kind, sliding_layers, with_sliding_rope,
};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{
    Attention, Embedding, GateUp, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
    Transform,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    f.only("rope_scaling", &Value::Null)?;
    // What the heads of other tasks do, and what BERT left in the published configs.
    f.ignore(&["classifier_pooling", "sparse_prediction", "sparse_pred_ignore_index"]);
    f.ignore(&["position_embedding_type", "layer_norm_eps"]);
    let full = RopeDefaults { theta: ("global_rope_theta", 160_000.0), ..RopeDefaults::default() };
    let sliding = RopeDefaults { theta: ("local_rope_theta", 10_000.0), ..RopeDefaults::default() };
    let every = f.count_or("global_attn_every_n_layers", 3)?;
    let kinds = sliding_layers(f, sizes.layers, |layer| layer % every != 0)?;
    // Half of it on each side, the ends included.
    let window = f.count_or("local_attention", 128)? / 2 + 1;
    let mut layers: Vec<Layer> = kinds
        .iter()
        .map(|&sliding| Layer { window: sliding.then_some(window), ..Layer::default() })
        .collect();
    with_sliding_rope(&mut layers, &kinds);
    layers[0].bare = true;
    let bias = f.flag_or("attention_bias", false)?;
    let transform = Transform {
        dense: "head.dense",
        bias: f.flag_or("classifier_bias", false)?,
        activation: activation(f, "classifier_activation", "gelu")?,
        norm: "head.norm",
    };
    Ok(Spec {
        family: "modernbert",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding {
            norm: Some("embeddings.norm"),
            ..Embedding::plain("embeddings.tok_embeddings", sizes.hidden)
        },
        positions: Positions::Rotary(ropes_by_kind(f, &sizes, full, sliding)?),
        norm: NormSpec {
            bias: f.flag_or("norm_bias", false)?,
            ..NormSpec::layer(f.eps_or("norm_eps", 1e-5)?)
        },
        attention: Attention {
            causal: false,
            qkv: Qkv::Fused { name: "attn.Wqkv", order: FusedOrder::Concat },
            qkv_bias: bias,
            out: "attn.Wo",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Gated {
            gate_up: GateUp::Fused("mlp.Wi"),
            down: "mlp.Wo",
            width: f.count("intermediate_size")?,
            activation: activation(f, "hidden_activation", "gelu")?,
            bias: f.flag_or("mlp_bias", false)?,
        },
        moe: None,
        residual: Residual::serial("attn_norm", "mlp_norm"),
        head: Head {
            norm: Some("final_norm"),
            bias: f.flag_or("decoder_bias", true)?,
            ..Head::masked(transform, "decoder", f.flag_or("tie_word_embeddings", true)?, None)
        },
        layers,
    })
}
