//! Mixtral: Mistral with a mixture of experts in every block.

use super::read::{RopeDefaults, Sizes, USUAL, never, rope, windowed};
use super::{experts, llama};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Layer, NormSpec, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "attention_bias")?;
    never(f, "mlp_bias")?;
    let sizes = Sizes::read(f, &USUAL)?;
    let defaults = RopeDefaults { theta: ("rope_theta", 1e6), ..RopeDefaults::default() };
    let llama = llama::with_ropes(f, &sizes, vec![rope(f, &sizes, defaults)?])?;
    let expert = experts::expert(f, ["w1", "w3", "w2"], llama.mlp.width())?;
    let names = ["block_sparse_moe.gate", "block_sparse_moe.experts"];
    let sliding = vec![f.value("sliding_window").is_some(); sizes.layers];
    let layers = windowed(f, &sliding)?.into_iter().map(|layer| Layer { moe: true, ..layer });
    Ok(Spec {
        family: "mixtral",
        norm: NormSpec::rms(f.eps_or("rms_norm_eps", 1e-5)?),
        moe: Some(experts::moe(f, names, expert, true)?),
        layers: layers.collect(),
        ..llama
    })
}
