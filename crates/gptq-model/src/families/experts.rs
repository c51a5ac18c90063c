//! What the mixtures of experts share in reading a config.

use super::read::activation;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{GateUp, Layer, Mlp, Moe};

/// More experts than any model has.
const MAX_EXPERTS: usize = 4096;

/// A gated expert of `width` with these names of its three linears.
pub(super) fn expert(f: &Fields<'_>, names: [&'static str; 3], width: usize) -> Result<Mlp> {
    let [gate, up, down] = names;
    Ok(Mlp::Gated {
        gate_up: GateUp::Separate { gate, up },
        down,
        width,
        activation: activation(f, "hidden_act", "silu")?,
        bias: false,
    })
}

/// A mixture without shared expert below `parent`: its router is `gate`, its experts are listed in `experts`.
pub(super) fn moe(
    f: &Fields<'_>,
    [router, experts]: [&'static str; 2],
    expert: Mlp,
    renormalize: bool,
) -> Result<Moe> {
    // The one in old configs, the other in those of transformers 5.
    let keys = ["num_experts", "num_local_experts"];
    let key = keys.into_iter().find(|key| f.value(key).is_some()).unwrap_or(keys[0]);
    let count = f.count(key)?;
    f.ignore(&keys);
    if count > MAX_EXPERTS {
        return Err(f.bad(key, format!("at most {MAX_EXPERTS}")));
    }
    let top_k = f.count("num_experts_per_tok")?;
    if top_k > count {
        return Err(f.bad("num_experts_per_tok", format!("at most {key} ({count})")));
    }
    Ok(Moe { router, experts, count, top_k, renormalize, expert, shared: None })
}

/// Qwen's mixture: `moe_intermediate_size` wide experts under `mlp`.
pub(super) fn qwen(f: &Fields<'_>) -> Result<Moe> {
    let expert = expert(f, QWEN, f.count("moe_intermediate_size")?)?;
    moe(f, ["mlp.gate", "mlp.experts"], expert, f.flag_or("norm_topk_prob", false)?)
}

/// Names of the linears of Qwen's experts.
pub(super) const QWEN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Marks the blocks with experts: every `decoder_sparse_step`-th, but none of `mlp_only_layers`.
pub(super) fn sparse(f: &Fields<'_>, layers: Vec<Layer>) -> Result<Vec<Layer>> {
    let step = f.count_or("decoder_sparse_step", 1)?;
    let dense = match f.value("mlp_only_layers") {
        Some(_) => f.numbers("mlp_only_layers")?,
        None => Vec::new(),
    };
    let mark = |(index, layer): (usize, Layer)| Layer {
        moe: (index + 1).is_multiple_of(step) && !dense.contains(&(index as f64)),
        ..layer
    };
    Ok(layers.into_iter().enumerate().map(mark).collect())
}
