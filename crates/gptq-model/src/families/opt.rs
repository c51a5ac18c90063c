//! OPT: learned positions that start at row 2, biases, ReLU; the 350M model normalises after each sublayer and has
//! projections around a narrower embedding.

use super::read::{Sizes, USUAL, activation};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let bias = f.flag_or("enable_bias", true)?;
    let affine = f.flag_or("layer_norm_elementwise_affine", true)?;
    let width = f.count_or("word_embed_proj_dim", sizes.hidden)?;
    let projected = width != sizes.hidden;
    let norms = ("self_attn_layer_norm", "final_layer_norm");
    let before = f.flag_or("do_layer_norm_before", true)?;
    let removed = f.flag_or("_remove_final_layer_norm", false)?;
    let final_norm = before && !removed;
    Ok(Spec {
        family: "opt",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "model.decoder.".to_owned(),
        blocks: "layers",
        conv1d: false,
        embedding: Embedding {
            width,
            project_in: projected.then_some("project_in"),
            ..Embedding::plain("embed_tokens", sizes.hidden)
        },
        positions: Positions::Learned {
            name: "embed_positions",
            offset: 2,
            padding: None,
            masked: false,
        },
        norm: NormSpec { weight: affine, bias: affine, ..NormSpec::layer(1e-5) },
        attention: Attention {
            qkv: Qkv::Separate {
                q: "self_attn.q_proj",
                k: "self_attn.k_proj",
                v: "self_attn.v_proj",
            },
            qkv_bias: bias,
            out: "self_attn.out_proj",
            out_bias: bias,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "fc1",
            down: "fc2",
            width: f.count("ffn_dim")?,
            activation: activation(f, "activation_function", "relu")?,
            bias,
        },
        moe: None,
        residual: if before {
            Residual::serial(norms.0, norms.1)
        } else {
            Residual::post_norm(norms.0, norms.1)
        },
        head: Head {
            norm: final_norm.then_some("final_layer_norm"),
            project_out: projected.then_some("project_out"),
            ..Head::plain("final_layer_norm", "lm_head", f.flag_or("tie_word_embeddings", true)?)
        },
        layers: vec![Layer::default(); sizes.layers],
    })
}
