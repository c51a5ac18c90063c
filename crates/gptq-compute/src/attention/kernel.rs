//! Some query rows of one kv head over one chunk of positions, and how chunks are put together.
//!
//! Three passes over a strip of scores that stays in the nearest cache: scores = Q Kᵀ block by block
//! of 64 keys, exponentials relative to the largest score of the chunk, output = P V. The chunks of
//! a row are merged in order (online softmax, Milakov & Gimelshein 2018), by one task or, when a
//! single token is decoded, after the chunks were computed by many: the arithmetic is the same.

use std::marker::PhantomData;
use std::ops::Range;

use super::cache::{BLOCK, LayerKv, largest, value_rows};
use super::product::product;
use super::storage::{Bf16, Element, F16, F32, Int8, Int16};
use super::{AttnParams, CHUNK, KvType, visible};
use crate::arch::{Kernel, LANES, Simd, dispatch, dispatch_pairs, dispatch_words, isa};
use crate::math;
use crate::pairs::{integers, inverse};
use crate::tensor::Tensor;

/// The query rows of a task: row r is token `first + r / group` of the span, head `r % group` of
/// the kv head.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    pub(super) p: &'a AttnParams,
    pub(super) q: &'a Tensor,
    pub(super) kv: &'a LayerKv,
    pub(super) kv_head: usize,
    /// Row of `q` of the first token.
    pub(super) first_row: usize,
    /// Position of the first token.
    pub(super) position: usize,
    pub(super) tokens: usize,
}

impl Queries<'_> {
    /// Query heads per kv head.
    pub(super) fn group(&self) -> usize {
        self.p.heads / self.p.kv_heads
    }

    pub(super) fn rows(&self) -> usize {
        self.tokens * self.group()
    }

    fn head(&self, r: usize) -> usize {
        self.kv_head * self.group() + r % self.group()
    }

    fn position(&self, r: usize) -> usize {
        self.position + r / self.group()
    }

    /// Where row r begins in `q`, and in an output of the same shape.
    pub(super) fn offset(&self, r: usize) -> usize {
        (self.first_row + r / self.group()) * self.q.cols() + self.head(r) * self.p.head_dim
    }

    fn visible(&self, r: usize) -> Range<usize> {
        visible(self.p, self.position(r), self.kv.len())
    }

    /// Positions that any row sees.
    pub(super) fn seen(&self) -> Range<usize> {
        self.visible(0).start..self.visible(self.rows() - 1).end
    }

    /// Blocks of a chunk that any row sees.
    pub(super) fn blocks(&self, chunk: usize) -> Range<usize> {
        let (seen, base) = (self.seen(), chunk * CHUNK);
        let start = (seen.start / BLOCK).max(base / BLOCK);
        start..seen.end.div_ceil(BLOCK).min((base + CHUNK) / BLOCK)
    }
}

/// What one chunk, or several merged ones, give for some rows.
pub(super) struct Partial<'a> {
    /// Σ exp(score - max) · value, `[rows, padded_dim]`.
    pub(super) outputs: &'a mut [f32],
    /// Largest score; minus infinity where a row sees nothing.
    pub(super) max: &'a mut [f32],
    /// Σ exp(score - max)
    pub(super) sum: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Floats that `rows` rows need.
    pub(super) fn len(rows: usize, padded: usize) -> usize {
        rows * (padded + 2)
    }

    pub(super) fn new(buffer: &'a mut [f32], rows: usize, padded: usize) -> Self {
        let (outputs, rest) = buffer.split_at_mut(rows * padded);
        let (max, rest) = rest.split_at_mut(rows);
        Self { outputs, max, sum: &mut rest[..rows] }
    }
}

/// Computes one chunk for the rows of `queries`.
pub(super) struct Chunk<'a> {
    pub(super) queries: Queries<'a>,
    /// Positions `index * CHUNK..(index + 1) * CHUNK`.
    pub(super) index: usize,
    /// Block and head whose keys this thread probably reads next.
    pub(super) next: Option<(usize, usize)>,
    /// `[rows, CHUNK]` for scores, then `[rows, padded_dim]` for rounded queries, and twice `[rows]` for the
    /// scales of these and of weights.
    pub(super) strip: &'a mut [f32],
    /// Whether `strip` has the rounded queries, from another chunk of the same ones; else it has any content.
    pub(super) rounded: bool,
    pub(super) out: Partial<'a>,
}

