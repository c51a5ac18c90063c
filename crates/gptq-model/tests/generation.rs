//! Decoding of one sequence and of many, on the smallest fixtures.

mod common;

use std::ops::ControlFlow;

use common::{greedy, load, open, session};
use gptq_compute::{Activations, KvType};
use gptq_model::{
    BatchOptions, FinishReason, GenerateOptions, HeadBits, LoadOptions, Model, ModelError, Rows,
    Sampling, Sequence, generate, generate_batch,
};
use gptq_testkit::{assert_close, fixtures};

fn model(name: &str) -> Option<Model> {
    fixtures::dir(name).map(|dir| load(&open(&dir)))
}

const PROMPT: [u32; 4] = [1, 17, 80, 33];

#[test]
fn a_generation_ends_for_the_reason_it_says() {
    let Some(model) = model("llama") else { return };
    let mut session = session();
    let all = greedy(&model, &mut session, &PROMPT, 8)[4..].to_vec();
    let mut run = |options: &GenerateOptions, limit: usize| {
        let mut seen = Vec::new();
        let done = generate(&model, &mut session, &PROMPT, options, |token| {
            seen.push(token);
            if seen.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(seen, done.tokens, "the callback sees what is returned");
        assert!(done.prefill_seconds > 0.0 || done.tokens.is_empty());
        (done.tokens, done.finish)
    };
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    assert_eq!(run(&options, 99), (all.clone(), FinishReason::Length));
    assert_eq!(run(&options, 3), (all[..3].to_vec(), FinishReason::Cancelled));
    assert_eq!(
        run(&GenerateOptions { max_new_tokens: 0, ..options.clone() }, 99).1,
        FinishReason::Length
    );
    let first = all.iter().position(|token| *token == all[4]).unwrap();
    let eos = GenerateOptions { eos_ids: vec![all[4]], ..options.clone() };
    assert_eq!(run(&eos, 99), (all[..first].to_vec(), FinishReason::Eos(all[4])));
    let stop = GenerateOptions { stop: vec![vec![], all[2..4].to_vec()], ..options };
    assert_eq!(run(&stop, 99), (all[..4].to_vec(), FinishReason::Stop));
}

/// From the 17th token on all keys of this model have other divisors, those of the first sixteen as well.
#[test]
fn keys_are_made_anew_where_long_rope_changes() {
    let Some(model) = model("phi3_longrope") else { return };
    let mut session = session();
    let prompt: Vec<u32> = (0..10).map(|i| (i * 37 + 5) % 250).collect();
    let mut text = prompt.clone();
    for _ in 0..12 {
        let mut fresh = [Sequence::new(model.spec())];
        model.forward(&mut session, &mut fresh, &[&text]).unwrap();
        let logits = model.logits(&mut session, Rows::Last).row(0);
        text.push(gptq_compute::argmax(logits).unwrap() as u32);
    }
    let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
    let go_on = |_| ControlFlow::Continue(());
    let done = generate(&model, &mut session, &prompt, &options, go_on).unwrap();
    assert_eq!(done.tokens, text[10..]);
    let options = BatchOptions {
        max_new_tokens: 12,
        sampling: Sampling::default(),
        eos_ids: Vec::new(),
        kv_cache: KvType::F32,
        ignore_eos: true,
        batch: 2,
    };
    let prompts: [&[u32]; 2] = [&prompt, &prompt[..4]];
    let texts = generate_batch(&model, &mut session, &prompts, &options, |_| {}).unwrap();
    assert_eq!(texts[0], text[10..]);
    assert_eq!(texts[1].len(), 12);
}

/// One text's limit is not another's.
#[test]
fn learned_positions_end_one_text_of_a_batch() {
    let Some(model) = model("gpt2") else { return };
    let options = BatchOptions {
        max_new_tokens: 20,
        sampling: Sampling::default(),
        eos_ids: Vec::new(),
        kv_cache: KvType::F32,
        ignore_eos: true,
        batch: 2,
    };
    let prompts: [&[u32]; 2] = [&[5; 60], &[5; 4]];
    let texts = generate_batch(&model, &mut session(), &prompts, &options, |_| {}).unwrap();
    assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [5, 20]);
}

#[test]
fn learned_positions_end_a_generation_and_refuse_a_longer_prompt() {
    let Some(model) = model("gpt2") else { return };
    let mut session = session();
    let options = GenerateOptions { max_new_tokens: 100, ..GenerateOptions::default() };
    let go_on = |_| ControlFlow::Continue(());
    let done = generate(&model, &mut session, &[5; 60], &options, go_on).unwrap();
    assert_eq!((done.tokens.len(), done.finish), (5, FinishReason::Context));
    let error = generate(&model, &mut session, &[5; 65], &options, go_on).unwrap_err();
    assert!(matches!(error, ModelError::Position { limit: 64, .. }), "{error}");
}

#[test]
fn wrong_input_is_an_error_and_leaves_the_sequence_as_it_was() {
    let Some(model) = model("llama") else { return };
    let mut session = session();
    let mut batch = [Sequence::new(model.spec())];
    model.forward(&mut session, &mut batch, &[&PROMPT]).unwrap();
    let error = model.forward(&mut session, &mut batch, &[&[3, 256]]).unwrap_err();
    assert!(matches!(error, ModelError::Token { id: 256, index: 1, vocab: 256 }), "{error}");
    assert_eq!(batch[0].len(), PROMPT.len());
    assert_eq!(model.logits(&mut session, Rows::Last).rows(), 0);
    assert!(matches!(model.forward(&mut session, &mut batch, &[&[]]), Err(ModelError::Batch(_))));
    assert!(matches!(model.forward(&mut session, &mut batch, &[]), Err(ModelError::Batch(_))));
    let options = GenerateOptions { max_new_tokens: 1, ..GenerateOptions::default() };
    assert!(generate(&model, &mut session, &[], &options, |_| ControlFlow::Continue(())).is_err());
}

#[test]
fn many_at_once_equal_one_after_the_other() {
    let Some(model) = model("qwen3") else { return };
    let mut session = session();
    let prompts: [&[u32]; 5] = [&[1], &[1, 9, 30], &[7], &[200, 100], &[1]];
    let mut options = BatchOptions {
        max_new_tokens: 24,
        sampling: Sampling { temperature: 1.0, top_k: 40, seed: 11, ..Sampling::default() },
        eos_ids: vec![],
        kv_cache: KvType::F32,
        ignore_eos: false,
        batch: 1,
    };
    let mut counted = 0;
    let alone =
        generate_batch(&model, &mut session, &prompts, &options, |new| counted += new).unwrap();
    assert_eq!(counted, 5 * 24);
    assert_ne!(alone[0], alone[4], "each prompt has random numbers of its own");
    for batch in [2, 3, 5, 64] {
        options.batch = batch;
        assert_eq!(
            generate_batch(&model, &mut session, &prompts, &options, |_| ()).unwrap(),
            alone,
            "batch {batch}"
        );
    }

    // Ending early changes nothing for the others; ignoring the end changes nothing at all.
    let eos = alone[1][5];
    options.eos_ids = vec![eos];
    let ended = generate_batch(&model, &mut session, &prompts, &options, |_| ()).unwrap();
    for (ended, whole) in ended.iter().zip(&alone) {
        let end = whole.iter().position(|token| *token == eos).unwrap_or(whole.len());
        assert_eq!(ended, &whole[..end]);
    }
    options.ignore_eos = true;
    assert_eq!(generate_batch(&model, &mut session, &prompts, &options, |_| ()).unwrap(), alone);
}

#[test]
fn sequences_of_different_lengths_do_not_mix_their_frequencies() {
    // Dynamic NTK: the rotation depends on the length of the sequence.
    let Some(model) = model("llama_rope_dynamic") else { return };
    let mut session = session();
    let (long, short): (Vec<u32>, Vec<u32>) = ((1..24).collect(), (40..50).collect());
    let mut batch = [Sequence::new(model.spec()), Sequence::new(model.spec())];
    model.forward(&mut session, &mut batch, &[&long, &short]).unwrap();
    let together = model.logits(&mut session, Rows::Last).clone();
    for (row, ids) in [&long, &short].into_iter().enumerate() {
        let mut batch = [Sequence::new(model.spec())];
        model.forward(&mut session, &mut batch, &[ids]).unwrap();
        let alone = model.logits(&mut session, Rows::Last);
        assert_close("alone", alone.row(0), together.row(row), 2e-5);
    }
}

/// Logits behind the last of `ids`, of which 70 are a prompt and the others come one by one.
fn decoded(
    model: &Model,
    ids: &[u32],
    kv: KvType,
    activations: Activations,
    threads: usize,
) -> Vec<f32> {
    let pool = std::sync::Arc::new(gptq_compute::Pool::new(threads));
    let mut session = gptq_model::Session::new(pool);
    session.ctx.scratch.set_activations(activations);
    let mut batch = [Sequence::with_cache(model.spec(), kv)];
    model.forward(&mut session, &mut batch, &[&ids[..70]]).unwrap();
    for id in &ids[70..] {
        model.forward(&mut session, &mut batch, &[&[*id]]).unwrap();
    }
    model.logits(&mut session, Rows::Last).row(0).to_vec()
}

#[test]
fn packed_codes_give_the_same_logits_with_any_number_of_threads() {
    for name in ["quant/b4_g32_sym_desc.gptq", "quant/b4_g32_asym.gptq_v2"] {
        let Some(dir) = fixtures::dir(name) else { continue };
        let options = LoadOptions { head: HeadBits::Eight, ..LoadOptions::default() };
        let model = Model::load_with(&open(&dir), &options).unwrap();
        let ids: Vec<u32> = (0..90).map(|i| i * 37 % 60).collect();
        for activations in [Activations::Int8, Activations::Bf16, Activations::F32] {
            let run = |threads| decoded(&model, &ids, KvType::F16, activations, threads);
            let one = run(1);
            assert_eq!(one, run(2), "{name} {activations:?}");
            assert_eq!(one, run(3), "{name} {activations:?}");
        }
    }
}

#[test]
fn small_caches_and_heads_stay_close_and_do_not_depend_on_threads() {
    let Some(dir) = fixtures::dir("llama") else { return };
    let checkpoint = open(&dir);
    let ids: Vec<u32> = (0..80).map(|i| i * 37 % 251).collect();
    let run = |model: &Model, kv: KvType, threads: usize| {
        decoded(model, &ids, kv, Activations::F32, threads)
    };
    let exact = run(&load(&checkpoint), KvType::F32, 2);
    let size = exact.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let options = LoadOptions { head: HeadBits::Eight, ..LoadOptions::default() };
    let rounded = Model::load_with(&checkpoint, &options).unwrap();
    for (model, kv, share) in [
        // Steps of 2^-11 of a key or value; of 1/127 of the largest of a head, or of a row of the head.
        (&load(&checkpoint), KvType::F16, 1e-3),
        (&load(&checkpoint), KvType::Int8, 2e-2),
        (&rounded, KvType::F32, 2e-2),
    ] {
        let logits = run(model, kv, 1);
        assert_eq!(logits, run(model, kv, 3), "{kv:?}");
        let error = logits.iter().zip(&exact).fold(0.0f32, |m, (x, t)| m.max((x - t).abs()));
        assert!(error > 0.0 && error < share * size, "{kv:?}: {error} of {size}");
    }
}
