//! y = x Wᵀ with activations in f32: codes become floats in registers. With activations in 16 bits,
//! they become pairs of bfloat16 or of integers, what the processor multiplies; elsewhere activations
//! rounded to bfloat16 are taken as f32.
//!
//! Within a group, codes less their centre times activations accumulate in f32; at its end the scale
//! and the zero point or minimum are applied once:  y += s · (Σ x q - z Σ x), or
//! y += s · Σ x q + (s c + m) Σ x.  Integers are summed exactly, and the sum of a group, or of each
//! [`BLOCK`] inputs of a longer one, is multiplied with their scale. The order of all additions is the
//! same for every tile height, so a token's result does not depend on what it is batched with.

use super::input::{Packing, WORD_BLOCK as BLOCK, token_floats};
use super::tile::{Out, Sums};
use super::{Offsets, QuantizedMatrix, STRIP, VECTORS, WORD_BYTES, unit_columns, unit_words};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_on, dispatch_pairs, dispatch_words};

/// How far ahead of the codes to prefetch, in bytes: covers the latency of memory at the bandwidth
/// of one core.
pub(crate) const PREFETCH: usize = 4096;
/// Bytes of one word of the 16 outputs of a vector.
const VECTOR_BYTES: usize = LANES * 4;

/// Some tokens times one strip of outputs.
#[derive(Clone, Copy)]
pub(crate) struct FloatTile<'a> {
    pub(crate) matrix: &'a QuantizedMatrix,
    pub(crate) strip: usize,
    /// As [`pack_floats`] makes it.
    ///
    /// [`pack_floats`]: super::pack_floats
    pub(crate) x: &'a [f32],
    pub(crate) packing: Packing,
    pub(crate) height: usize,
    pub(crate) out: Out<'a>,
}

impl FloatTile<'_> {
    /// Computes the tile.
    ///
    /// # Safety
    /// `out` must be valid for its rows and columns, which nobody else may touch.
    pub(crate) unsafe fn run(self, isa: Isa) {
        let m = self.matrix;
        assert!(self.strip < m.strips() && self.out.rows <= self.height);
        // A single token's floats may be the input itself, if nothing behind them is read.
        let plain = self.packing == Packing::Exact && !m.needs_sums();
        let words = if plain { m.padded_in } else { token_floats(m.layout(), self.packing) };
        assert!(self.x.len() >= words * self.height);
        macro_rules! heights {
            ($bits:literal: $($mt:literal)*) => {
                match (self.height, self.packing) {
                    $(
                        ($mt, Packing::Exact | Packing::Rounded) => {
                            dispatch_on(isa, Strip::<$bits, $mt, FLOATS>(self));
                        }
                        ($mt, Packing::Pairs) => {
                            dispatch_pairs(isa, Strip::<$bits, $mt, PAIRS>(self));
                        }
                        ($mt, Packing::Words) => {
                            dispatch_words(isa, Strip::<$bits, $mt, WORDS>(self));
                        }
                    )*
                    _ => unreachable!("heights() lists every tile"),
                }
            };
        }
        match m.bits {
            2 => heights!(2: 1 2 4 8 12),
            3 => heights!(3: 1 2 4 8 12),
            4 => heights!(4: 1 2 4 8 12),
            _ => heights!(8: 1 2 4 8 12),
        }
    }
}

/// Prefetches what the codes behind a group's header leave out, since they look ahead from their own
/// places: two lines in 66 or 130 that would each be waited for.
#[inline(always)]
pub(super) unsafe fn prefetch_header<S: Simd>(header: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LANES * 4) {
        S::prefetch(header.wrapping_add(PREFETCH + line));
    }
}

/// What a kernel multiplies: f32, pairs of bfloat16 or pairs of integers.
const FLOATS: u8 = 0;
const PAIRS: u8 = 1;
const WORDS: u8 = 2;

struct Strip<'a, const BITS: u32, const MT: usize, const KIND: u8>(FloatTile<'a>);

impl<const BITS: u32, const MT: usize, const KIND: u8> Kernel for Strip<'_, BITS, MT, KIND> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Vectors of outputs at a time: as many as leave registers for codes. Decided in constants,
        // so that the others are not even compiled.
        if const { MT > S::TALLEST } {
            unreachable!("heights() offers no taller ones");
        } else if const { MT == 1 || S::WIDE && MT <= 4 } {
            strip::<S, BITS, MT, 4, KIND>(self.0);
        } else if const { S::WIDE || MT == 2 } {
            strip::<S, BITS, MT, 2, KIND>(self.0);
        } else {
            strip::<S, BITS, MT, 1, KIND>(self.0);
        }
    }
}

