//! Gemma 3 (text): Gemma 2 without soft caps, with a norm on each head of queries and keys, five windowed blocks for each
//! full one, and a rope of its own for each of the two kinds.

use super::read::{
    RopeDefaults, Sizes, USUAL, activation, inverse_root, ropes_by_kind, sliding_layers, windowed,
    with_sliding_rope,
};
use super::{gemma, gemma2, llama};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Head, NormOver, QkNorm, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &USUAL)?;
    let full = RopeDefaults { theta: ("rope_theta", 1e6), ..RopeDefaults::default() };
    let sliding = RopeDefaults { theta: ("rope_local_base_freq", 1e4), ..RopeDefaults::default() };
    let llama = llama::with_ropes(f, &sizes, ropes_by_kind(f, &sizes, full, sliding)?)?;
    let activation = activation(f, "hidden_activation", gemma::TANH)?;
    let gemma = gemma::from_llama(f, llama, "gemma3_text", activation)?;
    let layers = gemma.layer_count();
    let pattern =
        ["sliding_window_pattern", "_sliding_window_pattern"].into_iter().find(|key| f.has(key));
    let pattern = f.count_or(pattern.unwrap_or("sliding_window_pattern"), 6)?;
    // Left over from Gemma 2; no definition of Gemma 3 computes it.
    f.ignore(&["_sliding_window_pattern", "attn_logit_softcapping"]);
    let sliding = sliding_layers(f, layers, |layer| (layer + 1) % pattern != 0)?;
    let mut layers = windowed(f, &sliding)?;
    with_sliding_rope(&mut layers, &sliding);
    let qk_norm = QkNorm {
        q: "self_attn.q_norm",
        k: "self_attn.k_norm",
        norm: gemma.norm,
        over: NormOver::Head,
    };
    Ok(Spec {
        attention: Attention {
            scale: inverse_root(f.positive_or("query_pre_attn_scalar", 256.0)?),
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
