//! CodeGen: GPT-J with one fused projection, ordered as on the four devices on which it was trained.

use super::gptj;
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Attention, Qkv, Spec};

/// transformers fixes this number for every size.
const DEVICES: usize = 4;

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let gptj = gptj::spec(f)?;
    if !gptj.attention.heads.is_multiple_of(DEVICES) {
        return Err(f.bad("n_head", "a multiple of 4"));
    }
    let qkv = Qkv::Fused { name: "attn.qkv_proj", order: FusedOrder::Devices { parts: DEVICES } };
    Ok(Spec { family: "codegen", attention: Attention { qkv, ..gptj.attention.clone() }, ..gptj })
}
