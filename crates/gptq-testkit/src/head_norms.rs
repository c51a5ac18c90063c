//! Models whose heads have norms of their own, which no fixture has: fixtures with random ones put in.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{Rng, fixtures, safetensors_file};

/// Writes Cohere with a norm `[heads, head_dim]` and StableLM with a tensor `[head_dim]` for each head into folders of
/// `directory`; without those whose fixture is not there. Gives their names and folders.
pub fn models_with_head_norms(directory: &Path) -> Vec<(String, PathBuf)> {
    let models = [("cohere", "use_qk_norm"), ("stablelm", "qk_layernorm")];
    let write = |(family, flag): (&str, &str)| {
        let source = fixtures::dir(family)?;
        let name = format!("{family}_{flag}");
        let target = directory.join(&name);
        let read = |file: &str| {
            std::fs::read(source.join(file))
                .unwrap_or_else(|error| panic!("{name}, {file}: {error}"))
        };
        let mut config: Value = serde_json::from_slice(&read("config.json"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        config[flag] = true.into();
        let file = with_norms(&read("model.safetensors"), &config);
        let write = std::fs::create_dir_all(&target)
            .and_then(|()| std::fs::write(target.join("config.json"), config.to_string()))
            .and_then(|()| std::fs::write(target.join("model.safetensors"), file));
        write.unwrap_or_else(|error| panic!("{}: {error}", target.display()));
        Some((name, target))
    };
    models.into_iter().filter_map(write).collect()
}

fn with_norms(file: &[u8], config: &Value) -> Vec<u8> {
    let count = |key: &str| match config[key].as_u64() {
        Some(count) => count as usize,
        None => panic!("no {key}"),
    };
    let head_dim = count("hidden_size") / count("num_attention_heads");
    let mut rng = Rng::new(5);
    let mut tensors = Vec::new();
    for layer in 0..count("num_hidden_layers") {
        for (which, heads) in [("q", "num_attention_heads"), ("k", "num_key_value_heads")] {
            let (prefix, heads) = (format!("model.layers.{layer}.self_attn.{which}"), count(heads));
            if config["model_type"] == "cohere" {
                tensors.push((format!("{prefix}_norm.weight"), vec![heads, head_dim]));
            } else {
                let name = |head| format!("{prefix}_layernorm.norms.{head}.weight");
                tensors.extend((0..heads).map(|head| (name(head), vec![head_dim])));
            }
        }
    }
    let mut data = safetensors_file::parts(file).1.to_vec();
    let mut entries = Vec::new();
    for (name, shape) in tensors {
        let start = data.len();
        for x in rng.normals(shape.iter().product(), 0.2) {
            data.extend((1.0 + x).to_le_bytes());
        }
        let offsets = [start, data.len()];
        entries.push((name, json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets })));
    }
    let (mut header, _) = safetensors_file::parts(file);
    header.extend(entries);
    safetensors_file::file(&Value::Object(header).to_string(), &data)
}
