//! Activations as the tiles read them.

use std::cell::RefCell;
use std::ops::Range;

use super::tile::{Rows, Tiling};
use super::{Layout, PAD, QuantizedMatrix};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_on};
use crate::math;
use crate::pairs::{integers, inverse};
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Inputs that share a scale in int8. On SmolLM2-135M in 4 bits with groups of 64, perplexity rises
/// by 0.22 % with 32, 0.45 % with 64 and 1.02 % with 128; decoding costs the same time with each.
pub(crate) const BLOCK: usize = 32;

/// How quantized layers take their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// As f32: exact up to rounding.
    #[default]
    F32,
    /// Rounded to 16 bits, twice as fast as f32 where the processor multiplies pairs of these: to
    /// bfloat16, or to integers with one scale per token and up to 128 inputs.
    Bf16,
    /// Rounded to int8 with one scale per token and block of 32 inputs: faster, at the cost of some
    /// tenths of a percent in perplexity.
    Int8,
}

impl Activations {
    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// Tasks that inputs are quantized in, at least, where they are many enough for all threads.
const FILLS: usize = 16;

thread_local! {
    /// The permuted inputs of a tile.
    static PERMUTED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn pick(row: &[f32], k: u32) -> f32 {
    if k == PAD { 0.0 } else { row[k as usize] }
}

/// How [`pack_floats`] gives the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// As they are.
    Exact,
    /// Rounded to bfloat16, as f32.
    Rounded,
    /// Rounded to bfloat16, two in the place of an f32: of each four inputs 0 and 2, then 1 and 3,
    /// the first in the low half. So codes lie that are 16 bits apart in a lane.
    Pairs,
    /// In the same places integers, of which the tokens have scales in blocks of [`WORD_BLOCK`].
    Words,
}

/// Inputs of a group that share a scale as 16-bit integers, at most.
pub(super) const WORD_BLOCK: usize = 128;
/// Largest magnitude of such an integer.
const LARGEST: f32 = 32767.0;
/// Sums of their products with codes of 8 bits start from one with half of the largest code.
const _: () = assert!(WORD_BLOCK as u64 * LARGEST as u64 * (255 + 128) < 1 << 31);

/// How many sums of inputs a token has: of groups, or of the blocks that have scales.
fn blocks(m: &QuantizedMatrix, packing: Packing) -> usize {
    match packing {
        Packing::Words => m.word_blocks(),
        _ => m.groups.len(),
    }
}

/// Words of one token of [`pack_floats`].
pub(crate) fn token_floats(layout: Layout<'_>, packing: Packing) -> usize {
    inputs(layout.0, packing) + behind(layout.0, packing)
}

/// Words of the inputs of a token.
fn inputs(m: &QuantizedMatrix, packing: Packing) -> usize {
    match packing {
        Packing::Exact | Packing::Rounded => m.padded_in,
        Packing::Pairs | Packing::Words => m.padded_in / 2,
    }
}

/// Words of a token behind its inputs.
fn behind(m: &QuantizedMatrix, packing: Packing) -> usize {
    blocks(m, packing) * if packing == Packing::Words { 3 } else { 1 }
}

/// Packs the rows of `x` that belong to a tile: `[padded_in, height]` inputs, or half as many pairs,
/// followed by `[groups, height]` sums, which only matrices with offsets read (`with_sums`). Of integers
/// these are `[blocks, height]`, followed by as many scales, and by minus the sum of the integers times
/// the centre of the codes, as i32. Missing rows are zero.
pub(crate) fn pack_floats(
    isa: Isa,
    layout: Layout<'_>,
    x: &Tensor,
    rows: Rows,
    packing: Packing,
    with_sums: bool,
    out: &mut [f32],
) {
    let (m, height) = (layout.0, rows.height);
    let out = &mut out[..token_floats(layout, packing) * height];
    if rows.tokens < height {
        out.fill(0.0);
    }
    let (inputs, behind) = out.split_at_mut(inputs(m, packing) * height);
    let (sums, scales) = behind.split_at_mut(blocks(m, packing) * height);
    dispatch_on(isa, Pack { matrix: m, x, rows, packing, with_sums, inputs, sums, scales });
}

/// Inputs of [`Pack`] that are rounded at a time, then turned.
const PIECE: usize = WORD_BLOCK;
/// Tokens of the tallest tile of [`Tiling::float`].
const TALLEST: usize = 12;

struct Pack<'a> {
    matrix: &'a QuantizedMatrix,
    x: &'a Tensor,
    rows: Rows,
    packing: Packing,
    with_sums: bool,
    inputs: &'a mut [f32],
    sums: &'a mut [f32],
    /// Scales and centres of integers.
    scales: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    // Plain code, which the compiler turns into vectors of each instruction set.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { matrix: m, x, rows, packing, with_sums, inputs, sums, scales } = self;
        let Rows { first, tokens, height, .. } = rows;
        let mut piece = [[0.0f32; PIECE]; TALLEST];
        let piece = &mut piece[..tokens];
        let (scales, centres) = scales.split_at_mut(scales.len() / 2);
        for (g, group) in m.groups.iter().enumerate() {
            let mut totals = [0.0f32; TALLEST];
            let end = group.first + group.columns;
            for at in (group.first..end).step_by(PIECE) {
                let n = PIECE.min(end - at);
                for (i, piece) in piece.iter_mut().enumerate() {
                    let row = x.row(first + i);
                    match &m.order {
                        None => piece[..n].copy_from_slice(&row[at..at + n]),
                        Some(order) => {
                            let from = order[at..at + n].iter().map(|&k| pick(row, k));
                            piece.iter_mut().zip(from).for_each(|(to, v)| *to = v);
                        }
                    }
                    if let Packing::Rounded | Packing::Pairs = packing {
                        for v in &mut piece[..n] {
                            *v = math::to_bf16(*v);
                        }
                    }
                }
                if packing == Packing::Words {
                    let block = group.word_block + (at - group.first) / WORD_BLOCK;
                    let cells = &mut inputs[at / 2 * height..][..n / 2 * height];
                    for (i, piece) in piece.iter().enumerate() {
                        let (scale, total) = words::<S>(&piece[..n], &mut cells[i..], height);
                        let at = block * height + i;
                        scales[at] = scale;
                        sums[at] = scale * total as f32;
                        centres[at] = f32::from_bits(-(total << (m.bits - 1)) as u32);
                    }
                    continue;
                }
                if with_sums {
                    // Tokens in the inner loop: each of their sums waits for its last addition.
                    for k in 0..n {
                        totals.iter_mut().zip(&*piece).for_each(|(t, row)| *t += row[k]);
                    }
                }
                if packing == Packing::Pairs {
                    let cells = inputs[at / 2 * height..].chunks_exact_mut(height);
                    for (pair, cells) in cells.enumerate().take(n / 2) {
                        // 0 and 2, 1 and 3, 4 and 6, ...
                        let k = 2 * pair - pair % 2;
                        for (cell, row) in cells.iter_mut().zip(&*piece) {
                            let (low, high) = (row[k].to_bits(), row[k + 2].to_bits());
                            *cell = f32::from_bits(low >> 16 | high);
                        }
                    }
                } else {
                    let cells = inputs[at * height..].chunks_exact_mut(height);
                    for (k, cells) in cells.enumerate().take(n) {
                        cells.iter_mut().zip(&*piece).for_each(|(cell, row)| *cell = row[k]);
                    }
                }
            }
            if with_sums && packing != Packing::Words {
                let sums = &mut sums[g * height..][..tokens];
                sums.iter_mut().zip(totals).for_each(|(sum, t)| *sum = t);
            }
        }
    }
}

