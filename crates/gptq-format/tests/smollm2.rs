//! The real model: SmolLM2-135M-Instruct as GGUF, against what transformers 5.23 reads from the same file.

use std::fs;
use std::time::Instant;

use gptq_format::TensorStore;
use gptq_format::chat::Message;
use gptq_format::gguf::GgufFile;
use gptq_format::tokenizer::Tokenizer;
use gptq_testkit::{Expected, fixtures};
use serde_json::{Value, json};

fn open() -> Option<GgufFile> {
    Some(GgufFile::open(&fixtures::smollm2_gguf()?).unwrap())
}

/// FNV-1a over the little-endian bytes.
fn fnv(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .fold(0xcbf29ce484222325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3))
}

#[test]
fn weights_equal_transformers_to_the_bit() {
    let Some(file) = open() else { return };
    let store = TensorStore::open_gguf(&file).unwrap();
    for (name, shape, hash) in [
        ("model.layers.0.self_attn.q_proj.weight", [576, 576].as_slice(), 0x02d311b9e9fef434),
        ("model.layers.29.self_attn.k_proj.weight", &[192, 576], 0xfdc1ce773f883751),
        ("model.layers.7.mlp.down_proj.weight", &[576, 1536], 0x041a6451d4dc2c47),
        ("model.norm.weight", &[576], 0xea814bed6299e304),
    ] {
        assert_eq!(fnv(&store.read_f32(name, shape).unwrap()), hash, "{name}");
    }
    let mut rows = vec![0.0; 64 * 576];
    store.read_rows_f32("model.embed_tokens.weight", 0..64, &mut rows).unwrap();
    assert_eq!(fnv(&rows), 0xfbaf407ebbebe9f4);
}

#[test]
fn all_weights_are_read_quickly() {
    let Some(file) = open() else { return };
    let start = Instant::now();
    let values: usize = file.header().tensors.iter().map(|t| file.read_f32(t).unwrap().len()).sum();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(values, 134_515_008);
    // A fifth of a second is usual; the bound only catches a slow path.
    assert!(seconds < 10.0, "{seconds} s");
}

#[test]
fn the_config_is_that_of_the_model() {
    let Some(file) = open() else { return };
    let expected = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": true,
        "torch_dtype": "float16",
        "rope_theta": 100_000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    });
    assert_eq!(Value::Object(file.hf_config().unwrap()), expected);
    let generation = json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2});
    assert_eq!(Value::Object(file.hf_generation_config().unwrap()), generation);
}

#[test]
fn token_ids_equal_transformers() {
    let Some(file) = open() else { return };
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    let reopened = Tokenizer::from_dir(saved.path()).unwrap();
    for t in [&tokenizer, &reopened] {
        assert_eq!(t.vocab_size(), 49152);
        assert_eq!(
            (t.bos_id(), t.eos_id(), t.pad_id(), t.unk_id()),
            (Some(1), Some(2), Some(2), Some(0))
        );
    }
    let Some(path) = fixtures::shared_expected("smollm2.safetensors") else {
        return;
    };
    let expected = Expected::open(path);
    let question = Message::new("user", "Explain what a transformer block does in two sentences.");
    for t in [&tokenizer, &reopened] {
        let prompt = "The capital of France is";
        let ids = t.encode(prompt, true).unwrap();
        let (_, greedy) = expected.tokens("greedy_ids");
        assert_eq!(ids, greedy[..ids.len()]);
        assert!(t.decode(&greedy, false).unwrap().starts_with(prompt));
        let chat = t
            .apply_chat_template(std::slice::from_ref(&question), true, std::time::UNIX_EPOCH)
            .unwrap();
        assert_eq!(t.encode(&chat, false).unwrap(), expected.tokens("chat_prompt_ids").1);
    }
    // Token by token the same text as at once.
    let (_, answer) = expected.tokens("chat_greedy_ids");
    let mut stream = tokenizer.decode_stream();
    let mut text = String::new();
    for &id in &answer {
        text.extend(stream.push(id).unwrap());
    }
    text.extend(stream.flush().unwrap());
    assert_eq!(text, tokenizer.decode(&answer, true).unwrap());
}

#[test]
fn a_whole_book_is_encoded_quickly() {
    let (Some(file), Some(path)) = (open(), fixtures::shared_text("wikitext2-test.txt")) else {
        return;
    };
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let text = fs::read_to_string(path).unwrap();
    let start = Instant::now();
    let ids = tokenizer.encode(&text, true).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(ids.len(), 312_144);
    assert!(seconds < 10.0, "{seconds} s");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    if let Some(path) = fixtures::shared_expected("smollm2.safetensors") {
        assert_eq!(ids[..512], Expected::open(path).tokens("input_ids").1);
    }
}
