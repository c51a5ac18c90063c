//! Qwen 3 MoE: Qwen 3 with a mixture of experts.

use super::{experts, qwen3};
use crate::Result;
use crate::fields::Fields;
use crate::spec::Spec;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // All blocks have the window where it is switched on.
    let spec = qwen3::with_windows(f, |_, _| true)?;
    let layers = experts::sparse(f, spec.layers.clone())?;
    Ok(Spec { family: "qwen3_moe", moe: Some(experts::qwen(f)?), layers, ..spec })
}
