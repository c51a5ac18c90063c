//! Every fixture of a supported family against transformers: logits, hidden states of each block, greedy continuation, for
//! both spellings of the config.

#![allow(
    clippy::print_stdout,
    reason = "the measured differences are what a reader of a failure wants"
)]

mod common;

use std::path::Path;

use common::{greedy, load, logits, open, open_with, session};
use gptq_compute::{LayerKv, Tensor};
use gptq_format::Checkpoint;
use gptq_model::{
    Block, BlockState, Embedder, FAMILIES, LinearSource, Model, SeqSpan, Session, Spec,
};
use gptq_testkit::{Expected, assert_close, fixtures};

/// The references themselves are at most 3.1e-5 away from a float64 run (fixtures' README); a feature left out moves the
/// logits by 3e-3 or more.
const TOLERANCE: f64 = 1e-4;

/// GPT-Neo does not scale its scores, so that softmax amplifies rounding: its reference is 8.1e-5 away from float64.
const TOLERANCE_GPT_NEO: f64 = 5e-4;

fn tolerance(family: &str) -> f64 {
    if family == "gpt_neo" { TOLERANCE_GPT_NEO } else { TOLERANCE }
}

fn supported(name: &str, dir: &Path) -> bool {
    let config = gptq_format::Config::load(&dir.join("config.json")).unwrap();
    let model_type = config.str("model_type").unwrap();
    let known = FAMILIES.iter().any(|family| family.model_type == model_type);
    if !known {
        println!("{name}: {model_type} is not supported yet");
    }
    // Encoders have tests of their own. The adapters' directories have no model, and the expected logits of llama_q_* are
    // not those of the weights in their files, which were rounded to f16: f64 arithmetic on these is 5.5e-3 and 7.8e-4
    // of the largest logit away from them, and 4e-6 from ours.
    let encoder = Expected::open(dir.join("expected.safetensors")).has("attention_mask");
    known && !encoder && !name.starts_with("lora") && !name.starts_with("llama_q_")
}

#[test]
fn logits_hidden_states_and_greedy_tokens_equal_transformers() {
    let mut tested = Vec::new();
    let mut failed = Vec::new();
    for (name, dir) in fixtures::all() {
        if supported(&name, &dir) {
            // All families are tried, so that one mistake does not hide another.
            if std::panic::catch_unwind(|| check(&name, &dir)).is_err() {
                failed.push(name.clone());
            }
            tested.push(name);
        }
    }
    println!("{} fixtures: {}", tested.len(), tested.join(", "));
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}

fn check(name: &str, dir: &Path) {
    let mut session = session();
    let expected = Expected::open(dir.join("expected.safetensors"));
    for config in ["config.json", "config.v4.json"] {
        if !dir.join(config).is_file() {
            continue;
        }
        let checkpoint = open_with(dir, config);
        let model = load(&checkpoint);
        let what = format!("{name} ({config})");
        check_logits(&what, &model, &mut session, &expected, "input_ids", "logits");
        if expected.has("input_ids_short") {
            check_logits(&what, &model, &mut session, &expected, "input_ids_short", "logits_short");
        }
        check_hidden_states(&what, &checkpoint, &mut session, &expected);
        check_greedy(&what, &model, &mut session, &expected);
    }
}

fn check_logits(
    what: &str,
    model: &Model,
    session: &mut Session,
    expected: &Expected,
    ids: &str,
    want: &str,
) {
    let (shape, ids) = expected.tokens(ids);
    let (_, want) = expected.f32(want);
    let got = logits(model, session, &ids, shape[0]);
    let worst = gptq_testkit::difference(got.as_slice(), &want);
    println!("{what}: {worst}");
    assert_close(&format!("{what}: logits"), got.as_slice(), &want, tolerance(model.spec().family));
}

/// Block by block from the checkpoint, as evaluation and quantization run.
fn check_hidden_states(
    what: &str,
    checkpoint: &Checkpoint,
    session: &mut Session,
    expected: &Expected,
) {
    if !expected.has("hidden_states.0") {
        return;
    }
    let spec = std::sync::Arc::new(Spec::for_checkpoint(checkpoint).unwrap());
    let ctx = &mut session.ctx;
    let (shape, ids) = expected.tokens("input_ids");
    let length = shape[1];
    let positions: Vec<u32> = (0..shape[0]).flat_map(|_| 0..length as u32).collect();
    let embedder = Embedder::load(checkpoint, &spec, LinearSource::Mapped).unwrap();
    let mut hidden = Tensor::default();
    embedder.forward(ctx, &ids, &positions, &mut hidden).unwrap();
    let mut state = BlockState::new(hidden);
    let tolerance = tolerance(spec.family);
    for layer in 0..spec.layer_count() {
        let (_, want) = expected.f32(&format!("hidden_states.{layer}"));
        assert_close(
            &format!("{what}: input of block {layer}"),
            state.hidden.as_slice(),
            &want,
            tolerance,
        );
        let block = Block::load(checkpoint, &spec, layer, LinearSource::Copied).unwrap();
        let mut caches: Vec<LayerKv> = (0..shape[0])
            .map(|_| LayerKv::new(spec.attention.kv_heads, spec.attention.head_dim))
            .collect();
        let mut seqs: Vec<SeqSpan<'_>> = caches
            .iter_mut()
            .enumerate()
            .map(|(row, kv)| SeqSpan { rows: row * length..(row + 1) * length, kv })
            .collect();
        block.forward(ctx, &mut state, &mut seqs).unwrap();
    }
    // transformers gives the last state after the final norm and projection.
    let head = gptq_model::HeadLayer::load(checkpoint, &spec, &embedder).unwrap();
    let mut normalized = Tensor::default();
    head.normalize(ctx, &state.hidden, &mut normalized);
    let (_, want) = expected.f32(&format!("hidden_states.{}", spec.layer_count()));
    assert_close(&format!("{what}: last hidden state"), normalized.as_slice(), &want, tolerance);
}

fn check_greedy(what: &str, model: &Model, session: &mut Session, expected: &Expected) {
    if !expected.has("greedy") {
        return;
    }
    let (shape, want) = expected.tokens("greedy");
    let (_, ids) = expected.tokens("input_ids");
    let length = shape[1];
    for row in 0..shape[0] {
        let prompt = &ids[row * length..][..length / 2];
        let got = greedy(model, session, prompt, length - prompt.len());
        assert_eq!(got, want[row * length..][..length], "{what}: greedy tokens of row {row}");
    }
}

#[test]
fn one_sequence_at_a_time_or_token_by_token_gives_the_same_logits() {
    let Some(dir) = fixtures::dir("mistral_swa") else {
        return;
    };
    let model = load(&open(&dir));
    let mut session = session();
    let (shape, ids) = Expected::open(dir.join("expected.safetensors")).tokens("input_ids");
    let together = logits(&model, &mut session, &ids, shape[0]);
    let alone = logits(&model, &mut session, &ids[..shape[1]], 1);
    let vocab = model.spec().vocab;
    assert_close("alone", alone.as_slice(), &together.as_slice()[..shape[1] * vocab], 1e-5);
    let mut batch = [gptq_model::Sequence::new(model.spec())];
    for (position, id) in ids[..shape[1]].iter().enumerate() {
        model.forward(&mut session, &mut batch, &[&[*id]]).unwrap();
        let row = model.logits(&mut session, gptq_model::Rows::Last).row(0);
        assert_close(&format!("token {position}"), row, together.row(position), 2e-5);
    }
}
