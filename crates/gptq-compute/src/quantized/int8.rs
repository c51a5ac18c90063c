//! y = x Wᵀ with activations in int8: products of bytes, exact within a block of inputs.
//!
//! Per block of [`BLOCK`] inputs or a shorter end of a group, with activation codes a, their scale
//! t, weight codes q with centre h, and per group the weight scale s and zero offset z:
//!
//! y += s · (Σ t (Σ a q - h Σ a) - z Σ t Σ a), the inner bracket in integers; with minima m of codes
//! of centre c, y += s · Σ t (..) + (s c + m) Σ t Σ a. Of long groups, parts of [`CHUNK`] inputs are
//! added to y as they are finished.
//!
//! Floats are added in this order with a single rounding on every instruction set and for every
//! tile height, so all of them agree to the bit, and so do all thread counts.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::float::{PREFETCH, prefetch_header, spare_codes};
use super::input::{BLOCK, Int8Input, RECORD};
use super::tile::{Out, Rows, Sums};
use super::{
    Header, Offsets, QuantizedMatrix, STRIP, VECTORS, WORD_BYTES, unit_columns, unit_words,
};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_dot};

/// Tiles that one call computes: they share a chunk of weights in the first level cache.
pub(crate) const TILES: usize = 4;
/// Tokens of so many tiles, at most.
const TOKENS: usize = TILES * 6;
/// Inputs after which sums are scaled and added to the result, at the latest. Their codes, in two
/// vectors up to all of 8 bits, stay in the first level cache.
const CHUNK: usize = 8 * BLOCK;
/// [`Simd::dot`] is for so many inputs.
const _: () = assert!(BLOCK <= 8 * 4);
/// Bytes of one word of the 16 outputs of a vector.
const VECTOR_BYTES: usize = LANES * 4;

/// Some tiles of tokens times one strip of outputs.
pub(crate) struct Int8Tiles<'a> {
    pub(crate) matrix: &'a QuantizedMatrix,
    pub(crate) strip: usize,
    pub(crate) x: &'a Int8Input,
    /// At most [`TILES`] tiles of `x`.
    pub(crate) tiles: Range<usize>,
    /// Of all their rows.
    pub(crate) out: Out<'a>,
}

impl Int8Tiles<'_> {
    /// Computes the tiles.
    ///
    /// # Safety
    /// `out` must be valid for its rows and columns, which nobody else may touch.
    pub(crate) unsafe fn run(self, isa: Isa) {
        let m = self.matrix;
        assert!(self.strip < m.strips() && self.out.rows <= TOKENS);
        match m.bits {
            2 => dispatch_dot(isa, Strip::<2>(self)),
            3 => dispatch_dot(isa, Strip::<3>(self)),
            4 => dispatch_dot(isa, Strip::<4>(self)),
            _ => dispatch_dot(isa, Strip::<8>(self)),
        }
    }
}

struct Strip<'a, const BITS: u32>(Int8Tiles<'a>);

impl<const BITS: u32> Kernel for Strip<'_, BITS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Int8Tiles { matrix: m, strip, x, tiles, out } = self.0;
        let base = m.strip(strip).as_ptr();
        let mut sums = MaybeUninit::<Sums<TOKENS>>::uninit();
        // Only the rows in use: a single token should not pay for all.
        sums.as_mut_ptr().cast::<[f32; STRIP]>().write_bytes(0, out.rows);
        let y = std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast::<[f32; STRIP]>(), out.rows);
        let header_bytes = m.header.bytes();
        let tiles: [_; TILES] = std::array::from_fn(|i| {
            let tile = tiles.clone().nth(i)?;
            let rows = x.tiling().tile(tile);
            Some((rows, x.tile(m, rows)))
        });
        for (g, group) in m.groups.iter().enumerate() {
            let header = base.add(group.offset);
            prefetch_header::<S>(header, header_bytes);
            let codes = header.add(header_bytes);
            let mut start = 0;
            while start < group.columns {
                let columns = (group.columns - start).min(CHUNK);
                let last = start + columns == group.columns;
                let mut row = 0;
                for &(rows, (records, totals)) in tiles.iter().flatten() {
                    assert!(row + rows.height <= y.len(), "rows of the tiles");
                    let block = group.block + start / BLOCK;
                    let chunk = Chunk {
                        header: m.header,
                        scales: header,
                        offsets: (last && m.needs_sums())
                            .then(|| header.add(m.header.scale_bytes())),
                        codes: codes
                            .add(start / unit_columns(BITS) * unit_words(BITS) * WORD_BYTES),
                        columns,
                        x: records.as_ptr().add(block * rows.height * RECORD),
                        totals: totals.as_ptr().add(g * rows.height),
                        y: y.as_mut_ptr().add(row).cast(),
                    };
                    chunk.dispatch::<S, BITS>(rows);
                    row += rows.height;
                }
                start += columns;
            }
        }
        out.write(y);
    }
}

