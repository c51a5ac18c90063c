//! Attention whose scores also have products with the distance between query and key (disentangled
//! attention, He et al. 2021), for whole sequences without a cache.
//!
//! One task computes one head of one sequence: the products of its keys with the queries of all
//! distances, then tile by tile of its queries the scores, their exponentials, and the sums of values.

use std::cell::RefCell;
use std::ops::Range;

use super::kernel::exponentials;
use super::{AttnParams, visible};
use crate::arch::{Kernel, Simd, dispatch};
use crate::gemm::product;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Queries whose scores exist at a time.
const TILE: usize = 64;

/// Keys and queries of distances.
#[derive(Debug, Clone, Copy)]
pub struct Distances<'a> {
    /// Rows of the tensors by distance: that of a query i tokens behind its key is at `reach + i`, for
    /// every i from `-reach` to `reach`.
    pub rows: &'a [u32],
    /// `[_, heads * head_dim]`: query · key of the distance is added to the scores.
    pub keys: Option<&'a Tensor>,
    /// `[_, heads * head_dim]`: key · query of the distance is added to the scores.
    pub queries: Option<&'a Tensor>,
}

thread_local! {
    /// Products with distances, and the scores of a tile.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Softmax attention of `q` over `k` and `v`, all `[rows, heads * head_dim]`, into `out` of the same
/// shape: scores are (q·k + q·key of the distance + k·query of the distance) · scale. Each of `spans`
/// is a whole sequence that sees itself alone; other rows of `out` are unspecified.
///
/// # Panics
/// If shapes do not fit, spans overlap or do not ascend, there are fewer key heads than heads, or slopes.
#[track_caller]
pub fn relative_attention(
    pool: &Pool,
    [q, k, v]: [&Tensor; 3],
    spans: &[Range<usize>],
    p: &AttnParams,
    distances: &Distances<'_>,
    out: &mut Tensor,
) {
    let width = p.heads * p.head_dim;
    assert!(p.kv_heads == p.heads && p.alibi.is_none(), "heads of their own and no slopes");
    for x in [q, k, v] {
        assert_eq!((x.rows(), x.cols()), (q.rows(), width), "queries, keys and values");
    }
    let largest = distances.rows.iter().max().map_or(0, |&row| row as usize);
    for table in [distances.keys, distances.queries].into_iter().flatten() {
        assert!(table.cols() == width && table.rows() > largest, "keys or queries of distances");
    }
    let reach = distances.rows.len() / 2;
    assert!(distances.rows.len() % 2 == 1, "one row for each distance of both signs");
    let mut end = 0;
    for span in spans {
        assert!(span.end <= q.rows() && span.len() <= reach + 1, "span beyond the distances");
        assert!(span.start >= end, "spans overlap");
        end = span.end;
    }
    out.resize(q.rows(), width);
    let out = RawSlice::new(out.as_mut_slice());
    pool.run(spans.len() * p.heads, &|task| {
        let (span, head) = (spans[task / p.heads].clone(), task % p.heads);
        if span.is_empty() {
            return;
        }
        let most = span.len() - 1;
        let rows = &distances.rows[reach - most..=reach + most];
        let first = rows.iter().min().map_or(0, |&row| row as usize);
        let last = rows.iter().max().map_or(0, |&row| row as usize);
        let table = first..last + 1;
        let task = Task { p, q, k, v, distances, rows, table, span, head, out };
        SCRATCH.with_borrow_mut(|scratch| task.run(scratch));
    });
}

/// One head of one sequence.
struct Task<'a> {
    p: &'a AttnParams,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    distances: &'a Distances<'a>,
    /// By distance, from `1 - length` to `length - 1`.
    rows: &'a [u32],
    /// All that `rows` names.
    table: Range<usize>,
    span: Range<usize>,
    head: usize,
    out: RawSlice,
}