#[inline(always)]
unsafe fn strip<S: Simd, const BITS: u32, const MT: usize, const P: usize, const KIND: u8>(
    tile: FloatTile<'_>,
) {
    let m = tile.matrix;
    let base = m.strip(tile.strip).as_ptr();
    // Inputs of one word of `x`.
    let wide = if KIND == FLOATS { 1 } else { 2 };
    let sums = tile.x.as_ptr().wrapping_add(m.padded_in / wide * MT);
    // Of integers alone.
    let scales = sums.wrapping_add(m.word_blocks() * MT);
    let centres = scales.wrapping_add(m.word_blocks() * MT).cast::<i32>();
    let header_bytes = m.header.bytes();
    let mut y = Sums([[0.0; STRIP]; MT]);
    for (g, group) in m.groups.iter().enumerate() {
        let header = base.add(group.offset);
        let offsets = header.add(m.header.scale_bytes());
        if MT <= 4 {
            prefetch_header::<S>(header, header_bytes);
        }
        // A group may have no inputs.
        let step = if KIND == WORDS { BLOCK } else { group.columns.max(1) };
        for start in (0..group.columns).step_by(step) {
            let block = if KIND == WORDS { group.word_block + start / BLOCK } else { g };
            let x = tile.x.as_ptr().add((group.first + start) / wide * MT);
            let units = (group.columns - start).min(step) / unit_columns(BITS);
            let first = header_bytes + start / unit_columns(BITS) * unit_words(BITS) * WORD_BYTES;
            let mut v = 0;
            while v < VECTORS {
                let codes = header.add(first + v * VECTOR_BYTES);
                let mut part = [[S::splat(0.0); MT]; P];
                if KIND == WORDS {
                    for i in 0..MT {
                        let centre = S::splat_i32(*centres.add(block * MT + i));
                        for p in 0..P {
                            part[p][i] = S::from_bits(centre);
                        }
                    }
                }
                products::<S, BITS, MT, P, KIND>(codes, units, x, &mut part);
                if KIND == WORDS {
                    for i in 0..MT {
                        let scale = S::splat(*scales.add(block * MT + i));
                        for p in 0..P {
                            part[p][i] = S::mul(S::to_f32(S::bits(part[p][i])), scale);
                        }
                    }
                }
                for p in 0..P {
                    let lane = (v + p) * LANES;
                    let s = m.header.load::<S>(header, lane);
                    match m.header.offsets {
                        Offsets::None => {}
                        Offsets::Zeros => {
                            let z = S::load_i8(offsets.cast::<i8>().add(lane));
                            for i in 0..MT {
                                let sum = S::splat(*sums.add(block * MT + i));
                                part[p][i] = S::fnma(z, sum, part[p][i]);
                            }
                        }
                        Offsets::Minima { centre } => {
                            let minimum = m.header.load::<S>(offsets, lane);
                            let b = S::fma(s, S::splat(centre), minimum);
                            for i in 0..MT {
                                let to = y.0[i].as_mut_ptr().add(lane);
                                let sum = S::splat(*sums.add(block * MT + i));
                                S::store(to, S::fma(b, sum, S::load(to)));
                            }
                        }
                    }
                    for i in 0..MT {
                        let to = y.0[i].as_mut_ptr().add(lane);
                        S::store(to, S::fma(s, part[p][i], S::load(to)));
                    }
                }
                v += P;
            }
        }
    }
    tile.out.write(&mut y.0);
}

#[inline(always)]
unsafe fn multiply<S: Simd, const MT: usize, const P: usize>(
    part: &mut [[S::F; MT]; P],
    code: [S::F; P],
    x: *const f32,
) {
    for i in 0..MT {
        let v = S::splat(*x.add(i));
        for p in 0..P {
            part[p][i] = S::fma(code[p], v, part[p][i]);
        }
    }
}

#[inline(always)]
unsafe fn multiply_pairs<S: Simd, const MT: usize, const P: usize, const KIND: u8>(
    part: &mut [[S::F; MT]; P],
    codes: [S::I; P],
    x: *const f32,
) {
    for i in 0..MT {
        let v = S::splat_i32(*x.add(i).cast::<i32>());
        for p in 0..P {
            part[p][i] = if KIND == WORDS {
                S::from_bits(S::dot_words(S::bits(part[p][i]), codes[p], v))
            } else {
                S::dot_pairs(part[p][i], codes[p], v)
            };
        }
    }
}

/// Repeats an expression for each literal, so that shifts are constants of the instruction.
macro_rules! unroll {
    ($j:ident in [$($n:literal)*] $body:block) => {{ $({ const $j: u32 = $n; $body })* }};
}

