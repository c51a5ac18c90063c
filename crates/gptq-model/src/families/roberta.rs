//! RoBERTa and XLM-RoBERTa: BERT whose positions start behind the padding token's row and do not count padding.

use gptq_compute::Activation;

use super::bert;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Head, Positions, Spec, Transform};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let bert = bert::spec(f)?;
    let padding = f.number_or("pad_token_id", 1.0)?;
    let offset = padding as usize + 1;
    let known = padding.fract() == 0.0 && (0.0..bert.vocab as f64).contains(&padding);
    if !known || offset >= bert.max_positions {
        return Err(f.bad("pad_token_id", "a token of the vocabulary and a row of the positions"));
    }
    let transform = Transform {
        dense: "lm_head.dense",
        bias: true,
        // Fixed in the definition, unlike the blocks'.
        activation: Activation::Gelu,
        norm: "lm_head.layer_norm",
    };
    Ok(Spec {
        family: "roberta",
        base: "roberta.".to_owned(),
        max_positions: bert.max_positions - offset,
        positions: Positions::Learned {
            name: "embeddings.position_embeddings",
            offset,
            padding: Some(padding as u32),
            masked: true,
        },
        head: Head::masked(transform, "lm_head.decoder", bert.head.tied, bert.head.pooler),
        ..bert
    })
}
