//! Qwen 3 (dense): Llama with an RMS norm on each head of queries and keys, and Qwen 2's window rules.

use super::read::never;
use super::{llama, qwen2};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, NormOver, QkNorm, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    with_windows(f, qwen2::upper)
}

/// Qwen 3 with a window in other blocks than the upper ones: as [`qwen2::layers`].
pub(super) fn with_windows(f: &Fields<'_>, on: impl Fn(usize, f64) -> bool) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let qk_norm = QkNorm {
        q: "self_attn.q_norm",
        k: "self_attn.k_norm",
        norm: llama.norm,
        over: NormOver::Head,
    };
    let attention = Attention { qk_norm: Some(qk_norm), ..llama.attention.clone() };
    let layers = qwen2::layers(f, llama.layer_count(), on)?;
    Ok(Spec { family: "qwen3", attention, layers, ..llama })
}
