//! XᵀX, XᵀY and XWᵀ in products of 16-bit numbers, two in a lane that are added: of bfloat16 with sums in f32, or of
//! integers with exact sums, whose columns (of XᵀX and XᵀY) or blocks of inputs (of XWᵀ) have scales.

use std::ops::Range;

use crate::arch::{
    Isa, Kernel, LANES, Pairs, Simd, dispatch, dispatch_pairs, dispatch_words, pairs,
};
use crate::math::{nearest, to_bf16};
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
const BLOCKS: usize = PAIRS / BLOCK;
/// Tokens of one task of [`product`].
const PRODUCT_TOKENS: usize = 256;
/// Largest magnitude of an integer: the sum of the products of a block's pairs stays below 2³¹. The error of half a
/// step is 1/8190 of the largest number that shares the scale; bfloat16 is off by up to 1/512 of each number.
const LARGEST: f32 = 4095.0;
const _: () = assert!(2 * BLOCK as u64 * (LARGEST as u64 * LARGEST as u64) < 1 << 31);

/// Largest magnitudes below this, whose inverse would overflow, are taken for zero.
const TINY: f32 = 1e-30;

/// What numbers up to `largest` are multiplied with to become integers up to `limit`.
#[inline(always)]
pub(crate) fn inverse(largest: f32, limit: f32) -> f32 {
    if largest > TINY { limit / largest } else { 0.0 }
}

/// The integers nearest to `x` over its scale, `limit` at most, in two's complement. Returns the scale, which is no number
/// where one in `x` is none, and the sum of the integers.
#[inline(always)]
pub(crate) unsafe fn integers<S: Simd>(
    x: &[f32],
    limit: f32,
    to: &mut [[u32; LANES]],
) -> (f32, i32) {
    let (whole, rest) = x.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let vectors = || whole.iter().chain((!rest.is_empty()).then_some(&last));
    let mut largest = S::splat(0.0);
    for x in vectors() {
        largest = S::max(largest, S::abs(S::load(x.as_ptr())));
    }
    let largest = S::max_lane(largest);
    let inverse = S::splat(inverse(largest, limit));
    let mut sum = S::splat(0.0);
    for (x, to) in vectors().zip(to) {
        let v = S::round(S::mul(S::load(x.as_ptr()), inverse));
        sum = S::add(sum, v);
        S::store_i32(to.as_mut_ptr(), S::to_i32(v));
    }
    // What is infinite or NaN makes the sum NaN, whatever the maximum is.
    let sum = S::sum(sum);
    (if sum.is_nan() { sum } else { largest / limit }, sum as i32)
}

/// Adds xᵀy of `x` and `y`, both `[rows, n]`, to `sum` `[n, n]`; without y it is xᵀx, and only its panels on and below
/// the diagonal.
pub(crate) fn accumulate(isa: Isa, pool: &Pool, x: &Tensor, y: Option<&Tensor>, sum: &mut [f32]) {
    let n = x.cols();
    let panels = n.div_ceil(PANEL);
    let sides: &[&Tensor] = &[&[x], y.as_slice()].concat();
    // `[panel][pair of tokens][PANEL]`, of x and of y, and `[panel][block of pairs][PANEL]`.
    let mut packed = vec![0u32; sides.len() * panels * PAIRS * PANEL];
    let mut scales = vec![0.0; sides.len() * panels * BLOCKS * PANEL];
    let tasks = if y.is_some() { panels * panels } else { triangle_len(panels) };
    let sum = RawSlice::new(sum);
    for first in (0..x.rows()).step_by(TOKENS) {
        let tokens = first..(first + TOKENS).min(x.rows());
        let pairs = tokens.len().div_ceil(2);
        let (target, of_blocks) = (RawSlice::new(&mut packed), RawSlice::new(&mut scales));
        pool.run(sides.len() * panels, &|task| {
            let (x, panel) = (sides[task / panels], task % panels);
            // SAFETY: panels are disjoint.
            let (to, scales) = unsafe {
                let pairs = target.range(task * PAIRS * PANEL, pairs * PANEL);
                (pairs, of_blocks.range(task * BLOCKS * PANEL, BLOCKS * PANEL))
            };
            let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
            dispatch(Pack { isa, x, tokens: tokens.clone(), columns, to, scales });
        });
        pool.run(tasks, &|task| {
            let (row, column) =
                if y.is_some() { (task / panels, task % panels) } else { triangle(task) };
            // Those of y lie behind those of x.
            let column_side = (sides.len() - 1) * panels + column;
            let side = |index: usize| Side {
                pairs: &packed[index * PAIRS * PANEL..][..pairs * PANEL],
                strides: [1, PANEL],
                scales: &scales[index * BLOCKS * PANEL..][..BLOCKS * PANEL],
                scale_strides: [1, PANEL],
            };
            let size = |index: usize| PANEL.min(n - index * PANEL);
            let (height, width) = (size(row), size(column));
            let at = row * PANEL * n + column * PANEL;
            // Each piece of the sum belongs to one task and lies inside the matrix.
            let out = sum.at(at, (height - 1) * n + width);
            let (rows, columns) = (side(row), side(column_side));
            Piece { rows, columns, pairs, out, n, size: (height, width) }.run(isa);
        });
    }
}

