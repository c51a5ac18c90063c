//! AVX2 with FMA and F16C: a vector of 16 lanes is a pair of registers.

#[allow(clippy::wildcard_imports)] // Half of the module would be a list of intrinsics.
use std::arch::{asm, x86_64::*};

use super::{Kernel, Simd};

/// AVX2, FMA and F16C, with AVX-VNNI or without.
#[derive(Debug, Clone, Copy)]
pub struct Avx2<const VNNI: bool = false>;

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

/// Compiles and runs a kernel with AVX2 and AVX-VNNI.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx2,avxvnni,fma,f16c")]
pub(super) unsafe fn enter_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2<true>>()
}

/// The sum of 8 lanes, halving the vector each time.
#[inline(always)]
pub(super) unsafe fn sum8(v: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)))
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
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
    unsafe fn xor(a: I, b: I) -> I {
        [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])]
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
    unsafe fn dot_start(_: u32, centre: I) -> I {
        if VNNI { centre } else { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn dot(bits: u32, acc: I, w: I, x: I) -> I {
        [dot::<VNNI>(bits, acc[0], w[0], x[0]), dot::<VNNI>(bits, acc[1], w[1], x[1])]
    }
    #[inline(always)]
    unsafe fn dot_end(bits: u32, acc: I, centre: I) -> I {
        // Sums in 32 bits are complete.
        if VNNI || bits == 8 {
            return acc;
        }
        let widen = |v| _mm256_madd_epi16(v, _mm256_set1_epi16(1));
        Self::add_i32([widen(acc[0]), widen(acc[1])], centre)
    }
    #[inline(always)]
    unsafe fn dot_words(acc: I, w: I, x: I) -> I {
        [dot_words::<VNNI>(acc[0], w[0], x[0]), dot_words::<VNNI>(acc[1], w[1], x[1])]
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut i8, v: I) {
        // Saturation does nothing: callers store values of one signed byte.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
        let bytes =
            _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u32, v: I) {
        _mm256_storeu_si256(p.cast(), v[0]);
        _mm256_storeu_si256(p.add(8).cast(), v[1]);
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// Adds integers to a sum. Of plain additions LLVM makes trees, whose leaves take more registers than there are.
macro_rules! additions {
    ($($name:ident: $instruction:literal;)*) => {$(
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn $name(mut acc: __m256i, x: __m256i) -> __m256i {
            // SAFETY: the processor has the instruction, which reads and writes these registers alone.
            unsafe {
                asm!(
                    concat!($instruction, " {acc}, {acc}, {x}"),
                    acc = inout(ymm_reg) acc, x = in(ymm_reg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            acc
        }
    )*};
}

additions! { add_i16: "vpaddw"; add_i32: "vpaddd"; }

#[inline(always)]
unsafe fn dot_words<const VNNI: bool>(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    if VNNI { dpwssd(acc, w, x) } else { add_i32(acc, _mm256_madd_epi16(w, x)) }
}

/// `_mm256_dpwssd_avx_epi32`, which LLVM takes apart into two instructions unless it compiles for a certain processor.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn dpwssd(mut acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the processor has the instruction, which reads and writes these registers alone.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {acc}, {w}, {x}",
            acc = inout(ymm_reg) acc, w = in(ymm_reg) w, x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Without VNNI the products of codes of up to 4 bits are summed in the 16 bits that the instruction adds two of them in:
/// those of a block fit. Codes of 8 bits are centred here, since the products of two unsigned ones would not fit.
#[inline(always)]
unsafe fn dot<const VNNI: bool>(bits: u32, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    if VNNI {
        return _mm256_dpbusd_avx_epi32(acc, w, x);
    }
    if bits <= 4 {
        return add_i16(acc, _mm256_maddubs_epi16(w, x));
    }
    let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    add_i32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}
