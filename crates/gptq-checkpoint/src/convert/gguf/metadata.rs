//! The metadata that llama.cpp asks for, under its names (`gguf-py/gguf/constants.py`).

use std::path::Path;

use gptq_compute::Activation;
use gptq_format::Checkpoint;
use gptq_format::gguf::GgufValue;
use gptq_model::Spec;
use gptq_model::rope::{Rope, RopeScaling};
use gptq_model::spec::{Mlp, Positions};
use serde_json::Value;

use crate::error::{CheckpointError, Result};

/// An architecture of llama.cpp that models are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// The architecture of a model.
    pub(super) fn of(checkpoint: &Checkpoint, spec: &Spec) -> Result<Self> {
        let unsupported = |reason: String| CheckpointError::Unsupported {
            path: checkpoint.path.clone(),
            target: "gguf",
            reason,
        };
        let architecture = match spec.family {
            "llama" | "mistral" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            other => {
                return Err(unsupported(format!(
                    "family {other} is not among those that are written: llama, mistral, qwen2, qwen3"
                )));
            }
        };
        if architecture == Self::Qwen3 && spec.attention.qkv_bias {
            return Err(unsupported("llama.cpp's qwen3 has no biases on q, k and v".into()));
        }
        if !matches!(spec.mlp, Mlp::Gated { activation: Activation::Silu, .. }) {
            return Err(unsupported(
                "llama.cpp's blocks of this architecture have SiLU as activation".into(),
            ));
        }
        let rope =
            rope(spec).ok_or_else(|| unsupported("its blocks differ in their rope".into()))?;
        if rope.rotary_dim != spec.attention.head_dim {
            return Err(unsupported("only a part of each head is rotated".into()));
        }
        match &rope.scaling {
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Yarn { truncate: true, .. } => {}
            other => {
                return Err(unsupported(format!(
                    "llama.cpp has no counterpart to its rope ({other:?})"
                )));
            }
        }
        Ok(architecture)
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether llama.cpp rotates adjacent pairs, so that the rows of q and k are interleaved.
    pub(super) fn interleaves(self) -> bool {
        self == Self::Llama
    }
}

/// The rope of all blocks.
fn rope(spec: &Spec) -> Option<&Rope> {
    match &spec.positions {
        Positions::Rotary(ropes) => match ropes.as_slice() {
            [only] if spec.layers.iter().all(|layer| layer.rope == Some(0)) => Some(only),
            _ => None,
        },
        _ => None,
    }
}

/// These architectures see all keys.
pub(super) fn check_windows(spec: &Spec, lossy: bool, notes: &mut Vec<String>) -> Result<()> {
    let windows = spec.layers.iter().filter_map(|layer| layer.window);
    let Some(window) = windows.filter(|&window| window < spec.max_positions).min() else {
        return Ok(());
    };
    let reason = format!(
        "llama.cpp attends to all tokens, the model only to the last {window}, so that longer texts give other results"
    );
    note_loss(lossy, notes, "sliding window", reason, "leave the window out")
}

/// What llama.cpp does otherwise is refused, or noted where that is allowed.
fn note_loss(
    lossy: bool,
    notes: &mut Vec<String>,
    subject: &str,
    reason: String,
    instead: &str,
) -> Result<()> {
    if !lossy {
        let (subject, lossy) = (subject.to_owned(), instead.to_owned());
        return Err(CheckpointError::Lossy { subject, reason, lossy });
    }
    notes.push(reason);
    Ok(())
}