/// A part of a group, times the tokens of one tile.
struct Chunk {
    header: Header,
    /// `[STRIP]`
    scales: *const u8,
    /// `[STRIP]`, with the last chunk of a group that has some.
    offsets: Option<*const u8>,
    codes: *const u8,
    columns: usize,
    /// Records of its blocks.
    x: *const i32,
    /// Sums of the inputs of the group, per token.
    totals: *const f32,
    /// `[token][STRIP]`
    y: *mut f32,
}

impl Chunk {
    /// Picks the tile, with as many vectors of outputs as leave registers for codes.
    #[inline(always)]
    unsafe fn dispatch<S: Simd, const BITS: u32>(self, rows: Rows) {
        macro_rules! heights {
            ($($mt:literal: $wide:literal, $narrow:literal;)*) => {
                match rows.height {
                    $($mt if const { $mt <= S::INT8_TALLEST } => {
                        if const { S::WIDE } {
                            self.run::<S, BITS, $mt, $wide>();
                        } else {
                            self.run::<S, BITS, $mt, $narrow>();
                        }
                    })*
                    _ => unreachable!("the tilings offer no others"),
                }
            };
        }
        heights! { 1: 4, 4; 2: 4, 2; 3: 4, 1; 4: 2, 1; 5: 2, 1; 6: 2, 1; }
    }

    #[inline(always)]
    unsafe fn run<S: Simd, const BITS: u32, const MT: usize, const P: usize>(self) {
        let mut v = 0;
        while v < VECTORS {
            let codes = self.codes.add(v * VECTOR_BYTES);
            let mut part = blocks::<S, BITS, MT, P>(self.columns, codes, self.x);
            for p in 0..P {
                let lane = (v + p) * LANES;
                let s = self.header.load::<S>(self.scales, lane);
                match (self.offsets, self.header.offsets) {
                    (Some(zeros), Offsets::Zeros) => {
                        let z = S::mul(S::load_i8(zeros.cast::<i8>().add(lane)), S::splat(-1.0));
                        for i in 0..MT {
                            part[p][i] = S::fused(z, S::splat(*self.totals.add(i)), part[p][i]);
                        }
                    }
                    (Some(minima), Offsets::Minima { centre }) => {
                        let minimum = self.header.load::<S>(minima, lane);
                        let b = S::fused(s, S::splat(centre), minimum);
                        for i in 0..MT {
                            let to = self.y.add(i * STRIP + lane);
                            S::store(to, S::fused(b, S::splat(*self.totals.add(i)), S::load(to)));
                        }
                    }
                    _ => {}
                }
                for i in 0..MT {
                    let to = self.y.add(i * STRIP + lane);
                    S::store(to, S::fused(s, part[p][i], S::load(to)));
                }
            }
            v += P;
        }
    }
}

