//! One vector type of 16 lanes per instruction set, and the choice among them.
//!
//! A kernel is a struct that implements [`Kernel`]: its `run` is written once, generically over
//! [`Simd`], and must be `#[inline(always)]` so that it is compiled inside the
//! `#[target_feature]` function of each instruction set. The methods of `Simd` wrap single
//! intrinsics; they are `#[inline(always)]` and not `#[target_feature]` because a function with
//! that attribute cannot be inlined into a caller without it, which would put a call around every
//! instruction.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub use {avx2::Avx2, avx512::Avx512};

/// Lanes of every vector type.
pub const LANES: usize = 16;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// Portable code, the oracle of the others.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with the products of bytes and of words of AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with those of VNNI.
    Avx512Vnni,
    /// The same, with products of bfloat16.
    Avx512Bf16,
    /// NEON, as every 64-bit ARM has it.
    Neon,
    /// NEON with the byte products of the dotprod extension.
    NeonDot,
    /// The same, with those of the i8mm extension, which take unsigned codes.
    NeonI8mm,
}

impl Isa {
    /// All, slower ones first.
    const ALL: [Self; 9] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
    ];

    /// Its name in `GPTQ_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::NeonI8mm => "neoni8mm",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("bmi2")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => {
                Self::NeonDot.is_available() && std::arch::is_aarch64_feature_detected!("i8mm")
            }
            #[allow(unreachable_patterns)] // Those of other architectures.
            _ => false,
        }
    }

    /// All that this processor has, the fastest last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|i| i.is_available()).collect()
    }
}

/// The instruction set of this process: the fastest available, or what `GPTQ_ISA` names
/// ([`Isa::name`]) if this processor has it.
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let available = Isa::available();
        let wanted = std::env::var("GPTQ_ISA").unwrap_or_default();
        let named = available.iter().find(|i| i.name() == wanted);
        if named.is_none() && !wanted.is_empty() {
            let names: Vec<_> = available.iter().map(|i| i.name()).collect();
            tracing::warn!("GPTQ_ISA={wanted} is none of this processor's: {}", names.join(", "));
        }
        let fastest = available.iter().rfind(|&&i| i != Isa::Avx512Bf16 || bf16_wins());
        let isa = named.or(fastest).copied().unwrap_or(Isa::Scalar);
        tracing::debug!(?isa, "kernels chosen");
        isa
    })
}

/// Whether products of pairs of bfloat16 are faster than those of f32: twice as fast on Zen 5, half as
/// fast on an Emerald Rapids, which has its fast ones in AMX. Other processors were not measured; a table
/// and not a measurement, so that a machine always computes the same.
fn bf16_wins() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // The vendor, in the order of the registers.
        let id = std::arch::x86_64::__cpuid(0);
        [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A computation written once for all instruction sets.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Runs it. Implementations must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The processor must have the instruction set of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `kernel` with the instruction set of this process.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    dispatch_on(isa(), kernel)
}

/// Runs `kernel` with a given instruction set (tests compare all of them).
///
/// Kernels are compiled without the extensions for products of bytes, words and bfloat16, which have
/// functions of their own.
#[inline]
pub(crate) fn dispatch_on<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: `isa()` and the tests hand out available instruction sets only.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => unsafe { avx512::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => unsafe { neon::enter(kernel) },
        // SAFETY: scalar code runs everywhere.
        _ => unsafe { kernel.run::<Scalar>() },
    }
}

/// Runs a kernel that multiplies bytes ([`Simd::dot`]), with the extension for that where `isa`
/// has it. AVX-512 without its extension runs the kernels of AVX2: such processors are not
/// worth a third set of kernels.
#[inline]
pub(crate) fn dispatch_dot<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: `isa()` and the tests hand out available instruction sets only.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => unsafe { avx2::enter_vnni(kernel) },
        // SAFETY: as above; AVX-512 includes AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx2::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Bf16 => unsafe { avx512::enter_vnni(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => unsafe { neon::enter_dot(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => unsafe { neon::enter_i8mm(kernel) },
        _ => dispatch_on(isa, kernel),
    }
}

/// Numbers of 16 bits, of which one instruction multiplies two in each lane and adds the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// [`Simd::dot_pairs`]
    Bf16,
    /// [`Simd::dot_words`]
    Int16,
}

