//! OLMo 2: Llama with norms on the outputs of the sublayers only, and on queries and keys over their full width.

use super::llama;
use super::read::never;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, NormOver, NormSpec, QkNorm, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    let norm = NormSpec::rms(f.eps_or("rms_norm_eps", 1e-5)?);
    let qk_norm =
        QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", norm, over: NormOver::Row };
    Ok(Spec {
        family: "olmo2",
        norm,
        attention: Attention { qk_norm: Some(qk_norm), ..llama.attention.clone() },
        residual: Residual::output_norm("post_attention_layernorm", "post_feedforward_layernorm"),
        ..llama
    })
}
