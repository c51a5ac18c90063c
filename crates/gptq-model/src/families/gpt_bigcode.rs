//! GPTBigCode (SantaCoder, StarCoder 1): GPT-2 with one key and value head for all queries and ordinary linears.

use super::gpt2;
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Attention, Qkv, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let gpt2 = gpt2::like(f, "gpt_bigcode", "gelu_pytorch_tanh")?;
    // Without multi-query the projection is ordered head by head.
    let (kv_heads, order) = if f.flag_or("multi_query", true)? {
        (1, FusedOrder::Concat)
    } else {
        (gpt2.attention.heads, FusedOrder::Grouped)
    };
    let qkv = Qkv::Fused { name: "attn.c_attn", order };
    Ok(Spec { attention: Attention { kv_heads, qkv, ..gpt2.attention.clone() }, ..gpt2 })
}