/// Inputs of one token and block as integers, in pairs as [`Packing::Pairs`] has them, a pair every `stride` cells.
/// Returns the scale and the sum of the integers.
#[inline(always)]
unsafe fn words<S: Simd>(x: &[f32], to: &mut [f32], stride: usize) -> (f32, i32) {
    let mut words = [[0; LANES]; WORD_BLOCK / LANES];
    let (scale, total) = integers::<S>(x, LARGEST, &mut words);
    let fours = words.as_flattened()[..x.len()].as_chunks::<4>().0;
    for (four, to) in fours.iter().zip(to.chunks_mut(2 * stride)) {
        to[0] = f32::from_bits(four[0] & 0xFFFF | four[2] << 16);
        to[stride] = f32::from_bits(four[1] & 0xFFFF | four[3] << 16);
    }
    (scale, total)
}

/// Words of one token and block: its codes, four in a word, its scale and its centre.
pub(super) const RECORD: usize = BLOCK / 4 + 2;

/// Inputs in int8, permuted, in the order in which tiles read them: tile after tile, of which each
/// is one run of memory.
#[derive(Debug)]
pub(crate) struct Int8Input {
    /// `[tile][block]` of, for all tokens of the tile, `[height][BLOCK]` codes, each -127..=127;
    /// `[height]` f32 scales, an input being its code times this; `[height]` i32 centres, minus the
    /// sum of the codes times the centre of the weight codes.
    words: Vec<i32>,
    /// `[tile][group][height]`: the sum of the inputs, as their codes have it.
    sums: Vec<f32>,
    tiling: Tiling,
}

impl Default for Int8Input {
    fn default() -> Self {
        Self { words: Vec::new(), sums: Vec::new(), tiling: Tiling::int8(Isa::Scalar, 0) }
    }
}

