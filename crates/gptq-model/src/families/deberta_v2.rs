//! DeBERTa v2 and v3: BERT whose scores have products with the distance between query and key too, in buckets that grow with
//! it; the embedding of distances goes through the projections of queries and keys, quantized or not, or through linears of
//! its own (`pos_query_proj`, `pos_key_proj`), which stay floats. Some have a convolution beside the first block.

use gptq_compute::Activation;
use serde_json::Value;

use super::read::{SizeKeys, Sizes, USUAL, activation, inverse_root};
use crate::Result;
use crate::convolution::TokenConvolution;
use crate::fields::Fields;
use crate::relative::{Buckets, DistanceLinear, Relative};
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec, Transform,
};

const KEYS: SizeKeys = SizeKeys { max_positions: None, ..USUAL };
/// Wider convolutions than any model has.
const MAX_KERNEL: usize = 255;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = read_sizes(f)?;
    // Heads of other tasks.
    f.ignore(&["pooler_hidden_act", "pooler_hidden_size", "pooler_dropout"]);
    let width = f.count_or("embedding_size", sizes.hidden)?;
    let activation = activation(f, "hidden_act", "gelu")?;
    let terms = terms(f)?;
    let own_terms = terms.iter().filter(|&&on| on).count();
    let biased = f.flag_or("position_biased_input", true)?;
    let types = switchable(f, "type_vocab_size", 0.0)?;
    let post_norm = Residual::post_norm("attention.output.LayerNorm", "output.LayerNorm");
    Ok(Spec {
        family: "deberta-v2",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "deberta.".to_owned(),
        blocks: "encoder.layer",
        conv1d: false,
        embedding: Embedding {
            width,
            project_in: (width != sizes.hidden).then_some("embeddings.embed_proj"),
            project_sum: true,
            types: types.map(|count| ("embeddings.token_type_embeddings", count)),
            norm: Some("embeddings.LayerNorm"),
            ..Embedding::plain("embeddings.word_embeddings", sizes.hidden)
        },
        positions: if biased {
            Positions::learned("embeddings.position_embeddings")
        } else {
            Positions::None
        },
        norm: NormSpec::layer(f.eps_or("layer_norm_eps", 1e-7)?),
        attention: Attention {
            causal: false,
            relative: relative(f, &sizes, terms)?,
            // Each kind of term counts, computed or not.
            scale: inverse_root((sizes.head_dim * (1 + own_terms)) as f64),
            qkv: Qkv::Separate {
                q: "attention.self.query_proj",
                k: "attention.self.key_proj",
                v: "attention.self.value_proj",
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
        residual: Residual { convolution: convolution(f, sizes.hidden)?, ..post_norm },
        head: head(f, activation, width == sizes.hidden)?,
        layers: vec![Layer::default(); sizes.layers],
    })
}

fn read_sizes(f: &Fields<'_>) -> Result<Sizes> {
    let max_positions = f.count_or("max_position_embeddings", 512)?;
    let sizes = Sizes { max_positions, ..Sizes::read(f, &KEYS)? };
    // Keys of other families that the definition does not read.
    if sizes.kv_heads != sizes.heads {
        return Err(f.bad("num_key_value_heads", format!("{}, as many as heads", sizes.heads)));
    }
    let width = f.count_or("attention_head_size", sizes.head_dim)?;
    for (key, width) in [("head_dim", sizes.head_dim), ("attention_head_size", width)] {
        if width * sizes.heads != sizes.hidden {
            return Err(f.bad(key, "hidden_size / num_attention_heads"));
        }
    }
    Ok(sizes)
}

/// A count that numbers below 1 switch off.
fn switchable(f: &Fields<'_>, key: &str, default: f64) -> Result<Option<usize>> {
    const MAX: f64 = (1 << 20) as f64;
    let number = f.number_or(key, default)?;
    if number.fract() != 0.0 || number > MAX {
        return Err(f.bad(key, "a whole number up to 1048576"));
    }
    Ok((number >= 1.0).then_some(number as usize))
}

/// Whether content meets the position of the key (`c2p`), and the position of the query the content (`p2c`).
fn terms(f: &Fields<'_>) -> Result<[bool; 2]> {
    let key = "pos_att_type";
    let lower = match f.value(key) {
        Some(Value::String(text)) => Some(text.to_lowercase()),
        _ => None,
    };
    let names: Vec<&str> = match &lower {
        Some(text) => text.split('|').map(str::trim).collect(),
        None => f.opt_texts(key)?.unwrap_or_default(),
    };
    if !names.iter().all(|name| ["c2p", "p2c", ""].contains(name)) {
        return Err(f.bad(key, "c2p, p2c or both"));
    }
    Ok(["c2p", "p2c"].map(|term| names.contains(&term)))
}

fn relative(f: &Fields<'_>, sizes: &Sizes, [c2p, p2c]: [bool; 2]) -> Result<Option<Relative>> {
    let limit = switchable(f, "max_relative_positions", -1.0)?.unwrap_or(sizes.max_positions);
    let count = switchable(f, "position_buckets", -1.0)?;
    let shared = f.flag_or("share_att_key", false)?;
    let norm = f.text_or("norm_rel_ebd", "none")?.to_lowercase();
    let norms: Vec<&str> = norm.split('|').map(str::trim).collect();
    if !norms.iter().all(|name| ["layer_norm", "none", ""].contains(name)) {
        return Err(f.bad("norm_rel_ebd", "none or layer_norm"));
    }
    if !f.flag_or("relative_attention", false)? || !(c2p || p2c) {
        return Ok(None);
    }
    let linear = |own| if shared { DistanceLinear::Shared } else { DistanceLinear::Own(own) };
    let half = count.map(|count| count / 2);
    if half == Some(0) {
        return Err(f.bad("position_buckets", "at least 2 buckets, or -1"));
    }
    Ok(Some(Relative {
        embedding: "encoder.rel_embeddings",
        norm: norms.contains(&"layer_norm").then_some("encoder.LayerNorm"),
        span: count.unwrap_or(limit),
        buckets: half.map(|half| Buckets { half, limit }),
        keys: c2p.then(|| linear("attention.self.pos_key_proj")),
        queries: p2c.then(|| linear("attention.self.pos_query_proj")),
    }))
}

fn convolution(f: &Fields<'_>, hidden: usize) -> Result<Option<TokenConvolution>> {
    let groups = f.count_or("conv_groups", 1)?;
    let activation = activation(f, "conv_act", "tanh")?;
    let Some(kernel) = switchable(f, "conv_kernel_size", 0.0)? else { return Ok(None) };
    if kernel % 2 == 0 || kernel > MAX_KERNEL {
        return Err(f.bad("conv_kernel_size", format!("an odd number up to {MAX_KERNEL}")));
    }
    if !hidden.is_multiple_of(groups) {
        return Err(f.bad("conv_groups", format!("a divisor of hidden_size ({hidden})")));
    }
    let (name, norm) = ("encoder.conv.conv", "encoder.conv.LayerNorm");
    Ok(Some(TokenConvolution { name, kernel, groups, activation, norm }))
}

/// The head of a masked language model: BERT's, or the one that the models were trained with, which is always tied.
fn head(f: &Fields<'_>, activation: Activation, full_width: bool) -> Result<Head> {
    let tied = f.flag_or("tie_word_embeddings", true)?;
    let legacy = f.flag_or("legacy", true)?;
    if !legacy && !full_width {
        return Err(f.bad("legacy", "true where embedding_size is not hidden_size"));
    }
    let transform = |dense, norm| Transform { dense, bias: true, activation, norm };
    Ok(if legacy {
        let transform =
            transform("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm");
        Head::masked(transform, "cls.predictions.decoder", tied, None)
    } else {
        let transform =
            transform("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm");
        Head::masked(transform, "lm_predictions.lm_head", true, None)
    })
}
