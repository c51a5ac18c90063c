//! Writes a Llama of TinyLlama 1.1B's shape with random f16 weights, tensor by tensor, for measuring
//! what a large model needs: `cargo run --release -p gptq-testkit --example random_llama -- DIR [LAYERS]`.

use std::fs::File;
use std::io::{BufWriter, Error, Result, Write};
use std::path::Path;

use gptq_testkit::{Rng, byte_level_tokenizer};
use half::f16;
use serde_json::{Map, Value, json};

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 5632;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const VOCAB: usize = 32000;
const CONTEXT: usize = 2048;

/// Random numbers that are drawn once and then read from changing places: drawing each takes minutes.
const POOL: usize = 1 << 22;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), layers) = (args.next(), args.next()) else {
        return Err(Error::other("usage: random_llama DIR [LAYERS]"));
    };
    let layers = layers.map_or(Ok(22), |text| text.parse()).map_err(Error::other)?;
    let dir = Path::new(&dir);
    std::fs::create_dir_all(dir)?;
    let json = |name: &str, value: &Value| std::fs::write(dir.join(name), format!("{value:#}"));
    json("config.json", &config(layers))?;
    json("tokenizer.json", &byte_level_tokenizer())?;
    json("tokenizer_config.json", &json!({ "tokenizer_class": "PreTrainedTokenizerFast" }))?;
    write_weights(&dir.join("model.safetensors"), &tensors(layers))
}

fn config(layers: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        "bos_token_id": 1, "eos_token_id": 2,
    })
}

/// Name, shape, mean and standard deviation of every tensor.
fn tensors(layers: usize) -> Vec<(String, Vec<usize>, f32, f32)> {
    let linear = |name: String, out: usize, inputs: usize| {
        (name + ".weight", vec![out, inputs], 0.0, 1.0 / (inputs as f32).sqrt())
    };
    let norm = |name: String| (name + ".weight", vec![HIDDEN], 1.0, 0.1);
    let kv = HIDDEN / HEADS * KV_HEADS;
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN], 0.0, 0.5)];
    for layer in 0..layers {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        all.push(norm(name("input_layernorm")));
        all.push(norm(name("post_attention_layernorm")));
        for (part, out) in [("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)] {
            all.push(linear(name(&format!("self_attn.{part}_proj")), out, HIDDEN));
        }
        all.push(linear(name("mlp.gate_proj"), INTERMEDIATE, HIDDEN));
        all.push(linear(name("mlp.up_proj"), INTERMEDIATE, HIDDEN));
        all.push(linear(name("mlp.down_proj"), HIDDEN, INTERMEDIATE));
    }
    all.push(norm("model.norm".to_owned()));
    all.push(linear("lm_head".to_owned(), VOCAB, HIDDEN));
    all
}

fn write_weights(path: &Path, tensors: &[(String, Vec<usize>, f32, f32)]) -> Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape, ..) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut rng = Rng::new(0);
    let numbers = rng.normals(POOL, 1.0);
    for (_, shape, mean, deviation) in tensors {
        let mut left: usize = shape.iter().product();
        while left > 0 {
            let start = rng.below(POOL - 1);
            let piece = &numbers[start..(start + left.min(1 << 16)).min(POOL)];
            for number in piece {
                file.write_all(&f16::from_f32(mean + deviation * number).to_le_bytes())?;
            }
            left -= piece.len();
        }
    }
    file.flush()
}
