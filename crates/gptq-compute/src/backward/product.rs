//! Gradients of y = x Wᵀ.

use std::borrow::Cow;

use crate::gemm::product;
use crate::matrix::DenseMatrix;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Rows and columns of the result that one task computes.
const ROWS: usize = 128;
const COLS: usize = 512;

/// dx (+)= dy W: `dy` `[tokens, out]`, `w` `[out, in]`, `dx` `[tokens, in]`, which is resized unless
/// the product is to be added to it.
///
/// # Panics
/// If the widths do not match.
#[track_caller]
pub fn input_gradient(pool: &Pool, dy: &Tensor, w: &DenseMatrix, add: bool, dx: &mut Tensor) {
    let (m, n, k) = (dy.rows(), w.in_features(), w.out_features());
    assert_eq!(dy.cols(), k, "output width");
    let weights = w.as_f32().map_or_else(|| Cow::from(w.to_f32()), Cow::from);
    let (a, b) = (dy.as_slice(), &*weights);
    multiply(pool, (m, n, k), (a, k, 1), (b, n, 1), add, dx);
}

/// dW = dyᵀ x: `dy` `[tokens, out]`, `x` `[tokens, in]`, `dw` resized to `[out, in]`.
///
/// # Panics
/// If the numbers of tokens differ.
#[track_caller]
pub fn weight_gradient(pool: &Pool, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    let (m, n, k) = (dy.cols(), x.cols(), dy.rows());
    assert_eq!(x.rows(), k, "tokens");
    multiply(pool, (m, n, k), (dy.as_slice(), 1, m), (x.as_slice(), n, 1), false, dw);
}

/// C (+)= A B of shape `(m, n, k)`; operands are (elements, row stride, column stride).
fn multiply(
    pool: &Pool,
    (m, n, k): (usize, usize, usize),
    a: (&[f32], usize, usize),
    b: (&[f32], usize, usize),
    add: bool,
    c: &mut Tensor,
) {
    assert!(a.0.len() == m * k && b.0.len() == k * n, "operands of {m} x {n} x {k}");
    if add {
        assert_eq!((c.rows(), c.cols()), (m, n), "shape of the sum");
    } else {
        c.resize(m, n);
    }
    if k == 0 {
        if !add {
            c.as_mut_slice().fill(0.0);
        }
        return;
    }
    let out = RawSlice::new(c.as_mut_slice());
    let (down, across) = (m.div_ceil(ROWS), n.div_ceil(COLS));
    pool.run(down * across, &|task| {
        let (row, col) = (task % down * ROWS, task / down * COLS);
        let (rows, cols) = (ROWS.min(m - row), COLS.min(n - col));
        // SAFETY: the operands hold what shapes and strides reach, as asserted; the pieces of c are
        // disjoint between tasks and in bounds.
        unsafe {
            product(
                (rows, cols, k),
                (a.0.as_ptr().add(row * a.1), a.1, a.2),
                (b.0.as_ptr().add(col * b.2), b.1, b.2),
                (out.at(row * n + col, (rows - 1) * n + cols), n, 1),
                add,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::matrix::DenseType;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 31) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    /// The same weights as f16 that somebody else owns.
    fn narrow(w: &DenseMatrix) -> DenseMatrix {
        let halves = w.to_f32().into_iter().map(half::f16::from_f32);
        let bytes: Vec<u8> = halves.flat_map(half::f16::to_le_bytes).collect();
        let (outputs, inputs) = (w.out_features(), w.in_features());
        DenseMatrix::from_shared(outputs, inputs, DenseType::F16, Arc::new(bytes)).unwrap()
    }

    #[test]
    fn both_match_f64_for_any_thread_count() {
        for (tokens, inputs, outputs) in [(1, 1, 1), (3, 5, 7), (130, 17, 600), (40, 515, 129)] {
            let x = Tensor::from_vec(tokens, inputs, values(tokens * inputs, 1));
            let dy = Tensor::from_vec(tokens, outputs, values(tokens * outputs, 2));
            let w = DenseMatrix::from_f32(outputs, inputs, values(outputs * inputs, 3));
            let w = if tokens == 3 { narrow(&w) } else { w };
            let run = |threads: usize| {
                let pool = Pool::new(threads);
                let (mut dx, mut dw) = (Tensor::default(), Tensor::default());
                input_gradient(&pool, &dy, &w, false, &mut dx);
                input_gradient(&pool, &dy, &w, true, &mut dx);
                weight_gradient(&pool, &dy, &x, &mut dw);
                (dx.as_slice().to_vec(), dw.as_slice().to_vec())
            };
            let (dx, dw) = run(1);
            assert_eq!((dx.clone(), dw.clone()), run(3));
            let weights = w.to_f32();
            let near = |got: f32, want: f64, terms: usize| {
                // Rounding of so many products of magnitude one in f32.
                assert!((f64::from(got) - want).abs() < 2e-7 * terms as f64 + 1e-6);
            };
            for t in 0..tokens {
                for i in 0..inputs {
                    let terms = (0..outputs)
                        .map(|o| f64::from(dy.row(t)[o]) * f64::from(weights[o * inputs + i]));
                    near(dx[t * inputs + i], 2.0 * terms.sum::<f64>(), 2 * outputs);
                }
            }
            for o in 0..outputs {
                for i in 0..inputs {
                    let terms =
                        (0..tokens).map(|t| f64::from(dy.row(t)[o]) * f64::from(x.row(t)[i]));
                    near(dw[o * inputs + i], terms.sum(), tokens);
                }
            }
        }
        let pool = Pool::new(1);
        let mut dw = Tensor::from_vec(1, 1, vec![9.0]);
        weight_gradient(&pool, &Tensor::zeros(0, 2), &Tensor::zeros(0, 3), &mut dw);
        assert_eq!((dw.rows(), dw.cols(), dw.as_slice()), (2, 3, &[0.0; 6][..]));
    }
}
