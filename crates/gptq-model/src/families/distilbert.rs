//! DistilBERT: BERT without token types and pooler, under other names.

use super::read::{SizeKeys, Sizes, activation};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec, Transform,
};

const KEYS: SizeKeys = SizeKeys {
    hidden: "dim",
    layers: "n_layers",
    heads: "n_heads",
    max_positions: Some("max_position_embeddings"),
};

/// Fixed in the definition.
const EPS: f32 = 1e-12;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &KEYS)?;
    // Only how the table was initialised: it is stored either way.
    f.ignore(&["sinusoidal_pos_embds"]);
    let activation = activation(f, "activation", "gelu")?;
    let transform =
        Transform { dense: "vocab_transform", bias: true, activation, norm: "vocab_layer_norm" };
    Ok(Spec {
        family: "distilbert",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "distilbert.".to_owned(),
        blocks: "transformer.layer",
        conv1d: false,
        embedding: Embedding {
            norm: Some("embeddings.LayerNorm"),
            ..Embedding::plain("embeddings.word_embeddings", sizes.hidden)
        },
        positions: Positions::learned("embeddings.position_embeddings"),
        norm: NormSpec::layer(EPS),
        attention: Attention {
            causal: false,
            qkv: Qkv::Separate { q: "attention.q_lin", k: "attention.k_lin", v: "attention.v_lin" },
            qkv_bias: true,
            out: "attention.out_lin",
            out_bias: true,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "ffn.lin1",
            down: "ffn.lin2",
            width: f.count_or("hidden_dim", 4 * sizes.hidden)?,
            activation,
            bias: true,
        },
        moe: None,
        residual: Residual::post_norm("sa_layer_norm", "output_layer_norm"),
        head: Head::masked(
            transform,
            "vocab_projector",
            f.flag_or("tie_word_embeddings", true)?,
            None,
        ),
        layers: vec![Layer::default(); sizes.layers],
    })
}
