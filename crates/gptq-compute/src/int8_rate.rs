//! The rate at which this machine multiplies bytes: the limit of prefill in int8.

use std::time::Instant;

use crate::arch::{Kernel, LANES, Simd, dispatch_dot, isa};
use crate::pool::Pool;

/// Tokens and vectors of outputs of the tile: enough independent sums to hide the latency of one.
const TOKENS: usize = 12;
const VECTORS: usize = 2;
/// Products of one task, about: some tens of microseconds.
const STEPS: usize = 24 * 5_000;
/// Tasks per thread.
const TASKS: usize = 4;
/// Products of a sum, as in a block of inputs.
const BLOCK: usize = 8;
/// Runs, of which the best counts.
const RUNS: usize = 50;

/// The inner loop of a tile without what surrounds it: weights in registers, activations from the
/// first level cache.
struct Tile;

impl Kernel for Tile {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let mut acc = [[S::splat_i32(0); VECTORS]; TOKENS];
        let mut w = [S::splat_i32(0); VECTORS];
        for (i, w) in w.iter_mut().enumerate() {
            *w = S::splat_i32(std::hint::black_box(0x0102_0304 + i as i32));
        }
        let x = [0x0403_0201; TOKENS];
        // As many sums as registers hold.
        let (tokens, vectors) = if S::WIDE { (TOKENS, VECTORS) } else { (4, 1) };
        for _ in 0..STEPS / (tokens * vectors * BLOCK) {
            for _ in 0..BLOCK {
                // A new place for all that the compiler knows, so that no product is computed once only.
                let x = std::hint::black_box(&x);
                for i in 0..tokens {
                    let x = S::splat_i32(x[i]);
                    for v in 0..vectors {
                        acc[i][v] = S::dot(4, acc[i][v], w[v], x);
                    }
                }
            }
            // What the sums are does not matter, but that they are finished.
            for i in 0..tokens {
                for v in 0..vectors {
                    acc[i][v] = S::dot_end(4, acc[i][v], S::splat_i32(0));
                }
            }
        }
        let mut sum = 0.0;
        for a in acc.as_flattened() {
            sum += S::sum(S::to_f32(*a));
        }
        sum
    }
}

/// Multiplications and additions of bytes per second that all threads of `pool` together do in
/// the inner loop of a tile, with the instruction set of this process: the best of many short runs.
pub fn int8_peak_rate(pool: &Pool) -> f64 {
    let tasks = pool.threads() * TASKS;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        pool.run(tasks, &|_| {
            std::hint::black_box(dispatch_dot(isa(), Tile));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    // 16 lanes of four products, each one multiplication and one addition.
    (tasks * STEPS * LANES * 4 * 2) as f64 / best
}
