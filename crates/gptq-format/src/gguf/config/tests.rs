use serde_json::{Value, json};

use super::super::testing::{Builder, tiny_llama};

fn config(b: &Builder) -> Value {
    Value::Object(b.open().hf_config().unwrap())
}

#[track_caller]
fn assert_refused(b: &Builder, parts: &[&str]) {
    let message = b.open().hf_config().unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} not in {message:?}");
    }
}

#[test]
fn the_config_is_rebuilt() {
    let expected = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "vocab_size": 8,
        "tie_word_embeddings": true,
        "torch_dtype": "float16",
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": 6,
        "eos_token_id": 7,
    });
    assert_eq!(config(&tiny_llama("llama")), expected);
}

#[test]
fn variants_are_told_apart() {
    let mistral = config(&tiny_llama("llama").u32("llama.attention.sliding_window", 128));
    assert_eq!(
        (&mistral["model_type"], &mistral["sliding_window"]),
        (&json!("mistral"), &json!(128))
    );
    let qwen2 = config(&tiny_llama("qwen2").u32("tokenizer.ggml.padding_token_id", 0));
    assert_eq!(
        (&qwen2["model_type"], &qwen2["use_sliding_window"], &qwen2["pad_token_id"]),
        (&json!("qwen2"), &json!(false), &json!(0))
    );
    let qwen3 = config(
        &tiny_llama("qwen3")
            .u32("qwen3.attention.key_length", 128)
            .u32("qwen3.attention.value_length", 128),
    );
    assert_eq!(
        (&qwen3["architectures"][0], &qwen3["head_dim"]),
        (&json!("Qwen3ForCausalLM"), &json!(128))
    );
    let bias =
        config(&tiny_llama("llama").f32_tensor("blk.0.attn_q.bias", &[64], &[0.0; 64]).f32_tensor(
            "output.weight",
            &[64, 8],
            &[0.0; 512],
        ));
    assert_eq!(
        (&bias["attention_bias"], &bias["tie_word_embeddings"]),
        (&json!(true), &json!(false))
    );
}

#[test]
fn rope_scaling_is_translated() {
    let scaled = |kind: &str, factor: f32| {
        tiny_llama("llama")
            .str("llama.rope.scaling.type", kind)
            .f32("llama.rope.scaling.factor", factor)
    };
    assert_eq!(config(&scaled("none", 1.0))["rope_scaling"], Value::Null);
    assert_eq!(config(&scaled("linear", 1.0))["rope_scaling"], Value::Null);
    assert_eq!(
        config(&scaled("linear", 4.0))["rope_scaling"],
        json!({"rope_type": "linear", "factor": 4.0})
    );
    assert_eq!(
        config(&tiny_llama("llama").f32("llama.rope.scale_linear", 2.0))["rope_scaling"]["factor"],
        2.0
    );
    let yarn = scaled("yarn", 4.0).u32("llama.rope.scaling.original_context_length", 64);
    assert_eq!(
        config(&yarn)["rope_scaling"],
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    );
    let attn = yarn
        .clone()
        .f32("llama.rope.scaling.attn_factor", 2.0)
        .f32("llama.rope.scaling.yarn_beta_fast", 16.0);
    let attn = config(&attn);
    assert_eq!(attn["rope_scaling"]["beta_fast"], 16.0);
    assert_eq!(attn["rope_scaling"]["attention_factor"], 2.0 * (0.1 * 4f64.ln() + 1.0));

    assert_refused(&scaled("longrope", 4.0), &["rope.scaling.type", "longrope"]);
    assert_refused(&scaled("linear", -1.0), &["rope.scaling.factor"]);
    assert_refused(
        &yarn.f32("llama.rope.scaling.yarn_log_multiplier", 0.1),
        &["yarn_log_multiplier"],
    );
}

/// What llama.cpp's converter writes for Llama 3.1's scaling.
fn llama3_factors(factor: f64, head_dim: usize, theta: f64) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let frequency = 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
            if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                factor as f32
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        })
        .collect()
}

#[test]
fn llama3_scaling_is_recovered_from_its_factors() {
    let dir = tempfile::tempdir().unwrap();
    for factor in [8.0, 32.0] {
        let factors = llama3_factors(factor, 32, 500_000.0);
        assert!(
            factors.iter().any(|&f| f > 1.0 && f64::from(f) < factor),
            "no factor in between: {factors:?}"
        );
        let b = tiny_llama("llama").f32("llama.rope.freq_base", 500_000.0);
        let file = b.clone().f32_tensor("rope_freqs.weight", &[16], &factors).write(dir.path());
        let expected = json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        assert_eq!(file.hf_config().unwrap()["rope_scaling"], expected);
        assert!(file.hf_tensors().unwrap().iter().all(|t| !t.name.contains("rope")));

        let long = [factors.clone(), factors.clone()].concat();
        let file = b.clone().f32_tensor("rope_freqs.weight", &[32], &long).write(dir.path());
        assert!(file.hf_config().unwrap_err().to_string().contains("rope_freqs.weight"));

        let mut other = factors;
        other[9] *= 1.01;
        let file = b.f32_tensor("rope_freqs.weight", &[16], &other).write(dir.path());
        let message = file.hf_config().unwrap_err().to_string();
        assert!(message.contains("rope_freqs.weight"), "{message}");
    }
}

