//! Gemma 1: Llama with a tied head, embeddings times sqrt(hidden), norms that multiply by 1 + weight, and tanh GELU.

use serde_json::Value;

use super::llama;
use super::read::never;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Embedding, Head, Mlp, NormSpec, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let key =
        if f.value("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    from_llama(f, llama::spec(f)?, "gemma", key)
}

/// What all Gemmas change in Llama; `key` names the activation.
pub(super) fn from_llama(
    f: &Fields<'_>,
    llama: Spec,
    family: &'static str,
    key: &str,
) -> Result<Spec> {
    never(f, "mlp_bias")?;
    f.only("use_bidirectional_attention", &Value::Bool(false))?;
    let mut mlp = llama.mlp;
    if let Mlp::Gated { activation, .. } = &mut mlp {
        *activation = super::read::activation(f, key, "gelu_pytorch_tanh")?;
    }
    Ok(Spec {
        family,
        embedding: Embedding {
            scale: (llama.hidden as f64).sqrt() as f32,
            ..llama.embedding.clone()
        },
        norm: NormSpec::rms_plus_one(llama.norm.eps),
        mlp,
        head: Head { tied: f.flag_or("tie_word_embeddings", true)?, ..llama.head.clone() },
        ..llama
    })
}
