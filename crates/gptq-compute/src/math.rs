//! Elementary functions on vectors, accurate to a few units in the last place of f32.

use crate::arch::Simd;

/// The nearest integer to x within ±2^22, ties to even. Adding 1.5 · 2^23 leaves the integer in the low
/// bits; unlike `round_ties_even` this is no call where the processor's baseline has no rounding.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// `x` rounded to bfloat16, ties to even. A NaN stays one.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    f32::from_bits(if x.is_nan() { bits | 0x0040_0000 } else { up } & 0xFFFF_0000)
}

/// e^x, relative error below 2e-7; 0 below -87.3, e^88.3 above 88.3 and NaN of NaN.
///
/// Range reduction x = n ln 2 + r with the two-part constant of Cody and Waite, then the Taylor
/// polynomial of degree 7 on |r| <= ln 2 / 2.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    let low = S::splat(-87.33654);
    // On x86 these give their second operand where one is NaN.
    let y = S::max(low, S::min(S::splat(88.3), x));
    let n = S::round(S::mul(y, S::splat(std::f32::consts::LOG2_E)));
    let r = S::fnma(n, S::splat(0.693_359_4), y);
    let r = S::fnma(n, S::splat(-2.121_944_4e-4), r);
    let mut p = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    let scale = S::shl(S::add_i32(S::to_i32(n), S::splat_i32(127)), 23);
    let e = S::mul(p, S::from_bits(scale));
    S::select(S::lt(x, low), S::splat(0.0), e)
}

/// x^y for x >= 0 and a constant y > 0, relative error below 3e-6 for y = 2.4; 0^y = 0.
///
/// 2^(y log2 x); the logarithm of the mantissa in [sqrt 1/2, sqrt 2) by the series of
/// artanh((m-1)/(m+1)).
#[inline(always)]
pub(crate) unsafe fn pow<S: Simd>(x: S::F, y: f32) -> S::F {
    let tiny = S::splat(f32::MIN_POSITIVE);
    let bits = S::bits(S::max(x, tiny));
    // Adding the distance to sqrt(1/2) moves the mantissas above sqrt(2) to the next exponent.
    let shifted = S::add_i32(bits, S::splat_i32(0x3f80_0000 - 0x3f35_04f3));
    let exponent = S::sub_i32(S::shr(shifted, 23), S::splat_i32(127));
    let mantissa =
        S::add_i32(S::and(shifted, S::splat_i32(0x007f_ffff)), S::splat_i32(0x3f35_04f3));
    let m = S::from_bits(mantissa);
    let one = S::splat(1.0);
    let t = S::div(S::sub(m, one), S::add(m, one));
    let t2 = S::mul(t, t);
    let mut p = S::splat(1.0 / 9.0);
    for c in [1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        p = S::fma(p, t2, S::splat(c));
    }
    let ln = S::mul(S::mul(S::splat(2.0), t), p);
    let log2 = S::fma(ln, S::splat(std::f32::consts::LOG2_E), S::to_f32(exponent));
    let e = exp2::<S>(S::mul(log2, S::splat(y)));
    S::select(S::lt(x, tiny), S::splat(0.0), e)
}

/// 2^x for x in [-126, 127]; 0 below.
#[inline(always)]
unsafe fn exp2<S: Simd>(x: S::F) -> S::F {
    let low = S::splat(-126.0);
    let y = S::max(S::min(x, S::splat(127.0)), low);
    let n = S::round(y);
    let r = S::mul(S::sub(y, n), S::splat(std::f32::consts::LN_2));
    let mut p = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    let scale = S::shl(S::add_i32(S::to_i32(n), S::splat_i32(127)), 23);
    S::select(S::lt(x, low), S::splat(0.0), S::mul(p, S::from_bits(scale)))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::F) -> S::F {
    let one = S::splat(1.0);
    S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
}

/// tanh x = 1 - 2 / (e^2x + 1) away from zero and its odd Taylor polynomial near it, where the
/// quotient would cancel.
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    let one = S::splat(1.0);
    let e = exp::<S>(S::add(x, x));
    let far = S::sub(one, S::div(S::splat(2.0), S::add(e, one)));
    let x2 = S::mul(x, x);
    let mut p = S::splat(-1382.0 / 155_925.0);
    for c in [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
        p = S::fma(p, x2, S::splat(c));
    }
    S::select(S::lt(S::abs(x), S::splat(0.35)), S::mul(x, p), far)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Isa, Kernel, LANES, dispatch_on};

    struct Eval<'a> {
        which: u8,
        x: &'a [f32; LANES],
    }

    impl Kernel for Eval<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            let mut out = [0.0; LANES];
            let x = S::load(self.x.as_ptr());
            let y = match self.which {
                0 => exp::<S>(x),
                1 => pow::<S>(x, 2.4),
                2 => tanh::<S>(x),
                _ => sigmoid::<S>(x),
            };
            S::store(out.as_mut_ptr(), y);
            out
        }
    }

    fn check(which: u8, range: (f32, f32), tolerance: f64, truth: impl Fn(f64) -> f64) {
        for isa in Isa::available() {
            let mut worst = 0.0f64;
            for i in 0..20_000usize {
                let x: [f32; LANES] = std::array::from_fn(|l| {
                    let u = (i * LANES + l) as f32 / (20_000 * LANES) as f32;
                    range.0 + u * (range.1 - range.0)
                });
                for (x, y) in x.iter().zip(dispatch_on(isa, Eval { which, x: &x })) {
                    let t = truth(f64::from(*x));
                    worst = worst.max((f64::from(y) - t).abs() / t.abs().max(1e-30));
                }
            }
            assert!(worst < tolerance, "{isa:?} function {which}: {worst:e}");
        }
    }

    #[test]
    fn nearest_is_round_ties_even() {
        for x in (-4000..4000).map(|i| i as f32 / 16.0).chain([4_194_303.5, -4_194_303.5, -0.0]) {
            assert_eq!(nearest(x), x.round_ties_even() as i32, "{x}");
        }
    }

    #[test]
    fn rounds_as_bfloat16_does() {
        for bits in (0..=u32::MAX).step_by(65_521).chain([0x7F80_0000, 0x7F80_0001, 0xFFFF_FFFF]) {
            let x = f32::from_bits(bits);
            let (got, want) = (to_bf16(x), half::bf16::from_f32(x).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x}");
        }
    }

    #[test]
    fn functions_match_f64() {
        check(0, (-87.0, 88.0), 3e-7, f64::exp);
        check(1, (1e-6, 12.0), 3e-6, |x| x.powf(2.4));
        check(2, (-9.0, 9.0), 6e-7, f64::tanh);
        check(3, (-60.0, 60.0), 4e-7, |x| 1.0 / (1.0 + (-x).exp()));
    }

    #[test]
    fn edges() {
        for isa in Isa::available() {
            let mut x = [0.0; LANES];
            x[1] = -1000.0;
            x[2] = f32::NEG_INFINITY;
            let e = dispatch_on(isa, Eval { which: 0, x: &x });
            assert_eq!(&e[..3], &[1.0, 0.0, 0.0]);
            let p = dispatch_on(isa, Eval { which: 1, x: &[0.0; LANES] });
            assert_eq!(p[0], 0.0);
            for which in [0, 2, 3] {
                let y = dispatch_on(isa, Eval { which, x: &[f32::NAN; LANES] });
                assert!(y.iter().all(|y| y.is_nan()), "{isa:?} function {which}");
            }
        }
    }
}
