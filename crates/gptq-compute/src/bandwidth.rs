//! The rate at which this machine reads memory: the limit of decoding.

use std::time::Instant;

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::pool::Pool;

/// Far larger than any cache.
const BYTES: usize = 512 << 20;
/// Bytes of one task.
const CHUNK: usize = 1 << 20;

/// Adds up a chunk in eight independent chains, so that loads are never waited for.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let mut acc = [S::splat(0.0); 8];
        for piece in self.0.chunks_exact(8 * LANES) {
            for (i, a) in acc.iter_mut().enumerate() {
                let p = piece.as_ptr().add(i * LANES);
                S::prefetch(p.wrapping_add(1024).cast());
                *a = S::add(*a, S::load(p));
            }
        }
        acc.into_iter().map(|a| S::sum(a)).sum()
    }
}

/// Bytes per second that all threads of `pool` together read from memory: the best of five passes
/// over 512 MiB.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    let data = vec![1.0f32; BYTES / size_of::<f32>()];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        pool.run(BYTES / CHUNK, &|task| {
            let len = CHUNK / size_of::<f32>();
            std::hint::black_box(dispatch(Sum(&data[task * len..(task + 1) * len])));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / best
}
