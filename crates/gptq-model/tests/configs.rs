//! Configs of published models and of no model: what is read from them, and what is refused by name.

use std::path::Path;

use gptq_format::Config;
use gptq_model::relative::Buckets;
use gptq_model::spec::Positions;
use gptq_model::{ModelError, Spec, Stage};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<Spec, ModelError> {
    let map = config.as_object().unwrap().clone();
    Spec::from_config(&Config::new(Path::new("some/config.json"), map))
}

fn with(base: &Value, changes: &Value) -> Value {
    let mut config = base.clone();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

fn refused(base: &Value, changes: &Value, parts: &[&str]) {
    let error = read(&with(base, changes)).map(|_| ()).unwrap_err().to_string();
    for part in ["some/config.json"].iter().chain(parts) {
        assert!(error.contains(part), "{error}: lacks {part}");
    }
}

fn bert() -> Value {
    json!({
        "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 66, "hidden_act": "gelu"
    })
}

fn moe() -> Value {
    json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "hidden_act": "silu",
        "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true
    })
}

#[test]
fn encoders_refuse_what_they_do_not_compute() {
    refused(&bert(), &json!({ "is_decoder": true }), &["is_decoder", "bert"]);
    refused(
        &bert(),
        &json!({ "position_embedding_type": "relative_key" }),
        &["position_embedding_type", "relative_key"],
    );
    refused(&bert(), &json!({ "add_cross_attention": true }), &["add_cross_attention"]);
    refused(
        &bert(),
        &json!({ "model_type": "deberta" }),
        &["\"deberta\"", "deberta-v2", "xlm-roberta"],
    );
    let roberta = with(&bert(), &json!({ "model_type": "roberta" }));
    refused(&roberta, &json!({ "pad_token_id": 65 }), &["pad_token_id", "65"]);
    refused(&roberta, &json!({ "pad_token_id": -1 }), &["pad_token_id"]);
    let spec = read(&with(&roberta, &json!({ "pad_token_id": 1 }))).unwrap();
    assert_eq!(spec.max_positions, 64);
    // Keys of the multilingual BERT.
    let old = json!({ "pooler_num_attention_heads": 12, "pooler_size_per_head": 128, "directionality": "bidi" });
    read(&with(&bert(), &old)).unwrap();
}

#[test]
fn the_models_that_are_called_chatglm_are_told_apart_or_refused() {
    // The keys of the published GLM-4 9B, with smaller sizes.
    let base = json!({
        "model_type": "chatglm", "add_bias_linear": false, "add_qkv_bias": true,
        "apply_query_key_layer_scaling": true, "apply_residual_connection_post_layernorm": false,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": true, "bias_dropout_fusion": true,
        "ffn_hidden_size": 96, "fp32_residual_connection": false, "hidden_dropout": 0.0, "hidden_size": 64,
        "kv_channels": 16, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": true,
        "multi_query_group_num": 2, "num_attention_heads": 4, "num_layers": 2, "original_rope": true,
        "padded_vocab_size": 256, "post_layer_norm": true, "rmsnorm": true, "rope_ratio": 500, "seq_length": 128,
        "use_cache": true, "torch_dtype": "bfloat16", "tie_word_embeddings": false, "eos_token_id": [1, 2]
    });
    let spec = read(&base).unwrap();
    let Positions::Rotary(ropes) = &spec.positions else { panic!() };
    assert_eq!((ropes[0].theta, ropes[0].rotary_dim), (5e6, 8));
    assert_eq!(spec.stages(1)[0].linears[0].out_features, (4 + 2 * 2) * 16);
    for (changes, key) in [
        (json!({ "position_encoding_2d": true }), "position_encoding_2d"),
        (json!({ "inner_hidden_size": 16384 }), "inner_hidden_size"),
        (json!({ "pre_seq_len": 128 }), "pre_seq_len"),
        (json!({ "quantization_bit": 4 }), "quantization_bit"),
        (json!({ "vision_config": { "num_heads": 16 } }), "vision_config"),
        (json!({ "original_rope": false }), "original_rope"),
        (json!({ "tie_word_embeddings": true }), "tie_word_embeddings"),
        (json!({ "padded_vocab_size": 65024 }), "rope_ratio"),
        (json!({ "multi_query_group_num": 3 }), "multi_query_group_num"),
        (json!({ "kv_channels": 18 }), "kv_channels"),
        (json!({ "rope_theta": 1e6 }), "rope_theta"),
    ] {
        refused(&base, &changes, &[key]);
    }
    // ChatGLM 2 and 3.
    let plain =
        json!({ "padded_vocab_size": 65024, "rope_ratio": 1, "multi_query_attention": false });
    let spec = read(&with(&base, &plain)).unwrap();
    assert_eq!(spec.attention.kv_heads, 4);
}

