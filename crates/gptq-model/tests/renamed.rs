//! Families that no fixture shows: the weights of a fixture under their names and in their order give its logits.

mod common;

use std::path::Path;

use common::{logits, open, session};
use gptq_model::{Model, ModelError, Spec};
use gptq_testkit::{Expected, assert_close, fixtures};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-4;

/// A tensor: name, shape, values.
type Tensor = (String, Vec<usize>, Vec<f32>);

/// The tensors of the fixture `name`, and what it expects.
fn fixture(name: &str) -> Option<(Vec<Tensor>, Expected)> {
    let dir = fixtures::dir(name)?;
    let file = Expected::open(dir.join("model.safetensors"));
    let read = |name: &String| {
        let (shape, values) = file.f32(name);
        (name.clone(), shape, values)
    };
    let tensors = file.names().iter().map(read).collect();
    Some((tensors, Expected::open(dir.join("expected.safetensors"))))
}

fn write(dir: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
}

/// Logits of the checkpoint, of the first 256 tokens, and what the fixture expects.
fn compare(what: &str, config: &Value, tensors: &[Tensor], expected: &Expected, factors: &[f32]) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, tensors);
    let model = Model::load(&open(folder.path())).unwrap();
    let (shape, ids) = expected.tokens("input_ids");
    let got = logits(&model, &mut session(), &ids, shape[0]);
    let (shape, mut want) = expected.f32("logits");
    let vocab = shape[2];
    for row in want.chunks_exact_mut(vocab) {
        row.iter_mut().zip(factors).for_each(|(logit, factor)| *logit *= factor);
    }
    let got: Vec<f32> = (0..got.rows()).flat_map(|row| got.row(row)[..vocab].to_vec()).collect();
    assert_close(what, &got, &want, TOLERANCE);
}

/// The rows of the given tensors, in pieces of so many rows in turn.
fn interleave(parts: &[(&Tensor, usize)]) -> (Vec<usize>, Vec<f32>) {
    let width = |tensor: &Tensor| tensor.1.get(1).copied().unwrap_or(1);
    let mut shape = parts[0].0.1.clone();
    shape[0] = parts.iter().map(|(tensor, _)| tensor.1[0]).sum();
    let rounds = parts[0].0.1[0] / parts[0].1;
    let piece = |round: usize| {
        parts.iter().flat_map(move |(tensor, rows)| {
            let len = rows * width(tensor);
            tensor.2[round * len..(round + 1) * len].to_vec()
        })
    };
    (shape, (0..rounds).flat_map(piece).collect())
}

fn find<'a>(tensors: &'a [Tensor], name: &str) -> &'a Tensor {
    tensors.iter().find(|tensor| tensor.0 == name).unwrap()
}

/// The tensors renamed by the first rule that applies, with what `fuse` says of the projections of each block.
fn rename(
    tensors: &[Tensor],
    rules: &[(&str, &str)],
    fused: &str,
    fuse: impl Fn([&Tensor; 3]) -> (Vec<usize>, Vec<f32>),
) -> Vec<Tensor> {
    let mut renamed = Vec::new();
    for (name, shape, values) in tensors {
        if let Some((block, suffix)) = name.split_once(".self_attn.q_proj.") {
            let of = |p: &str| find(tensors, &format!("{block}.self_attn.{p}_proj.{suffix}"));
            let (shape, values) = fuse([of("q"), of("k"), of("v")]);
            let name = format!("{block}.{fused}.{suffix}");
            renamed.push((rules_applied(&name, rules), shape, values));
        } else if !name.contains(".self_attn.k_proj.") && !name.contains(".self_attn.v_proj.") {
            renamed.push((rules_applied(name, rules), shape.clone(), values.clone()));
        }
    }
    renamed
}

