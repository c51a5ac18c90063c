//! Mistral 7B and its relatives: Llama without biases, with a sliding window in every block where one is set.

use super::llama;
use super::read::{never, windowed};
use crate::Result;
use crate::fields::Fields;
use crate::spec::Spec;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "attention_bias")?;
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let sliding = vec![f.value("sliding_window").is_some(); llama.layer_count()];
    Ok(Spec { family: "mistral", layers: windowed(f, &sliding)?, ..llama })
}
