//! Qwen 1.5, 2 and 2.5: Llama with biases on queries, keys and values only, and a window in the upper blocks where asked for.

use super::llama;
use super::read::{never, sliding_layers, windowed};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Layer, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let attention = Attention { qkv_bias: true, out_bias: false, ..llama.attention.clone() };
    let layers = layers(f, llama.layer_count())?;
    Ok(Spec { family: "qwen2", attention, layers, ..llama })
}

/// Without `use_sliding_window` the window is switched off whatever its size; with it, blocks from `max_window_layers` on
/// have it unless `layer_types` says otherwise.
pub(super) fn layers(f: &Fields<'_>, count: usize) -> Result<Vec<Layer>> {
    let on = f.flag_or("use_sliding_window", false)?;
    // Always written; may be 0 or larger than the number of blocks.
    let first = f.opt_number("max_window_layers")?.unwrap_or(28.0);
    let null = f.has("sliding_window") && f.value("sliding_window").is_none();
    let sliding = sliding_layers(f, count, |layer| on && !null && layer as f64 >= first)?;
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
    Ok(vec![Layer { window: None, rope: Some(0) }; count])
}
