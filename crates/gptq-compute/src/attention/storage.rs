//! The kinds of elements that keys and values are kept as.

use super::KvType;
use crate::arch::Simd;

/// One kind of element. A trait and not a closure: closures are not compiled inside the
/// `#[target_feature]` function, which would put a call around every load.
pub(super) trait Element {
    type Item: bytemuck::Pod;
    const KIND: KvType;
    const SIZE: usize = size_of::<Self::Item>();

    /// Widens 16 elements.
    ///
    /// # Safety
    /// 16 elements at `p` are readable and the processor has the instruction set of `S`.
    unsafe fn load<S: Simd>(p: *const Self::Item) -> S::F;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Int8;

impl Element for F32 {
    type Item = f32;
    const KIND: KvType = KvType::F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::F {
        S::load(p)
    }
}

impl Element for F16 {
    type Item = u16;
    const KIND: KvType = KvType::F16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::F {
        S::load_f16(p)
    }
}

impl Element for Int8 {
    type Item = i8;
    const KIND: KvType = KvType::Int8;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const i8) -> S::F {
        S::load_i8(p)
    }
}