impl Task<'_> {
    fn run(&self, scratch: &mut Vec<f32>) {
        let (length, width) = (self.span.len(), self.table.len());
        let by_key = if self.distances.queries.is_some() { length * width } else { 0 };
        let needed = by_key + TILE * (length + width);
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (by_key, rest) = scratch.split_at_mut(by_key);
        let (scores, by_query) = rest[..TILE * (length + width)].split_at_mut(TILE * length);
        if let Some(queries) = self.distances.queries {
            self.products(self.k, self.span.clone(), queries, self.table.clone(), by_key);
        }
        for first in (0..length).step_by(TILE) {
            let tile = first..(first + TILE).min(length);
            let tokens = self.span.start + tile.start..self.span.start + tile.end;
            let scores = &mut scores[..tile.len() * length];
            self.products(self.q, tokens.clone(), self.k, self.span.clone(), scores);
            if let Some(keys) = self.distances.keys {
                self.products(self.q, tokens, keys, self.table.clone(), by_query);
                for (i, scores) in scores.chunks_exact_mut(length).enumerate() {
                    let products = &by_query[i * width..(i + 1) * width];
                    // Of query `first + i` and the keys from the first on: distances fall.
                    let rows = self.rows[first + i..first + i + length].iter().rev();
                    for (score, &row) in scores.iter_mut().zip(rows) {
                        *score += products[row as usize - self.table.start];
                    }
                }
            }
            for (j, products) in by_key.chunks_exact(width).enumerate() {
                // Of the queries from `first` on and key j: distances grow.
                let rows = &self.rows[first + length - 1 - j..][..tile.len()];
                for (i, &row) in rows.iter().enumerate() {
                    scores[i * length + j] += products[row as usize - self.table.start];
                }
            }
            self.weigh(tile, scores);
        }
    }

    /// Products of this head's columns of the rows `a` of `x` with those of the rows `b` of `y`, into
    /// `out` `[a, b]`.
    fn products(&self, x: &Tensor, a: Range<usize>, y: &Tensor, b: Range<usize>, out: &mut [f32]) {
        let (d, column) = (self.p.head_dim, self.head * self.p.head_dim);
        assert!(out.len() >= a.len() * b.len() && !a.is_empty() && !b.is_empty());
        assert!(a.end <= x.rows() && b.end <= y.rows());
        let x_first = &x.as_slice()[a.start * x.cols() + column..];
        let y_first = &y.as_slice()[b.start * y.cols() + column..];
        // SAFETY: the rows and the head's columns of both tensors exist, and `out` has the products.
        unsafe {
            product(
                (a.len(), b.len(), d),
                (x_first.as_ptr(), x.cols(), 1),
                (y_first.as_ptr(), 1, y.cols()),
                (out.as_mut_ptr(), b.len(), 1),
                false,
            );
        }
    }

    /// Sums of values, weighted by the exponentials of `scores` `[tile, length]`.
    fn weigh(&self, tile: Range<usize>, scores: &mut [f32]) {
        let (length, d, width) = (self.span.len(), self.p.head_dim, self.v.cols());
        let mut sums = [0.0; TILE];
        for ((row, position), sum) in
            scores.chunks_exact_mut(length).zip(tile.clone()).zip(&mut sums)
        {
            let range = visible(self.p, position, length);
            *sum = dispatch(Softmax { row, range, p: self.p });
        }
        let column = self.head * d;
        let at = (self.span.start + tile.start) * width + column;
        let values = &self.v.as_slice()[self.span.start * width + column..];
        // SAFETY: the columns of one head in the rows of one sequence belong to one task; `scores` has
        // a row of `length` for each of them, and the values as many rows.
        unsafe {
            product(
                (tile.len(), d, length),
                (scores.as_ptr(), length, 1),
                (values.as_ptr(), width, 1),
                (self.out.at(at, (tile.len() - 1) * width + d), width, 1),
                false,
            );
        }
        for (i, sum) in sums[..tile.len()].iter().enumerate() {
            // SAFETY: as above.
            let row = unsafe { self.out.range(at + i * width, d) };
            let inverse = 1.0 / sum;
            for x in row {
                *x *= inverse;
            }
        }
    }
}

/// Exponentials of a row's visible scores and zeros for the others; gives their sum.
struct Softmax<'a> {
    row: &'a mut [f32],
    range: Range<usize>,
    p: &'a AttnParams,
}

