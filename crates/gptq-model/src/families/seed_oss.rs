//! Seed-OSS: Llama with biases on queries, keys and values, and heads of 128 columns.

use super::llama;
use super::read::{RopeDefaults, Sizes, USUAL, rope};
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Attention, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes { head_dim: f.count_or("head_dim", 128)?, ..Sizes::read(f, &USUAL)? };
    let llama = llama::with_ropes(f, &sizes, vec![rope(f, &sizes, RopeDefaults::default())?])?;
    let attention = Attention {
        qkv_bias: f.flag_or("attention_bias", true)?,
        out_bias: f.flag_or("attention_out_bias", false)?,
        ..llama.attention.clone()
    };
    Ok(Spec { family: "seed_oss", attention, ..llama })
}
