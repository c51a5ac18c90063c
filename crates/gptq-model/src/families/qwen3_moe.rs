//! Qwen 3 MoE: Qwen 3 with a mixture of experts.

use super::read::windowed;
use super::{experts, qwen3};
use crate::Result;
use crate::fields::Fields;
use crate::spec::Spec;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // All blocks have the window where it is switched on, whatever `layer_types` says.
    let spec = qwen3::with_windows(f, |_, _| true)?;
    let on = f.flag_or("use_sliding_window", false)? && f.value("sliding_window").is_some();
    let layers =
        if on { windowed(f, &vec![true; spec.layers.len()])? } else { spec.layers.clone() };
    let layers = experts::sparse(f, layers)?;
    Ok(Spec { family: "qwen3_moe", moe: Some(experts::qwen(f)?), layers, ..spec })
}
