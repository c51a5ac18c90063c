//! Other names of the same linears: GPTQModel 7 takes fused MLPs and experts apart before it quantizes and saves them so,
//! under the names that transformers 5 has for the parts, where the family's own checkpoints have one linear or older names.

use gptq_format::TensorStore;

use crate::spec::{GateUp, Mlp, Moe, Spec};

const SEPARATE: GateUp = GateUp::Separate { gate: "mlp.gate_proj", up: "mlp.up_proj" };
/// A router, its experts and an expert's linears as transformers 5 names Mixtral's.
const ROUTER: &str = "mlp.gate";
const EXPERTS: &str = "mlp.experts";
const EXPERT: GateUp = GateUp::Separate { gate: "gate_proj", up: "up_proj" };
const EXPERT_DOWN: &str = "down_proj";

/// Changes `spec` to the names that the first block of a checkpoint has.
pub(crate) fn adapt(spec: &mut Spec, tensors: &TensorStore) {
    let block = spec.block_name(0);
    let has = |module: &str| {
        ["weight", "qweight"].iter().any(|end| tensors.contains(&format!("{block}.{module}.{end}")))
    };
    if let Mlp::Gated { gate_up: gate_up @ GateUp::Fused(_), .. } = &mut spec.mlp
        && let (GateUp::Fused(fused), GateUp::Separate { gate, up }) = (*gate_up, SEPARATE)
        && !has(fused)
        && has(gate)
        && has(up)
    {
        *gate_up = SEPARATE;
    }
    if let Some(Moe { router, experts, expert: Mlp::Gated { gate_up, down, .. }, .. }) =
        &mut spec.moe
        && !has(router)
        && has(ROUTER)
    {
        (*router, *experts, *gate_up, *down) = (ROUTER, EXPERTS, EXPERT, EXPERT_DOWN);
    }
}
