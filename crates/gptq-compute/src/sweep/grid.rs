//! Scales and zero points of a group of weights.

use half::f16;

use crate::arch::{LANES, Simd};
use crate::math;

/// The smallest positive f16, the step between those below [`f16::MIN_POSITIVE`]: no scale may round to zero.
const MIN_SCALE: f32 = 5.960_464_5e-8;
/// Ranges that a weighted search tries: from the full one down to a fifth of it.
const SHRINKS: u8 = 81;

/// What the scale of a group is chosen for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScaleSearch {
    /// The range of the weights.
    MinMax,
    /// The least Σ |w - ŵ|^norm among 80 shrunken ranges (the reference's `mse`; 2.4 is usual).
    Power(f32),
    /// The least Σ h (w - ŵ)² among shrunken ranges and, asymmetric, neighbouring zero points, where
    /// h_j = 1/U_jj² is what an error of column j costs the sweep once all columns behind it have
    /// been corrected. Without a factor all h are 1.
    Hessian,
}

/// How the grid of a group is found (quantizer of the GPTQ reference code).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// 2, 3, 4 or 8.
    pub bits: u32,
    /// Zero point fixed at 2^(bits-1).
    pub sym: bool,
    /// How scales are chosen.
    pub search: ScaleSearch,
    /// Symmetric grids only: a scale may be negative. Codes 0..2^bits-1 around 2^(bits-1) reach one
    /// step further below zero than above it; the sign of the scale puts that step where the larger
    /// weights are. Without a search that is where the largest weight is, which the last code then
    /// holds exactly.
    pub signed: bool,
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
    ///
    /// `importance`: h of each column, for [`ScaleSearch::Hessian`].
    #[inline(always)]
    pub(super) unsafe fn find<S: Simd>(
        &self,
        weights: &[[f32; LANES]],
        importance: &[f32],
    ) -> (S::F, S::F) {
        let zero = S::splat(0.0);
        let (mut low, mut high) = (zero, zero);
        for w in weights {
            let w = S::load(w.as_ptr());
            (low, high) = (S::min(low, w), S::max(high, w));
        }
        if self.sym && self.signed {
            return self.find_signed::<S>(weights, importance, low, high);
        }
        let (low, high) = self.widened::<S>(low, high);
        let found = self.params::<S>(low, high);
        match self.search {
            ScaleSearch::MinMax => found,
            ScaleSearch::Power(norm) => {
                let mut best = Best::<S>::new(found);
                for step in 0..80u8 {
                    let p = S::splat(1.0 - f32::from(step) / 100.0);
                    let (s, z) = self.params::<S>(S::mul(low, p), S::mul(high, p));
                    best.offer(self.power_error::<S>(weights, norm, s, z), s, z);
                }
                (best.scale, best.zero)
            }
            ScaleSearch::Hessian => {
                // A group without negative weights has the symmetric range too.
                let (min, top) = (f32::from(self.min_zero), self.max_code() as f32);
                let (mut scale, zero) = found;
                if self.sym {
                    scale = S::div(S::add(high, high), S::splat(top));
                }
                let shifts: &[f32] = if self.sym { &[0.0] } else { &[0.0, -1.0, 1.0] };
                let mut best = Best::<S>::new(found);
                for step in 0..SHRINKS {
                    let s =
                        self.rounded::<S>(S::mul(scale, S::splat(1.0 - f32::from(step) / 100.0)));
                    for &shift in shifts {
                        let z = S::add(zero, S::splat(shift));
                        let z = S::min(S::max(z, S::splat(min)), S::splat(top));
                        best.offer(self.weighted_error::<S>(weights, importance, s, z), s, z);
                    }
                }
                (self.storable::<S>(best.scale), best.zero)
            }
        }
    }

    /// [`Grid::find`] of a symmetric grid whose scales carry a sign.
    #[inline(always)]
    unsafe fn find_signed<S: Simd>(
        &self,
        weights: &[[f32; LANES]],
        importance: &[f32],
        low: S::F,
        high: S::F,
    ) -> (S::F, S::F) {
        let (scale, zero) = self.signed_scale::<S>(low, high);
        if self.search == ScaleSearch::MinMax {
            return (self.storable::<S>(scale), zero);
        }
        let mut best = Best::<S>::new((scale, zero));
        for step in 0..SHRINKS + 10 {
            let p = S::splat(1.1 - f32::from(step) / 100.0);
            let candidate = self.rounded::<S>(S::mul(scale, p));
            for scale in [candidate, S::sub(S::splat(0.0), candidate)] {
                let error = match self.search {
                    ScaleSearch::Power(norm) => self.power_error::<S>(weights, norm, scale, zero),
                    _ => self.weighted_error::<S>(weights, importance, scale, zero),
                };
                best.offer(error, scale, zero);
            }
        }
        (self.storable::<S>(best.scale), zero)
    }

    /// Σ |w - ŵ|^norm.
    #[inline(always)]
    unsafe fn power_error<S: Simd>(
        &self,
        weights: &[[f32; LANES]],
        norm: f32,
        scale: S::F,
        zero: S::F,
    ) -> S::F {
        let mut error = S::splat(0.0);
        for w in weights {
            let w = S::load(w.as_ptr());
            let (_, value) = self.round::<S>(w, scale, zero);
            error = S::add(error, math::pow::<S>(S::abs(S::sub(value, w)), norm));
        }
        error
    }

    /// Σ h (w - ŵ)². The quotients are products with a reciprocal: a tie may round differently than
    /// in the sweep, which costs nothing here.
    #[inline(always)]
    unsafe fn weighted_error<S: Simd>(
        &self,
        weights: &[[f32; LANES]],
        importance: &[f32],
        scale: S::F,
        zero: S::F,
    ) -> S::F {
        let inverse = S::div(S::splat(1.0), scale);
        let least = S::sub(S::splat(0.0), zero);
        let most = S::add(S::splat(self.max_code() as f32), least);
        let mut error = S::splat(0.0);
        for (w, h) in weights.iter().zip(importance) {
            let w = S::load(w.as_ptr());
            let steps = S::min(S::max(S::round(S::mul(w, inverse)), least), most);
            let e = S::fnma(scale, steps, w);
            error = S::fma(S::mul(S::splat(*h), e), e, error);
        }
        error
    }

    /// Scale and zero point of `p` times the range `[low, high]`, which contains 0. A negative `p`, for
    /// signed grids, turns the scale around.
    #[inline(always)]
    pub(super) unsafe fn of_range<S: Simd>(&self, low: S::F, high: S::F, p: f32) -> (S::F, S::F) {
        let p = S::splat(p);
        if self.sym && self.signed {
            let (scale, zero) = self.signed_scale::<S>(low, high);
            return (self.storable::<S>(S::mul(scale, p)), zero);
        }
        let (low, high) = self.widened::<S>(low, high);
        self.params::<S>(S::mul(low, p), S::mul(high, p))
    }

    /// The range that a grid without signs covers; never empty. A symmetric group without negative weights keeps half of its
    /// codes unused, as in IST's quant.py.
    #[inline(always)]
    unsafe fn widened<S: Simd>(&self, mut low: S::F, mut high: S::F) -> (S::F, S::F) {
        let zero = S::splat(0.0);
        if self.sym {
            high = S::max(S::abs(low), high);
            low = S::select(S::lt(low, zero), S::sub(zero, high), low);
        }
        // Empty ranges: low == high == 0.
        let empty = S::lt(S::sub(high, low), S::splat(f32::MIN_POSITIVE));
        (S::select(empty, S::splat(-1.0), low), S::select(empty, S::splat(1.0), high))
    }

    /// Scale, its sign and the zero point with which a signed grid holds the largest weight exactly.
    #[inline(always)]
    unsafe fn signed_scale<S: Simd>(&self, low: S::F, high: S::F) -> (S::F, S::F) {
        let half = (1u32 << (self.bits - 1)) as f32;
        let zero = S::splat(half);
        let largest = S::max(S::abs(low), high);
        let empty = S::lt(largest, S::splat(f32::MIN_POSITIVE));
        let largest = S::select(empty, S::splat(1.0), largest);
        // The lowest code stands for -2^(bits-1) scales.
        let size = S::div(largest, zero);
        let flipped = S::sub(S::splat(0.0), size);
        (S::select(S::lt(S::abs(low), high), flipped, size), zero)
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
    pub(super) unsafe fn storable<S: Simd>(&self, scale: S::F) -> S::F {
        if !self.f16_scales {
            return scale;
        }
        let mut lanes = [0.0f32; LANES];
        S::store(lanes.as_mut_ptr(), scale);
        for s in &mut lanes {
            let size = f16::from_f32(s.abs().min(f16::MAX.to_f32())).to_f32().max(MIN_SCALE);
            *s = size.copysign(*s);
        }
        S::load(lanes.as_ptr())
    }

    /// A candidate for a scale as it will be stored, but for the largest number: 11 significant bits (Veltkamp's
    /// splitting), and fewer of the smallest.
    #[inline(always)]
    unsafe fn rounded<S: Simd>(&self, x: S::F) -> S::F {
        let t = S::mul(x, S::splat(8193.0));
        let rounded = S::sub(t, S::sub(t, x));
        if !self.f16_scales {
            return rounded;
        }
        let (size, step) = (S::abs(x), S::splat(MIN_SCALE));
        let small = S::mul(S::round(S::div(size, step)), step);
        let small = S::max(small, step);
        let small = S::select(S::lt(x, S::splat(0.0)), S::sub(S::splat(0.0), small), small);
        S::select(S::lt(size, S::splat(f16::MIN_POSITIVE.to_f32())), small, rounded)
    }

    /// Code and value of weights `w`.
    #[inline(always)]
    pub(super) unsafe fn round<S: Simd>(&self, w: S::F, scale: S::F, zero: S::F) -> (S::F, S::F) {
        let q = S::add(S::round(S::div(w, scale)), zero);
        let q = S::min(S::max(q, S::splat(0.0)), S::splat(self.max_code() as f32));
        (q, S::mul(scale, S::sub(q, zero)))
    }
}

/// The candidate with the least error, lane by lane.
struct Best<S: Simd> {
    error: S::F,
    scale: S::F,
    zero: S::F,
}

impl<S: Simd> Best<S> {
    #[inline(always)]
    unsafe fn new((scale, zero): (S::F, S::F)) -> Self {
        Self { error: S::splat(f32::INFINITY), scale, zero }
    }

    #[inline(always)]
    unsafe fn offer(&mut self, error: S::F, scale: S::F, zero: S::F) {
        let better = S::lt(error, self.error);
        self.error = S::select(better, error, self.error);
        self.scale = S::select(better, scale, self.scale);
        self.zero = S::select(better, zero, self.zero);
    }
}
