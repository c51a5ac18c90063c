//! Mistral 7B and its relatives: Llama without biases, with a sliding window in every block where one is set.

use super::llama;
use super::read::never;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Layer, Spec};

/// transformers' `MistralConfig`.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "attention_bias")?;
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    // What a config leaves out is on; `null` switches it off.
    let window = f.opt_count("sliding_window")?;
    let window = if f.has("sliding_window") { window } else { Some(DEFAULT_WINDOW) };
    let layers = vec![Layer { window, rope: Some(0), ..Layer::default() }; llama.layer_count()];
    Ok(Spec { family: "mistral", layers, ..llama })
}
