//! AVX2 with FMA and F16C: a vector of 16 lanes is a pair of registers.

#[allow(clippy::wildcard_imports)] // Half of the module would be a list of intrinsics.
use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

type F = [__m256; 2];
type I = [__m256i; 2];

/// Compiles and runs a kernel with AVX2.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// The sum of 8 lanes, halving the vector each time.
#[inline(always)]
pub(super) unsafe fn sum8(v: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)))
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type M = F;

    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
        ]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        let widen = |q: *const u16| {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(q.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        };
        [widen(p), widen(p.add(8))]
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> F {
        let widen =
            |q: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(q.cast())));
        [widen(p), widen(p.add(8))]
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn fnma(a: F, b: F, c: F) -> F {
        [_mm256_fnmadd_ps(a[0], b[0], c[0]), _mm256_fnmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        let sign = _mm256_set1_ps(-0.0);
        [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
    }
    #[inline(always)]
    unsafe fn sqrt(a: F) -> F {
        [_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])]
    }
    #[inline(always)]
    unsafe fn lt(a: F, b: F) -> F {
        [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn select(m: F, a: F, b: F) -> F {
        [_mm256_blendv_ps(b[0], a[0], m[0]), _mm256_blendv_ps(b[1], a[1], m[1])]
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        sum8(_mm256_add_ps(a[0], a[1]))
    }
    #[inline(always)]
    unsafe fn max_lane(a: F) -> f32 {
        let v = _mm256_max_ps(a[0], a[1]);
        let x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let y = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)))
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u32) -> I {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> I {
        [_mm256_set1_epi32(x); 2]
    }
    #[inline(always)]
    unsafe fn add_i32(a: I, b: I) -> I {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub_i32(a: I, b: I) -> I {
        [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn shr(a: I, n: u32) -> I {
        let n = _mm256_set1_epi32(n as i32);
        [_mm256_srlv_epi32(a[0], n), _mm256_srlv_epi32(a[1], n)]
    }
    #[inline(always)]
    unsafe fn shl(a: I, n: u32) -> I {
        let n = _mm256_set1_epi32(n as i32);
        [_mm256_sllv_epi32(a[0], n), _mm256_sllv_epi32(a[1], n)]
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn to_i32(a: F) -> I {
        [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])]
    }
    #[inline(always)]
    unsafe fn bits(a: F) -> I {
        [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])]
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> F {
        [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn code(bits: u32, w: I, shift: u32) -> F {
        let up = _mm256_set1_epi32((32 - bits - shift) as i32);
        let down = _mm256_set1_epi32((32 - bits) as i32);
        let one = |x| _mm256_cvtepi32_ps(_mm256_srav_epi32(_mm256_sllv_epi32(x, up), down));
        [one(w[0]), one(w[1])]
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}
