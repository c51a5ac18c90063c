//! Qwen 1.5 and 2 MoE: Qwen 2 with a mixture of experts and one more expert that every token goes to, weighted by a
//! sigmoid of its own.

use super::{experts, qwen2};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Moe, SharedExpert, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    // Every other of the lower blocks has the window here.
    let spec = qwen2::with_windows(f, |layer, first| (layer as f64) < first && layer % 2 == 0)?;
    let shared = SharedExpert {
        name: "mlp.shared_expert",
        mlp: experts::expert(f, experts::QWEN, f.count("shared_expert_intermediate_size")?)?,
        gate: "mlp.shared_expert_gate",
    };
    Ok(Spec {
        family: "qwen2_moe",
        attention: Attention { qkv_bias: f.flag_or("qkv_bias", true)?, ..spec.attention.clone() },
        moe: Some(Moe { shared: Some(shared), ..experts::qwen(f)? }),
        layers: experts::sparse(f, spec.layers.clone())?,
        ..spec
    })
}
