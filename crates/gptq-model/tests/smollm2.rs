//! The real SmolLM2-135M-Instruct (a Q4_1 GGUF) against transformers on the same dequantized weights.

#![allow(
    clippy::print_stdout,
    reason = "the measured differences are what a reader of a failure wants"
)]

mod common;

use std::ops::ControlFlow;

use common::{load, logits, open, session};
use gptq_compute::argmax;
use gptq_model::{GenerateOptions, generate};
use gptq_testkit::{Expected, assert_relative, fixtures};

/// Where the reference's two best logits are closer than this, their order is rounding.
const CLEAR_GAP: f32 = 1e-3;

/// Largest difference over largest logit, f32 arithmetic through 30 blocks.
const TOLERANCE: f64 = 2e-4;

#[test]
fn top_tokens_logits_and_greedy_text_equal_transformers() {
    let (Some(gguf), Some(expected)) =
        (fixtures::smollm2_gguf(), fixtures::shared_expected("smollm2.safetensors"))
    else {
        return;
    };
    let expected = Expected::open(expected);
    let model = load(&open(&gguf));
    let mut session = session();
    let (_, ids) = expected.tokens("input_ids");
    let got = logits(&model, &mut session, &ids, 1);

    let (_, top_ids) = expected.tokens("top5_ids");
    let (_, top_logits) = expected.f32("top5_logits");
    let mut clear = 0;
    for (position, (ids, want)) in
        top_ids.chunks_exact(5).zip(top_logits.chunks_exact(5)).enumerate()
    {
        let row = got.row(position);
        if want[0] - want[1] > CLEAR_GAP {
            assert_eq!(argmax(row), Some(ids[0] as usize), "position {position}");
            clear += 1;
        }
        let ours: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        assert_relative(&format!("top 5 at position {position}"), &ours, want, TOLERANCE);
    }
    assert!(clear > 500, "only {clear} positions were clear");
    let (_, last) = expected.f32("last_logits");
    let worst = gptq_testkit::difference(got.row(got.rows() - 1), &last);
    println!("last logits: {worst}; {clear} clear positions");
    assert_relative("last logits", got.row(got.rows() - 1), &last, TOLERANCE);

    for (want, prompt) in
        [("greedy_ids", Some("The capital of France is")), ("chat_greedy_ids", None)]
    {
        let (_, want) = expected.tokens(want);
        let prompt = match prompt {
            Some(text) => open(&gguf).tokenizer().unwrap().encode(text, false).unwrap(),
            None => expected.tokens("chat_prompt_ids").1,
        };
        // The expected ids start with the prompt or go on from it.
        let new = want.strip_prefix(&prompt[..]).unwrap_or(&want);
        let options = GenerateOptions { max_new_tokens: new.len(), ..GenerateOptions::default() };
        let done = generate(&model, &mut session, &prompt, &options, |_| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(done.tokens, new);
    }
}
