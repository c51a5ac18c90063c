//! XᵀX, XᵀY and XWᵀ in products of bfloat16: two in a lane that are added, sums in f32.

use std::ops::Range;

use crate::arch::{Isa, Kernel, LANES, Simd, dispatch, dispatch_pairs};
use crate::math::to_bf16;
use crate::matrix::DenseMatrix;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Tokens that are packed at a time: few barriers, and all fit into a last level cache.
const TOKENS: usize = 512;
const PAIRS: usize = TOKENS / 2;
/// Vectors and columns of a panel; a piece of the sum is a panel of rows by one of columns.
const VECTORS: usize = 4;
const PANEL: usize = VECTORS * LANES;
/// Rows whose sums are in registers together.
const ROWS: usize = 4;
/// Pairs that are summed before they are added to the result: a panel of columns, and the lines that hold the rows,
/// stay in the first level cache.
const BLOCK: usize = 64;
/// Tokens of one task of [`product`].
const PRODUCT_TOKENS: usize = 256;

/// Adds xᵀy of `x` and `y`, both `[rows, n]`, to `sum` `[n, n]`; without y it is xᵀx, and only its panels on and below
/// the diagonal.
pub(crate) fn accumulate(isa: Isa, pool: &Pool, x: &Tensor, y: Option<&Tensor>, sum: &mut [f32]) {
    let n = x.cols();
    let panels = n.div_ceil(PANEL);
    let sides: &[&Tensor] = &[&[x], y.as_slice()].concat();
    // `[panel][pair of tokens][PANEL]`, of x and of y.
    let mut packed = vec![0u32; sides.len() * panels * PAIRS * PANEL];
    let tasks = if y.is_some() { panels * panels } else { triangle_len(panels) };
    let sum = RawSlice::new(sum);
    for first in (0..x.rows()).step_by(TOKENS) {
        let tokens = first..(first + TOKENS).min(x.rows());
        let pairs = tokens.len().div_ceil(2);
        let target = RawSlice::new(&mut packed);
        pool.run(sides.len() * panels, &|task| {
            let (x, panel) = (sides[task / panels], task % panels);
            // SAFETY: panels are disjoint.
            let to = unsafe { target.range(task * PAIRS * PANEL, pairs * PANEL) };
            let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
            dispatch(Pack { x, tokens: tokens.clone(), columns, to });
        });
        pool.run(tasks, &|task| {
            let (row, column) =
                if y.is_some() { (task / panels, task % panels) } else { triangle(task) };
            let panel = |index: usize| &packed[index * PAIRS * PANEL..][..pairs * PANEL];
            // Those of y lie behind those of x.
            let of_columns = (sides.len() - 1) * panels + column;
            let size = |index: usize| PANEL.min(n - index * PANEL);
            let (rows, columns) = (size(row), size(column));
            let at = row * PANEL * n + column * PANEL;
            // Each piece of the sum belongs to one task and lies inside the matrix.
            let out = sum.at(at, (rows - 1) * n + columns);
            let (rows_of_x, columns_of_y) = (panel(row), panel(of_columns));
            let size = (rows, columns);
            let strides = (1, PANEL);
            let (rows, columns) = (rows_of_x, columns_of_y);
            dispatch_pairs(isa, Piece { rows, strides, columns, out, n, size });
        });
    }
}

/// Weights as [`product`] reads them: `[panel of outputs][pair of inputs][PANEL]`.
pub(crate) fn pack_weights(pool: &Pool, w: &DenseMatrix) -> Vec<u32> {
    let (n, k) = (w.out_features(), w.in_features());
    let pairs = k.div_ceil(2);
    let mut packed = vec![0u32; n.div_ceil(PANEL) * pairs * PANEL];
    let target = RawSlice::new(&mut packed);
    pool.run(n.div_ceil(PANEL), &|panel| {
        // SAFETY: panels are disjoint.
        let to = unsafe { target.range(panel * pairs * PANEL, pairs * PANEL) };
        let mut row = vec![0.0; k];
        for output in panel * PANEL..((panel + 1) * PANEL).min(n) {
            w.row_to_f32(output, &mut row);
            for (to, of_row) in to[output % PANEL..].iter_mut().step_by(PANEL).zip(row.chunks(2)) {
                *to = pair(of_row);
            }
        }
    });
    packed
}

fn pair(values: &[f32]) -> u32 {
    to_bf16(values[0]).to_bits() >> 16 | values.get(1).map_or(0, |x| to_bf16(*x).to_bits())
}