impl Chunk<'_> {
    /// Floats of `strip`.
    pub(super) fn room(rows: usize, head_dim: usize) -> usize {
        rows * (CHUNK + head_dim.next_multiple_of(LANES) + 2)
    }

    pub(super) fn compute(self) {
        match self.queries.kv.kind() {
            KvType::F32 => dispatch(ChunkOf::<F32>::new(self)),
            KvType::F16 => dispatch(ChunkOf::<F16>::new(self)),
            KvType::Int8 => dispatch(ChunkOf::<Int8>::new(self)),
            KvType::Bf16 => dispatch_pairs(isa(), ChunkOf::<Bf16>::new(self)),
            KvType::Int16 => dispatch_words(isa(), ChunkOf::<Int16>::new(self)),
        }
    }
}

/// A chunk of one kind of elements.
struct ChunkOf<'a, E>(Chunk<'a>, PhantomData<E>);

impl<'a, E> ChunkOf<'a, E> {
    fn new(chunk: Chunk<'a>) -> Self {
        Self(chunk, PhantomData)
    }
}

impl<E: Element> Kernel for ChunkOf<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        chunk::<S, E>(self.0);
    }
}

#[inline(always)]
unsafe fn chunk<S: Simd, E: Element>(task: Chunk<'_>) {
    let Chunk { queries, index, next: then, strip, rounded, out } = task;
    let Queries { p, q, kv, kv_head, .. } = queries;
    let (rows, padded, len) = (queries.rows(), kv.padded_dim(), kv.len());
    assert!(strip.len() >= Chunk::room(rows, p.head_dim) && out.outputs.len() >= rows * padded);
    let strip = strip.as_mut_ptr();
    let pairs = strip.add(rows * CHUNK);
    // Of integers.
    let query_scales = pairs.add(rows * padded);
    let weight_scales = query_scales.add(rows);
    if E::STEPS == 2 && !rounded {
        for r in 0..rows {
            let to = std::slice::from_raw_parts_mut(pairs.add(r * padded), padded);
            let query = &q.as_slice()[queries.offset(r)..][..p.head_dim];
            if E::INTEGERS {
                *query_scales.add(r) = query_integers::<S>(query, to);
            } else {
                round_query(query, to);
            }
        }
    }
    let outputs = out.outputs.as_mut_ptr();
    let base = index * CHUNK;
    let Range { start: begin, end } = queries.blocks(index);
    for block in begin..end {
        let part = kv.part::<E>(block, kv_head);
        let next = if block + 1 < end {
            kv.part::<E>(block + 1, kv_head).keys
        } else {
            kv.part::<E>(begin, kv_head).values
        };
        let at = block * BLOCK - base;
        product::<S, E>(
            rows,
            BLOCK / LANES,
            p.head_dim.div_ceil(E::STEPS),
            |r| match E::STEPS {
                2 => pairs.add(r * padded).cast_const(),
                _ => q.as_slice().as_ptr().add(queries.offset(r)),
            },
            (part.keys.as_ptr(), next.as_ptr(), BLOCK),
            |r| strip.add(r * CHUNK + at),
            |r| *query_scales.add(r),
            false,
        );
        multiply::<S>(strip.add(at), rows, part.scales.0);
    }
    for r in 0..rows {
        let visible = queries.visible(r);
        let range = visible.start.clamp(base, base + CHUNK) - base
            ..visible.end.clamp(base, base + CHUNK) - base;
        let row = std::slice::from_raw_parts_mut(strip.add(r * CHUNK), CHUNK);
        let slope = p.alibi.as_ref().map_or(0.0, |a| a[queries.head(r)]);
        let bias = base as f32 - queries.position(r) as f32;
        (out.max[r], out.sum[r]) = exponentials::<S>(row, range, p, slope, bias);
    }
    if begin >= end {
        out.outputs[..rows * padded].fill(0.0);
    }
    for block in begin..end {
        let part = kv.part::<E>(block, kv_head);
        multiply::<S>(strip.add(block * BLOCK - base), rows, part.scales.1);
    }
    if E::STEPS == 2 && begin < end {
        let positions = begin * BLOCK - base..end * BLOCK - base;
        for r in 0..rows {
            let row = strip.add(r * CHUNK);
            if E::INTEGERS {
                *weight_scales.add(r) = weight_integers::<S>(row, positions.clone());
            } else {
                round_weights::<S>(row, positions.clone());
            }
        }
    }
    for block in begin..end {
        let part = kv.part::<E>(block, kv_head);
        let next = match then {
            Some((block, head)) if block + 1 == end => kv.part::<E>(block, head).keys,
            _ => kv.part::<E>((block + 1).min(end - 1), kv_head).values,
        };
        let at = block * BLOCK - base;
        product::<S, E>(
            rows,
            padded / LANES,
            value_rows::<E>(BLOCK.min(len - block * BLOCK)),
            |r| strip.add(r * CHUNK + at / E::STEPS).cast_const(),
            (part.values.as_ptr(), next.as_ptr(), padded),
            |r| outputs.add(r * padded),
            |r| *weight_scales.add(r),
            block > begin,
        );
    }
}

