//! OLMo 1: Llama with layer norms that have no parameters, and queries, keys and values clipped.

use super::llama;
use super::read::never;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, NormSpec, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    Ok(Spec {
        family: "olmo",
        norm: NormSpec { weight: false, bias: false, ..NormSpec::layer(1e-5) },
        attention: Attention {
            clip_qkv: f.switchable("clip_qkv", None)?,
            ..llama.attention.clone()
        },
        ..llama
    })
}