/// Σ t (Σ a q - h Σ a) over the blocks of `columns` inputs, for `P` vectors of outputs.
#[inline(always)]
unsafe fn blocks<S: Simd, const BITS: u32, const MT: usize, const P: usize>(
    columns: usize,
    codes: *const u8,
    x: *const i32,
) -> [[S::F; MT]; P] {
    let words = unit_words(BITS);
    let (mut w, mut x) = (codes, x);
    let mut part = [[S::splat(0.0); MT]; P];
    let mut left = columns;
    while left > 0 {
        let inputs = left.min(BLOCK);
        let scales = x.add(MT * (BLOCK / 4)).cast::<f32>();
        let centres = x.add(MT * (BLOCK / 4 + 1));
        let mut acc = [[S::splat_i32(0); MT]; P];
        for i in 0..MT {
            let centre = S::splat_i32(*centres.add(i));
            for p in 0..P {
                acc[p][i] = S::dot_start(BITS, centre);
            }
        }
        let mut four = x.cast::<i8>();
        for _ in 0..inputs / unit_columns(BITS) {
            for word in 0..words {
                for p in 0..P {
                    S::prefetch(w.wrapping_add(word * WORD_BYTES + p * VECTOR_BYTES + PREFETCH));
                }
            }
            unit::<S, BITS, MT, P>(w, four, &mut acc);
            four = four.add(unit_columns(BITS));
            w = w.add(words * WORD_BYTES);
        }
        for i in 0..MT {
            let t = S::splat(*scales.add(i));
            let centre = S::splat_i32(*centres.add(i));
            for p in 0..P {
                let sum = S::to_f32(S::dot_end(BITS, acc[p][i], centre));
                part[p][i] = S::fused(sum, t, part[p][i]);
            }
        }
        x = x.add(MT * RECORD);
        left -= inputs;
    }
    part
}

/// Adds the products of the four inputs at `x`, `[MT]` tokens of [`BLOCK`] apart, with their codes,
/// one per byte of a lane.
#[inline(always)]
unsafe fn dots<S: Simd, const BITS: u32, const MT: usize, const P: usize>(
    codes: [S::I; P],
    x: *const i8,
    acc: &mut [[S::I; MT]; P],
) {
    for i in 0..MT {
        let x = S::splat_i32(x.add(i * BLOCK).cast::<i32>().read_unaligned());
        for p in 0..P {
            acc[p][i] = S::dot(BITS, acc[p][i], codes[p], x);
        }
    }
}

/// Adds the products of one unit of `P` vectors.
#[inline(always)]
unsafe fn unit<S: Simd, const BITS: u32, const MT: usize, const P: usize>(
    codes: *const u8,
    x: *const i8,
    acc: &mut [[S::I; MT]; P],
) {
    let mut a = [S::splat_i32(0); P];
    for p in 0..P {
        a[p] = S::load_i32(codes.add(p * VECTOR_BYTES).cast());
    }
    macro_rules! four {
        ($index:literal, $word:ident, $shift:literal, $mask:literal) => {{
            let mut codes = $word;
            for p in 0..P {
                let shifted = if $shift == 0 { $word[p] } else { S::shr($word[p], $shift) };
                codes[p] = S::and(shifted, S::splat_i32($mask));
            }
            dots::<S, BITS, MT, P>(codes, x.add(4 * $index), acc);
        }};
    }
    match BITS {
        8 => dots::<S, BITS, MT, P>(a, x, acc),
        4 => {
            four!(0, a, 0, 0x0F0F_0F0F);
            four!(1, a, 4, 0x0F0F_0F0F);
        }
        2 => {
            four!(0, a, 0, 0x0303_0303);
            four!(1, a, 2, 0x0303_0303);
            four!(2, a, 4, 0x0303_0303);
            four!(3, a, 6, 0x0303_0303);
        }
        _ => {
            let (mut b, mut c, mut d) = (a, a, a);
            for p in 0..P {
                b[p] = S::load_i32(codes.add(WORD_BYTES + p * VECTOR_BYTES).cast());
                c[p] = S::load_i32(codes.add(2 * WORD_BYTES + p * VECTOR_BYTES).cast());
                d[p] = spare_codes::<S>(a[p], b[p], c[p]);
            }
            four!(0, a, 0, 0x0707_0707);
            four!(1, a, 4, 0x0707_0707);
            four!(2, b, 0, 0x0707_0707);
            four!(3, b, 4, 0x0707_0707);
            four!(4, c, 0, 0x0707_0707);
            four!(5, c, 4, 0x0707_0707);
            four!(6, d, 0, 0x0707_0707);
            four!(7, d, 4, 0x0707_0707);
        }
    }
}
