//! Granite 3: Llama with four multipliers, on the embedding, the scores, the sublayers' outputs and the logits.

use super::llama;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Embedding, Head, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let llama = llama::spec(f)?;
    let multiplier = |key| Ok::<_, crate::ModelError>(f.number_or(key, 1.0)? as f32);
    Ok(Spec {
        family: "granite",
        embedding: Embedding {
            scale: multiplier("embedding_multiplier")?,
            ..llama.embedding.clone()
        },
        attention: Attention {
            scale: multiplier("attention_multiplier")?,
            ..llama.attention.clone()
        },
        residual: Residual { multiplier: multiplier("residual_multiplier")?, ..llama.residual },
        head: Head {
            scale: (1.0 / f.positive_or("logits_scaling", 1.0)?) as f32,
            ..llama.head.clone()
        },
        ..llama
    })
}
