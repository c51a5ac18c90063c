//! Scales and zero points of a group of weights.

use half::f16;

use crate::arch::{LANES, Simd};
use crate::math;

/// The smallest positive f16: no scale may round to zero.
const MIN_SCALE: f32 = 5.960_464_5e-8;

/// How the grid of a group is found (quantizer of the GPTQ reference code).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// 2, 3, 4 or 8.
    pub bits: u32,
    /// Zero point fixed at 2^(bits-1).
    pub sym: bool,
    /// Exponent of the error that a search over 80 shrunken ranges minimises; `None` takes the
    /// full range.
    pub mse: Option<f32>,
    /// The smallest zero point allowed for asymmetric grids. 1 for the v1 format, whose stored
    /// zero - 1 loaders read differently when it would be -1.
    pub min_zero: u8,
    /// Whether scales are rounded to f16, as they are stored. Only comparisons with the reference
    /// code turn it off.
    pub f16_scales: bool,
}

impl Grid {
    /// Largest code.
    pub fn max_code(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// Scale and zero point of every lane for `weights` `[columns][16]`.
    ///
    /// The range always contains 0. Symmetric: [-m, m] with m the largest magnitude, except that a
    /// group without negative weights keeps [0, m], a quirk of the reference that every tool
    /// shares. A group of zeros gets [-1, 1].
    #[inline(always)]
    pub(super) unsafe fn find<S: Simd>(&self, weights: &[[f32; LANES]]) -> (S::F, S::F) {
        let zero = S::splat(0.0);
        let (mut low, mut high) = (zero, zero);
        for w in weights {
            let w = S::load(w.as_ptr());
            (low, high) = (S::min(low, w), S::max(high, w));
        }
        if self.sym {
            high = S::max(S::abs(low), high);
            low = S::select(S::lt(low, zero), S::sub(zero, high), low);
        }
        // Empty ranges: low == high == 0.
        let empty = S::lt(S::sub(high, low), S::splat(f32::MIN_POSITIVE));
        low = S::select(empty, S::splat(-1.0), low);
        high = S::select(empty, S::splat(1.0), high);

        let (mut scale, mut offset) = self.params::<S>(low, high);
        if let Some(norm) = self.mse {
            let mut best = S::splat(f32::INFINITY);
            for step in 0..80u8 {
                let p = S::splat(1.0 - f32::from(step) / 100.0);
                let (s, z) = self.params::<S>(S::mul(low, p), S::mul(high, p));
                let mut error = zero;
                for w in weights {
                    let w = S::load(w.as_ptr());
                    let (_, value) = self.round::<S>(w, s, z);
                    error = S::add(error, math::pow::<S>(S::abs(S::sub(value, w)), norm));
                }
                let better = S::lt(error, best);
                best = S::select(better, error, best);
                scale = S::select(better, s, scale);
                offset = S::select(better, z, offset);
            }
        }
        (scale, offset)
    }

    /// Scale and zero point of a range.
    #[inline(always)]
    unsafe fn params<S: Simd>(&self, low: S::F, high: S::F) -> (S::F, S::F) {
        let top = self.max_code() as f32;
        let scale = self.storable::<S>(S::div(S::sub(high, low), S::splat(top)));
        if self.sym {
            return (scale, S::splat((1 << (self.bits - 1)) as f32));
        }
        let zero = S::round(S::div(S::sub(S::splat(0.0), low), scale));
        let zero = S::min(S::max(zero, S::splat(0.0)), S::splat(top));
        let min = S::splat(f32::from(self.min_zero));
        // With the zero point moved up, the codes above it must still reach `high`.
        let raised = self.storable::<S>(S::div(high, S::splat(top - f32::from(self.min_zero))));
        let low_zero = S::lt(zero, min);
        (S::select(low_zero, raised, scale), S::max(zero, min))
    }

    /// The scale as it will be stored.
    #[inline(always)]
    unsafe fn storable<S: Simd>(&self, scale: S::F) -> S::F {
        if !self.f16_scales {
            return scale;
        }
        let mut lanes = [0.0f32; LANES];
        S::store(lanes.as_mut_ptr(), scale);
        for s in &mut lanes {
            *s = f16::from_f32(s.min(f16::MAX.to_f32())).to_f32().max(MIN_SCALE);
        }
        S::load(lanes.as_ptr())
    }

    /// Code and value of weights `w`.
    #[inline(always)]
    pub(super) unsafe fn round<S: Simd>(&self, w: S::F, scale: S::F, zero: S::F) -> (S::F, S::F) {
        let q = S::add(S::round(S::div(w, scale)), zero);
        let q = S::min(S::max(q, S::splat(0.0)), S::splat(self.max_code() as f32));
        (q, S::mul(scale, S::sub(q, zero)))
    }
}