/// y = x Wᵀ + b: `x` `[tokens, in]`, W packed by [`pack_weights`], `bias` `[out]`, `y` `[tokens, out]`.
pub(crate) fn product(
    isa: Isa,
    pool: &Pool,
    x: &Tensor,
    packed: &[u32],
    bias: Option<&[f32]>,
    y: &mut Tensor,
) {
    let n = y.cols();
    let (tokens, pairs) = (x.rows(), x.cols().div_ceil(2));
    let mut rows = vec![0u32; tokens * pairs];
    let (target, out) = (RawSlice::new(&mut rows), RawSlice::new(y.as_mut_slice()));
    let blocks = tokens.div_ceil(PRODUCT_TOKENS);
    let block = |index: usize| {
        let first = index * PRODUCT_TOKENS;
        first..(first + PRODUCT_TOKENS).min(tokens)
    };
    pool.run(blocks, &|index| {
        for token in block(index) {
            // SAFETY: blocks of rows are disjoint.
            let (to, y) = unsafe { (target.range(token * pairs, pairs), out.range(token * n, n)) };
            dispatch(PackRow { x: x.row(token), to });
            match bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(0.0),
            }
        }
    });
    pool.run(n.div_ceil(PANEL) * blocks, &|task| {
        let (panel, block) = (task / blocks, block(task % blocks));
        let columns = PANEL.min(n - panel * PANEL);
        // Each piece of y belongs to one task and lies inside of it.
        let out = out.at(block.start * n + panel * PANEL, (block.len() - 1) * n + columns);
        let rows = &rows[block.start * pairs..block.end * pairs];
        let weights = &packed[panel * pairs * PANEL..][..pairs * PANEL];
        let (strides, size) = ((pairs, 1), (block.len(), columns));
        dispatch_pairs(isa, Piece { rows, strides, columns: weights, out, n, size });
    });
}

/// Neighbours of a row, as pairs of bfloat16.
struct PackRow<'a> {
    x: &'a [f32],
    to: &'a mut [u32],
}

impl Kernel for PackRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (whole, rest) = self.x.as_chunks::<2>();
        for (to, of_row) in self.to.iter_mut().zip(whole) {
            *to = to_bf16(of_row[0]).to_bits() >> 16 | to_bf16(of_row[1]).to_bits();
        }
        if let (Some(to), false) = (self.to.last_mut(), rest.is_empty()) {
            *to = pair(rest);
        }
    }
}

/// Pieces of a lower triangle with `rows` rows of them.
pub(crate) fn triangle_len(rows: usize) -> usize {
    rows * (rows + 1) / 2
}

/// Row and column of piece `index` of a lower triangle, counted row by row.
pub(crate) fn triangle(index: usize) -> (usize, usize) {
    let mut row = 0;
    let mut start = 0;
    while start + row < index {
        start += row + 1;
        row += 1;
    }
    (row, index - start)
}

/// Columns of some tokens, as pairs of bfloat16.
struct Pack<'a> {
    x: &'a Tensor,
    tokens: Range<usize>,
    columns: Range<usize>,
    /// `[pair][PANEL]`; what is behind the columns keeps its zeros.
    to: &'a mut [u32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (token, to) in self.tokens.clone().step_by(2).zip(self.to.chunks_exact_mut(PANEL)) {
            let low = &self.x.row(token)[self.columns.clone()];
            if token + 1 < self.tokens.end {
                let high = &self.x.row(token + 1)[self.columns.clone()];
                for ((to, &low), &high) in to.iter_mut().zip(low).zip(high) {
                    *to = to_bf16(low).to_bits() >> 16 | to_bf16(high).to_bits();
                }
            } else {
                to.iter_mut().zip(low).for_each(|(to, &low)| *to = to_bf16(low).to_bits() >> 16);
            }
        }
    }
}

/// One piece of a sum: rows by a panel of columns.
struct Piece<'a> {
    /// Row i has pair p at i and p times these strides.
    rows: &'a [u32],
    strides: (usize, usize),
    /// `[pairs][PANEL]`
    columns: &'a [u32],
    /// The rows of the piece, `n` apart, which it is added to; nobody else may touch their elements.
    out: *mut f32,
    n: usize,
    size: (usize, usize),
}

