//! Gradients of attention over whole sequences.

use std::ops::Range;

use crate::attention::{AttnParams, visible};
use crate::elementwise::exp_row;
use crate::gemm::product;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Queries whose scores exist at a time in each thread.
const TILE: usize = 64;

/// Attention as it was computed: keys and values of the same tokens as the queries, nothing before.
pub struct AttnTrace<'a> {
    /// Shape and variant.
    pub params: &'a AttnParams,
    /// Rows of each sequence, in order.
    pub seqs: &'a [Range<usize>],
    /// Queries `[rows, heads * head_dim]`, as they were multiplied.
    pub q: &'a Tensor,
    /// Keys `[rows, kv_heads * head_dim]`.
    pub k: &'a Tensor,
    /// Values `[rows, kv_heads * head_dim]`.
    pub v: &'a Tensor,
    /// The result `[rows, heads * head_dim]`.
    pub out: &'a Tensor,
}

impl AttnTrace<'_> {
    /// Bytes that each thread of [`attention_backward`] needs for sequences of `len` tokens.
    pub fn tile_bytes(len: usize) -> usize {
        2 * TILE * len * size_of::<f32>()
    }
}

/// Gradients of queries, keys and values from `dout`, that of the result. Scores are computed once more,
/// a tile of 64 queries of one head at a time (Dao et al. 2022, appendix B).
///
/// # Panics
/// If the shapes do not match, sequences overlap or are empty, or a query sees no key.
#[track_caller]
pub fn attention_backward(pool: &Pool, trace: &AttnTrace<'_>, dout: &Tensor) -> [Tensor; 3] {
    let &AttnTrace { params: p, seqs, q, k, v, out } = trace;
    let (rows, d) = (q.rows(), p.head_dim);
    for x in [q, out, dout] {
        assert_eq!((x.rows(), x.cols()), (rows, p.heads * d), "shape of the queries");
    }
    for x in [k, v] {
        assert_eq!((x.rows(), x.cols()), (rows, p.kv_heads * d), "shape of keys and values");
    }
    assert!(p.heads.is_multiple_of(p.kv_heads), "heads and kv_heads");
    assert!(p.alibi.as_ref().is_none_or(|a| a.len() == p.heads), "one slope per head");
    assert!(p.window != Some(0), "a window of no key");
    let mut end = 0;
    for seq in seqs {
        assert!(seq.start >= end && seq.end > seq.start && seq.end <= rows, "sequence {seq:?}");
        end = seq.end;
    }
    let mut dq = Tensor::zeros(rows, p.heads * d);
    // Of each query head by itself; those that share keys and values are added up behind.
    let (mut dk, mut dv) = (vec![0.0f32; rows * p.heads * d], vec![0.0f32; rows * p.heads * d]);
    let raw = [RawSlice::new(dq.as_mut_slice()), RawSlice::new(&mut dk), RawSlice::new(&mut dv)];
    pool.run(seqs.len() * p.heads, &|task| {
        OneHead { trace, dout, seq: seqs[task / p.heads].clone(), index: task % p.heads }.run(raw);
    });
    let group = p.heads / p.kv_heads;
    let gather = |parts: &[f32]| {
        let mut sum = Tensor::zeros(rows, p.kv_heads * d);
        for row in 0..rows {
            for (head, part) in
                parts[row * p.heads * d..][..p.heads * d].chunks_exact(d).enumerate()
            {
                let at = head / group * d;
                sum.row_mut(row)[at..at + d].iter_mut().zip(part).for_each(|(s, x)| *s += x);
            }
        }
        sum
    };
    let (dk, dv) = (gather(&dk), gather(&dv));
    [dq, dk, dv]
}

/// One head of one sequence.
struct OneHead<'a> {
    trace: &'a AttnTrace<'a>,
    dout: &'a Tensor,
    seq: Range<usize>,
    index: usize,
}

