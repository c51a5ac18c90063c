//! Gemma 2: Gemma with four norms per block, soft caps on scores and logits, its own score scale, and a window in every
//! other block.

use super::read::{activation, inverse_root, sliding_layers, windowed};
use super::{gemma, llama};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Head, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let activation = activation(f, "hidden_activation", gemma::TANH)?;
    let gemma = gemma::from_llama(f, llama::spec(f)?, "gemma2", activation)?;
    let sliding = sliding_layers(f, gemma.layer_count(), |layer| layer % 2 == 0)?;
    Ok(Spec {
        attention: Attention {
            scale: inverse_root(f.positive_or("query_pre_attn_scalar", 256.0)?),
            soft_cap: f.switchable("attn_logit_softcapping", Some(50.0))?,
            ..gemma.attention.clone()
        },
        residual: residual(),
        head: Head {
            soft_cap: f.switchable("final_logit_softcapping", Some(30.0))?,
            ..gemma.head.clone()
        },
        layers: windowed(f, &sliding)?,
        ..gemma
    })
}

/// Norms before and after both sublayers.
pub(super) fn residual() -> Residual {
    Residual::sandwich(
        ["input_layernorm", "post_attention_layernorm"],
        ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
    )
}
