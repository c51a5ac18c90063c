//! y = x Wᵀ with activations in int8: products of bytes, exact within a block of inputs.
//!
//! Per block of [`BLOCK`] inputs or a shorter end of a group, with activation codes a, their scale
//! t, weight codes q with centre h, and per group the weight scale s and zero offset z:
//!
//! y += (s t) · (Σ a q - h Σ a), the bracket in integers;  per group  y -= (s z) · Σ t Σ a.
//!
//! Floats are added in this order with a single rounding on every instruction set and for every
//! tile height, so all of them agree to the bit, and so do all thread counts.

use super::float::{PREFETCH, spare_codes};
use super::input::{BLOCK, Int8Input};
use super::tile::{Out, Sums};
use super::{
    Group, QuantizedMatrix, SCALE_BYTES, STRIP, VECTORS, WORD_BYTES, unit_columns, unit_words,
};
use crate::arch::{Isa, Kernel, LANES, Simd, dispatch_dot};

/// Bytes of one word of the 16 outputs of a vector.
const VECTOR_BYTES: usize = LANES * 4;

/// Some tokens times one strip of outputs.
#[derive(Clone, Copy)]
pub(crate) struct Int8Tile<'a> {
    pub(crate) matrix: &'a QuantizedMatrix,
    pub(crate) strip: usize,
    pub(crate) x: &'a Int8Input,
    /// First token.
    pub(crate) token: usize,
    pub(crate) height: usize,
    pub(crate) out: Out<'a>,
}

impl Int8Tile<'_> {
    /// Computes the tile.
    ///
    /// # Safety
    /// `out` must be valid for its rows and columns, which nobody else may touch.
    pub(crate) unsafe fn run(self, isa: Isa) {
        let m = self.matrix;
        assert!(self.strip < m.strips() && self.out.rows <= self.height);
        self.x.assert_holds(m, self.token + self.height);
        macro_rules! heights {
            ($bits:literal: $($mt:literal)*) => {
                match self.height {
                    $($mt => dispatch_dot(isa, Strip::<$bits, $mt>(self)),)*
                    _ => unreachable!("heights() lists every tile"),
                }
            };
        }
        match m.bits {
            2 => heights!(2: 1 2 4 8),
            3 => heights!(3: 1 2 4 8),
            4 => heights!(4: 1 2 4 8),
            _ => heights!(8: 1 2 4 8),
        }
    }
}

struct Strip<'a, const BITS: u32, const MT: usize>(Int8Tile<'a>);

impl<const BITS: u32, const MT: usize> Kernel for Strip<'_, BITS, MT> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Vectors of outputs at a time: as many as leave registers for codes. Decided in constants,
        // so that the others are not even compiled.
        if const { MT > S::TALLEST } {
            unreachable!("heights() offers no taller ones");
        } else if const { MT == 1 || S::WIDE && MT <= 4 } {
            strip::<S, BITS, MT, 4>(self.0);
        } else if const { S::WIDE || MT == 2 } {
            strip::<S, BITS, MT, 2>(self.0);
        } else {
            strip::<S, BITS, MT, 1>(self.0);
        }
    }
}

#[inline(always)]
unsafe fn strip<S: Simd, const BITS: u32, const MT: usize, const P: usize>(tile: Int8Tile<'_>) {
    let m = tile.matrix;
    let base = m.strip(tile.strip).as_ptr();
    let mut y = Sums([[0.0; STRIP]; MT]);
    for (g, group) in m.groups.iter().enumerate() {
        let header = base.add(group.offset);
        let codes = header.add(m.header_bytes());
        let mut v = 0;
        while v < VECTORS {
            let mut s = [S::splat(0.0); P];
            for p in 0..P {
                s[p] = S::load_f16(header.cast::<u16>().add((v + p) * LANES));
            }
            let y = y.0.as_mut_ptr().cast::<f32>().add(v * LANES);
            let codes = codes.add(v * VECTOR_BYTES);
            blocks::<S, BITS, MT, P>(&tile, group, codes, s, y);
            if m.asymmetric {
                let sums = tile.x.sums.as_ptr().add(g * tile.x.stride + tile.token);
                for p in 0..P {
                    let z = S::load_i8(header.add(SCALE_BYTES + (v + p) * LANES).cast());
                    let minus = S::mul(S::mul(z, s[p]), S::splat(-1.0));
                    for i in 0..MT {
                        let to = y.add(i * STRIP + p * LANES);
                        S::store(to, S::fused(minus, S::splat(*sums.add(i)), S::load(to)));
                    }
                }
            }
            v += P;
        }
    }
    tile.out.write(&mut y);
}

/// Adds the blocks of one group to `y` `[MT][STRIP]`, for `P` vectors of outputs.
#[inline(always)]
unsafe fn blocks<S: Simd, const BITS: u32, const MT: usize, const P: usize>(
    tile: &Int8Tile<'_>,
    group: &Group,
    codes: *const u8,
    s: [S::F; P],
    y: *mut f32,
) {
    let (columns, words) = (unit_columns(BITS), unit_words(BITS));
    let mut w = codes;
    let mut left = group.columns;
    let mut block = group.block;
    while left > 0 {
        let inputs = left.min(BLOCK);
        let at = block * tile.x.stride + tile.token;
        let mut x = tile.x.codes.as_ptr().add(at * BLOCK);
        let mut acc = [[S::splat_i32(0); MT]; P];
        for i in 0..MT {
            let centre = S::splat_i32(*tile.x.centres.as_ptr().add(at + i));
            for p in 0..P {
                acc[p][i] = centre;
            }
        }
        for _ in 0..inputs / columns {
            for word in 0..words {
                for p in 0..P {
                    S::prefetch(w.wrapping_add(word * WORD_BYTES + p * VECTOR_BYTES + PREFETCH));
                }
            }
            unit::<S, BITS, MT, P>(w, x, &mut acc);
            x = x.add(columns);
            w = w.add(words * WORD_BYTES);
        }
        for i in 0..MT {
            let t = S::splat(*tile.x.scales.as_ptr().add(at + i));
            for p in 0..P {
                let to = y.add(i * STRIP + p * LANES);
                S::store(to, S::fused(S::to_f32(acc[p][i]), S::mul(s[p], t), S::load(to)));
            }
        }
        left -= inputs;
        block += 1;
    }
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
