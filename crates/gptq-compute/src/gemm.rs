//! Products of f32 matrices, by the `gemm` crate, cut into fixed pieces over our own pool.

use std::cell::RefCell;
use std::time::Instant;

use gemm::Parallelism;

use crate::arch::{Kernel, LANES, Simd, dispatch, isa};
use crate::matrix::{DenseMatrix, DenseType, widen};
use crate::pairs;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Up to this many tokens, a product reads the weights row by row and is bound by memory.
const GEMV_TOKENS: usize = 4;
/// Weight rows of one task of the memory-bound path.
const GEMV_ROWS: usize = 32;
/// Tokens of one task of the compute-bound path.
const TOKENS: usize = 256;

thread_local! {
    /// Weights of the current task, widened to f32.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// y = x Wᵀ + b: `x` `[tokens, in]`, `w` `[out, in]`, `bias` `[out]`, `y` resized to
/// `[tokens, out]`.
///
/// # Panics
/// If the widths do not match.
#[track_caller]
pub fn gemm_nt(pool: &Pool, x: &Tensor, w: &DenseMatrix, bias: Option<&[f32]>, y: &mut Tensor) {
    let (m, n, k) = (x.rows(), w.out_features(), w.in_features());
    assert_eq!(x.cols(), k, "input width");
    assert!(bias.is_none_or(|b| b.len() == n), "bias width");
    y.resize(m, n);
    let out = RawSlice::new(y.as_mut_slice());
    if m <= GEMV_TOKENS {
        pool.run(n.div_ceil(GEMV_ROWS), &|task| {
            let first = task * GEMV_ROWS;
            let rows = GEMV_ROWS.min(n - first);
            for token in 0..m {
                // SAFETY: tasks write disjoint columns.
                let y = unsafe { out.range(token * n + first, rows) };
                dispatch(Gemv { w, first, x: x.row(token), y });
                if let Some(b) = bias {
                    y.iter_mut().zip(&b[first..]).for_each(|(y, b)| *y += b);
                }
            }
        });
        return;
    }
    if let Some(packed) = w.pairs() {
        return pairs::product(isa(), pool, x, packed, bias, y);
    }
    // Enough tasks for many threads; the cut depends on the shape alone.
    let columns =
        (n * TOKENS.min(m).next_multiple_of(64) / 2048).clamp(64, 1024).next_multiple_of(64);
    let (row_tasks, col_tasks) = (m.div_ceil(TOKENS), n.div_ceil(columns));
    pool.run(row_tasks * col_tasks, &|task| {
        let (first, col) = (task % row_tasks * TOKENS, task / row_tasks * columns);
        let (rows, cols) = (TOKENS.min(m - first), columns.min(n - col));
        let size = k * w.dtype().size();
        let bytes = &w.as_bytes()[col * size..(col + cols) * size];
        let aligned = bytes.as_ptr().cast::<f32>().is_aligned();
        WIDE.with_borrow_mut(|wide| {
            let weights =
                if w.dtype() == DenseType::F32 && aligned && cfg!(target_endian = "little") {
                    bytes.as_ptr().cast::<f32>()
                } else {
                    wide.resize(cols * k, 0.0);
                    widen(w.dtype(), bytes, wide);
                    wide.as_ptr()
                };
            // SAFETY: the pieces `rows x cols` of y are disjoint between tasks and in bounds; x
            // and the weights hold `rows x k` and `cols x k` elements.
            unsafe {
                let y = out.at(first * n + col, (rows - 1) * n + cols);
                product(
                    (rows, cols, k),
                    (x.as_slice()[first * k..].as_ptr(), k, 1),
                    (weights, 1, k),
                    (y, n, 1),
                    false,
                );
            }
        });
        if let Some(b) = bias {
            for row in first..first + rows {
                // SAFETY: as above.
                let y = unsafe { out.range(row * n + col, cols) };
                y.iter_mut().zip(&b[col..]).for_each(|(y, b)| *y += b);
            }
        }
    });
}

/// C (+)= A B on one thread. Operands are (pointer, row stride, column stride), shapes
/// `(m, n, k)`.
///
/// # Safety
/// All elements that shapes and strides reach must be valid, those of C exclusively.
pub(crate) unsafe fn product(
    (m, n, k): (usize, usize, usize),
    a: (*const f32, usize, usize),
    b: (*const f32, usize, usize),
    c: (*mut f32, usize, usize),
    accumulate: bool,
) {
    gemm::gemm(
        m,
        n,
        k,
        c.0,
        c.2 as isize,
        c.1 as isize,
        accumulate,
        a.0,
        a.2 as isize,
        a.1 as isize,
        b.0,
        b.2 as isize,
        b.1 as isize,
        1.0f32,
        1.0f32,
        false,
        false,
        false,
        Parallelism::None,
    );
}

/// y[r] = w[first + r] · x, four rows in flight.
struct Gemv<'a> {
    w: &'a DenseMatrix,
    first: usize,
    x: &'a [f32],
    y: &'a mut [f32],
}

/// Loads 16 elements of a stored type as f32. A trait and not a closure: closures are not compiled
/// inside the `#[target_feature]` function, which would put a call around every load.
trait Element {
    const SIZE: usize;

    /// # Safety
    /// 16 elements at `p` are readable and the processor has the instruction set of `S`.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        S::load(p.cast())
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        S::load_f16(p.cast())
    }
}

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        S::load_bf16(p.cast())
    }
}

impl Kernel for Gemv<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.w.dtype() {
            DenseType::F32 => rows::<S, F32>(self),
            DenseType::F16 => rows::<S, F16>(self),
            DenseType::Bf16 => rows::<S, Bf16>(self),
        }
    }
}