/// What products of numbers that may be rounded are computed in: the pairs that are twice as fast as
/// f32, if there are some. In scalar code they are there to be compared with.
pub(crate) fn pairs(isa: Isa) -> Option<Pairs> {
    match isa {
        Isa::Scalar | Isa::Avx512Bf16 => Some(Pairs::Bf16),
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni => Some(Pairs::Int16),
        _ => None,
    }
}

/// Runs a kernel that multiplies pairs of bfloat16.
#[inline]
pub(crate) fn dispatch_pairs<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    assert!(pairs(isa) == Some(Pairs::Bf16));
    match isa {
        // SAFETY: `isa()` and the tests hand out available instruction sets only.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => unsafe { avx512::enter_bf16(kernel) },
        // SAFETY: scalar code runs everywhere.
        _ => unsafe { kernel.run::<Scalar>() },
    }
}

/// Runs a kernel that multiplies pairs of 16-bit integers.
#[inline]
pub(crate) fn dispatch_words<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: `isa()` and the tests hand out available instruction sets only.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => unsafe { avx2::enter_vnni(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { avx512::enter_vnni(kernel) },
        // SAFETY: scalar code runs everywhere.
        Isa::Scalar => unsafe { kernel.run::<Scalar>() },
        _ => unreachable!("pairs() has them on no other"),
    }
}

/// Operations on 16 lanes of f32 (`F`), 16 lanes of 32-bit integers (`I`) and lane masks (`M`).
///
/// # Safety
/// Every method requires that the processor has the instruction set; those that take pointers
/// require them to be valid for 16 elements (no alignment).
#[allow(clippy::missing_safety_doc, missing_docs)] // One contract for all, stated above.
pub trait Simd: Copy {
    type F: Copy;
    type I: Copy;
    type M: Copy;

    /// Whether 32 vector registers of 16 lanes exist; decides the size of register tiles.
    const WIDE: bool;
    /// Tokens of the tallest tile of quantized products. Scalar code has one size only: it is
    /// there to be right.
    const TALLEST: usize = if Self::WIDE { 12 } else { 4 };