/// Weights as [`product`] reads them.
#[derive(Debug)]
pub(crate) struct Weights {
    /// `[panel of outputs][pair of inputs][PANEL]`
    pairs: Vec<u32>,
    /// `[panel of outputs][block of inputs][PANEL]`
    scales: Vec<f32>,
}

impl Weights {
    pub(crate) fn pack(isa: Isa, pool: &Pool, w: &DenseMatrix) -> Self {
        let (n, k) = (w.out_features(), w.in_features());
        let (panels, pairs, blocks) = (n.div_ceil(PANEL), k.div_ceil(2), k.div_ceil(2 * BLOCK));
        let mut packed = vec![0u32; panels * pairs * PANEL];
        let mut scales = vec![0.0; panels * blocks * PANEL];
        let (target, of_blocks) = (RawSlice::new(&mut packed), RawSlice::new(&mut scales));
        pool.run(panels, &|panel| {
            // SAFETY: panels are disjoint.
            let (to, scales) = unsafe {
                let pairs = target.range(panel * pairs * PANEL, pairs * PANEL);
                (pairs, of_blocks.range(panel * blocks * PANEL, blocks * PANEL))
            };
            let (mut x, mut row) = (vec![0.0; k], vec![0; pairs]);
            let mut of_row = vec![0.0; blocks];
            for output in panel * PANEL..((panel + 1) * PANEL).min(n) {
                w.row_to_f32(output, &mut x);
                dispatch(PackRow { isa, x: &x, to: &mut row, scales: &mut of_row });
                let column = output % PANEL;
                to[column..].iter_mut().step_by(PANEL).zip(&row).for_each(|(to, pair)| *to = *pair);
                let scales = scales[column..].iter_mut().step_by(PANEL);
                scales.zip(&of_row).for_each(|(to, scale)| *to = *scale);
            }
        });
        Self { pairs: packed, scales }
    }
}

/// y = x Wᵀ + b: `x` `[tokens, in]`, `bias` `[out]`, `y` `[tokens, out]`.
pub(crate) fn product(
    isa: Isa,
    pool: &Pool,
    x: &Tensor,
    weights: &Weights,
    bias: Option<&[f32]>,
    y: &mut Tensor,
) {
    let n = y.cols();
    let (tokens, pairs, blocks) = (x.rows(), x.cols().div_ceil(2), x.cols().div_ceil(2 * BLOCK));
    let mut rows = vec![0u32; tokens * pairs];
    let mut scales = vec![0.0; tokens * blocks];
    let (target, of_rows) = (RawSlice::new(&mut rows), RawSlice::new(&mut scales));
    let out = RawSlice::new(y.as_mut_slice());
    let parts = tokens.div_ceil(PRODUCT_TOKENS);
    let part = |index: usize| {
        let first = index * PRODUCT_TOKENS;
        first..(first + PRODUCT_TOKENS).min(tokens)
    };
    pool.run(parts, &|index| {
        for token in part(index) {
            // SAFETY: parts of the rows are disjoint.
            let (to, scales, y) = unsafe {
                let pairs = target.range(token * pairs, pairs);
                (pairs, of_rows.range(token * blocks, blocks), out.range(token * n, n))
            };
            dispatch(PackRow { isa, x: x.row(token), to, scales });
            match bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(0.0),
            }
        }
    });
    pool.run(n.div_ceil(PANEL) * parts, &|task| {
        let (panel, part) = (task / parts, part(task % parts));
        let width = PANEL.min(n - panel * PANEL);
        // Each piece of y belongs to one task and lies inside of it.
        let out = out.at(part.start * n + panel * PANEL, (part.len() - 1) * n + width);
        let rows = Side {
            pairs: &rows[part.start * pairs..part.end * pairs],
            strides: [pairs, 1],
            scales: &scales[part.start * blocks..part.end * blocks],
            scale_strides: [blocks, 1],
        };
        let columns = Side {
            pairs: &weights.pairs[panel * pairs * PANEL..][..pairs * PANEL],
            strides: [1, PANEL],
            scales: &weights.scales[panel * blocks * PANEL..][..blocks * PANEL],
            scale_strides: [1, PANEL],
        };
        Piece { rows, columns, pairs, out, n, size: (part.len(), width) }.run(isa);
    });
}

