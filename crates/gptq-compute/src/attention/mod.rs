//! Attention over a key/value cache, for prefill and decoding alike.

mod cache;
mod kernel;
mod memory;
mod product;
mod relative;
mod storage;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use cache::BLOCK;
pub use cache::{KvType, LayerKv};
use kernel::{Chunk, Merge, Partial, Queries};
pub use memory::KvMemory;
pub use relative::{Distances, relative_attention};

use crate::arch::dispatch;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Query rows (token × head of the group) that one task takes together.
const ROWS: usize = 24;
/// Positions whose scores exist at a time. Where chunks begin depends on nothing but this, so that a
/// token's result is the same in a prefill, alone, or in a batch.
const CHUNK: usize = 4 * BLOCK;
/// Multiplications up to which one thread is faster than waking the others.
const SERIAL: usize = 1 << 17;

/// One sequence's part of a batch; says the same whenever it is asked.
pub trait Span: Sync {
    /// Its rows of the query tensor; the last one is the query at position `kv().len() - 1`.
    fn rows(&self) -> Range<usize>;
    /// Keys and values of all its positions so far, those of its rows included.
    fn kv(&self) -> &LayerKv;
}

/// The plainest [`Span`].
#[derive(Debug, Clone)]
pub struct AttnSpan<'a> {
    /// See [`Span::rows`].
    pub rows: Range<usize>,
    /// See [`Span::kv`].
    pub kv: &'a LayerKv,
}

impl Span for AttnSpan<'_> {
    fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }
    fn kv(&self) -> &LayerKv {
        self.kv
    }
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
    /// Scores and partial results of the current task.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Partial results of all tasks of a call, on the thread that made it.
    static PARTIALS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// How the work of one span is cut.
struct Cut {
    tiles: usize,
    tokens_per_tile: usize,
    /// Chunks that are tasks of their own: all of them when there is one tile, else 1 (a task takes
    /// all chunks of its tile).
    splits: usize,
    /// First chunk that is seen.
    first: usize,
}

impl Cut {
    fn new(span: &impl Span, p: &AttnParams) -> Self {
        let tokens = span.rows().len();
        let len = span.kv().len();
        let tokens_per_tile = (ROWS * p.kv_heads / p.heads).max(1);
        let tiles = tokens.div_ceil(tokens_per_tile);
        let first = visible(p, len - tokens, len).start / CHUNK;
        let splits = if tiles == 1 { len.div_ceil(CHUNK) - first } else { 1 };
        Self { tiles, tokens_per_tile, splits, first }
    }
}

/// Softmax attention of `q` `[rows, heads * head_dim]` over the caches of its spans into `out` of
/// the same shape. Each task holds the scores of at most 24 query rows (or one token's group of
/// heads) and 256 positions.
///
/// # Panics
/// If shapes do not fit, spans overlap or do not ascend, or a span has no row or more rows than its
/// cache has positions.
#[track_caller]
pub fn attention<S: Span>(pool: &Pool, q: &Tensor, spans: &[S], p: &AttnParams, out: &mut Tensor) {
    assert!(p.heads.is_multiple_of(p.kv_heads), "heads and kv_heads");
    assert_eq!(q.cols(), p.heads * p.head_dim, "query width");
    assert!(p.alibi.as_ref().is_none_or(|a| a.len() == p.heads), "one slope per head");
    out.resize(q.rows(), q.cols());
    let (mut tasks, mut parts, mut work) = (0, 0, 0);
    let mut end = 0;
    for s in spans {
        let (rows, kv) = (s.rows(), s.kv());
        // Each row of the output belongs to one task.
        assert!(rows.start >= end, "spans overlap");
        end = rows.end;
        assert!(
            !rows.is_empty() && rows.end <= q.rows() && rows.len() <= kv.len(),
            "span outside its cache"
        );
        assert_eq!((kv.kv_heads(), kv.head_dim()), (p.kv_heads, p.head_dim), "cache shape");
        let cut = Cut::new(s, p);
        tasks += cut.tiles * cut.splits * p.kv_heads;
        parts += partials_of(s, &cut, p);
        work += rows.len() * kv.len() * q.cols();
    }
    let raw = RawSlice::new(out.as_mut_slice());
    let threads = if work <= SERIAL { 1 } else { pool.threads() };
    PARTIALS.with_borrow_mut(|partials| {
        if partials.len() < parts {
            partials.resize(parts, 0.0);
        }
        let partials = RawSlice::new(partials);
        let run = |mut task: usize| {
            let mut at = 0;
            for s in spans {
                let cut = Cut::new(s, p);
                let count = cut.tiles * cut.splits * p.kv_heads;
                if task < count {
                    return run_task(q, s, &cut, (task, threads), p, partials, at, raw);
                }
                task -= count;
                at += partials_of(s, &cut, p);
            }
        };
        if threads == 1 {
            (0..tasks).for_each(run);
        } else {
            pool.run(tasks, &run);
        }
        // What was cut into chunks is put together, in the order in which one task would have done it.
        let mut at = 0;
        for s in spans {
            let cut = Cut::new(s, p);
            let size = partials_of(s, &cut, p);
            if size > 0 {
                merge_heads(q, s, &cut, p, partials, at, raw);
            }
            at += size;
        }
    });
}

