//! Activations as the tiles read them.

use std::cell::RefCell;

use super::{Group, Layout, PAD, QuantizedMatrix};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_on};
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Inputs that share a scale in int8. On SmolLM2-135M in 4 bits with groups of 64, perplexity rises
/// by 0.22 % with 32, 0.45 % with 64 and 1.02 % with 128; tiles of many tokens cost 17 % more time
/// with 32 than with 64, decoding nothing.
pub(crate) const BLOCK: usize = 32;

/// Tokens that a tile may read behind the last one, because it is higher than what is left.
const SLACK: usize = 12;

/// How quantized layers take their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// As f32: exact up to rounding.
    #[default]
    F32,
    /// Rounded to int8 with one scale per token and block of 32 inputs: faster, at the cost of some
    /// tenths of a percent in perplexity.
    Int8,
}

thread_local! {
    /// The permuted inputs of one token.
    static PERMUTED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn pick(row: &[f32], k: u32) -> f32 {
    if k == PAD { 0.0 } else { row[k as usize] }
}

/// Floats of one token of [`pack_floats`]: the padded inputs and their sum per group.
pub(crate) fn token_floats(layout: Layout<'_>) -> usize {
    layout.0.padded_in + layout.0.groups.len()
}

/// Packs rows `first..first + rows` of `x` for a tile of `height >= rows` tokens:
/// `[padded_in, height]` inputs followed by `[groups, height]` sums, which only asymmetric matrices
/// read (`with_sums`). Missing rows are zero.
pub(crate) fn pack_floats(
    layout: Layout<'_>,
    x: &Tensor,
    (first, rows, height): (usize, usize, usize),
    with_sums: bool,
    out: &mut [f32],
) {
    let m = layout.0;
    let (inputs, sums) = out[..token_floats(layout) * height].split_at_mut(m.padded_in * height);
    if rows < height {
        inputs.fill(0.0);
    }
    for i in 0..rows {
        let row = x.row(first + i);
        let cells = inputs[i..].iter_mut().step_by(height);
        match &m.order {
            None => cells.zip(row).for_each(|(c, v)| *c = *v),
            Some(order) => cells.zip(order.iter()).for_each(|(c, &k)| *c = pick(row, k)),
        }
    }
    if !with_sums {
        return;
    }
    for (sum, group) in sums.chunks_exact_mut(height).zip(m.groups.iter()) {
        let cells = group.first * height..(group.first + group.columns) * height;
        sum.fill(0.0);
        for cells in inputs[cells].chunks_exact(height) {
            for (s, c) in sum.iter_mut().zip(cells) {
                *s += c;
            }
        }
    }
}

/// Inputs in int8, permuted, `[block][token]` of everything that belongs to a block.
#[derive(Debug, Default)]
pub(crate) struct Int8Input {
    /// `[block][token][BLOCK]`, each -127..=127.
    pub(super) codes: Vec<i8>,
    /// `[block][token]`: an input is its code times this.
    pub(super) scales: Vec<f32>,
    /// `[block][token]`: minus the sum of the codes times the centre of the weight codes.
    pub(super) centres: Vec<i32>,
    /// `[group][token]`: the sum of the inputs, as their codes have it.
    pub(super) sums: Vec<f32>,
    /// Tokens.
    pub(super) stride: usize,
}

impl Int8Input {
    /// Quantizes all rows of `x`. One task per token where `pool` is given.
    pub(crate) fn fill(&mut self, isa: Isa, pool: Option<&Pool>, layout: Layout<'_>, x: &Tensor) {
        let m = layout.0;
        let tokens = x.rows();
        self.stride = tokens;
        let (blocks, groups) = (m.blocks() * tokens + SLACK, m.groups.len() * tokens + SLACK);
        // Never shrunk: what lies behind is read by tiles that are higher than the rows left, and
        // not used.
        grow(&mut self.codes, blocks * BLOCK);
        grow(&mut self.scales, blocks);
        grow(&mut self.centres, blocks);
        grow(&mut self.sums, groups);
        let slots = Slots {
            codes: RawSlice::new(&mut self.codes),
            scales: RawSlice::new(&mut self.scales),
            centres: RawSlice::new(&mut self.centres),
            sums: RawSlice::new(&mut self.sums),
            stride: tokens,
        };
        let one = |token: usize| {
            let quantize = |row: &[f32]| {
                assert_eq!(row.len(), m.padded_in, "input width");
                dispatch_on(isa, Quantize { bits: m.bits, groups: &m.groups, row, slots, token });
            };
            match &m.order {
                None => quantize(x.row(token)),
                Some(order) => PERMUTED.with_borrow_mut(|permuted| {
                    permuted.clear();
                    permuted.extend(order.iter().map(|&k| pick(x.row(token), k)));
                    quantize(permuted);
                }),
            }
        };
        match pool {
            Some(pool) => pool.run(tokens, &one),
            None => (0..tokens).for_each(one),
        }
    }

    /// Asserts that tiles of `m` may read tokens below `end`.
    pub(super) fn assert_holds(&self, m: &QuantizedMatrix, end: usize) {
        assert!(end <= self.stride + SLACK);
        let blocks = (m.blocks().max(1) - 1) * self.stride + end;
        assert!(self.codes.len() >= blocks * BLOCK);
        assert!(self.scales.len() >= blocks && self.centres.len() >= blocks);
        assert!(self.sums.len() >= (m.groups.len().max(1) - 1) * self.stride + end);
    }
}

fn grow<T: Default + Clone>(v: &mut Vec<T>, len: usize) {
    if v.len() < len {
        v.resize(len, T::default());
    }
}

/// Where tokens are written, each by one task.
#[derive(Clone, Copy)]
struct Slots {
    codes: RawSlice<i8>,
    scales: RawSlice<f32>,
    centres: RawSlice<i32>,
    sums: RawSlice<f32>,
    stride: usize,
}

/// Quantizes the padded inputs of one token.
struct Quantize<'a> {
    /// Of the weights.
    bits: u32,
    groups: &'a [Group],
    row: &'a [f32],
    slots: Slots,
    token: usize,
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { bits, groups, row, slots, token } = self;
        for (g, group) in groups.iter().enumerate() {
            let inputs = &row[group.first..group.first + group.columns];
            let mut total = 0.0;
            for (block, inputs) in (group.block..).zip(inputs.chunks(BLOCK)) {
                let at = block * slots.stride + token;
                let to = slots.codes.at(at * BLOCK, BLOCK);
                let (scale, sum) = if inputs.len() == BLOCK {
                    quantize::<S>(inputs.as_ptr(), to)
                } else {
                    let mut padded = [0.0; BLOCK];
                    padded[..inputs.len()].copy_from_slice(inputs);
                    quantize::<S>(padded.as_ptr(), to)
                };
                *slots.scales.at(at, 1) = scale;
                *slots.centres.at(at, 1) = -(sum as i32) << (bits - 1);
                total += scale * sum;
            }
            *slots.sums.at(g * slots.stride + token, 1) = total;
        }
    }
}

/// Scales below this are taken for zero: their inverse would overflow.
const TINY: f32 = 1e-30;

/// Quantizes one block; returns the scale and the sum of the codes.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: *const f32, to: *mut i8) -> (f32, f32) {
    let (mut largest, mut invalid) = (S::splat(0.0), S::splat(0.0));
    for i in 0..BLOCK / LANES {
        let v = S::load(x.add(i * LANES));
        largest = S::max(largest, S::abs(v));
        // Zero, or NaN for what is not finite, which the maximum may lose.
        invalid = S::add(invalid, S::sub(v, v));
    }
    let largest = S::max_lane(largest);
    let inverse = if largest > TINY { 127.0 / largest } else { 0.0 };
    let mut sum = S::splat(0.0);
    for i in 0..BLOCK / LANES {
        let v = S::round(S::mul(S::load(x.add(i * LANES)), S::splat(inverse)));
        sum = S::add(sum, v);
        S::store_low_bytes(to.add(i * LANES), S::to_i32(v));
    }
    (largest / 127.0 + S::sum(invalid), S::sum(sum))
}
