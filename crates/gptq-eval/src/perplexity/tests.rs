use std::sync::Arc;

use gptq_compute::Pool;
use gptq_format::Checkpoint;
use gptq_testkit::{Expected, fixtures};

use super::*;

fn load(name: &str) -> Option<(Model, Expected)> {
    let dir = fixtures::dir(name)?;
    let model = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    Some((model, Expected::open(dir.join("expected.safetensors"))))
}

/// Negative log-likelihood of a token from transformers' logits.
fn nll(logits: &[f32], target: u32) -> f64 {
    let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    z.ln() - f64::from(logits[target as usize])
}

#[test]
fn both_protocols_follow_their_definition() {
    let Some((model, expected)) = load("llama") else { return };
    let (shape, ids) = expected.tokens("input_ids");
    let (_, logits) = expected.f32("logits");
    let (seqlen, vocab) = (shape[1], logits.len() / ids.len());
    let mut session = Session::new(Arc::new(Pool::new(2)));
    for (protocol, first) in [(Protocol::Gptq, 1), (Protocol::LlamaCpp, seqlen / 2 + 1)] {
        let options = EvalOptions { protocol, seqlen, max_windows: None, bos: None };
        let mut calls = Vec::new();
        let e = evaluate(&model, &mut session, None, &ids, &options, |d, t| calls.push((d, t)))
            .unwrap();
        let scored = |w: usize| (first..seqlen).map(move |i| w * seqlen + i);
        let nlls: Vec<f64> = (0..shape[0])
            .flat_map(scored)
            .map(|i| nll(&logits[(i - 1) * vocab..i * vocab], ids[i]))
            .collect();
        let mean = nlls.iter().sum::<f64>() / nlls.len() as f64;
        assert!((e.perplexity - mean.exp()).abs() < 1e-3 * mean.exp(), "{protocol:?}");
        assert_eq!((e.tokens, e.windows), (nlls.len(), shape[0]));
        assert!(e.perplexity_stderr > 0.0 && e.divergence.is_none());
        assert_eq!(calls.last(), Some(&(2, 2)));
    }
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let Some((model, expected)) = load("llama") else { return };
    let ids = expected.tokens("input_ids").1;
    let (mut a, mut b) =
        (Session::new(Arc::new(Pool::new(1))), Session::new(Arc::new(Pool::new(2))));
    let options =
        EvalOptions { protocol: Protocol::Gptq, seqlen: 16, max_windows: Some(2), bos: None };
    let e =
        evaluate(&model, &mut a, Some(Reference::Model(&model, &mut b)), &ids, &options, |_, _| {})
            .unwrap();
    let d = e.divergence.unwrap();
    assert_eq!((d.kl_max, d.top1_agreement), (0.0, 1.0));
    assert_eq!(e.reference_perplexity, Some(e.perplexity));
}

#[test]
fn a_recording_is_as_good_as_the_model() {
    let Some((reference, expected)) = load("llama") else { return };
    let Some((model, _)) = load("llama_f16") else { return };
    let ids = expected.tokens("input_ids").1;
    let session = || Session::new(Arc::new(Pool::new(2)));
    for protocol in [Protocol::Gptq, Protocol::LlamaCpp] {
        let options = EvalOptions { protocol, seqlen: 16, max_windows: Some(2), bos: Some(3) };
        let (mut a, mut b) = (session(), session());
        let beside = evaluate(
            &model,
            &mut a,
            Some(Reference::Model(&reference, &mut b)),
            &ids,
            &options,
            |_, _| {},
        )
        .unwrap();
        let bytes = Recording::bytes_for(reference.spec(), ids.len(), &options);
        assert_eq!(bytes, 2 * 16 * reference.spec().hidden * 4);
        let (alone, recording) =
            record(&reference, &mut b, &ids, &options, bytes, |_, _| {}).unwrap();
        assert_eq!(Some(alone.perplexity), beside.reference_perplexity);
        let recording = recording.unwrap();
        let kept = Reference::Recording(&recording, reference.head(), &mut b.ctx);
        let again = evaluate(&model, &mut a, Some(kept), &ids, &options, |_, _| {}).unwrap();
        assert_eq!(again, beside, "{protocol:?}");
        assert!(again.divergence.unwrap().kl_mean > 0.0);
        let none = record(&reference, &mut b, &ids, &options, bytes - 1, |_, _| {}).unwrap().1;
        assert!(none.is_none(), "too large to keep");
    }
}

#[test]
fn short_texts_and_windows_are_refused() {
    let Some((model, expected)) = load("llama") else { return };
    let ids = expected.tokens("input_ids").1;
    let mut session = Session::new(Arc::new(Pool::new(1)));
    let mut run_as = |protocol, seqlen, text: &[u32]| {
        let options = EvalOptions { protocol, seqlen, max_windows: None, bos: None };
        evaluate(&model, &mut session, None, text, &options, |_, _| {}).unwrap_err().to_string()
    };
    assert!(run_as(Protocol::LlamaCpp, 2, &ids).contains("--seqlen 3"));
    let mut run = |seqlen, text: &[u32]| run_as(Protocol::Gptq, seqlen, text);
    assert!(run(1, &ids).contains("--seqlen 2"));
    assert!(run(64, &ids).contains("48 tokens"));
    assert!(run(100_000, &ids).contains("positions"));
    assert!(run(2, &[0, 999_999]).contains("outside the vocabulary"));
}
