//! BERT: both directions, learned positions, token types, a norm of the embedding and after each sublayer, exact GELU.

use serde_json::Value;

use super::read::{Sizes, USUAL, activation, never};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec, Transform,
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    never(f, "is_decoder")?;
    f.only("position_embedding_type", &Value::from("absolute"))?;
    // Left over in the multilingual models from another pooler.
    f.ignore(&["pooler_num_attention_heads", "pooler_size_per_head"]);
    let activation = activation(f, "hidden_act", "gelu")?;
    let transform = Transform {
        dense: "cls.predictions.transform.dense",
        bias: true,
        activation,
        norm: "cls.predictions.transform.LayerNorm",
    };
    let tied = f.flag_or("tie_word_embeddings", true)?;
    Ok(Spec {
        family: "bert",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "bert.".to_owned(),
        blocks: "encoder.layer",
        conv1d: false,
        embedding: Embedding {
            types: Some(("embeddings.token_type_embeddings", f.count_or("type_vocab_size", 2)?)),
            norm: Some("embeddings.LayerNorm"),
            ..Embedding::plain("embeddings.word_embeddings", sizes.hidden)
        },
        positions: Positions::learned("embeddings.position_embeddings"),
        norm: NormSpec::layer(f.eps_or("layer_norm_eps", 1e-12)?),
        attention: Attention {
            causal: false,
            qkv: Qkv::Separate {
                q: "attention.self.query",
                k: "attention.self.key",
                v: "attention.self.value",
            },
            qkv_bias: true,
            out: "attention.output.dense",
            out_bias: true,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "intermediate.dense",
            down: "output.dense",
            width: f.count("intermediate_size")?,
            activation,
            bias: true,
        },
        moe: None,
        residual: Residual::post_norm("attention.output.LayerNorm", "output.LayerNorm"),
        head: Head::masked(transform, "cls.predictions.decoder", tied, Some("pooler.dense")),
        layers: vec![Layer::default(); sizes.layers],
    })
}
