//! SmolLM 3: Llama in which every fourth block has no positions, and these may have a window.

use super::read::{RopeDefaults, Sizes, USUAL, rope};
use super::{llama, qwen2};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Head, Layer, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let defaults = RopeDefaults { theta: ("rope_theta", 2e6), ..RopeDefaults::default() };
    let llama = llama::with_ropes(f, &sizes, vec![rope(f, &sizes, defaults)?])?;
    let every = f.count_or("no_rope_layer_interval", 4)?;
    // Despite the name, 1 says that a block rotates.
    let rotates: Vec<bool> = match f.value("no_rope_layers") {
        Some(_) => f.numbers("no_rope_layers")?.into_iter().map(|flag| flag != 0.0).collect(),
        None => (0..sizes.layers).map(|layer| (layer + 1) % every != 0).collect(),
    };
    if rotates.len() < sizes.layers {
        return Err(
            f.bad("no_rope_layers", format!("one entry for each of {} layers", sizes.layers))
        );
    }
    let layers = qwen2::layers(f, sizes.layers, |layer, _| !rotates[layer])?;
    let with_rope =
        |(layer, &rotates): (Layer, &bool)| Layer { rope: layer.rope.filter(|_| rotates), ..layer };
    Ok(Spec {
        family: "smollm3",
        head: Head { tied: f.flag_or("tie_word_embeddings", true)?, ..llama.head.clone() },
        layers: layers.into_iter().zip(&rotates).map(with_rope).collect(),
        ..llama
    })
}
