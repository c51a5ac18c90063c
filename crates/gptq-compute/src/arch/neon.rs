//! NEON: a vector of 16 lanes is four registers.

#[allow(clippy::wildcard_imports)] // Half of the module would be a list of intrinsics.
use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, Simd};

/// NEON, with the extension `DOT` for products of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Neon<const DOT: u8 = NONE>;

/// No extension.
const NONE: u8 = 0;
/// Signed by signed bytes (dotprod).
const SIGNED: u8 = 1;
/// Those, and unsigned by signed ones (i8mm).
const MIXED: u8 = 2;

type F = [float32x4_t; 4];
type I = [uint32x4_t; 4];

/// Compiles and runs a kernel with NEON.
///
/// # Safety
/// The processor must have it; every 64-bit ARM has.
#[target_feature(enable = "neon")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Neon>()
}

/// Compiles and runs a kernel with NEON and dotprod.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn enter_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Neon<SIGNED>>()
}

/// Compiles and runs a kernel with NEON, dotprod and i8mm.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) unsafe fn enter_i8mm<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Neon<MIXED>>()
}

/// Applies an intrinsic to each of the four registers. A macro and not a function with a closure:
/// closures are not compiled inside the `#[target_feature]` function.
macro_rules! each {
    ($i:ident: $e:expr) => {
        [
            { const $i: usize = 0; $e },
            { const $i: usize = 1; $e },
            { const $i: usize = 2; $e },
            { const $i: usize = 3; $e },
        ]
    };
}

/// Four f16 as f32.
#[inline(always)]
unsafe fn widen_f16(p: *const u16) -> float32x4_t {
    let (half, wide): (uint16x4_t, float32x4_t) = (vld1_u16(p), vdupq_n_f32(0.0));
    let mut out = wide;
    // The intrinsic needs an unstable type.
    asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) half, options(pure, nomem, nostack));
    out
}

/// Four signed bytes per lane times four signed bytes, added to the lane.
#[inline(always)]
unsafe fn dot_signed<const DOT: u8>(acc: uint32x4_t, w: uint32x4_t, x: uint32x4_t) -> uint32x4_t {
    if DOT != NONE {
        let mut out = acc;
        // The intrinsic is unstable.
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) out, in(vreg) w, in(vreg) x,
            options(pure, nomem, nostack)
        );
        return out;
    }
    let (w, x) = (vreinterpretq_s8_u32(w), vreinterpretq_s8_u32(x));
    let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    let high = vmull_high_s8(w, x);
    let pairs = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    vaddq_u32(acc, vreinterpretq_u32_s32(pairs))
}

/// Four unsigned bytes per lane times four signed bytes, added to the lane.
#[inline(always)]
unsafe fn dot_mixed(acc: uint32x4_t, w: uint32x4_t, x: uint32x4_t) -> uint32x4_t {
    let mut out = acc;
    // The intrinsic is unstable.
    asm!(
        "usdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
        inout(vreg) out, in(vreg) w, in(vreg) x,
        options(pure, nomem, nostack)
    );
    out
}