/// Floats of the partial results of a span; 0 where tasks write their results themselves.
fn partials_of(span: &impl Span, cut: &Cut, p: &AttnParams) -> usize {
    if cut.splits == 1 {
        return 0;
    }
    let rows = span.rows().len() * p.heads;
    cut.splits * Partial::len(rows, span.kv().padded_dim())
}

fn queries<'a>(
    q: &'a Tensor,
    span: &'a impl Span,
    p: &'a AttnParams,
    kv_head: usize,
    first: usize,
    tokens: usize,
) -> Queries<'a> {
    let (rows, kv) = (span.rows(), span.kv());
    let position = kv.len() - rows.len() + first;
    Queries { p, q, kv, kv_head, first_row: rows.start + first, position, tokens }
}

/// Task number `task` of a span: tiles, then chunks, then heads. So many `threads` are at it.
fn run_task(
    q: &Tensor,
    span: &impl Span,
    cut: &Cut,
    (task, threads): (usize, usize),
    p: &AttnParams,
    partials: RawSlice,
    at: usize,
    out: RawSlice,
) {
    let (kv_head, rest) = (task % p.kv_heads, task / p.kv_heads);
    let (split, tile) = (rest % cut.splits, rest / cut.splits);
    let first = tile * cut.tokens_per_tile;
    let tokens = cut.tokens_per_tile.min(span.rows().len() - first);
    let queries = queries(q, span, p, kv_head, first, tokens);
    let (rows, padded) = (queries.rows(), span.kv().padded_dim());
    let size = Partial::len(rows, padded);
    SCRATCH.with_borrow_mut(|scratch| {
        let strip = Chunk::room(rows, p.head_dim);
        let needed = strip + 2 * size;
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (strip, buffers) = scratch.split_at_mut(strip);
        if cut.splits > 1 {
            // SAFETY: each head and chunk has a place of its own.
            let buffer =
                unsafe { partials.range(at + (split * p.kv_heads + kv_head) * size, size) };
            let out = Partial::new(buffer, rows, padded);
            // Threads take tasks in turns.
            let then = task + threads;
            let next = (then < cut.splits * p.kv_heads)
                .then(|| (queries.blocks(cut.first + then / p.kv_heads).start, then % p.kv_heads));
            let index = cut.first + split;
            return Chunk { queries, index, next, strip, rounded: false, out }.compute();
        }
        let (a, b) = buffers.split_at_mut(size);
        let seen = queries.seen();
        let chunks = seen.start / CHUNK..seen.end.div_ceil(CHUNK);
        for chunk in chunks.clone() {
            let first = chunk == chunks.start;
            let out = Partial::new(if first { &mut *a } else { &mut *b }, rows, padded);
            Chunk { queries, index: chunk, next: None, strip, rounded: !first, out }.compute();
            if first {
                continue;
            }
            let (mut into, next) = (Partial::new(a, rows, padded), Partial::new(b, rows, padded));
            dispatch(Merge { into: &mut into, next: &next, padded });
        }
        write(&queries, &Partial::new(a, rows, padded), padded, out);
    });
}

/// Merges the chunks of all heads of a span that has one tile.
fn merge_heads(
    q: &Tensor,
    span: &impl Span,
    cut: &Cut,
    p: &AttnParams,
    partials: RawSlice,
    at: usize,
    out: RawSlice,
) {
    let padded = span.kv().padded_dim();
    for kv_head in 0..p.kv_heads {
        let queries = queries(q, span, p, kv_head, 0, span.rows().len());
        let rows = queries.rows();
        let size = Partial::len(rows, padded);
        // SAFETY: all tasks are done, and the places do not overlap.
        let part = |split: usize| unsafe {
            let at = at + (split * p.kv_heads + kv_head) * size;
            Partial::new(partials.range(at, size), rows, padded)
        };
        for split in 1..cut.splits {
            dispatch(Merge { into: &mut part(0), next: &part(split), padded });
        }
        write(&queries, &part(0), padded, out);
    }
}

/// Divides by the sums and writes the rows.
fn write(queries: &Queries<'_>, done: &Partial<'_>, padded: usize, out: RawSlice) {
    let d = queries.p.head_dim;
    for r in 0..queries.rows() {
        // SAFETY: the columns of one head in one row belong to one task.
        let to = unsafe { out.range(queries.offset(r), d) };
        let inverse = 1.0 / done.sum[r];
        to.iter_mut().zip(&done.outputs[r * padded..]).for_each(|(t, f)| *t = f * inverse);
    }
}

/// Positions that the query at `position` sees, of `len` cached ones.
pub(crate) fn visible(p: &AttnParams, position: usize, len: usize) -> Range<usize> {
    let end = if p.causal { position + 1 } else { p.window.map_or(len, |w| position + w) }.min(len);
    let start = p.window.map_or(0, |w| (position + 1).saturating_sub(w));
    start.min(end)..end
}