/// A row in pairs of neighbours.
struct PackRow<'a> {
    isa: Isa,
    x: &'a [f32],
    to: &'a mut [u32],
    /// Of each block.
    scales: &'a mut [f32],
}

impl Kernel for PackRow<'_> {
    type Output = ();

    // Plain code, which the compiler turns into vectors of each instruction set.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let blocks = self.x.chunks(2 * BLOCK).zip(self.to.chunks_mut(BLOCK)).zip(self.scales);
        for ((x, to), scale) in blocks {
            if pairs(self.isa) == Some(Pairs::Int16) {
                let mut words = [[0; LANES]; 2 * BLOCK / LANES];
                *scale = integers::<S>(x, LARGEST, &mut words).0;
                for (to, pair) in to.iter_mut().zip(words.as_flattened().as_chunks::<2>().0) {
                    *to = pair[0] & 0xFFFF | pair[1] << 16;
                }
                continue;
            }
            let (whole, rest) = x.as_chunks::<2>();
            for (to, x) in to.iter_mut().zip(whole) {
                *to = to_bf16(x[0]).to_bits() >> 16 | to_bf16(x[1]).to_bits();
            }
            if let (Some(to), [x]) = (to.last_mut(), rest) {
                *to = to_bf16(*x).to_bits() >> 16;
            }
        }
    }
}

/// What numbers are multiplied with to become integers up to `limit`, and the scale of these, which is no number where
/// one of `x` is none.
#[inline(always)]
pub(crate) fn scale_of(x: &[f32], limit: f32) -> (f32, f32) {
    let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    // 0, or NaN.
    let zero: f32 = x.iter().map(|x| x * 0.0).sum();
    (inverse(largest, limit), largest / limit + zero)
}

/// The integer nearest to `x`, in the low half.
#[inline(always)]
pub(crate) fn word(x: f32) -> u32 {
    nearest(x) as u32 & 0xFFFF
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

/// Columns of some tokens, in pairs of tokens.
struct Pack<'a> {
    isa: Isa,
    x: &'a Tensor,
    tokens: Range<usize>,
    columns: Range<usize>,
    /// `[pair][PANEL]`; what is behind the columns keeps its zeros.
    to: &'a mut [u32],
    /// `[block][PANEL]`
    scales: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    // Plain code, as above.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { isa, x, tokens, columns, to, scales } = self;
        let row = |token: usize| &x.row(token)[columns.clone()];
        let integers = pairs(isa) == Some(Pairs::Int16);
        let blocks = tokens.clone().step_by(2 * BLOCK).zip(to.chunks_mut(BLOCK * PANEL));
        for ((first, to), scales) in blocks.zip(scales.chunks_exact_mut(PANEL)) {
            let tokens = first..(first + 2 * BLOCK).min(tokens.end);
            let mut inverses = [0.0; PANEL];
            if integers {
                // 0, or NaN where an element is no number.
                let mut zeros = [0.0; PANEL];
                let mut largest = [0.0f32; PANEL];
                for token in tokens.clone() {
                    for ((largest, zero), x) in largest.iter_mut().zip(&mut zeros).zip(row(token)) {
                        *largest = largest.max(x.abs());
                        *zero += x * 0.0;
                    }
                }
                for i in 0..PANEL {
                    inverses[i] = inverse(largest[i], LARGEST);
                    scales[i] = largest[i] / LARGEST + zeros[i];
                }
            }
            for (token, to) in tokens.clone().step_by(2).zip(to.chunks_exact_mut(PANEL)) {
                let low = row(token);
                let high = if token + 1 < tokens.end { row(token + 1) } else { &[0.0; PANEL] };
                let cells = to.iter_mut().zip(low).zip(high);
                if integers {
                    for (((to, &low), &high), inverse) in cells.zip(&inverses) {
                        *to = word(low * inverse) | word(high * inverse) << 16;
                    }
                } else {
                    for ((to, &low), &high) in cells {
                        *to = to_bf16(low).to_bits() >> 16 | to_bf16(high).to_bits();
                    }
                }
            }
        }
    }
}