impl Kernel for Softmax<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        exponentials::<S>(self.row, self.range, self.p, 0.0, 0.0).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// f32 rounding of sums of some hundred products of numbers around 1.
    const TOLERANCE: f64 = 2e-5;

    fn tensor(rows: usize, cols: usize, seed: usize) -> Tensor {
        let value = |i: usize| (((i + seed * 101) * 7919 % 2003) as f32 - 1000.0) / 900.0;
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// The definition, in f64, for query `i` of `span`.
    fn oracle(
        [q, k, v]: [&Tensor; 3],
        span: &Range<usize>,
        i: usize,
        p: &AttnParams,
        distances: &Distances<'_>,
    ) -> Vec<f64> {
        let (d, reach) = (p.head_dim, distances.rows.len() / 2);
        let mut out = Vec::new();
        for head in 0..p.heads {
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                let columns = head * d..(head + 1) * d;
                let pairs = a[columns.clone()].iter().zip(&b[columns]);
                pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
            };
            let (query, seen) = (q.row(span.start + i), visible(p, i, span.len()));
            let score = |j: usize| {
                let key = k.row(span.start + j);
                let row = distances.rows[reach + i - j] as usize;
                let mut score = dot(query, key);
                score += distances.keys.map_or(0.0, |keys| dot(query, keys.row(row)));
                score += distances.queries.map_or(0.0, |queries| dot(key, queries.row(row)));
                score *= f64::from(p.scale);
                p.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for column in head * d..(head + 1) * d {
                let values = seen.clone().map(|j| f64::from(v.row(span.start + j)[column]));
                out.push(values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum);
            }
        }
        out
    }

    #[test]
    fn matches_f64_for_every_kind_of_term_and_mask() {
        let pools = [Pool::new(1), Pool::new(3)];
        let spans = [0..5, 5..6, 6..139, 140..204];
        for (heads, head_dim) in [(3, 16), (1, 7), (2, 64)] {
            let width = heads * head_dim;
            let [q, k, v] = [1, 2, 3].map(|seed| tensor(204, width, seed));
            let (keys, queries) = (tensor(40, width, 4), tensor(40, width, 5));
            let reach = 150i64;
            // Far distances share rows, as in buckets.
            let rows: Vec<u32> = (-reach..=reach)
                .map(|d| (20 + d.signum() * (d.abs() / 4).min(19)) as u32)
                .collect();
            for (terms, causal, window, soft_cap) in [
                ([true, true], false, None, None),
                ([true, false], false, None, None),
                ([false, true], false, Some(9), None),
                ([false, false], false, None, Some(2.0)),
                ([true, true], true, None, None),
                ([true, true], true, Some(20), Some(1.5)),
            ] {
                let distances = Distances {
                    rows: &rows,
                    keys: terms[0].then_some(&keys),
                    queries: terms[1].then_some(&queries),
                };
                let p = AttnParams {
                    heads,
                    kv_heads: heads,
                    head_dim,
                    scale: 1.0 / (3.0 * head_dim as f32).sqrt(),
                    causal,
                    window,
                    soft_cap,
                    alibi: None,
                };
                let (mut out, mut again) = (Tensor::default(), Tensor::default());
                relative_attention(&pools[0], [&q, &k, &v], &spans, &p, &distances, &mut out);
                relative_attention(&pools[1], [&q, &k, &v], &spans, &p, &distances, &mut again);
                for span in &spans {
                    let cells = span.start * width..span.end * width;
                    let same = out.as_slice()[cells.clone()] == again.as_slice()[cells];
                    assert!(same, "another number of threads");
                    for i in (0..span.len()).step_by(7) {
                        let want = oracle([&q, &k, &v], span, i, &p, &distances);
                        for (y, t) in out.row(span.start + i).iter().zip(want) {
                            let error = (f64::from(*y) - t).abs();
                            assert!(error < TOLERANCE, "{heads} {terms:?} {span:?} {i}: {error}");
                        }
                    }
                }
            }
        }
    }
}
