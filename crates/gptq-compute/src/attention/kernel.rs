//! One task of attention: some query tokens of one kv head.
//!
//! Three passes over a strip of scores that stays in the cache: scores = Q Kᵀ block by block of 64
//! keys, softmax of every row over what it sees, output = P V. Both products run on one register
//! tile that multiplies broadcast elements with unpacked rows of 16 lanes.

use super::{AttnParams, AttnSpan, BLOCK, visible};
use crate::arch::{Kernel, LANES, Simd};
use crate::math;
use crate::tensor::{RawSlice, Tensor};

pub(super) struct Task<'a> {
    pub(super) p: &'a AttnParams,
    pub(super) q: &'a Tensor,
    pub(super) span: &'a AttnSpan<'a>,
    pub(super) kv_head: usize,
    /// First token of this task within the span.
    pub(super) first: usize,
    pub(super) tokens: usize,
    /// Query heads per kv head.
    pub(super) group: usize,
    pub(super) out: RawSlice,
    pub(super) scratch: &'a mut Vec<f32>,
}

/// C[r][..] (+)= Σ_k A[r][k] B[k][..] for `R` rows and `V` vectors.
///
/// # Safety
/// `a[r]` is valid for `k` elements, `b` for `k` rows of V·16 at stride `ldb`, `c[r]` for V·16.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const V: usize>(
    k: usize,
    a: [*const f32; R],
    b: *const f32,
    ldb: usize,
    c: [*mut f32; R],
    accumulate: bool,
) {
    let mut acc = [[S::splat(0.0); V]; R];
    if accumulate {
        for r in 0..R {
            for v in 0..V {
                acc[r][v] = S::load(c[r].add(v * LANES));
            }
        }
    }
    for i in 0..k {
        let row = b.add(i * ldb);
        let mut lanes = [S::splat(0.0); V];
        for v in 0..V {
            lanes[v] = S::load(row.add(v * LANES));
        }
        for r in 0..R {
            let x = S::splat(*a[r].add(i));
            for v in 0..V {
                acc[r][v] = S::fma(x, lanes[v], acc[r][v]);
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            S::store(c[r].add(v * LANES), acc[r][v]);
        }
    }
}

/// [`tile`] for any number of rows and vectors.
///
/// # Safety
/// As for [`tile`], with row pointers `a(r)` and `c(r)` for r below `rows`.
#[inline(always)]
unsafe fn product<S: Simd>(
    rows: usize,
    vectors: usize,
    k: usize,
    a: impl Fn(usize) -> *const f32,
    (b, ldb): (*const f32, usize),
    c: impl Fn(usize) -> *mut f32,
    accumulate: bool,
) {
    macro_rules! rows_of {
        ($r:literal, $v:literal, $row:ident, $vector:ident) => {
            while rows - $row >= $r {
                let a: [*const f32; $r] = std::array::from_fn(|i| a($row + i));
                let c: [*mut f32; $r] = std::array::from_fn(|i| c($row + i).add($vector * LANES));
                tile::<S, $r, $v>(k, a, b.add($vector * LANES), ldb, c, accumulate);
                $row += $r;
            }
        };
    }
    let mut vector = 0;
    while vectors - vector >= 4 {
        let mut row = 0;
        if S::WIDE {
            rows_of!(6, 4, row, vector);
            rows_of!(3, 4, row, vector);
        }
        rows_of!(1, 4, row, vector);
        vector += 4;
    }
    while vector < vectors {
        let mut row = 0;
        rows_of!(6, 1, row, vector);
        rows_of!(1, 1, row, vector);
        vector += 1;
    }
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { p, q, span, kv_head, first, tokens, group, out, scratch } = self;
        let (kv, d) = (span.kv, p.head_dim);
        let padded = kv.padded_dim();
        let (rows, len) = (tokens * group, kv.len());
        let past = len - span.rows.len();
        // Row r is token r / group, head r % group of this kv head.
        let head = |r: usize| kv_head * group + r % group;
        let position = |r: usize| past + first + r / group;
        let offset = |r: usize| (span.rows.start + first + r / group) * q.cols() + head(r) * d;

        // Blocks that any row sees.
        let begin = visible(p, position(0), len).start / BLOCK;
        let end = visible(p, position(rows - 1), len).end.div_ceil(BLOCK);
        let width = (end - begin) * BLOCK;
        let needed = rows * (width + padded);
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (scores, outputs) = scratch.split_at_mut(rows * width);
        let (scores, outputs) = (scores.as_mut_ptr(), outputs.as_mut_ptr());
        for block in begin..end {
            let (keys, _) = kv.block(block, kv_head);
            let at = (block - begin) * BLOCK;
            product::<S>(
                rows,
                BLOCK / LANES,
                d,
                |r| q.as_slice().as_ptr().add(offset(r)),
                (keys.as_ptr(), BLOCK),
                |r| scores.add(r * width + at),
                false,
            );
        }
        let mut inverse = [0.0f32; super::ROWS];
        let mut many = Vec::new();
        let inverse = if rows <= super::ROWS {
            &mut inverse[..]
        } else {
            many.resize(rows, 0.0);
            &mut many[..]
        };
        for (r, inverse) in inverse.iter_mut().enumerate().take(rows) {
            let seen = visible(p, position(r), len);
            let row = std::slice::from_raw_parts_mut(scores.add(r * width), width);
            let range = seen.start - begin * BLOCK..seen.end - begin * BLOCK;
            let slope = p.alibi.as_ref().map_or(0.0, |a| a[head(r)]);
            let bias = (begin * BLOCK) as f32 - position(r) as f32;
            *inverse = softmax::<S>(row, range, p, slope, bias);
        }
        for block in begin..end {
            let (_, values) = kv.block(block, kv_head);
            let at = (block - begin) * BLOCK;
            product::<S>(
                rows,
                padded / LANES,
                BLOCK.min(len - block * BLOCK),
                |r| scores.add(r * width + at).cast_const(),
                (values.as_ptr(), padded),
                |r| outputs.add(r * padded),
                block > begin,
            );
        }
        for (r, &inverse) in inverse.iter().enumerate().take(rows) {
            // The columns of one head in one row belong to this task.
            let to = out.range(offset(r), d);
            let from = std::slice::from_raw_parts(outputs.add(r * padded), d);
            to.iter_mut().zip(from).for_each(|(t, f)| *t = f * inverse);
        }
    }
}

/// Replaces scores in `range` by their exponentials relative to the maximum and all others by
/// zero; returns the inverse of the sum. `slope · (index + bias)` is added to scaled scores.
#[inline(always)]
unsafe fn softmax<S: Simd>(
    row: &mut [f32],
    range: std::ops::Range<usize>,
    p: &AttnParams,
    slope: f32,
    bias: f32,
) -> f32 {
    row[..range.start].fill(0.0);
    row[range.end..].fill(0.0);
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
    1.0 / total
}