/// The rows or the columns of a [`Piece`].
struct Side<'a> {
    /// Row (or column) i has pair p at i and p times these strides.
    pairs: &'a [u32],
    strides: [usize; 2],
    /// It has the scale of block b at i and b times these; unused for bfloat16.
    scales: &'a [f32],
    scale_strides: [usize; 2],
}

/// One piece of a sum: rows by a panel of columns, whose neighbours lie side by side.
struct Piece<'a> {
    rows: Side<'a>,
    columns: Side<'a>,
    pairs: usize,
    /// The rows of the piece, `n` apart, which it is added to; nobody else may touch their elements.
    out: *mut f32,
    n: usize,
    size: (usize, usize),
}

impl Piece<'_> {
    fn run(self, isa: Isa) {
        match pairs(isa) {
            Some(Pairs::Int16) => dispatch_words(isa, Sums::<true>(self)),
            _ => dispatch_pairs(isa, Sums::<false>(self)),
        }
    }
}

/// Computes a piece, of integers or of bfloat16.
struct Sums<'a, const INTEGERS: bool>(Piece<'a>);

impl<const INTEGERS: bool> Kernel for Sums<'_, INTEGERS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // As many vectors of columns at a time as there are registers for.
        if const { S::WIDE } {
            self.0.sums::<S, INTEGERS, VECTORS>();
        } else {
            self.0.sums::<S, INTEGERS, 1>();
        }
    }
}