fn rules_applied(name: &str, rules: &[(&str, &str)]) -> String {
    rules.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Each row group of `head_dim` rows twice: keys and values of two heads that shared them.
fn doubled(tensor: &Tensor, head_dim: usize) -> Tensor {
    let (shape, values) = interleave(&[(tensor, head_dim), (tensor, head_dim)]);
    (tensor.0.clone(), shape, values)
}

#[test]
fn internlm2_is_llama_with_grouped_projections() {
    let Some((llama, expected)) = fixture("llama") else { return };
    // Four heads of 16 columns, two of keys and values.
    let fuse = |[q, k, v]: [&Tensor; 3]| interleave(&[(q, 32), (k, 16), (v, 16)]);
    let rules = [
        ("embed_tokens", "tok_embeddings"),
        ("self_attn.o_proj", "attention.wo"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("lm_head", "output"),
    ];
    let tensors = rename(&llama, &rules, "attention.wqkv", fuse);
    let config = json!({
        "model_type": "internlm2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
        "hidden_act": "silu", "rms_norm_eps": eps(), "rope_theta": theta(), "rope_scaling": null, "bias": false,
        "attn_implementation": "eager", "pretraining_tp": 1, "tie_word_embeddings": false
    });
    compare("internlm2", &config, &tensors, &expected, &[1.0; 256]);
}

#[test]
fn qwen_is_qwen2_under_the_names_of_gpt2() {
    let Some((qwen2, expected)) = fixture("qwen2") else { return };
    let fuse = |[q, k, v]: [&Tensor; 3]| {
        let (k, v) = (doubled(k, 16), doubled(v, 16));
        interleave(&[(q, 64), (&k, 64), (&v, 64)])
    };
    let rules = [
        ("model.embed_tokens", "transformer.wte"),
        ("model.layers", "transformer.h"),
        ("model.norm", "transformer.ln_f"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.down_proj", "mlp.c_proj"),
    ];
    let mut tensors = rename(&qwen2, &rules, "attn.c_attn", fuse);
    let head = find(&tensors, "transformer.wte.weight").clone();
    tensors.push(("lm_head.weight".into(), head.1, head.2));
    let source = source("qwen2");
    let config = json!({
        "model_type": "qwen", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "kv_channels": 16, "vocab_size": 256, "seq_length": 32,
        "max_position_embeddings": 8192, "layer_norm_epsilon": source["rms_norm_eps"],
        "rotary_emb_base": source["rope_theta"], "rotary_pct": 1.0, "no_bias": true, "scale_attn_weights": true,
        "use_dynamic_ntk": true, "use_logn_attn": true, "use_flash_attn": "auto", "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0, "onnx_safe": null, "tie_word_embeddings": false
    });
    compare("qwen", &config, &tensors, &expected, &[1.0; 256]);
    // What it does with longer sequences is not implemented.
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config, &tensors);
    let model = Model::load(&open(folder.path())).unwrap();
    let mut batch = [gptq_model::Sequence::new(model.spec())];
    let error = model.forward(&mut session(), &mut batch, &[&[5; 33]]).unwrap_err();
    assert!(matches!(error, ModelError::Position { limit: 32, .. }), "{error}");
}

#[test]
fn baichuan_is_llama_with_one_projection_and_unit_rows_in_the_second_version() {
    let Some((llama, expected)) = fixture("llama") else { return };
    let fuse = |[q, k, v]: [&Tensor; 3]| {
        let (k, v) = (doubled(k, 16), doubled(v, 16));
        interleave(&[(q, 64), (&k, 64), (&v, 64)])
    };
    let tensors = rename(&llama, &[], "self_attn.W_pack", fuse);
    let head = find(&tensors, "lm_head.weight").2.clone();
    let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let inverse: Vec<f32> = head.chunks_exact(64).map(|row| 1.0 / norm(row)).collect();
    for (vocab, factors) in [(64_000, vec![1.0; 256]), (125_696, inverse)] {
        let mut larger = tensors.clone();
        for (name, shape, values) in &mut larger {
            if name.contains("embed_tokens") || name.contains("lm_head") {
                shape[0] = vocab;
                values.resize(vocab * 64, 0.0);
            }
        }
        let mut config = json!({
            "model_type": "baichuan", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": vocab, "max_position_embeddings": 128, "hidden_act": "silu",
            "rms_norm_eps": eps(), "model_max_length": 128, "z_loss_weight": 0, "tie_word_embeddings": false
        });
        assert_eq!(theta(), json!(10000.0));
        compare("baichuan", &config, &larger, &expected, &factors);
        // The 13B models.
        config.as_object_mut().unwrap().remove("max_position_embeddings");
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config, &[]);
        let spec = Spec::for_checkpoint(&open(folder.path())).unwrap();
        let gptq_model::spec::Positions::Alibi { slopes } = &spec.positions else { panic!() };
        assert_eq!(slopes, &[0.25, 0.0625, 0.015625, 0.00390625]);
        assert_eq!((spec.max_positions, spec.layers[1].rope), (128, None));
    }
}

#[test]
fn mixtral_under_the_names_of_transformers_5() {
    let Some((tensors, expected)) = fixture("mixtral") else { return };
    let names = [
        ("block_sparse_moe", "mlp"),
        (".w1.", ".gate_proj."),
        (".w3.", ".up_proj."),
        (".w2.", ".down_proj."),
    ];
    let renamed: Vec<Tensor> = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            (names.iter().fold(name, |name, (old, new)| name.replace(old, new)), shape, values)
        })
        .collect();
    assert!(
        renamed.iter().any(|tensor| tensor.0 == "model.layers.1.mlp.experts.2.down_proj.weight")
    );
    compare("mixtral", &source("mixtral"), &renamed, &expected, &[1.0; 256]);
}

#[test]
fn gate_and_up_taken_apart() {
    for family in ["phi3", "glm"] {
        let Some((tensors, expected)) = fixture(family) else { continue };
        let mut apart = Vec::new();
        for (name, shape, values) in tensors {
            if !name.contains("gate_up_proj") {
                apart.push((name, shape, values));
                continue;
            }
            let half = vec![shape[0] / 2, shape[1]];
            let (gate, up) = values.split_at(values.len() / 2);
            for (part, values) in [("gate_proj", gate), ("up_proj", up)] {
                apart.push((name.replace("gate_up_proj", part), half.clone(), values.to_vec()));
            }
        }
        compare(family, &source(family), &apart, &expected, &[1.0; 256]);
    }
}

/// config.v4.json of a fixture, or config.json where there is none.
fn source(name: &str) -> Value {
    let dir = fixtures::dir(name).unwrap();
    let v4 = dir.join("config.v4.json");
    let path = if v4.exists() { v4 } else { dir.join("config.json") };
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn eps() -> Value {
    source("llama")["rms_norm_eps"].clone()
}

fn theta() -> Value {
    source("llama")["rope_theta"].clone()
}