impl<const DOT: u8> Simd for Neon<DOT> {
    type F = F;
    type I = I;
    type M = I;

    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [vdupq_n_f32(x); 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        each!(J: vld1q_f32(p.add(4 * J)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        each!(J: vst1q_f32(p.add(4 * J), v[J]));
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        each!(J: widen_f16(p.add(4 * J)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        each!(J: vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(4 * J)))))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> F {
        let v = vld1q_s8(p);
        let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
        [
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_high_s16(high)),
        ]
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        each!(J: vaddq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        each!(J: vsubq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        each!(J: vmulq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        each!(J: vdivq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        each!(J: vfmaq_f32(c[J], a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn fnma(a: F, b: F, c: F) -> F {
        each!(J: vfmsq_f32(c[J], a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        each!(J: vminq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        each!(J: vmaxq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        each!(J: vabsq_f32(a[J]))
    }
    #[inline(always)]
    unsafe fn sqrt(a: F) -> F {
        each!(J: vsqrtq_f32(a[J]))
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        each!(J: vrndnq_f32(a[J]))
    }
    #[inline(always)]
    unsafe fn lt(a: F, b: F) -> I {
        each!(J: vcltq_f32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn select(m: I, a: F, b: F) -> F {
        each!(J: vbslq_f32(m[J], a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let (low, high) = (vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
        let v = vaddq_f32(low, high);
        let w = vadd_f32(vget_low_f32(v), vget_high_f32(v));
        vget_lane_f32::<0>(w) + vget_lane_f32::<1>(w)
    }
    #[inline(always)]
    unsafe fn max_lane(a: F) -> f32 {
        vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[2]), vmaxq_f32(a[1], a[3])))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u32) -> I {
        each!(J: vld1q_u32(p.add(4 * J)))
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> I {
        [vdupq_n_u32(x as u32); 4]
    }
    #[inline(always)]
    unsafe fn add_i32(a: I, b: I) -> I {
        each!(J: vaddq_u32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn sub_i32(a: I, b: I) -> I {
        each!(J: vsubq_u32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        each!(J: vandq_u32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        each!(J: vorrq_u32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn xor(a: I, b: I) -> I {
        each!(J: veorq_u32(a[J], b[J]))
    }
    #[inline(always)]
    unsafe fn shr(a: I, n: u32) -> I {
        let n = vdupq_n_s32(-(n as i32));
        each!(J: vshlq_u32(a[J], n))
    }
    #[inline(always)]
    unsafe fn shl(a: I, n: u32) -> I {
        let n = vdupq_n_s32(n as i32);
        each!(J: vshlq_u32(a[J], n))
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        each!(J: vcvtq_f32_s32(vreinterpretq_s32_u32(a[J])))
    }
    #[inline(always)]
    unsafe fn to_i32(a: F) -> I {
        each!(J: vreinterpretq_u32_s32(vcvtnq_s32_f32(a[J])))
    }
    #[inline(always)]
    unsafe fn bits(a: F) -> I {
        each!(J: vreinterpretq_u32_f32(a[J]))
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        each!(J: vreinterpretq_f32_u32(a[J]))
    }
    #[inline(always)]
    unsafe fn code(bits: u32, w: I, shift: u32) -> F {
        let up = vdupq_n_s32((32 - bits - shift) as i32);
        let down = vdupq_n_s32(bits as i32 - 32);
        each!(J: vcvtq_f32_s32(vshlq_s32(vshlq_s32(vreinterpretq_s32_u32(w[J]), up), down)))
    }
    #[inline(always)]
    unsafe fn dot(bits: u32, acc: I, w: I, x: I) -> I {
        if DOT == MIXED {
            return each!(J: dot_mixed(acc[J], w[J], x[J]));
        }
        if bits < 8 {
            return each!(J: dot_signed::<DOT>(acc[J], w[J], x[J]));
        }
        // Both factors are signed here: codes of 8 bits are halved, w = 2 (w / 2) + w mod 2.
        let one = vdupq_n_u8(1);
        each!(J: {
            let w = vreinterpretq_u8_u32(w[J]);
            let half = vreinterpretq_u32_u8(vshrq_n_u8::<1>(w));
            let odd = vreinterpretq_u32_u8(vandq_u8(w, one));
            let twice = dot_signed::<DOT>(dot_signed::<DOT>(acc[J], half, x[J]), half, x[J]);
            dot_signed::<DOT>(twice, odd, x[J])
        })
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut i8, v: I) {
        let low = vmovn_high_u32(vmovn_u32(v[0]), v[1]);
        let high = vmovn_high_u32(vmovn_u32(v[2]), v[3]);
        vst1q_s8(p, vreinterpretq_s8_u8(vmovn_high_u16(vmovn_u16(low), high)));
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u32, v: I) {
        each!(J: vst1q_u32(p.add(4 * J), v[J]));
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // No memory is accessed that could be seen; any address will do.
        asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, readonly, preserves_flags));
    }
}
