//! Sums of products of two inputs, and their way through the factor of an inverse Hessian: what
//! solvers need that know how far the inputs of a layer are from those of the float model.

use crate::arch::isa;
use crate::gemm::product;
use crate::pairs;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Width of the square pieces of the sum; each is one task.
const PIECE: usize = 192;
/// Rows that one task takes through the factor.
const ROWS: usize = 64;

/// Accumulates Σ xᵀy over pairs of rows x and y of one width, in f32.
#[derive(Debug, Clone)]
pub struct Cross {
    /// `[width, width]`, row-major: rows by x, columns by y.
    sum: Vec<f32>,
    width: usize,
    rows: usize,
    /// Rows are rounded to 16 bits.
    rounds: bool,
}

impl Cross {
    /// An empty sum for rows of `width`.
    pub fn new(width: usize) -> Self {
        Self { sum: vec![0.0; width * width], width, rows: 0, rounds: false }
    }

    /// The same for rows that may be rounded to 16 bits, which is done where the processor multiplies
    /// pairs of these.
    pub fn rounding(width: usize) -> Self {
        Self { rounds: crate::arch::pairs(isa()).is_some(), ..Self::new(width) }
    }

    /// Width of the rows.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows accumulated so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds xᵀy of `x` and `y`, both `[rows, width]`. About 2 · rows · width² floating point operations.
    ///
    /// # Panics
    /// If the shapes differ.
    #[track_caller]
    pub fn accumulate(&mut self, pool: &Pool, x: &Tensor, y: &Tensor) {
        self.emphasize(pool, x, y);
        self.rows += x.rows();
    }

    /// Adds xᵀy of rows that were counted already, to give them more weight.
    ///
    /// # Panics
    /// If the shapes differ.
    #[track_caller]
    pub fn emphasize(&mut self, pool: &Pool, x: &Tensor, y: &Tensor) {
        let (n, rows) = (self.width, x.rows());
        assert!(x.cols() == n && y.cols() == n && y.rows() == rows, "shapes of a pair");
        if rows == 0 {
            return;
        }
        if self.rounds {
            return pairs::accumulate(isa(), pool, x, Some(y), &mut self.sum);
        }
        let pieces = n.div_ceil(PIECE);
        let sum = RawSlice::new(&mut self.sum);
        pool.run(pieces * pieces, &|task| {
            let (i, j) = (task / pieces * PIECE, task % pieces * PIECE);
            let (height, width) = (PIECE.min(n - i), PIECE.min(n - j));
            // SAFETY: each piece of the sum belongs to one task and lies inside of it; x and y hold
            // `rows` rows of n.
            unsafe {
                let c = sum.at(i * n + j, (height - 1) * n + width);
                product(
                    (height, width, rows),
                    (x.as_slice().as_ptr().add(i), 1, n),
                    (y.as_slice().as_ptr().add(j), n, 1),
                    (c, n, 1),
                    true,
                );
            }
        });
    }

    /// The matrix `[width, width]`, every element multiplied by `factor`.
    pub fn into_matrix(mut self, factor: f32) -> Vec<f32> {
        self.sum.iter_mut().for_each(|v| *v *= factor);
        self.sum
    }
}

/// Multiplies `rows` `[_, n]` by H⁻¹ = Uᵀ U from the right, for U `[n, n]` upper, row-major. With
/// `behind` row i sees the columns behind i alone: it is multiplied by the inverse of the part of H
/// behind i, and the rest of it becomes zero.
///
/// # Panics
/// If lengths do not fit.
#[track_caller]
pub fn times_inverse(pool: &Pool, upper: &[f32], n: usize, rows: &mut [f32], behind: bool) {
    assert_eq!(upper.len(), n * n, "factor");
    assert_eq!(rows.len() % n.max(1), 0, "rows");
    let count = rows.len() / n.max(1);
    let rows = RawSlice::new(rows);
    pool.run(count.div_ceil(ROWS), &|task| {
        let first = task * ROWS;
        let height = ROWS.min(count - first);
        let mut turned = vec![0.0f32; height * n];
        // SAFETY: the rows of a task are its own; all operands hold what their shapes say.
        unsafe {
            let rows = rows.range(first * n, height * n);
            product(
                (height, n, n),
                (rows.as_ptr(), n, 1),
                (upper.as_ptr(), 1, n),
                (turned.as_mut_ptr(), n, 1),
                false,
            );
            if behind {
                for (i, row) in turned.chunks_exact_mut(n).enumerate() {
                    row[..=(first + i).min(n - 1)].fill(0.0);
                }
            }
            product(
                (height, n, n),
                (turned.as_ptr(), n, 1),
                (upper.as_ptr(), n, 1),
                (rows.as_mut_ptr(), n, 1),
                false,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cholesky::inverse_factor;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    #[test]
    fn sums_match_f64_and_no_thread_changes_them() {
        for (rows, n) in [(3, 5), (40, 192), (33, 401)] {
            let x = Tensor::from_vec(rows, n, values(rows * n, 1));
            let y = Tensor::from_vec(rows, n, values(rows * n, 2));
            let sum = |threads| {
                let mut sum = Cross::new(n);
                sum.accumulate(&Pool::new(threads), &x, &y);
                sum.accumulate(&Pool::new(threads), &x, &y);
                sum.into_matrix(0.5)
            };
            let got = sum(1);
            assert_eq!(got, sum(3));
            for i in (0..n).step_by(n / 5) {
                for j in 0..n {
                    let dot = |r: usize| f64::from(x.row(r)[i]) * f64::from(y.row(r)[j]);
                    let want: f64 = (0..rows).map(dot).sum();
                    assert!((f64::from(got[i * n + j]) - want).abs() < 2e-5, "{i} {j}");
                }
            }
        }
    }

    /// H · (row · H⁻¹) gives the row back, of the part of H that the row sees.
    #[test]
    fn rows_times_the_inverse_solve_for_the_hessian() {
        let n = 83;
        let b = values(2 * n * n, 3);
        let mut h = vec![0.0f32; n * n];
        for i in 0..n {
            for j in 0..n {
                let dot: f32 = (0..2 * n).map(|t| b[t * n + i] * b[t * n + j]).sum();
                h[i * n + j] = dot / n as f32 + if i == j { 0.3 } else { 0.0 };
            }
        }
        let upper = inverse_factor(h.clone(), n).unwrap();
        let rows = values(n * n, 4);
        for behind in [false, true] {
            let mut solved = rows.clone();
            times_inverse(&Pool::new(2), &upper, n, &mut solved, behind);
            let mut same = rows.clone();
            times_inverse(&Pool::new(1), &upper, n, &mut same, behind);
            assert_eq!(solved, same);
            for i in 0..n {
                let from = if behind { i + 1 } else { 0 };
                assert!(solved[i * n..i * n + from].iter().all(|&v| v == 0.0));
                for j in from..n {
                    let back: f64 = (from..n)
                        .map(|k| f64::from(solved[i * n + k]) * f64::from(h[k * n + j]))
                        .sum();
                    assert!((back - f64::from(rows[i * n + j])).abs() < 1e-4, "{i} {j} {back}");
                }
            }
        }
    }
}
