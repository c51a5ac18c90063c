//! Decoding allocates nothing once its buffers are warm.

#![allow(unsafe_code, reason = "counting allocations needs an allocator")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{load, open, session};
use gptq_model::{Rows, Sampler, Sampling, Sequence};
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

#[test]
fn decoding_allocates_nothing() {
    for name in ["llama", "quant/b4_g32_sym_desc.gptq", "gpt_neox", "qwen2_moe"] {
        let Some(dir) = fixtures::dir(name) else { continue };
        let model = load(&open(&dir));
        let mut session = session();
        let mut sampler =
            Sampler::new(Sampling { temperature: 1.0, top_p: 0.9, ..Sampling::default() }, 0)
                .unwrap();
        let mut batch = [Sequence::new(model.spec())];
        model.forward(&mut session, &mut batch, &[&[1; 8]]).unwrap();
        let mut counts = Vec::new();
        // Up to 56 tokens: the cache grows by 64 positions at a time.
        for _ in 0..48 {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let next = sampler.sample(model.logits(&mut session, Rows::Last).row(0)).unwrap();
            model.forward(&mut session, &mut batch, &[&[next]]).unwrap();
            counts.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
        }
        // The first tokens fill the buffers of each thread.
        assert_eq!(counts[24..].iter().sum::<usize>(), 0, "{name}: {counts:?}");
    }
}