/// # Safety
/// The processor must have the instruction set of `S`.
#[inline(always)]
unsafe fn rows<S: Simd, E: Element>(gemv: Gemv<'_>) {
    let Gemv { w, first, x, y } = gemv;
    let k = w.in_features();
    let whole = k - k % LANES;
    // Row r occupies bytes[r * k * SIZE..][..k * SIZE].
    let bytes = &w.as_bytes()[first * k * E::SIZE..(first + y.len()) * k * E::SIZE];
    let mut tail = [0.0f32; LANES];
    tail[..k - whole].copy_from_slice(&x[whole..]);
    let mut done = 0;
    while done < y.len() {
        // Four rows in flight; the last ones are repeated where fewer are left.
        let mut p = [bytes.as_ptr(); 4];
        for r in 0..4 {
            p[r] = p[r].add((done + r).min(y.len() - 1) * k * E::SIZE);
        }
        let mut acc = [S::splat(0.0); 4];
        let mut i = 0;
        while i < whole {
            let v = S::load(x.as_ptr().add(i));
            for r in 0..4 {
                S::prefetch(p[r].wrapping_add(i * E::SIZE + GEMV_PREFETCH));
                acc[r] = S::fma(E::load::<S>(p[r].add(i * E::SIZE)), v, acc[r]);
            }
            i += LANES;
        }
        if whole < k {
            let v = S::load(tail.as_ptr());
            for r in 0..4 {
                // Copied, so that no load reaches behind the row.
                let mut end = [0u8; LANES * SIZE_MAX];
                let from = p[r].add(whole * E::SIZE);
                std::ptr::copy_nonoverlapping(from, end.as_mut_ptr(), (k - whole) * E::SIZE);
                acc[r] = S::fma(E::load::<S>(end.as_ptr()), v, acc[r]);
            }
        }
        for (r, y) in y[done..].iter_mut().take(4).enumerate() {
            *y = S::sum(acc[r]);
        }
        done += 4;
    }
}

/// How far ahead to prefetch, in bytes.
const GEMV_PREFETCH: usize = 2048;
/// Largest element size of a [`DenseType`].
const SIZE_MAX: usize = 4;

/// The f32 rate of this machine: the best of a few products of `size` x `size` matrices with all
/// threads of `pool`, in floating point operations per second. 512 give an estimate within some
/// tens of milliseconds, 1536 the peak.
pub fn gemm_peak_rate(pool: &Pool, size: usize) -> f64 {
    let values = (0..size * size).map(|i| (i % 17) as f32 - 8.0);
    let x = Tensor::from_vec(size, size, values.collect());
    let w = DenseMatrix::from_f32(size, size, x.as_slice().to_vec());
    let mut y = Tensor::default();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        gemm_nt(pool, &x, &w, None, &mut y);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (size as f64).powi(3) / best
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use half::{bf16, f16};

    use super::*;

    fn random(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn matches_f64_and_any_thread_count() {
        let (one, three) = (Pool::new(1), Pool::new(3));
        for (m, n, k) in [(1, 5, 7), (1, 70, 576), (3, 33, 40), (5, 64, 16), (300, 130, 50)] {
            let x = Tensor::from_vec(m, k, random(m * k, 1));
            let w = random(n * k, 2);
            let bias = random(n, 3);
            let as16: Vec<u8> = w.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
            let asb: Vec<u8> = w.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let shared = |t, b: Vec<u8>| DenseMatrix::from_shared(n, k, t, Arc::new(b)).unwrap();
            for w in [
                DenseMatrix::from_f32(n, k, w.clone()),
                shared(DenseType::F16, as16),
                shared(DenseType::Bf16, asb),
            ] {
                let (mut y, mut z) = (Tensor::default(), Tensor::default());
                gemm_nt(&one, &x, &w, Some(&bias), &mut y);
                gemm_nt(&three, &x, &w, Some(&bias), &mut z);
                assert_eq!(y.as_slice(), z.as_slice());
                let w = w.to_f32();
                for i in 0..m {
                    for j in 0..n {
                        let t: f64 = (0..k)
                            .map(|l| f64::from(x.row(i)[l]) * f64::from(w[j * k + l]))
                            .sum::<f64>()
                            + f64::from(bias[j]);
                        // Rounding of k products of magnitude one in f32.
                        let tolerance = 1e-7 * k as f64 + 1e-6;
                        assert!((f64::from(y.row(i)[j]) - t).abs() < tolerance, "{m} {n} {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_rounding_weights_are_as_close_as_bfloat16_is() {
        let (n, k) = (70, 45);
        let value = |i: usize| ((i * 7919 % 1009) as f32 - 500.0) / 500.0;
        let w = DenseMatrix::from_f32(n, k, (0..n * k).map(value).collect::<Vec<_>>());
        let bias: Vec<f32> = (0..n).map(value).collect();
        let pool = Pool::new(2);
        let rounding = w.clone().rounding(&pool);
        for tokens in [1, GEMV_TOKENS + 1, 300] {
            let x = Tensor::from_vec(tokens, k, (9..tokens * k + 9).map(value).collect());
            let [mut exact, mut got] = [Tensor::default(), Tensor::default()];
            gemm_nt(&pool, &x, &w, Some(&bias), &mut exact);
            gemm_nt(&pool, &x, &rounding, Some(&bias), &mut got);
            for (got, exact) in got.as_slice().iter().zip(exact.as_slice()) {
                // Both factors of k products, each below 1, are 2⁻⁹ of themselves away at most.
                assert!((got - exact).abs() < 2.0 * k as f32 / 512.0, "{got} {exact}");
            }
        }
    }

    #[test]
    fn wrong_byte_counts_are_refused() {
        assert!(DenseMatrix::from_shared(2, 3, DenseType::F16, Arc::new(vec![0u8; 11])).is_err());
    }
}