/// Rounds a query to bfloat16, two columns in a word, as keys are kept.
#[inline(always)]
fn round_query(from: &[f32], to: &mut [f32]) {
    let bits = |x: &f32| math::to_bf16(*x).to_bits();
    for (to, pair) in to.iter_mut().zip(from.chunks(2)) {
        *to = f32::from_bits(bits(&pair[0]) >> 16 | pair.get(1).map_or(0, bits));
    }
}

/// Makes a query integers, two columns in a word, as keys are kept; returns their scale. `to` has room for all of
/// its columns.
#[inline(always)]
unsafe fn query_integers<S: Simd>(from: &[f32], to: &mut [f32]) -> f32 {
    let words = bytemuck::cast_slice_mut::<f32, u32>(to);
    let (scale, _) = integers::<S>(from, largest(from.len()), words.as_chunks_mut().0);
    for i in 0..from.len().div_ceil(2) {
        words[i] = words[2 * i] & 0xFFFF | words[2 * i + 1] << 16;
    }
    scale
}

/// Makes the weights of a row at some positions integers, two of them in a word, as values are kept; returns their
/// scale.
#[inline(always)]
unsafe fn weight_integers<S: Simd>(row: *mut f32, positions: Range<usize>) -> f32 {
    let (mut most, mut sum) = (S::splat(0.0), S::splat(0.0));
    for i in positions.clone().step_by(LANES) {
        let weights = S::load(row.add(i));
        most = S::max(most, weights);
        sum = S::add(sum, weights);
    }
    let (most, limit) = (S::max_lane(most), largest(BLOCK));
    let inverse = S::splat(inverse(most, limit));
    let rounded = |v| S::to_i32(S::mul(v, inverse));
    for i in positions.step_by(2 * LANES) {
        let pair = row.add(i);
        let (low, high) = (rounded(S::load(pair)), rounded(S::load(pair.add(LANES))));
        // Never ahead of what is read. Weights are not negative.
        S::store_i32(row.add(i / 2).cast(), S::or(low, S::shl(high, 16)));
    }
    // A weight that is no number makes the sum so, whatever the maximum is.
    let sum = S::sum(sum);
    if sum.is_nan() { sum } else { most / limit }
}

/// Rounds the weights of a row at some positions to bfloat16, two of them in a word, as values are kept.
#[inline(always)]
unsafe fn round_weights<S: Simd>(row: *mut f32, positions: Range<usize>) {
    // As `math::to_bf16`, but for NaNs of odd payloads, which arithmetic does not make.
    let rounded = |v: S::F| {
        let (bits, one) = (S::bits(v), S::splat_i32(1));
        let odd = S::and(S::shr(bits, 16), one);
        S::add_i32(bits, S::add_i32(odd, S::splat_i32(0x7FFF)))
    };
    let top = S::splat_i32(0xFFFF_0000_u32 as i32);
    for i in positions.step_by(2 * LANES) {
        let pair = row.add(i);
        let (low, high) = (rounded(S::load(pair)), rounded(S::load(pair.add(LANES))));
        // Never ahead of what is read.
        S::store_i32(row.add(i / 2).cast(), S::or(S::shr(low, 16), S::and(high, top)));
    }
}

