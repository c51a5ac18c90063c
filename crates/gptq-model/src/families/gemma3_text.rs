//! Gemma 3 (text): Gemma 2 without soft caps, with a norm on each head of queries and keys, five windowed blocks for each
//! full one, and a rope of its own for each of the two kinds.

use super::read::{
    RopeDefaults, Sizes, USUAL, inverse_root, parameters, rope_from, sliding_layers, windowed,
};
use super::{gemma, gemma2, llama};
use crate::Result;
use crate::fields::Fields;
use crate::rope::Rope;
use crate::spec::{Attention, Head, QkNorm, Spec};

/// Indices into [`crate::spec::Positions::Rotary`].
const FULL: usize = 0;
const SLIDING: usize = 1;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let llama = llama::with_ropes(f, &sizes, ropes(f, &sizes)?.to_vec())?;
    let gemma = gemma::from_llama(f, llama, "gemma3_text", "hidden_activation")?;
    let layers = gemma.layer_count();
    let pattern =
        ["sliding_window_pattern", "_sliding_window_pattern"].into_iter().find(|key| f.has(key));
    let pattern = f.count_or(pattern.unwrap_or("sliding_window_pattern"), 6)?;
    f.ignore(&["_sliding_window_pattern"]);
    let sliding = sliding_layers(f, layers, |layer| (layer + 1) % pattern != 0)?;
    let mut layers = windowed(f, &sliding)?;
    for (layer, sliding) in layers.iter_mut().zip(sliding) {
        layer.rope = Some(if sliding { SLIDING } else { FULL });
    }
    let qk_norm =
        QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", norm: gemma.norm, per_head: true };
    Ok(Spec {
        attention: Attention {
            scale: inverse_root(f.positive_or("query_pre_attn_scalar", 256.0)?),
            soft_cap: f.switchable("attn_logit_softcapping", None)?,
            qk_norm: Some(qk_norm),
            ..gemma.attention.clone()
        },
        residual: gemma2::residual(),
        head: Head {
            soft_cap: f.switchable("final_logit_softcapping", None)?,
            ..gemma.head.clone()
        },
        layers,
        ..gemma
    })
}

/// [`FULL`] and [`SLIDING`]: from `rope_parameters` by kind of block, or `rope_theta` with `rope_scaling` for the full
/// blocks and `rope_local_base_freq` for the others.
fn ropes(f: &Fields<'_>, sizes: &Sizes) -> Result<[Rope; 2]> {
    let full = RopeDefaults { theta: ("rope_theta", 1e6), ..RopeDefaults::default() };
    let sliding = RopeDefaults { theta: ("rope_local_base_freq", 1e4), ..RopeDefaults::default() };
    let parameters = parameters(f)?;
    let of_kind = |kind| parameters.as_ref().map_or(Ok(None), |p| p.opt_object(kind));
    let nested =
        parameters.as_ref().is_some_and(|p| p.has("full_attention") || p.has("sliding_attention"));
    if nested {
        let (for_full, for_sliding) = (of_kind("full_attention")?, of_kind("sliding_attention")?);
        return Ok([
            rope_from(f, for_full.as_ref(), sizes, full)?,
            rope_from(f, for_sliding.as_ref(), sizes, sliding)?,
        ]);
    }
    Ok([rope_from(f, parameters.as_ref(), sizes, full)?, rope_from(f, None, sizes, sliding)?])
}
