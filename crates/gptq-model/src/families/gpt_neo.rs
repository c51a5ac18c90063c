//! GPT-Neo: GPT-2 with separate bias-free projections, unscaled scores, and every other block looking back only
//! `window_size` tokens.

use serde_json::Value;

use super::read::{SizeKeys, Sizes, activation};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{
    Attention, Embedding, Head, Layer, Mlp, NormSpec, Positions, Qkv, Residual, Spec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden: "hidden_size",
    layers: "num_layers",
    heads: "num_heads",
    max_positions: Some("max_position_embeddings"),
};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &KEYS)?;
    Ok(Spec {
        family: "gpt_neo",
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
            scale: 1.0,
            qkv: Qkv::Separate {
                q: "attn.attention.q_proj",
                k: "attn.attention.k_proj",
                v: "attn.attention.v_proj",
            },
            out: "attn.attention.out_proj",
            out_bias: true,
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.c_fc",
            down: "mlp.c_proj",
            width: f.count_or("intermediate_size", 4 * sizes.hidden)?,
            activation: activation(f, "activation_function", "gelu_new")?,
            bias: true,
        },
        moe: None,
        residual: Residual::serial("ln_1", "ln_2"),
        head: Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", true)?),
        layers: layers(f, sizes.layers)?,
    })
}

/// One window or none per block: `attention_layers`, or `attention_types` as `[[kinds, repetitions], ...]`.
fn layers(f: &Fields<'_>, count: usize) -> Result<Vec<Layer>> {
    let window = f.count_or("window_size", 256)?;
    let (types, listed) = (f.value("attention_types"), f.opt_texts("attention_layers")?);
    let kinds = match (listed, types) {
        (Some(kinds), _) => kinds,
        (None, Some(types)) => unfold(types, count)
            .ok_or_else(|| f.bad("attention_types", "[[kinds, repetitions], …]"))?,
        (None, None) => ["global", "local"].into_iter().cycle().take(count).collect(),
    };
    let key = if f.has("attention_layers") { "attention_layers" } else { "attention_types" };
    let layer = |kind: &&str| match *kind {
        "global" => Some(Layer::default()),
        "local" => Some(Layer { window: Some(window), ..Layer::default() }),
        _ => None,
    };
    let layers: Option<Vec<Layer>> = kinds.iter().map(layer).collect();
    layers
        .filter(|layers| layers.len() == count)
        .ok_or_else(|| f.bad(key, format!("global or local for each of {count} layers")))
}

fn unfold(types: &Value, limit: usize) -> Option<Vec<&str>> {
    let mut kinds = Vec::new();
    for entry in types.as_array()? {
        let [names, count] = &entry.as_array()?[..] else {
            return None;
        };
        let names: Option<Vec<&str>> = names.as_array()?.iter().map(Value::as_str).collect();
        let names = names?;
        let room = limit.saturating_sub(kinds.len()) + 1;
        let wanted = names.len().saturating_mul(count.as_u64()? as usize).min(room);
        kinds.extend(names.into_iter().cycle().take(wanted));
    }
    Some(kinds)
}
