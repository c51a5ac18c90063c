//! Qwen 1.5, 2 and 2.5: Llama with biases on queries, keys and values only, and a window in the upper blocks where asked for.

use super::llama;
use super::read::{never, sliding_layers, windowed};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Layer, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    with_windows(f, upper)
}

/// Qwen 2 with a window in other blocks than the upper ones: as [`layers`].
pub(super) fn with_windows(f: &Fields<'_>, on: impl Fn(usize, f64) -> bool) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let attention = Attention { qkv_bias: true, out_bias: false, ..llama.attention.clone() };
    let layers = layers(f, llama.layer_count(), on)?;
    Ok(Spec { family: "qwen2", attention, layers, ..llama })
}

/// Blocks from `max_window_layers` on.
pub(super) fn upper(layer: usize, max_window_layers: f64) -> bool {
    layer as f64 >= max_window_layers
}

/// Without `use_sliding_window` the window is switched off whatever its size; with it, the blocks have it that `layer_types`
/// names, or else those that `rule` finds by index and `max_window_layers`.
pub(super) fn layers(
    f: &Fields<'_>,
    count: usize,
    rule: impl Fn(usize, f64) -> bool,
) -> Result<Vec<Layer>> {
    let on = f.flag_or("use_sliding_window", false)?;
    // Always written; may be 0 or larger than the number of blocks.
    let first = f.opt_number("max_window_layers")?.unwrap_or(28.0);
    let null = f.has("sliding_window") && f.value("sliding_window").is_none();
    let sliding = sliding_layers(f, count, |layer| on && !null && rule(layer, first))?;
    if on {
        return windowed(f, &sliding);
    }
    // The unused window may have any value, 0 included.
    f.ignore(&["sliding_window"]);
    if sliding.contains(&true) {
        return Err(
            f.bad("layer_types", "full_attention everywhere while use_sliding_window is false")
        );
    }
    Ok(vec![Layer { rope: Some(0), ..Layer::default() }; count])
}