fn deberta(changes: &Value) -> Value {
    let base = json!({
        "model_type": "deberta-v2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 256, "relative_attention": true, "pos_att_type": "p2c|c2p",
        "position_buckets": 256, "max_relative_positions": -1, "share_att_key": true, "norm_rel_ebd": "layer_norm",
        "position_biased_input": false, "attention_head_size": 16, "type_vocab_size": 0, "pooler_hidden_act": "gelu"
    });
    with(&base, changes)
}

#[test]
fn deberta_reads_what_decides_its_distances_and_refuses_the_rest() {
    let relative = |changes: &Value| read(&deberta(changes)).unwrap().attention.relative;
    let usual = relative(&json!({})).unwrap();
    assert_eq!((usual.span, usual.shared()), (256, vec![0, 1]));
    // Of 512 positions, which is the default.
    assert_eq!(usual.buckets, Some(Buckets { half: 128, limit: 512 }));
    let plain = json!({ "position_buckets": -1, "max_relative_positions": 24, "share_att_key": null,
        "pos_att_type": ["c2p"], "norm_rel_ebd": null });
    let plain = relative(&plain).unwrap();
    assert_eq!((plain.span, plain.buckets, plain.norm, plain.queries), (24, None, None, None));
    assert_eq!(plain.own().collect::<Vec<_>>(), ["attention.self.pos_key_proj"]);
    assert_eq!(relative(&json!({ "relative_attention": false })), None);
    // Terms count for the scale even where they are not computed.
    let scale = |changes: &Value| read(&deberta(changes)).unwrap().attention.scale;
    assert_eq!(scale(&json!({ "relative_attention": false })), scale(&json!({})));
    assert_eq!(scale(&json!({ "pos_att_type": null })), 0.25);

    for (changes, key) in [
        (json!({ "pos_att_type": "c2p|p2p" }), "pos_att_type"),
        (json!({ "norm_rel_ebd": "rms" }), "norm_rel_ebd"),
        (json!({ "position_buckets": 1 }), "position_buckets"),
        (json!({ "position_buckets": 2.5 }), "position_buckets"),
        (json!({ "conv_kernel_size": 4 }), "conv_kernel_size"),
        (json!({ "conv_kernel_size": 3, "conv_groups": 3 }), "conv_groups"),
        (json!({ "conv_act": "selu" }), "conv_act"),
        (json!({ "attention_head_size": 32 }), "attention_head_size"),
        (json!({ "num_key_value_heads": 2 }), "num_key_value_heads"),
        (json!({ "legacy": false, "embedding_size": 32 }), "legacy"),
        (json!({ "relative_position_scale": 2 }), "relative_position_scale"),
    ] {
        refused(&deberta(&changes), &json!({}), &[key]);
    }
}

#[test]
fn modernbert_configs_of_both_spellings_agree() {
    // The keys of the published base model.
    let old = json!({
        "model_type": "modernbert", "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "classifier_activation": "gelu", "classifier_bias": false, "classifier_dropout": 0.0,
        "classifier_pooling": "mean", "decoder_bias": true, "deterministic_flash_attn": false,
        "embedding_dropout": 0.0, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
        "gradient_checkpointing": false, "hidden_activation": "gelu", "hidden_size": 64,
        "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 96,
        "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192, "mlp_bias": false, "mlp_dropout": 0.0, "norm_bias": false,
        "norm_eps": 1e-05, "num_attention_heads": 4, "num_hidden_layers": 4, "position_embedding_type": "absolute",
        "sep_token_id": 2, "tie_word_embeddings": true, "vocab_size": 256
    });
    let mut new = old.clone();
    let map = new.as_object_mut().unwrap();
    map.retain(|key, _| !key.contains("rope") && key != "global_attn_every_n_layers");
    let (full, sliding) = ("full_attention", "sliding_attention");
    map.insert("layer_types".into(), json!([full, sliding, sliding, full]));
    let rope = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    map.insert("rope_parameters".into(), json!({ full: rope(16e4), sliding: rope(1e4) }));
    let spec = read(&old).unwrap();
    assert_eq!(spec, read(&new).unwrap());
    let windows: Vec<_> = spec.layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows, [None, Some(65), Some(65), None]);
    let Positions::Rotary(ropes) = &spec.positions else { panic!() };
    assert_eq!((ropes[0].theta, ropes[1].theta), (16e4, 1e4));
    assert!(spec.layers[0].bare && !spec.layers[1].bare);
}

