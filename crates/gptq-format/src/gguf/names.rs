//! GGUF tensors under their Hugging Face names, shapes and row order.

use super::{GgmlType, GgufError, GgufFile};

/// Architectures whose tensors, names and config are known, with the Hugging Face `model_type` and class of each.
const ARCHITECTURES: [(&str, Architecture); 3] = [
    ("llama", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
];

/// A GGUF architecture that is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, Mistral, SmolLM and others with the same tensors.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
}

/// How the rows of a tensor lie in the file.
///
/// llama.cpp rotates adjacent pairs where Hugging Face rotates the two halves of a head, so its converter interleaves the
/// halves of q and k of the `llama` architecture. In each head of `2 h` rows, row `j h + i` of the Hugging Face order
/// (half j, index i) lies in the file as row `2 i + j`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowMap {
    /// Number of heads; the rows divide evenly.
    pub heads: usize,
    /// Rows of one head, even.
    pub head_rows: usize,
}

impl RowMap {
    /// The row of the file that holds row `row` of the Hugging Face tensor.
    pub fn source(self, row: usize) -> usize {
        let (head, within) = (row / self.head_rows, row % self.head_rows);
        let half = self.head_rows / 2;
        head * self.head_rows + 2 * (within % half) + within / half
    }
}

/// One tensor as the Hugging Face checkpoint would have it, and where it lies in the GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfTensor {
    /// Hugging Face name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Storage type.
    pub dtype: GgmlType,
    /// Absolute position in the file, in bytes.
    pub offset: u64,
    /// Length in bytes; 0 where the type is [`GgmlType::Other`].
    pub len: u64,
    /// Shape, row-major: `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// Where the rows are not in Hugging Face order.
    pub row_map: Option<RowMap>,
}

impl GgufFile {
    /// The architecture of the model.
    ///
    /// # Errors
    /// [`GgufError::Architecture`] if it is not one of the supported.
    pub fn architecture(&self) -> Result<Architecture, GgufError> {
        let key = "general.architecture";
        let name = self.required(key, self.str(key)?)?;
        match ARCHITECTURES.iter().find(|(n, _)| *n == name) {
            Some((_, architecture)) => Ok(*architecture),
            None => Err(GgufError::Architecture {
                path: self.path().into(),
                architecture: name.into(),
                supported: ARCHITECTURES.map(|(n, _)| n).join(", "),
            }),
        }
    }

    /// All tensors of the model as the Hugging Face checkpoint would have them, in file order. `lm_head.weight` is absent
    /// where the head is tied to the embedding.
    ///
    /// # Errors
    /// [`GgufError::Architecture`] if the architecture is unknown, [`GgufError::Unsupported`] for a tensor that has no
    /// place in it, [`GgufError::Tensor`] if q or k do not divide into heads.
    pub fn hf_tensors(&self) -> Result<Vec<HfTensor>, GgufError> {
        let architecture = self.architecture()?;
        let mut out = Vec::with_capacity(self.header().tensors.len());
        for t in &self.header().tensors {
            // Its content is in the config, as rope_scaling.
            if t.name == "rope_freqs.weight" {
                continue;
            }
            let name = hf_name(&t.name).ok_or_else(|| GgufError::Unsupported {
                path: self.path().into(),
                feature: format!("the tensor `{}`", t.name),
            })?;
            // The header's check bounds every product and range by the file's length.
            let shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
            let heads = match architecture {
                Architecture::Llama if name.contains(".q_proj.") => Some(self.heads()?),
                Architecture::Llama if name.contains(".k_proj.") => Some(self.kv_heads()?),
                _ => None,
            };
            if let Some(heads) = heads
                && !shape[0].is_multiple_of(2 * heads)
            {
                return Err(GgufError::Tensor {
                    path: self.path().into(),
                    tensor: t.name.clone(),
                    reason: format!(
                        "has {} rows, which do not divide into {heads} heads of even size",
                        shape[0]
                    ),
                });
            }
            let row_map = heads.map(|heads| RowMap { heads, head_rows: shape[0] / heads });
            out.push(HfTensor {
                name,
                dtype: t.dtype,
                offset: t.offset,
                len: t.len,
                shape,
                row_map,
            });
        }
        Ok(out)
    }
}

/// The Hugging Face name of a tensor of a llama-like decoder, or `None`.
fn hf_name(name: &str) -> Option<String> {
    let (base, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let outside = match base {
        "token_embd" => Some("model.embed_tokens"),
        "output_norm" => Some("model.norm"),
        "output" => Some("lm_head"),
        _ => None,
    };
    if let Some(module) = outside {
        return Some(format!("{module}.{kind}"));
    }
    let (layer, module) = base.strip_prefix("blk.")?.split_once('.')?;
    // Parsing and printing again refuses "+1" and "01".
    if layer.parse::<u32>().ok()?.to_string() != layer {
        return None;
    }
    let module = match module {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}