/// Divisors of the rotary frequencies, one per pair of a head, as llama.cpp's converter computes them for Llama 3.1; `None`
/// for other ropes, which have metadata.
pub(super) fn rope_factors(spec: &Spec) -> Option<Vec<f32>> {
    let rope = rope(spec)?;
    let RopeScaling::Llama3 { factor, low, high, original } = rope.scaling else { return None };
    let pairs = rope.rotary_dim / 2;
    let divisor = |pair: usize| {
        let power = rope.theta.powf((2 * pair) as f64 / rope.rotary_dim as f64);
        let turns = original as f64 / (std::f64::consts::TAU * power);
        if turns > high {
            1.0
        } else if turns < low {
            factor
        } else {
            let smooth = (turns - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..pairs).map(|pair| divisor(pair) as f32).collect())
}

/// All metadata in the order in which they are written.
pub(super) fn all(
    checkpoint: &Checkpoint,
    spec: &Spec,
    architecture: Architecture,
    file_type: u32,
    output: &Path,
    lossy: bool,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, GgufValue)>> {
    let mut out: Vec<(String, GgufValue)> = Vec::new();
    let mut set = |key: &str, value: GgufValue| out.push((key.to_owned(), value));
    let text = |text: &str| GgufValue::String(text.to_owned());
    set("general.architecture", text(architecture.as_str()));
    set("general.type", text("model"));
    set("general.name", text(&name(checkpoint, output)));
    set("general.file_type", GgufValue::Uint(file_type.into()));
    set("general.quantization_version", GgufValue::Uint(2));

    let mut own = |key: &str, value: GgufValue| {
        out.push((format!("{}.{key}", architecture.as_str()), value));
    };
    let count = |n: usize| GgufValue::Uint(n as u64);
    let float = |x: f64| GgufValue::F32(x as f32);
    let attention = &spec.attention;
    own("block_count", count(spec.layer_count()));
    own("context_length", count(spec.max_positions));
    own("embedding_length", count(spec.hidden));
    own("feed_forward_length", count(spec.mlp.width()));
    own("attention.head_count", count(attention.heads));
    own("attention.head_count_kv", count(attention.kv_heads));
    own("attention.key_length", count(attention.head_dim));
    own("attention.value_length", count(attention.head_dim));
    own("attention.layer_norm_rms_epsilon", GgufValue::F32(spec.norm.eps));
    own("vocab_size", count(spec.vocab));
    // Checked when the architecture was found.
    if let Some(rope) = rope(spec) {
        own("rope.dimension_count", count(rope.rotary_dim));
        own("rope.freq_base", float(rope.theta));
        match rope.scaling {
            RopeScaling::Linear { factor } => {
                own("rope.scaling.type", text("linear"));
                own("rope.scaling.factor", float(factor));
            }
            RopeScaling::Yarn {
                factor, original, beta_fast, beta_slow, attention_factor, ..
            } => {
                own("rope.scaling.type", text("yarn"));
                own("rope.scaling.factor", float(factor));
                own("rope.scaling.original_context_length", count(original));
                own("rope.scaling.yarn_beta_fast", float(beta_fast));
                own("rope.scaling.yarn_beta_slow", float(beta_slow));
                // llama.cpp multiplies YaRN's own factor by this one.
                let rest = attention_factor / (0.1 * factor.ln() + 1.0);
                if (rest - 1.0).abs() > 1e-9 {
                    own("rope.scaling.attn_factor", float(rest));
                }
            }
            RopeScaling::Llama3 { original, .. } => {
                own("rope.scaling.original_context_length", count(original));
            }
            _ => {}
        }
    }
    let tokenizer = checkpoint.tokenizer()?;
    let described = tokenizer.gguf_metadata(spec.vocab, &ends(checkpoint))?;
    if let Some(reason) = described.differs {
        note_loss(lossy, notes, "tokenizer", reason.to_owned(), "leave that so")?;
    }
    out.extend(described.metadata);
    Ok(out)
}

/// A name for people: the model's, else the output's.
fn name(checkpoint: &Checkpoint, output: &Path) -> String {
    let given = checkpoint.config.opt_str("_name_or_path").ok().flatten();
    let own = given.and_then(|name| name.rsplit('/').next()).filter(|name| !name.is_empty());
    let stem = || output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    own.map_or_else(stem, str::to_owned)
}

/// Ids of the tokens that end a text: generation_config.json's, else config.json's.
fn ends(checkpoint: &Checkpoint) -> Vec<u32> {
    let key = "eos_token_id";
    let value = checkpoint
        .generation_config
        .as_ref()
        .and_then(|config| config.get(key))
        .or_else(|| checkpoint.config.value(key));
    let ids = match value {
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
        None => Vec::new(),
    };
    ids.into_iter().filter_map(|id| id.as_u64()?.try_into().ok()).collect()
}
