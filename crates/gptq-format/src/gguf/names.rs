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

    /// The row of the Hugging Face tensor that row `row` of the file holds; the inverse of [`RowMap::source`].
    pub fn logical(self, row: usize) -> usize {
        let (head, within) = (row / self.head_rows, row % self.head_rows);
        let half = self.head_rows / 2;
        head * self.head_rows + half * (within % 2) + within / 2
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

/// Modules outside the blocks: name in GGUF, name in Hugging Face checkpoints.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Modules of a block: name in GGUF after `blk.N.`, name in Hugging Face checkpoints after `model.layers.N.`.
const IN_BLOCK: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a tensor of a llama-like decoder, or `None`.
fn hf_name(name: &str) -> Option<String> {
    let (base, kind) = tensor_kind(name)?;
    if let Some((_, module)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == base) {
        return Some(format!("{module}.{kind}"));
    }
    let (layer, module) = base.strip_prefix("blk.")?.split_once('.')?;
    let layer = layer_index(layer)?;
    let (_, module) = IN_BLOCK.iter().find(|(gguf, _)| *gguf == module)?;
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

/// The GGUF name of a tensor of a llama-like decoder (`model.layers.0.mlp.up_proj.weight`), or `None` if it has none.
pub fn gguf_name(name: &str) -> Option<String> {
    let (base, kind) = tensor_kind(name)?;
    if let Some((module, _)) = OUTSIDE.iter().find(|(_, hf)| *hf == base) {
        return Some(format!("{module}.{kind}"));
    }
    let (layer, module) = base.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = layer_index(layer)?;
    let (module, _) = IN_BLOCK.iter().find(|(_, hf)| *hf == module)?;
    Some(format!("blk.{layer}.{module}.{kind}"))
}

/// Module and kind of a tensor that is a weight or a bias.
fn tensor_kind(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))
}

/// The index of a block; parsing and printing again refuses "+1" and "01".
fn layer_index(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|n| n.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_both_ways() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ] {
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
            assert_eq!(gguf_name(hf).as_deref(), Some(gguf));
        }
        for name in
            ["model.layers.01.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scales", "x.weight"]
        {
            assert_eq!(gguf_name(name), None);
        }
    }

    #[test]
    fn row_maps_are_inverse() {
        let map = RowMap { heads: 3, head_rows: 8 };
        for row in 0..24 {
            assert_eq!(map.logical(map.source(row)), row);
        }
        assert_eq!([0, 1, 2, 3].map(|row| map.logical(row)), [0, 4, 1, 5]);
    }
}
