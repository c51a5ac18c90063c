//! Baichuan 1 and 2: Llama with queries, keys and values in one linear; rotary positions in the 7B models, ALiBi in the 13B
//! ones. Baichuan 2 scales the rows of its head to length 1.

use super::llama;
use super::read::{alibi_slopes, never};
use crate::Result;
use crate::fields::Fields;
use crate::fused::FusedOrder;
use crate::spec::{Attention, Head, Layer, Positions, Qkv, Spec};

/// Sizes of the vocabularies, by which the two versions' definitions can be told apart.
const VOCAB: [usize; 2] = [64_000, 125_696];

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    never(f, "attention_bias")?;
    never(f, "mlp_bias")?;
    let llama = llama::spec(f)?;
    if !VOCAB.contains(&llama.vocab) {
        return Err(f.bad("vocab_size", "64000 (Baichuan) or 125696 (Baichuan 2)"));
    }
    // The 7B models' config has the one key, the 13B models' only the other.
    let alibi = !f.has("max_position_embeddings");
    let limit = f.opt_count("model_max_length")?;
    let mut spec = Spec {
        family: "baichuan",
        attention: Attention {
            qkv: Qkv::Fused { name: "self_attn.W_pack", order: FusedOrder::Concat },
            ..llama.attention.clone()
        },
        head: Head { unit_rows: llama.vocab == VOCAB[1], ..llama.head.clone() },
        ..llama
    };
    if alibi {
        spec.max_positions = limit.ok_or_else(|| f.missing("model_max_length"))?;
        spec.positions = Positions::Alibi { slopes: alibi_slopes(spec.attention.heads) };
        spec.layers = vec![Layer::default(); spec.layers.len()];
    }
    Ok(spec)
}