#[test]
fn experts_are_stages_of_their_own() {
    let layout = json!({ "mlp_only_layers": [3], "decoder_sparse_step": 2 });
    let spec = read(&with(&moe(), &layout)).unwrap();
    let sparse: Vec<bool> = (0..6).map(|layer| spec.moe(layer).is_some()).collect();
    assert_eq!(sparse, [false, true, false, false, false, true]);
    assert_eq!(spec.stages(0).len(), 4);
    let stages = spec.stages(1);
    assert_eq!(stages.len(), 2 + 2 * 8);
    let last = &stages[17];
    assert_eq!(last.stage.expert(), Some(7));
    assert_eq!(last.linears[0].module, "model.layers.1.mlp.experts.7.down_proj");
    assert_eq!((last.linears[0].in_features, last.linears[0].out_features), (32, 64));
    assert!(stages.iter().flat_map(|stage| &stage.linears).all(|l| !l.name.ends_with("mlp.gate")));
    assert!(spec.stage_linears(0, last.stage).is_empty());
    assert_eq!(spec.stage_order(0)[1], Stage::AttnOut);

    let shared =
        with(&moe(), &json!({ "model_type": "qwen2_moe", "shared_expert_intermediate_size": 96 }));
    let stages = read(&shared).unwrap().stages(0);
    let up = &stages[2 + 2 * 8];
    assert_eq!(up.linears[1].name, "mlp.shared_expert.up_proj");
    assert_eq!((up.stage.expert(), up.linears[1].out_features), (None, 96));
}

#[test]
fn impossible_mixtures_are_refused_by_name() {
    refused(&moe(), &json!({ "num_experts_per_tok": 9 }), &["num_experts_per_tok", "(8)"]);
    refused(&moe(), &json!({ "num_experts": 0 }), &["num_experts"]);
    refused(&moe(), &json!({ "num_experts": 1 << 20 }), &["num_experts", "4096"]);
    refused(&moe(), &json!({ "mlp_only_layers": "all" }), &["mlp_only_layers"]);
    refused(&moe(), &json!({ "shared_expert_intermediate_size": 64 }), &["shared_expert"]);
    refused(
        &moe(),
        &json!({ "model_type": "mixtral", "attention_bias": true }),
        &["attention_bias"],
    );
    let local = with(&moe(), &json!({ "num_experts": null, "num_local_experts": 8 }));
    assert_eq!(read(&local).unwrap(), read(&moe()).unwrap());
}

#[test]
fn late_versions_of_transformers_4_write_the_rotated_share_twice() {
    let neox = json!({
        "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "hidden_act": "gelu"
    });
    for both in [
        json!({ "partial_rotary_factor": 0.25, "rope_theta": 10000 }),
        json!({ "rotary_pct": 0.5, "partial_rotary_factor": 0.5 }),
    ] {
        assert_eq!(read(&with(&neox, &both)).unwrap().family, "gpt_neox");
    }
    let other = json!({ "rotary_pct": 0.5, "partial_rotary_factor": 0.25 });
    refused(&neox, &other, &["partial_rotary_factor", "0.25"]);
}

#[test]
fn baichuan_versions_are_told_apart_or_refused() {
    let config = json!({
        "model_type": "baichuan", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 64000, "hidden_act": "silu"
    });
    refused(&config, &json!({ "vocab_size": 70000 }), &["vocab_size", "125696"]);
    refused(&config, &json!({}), &["model_max_length"]);
    let two = with(&config, &json!({ "vocab_size": 125696, "model_max_length": 4096 }));
    assert!(read(&two).unwrap().head.unit_rows);
}

#[test]
fn blocks_without_positions_need_an_entry_each() {
    let config = json!({
        "model_type": "smollm3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256
    });
    refused(&config, &json!({ "no_rope_layers": [1, 0] }), &["no_rope_layers", "4 layers"]);
    let ropes = |config: &Value| -> Vec<Option<usize>> {
        read(config).unwrap().layers.iter().map(|layer| layer.rope).collect()
    };
    assert_eq!(ropes(&config), [Some(0), Some(0), Some(0), None]);
    let listed = with(&config, &json!({ "no_rope_layers": [0, 1, 1, 0] }));
    assert_eq!(ropes(&listed), [None, Some(0), Some(0), None]);
}
