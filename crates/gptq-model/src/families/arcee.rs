//! Arcee (AFM): Llama with a plain MLP and squared ReLU.

use super::llama;
use super::read::activation;
use crate::Result;
use crate::fields::Fields;
use crate::spec::{Mlp, NormSpec, Spec};

pub(super) fn spec(f: &Fields<'_>) -> Result<Spec> {
    let llama = llama::spec(f)?;
    Ok(Spec {
        family: "arcee",
        norm: NormSpec::rms(f.eps_or("rms_norm_eps", 1e-5)?),
        mlp: Mlp::Plain {
            up: "mlp.up_proj",
            down: "mlp.down_proj",
            width: llama.mlp.width(),
            activation: activation(f, "hidden_act", "relu2")?,
            bias: llama.mlp.bias(),
        },
        ..llama
    })
}