/// Multiplies the 64 scores of one block in each row by the scales of their positions, if there are
/// any.
#[inline(always)]
unsafe fn multiply<S: Simd>(strip: *mut f32, rows: usize, scales: &[f32]) {
    if scales.is_empty() {
        return;
    }
    for v in (0..BLOCK).step_by(LANES) {
        let scale = S::load(scales.as_ptr().add(v));
        for r in 0..rows {
            let cell = strip.add(r * CHUNK + v);
            S::store(cell, S::mul(S::load(cell), scale));
        }
    }
}

/// Replaces scores in `range` by their exponentials relative to the largest and all others by zero;
/// returns the largest and the sum. `slope · (index + bias)` is added to scaled scores.
#[inline(always)]
pub(super) unsafe fn exponentials<S: Simd>(
    row: &mut [f32],
    range: Range<usize>,
    p: &AttnParams,
    slope: f32,
    bias: f32,
) -> (f32, f32) {
    row[..range.start].fill(0.0);
    row[range.end..].fill(0.0);
    if range.is_empty() {
        return (f32::NEG_INFINITY, 0.0);
    }
    let (start, n) = (range.start, range.len());
    let part = row[range].as_mut_ptr();
    let whole = n - n % LANES;
    let plain = p.soft_cap.is_none() && slope == 0.0;
    if !plain {
        for i in 0..n {
            let mut s = *part.add(i) * p.scale;
            if let Some(cap) = p.soft_cap {
                s = cap * (s / cap).tanh();
            }
            *part.add(i) = s + slope * ((start + i) as f32 + bias);
        }
    }
    let scale = if plain { p.scale } else { 1.0 };
    let mut m = S::splat(f32::NEG_INFINITY);
    for i in (0..whole).step_by(LANES) {
        m = S::max(m, S::load(part.add(i)));
    }
    let max = (whole..n).fold(S::max_lane(m), |a, i| a.max(*part.add(i))) * scale;
    let (vscale, vmax) = (S::splat(scale), S::splat(-max));
    let mut sum = S::splat(0.0);
    for i in (0..whole).step_by(LANES) {
        let e = math::exp::<S>(S::fma(S::load(part.add(i)), vscale, vmax));
        S::store(part.add(i), e);
        sum = S::add(sum, e);
    }
    let mut total = S::sum(sum);
    if whole < n {
        let mut tail = [f32::NEG_INFINITY; LANES];
        std::ptr::copy_nonoverlapping(part.add(whole), tail.as_mut_ptr(), n - whole);
        let e = math::exp::<S>(S::fma(S::load(tail.as_ptr()), vscale, vmax));
        S::store(tail.as_mut_ptr(), e);
        std::ptr::copy_nonoverlapping(tail.as_ptr(), part.add(whole), n - whole);
        total += tail[..n - whole].iter().sum::<f32>();
    }
    (max, total)
}

/// Adds the next chunk to what the chunks before it gave.
pub(super) struct Merge<'a> {
    pub(super) into: &'a mut Partial<'a>,
    pub(super) next: &'a Partial<'a>,
    pub(super) padded: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { into, next, padded } = self;
        for r in 0..into.max.len() {
            let max = into.max[r].max(next.max[r]);
            // Rows that see nothing so far: no weight, and no difference of infinities.
            let factor = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { (m - max).exp() };
            let (a, b) = (factor(into.max[r]), factor(next.max[r]));
            into.max[r] = max;
            into.sum[r] = into.sum[r] * a + next.sum[r] * b;
            let (va, vb) = (S::splat(a), S::splat(b));
            for i in (r * padded..(r + 1) * padded).step_by(LANES) {
                let to = into.outputs[i..i + LANES].as_mut_ptr();
                let sum = S::mul(S::load(to), va);
                S::store(to, S::fma(S::load(next.outputs[i..i + LANES].as_ptr()), vb, sum));
            }
        }
    }
}