impl Kernel for Piece<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (row_stride, pair_stride) = self.strides;
        for (block, columns) in self.columns.chunks(BLOCK * PANEL).enumerate() {
            for first in (0..self.size.0).step_by(ROWS) {
                // Behind the last row it is computed once more, and dropped.
                let row = |i: usize| (first + i).min(self.size.0 - 1) * row_stride;
                let rows: [usize; ROWS] = std::array::from_fn(row);
                let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
                for (p, columns) in columns.chunks_exact(PANEL).enumerate() {
                    let at = (block * BLOCK + p) * pair_stride;
                    let mut b = [S::splat_i32(0); VECTORS];
                    for v in 0..VECTORS {
                        b[v] = S::load_i32(columns.as_ptr().add(v * LANES));
                    }
                    for i in 0..ROWS {
                        let a = S::splat_i32(*self.rows.as_ptr().add(rows[i] + at) as i32);
                        for v in 0..VECTORS {
                            acc[i][v] = S::dot_pairs(acc[i][v], b[v], a);
                        }
                    }
                }
                for (i, acc) in acc.into_iter().enumerate().take(self.size.0 - first) {
                    let out = self.out.add((first + i) * self.n);
                    if self.size.1 == PANEL {
                        for (v, acc) in acc.into_iter().enumerate() {
                            let out = out.add(v * LANES);
                            S::store(out, S::add(S::load(out), acc));
                        }
                        continue;
                    }
                    let mut sums = [0.0f32; PANEL];
                    for (v, acc) in acc.into_iter().enumerate() {
                        S::store(sums.as_mut_ptr().add(v * LANES), acc);
                    }
                    for (j, sum) in sums.into_iter().enumerate().take(self.size.1) {
                        *out.add(j) += sum;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn matches_f64_on_every_instruction_set_and_thread_count() {
        let isas = Isa::available().into_iter().filter(|&isa| crate::arch::has_pairs(isa));
        for isa in isas {
            for (rows, n) in [(1, 1), (3, 5), (TOKENS, PANEL), (2 * TOKENS + 7, 3 * PANEL + 9)] {
                let value = |i: usize| ((i * 7919 % 1009) as f32 - 500.0) / 500.0;
                let x = Tensor::from_vec(rows, n, (0..rows * n).map(value).collect());
                let y = Tensor::from_vec(rows, n, (7..rows * n + 7).map(value).collect());
                for y in [None, Some(&y)] {
                    let sums = [1, 2, 3].map(|threads| {
                        let mut sum = vec![0.5; n * n];
                        accumulate(isa, &Pool::new(threads), &x, y, &mut sum);
                        sum
                    });
                    assert!(sums[0] == sums[1] && sums[1] == sums[2]);
                    for i in 0..n {
                        for j in 0..if y.is_some() { n } else { i + 1 } {
                            let at = |t: &Tensor, r: usize, c: usize| {
                                bf16::from_f32(t.row(r)[c]).to_f64()
                            };
                            let product = |r| at(&x, r, i) * at(y.unwrap_or(&x), r, j);
                            let want: f64 = (0..rows).map(product).sum::<f64>() + 0.5;
                            // Each of `PAIRS` additions rounds by 2⁻²⁴ of a sum that `rows` bounds, a tenth of
                            // them the same way.
                            let limit = 0.1 * PAIRS as f64 * 2f64.powi(-24) * (rows as f64 + 1.0);
                            assert!(
                                (f64::from(sums[0][i * n + j]) - want).abs() < limit,
                                "{isa:?} {i} {j}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_match_f64_on_every_instruction_set_and_thread_count() {
        let isas = Isa::available().into_iter().filter(|&isa| crate::arch::has_pairs(isa));
        for isa in isas {
            for (tokens, n, k) in
                [(1, 1, 1), (5, 70, 3), (PRODUCT_TOKENS + 3, PANEL, 2 * BLOCK), (7, 9, 301)]
            {
                let value = |i: usize| ((i * 7919 % 1009) as f32 - 500.0) / 500.0;
                let x = Tensor::from_vec(tokens, k, (0..tokens * k).map(value).collect());
                let w: Vec<f32> = (3..n * k + 3).map(value).collect();
                let dense = DenseMatrix::from_f32(n, k, w.clone());
                let results = [1, 2, 3].map(|threads| {
                    let pool = Pool::new(threads);
                    let mut y = Tensor::from_vec(tokens, n, vec![0.5; tokens * n]);
                    product(isa, &pool, &x, &pack_weights(&pool, &dense), None, &mut y);
                    y.as_slice().to_vec()
                });
                assert!(results[0] == results[1] && results[1] == results[2]);
                for t in 0..tokens {
                    for j in 0..n {
                        let product = |i: usize| {
                            bf16::from_f32(x.row(t)[i]).to_f64()
                                * bf16::from_f32(w[j * k + i]).to_f64()
                        };
                        let want: f64 = (0..k).map(product).sum();
                        let got = f64::from(results[0][t * n + j]);
                        // Each of k additions rounds by 2⁻²⁴ of a sum that k bounds.
                        let limit = (k * k) as f64 * 2f64.powi(-24);
                        assert!((got - want).abs() <= limit, "{isa:?} {t} {j}: {got} {want}");
                    }
                }
            }
        }
    }
}
