//! Tiny random models in the Hugging Face layout, for tests that need a whole checkpoint but no
//! weights of worth.

use std::collections::HashMap;
use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::Rng;

/// Shape of a tiny Llama. The vocabulary is one token per byte (256), as [`byte_level_tokenizer`]
/// has it.
#[derive(Debug, Clone)]
pub struct TinyLlama {
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Attention heads; `hidden / heads` is the head's width.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Whether the output head shares the embedding.
    pub tied: bool,
}

impl Default for TinyLlama {
    fn default() -> Self {
        Self { hidden: 64, intermediate: 128, layers: 2, heads: 4, kv_heads: 2, tied: false }
    }
}

impl TinyLlama {
    /// Writes config.json, generation_config.json, model.safetensors (f32), tokenizer.json and
    /// tokenizer_config.json into `dir`, which is made where it is absent. The weights depend on
    /// `seed` only.
    pub fn write(&self, dir: &Path, seed: u64) {
        std::fs::create_dir_all(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        write_json(dir, "config.json", &self.config());
        write_json(
            dir,
            "generation_config.json",
            &json!({ "bos_token_id": BOS, "eos_token_id": EOS }),
        );
        write_json(dir, "tokenizer.json", &byte_level_tokenizer());
        let tokens = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT,
            "bos_token": "\"", "eos_token": "#", "pad_token": "!",
            "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        });
        write_json(dir, "tokenizer_config.json", &tokens);
        let tensors = self.tensors(seed);
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            (name.as_str(), view.unwrap_or_else(|error| panic!("{name}: {error}")))
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let path = dir.join("model.safetensors");
        let bytes = safetensors::serialize(views, Some(metadata))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        write(&path, &bytes);
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": self.hidden / self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": CONTEXT,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "vocab_size": VOCAB,
        })
    }

    /// Name, shape and little-endian f32 bytes of every tensor.
    fn tensors(&self, seed: u64) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let mut rng = Rng::new(seed);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], mean: f32, std: f32| {
            let count = shape.iter().product();
            let bytes =
                rng.normals(count, std).iter().flat_map(|x| (x + mean).to_le_bytes()).collect();
            tensors.push((name, shape.to_vec(), bytes));
        };
        let Self { hidden, intermediate, layers, heads, kv_heads, tied } = *self;
        let kv = hidden / heads * kv_heads;
        // The standard deviation that keeps activations near one, so that greedy choices have a
        // clear margin.
        let linear = |fan_in: usize| 1.6 / (fan_in as f32).sqrt();
        add("model.embed_tokens.weight".into(), &[VOCAB, hidden], 0.0, 0.5);
        for layer in 0..layers {
            let prefix = format!("model.layers.{layer}");
            add(format!("{prefix}.input_layernorm.weight"), &[hidden], 1.0, 0.1);
            add(format!("{prefix}.post_attention_layernorm.weight"), &[hidden], 1.0, 0.1);
            for (name, shape) in [
                ("self_attn.q_proj", [hidden, hidden]),
                ("self_attn.k_proj", [kv, hidden]),
                ("self_attn.v_proj", [kv, hidden]),
                ("self_attn.o_proj", [hidden, hidden]),
                ("mlp.gate_proj", [intermediate, hidden]),
                ("mlp.up_proj", [intermediate, hidden]),
                ("mlp.down_proj", [hidden, intermediate]),
            ] {
                add(format!("{prefix}.{name}.weight"), &shape, 0.0, linear(shape[1]));
            }
        }
        add("model.norm.weight".into(), &[hidden], 1.0, 0.1);
        if !tied {
            add("lm_head.weight".into(), &[VOCAB, hidden], 0.0, linear(hidden));
        }
        tensors
    }
}

/// Writes the default [`TinyLlama`] (2 blocks, hidden 64, about 0.4 MB) into `dir`.
pub fn tiny_llama(dir: &Path, seed: u64) {
    TinyLlama::default().write(dir, seed);
}

/// A tokenizer.json of 256 tokens, one a byte and without merges, in GPT-2's byte-level alphabet:
/// printable Latin-1 stands for itself and takes the first ids (`!` is 0, `"` 1, `#` 2), the other
/// bytes follow as U+0100 and up.
pub fn byte_level_tokenizer() -> Value {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let direct = (0..256).filter(printable);
    let moved =
        (0..(0..256).filter(|byte| !printable(byte)).count() as u32).map(|index| 256 + index);
    let vocab: Map<String, Value> = direct
        .chain(moved)
        .filter_map(char::from_u32)
        .enumerate()
        .map(|(id, character)| (character.to_string(), json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}

const VOCAB: usize = 256;
const CONTEXT: usize = 256;
const BOS: u32 = 1;
const EOS: u32 = 2;

fn write_json(dir: &Path, name: &str, value: &Value) {
    write(&dir.join(name), format!("{value:#}").as_bytes());
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Expected, fixtures};

    #[test]
    fn writes_the_same_bytes_for_a_seed() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for folder in &folders {
            tiny_llama(folder.path(), 5);
        }
        let [a, b] = folders
            .each_ref()
            .map(|folder| std::fs::read(folder.path().join("model.safetensors")).unwrap());
        assert!(a == b);
        let model = Expected::open(folders[0].path().join("model.safetensors"));
        assert_eq!(model.f32("model.layers.1.self_attn.k_proj.weight").0, [32, 64]);
        assert!(model.has("lm_head.weight"));
    }

    #[test]
    fn the_tokenizer_is_that_of_the_fixtures() {
        let Some(dir) = fixtures::dir("llama_q_src") else {
            return;
        };
        let text = std::fs::read_to_string(dir.join("tokenizer.json")).unwrap();
        let fixture: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(byte_level_tokenizer()["model"], fixture["model"]);
    }
}
