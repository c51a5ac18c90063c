//! Decoding allocates nothing once its buffers are warm.

#![allow(unsafe_code, reason = "counting allocations needs an allocator")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{open, session};
use gptq_compute::{Activations, KvType};
use gptq_model::{
    GenerateOptions, HeadBits, LoadOptions, Model, Rows, Sampler, Sampling, Sequence, generate,
};
use gptq_testkit::fixtures;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Buffers that a thread fills with its first tasks: scores, packed and permuted inputs and the like, some of them in two
/// steps. The pool has one worker. An allocation for each token would be three times as many in 24 steps.
const FIRST_TASKS: usize = 8;

/// Allocations of each of 48 steps: up to 56 tokens, since the cache grows by 64 positions at a time.
fn count(model: &Model, kv: KvType, activations: Activations, sequences: usize) -> Vec<usize> {
    let mut session = session();
    session.ctx.scratch.set_activations(activations);
    let mut sampler =
        Sampler::new(Sampling { temperature: 1.0, top_p: 0.9, ..Sampling::default() }, 0).unwrap();
    let mut batch: Vec<Sequence> =
        (0..sequences).map(|_| Sequence::with_cache(model.spec(), kv)).collect();
    let prompts: Vec<&[u32]> = vec![&[1; 8]; sequences];
    model.forward(&mut session, &mut batch, &prompts).unwrap();
    let mut counts = Vec::new();
    let mut next = vec![[0u32; 1]; sequences];
    for _ in 0..48 {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let logits = model.logits(&mut session, Rows::Last);
        for (row, next) in next.iter_mut().enumerate() {
            *next = [sampler.sample(logits.row(row)).unwrap()];
        }
        let mut new: [&[u32]; 4] = [&[]; 4];
        new.iter_mut().zip(&next).for_each(|(new, next)| *new = next);
        model.forward(&mut session, &mut batch, &new[..sequences]).unwrap();
        counts.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
    counts
}

// One test, so that no other thread allocates meanwhile.
#[test]
fn decoding_allocates_nothing() {
    for name in ["llama", "quant/b4_g32_sym_desc.gptq", "gpt_neox", "qwen2_moe"] {
        let Some(dir) = fixtures::dir(name) else { continue };
        let options = LoadOptions { head: HeadBits::Eight, ..LoadOptions::default() };
        let model = Model::load_with(&open(&dir), &options).unwrap();
        for (kv, activations, sequences) in [
            (KvType::F32, Activations::F32, 1),
            (KvType::F16, Activations::Int8, 1),
            (KvType::Int8, Activations::Bf16, 1),
            (KvType::F16, Activations::Int8, 4),
        ] {
            let counts = count(&model, kv, activations, sequences);
            // The first tokens fill the buffers of each thread. Nobody waits for a thread that the
            // system keeps away, so on a busy machine the only worker may fill its buffer later.
            assert!(
                counts[24..].iter().sum::<usize>() <= FIRST_TASKS,
                "{name}, {kv:?}, {activations:?}, {sequences} sequences: {counts:?}"
            );
        }

        let options = GenerateOptions {
            max_new_tokens: 48,
            kv_cache: KvType::F16,
            ..GenerateOptions::default()
        };
        let mut marks = Vec::with_capacity(48);
        let done = generate(&model, &mut session(), &[1; 8], &options, |_| {
            marks.push(ALLOCATIONS.load(Ordering::Relaxed));
            ControlFlow::Continue(())
        });
        assert_eq!(done.unwrap().tokens.len(), 48);
        assert!(marks[47] - marks[24] <= FIRST_TASKS, "{name}: generate");
    }
}
