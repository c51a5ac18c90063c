//! Configs and tokenizers.

use serde_json::json;

use crate::{EVAL, GENERATE, Q_PROJ, QUANTIZE, world};

#[test]
fn configs_that_lie_are_contradicted_by_a_tensor_or_a_limit() {
    let world = world();
    let config = world.read("model/config.json");
    for (key, value, part) in [
        ("num_attention_heads", json!(8), "k_proj"),
        ("num_attention_heads", json!(3), "num_attention_heads"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("head_dim", json!(32), Q_PROJ),
        ("head_dim", json!(1 << 20), "model"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        ("num_key_value_heads", json!(1), "k_proj"),
        ("hidden_size", json!(128), "model.embed_tokens.weight"),
        ("hidden_size", json!(1_u64 << 60), "hidden_size"),
        ("hidden_size", json!("64"), "hidden_size"),
        ("hidden_size", json!(-64), "hidden_size"),
        ("intermediate_size", json!(1 << 20), "mlp"),
        ("vocab_size", json!(1000), "model.embed_tokens.weight"),
        ("vocab_size", json!(250), "model.embed_tokens.weight"),
        ("vocab_size", json!(1_u64 << 50), "vocab_size"),
        ("num_hidden_layers", json!(4000), "model.layers.2."),
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers"),
        ("max_position_embeddings", json!(-1), "max_position_embeddings"),
        ("rms_norm_eps", json!("small"), "rms_norm_eps"),
        ("model_type", json!("lama"), "supported are"),
        ("model_type", json!(["llama"]), "model_type"),
    ] {
        world.edit("model/config.json", |map| {
            if key == "num_attention_heads" {
                map.remove("head_dim");
            }
            map.insert(key.to_owned(), value);
        });
        for line in [QUANTIZE, GENERATE] {
            world.refuses(line, &["model", part]);
        }
        world.write("model/config.json", &config);
    }
}

#[test]
fn configs_that_are_no_json_objects() {
    let world = world();
    for bytes in [&b""[..], b"[]", b"{", b"\xff\xff", "[".repeat(100_000).as_bytes()] {
        world.write("model/config.json", bytes);
        for line in [QUANTIZE, EVAL, "inspect model"] {
            world.refuses(line, &["config.json"]);
        }
        assert_eq!(world.gptq("verify model").status.code(), Some(1));
    }
}

#[test]
fn tokenizers_that_are_malformed() {
    let world = world();
    for (name, bytes) in [
        ("tokenizer.json", &b"{"[..]),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        (
            "tokenizer.json",
            b"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}",
        ),
        ("tokenizer_config.json", b"7"),
        ("tokenizer_config.json", b"{\"a\""),
        ("special_tokens_map.json", b"{\"a\""),
    ] {
        world.write(&format!("model/{name}"), bytes);
        for line in [QUANTIZE, EVAL, GENERATE] {
            world.refuses(line, &[name]);
        }
        world.restore();
    }
}