impl Piece<'_> {
    /// Computes `V` vectors of columns at a time.
    #[inline(always)]
    unsafe fn sums<S: Simd, const INTEGERS: bool, const V: usize>(&self) {
        let &Self { ref rows, ref columns, pairs, out, n, size } = self;
        let [row_stride, pair_stride] = rows.strides;
        for (block, start) in (0..pairs).step_by(BLOCK).enumerate() {
            // The panel's columns of a block stay in the first level cache.
            let tiles = (0..size.0)
                .step_by(ROWS)
                .flat_map(|first| (0..PANEL).step_by(V * LANES).map(move |left| (first, left)));
            for (first, left) in tiles {
                let width = size.1.saturating_sub(left).min(V * LANES);
                // Behind the last row it is computed once more, and dropped.
                let row = |i: usize| (first + i).min(size.0 - 1);
                let row_starts: [usize; ROWS] = std::array::from_fn(|i| row(i) * row_stride);
                // Integers take the places of the floats.
                let mut acc = [[S::splat(0.0); V]; ROWS];
                for p in start..(start + BLOCK).min(pairs) {
                    let column = columns.pairs.as_ptr().add(p * PANEL + left);
                    let mut b = [S::splat_i32(0); V];
                    for v in 0..V {
                        b[v] = S::load_i32(column.add(v * LANES));
                    }
                    for i in 0..ROWS {
                        let a = rows.pairs.as_ptr().add(row_starts[i] + p * pair_stride);
                        let a = S::splat_i32(*a as i32);
                        for v in 0..V {
                            acc[i][v] = if INTEGERS {
                                S::from_bits(S::dot_words(S::bits(acc[i][v]), b[v], a))
                            } else {
                                S::dot_pairs(acc[i][v], b[v], a)
                            };
                        }
                    }
                }
                if INTEGERS {
                    let [of_row, of_block] = rows.scale_strides;
                    let scales =
                        columns.scales.as_ptr().add(block * columns.scale_strides[1] + left);
                    for i in 0..ROWS {
                        let scale = rows.scales.as_ptr().add(row(i) * of_row + block * of_block);
                        for v in 0..V {
                            let sum = S::mul(S::to_f32(S::bits(acc[i][v])), S::splat(*scale));
                            acc[i][v] = S::mul(sum, S::load(scales.add(v * LANES)));
                        }
                    }
                }
                for (i, acc) in acc.into_iter().enumerate().take(size.0 - first) {
                    let out = out.wrapping_add((first + i) * n + left);
                    if width == V * LANES {
                        for (v, acc) in acc.into_iter().enumerate() {
                            let out = out.add(v * LANES);
                            S::store(out, S::add(S::load(out), acc));
                        }
                        continue;
                    }
                    let mut sums = [[0.0f32; LANES]; V];
                    for (to, acc) in sums.iter_mut().zip(acc) {
                        S::store(to.as_mut_ptr(), acc);
                    }
                    for (j, sum) in sums.as_flattened().iter().enumerate().take(width) {
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

    fn isas() -> impl Iterator<Item = Isa> {
        Isa::available().into_iter().filter(|&isa| pairs(isa).is_some())
    }

    /// Numbers that share a scale, as the kernels take them.
    fn taken(isa: Isa, x: &[f32]) -> Vec<f64> {
        if pairs(isa) == Some(Pairs::Bf16) {
            return x.iter().map(|&x| bf16::from_f32(x).to_f64()).collect();
        }
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let code = |x: &f32| f64::from((x * (LARGEST / largest)).round_ties_even());
        x.iter().map(|x| code(x) * f64::from(largest / LARGEST)).collect()
    }

    /// Columns of `x`, whose blocks have scales, as rows.
    fn taken_columns(isa: Isa, x: &Tensor) -> Vec<Vec<f64>> {
        let column = |c| {
            let values: Vec<f32> = (0..x.rows()).map(|r| x.row(r)[c]).collect();
            taken_row(isa, &values)
        };
        (0..x.cols()).map(column).collect()
    }

    /// A row whose blocks have scales.
    fn taken_row(isa: Isa, x: &[f32]) -> Vec<f64> {
        x.chunks(2 * BLOCK).flat_map(|block| taken(isa, block)).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn matches_f64_on_every_instruction_set_and_thread_count() {
        for isa in isas() {
            for (rows, n) in [(1, 1), (3, 5), (TOKENS, PANEL), (2 * TOKENS + 7, 3 * PANEL + 9)] {
                let value = |i: usize| ((i * 7919 % 1009) as f32 - 500.0) / 500.0;
                let x = Tensor::from_vec(rows, n, (0..rows * n).map(value).collect());
                let y = Tensor::from_vec(rows, n, (7..rows * n + 7).map(value).collect());
                let of_x = taken_columns(isa, &x);
                for y in [None, Some(&y)] {
                    let sums = [1, 2, 3].map(|threads| {
                        let mut sum = vec![0.5; n * n];
                        accumulate(isa, &Pool::new(threads), &x, y, &mut sum);
                        sum
                    });
                    assert!(sums[0] == sums[1] && sums[1] == sums[2]);
                    let of_y = taken_columns(isa, y.unwrap_or(&x));
                    for i in 0..n {
                        for j in 0..if y.is_some() { n } else { i + 1 } {
                            let want = dot(&of_x[i], &of_y[j]) + 0.5;
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
        for isa in isas() {
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
                    let weights = Weights::pack(isa, &pool, &dense);
                    product(isa, &pool, &x, &weights, None, &mut y);
                    y.as_slice().to_vec()
                });
                assert!(results[0] == results[1] && results[1] == results[2]);
                for t in 0..tokens {
                    let x = taken_row(isa, x.row(t));
                    for j in 0..n {
                        let want = dot(&x, &taken_row(isa, &w[j * k..(j + 1) * k]));
                        let got = f64::from(results[0][t * n + j]);
                        // Each of k additions rounds by 2⁻²⁴ of a sum that k bounds.
                        let limit = (k * k) as f64 * 2f64.powi(-24);
                        assert!((got - want).abs() <= limit, "{isa:?} {t} {j}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn large_sums_are_exact_and_what_is_no_number_shows() {
        let pool = Pool::new(1);
        for isa in isas() {
            let (rows, n, k) = (4 * BLOCK, 3, 4 * BLOCK);
            let mut sum = vec![0.0; n * n];
            let x = Tensor::from_vec(rows, n, vec![-2.0; rows * n]);
            accumulate(isa, &pool, &x, None, &mut sum);
            assert!((sum[0] - 4.0 * rows as f32).abs() < 1e-3, "{isa:?} {}", sum[0]);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = x.clone();
                x.row_mut(5)[1] = bad;
                let mut sum = vec![0.0; n * n];
                accumulate(isa, &pool, &x, None, &mut sum);
                assert!(sum[0].is_finite() && !sum[n + 1].is_finite(), "{isa:?} {bad}");

                let mut row = vec![1.0; k];
                row[k - 1] = bad;
                let dense = DenseMatrix::from_f32(n, k, vec![0.5; n * k]);
                let (x, mut y) = (Tensor::from_vec(1, k, row), Tensor::zeros(1, n));
                product(isa, &pool, &x, &Weights::pack(isa, &pool, &dense), None, &mut y);
                assert!(y.as_slice().iter().all(|y| !y.is_finite()), "{isa:?} {bad}");
            }
        }
    }
}
