//! Qwen 3 (dense): Llama with an RMS norm on each head of queries and keys, and Qwen 2's window rules.

use super::read::never;
use super::{llama, qwen2};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, QkNorm, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let qk_norm =
        QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", norm: llama.norm, per_head: true };
    let attention = Attention { qk_norm: Some(qk_norm), ..llama.attention.clone() };
    let layers = qwen2::layers(f, llama.layer_count())?;
    Ok(Spec { family: "qwen3", attention, layers, ..llama })
}