/// Adds Σ x q over some units of a group, for `P` vectors of outputs. Of integers, which lie where floats do, it is the
/// sum of x times the code as it is stored.
#[inline(always)]
unsafe fn products<S: Simd, const BITS: u32, const MT: usize, const P: usize, const KIND: u8>(
    codes: *const u8,
    units: usize,
    x: *const f32,
    part: &mut [[S::F; MT]; P],
) {
    let (mut w, mut x) = (codes, x);
    let top = S::splat_i32(match BITS {
        2 => 0xAAAA_AAAA_u32,
        3 => 0x4444_4444,
        4 => 0x8888_8888,
        _ => 0x8080_8080,
    } as i32);
    // Integers take codes as they are stored.
    let centre = |w| if KIND == WORDS { w } else { S::centre(w, top) };
    let low = S::splat_i32(0x0001_0001 * ((1 << BITS) - 1));
    for _ in 0..units {
        // Input k of a word sits in byte k mod 4 at bit k div 4 times the width of its place.
        macro_rules! step {
            ($a:expr, $place:literal, $j:expr, $at:expr) => {{
                let shift = 8 * ($j % 4) + $place * ($j / 4);
                if KIND == FLOATS {
                    let mut code = [S::splat(0.0); P];
                    for p in 0..P {
                        code[p] = S::code(BITS, $a[p], shift);
                    }
                    multiply::<S, MT, P>(part, code, x.add(($at + $j as usize) * MT));
                } else if $j % 4 < 2 {
                    // The input two places on is 16 bits further; both come with the first.
                    let mut codes = $a;
                    for p in 0..P {
                        codes[p] = if KIND == PAIRS {
                            S::pair(BITS, $a[p], shift)
                        } else if shift == 0 {
                            S::and($a[p], low)
                        } else {
                            S::and(S::shr($a[p], shift), low)
                        };
                    }
                    let pair = ($at + $j as usize) / 4 * 2 + $j as usize % 4;
                    multiply_pairs::<S, MT, P, KIND>(part, codes, x.add(pair * MT));
                }
            }};
        }
        let mut a = [S::splat_i32(0); P];
        for p in 0..P {
            a[p] = centre(S::load_i32(w.add(p * VECTOR_BYTES).cast()));
            if MT <= 4 {
                for word in 0..unit_words(BITS) {
                    let line = w.wrapping_add(word * WORD_BYTES + p * VECTOR_BYTES + PREFETCH);
                    S::prefetch(line);
                }
            }
        }
        match BITS {
            2 => unroll!(J in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] { step!(a, 2, J, 0); }),
            4 => unroll!(J in [0 1 2 3 4 5 6 7] { step!(a, 4, J, 0); }),
            8 => unroll!(J in [0 1 2 3] { step!(a, 8, J, 0); }),
            _ => {
                let (mut b, mut c, mut d) = (a, a, a);
                for p in 0..P {
                    let raw = w.add(p * VECTOR_BYTES);
                    a[p] = S::load_i32(raw.cast());
                    b[p] = S::load_i32(raw.add(WORD_BYTES).cast());
                    c[p] = S::load_i32(raw.add(2 * WORD_BYTES).cast());
                    d[p] = centre(spare_codes::<S>(a[p], b[p], c[p]));
                    a[p] = centre(a[p]);
                    b[p] = centre(b[p]);
                    c[p] = centre(c[p]);
                }
                unroll!(J in [0 1 2 3 4 5 6 7] { step!(a, 4, J, 0); });
                unroll!(J in [0 1 2 3 4 5 6 7] { step!(b, 4, J, 8); });
                unroll!(J in [0 1 2 3 4 5 6 7] { step!(c, 4, J, 16); });
                unroll!(J in [0 1 2 3 4 5 6 7] { step!(d, 4, J, 24); });
            }
        }
        x = x.add(unit_columns(BITS) / if KIND == FLOATS { 1 } else { 2 } * MT);
        w = w.add(unit_words(BITS) * WORD_BYTES);
    }
}

/// The last eight codes of a 3-bit unit, collected from the spare bits of its words.
#[inline(always)]
pub(super) unsafe fn spare_codes<S: Simd>(a: S::I, b: S::I, c: S::I) -> S::I {
    let one = S::and(S::shr(a, 3), S::splat_i32(0x1111_1111));
    let two = S::and(S::shr(b, 2), S::splat_i32(0x2222_2222));
    let four = S::and(S::shr(c, 1), S::splat_i32(0x4444_4444));
    S::or(S::or(one, two), four)
}
