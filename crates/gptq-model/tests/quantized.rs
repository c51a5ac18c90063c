//! GPTQ checkpoints written by GPTQModel: our logits, computed from the packed codes, against those of a float32 Llama with
//! dequantized weights.

#![allow(
    clippy::print_stdout,
    reason = "the measured differences are what a reader of a failure wants"
)]

mod common;

use common::{load, logits, open, session};
use gptq_format::Checkpoint;
use gptq_testkit::{Expected, assert_relative, fixtures};

/// Largest difference over largest logit. Only the order of summation differs: the weights are the same to the bit.
const TOLERANCE: f64 = 2e-5;

#[test]
fn logits_equal_those_of_dequantized_weights() {
    let mut session = session();
    let mut tested = 0;
    for (name, dir) in fixtures::quantized() {
        // GPTQModel's planar layout is not a published GPTQ format; it must be refused, not guessed.
        if name.ends_with(".gptq_p") {
            let message = Checkpoint::open(&dir).err().map(|error| error.to_string());
            assert!(
                message.is_some_and(|message| message.contains("gptq_p")),
                "{name} was not refused"
            );
            continue;
        }
        let expected = Expected::open(dir.join("expected.safetensors"));
        let (shape, ids) = expected.tokens("input_ids");
        let model = load(&open(&dir));
        let got = logits(&model, &mut session, &ids, shape[0]);
        let (_, want) = expected.f32("logits");
        println!("{name}: {}", gptq_testkit::difference(got.as_slice(), &want));
        assert_relative(&name, got.as_slice(), &want, TOLERANCE);
        tested += 1;
    }
    println!("{tested} quantized checkpoints");
}
