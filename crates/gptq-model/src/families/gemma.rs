//! Gemma 1: Llama with a tied head, embeddings times sqrt(hidden), norms that multiply by 1 + weight, and tanh GELU.

use gptq_compute::Activation;
use serde_json::Value;

use super::llama;
use super::read::{activation, never};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Embedding, Head, Mlp, NormSpec, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // The first releases say "gelu" and mean the approximation; later ones repeat it in a second key, which the models
    // after this one read instead. transformers 5 does so too.
    f.ignore(&["hidden_activation"]);
    let activation = match activation(f, "hidden_act", TANH)? {
        Activation::Gelu => Activation::GeluTanh,
        other => other,
    };
    from_llama(f, llama::spec(f)?, "gemma", activation)
}

/// The default of all Gemmas.
pub(super) const TANH: &str = "gelu_pytorch_tanh";

/// What all Gemmas change in Llama.
pub(super) fn from_llama(
    f: &Fields<'_>,
    llama: Spec,
    family: &'static str,
    activation: Activation,
) -> Result<Spec> {
    never(f, "mlp_bias")?;
    f.only("use_bidirectional_attention", &Value::Bool(false))?;
    let mut mlp = llama.mlp;
    if let Mlp::Gated { activation: of_llama, .. } = &mut mlp {
        *of_llama = activation;
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
