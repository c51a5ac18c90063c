//! Attention over a key/value cache, for prefill and decoding alike.

mod cache;
mod kernel;

use std::cell::RefCell;
use std::ops::Range;

use cache::BLOCK;
pub use cache::LayerKv;

use crate::arch::dispatch;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Query rows (token × head of the group) that one task takes together.
const ROWS: usize = 24;

/// One sequence's part of a batch.
#[derive(Debug, Clone)]
pub struct AttnSpan<'a> {
    /// Its rows of the query tensor; the last one is the query at position `kv.len() - 1`.
    pub rows: Range<usize>,
    /// Keys and values of all its positions so far, those of these rows included.
    pub kv: &'a LayerKv,
}

/// The shape and variant of an attention layer.
#[derive(Debug, Clone)]
pub struct AttnParams {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// Multiplies the scores, 1/√head_dim as a rule.
    pub scale: f32,
    /// A query sees only keys at its own position or before.
    pub causal: bool,
    /// A query at p sees keys at positions above p - window and, without `causal`, below p + window.
    pub window: Option<usize>,
    /// score <- cap · tanh(score / cap).
    pub soft_cap: Option<f32>,
    /// Slope per query head: adds slope · (key position - query position).
    pub alibi: Option<Vec<f32>>,
}

thread_local! {
    /// Scores `[ROWS, keys]` and gathered queries of the current task.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Softmax attention of `q` `[rows, heads * head_dim]` over the caches of its spans into `out` of
/// the same shape. Scores of at most 24 query rows exist at a time.
///
/// # Panics
/// If shapes do not fit, or a span has more rows than its cache has positions.
#[track_caller]
pub fn attention(
    pool: &Pool,
    q: &Tensor,
    spans: &[AttnSpan<'_>],
    p: &AttnParams,
    out: &mut Tensor,
) {
    let group = p.heads / p.kv_heads;
    let width = p.heads * p.head_dim;
    assert_eq!(q.cols(), width, "query width");
    assert!(p.heads.is_multiple_of(p.kv_heads), "heads and kv_heads");
    assert!(p.alibi.as_ref().is_none_or(|a| a.len() == p.heads), "one slope per head");
    out.resize(q.rows(), width);
    let tokens_per_task = (ROWS / group).max(1);
    let tasks_of = |s: &AttnSpan<'_>| s.rows.len().div_ceil(tokens_per_task) * p.kv_heads;
    for s in spans {
        assert!(s.rows.end <= q.rows() && s.rows.len() <= s.kv.len(), "span outside its cache");
        assert_eq!((s.kv.kv_heads(), s.kv.head_dim()), (p.kv_heads, p.head_dim), "cache shape");
    }
    let raw = RawSlice::new(out.as_mut_slice());
    pool.run(spans.iter().map(tasks_of).sum(), &|task| {
        let mut local = task;
        let Some(span) = spans.iter().find(|s| {
            let n = tasks_of(s);
            let here = local < n;
            if !here {
                local -= n;
            }
            here
        }) else {
            return;
        };
        let (tile, kv_head) = (local / p.kv_heads, local % p.kv_heads);
        let first = tile * tokens_per_task;
        let tokens = tokens_per_task.min(span.rows.len() - first);
        SCORES.with_borrow_mut(|scratch| {
            dispatch(kernel::Task { p, q, span, kv_head, first, tokens, group, out: raw, scratch });
        });
    });
}

/// Positions that the query at `position` sees, of `len` cached ones.
fn visible(p: &AttnParams, position: usize, len: usize) -> Range<usize> {
    let end = if p.causal { position + 1 } else { p.window.map_or(len, |w| position + w) }.min(len);
    let start = p.window.map_or(0, |w| (position + 1).saturating_sub(w));
    start.min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 7919 % 2003) as f32 - 1000.0) / 700.0
    }

    fn oracle(
        q: &Tensor,
        row: usize,
        k: &Tensor,
        v: &Tensor,
        pos: usize,
        p: &AttnParams,
    ) -> Vec<f64> {
        let (d, group) = (p.head_dim, p.heads / p.kv_heads);
        let mut out = Vec::new();
        for h in 0..p.heads {
            let kv = h / group;
            let range = visible(p, pos, k.rows());
            let mut scores: Vec<f64> = range
                .clone()
                .map(|t| {
                    let dot: f64 = (0..d)
                        .map(|i| f64::from(q.row(row)[h * d + i]) * f64::from(k.row(t)[kv * d + i]))
                        .sum();
                    let mut s = dot * f64::from(p.scale);
                    if let Some(c) = p.soft_cap {
                        s = f64::from(c) * (s / f64::from(c)).tanh();
                    }
                    if let Some(a) = &p.alibi {
                        s += f64::from(a[h]) * (t as f64 - pos as f64);
                    }
                    s
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            for s in &mut scores {
                *s = (*s - max).exp();
            }
            let sum: f64 = scores.iter().sum();
            for i in 0..d {
                let dot: f64 = range
                    .clone()
                    .zip(&scores)
                    .map(|(t, s)| s * f64::from(v.row(t)[kv * d + i]))
                    .sum();
                out.push(dot / sum);
            }
        }
        out
    }

    #[test]
    fn matches_f64_for_prefill_and_decode() {
        let pool = Pool::new(2);
        for (heads, kv_heads, head_dim) in
            [(9, 3, 64), (4, 4, 24), (2, 1, 128), (3, 1, 80), (32, 1, 16)]
        {
            for (len, past, window, soft_cap, alibi, causal) in [
                (150, 0, None, None, false, true),
                (70, 69, None, None, true, true),
                (133, 100, Some(8), Some(3.0), false, true),
                (65, 1, Some(70), None, true, true),
                (40, 0, None, None, false, false),
                (150, 0, Some(30), None, false, false),
            ] {
                let p = AttnParams {
                    heads,
                    kv_heads,
                    head_dim,
                    scale: 1.0 / (head_dim as f32).sqrt(),
                    causal,
                    window,
                    soft_cap,
                    alibi: alibi.then(|| (0..heads).map(|h| 0.1 / (h + 1) as f32).collect()),
                };
                let tensor = |rows: usize, cols: usize, seed: usize| {
                    Tensor::from_vec(
                        rows,
                        cols,
                        (0..rows * cols).map(|i| value(i + seed)).collect(),
                    )
                };
                let (k, v) =
                    (tensor(len, kv_heads * head_dim, 1), tensor(len, kv_heads * head_dim, 2));
                let q = tensor(len - past + 3, heads * head_dim, 3);
                let mut kv = LayerKv::new(kv_heads, head_dim);
                kv.append(&k, &v, 0..past);
                kv.append(&k, &v, past..len);
                let spans = [AttnSpan { rows: 3..q.rows(), kv: &kv }];
                let mut out = Tensor::default();
                attention(&pool, &q, &spans, &p, &mut out);
                for row in (3..q.rows()).step_by(11) {
                    let want = oracle(&q, row, &k, &v, past + row - 3, &p);
                    for (y, t) in out.row(row).iter().zip(want) {
                        assert!((f64::from(*y) - t).abs() < 1e-5, "{heads} {head_dim} {len} {row}");
                    }
                }
            }
        }
    }

    #[test]
    fn spans_do_not_see_each_other() {
        let pool = Pool::new(2);
        let p = AttnParams {
            heads: 2,
            kv_heads: 2,
            head_dim: 16,
            scale: 0.25,
            causal: true,
            window: None,
            soft_cap: None,
            alibi: None,
        };
        let x = Tensor::from_vec(70, 32, (0..70 * 32).map(value).collect());
        let run = |splits: &[Range<usize>]| {
            let caches: Vec<LayerKv> = splits
                .iter()
                .map(|r| {
                    let mut kv = LayerKv::new(2, 16);
                    kv.append(&x, &x, r.clone());
                    kv
                })
                .collect();
            let spans: Vec<_> = splits
                .iter()
                .zip(&caches)
                .map(|(r, kv)| AttnSpan { rows: r.clone(), kv })
                .collect();
            let mut out = Tensor::default();
            attention(&pool, &x, &spans, &p, &mut out);
            out
        };
        let (both, first) = (run(&[0..30, 30..70]), run(std::slice::from_ref(&(0..30))));
        assert_eq!(both.as_slice()[..30 * 32], first.as_slice()[..30 * 32]);
        // The first token of a sequence sees only itself.
        assert_eq!(both.row(30), x.row(30));
    }
}
