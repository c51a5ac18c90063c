//! The rate at which this machine reads memory: the limit of decoding.

use std::time::Instant;

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::arena::Arena;
use crate::pool::Pool;
use crate::quantized::PREFETCH;

/// Far larger than any cache.
const LEAST: usize = 256 << 20;
/// Bytes of one task.
const CHUNK: usize = 1 << 20;
const VECTOR_BYTES: usize = LANES * 4;

/// Adds up a chunk in eight independent chains, so that loads are never waited for.
struct Sum<'a>(&'a [u8]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let mut acc = [S::splat(0.0); 8];
        for piece in self.0.chunks_exact(8 * VECTOR_BYTES) {
            for (i, a) in acc.iter_mut().enumerate() {
                let p = piece.as_ptr().add(i * VECTOR_BYTES);
                S::prefetch(p.wrapping_add(PREFETCH));
                *a = S::add(*a, S::load(p.cast()));
            }
        }
        acc.into_iter().map(|a| S::sum(a)).sum()
    }
}

/// Memory to measure the read bandwidth with, on huge pages as weights are.
pub struct BandwidthProbe(Arena);

impl BandwidthProbe {
    /// Takes `bytes`, up to a whole MiB and at least 256 of them, which no cache holds. The rate falls
    /// somewhat with the size, as translations of addresses do not fit into caches either.
    pub fn new(bytes: usize) -> Self {
        let mut arena = Arena::zeroed(bytes.max(LEAST).next_multiple_of(CHUNK));
        // Pages that were never written are all the same one.
        arena.as_mut_slice().fill(1);
        Self(arena)
    }

    /// Bytes per second that all threads of `pool` together read, in one pass over the buffer.
    pub fn measure(&self, pool: &Pool) -> f64 {
        let data = self.0.as_slice();
        let start = Instant::now();
        pool.run(data.len() / CHUNK, &|task| {
            std::hint::black_box(dispatch(Sum(&data[task * CHUNK..][..CHUNK])));
        });
        data.len() as f64 / start.elapsed().as_secs_f64()
    }
}
