//! Portable lanes: arrays that the compiler may vectorise for the baseline instruction set.

use half::{bf16, f16};

use super::{LANES, Simd};

/// The portable instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

type F = [f32; LANES];
type I = [u32; LANES];

#[inline(always)]
fn map(a: F, f: impl Fn(f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn zip_i(a: I, b: I, f: impl Fn(u32, u32) -> u32) -> I {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// Halving the vector gives the same order of additions as the vector instruction sets use.
#[inline(always)]
fn reduce(a: F, f: impl Fn(f32, f32) -> f32) -> f32 {
    let b: [f32; 8] = std::array::from_fn(|i| f(a[i], a[i + 8]));
    let c: [f32; 4] = std::array::from_fn(|i| f(b[i], b[i + 4]));
    f(f(c[0], c[2]), f(c[1], c[3]))
}

impl Simd for Scalar {
    type F = F;
    type I = I;
    type M = [bool; LANES];

    const WIDE: bool = false;
    const TALLEST: usize = 1;
    const INT8_TALLEST: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        p.cast::<F>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        p.cast::<F>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        // SAFETY: as above.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        h.map(|x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        // SAFETY: as above.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        h.map(|x| bf16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> F {
        // SAFETY: as above.
        let h = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        h.map(f32::from)
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        zip(a, b, |x, y| x / y)
    }
    // Not `f32::mul_add`: without the instruction it is a library call.
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn fused(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn fnma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| c[i] - a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn sqrt(a: F) -> F {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn lt(a: F, b: F) -> Self::M {
        std::array::from_fn(|i| a[i] < b[i])
    }
    #[inline(always)]
    unsafe fn select(m: Self::M, a: F, b: F) -> F {
        std::array::from_fn(|i| if m[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        reduce(a, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn max_lane(a: F) -> f32 {
        reduce(a, f32::max)
    }

    #[inline(always)]
    unsafe fn load_i32(p: *const u32) -> I {
        p.cast::<I>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> I {
        [x as u32; LANES]
    }
    #[inline(always)]
    unsafe fn add_i32(a: I, b: I) -> I {
        zip_i(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub_i32(a: I, b: I) -> I {
        zip_i(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        zip_i(a, b, |x, y| x & y)
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        zip_i(a, b, |x, y| x | y)
    }
    #[inline(always)]
    unsafe fn xor(a: I, b: I) -> I {
        zip_i(a, b, |x, y| x ^ y)
    }
    #[inline(always)]
    unsafe fn shr(a: I, n: u32) -> I {
        a.map(|x| x >> n)
    }
    #[inline(always)]
    unsafe fn shl(a: I, n: u32) -> I {
        a.map(|x| x << n)
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        a.map(|x| x as i32 as f32)
    }
    #[inline(always)]
    unsafe fn to_i32(a: F) -> I {
        a.map(|x| x.round_ties_even() as i32 as u32)
    }
    #[inline(always)]
    unsafe fn bits(a: F) -> I {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn code(bits: u32, w: I, shift: u32) -> F {
        w.map(|x| (((x << (32 - bits - shift)) as i32) >> (32 - bits)) as f32)
    }
    #[inline(always)]
    unsafe fn dot(_: u32, acc: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let products = w[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes());
            let sum: i32 = products.map(|(w, x)| i32::from(w) * i32::from(x as i8)).sum();
            acc[i].wrapping_add(sum as u32)
        })
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut i8, v: I) {
        p.cast::<[i8; LANES]>().write_unaligned(v.map(|x| x as i8));
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u32, v: I) {
        p.cast::<I>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