impl OneHead<'_> {
    fn run(&self, gradients: [RawSlice; 3]) {
        let len = self.seq.len();
        let mut buffers = [const { Vec::new() }; 2];
        for first in (0..len).step_by(TILE) {
            self.tile(first..(first + TILE).min(len), &mut buffers, gradients);
        }
    }

    /// The queries at positions `tile`.
    fn tile(
        &self,
        tile: Range<usize>,
        [weights, changes]: &mut [Vec<f32>; 2],
        [dq, dk, dv]: [RawSlice; 3],
    ) {
        let AttnTrace { params: p, q, k, v, out, .. } = *self.trace;
        let (d, len, rows) = (p.head_dim, self.seq.len(), tile.len());
        let (wide, narrow) = (p.heads * d, p.kv_heads * d);
        let (of_q, of_kv) = (self.index * d, self.index / (p.heads / p.kv_heads) * d);
        let seen = visible(p, tile.start, len).start..visible(p, tile.end - 1, len).end;
        let keys = seen.len();
        let (row, key_row) = (self.seq.start + tile.start, self.seq.start + seen.start);
        // The elements of this head in the rows of the tile, and of its keys.
        let query = |x: &Tensor| x.as_slice()[row * wide + of_q..].as_ptr();
        let key = |x: &Tensor| x.as_slice()[key_row * narrow + of_kv..].as_ptr();
        weights.resize(rows * keys, 0.0);
        changes.resize(rows * keys, 0.0);
        let span = |rows: usize| (rows - 1) * wide + d;
        // SAFETY: the operands have the rows and columns that are named, as the caller's assertions say, and
        // the buffers `rows * keys` elements.
        unsafe {
            let to = (weights.as_mut_ptr(), keys, 1);
            product((rows, keys, d), (query(q), wide, 1), (key(k), 1, narrow), to, false);
            let to = (changes.as_mut_ptr(), keys, 1);
            product((rows, keys, d), (query(self.dout), wide, 1), (key(v), 1, narrow), to, false);
        }
        for (i, position) in tile.clone().enumerate() {
            let at = self.seq.start + position;
            let own = of_q..of_q + d;
            let (outs, douts) = (&out.row(at)[own.clone()], &self.dout.row(at)[own]);
            let mean: f32 = outs.iter().zip(douts).map(|(o, g)| o * g).sum();
            let range = visible(p, position, len);
            let range = range.start - seen.start..range.end - seen.start;
            let row = i * keys..(i + 1) * keys;
            self.row(
                &mut weights[row.clone()],
                &mut changes[row],
                (range, position, seen.start),
                mean,
            );
        }
        // SAFETY: as above; the columns of one head in the rows of one sequence belong to one task, because
        // sequences do not overlap.
        unsafe {
            let to = (dv.at(key_row * wide + of_q, span(keys)), wide, 1);
            let from = (query(self.dout), wide, 1);
            product((keys, d, rows), (weights.as_ptr(), 1, keys), from, to, true);
            let to = (dq.at(row * wide + of_q, span(rows)), wide, 1);
            product((rows, d, keys), (changes.as_ptr(), keys, 1), (key(k), narrow, 1), to, false);
            let to = (dk.at(key_row * wide + of_q, span(keys)), wide, 1);
            product((keys, d, rows), (changes.as_ptr(), 1, keys), (query(q), wide, 1), to, true);
        }
    }

    /// One query: `weights` from products of queries and keys to weights, `changes` from gradients of the weights to those
    /// of the products; of the keys in `range`, which begins at position `first`. `mean` is the mean of the
    /// gradients by weight.
    fn row(
        &self,
        weights: &mut [f32],
        changes: &mut [f32],
        (range, position, first): (Range<usize>, usize, usize),
        mean: f32,
    ) {
        let p = self.trace.params;
        for x in [&mut *weights, &mut *changes] {
            x[..range.start].fill(0.0);
            x[range.end..].fill(0.0);
        }
        let (weights, changes) = (&mut weights[range.clone()], &mut changes[range.clone()]);
        for w in &mut *weights {
            *w *= p.scale;
        }
        // The gradient of a score by the product it came from.
        for g in &mut *changes {
            *g = (*g - mean) * p.scale;
        }
        if let Some(cap) = p.soft_cap {
            for (w, g) in weights.iter_mut().zip(&mut *changes) {
                let t = (*w / cap).tanh();
                (*w, *g) = (cap * t, *g * (1.0 - t * t));
            }
        }
        if let Some(slopes) = &p.alibi {
            let slope = slopes[self.index];
            for (w, key) in weights.iter_mut().zip(first + range.start..) {
                *w += slope * (key as f32 - position as f32);
            }
        }
        let most = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        exp_row(weights, most);
        let inverse = 1.0 / weights.iter().sum::<f32>();
        for (w, g) in weights.iter_mut().zip(changes) {
            *w *= inverse;
            *g *= *w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 7919 % 2003) as f32 - 1000.0) / 700.0
    }

    /// Attention in f64 of rows of f64, `[rows, heads * d]`.
    fn forward(p: &AttnParams, seqs: &[Range<usize>], [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
        let (d, group) = (p.head_dim, p.heads / p.kv_heads);
        let (wide, narrow) = (p.heads * d, p.kv_heads * d);
        let mut out = vec![0.0; q.len()];
        for seq in seqs {
            for (position, row) in seq.clone().enumerate() {
                for h in 0..p.heads {
                    let range = visible(p, position, seq.len());
                    let score = |t: usize| {
                        let key = (seq.start + t) * narrow + h / group * d;
                        let dot: f64 = (0..d).map(|i| q[row * wide + h * d + i] * k[key + i]).sum();
                        let mut s = dot * f64::from(p.scale);
                        if let Some(cap) = p.soft_cap {
                            s = f64::from(cap) * (s / f64::from(cap)).tanh();
                        }
                        if let Some(a) = &p.alibi {
                            s += f64::from(a[h]) * (t as f64 - position as f64);
                        }
                        s.exp()
                    };
                    let weights: Vec<f64> = range.clone().map(score).collect();
                    let sum: f64 = weights.iter().sum();
                    for (t, w) in range.zip(&weights) {
                        let from = (seq.start + t) * narrow + h / group * d;
                        for i in 0..d {
                            out[row * wide + h * d + i] += w / sum * v[from + i];
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn match_differences_in_f64() {
        let plain = AttnParams {
            heads: 4,
            kv_heads: 2,
            head_dim: 5,
            scale: 0.4,
            causal: true,
            window: None,
            soft_cap: None,
            alibi: None,
        };
        let variants = [
            plain.clone(),
            AttnParams { causal: false, ..plain.clone() },
            AttnParams { window: Some(3), ..plain.clone() },
            AttnParams { causal: false, window: Some(2), kv_heads: 4, ..plain.clone() },
            AttnParams { soft_cap: Some(1.5), kv_heads: 1, ..plain.clone() },
            AttnParams { alibi: Some(vec![0.5, 0.25, 0.125, 0.0625]), ..plain },
        ];
        // The last sequence is longer than a tile.
        let seqs = [0..1, 1..8, 8..8 + TILE + 6];
        let rows = 8 + TILE + 6;
        for p in &variants {
            let tensor = |heads: usize, seed: usize| {
                let n = rows * heads * p.head_dim;
                let values = (0..n).map(|i| value(i * 3 + seed)).collect();
                Tensor::from_vec(rows, heads * p.head_dim, values)
            };
            let (q, k, v) = (tensor(4, 1), tensor(p.kv_heads, 2), tensor(p.kv_heads, 3));
            let dout = tensor(4, 4);
            let wide =
                |x: &Tensor| -> Vec<f64> { x.as_slice().iter().map(|&x| x.into()).collect() };
            let inputs = [wide(&q), wide(&k), wide(&v)];
            let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
                let out = forward(p, &seqs, [&inputs[0], &inputs[1], &inputs[2]]);
                out.iter().zip(dout.as_slice()).map(|(y, g)| y * f64::from(*g)).sum()
            };
            let out = forward(p, &seqs, [&inputs[0], &inputs[1], &inputs[2]]);
            let out = Tensor::from_vec(rows, q.cols(), out.iter().map(|&x| x as f32).collect());
            let trace = AttnTrace { params: p, seqs: &seqs, q: &q, k: &k, v: &v, out: &out };
            let gradients = attention_backward(&Pool::new(1), &trace, &dout);
            let again = attention_backward(&Pool::new(3), &trace, &dout);
            for which in 0..3 {
                let got = gradients[which].as_slice();
                assert_eq!(got, again[which].as_slice());
                for i in (0..got.len()).step_by(13) {
                    let mut moved = inputs.clone();
                    moved[which][i] += 1e-5;
                    let above = loss(&moved);
                    moved[which][i] -= 2e-5;
                    let want = (above - loss(&moved)) / 2e-5;
                    let error = (f64::from(got[i]) - want).abs();
                    assert!(error < 1e-5 * (1.0 + want.abs()), "{which} {i} {error} {p:?}");
                }
            }
        }
    }
}