#[test]
fn what_would_change_results_is_refused() {
    let t = tiny_llama("llama");
    assert_refused(
        &t.clone().str("general.architecture", "mamba"),
        &["mamba", "llama, qwen2, qwen3"],
    );
    assert_refused(&t.clone().without("general.architecture"), &["general.architecture"]);
    assert_refused(&t.clone().u32("llama.expert_count", 8), &["llama.expert_count", "8"]);
    assert_refused(&t.clone().f32("llama.logit_scale", 0.5), &["logit_scale"]);
    assert_refused(
        &t.clone().f32("llama.attn_logit_softcapping", 30.0),
        &["attn_logit_softcapping"],
    );
    assert_refused(&t.clone().bool("llama.attention.causal", false), &["attention.causal"]);
    assert_refused(
        &tiny_llama("qwen2").u32("qwen2.attention.sliding_window", 64),
        &["sliding_window"],
    );
    assert_refused(
        &t.clone().i32s("llama.attention.head_count", &[2]),
        &["head_count", "per layer"],
    );
    assert_refused(&t.clone().u32("llama.attention.head_count", 0), &["head_count"]);
    assert_refused(&t.clone().u32("llama.attention.head_count", 3), &["head_count", "64"]);
    assert_refused(
        &t.clone().u32("llama.rope.dimension_count", 16),
        &["rope.dimension_count", "32"],
    );
    assert_refused(&t.clone().str("llama.block_count", "many"), &["block_count", "many"]);
    assert_refused(&t.clone().f32("llama.rope.freq_base", f32::NAN), &["rope.freq_base"]);
    assert_refused(&t.clone().without("llama.embedding_length"), &["embedding_length"]);
    // Neutral values are no features.
    config(
        &t.u32("llama.expert_count", 0)
            .f32("llama.logit_scale", 1.0)
            .bool("llama.attention.causal", true),
    );
}

#[test]
fn all_ends_of_a_turn_end_generation() {
    let generation = |b: &Builder| Value::Object(b.open().hf_generation_config().unwrap());
    assert_eq!(generation(&tiny_llama("llama")), json!({"bos_token_id": 6, "eos_token_id": 7}));
    let b = tiny_llama("llama")
        .u32("tokenizer.ggml.eot_token_id", 5)
        .u32("tokenizer.ggml.eom_token_id", 7);
    assert_eq!(generation(&b)["eos_token_id"], json!([7, 5]));
    let none = tiny_llama("llama").u32("tokenizer.ggml.bos_token_id", u32::MAX);
    assert_eq!(generation(&none), json!({"eos_token_id": 7}));
}

#[test]
fn tensors_get_their_names_shapes_and_row_order() {
    let tensors = tiny_llama("llama").open().hf_tensors().unwrap();
    let find = |name: &str| tensors.iter().find(|t| t.name == name).unwrap();
    let k = find("model.layers.0.self_attn.k_proj.weight");
    assert_eq!(k.shape, [32, 64]);
    let map = k.row_map.unwrap();
    assert_eq!((map.heads, map.head_rows), (1, 32));
    assert_eq!(find("model.layers.0.self_attn.q_proj.weight").row_map.unwrap().heads, 2);
    assert_eq!(find("model.embed_tokens.weight").shape, [8, 64]);
    for name in [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ] {
        assert_eq!(find(name).row_map, None, "{name}");
    }
    assert_eq!(tensors.len(), 11);
    assert!(tiny_llama("qwen2").open().hf_tensors().unwrap().iter().all(|t| t.row_map.is_none()));

    let refused = |b: Builder| b.open().hf_tensors().unwrap_err().to_string();
    for name in
        ["blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "blk.01.attn_q.weight", "mystery"]
    {
        let message = refused(tiny_llama("llama").f32_tensor(name, &[1], &[0.0]));
        assert!(message.contains(name), "{message}");
    }
    let odd = refused(tiny_llama("llama").u32("llama.attention.head_count", 5));
    assert!(odd.contains("attn_q") && odd.contains("5 heads"), "{odd}");
}

#[test]
fn the_row_map_undoes_the_converters_permutation() {
    // The converter: reshape to [heads, 2, half, in], swap the two middle axes.
    let (heads, half) = (3, 4);
    let map = super::super::RowMap { heads, head_rows: 2 * half };
    let mut stored = vec![0; heads * 2 * half];
    for h in 0..heads {
        for j in 0..2 {
            for i in 0..half {
                stored[(h * half + i) * 2 + j] = (h * 2 + j) * half + i;
            }
        }
    }
    let restored: Vec<usize> = (0..stored.len()).map(|row| stored[map.source(row)]).collect();
    assert!(restored.iter().copied().eq(0..stored.len()));
}
