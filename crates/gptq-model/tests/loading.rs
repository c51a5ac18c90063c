//! Checkpoints whose tensors contradict their config.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::open;
use gptq_compute::{DenseMatrix, Linear, Matrix, Pool, Tensor};
use gptq_format::{Checkpoint, Config};
use gptq_model::{Block, BlockState, Ctx, LinearSource, Model, ModelError, Part, Spec, Stage};
use gptq_testkit::fixtures;
use serde_json::{Value, json};

fn changed(dir: &Path, key: &str, value: Value) -> Checkpoint {
    let mut checkpoint = open(dir);
    let mut map = checkpoint.config.map().clone();
    map.insert(key.to_owned(), value);
    checkpoint.config = Config::new(checkpoint.config.path(), map);
    checkpoint
}

#[test]
fn a_config_that_lies_is_caught_by_the_tensor_that_contradicts_it() {
    let Some(dir) = fixtures::dir("llama") else { return };
    for (key, value, tensor) in [
        ("vocab_size", json!(300), "model.embed_tokens.weight"),
        ("num_attention_heads", json!(8), "model.layers.0.self_attn.q_proj.weight"),
        ("num_key_value_heads", json!(4), "model.layers.0.self_attn.k_proj.weight"),
        ("head_dim", json!(32), "model.layers.0.self_attn.q_proj.weight"),
        ("hidden_size", json!(32), "model.embed_tokens.weight"),
        ("intermediate_size", json!(64), "model.layers.0.mlp.gate_proj.weight"),
        ("num_hidden_layers", json!(3), "model.layers.2."),
        ("attention_bias", json!(true), "model.layers.0.self_attn.q_proj.bias"),
        ("model_type", json!("qwen3"), "model.layers.0.self_attn.q_norm.weight"),
    ] {
        let error = Model::load(&changed(&dir, key, value))
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(error.contains(tensor), "{key}: {error}");
    }
}

#[test]
fn a_bias_that_the_config_denies_is_refused() {
    let Some(dir) = fixtures::dir("llama_tied_bias") else { return };
    let error = Model::load(&changed(&dir, "mlp_bias", json!(false))).err().unwrap();
    assert!(
        matches!(&error, ModelError::UnexpectedBias { tensor, .. } if tensor.contains("mlp")),
        "{error}"
    );
}

#[test]
fn linears_can_be_left_out_set_and_taken() {
    let Some(dir) = fixtures::dir("llama") else { return };
    let checkpoint = open(&dir);
    let spec = Arc::new(Spec::for_checkpoint(&checkpoint).unwrap());
    let mut block = Block::load(&checkpoint, &spec, 0, LinearSource::Unset).unwrap();
    assert!(block.linear(Stage::Qkv, 0).is_none());
    let mut ctx = Ctx::new(Arc::new(Pool::new(1)));
    let mut state = BlockState::new(Tensor::zeros(3, spec.hidden));
    block.begin(&mut ctx, &mut state);
    let error =
        block.run_stage(&mut ctx, Stage::MlpUp(Part::Dense), &mut state, &mut []).unwrap_err();
    assert!(
        matches!(&error, ModelError::LinearNotLoaded { linear, .. } if linear == "mlp.gate_proj"),
        "{error}"
    );

    let dense = |out: usize, inputs: usize| {
        let weight = Matrix::Dense(DenseMatrix::from_f32(out, inputs, vec![0.5; out * inputs]));
        Linear { weight, bias: None }
    };
    let error = block.set_linear(Stage::MlpDown(Part::Dense), 0, dense(64, 64)).unwrap_err();
    assert!(
        matches!(error, ModelError::LinearShape { expected: (64, 128), got: (64, 64), .. }),
        "{error}"
    );
    block.set_linear(Stage::MlpDown(Part::Dense), 0, dense(64, 128)).unwrap();
    assert_eq!(block.weight_bytes(), 64 * 128 * 4);
    assert!(block.take_linear(Stage::MlpDown(Part::Dense), 0).is_some());
    assert!(block.linear(Stage::MlpDown(Part::Dense), 0).is_none());
}

#[test]
fn spans_that_do_not_cover_the_rows_are_refused() {
    let Some(dir) = fixtures::dir("llama") else { return };
    let checkpoint = open(&dir);
    let spec = Arc::new(Spec::for_checkpoint(&checkpoint).unwrap());
    let block = Block::load(&checkpoint, &spec, 1, LinearSource::Mapped).unwrap();
    let mut ctx = Ctx::new(Arc::new(Pool::new(1)));
    let mut state = BlockState::new(Tensor::zeros(3, spec.hidden));
    let error = block.forward(&mut ctx, &mut state, &mut []).unwrap_err().to_string();
    assert!(error.contains("3 rows"), "{error}");
}