    /// The same in int8. With two vectors of outputs, the integers and the floats of 6 tokens fill
    /// 24 of 32 registers. Taller tiles, with the floats in memory, were slower on Zen 5: stores
    /// and loads of sums cost more than reading each activation for two vectors only.
    const INT8_TALLEST: usize = if Self::WIDE { 6 } else { 4 };

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_i8(p: *const i8) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a * b + c with a single rounding, also where [`Simd::fma`] has none (scalar code).
    #[inline(always)]
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Self::fma(a, b, c)
    }
    /// c - a * b
    unsafe fn fnma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    unsafe fn sqrt(a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    unsafe fn lt(a: Self::F, b: Self::F) -> Self::M;
    /// Lanes of `a` where the mask is set, of `b` elsewhere.
    unsafe fn select(m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// The sum of all lanes, in a fixed order.
    unsafe fn sum(a: Self::F) -> f32;
    unsafe fn max_lane(a: Self::F) -> f32;

    unsafe fn load_i32(p: *const u32) -> Self::I;
    unsafe fn splat_i32(x: i32) -> Self::I;
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// Logical shift right by `n` in 0..32.
    unsafe fn shr(a: Self::I, n: u32) -> Self::I;
    unsafe fn shl(a: Self::I, n: u32) -> Self::I;
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// Rounds to the nearest integer; lanes outside i32 are unspecified.
    unsafe fn to_i32(a: Self::F) -> Self::I;
    unsafe fn bits(a: Self::F) -> Self::I;
    unsafe fn from_bits(a: Self::I) -> Self::F;

    /// The codes of `bits` (2, 3, 4 or 8) bits that start at bit `shift` of each word, less
    /// 2^(bits-1), as floats. The words must have gone through [`Simd::centre`].
    unsafe fn code(bits: u32, w: Self::I, shift: u32) -> Self::F;
    /// Prepares words of unsigned codes for [`Simd::code`]. `top` has the top bit of each code
    /// set: inverting it makes a code two's complement.
    #[inline(always)]
    unsafe fn centre(w: Self::I, top: Self::I) -> Self::I {
        Self::xor(w, top)
    }
    /// What sums of products of bytes start from ([`Simd::dot`]): `centre`, minus 2^(bits-1) times the sum of the bytes that
    /// the codes are multiplied with.
    #[inline(always)]
    unsafe fn dot_start(_bits: u32, centre: Self::I) -> Self::I {
        centre
    }
    /// Adds to each lane of `acc` the products of its four bytes of `w`, unsigned and below
    /// 2^bits, with its four bytes of `x`, signed and at least -127. Exact. Kernels that use it are
    /// run by `dispatch_dot` only.
    ///
    /// Up to eight times between [`Simd::dot_start`] and [`Simd::dot_end`]; what lies in `acc` until then is the instruction
    /// set's own affair.
    unsafe fn dot(bits: u32, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// The finished sums, which include `centre`.
    #[inline(always)]
    unsafe fn dot_end(_bits: u32, acc: Self::I, _centre: Self::I) -> Self::I {
        acc
    }
    /// What [`Simd::code`] gives for the codes at `shift` and at `shift + 16`, in bfloat16, in the
    /// low and in the high half of each lane.
    #[inline(always)]
    unsafe fn pair(bits: u32, w: Self::I, shift: u32) -> Self::I {
        let (low, high) = (Self::code(bits, w, shift), Self::code(bits, w, shift + 16));
        let top = Self::and(Self::bits(high), Self::splat_i32(0xFFFF_0000_u32 as i32));
        Self::or(Self::shr(Self::bits(low), 16), top)
    }
    /// acc + the products of both pairs of bfloat16 in each lane; the order of the two additions
    /// and their rounding are up to the processor. Kernels that use it are run by `dispatch_pairs`
    /// only.
    #[inline(always)]
    unsafe fn dot_pairs(acc: Self::F, w: Self::I, x: Self::I) -> Self::F {
        let top = Self::splat_i32(0xFFFF_0000_u32 as i32);
        let low = |v| Self::from_bits(Self::shl(v, 16));
        let high = |v| Self::from_bits(Self::and(v, top));
        Self::fma(high(w), high(x), Self::fma(low(w), low(x), acc))
    }
    /// acc + the products of both pairs of signed 16-bit integers in each lane. Kernels that use it are
    /// run by `dispatch_words` only.
    #[inline(always)]
    unsafe fn dot_words(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        let [mut acc, w, x] = [acc, w, x].map(|v| {
            let mut lanes = [0u32; LANES];
            Self::store_i32(lanes.as_mut_ptr(), v);
            lanes
        });
        for ((acc, w), x) in acc.iter_mut().zip(w).zip(x) {
            let product = |shift| i32::from((w >> shift) as i16) * i32::from((x >> shift) as i16);
            *acc = acc.wrapping_add_signed(product(0)).wrapping_add_signed(product(16));
        }
        Self::load_i32(acc.as_ptr())
    }
    /// Stores the low byte of each lane.
    unsafe fn store_low_bytes(p: *mut i8, v: Self::I);
    unsafe fn store_i32(p: *mut u32, v: Self::I);
    unsafe fn prefetch(p: *const u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct DotWords([[u32; LANES]; 3]);

    impl Kernel for DotWords {
        type Output = [u32; LANES];

        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> [u32; LANES] {
            let [acc, w, x] = self.0.map(|v| S::load_i32(v.as_ptr()));
            let mut sum = [0; LANES];
            S::store_i32(sum.as_mut_ptr(), S::dot_words(acc, w, x));
            sum
        }
    }

    #[test]
    fn products_of_words_are_exact() {
        let lanes = |f: &dyn Fn(i32) -> i32| std::array::from_fn(|i| f(i as i32) as u32);
        let word = |x: i32| x & 0xFFFF;
        // Of either sign in either half, and the largest there are.
        let w = lanes(&|i| word(32767 - 4369 * i) | (255 - 17 * i) << 16);
        let x = lanes(&|i| word(7 * i - 32767) | (32767 - i) << 16);
        let acc = lanes(&|i| 1000 * i - 536_000_000);
        let half = |x: u32, shift: u32| i64::from((x >> shift) as i16);
        for isa in [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni] {
            if !isa.is_available() {
                continue;
            }
            let sums = dispatch_words(isa, DotWords([acc, w, x]));
            for i in 0..LANES {
                let products = half(w[i], 0) * half(x[i], 0) + half(w[i], 16) * half(x[i], 16);
                assert_eq!(i64::from(sums[i] as i32), i64::from(acc[i] as i32) + products);
            }
        }
    }
}
