//! AVX-512: one register is one vector of 16 lanes.

#[allow(clippy::wildcard_imports)] // Half of the module would be a list of intrinsics.
use std::arch::{asm, x86_64::*};

use super::{Kernel, Simd};

/// AVX-512 F, BW, DQ, VL with FMA and F16C; VNNI in kernels that multiply bytes or words.
#[derive(Debug, Clone, Copy)]
pub struct Avx512;

/// Compiles and runs a kernel with AVX-512.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// Compiles and runs a kernel with AVX-512 and VNNI.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
pub(super) unsafe fn enter_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// `_mm512_dpwssd_epi32`, which LLVM takes apart into two instructions unless it compiles for a certain processor: half
/// as fast.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_words(mut acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
    // SAFETY: the processor has the instruction, which reads and writes these registers alone.
    unsafe {
        asm!(
            "vpdpwssd {acc}, {w}, {x}",
            acc = inout(zmm_reg) acc, w = in(zmm_reg) w, x = in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Compiles and runs a kernel with AVX-512 and products of bfloat16.
///
/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")]
pub(super) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// Value of each code less 2^(bits-1), by the low four bits of the index: `vpermps` looks at
/// these alone, so neither a mask nor a sign extension is needed. Narrower codes repeat.
const fn table(bits: u32) -> [f32; 16] {
    let mut t = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        let code = i & ((1 << bits) - 1);
        t[i] = (code as i32 - (1 << (bits - 1))) as f32;
        i += 1;
    }
    t
}

static TABLES: [[f32; 16]; 3] = [table(2), table(3), table(4)];

/// The same in bfloat16, by the low five bits of the index, as `vpermw` takes it.
const fn pairs(bits: u32) -> [u16; 32] {
    let (mut t, values) = ([0; 32], table(bits));
    let mut i = 0;
    while i < 32 {
        // Exact: the other half of the bits is zero.
        t[i] = (values[i % 16].to_bits() >> 16) as u16;
        i += 1;
    }
    t
}

static PAIRS: [[u16; 32]; 3] = [pairs(2), pairs(3), pairs(4)];

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type M = __mmask16;

    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            p.cast(),
        ))))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fnmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m512) -> __m512 {
        _mm512_sqrt_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn lt(a: __m512, b: __m512) -> __mmask16 {
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b)
    }
    #[inline(always)]
    unsafe fn select(m: __mmask16, a: __m512, b: __m512) -> __m512 {
        _mm512_mask_blend_ps(m, b, a)
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        super::avx2::sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)))
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m512) -> f32 {
        _mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const u32) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn add_i32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn sub_i32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, n: u32) -> __m512i {
        _mm512_srlv_epi32(a, _mm512_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, n: u32) -> __m512i {
        _mm512_sllv_epi32(a, _mm512_set1_epi32(n as i32))
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn to_i32(a: __m512) -> __m512i {
        _mm512_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn bits(a: __m512) -> __m512i {
        _mm512_castps_si512(a)
    }
    #[inline(always)]
    unsafe fn from_bits(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(a)
    }
    #[inline(always)]
    unsafe fn code(bits: u32, w: __m512i, shift: u32) -> __m512 {
        let index = if shift == 0 { w } else { Self::shr(w, shift) };
        if bits == 8 {
            let code = _mm512_and_si512(index, _mm512_set1_epi32(255));
            return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)));
        }
        _mm512_permutexvar_ps(index, _mm512_loadu_ps(TABLES[bits as usize - 2].as_ptr()))
    }
    /// Nothing to do: the table takes unsigned codes.
    #[inline(always)]
    unsafe fn centre(w: __m512i, _: __m512i) -> __m512i {
        w
    }
    #[inline(always)]
    unsafe fn dot(_: u32, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(acc, w, x)
    }
    #[inline(always)]
    unsafe fn pair(bits: u32, w: __m512i, shift: u32) -> __m512i {
        if bits == 8 {
            let (low, high) = (Self::code(8, w, shift), Self::code(8, w, shift + 16));
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
            return _mm512_mask_blend_epi16(0xAAAA_AAAA, low, _mm512_castps_si512(high));
        }
        let index = if shift == 0 { w } else { Self::shr(w, shift) };
        let table = _mm512_loadu_si512(PAIRS[bits as usize - 2].as_ptr().cast());
        _mm512_permutexvar_epi16(index, table)
    }
    #[inline(always)]
    unsafe fn dot_pairs(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        // Both are the 64 bytes of a register.
        let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        _mm512_dpbf16_ps(acc, pairs(w), pairs(x))
    }
    #[inline(always)]
    unsafe fn dot_words(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        dot_words(acc, w, x)
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut i8, v: __m512i) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut u32, v: __m512i) {
        _mm512_storeu_si512(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}
