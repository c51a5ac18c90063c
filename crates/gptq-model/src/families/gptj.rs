//! GPT-J: attention and MLP side by side behind one norm, neighbouring columns rotate as pairs, a head with bias.

use gptq_compute::RopeStyle;
use serde_json::Value;

use super::read::{GPT2, Sizes, activation};
use crate::Result;
use crate::fields::Fields;
use crate::rope::{Rope, RopeScaling};
use crate::spec::{Attention, Embedding, Head, Mlp, NormSpec, Positions, Qkv, Residual, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let sizes = Sizes::read(f, &GPT2)?;
    f.only("rotary", &Value::Bool(true))?;
    f.only("scale_attn_weights", &Value::Bool(true))?;
    let rotary_dim = f.count_or("rotary_dim", 64)?;
    if rotary_dim > sizes.head_dim || !rotary_dim.is_multiple_of(2) {
        return Err(f.bad(
            "rotary_dim",
            format!("an even number of columns within a head ({})", sizes.head_dim),
        ));
    }
    let rope = Rope {
        theta: 10000.0,
        rotary_dim,
        style: RopeStyle::Interleaved,
        scaling: RopeScaling::None,
    };
    Ok(Spec {
        family: "gptj",
        hidden: sizes.hidden,
        vocab: sizes.vocab,
        max_positions: sizes.max_positions,
        base: "transformer.".to_owned(),
        blocks: "h",
        conv1d: false,
        embedding: Embedding::plain("wte", sizes.hidden),
        positions: Positions::Rotary(vec![rope]),
        norm: NormSpec::layer(f.eps_or("layer_norm_epsilon", 1e-5)?),
        attention: Attention {
            qkv: Qkv::Separate { q: "attn.q_proj", k: "attn.k_proj", v: "attn.v_proj" },
            out: "attn.out_proj",
            ..sizes.attention()
        },
        mlp: Mlp::Plain {
            up: "mlp.fc_in",
            down: "mlp.fc_out",
            width: f.count_or("n_inner", 4 * sizes.hidden)?,
            activation: activation(f, "activation_function", "gelu_new")?,
            bias: true,
        },
        moe: None,
        residual: Residual::parallel("ln_1", None),
        head: Head {
            bias: true,
            ..Head::plain("ln_f", "lm_head", f.flag_or("tie_word_embeddings", false)?)
        },
        layers: sizes.alike(),
    })
}
