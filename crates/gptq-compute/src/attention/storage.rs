//! The kinds of elements that keys and values are kept as, and how they are multiplied.

use super::KvType;
use crate::arch::Simd;

/// One kind of element. A trait and not a closure: closures are not compiled inside the
/// `#[target_feature]` function, which would put a call around every load.
pub(super) trait Element {
    type Item: bytemuck::Pod;
    const KIND: KvType;
    const SIZE: usize = size_of::<Self::Item>();
    /// Steps along the sum of a product that one item holds.
    const STEPS: usize = 1;
    /// Whether sums are of integers, in the places of floats: rows of both sides have scales.
    const INTEGERS: bool = false;

    /// C + A B for 16 lanes of B, which begin at `b`, and one item of A at each pointer. `STEPS` numbers of
    /// A are in the place of one f32.
    ///
    /// # Safety
    /// 16 items at each `b` and one word at each `a` are readable, and the processor has the instruction set
    /// of `S`; for [`Bf16`], the extension of [`Simd::dot_pairs`], for [`Int16`] that of [`Simd::dot_words`].
    unsafe fn multiply<S: Simd, const R: usize, const V: usize>(
        acc: &mut [[S::F; V]; R],
        a: [*const f32; R],
        b: [*const Self::Item; V],
    );
}

/// [`Element::multiply`] for items that `load` widens to f32.
#[inline(always)]
unsafe fn widened<S: Simd, E: Widened, const R: usize, const V: usize>(
    acc: &mut [[S::F; V]; R],
    a: [*const f32; R],
    b: [*const E::Item; V],
) {
    let mut lanes = [S::splat(0.0); V];
    for v in 0..V {
        lanes[v] = E::load::<S>(b[v]);
    }
    for r in 0..R {
        let x = S::splat(*a[r]);
        for v in 0..V {
            acc[r][v] = S::fma(x, lanes[v], acc[r][v]);
        }
    }
}

trait Widened: Element {
    /// Widens 16 elements.
    unsafe fn load<S: Simd>(p: *const Self::Item) -> S::F;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Int8;
/// Two steps of a sum in a lane, the first in the low half.
pub(super) struct Bf16;
/// The same of integers.
pub(super) struct Int16;

macro_rules! widened {
    ($($name:ident $item:ty, $load:ident;)*) => {$(
        impl Widened for $name {
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const $item) -> S::F {
                S::$load(p)
            }
        }

        impl Element for $name {
            type Item = $item;
            const KIND: KvType = KvType::$name;
            #[inline(always)]
            unsafe fn multiply<S: Simd, const R: usize, const V: usize>(
                acc: &mut [[S::F; V]; R],
                a: [*const f32; R],
                b: [*const $item; V],
            ) {
                widened::<S, Self, R, V>(acc, a, b);
            }
        }
    )*};
}

widened! {
    F32 f32, load;
    F16 u16, load_f16;
    Int8 i8, load_i8;
}

macro_rules! pairs {
    ($($name:ident, $integers:literal, |$acc:ident, $b:ident, $a:ident| $dot:expr;)*) => {$(
        impl Element for $name {
            type Item = u32;
            const KIND: KvType = KvType::$name;
            const STEPS: usize = 2;
            const INTEGERS: bool = $integers;
            #[inline(always)]
            unsafe fn multiply<S: Simd, const R: usize, const V: usize>(
                acc: &mut [[S::F; V]; R],
                a: [*const f32; R],
                b: [*const u32; V],
            ) {
                let mut lanes = [S::splat_i32(0); V];
                for v in 0..V {
                    lanes[v] = S::load_i32(b[v]);
                }
                for r in 0..R {
                    let $a = S::splat_i32(*a[r].cast::<i32>());
                    for v in 0..V {
                        let ($acc, $b) = (acc[r][v], lanes[v]);
                        acc[r][v] = $dot;
                    }
                }
            }
        }
    )*};
}

pairs! {
    Bf16, false, |acc, b, a| S::dot_pairs(acc, b, a);
    Int16, true, |acc, b, a| S::from_bits(S::dot_words(S::bits(acc), b, a));
}
