//! Gram matrices XᵀX: the Hessians of GPTQ.

use crate::arch::isa;
use crate::gemm::product;
use crate::pairs::{self, triangle, triangle_len};
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Width of the square pieces of the triangle; each is one task.
const PIECE: usize = 192;
/// Width of the squares that are transposed together.
const SQUARE: usize = 32;

/// Accumulates the lower triangle of Σ xᵀx over rows x, in f32.
#[derive(Debug, Clone)]
pub struct Gram {
    /// `[width, width]`, row-major; pieces above the diagonal stay zero.
    sum: Vec<f32>,
    width: usize,
    rows: usize,
    /// Rows are rounded to 16 bits.
    rounds: bool,
}

impl Gram {
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

    /// Adds xᵀx of `x` `[rows, width]`. About rows · width² floating point operations.
    ///
    /// # Panics
    /// If the width differs.
    #[track_caller]
    pub fn accumulate(&mut self, pool: &Pool, x: &Tensor) {
        self.emphasize(pool, x);
        self.rows += x.rows();
    }

    /// Adds xᵀx of rows that were counted already, to give them more weight.
    ///
    /// # Panics
    /// If the width differs.
    #[track_caller]
    pub fn emphasize(&mut self, pool: &Pool, x: &Tensor) {
        assert_eq!(x.cols(), self.width, "width of the Gram matrix");
        if x.rows() == 0 {
            return;
        }
        if self.rounds {
            return pairs::accumulate(isa(), pool, x, None, &mut self.sum);
        }
        let (n, tokens) = (self.width, x.rows());
        let pieces = n.div_ceil(PIECE);
        let sum = RawSlice::new(&mut self.sum);
        pool.run(triangle_len(pieces), &|task| {
            let (i, j) = triangle(task);
            let (row, col) = (i * PIECE, j * PIECE);
            let (rows, cols) = (PIECE.min(n - row), PIECE.min(n - col));
            let x = x.as_slice().as_ptr();
            // SAFETY: each piece of the triangle belongs to one task and lies inside the matrix;
            // x holds x.rows() rows of n.
            unsafe {
                let c = sum.at(row * n + col, (rows - 1) * n + cols);
                product(
                    (rows, cols, tokens),
                    (x.add(row), 1, n),
                    (x.add(col), n, 1),
                    (c, n, 1),
                    true,
                );
            }
        });
    }

    /// The full symmetric matrix `[width, width]`, every element multiplied by `factor`.
    pub fn into_symmetric(mut self, factor: f32) -> Vec<f32> {
        let n = self.width;
        // In squares, so that the lines of a column are used more than once.
        for (first, below) in
            (0..n).step_by(SQUARE).flat_map(|i| (0..=i).step_by(SQUARE).map(move |j| (i, j)))
        {
            for i in first..(first + SQUARE).min(n) {
                for j in below..(below + SQUARE).min(i + 1) {
                    let v = self.sum[i * n + j] * factor;
                    self.sum[i * n + j] = v;
                    self.sum[j * n + i] = v;
                }
            }
        }
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_f64() {
        for (rows, n) in [(3, 5), (40, 192), (33, 577)] {
            let value = |i: usize| ((i * 7919 % 1009) as f32 - 500.0) / 500.0;
            let x = Tensor::from_vec(rows, n, (0..rows * n).map(value).collect());
            let mut g = Gram::new(n);
            g.accumulate(&Pool::new(1), &x);
            let mut h = Gram::new(n);
            h.accumulate(&Pool::new(2), &x);
            g.accumulate(&Pool::new(2), &x);
            h.accumulate(&Pool::new(3), &x);
            assert_eq!(g.rows(), 2 * rows);
            let (g, h) = (g.into_symmetric(0.5), h.into_symmetric(0.5));
            assert_eq!(g, h);
            for i in (0..n).step_by(n / 5) {
                for j in 0..n {
                    let dot = |r: usize| f64::from(x.row(r)[i]) * f64::from(x.row(r)[j]);
                    let want: f64 = (0..rows).map(dot).sum();
                    assert!((f64::from(g[i * n + j]) - want).abs() < 2e-5, "{i} {j}");
                }
            }
        }
    }
}