impl Int8Input {
    /// Quantizes all rows of `x`, on all threads where `pool` is given.
    pub(crate) fn fill(&mut self, isa: Isa, pool: Option<&Pool>, layout: Layout<'_>, x: &Tensor) {
        let m = layout.0;
        let tiling = Tiling::int8(isa, x.rows());
        self.tiling = tiling;
        // Never shrunk. A tile with more room than tokens computes what lies there, for nothing.
        grow(&mut self.words, tiling.room() * m.blocks() * RECORD);
        grow(&mut self.sums, tiling.room() * m.groups.len());
        let (words, sums) = (RawSlice::new(&mut self.words), RawSlice::new(&mut self.sums));
        // A task takes a tile or a part of its groups, so that threads write no line in turns.
        let pieces = match pool {
            Some(_) => FILLS.div_ceil(tiling.len()).min(m.groups.len()),
            None => 1,
        };
        let task = |index: usize| {
            let (rows, piece) = (tiling.tile(index / pieces), index % pieces);
            let groups = m.groups.len() * piece / pieces..m.groups.len() * (piece + 1) / pieces;
            let inputs = m.groups[groups.start].first
                ..m.groups.get(groups.end).map_or(m.padded_in, |g| g.first);
            let quantize = |x: &[f32], stride: usize| {
                let groups = groups.clone();
                dispatch_on(isa, Quantize { matrix: m, groups, x, stride, words, sums, rows });
            };
            match &m.order {
                None => {
                    assert_eq!(x.cols(), m.padded_in, "input width");
                    quantize(&x.as_slice()[rows.first * m.padded_in + inputs.start..], m.padded_in);
                }
                Some(order) => PERMUTED.with_borrow_mut(|permuted| {
                    permuted.clear();
                    for i in 0..rows.tokens {
                        let row = x.row(rows.first + i);
                        permuted.extend(order[inputs.clone()].iter().map(|&k| pick(row, k)));
                    }
                    quantize(permuted, inputs.len());
                }),
            }
        };
        let tasks = tiling.len() * pieces;
        match pool {
            Some(pool) => pool.run(tasks, &task),
            None => (0..tasks).for_each(task),
        }
    }

    /// How the tokens are cut into tiles.
    pub(crate) fn tiling(&self) -> Tiling {
        self.tiling
    }

    /// The records and the sums of a tile, filled for a matrix of this layout.
    pub(super) fn tile(&self, m: &QuantizedMatrix, rows: Rows) -> (&[i32], &[f32]) {
        let (record, groups) = (m.blocks() * RECORD, m.groups.len());
        let words = &self.words[rows.place * record..][..rows.height * record];
        (words, &self.sums[rows.place * groups..][..rows.height * groups])
    }
}

fn grow<T: Default + Clone>(v: &mut Vec<T>, len: usize) {
    if v.len() < len {
        v.resize(len, T::default());
    }
}

/// Quantizes some groups of the padded inputs of a tile.
struct Quantize<'a> {
    /// That will be multiplied, or one of the same layout.
    matrix: &'a QuantizedMatrix,
    groups: Range<usize>,
    /// The inputs of these groups, in rows at a distance of `stride`.
    x: &'a [f32],
    stride: usize,
    words: RawSlice<i32>,
    sums: RawSlice<f32>,
    rows: Rows,
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { matrix: m, groups, x, stride, words, sums, rows } = self;
        let (first_record, height) = (rows.place * m.blocks() * RECORD, rows.height);
        let start = m.groups[groups.start].first;
        for g in groups {
            let group = &m.groups[g];
            let totals = sums.at(rows.place * m.groups.len() + g * height, height);
            totals.write_bytes(0, height);
            for at in (0..group.columns).step_by(BLOCK) {
                let block = group.block + at / BLOCK;
                let inputs = (group.columns - at).min(BLOCK);
                let record = words.at(first_record + block * height * RECORD, height * RECORD);
                let scales = record.add(height * (BLOCK / 4));
                for i in 0..rows.tokens {
                    let inputs = &x[i * stride + group.first - start + at..][..inputs];
                    let to = record.add(i * (BLOCK / 4)).cast();
                    let (scale, sum) = if inputs.len() == BLOCK {
                        quantize::<S>(inputs.as_ptr(), to)
                    } else {
                        let mut padded = [0.0; BLOCK];
                        padded[..inputs.len()].copy_from_slice(inputs);
                        quantize::<S>(padded.as_ptr(), to)
                    };
                    scales.add(i).cast::<f32>().write(scale);
                    scales.add(height + i).write(-(sum as i32) << (m.bits - 1));
                    *totals.add(i) += scale * sum;
                }
            }
        }
    }
}

/// Quantizes one block; returns the scale and the sum of the codes.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: *const f32, to: *mut i8) -> (f32, f32) {
    let mut largest = S::splat(0.0);
    for i in 0..BLOCK / LANES {
        largest = S::max(largest, S::abs(S::load(x.add(i * LANES))));
    }
    let largest = S::max_lane(largest);
    let inverse = inverse(largest, 127.0);
    let mut sum = S::splat(0.0);
    for i in 0..BLOCK / LANES {
        let v = S::round(S::mul(S::load(x.add(i * LANES)), S::splat(inverse)));
        sum = S::add(sum, v);
        S::store_low_bytes(to.add(i * LANES), S::to_i32(v));
    }
    let sum = S::sum(sum);
    // An input that is infinite or NaN makes the sum NaN, whatever the maximum is; the scale shows it.
    let scale = if sum.is_nan() { sum } else { largest * (1.0 / 127.0) };
    (scale, sum)
}
