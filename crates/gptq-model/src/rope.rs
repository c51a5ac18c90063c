//! Rotary position embedding: inverse frequencies and attention factor for every scaling, as transformers computes them.
//!
//! The pair of columns `i` of a head turns by `position * inv_freq[i]`, and cosine and sine are multiplied by the attention
//! factor. Without scaling `inv_freq[i] = theta^(-2i/d)` with `d` the number of rotated columns (RoFormer, Su et al. 2021).
//! Arithmetic is in f32 where the reference keeps f32 tensors, and in f64 where it computes with Python floats: a relative
//! error of 1e-7 in a frequency is an angle error of 1e-3 at position 10000.

use std::f64::consts::PI;
use std::ops::Range;

use gptq_compute::{RopeStyle, RopeTable};

/// One rotary scheme.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Columns of each head that rotate, from the first; even.
    pub rotary_dim: usize,
    /// Which columns form a pair.
    pub style: RopeStyle,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Not at all up to this many positions; what the family does beyond is not implemented.
    Limited {
        /// Longest sequence, in tokens.
        max_positions: usize,
    },
    /// All divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// The base grows with the sequence length beyond `max_positions` (dynamic NTK).
    Dynamic {
        /// Strength.
        factor: f64,
        /// Longest sequence that is left alone, in tokens.
        max_positions: usize,
    },
    /// Low frequencies are interpolated, high ones kept, with a ramp between (YaRN, Peng et al. 2023).
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context length of the pretraining, in tokens.
        original: usize,
        /// Rotations within `original` above which a frequency is kept.
        beta_fast: f64,
        /// Rotations within `original` below which a frequency is divided.
        beta_slow: f64,
        /// Factor of cosine and sine.
        attention_factor: f64,
        /// The ends of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
    },
    /// As Llama 3.1: wavelengths beyond `original / low` are divided, those below `original / high` kept.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// See above.
        low: f64,
        /// See above.
        high: f64,
        /// Context length of the pretraining, in tokens.
        original: usize,
    },
    /// A divisor for each pair, one list up to `original` tokens and one for longer sequences (LongRoPE).
    Long {
        /// Divisors up to `original` tokens, `[rotary_dim / 2]`.
        short: Vec<f64>,
        /// Divisors for longer sequences, `[rotary_dim / 2]`.
        long: Vec<f64>,
        /// Context length of the pretraining, in tokens.
        original: usize,
        /// Factor of cosine and sine.
        attention_factor: f64,
    },
}

impl Rope {
    /// Inverse frequencies `[rotary_dim / 2]` and the factor of cosine and sine, for sequences of `length` tokens.
    pub fn frequencies(&self, length: usize) -> (Vec<f32>, f32) {
        let d = self.rotary_dim;
        let base = |theta: f64| (0..d / 2).map(move |i| power(theta, 2 * i, d));
        let inverse = |theta: f64| base(theta).map(|p| 1.0 / p).collect::<Vec<f32>>();
        match &self.scaling {
            RopeScaling::None | RopeScaling::Limited { .. } => (inverse(self.theta), 1.0),
            RopeScaling::Linear { factor } => {
                (inverse(self.theta).into_iter().map(|f| f / *factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, max_positions } => {
                let ratio = length.max(*max_positions) as f64 / *max_positions as f64;
                let growth = (factor * ratio - (factor - 1.0)).powf(d as f64 / (d as f64 - 2.0));
                (inverse(self.theta * growth), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                let (low, high) = self.yarn_ramp(*original, *beta_fast, *beta_slow, *truncate);
                let blend = |(i, p): (usize, f32)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    1.0 / (*factor as f32 * p) * (1.0 - kept) + 1.0 / p * kept
                };
                (base(self.theta).enumerate().map(blend).collect(), *attention_factor as f32)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scaled = |f: f32| {
                    let wavelength = (2.0 * PI) as f32 / f;
                    let original = *original as f64;
                    if wavelength > (original / low) as f32 {
                        f / *factor as f32
                    } else if wavelength < (original / high) as f32 {
                        f
                    } else {
                        let smooth =
                            (original as f32 / wavelength - *low as f32) / (high - low) as f32;
                        (1.0 - smooth) * f / *factor as f32 + smooth * f
                    }
                };
                (inverse(self.theta).into_iter().map(scaled).collect(), 1.0)
            }
            RopeScaling::Long { short, long, original, attention_factor } => {
                let divisors = if length > *original { long } else { short };
                let scaled =
                    base(self.theta).zip(divisors).map(|(p, &divisor)| 1.0 / (divisor as f32 * p));
                (scaled.collect(), *attention_factor as f32)
            }
        }
    }

    /// Sequences whose lengths have the same key have the same frequencies.
    pub fn length_key(&self, length: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { max_positions, .. } => length.max(*max_positions),
            RopeScaling::Long { original, .. } => usize::from(length > *original),
            _ => 0,
        }
    }

    /// Whether a sequence of `length` tokens has frequencies that one of another length has not.
    fn changes_with_each_token(&self, length: usize) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { max_positions, .. } if length > max_positions)
    }

    /// First and last dimension of YaRN's ramp.
    fn yarn_ramp(
        &self,
        original: usize,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    ) -> (f64, f64) {
        let d = self.rotary_dim as f64;
        let dimension = |rotations: f64| {
            d * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d - 1.0));
        // The reference widens an empty ramp by this much.
        if low == high {
            high += 0.001;
        }
        (low, high)
    }
}

/// YaRN's default factor of cosine and sine for a context extended `scale` times.
pub(crate) fn yarn_attention(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

/// theta^(numerator / denominator): the exponent is rounded to f32 as in the reference, the power correctly rounded.
fn power(theta: f64, numerator: usize, denominator: usize) -> f32 {
    let exponent = numerator as f32 / denominator as f32;
    f64::from(theta as f32).powf(f64::from(exponent)) as f32
}

/// Tables of cosine and sine that were needed so far: the latest one of each place in [`crate::spec::Positions::Rotary`].
#[derive(Default)]
pub(crate) struct RopeTables {
    slots: Vec<Option<Slot>>,
}

struct Slot {
    /// What the table was made for: a session may serve one model after another.
    rope: Rope,
    key: usize,
    table: RopeTable,
}

impl RopeTables {
    /// The table of rope number `index` for `positions`, of sequences that end with them.
    pub(crate) fn get(&mut self, index: usize, rope: &Rope, positions: Range<usize>) -> &RopeTable {
        const SMALLEST: usize = 64;
        let length = positions.end;
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        let slot = &mut self.slots[index];
        let key = rope.length_key(length);
        slot.take_if(|old| {
            let covered = old.table.positions();
            let covers = covered.start <= positions.start && length <= covered.end;
            old.key != key || !covers || old.rope != *rope
        });
        let fill = || {
            let (inv_freq, factor) = rope.frequencies(length);
            let covered = if rope.changes_with_each_token(length) {
                positions
            } else {
                0..length.next_power_of_two().max(SMALLEST)
            };
            Slot {
                rope: rope.clone(),
                key,
                table: RopeTable::new(&inv_freq, factor, rope.style, covered),
            }
        };
        &slot.get_or_insert_with(fill).table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10000.0, rotary_dim: 8, style: RopeStyle::Half, scaling }
    }

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() <= 2e-7 * w.abs(), "{got:?} {want:?}");
        }
    }

    #[test]
    fn default_and_linear() {
        close(&rope(RopeScaling::None).frequencies(5).0, &[1.0, 0.1, 0.01, 0.001]);
        close(
            &rope(RopeScaling::Linear { factor: 4.0 }).frequencies(5).0,
            &[0.25, 0.025, 0.0025, 0.00025],
        );
    }

    #[test]
    fn dynamic_depends_on_the_length() {
        let rope = rope(RopeScaling::Dynamic { factor: 2.0, max_positions: 16 });
        close(&rope.frequencies(16).0, &[1.0, 0.1, 0.01, 0.001]);
        assert_eq!(rope.length_key(3), rope.length_key(16));
        assert_ne!(rope.length_key(17), rope.length_key(18));
        // theta' = 10000 * (2 * 24 / 16 - 1)^(8/6)
        let theta: f64 = 10000.0 * 2f64.powf(8.0 / 6.0);
        let want: Vec<f64> = (0..4).map(|i| theta.powf(-f64::from(i) / 4.0)).collect();
        close(&rope.frequencies(24).0, &want);
    }

    #[test]
    fn llama3_keeps_the_fast_and_divides_the_slow() {
        let rope = rope(RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 32 });
        // Wavelengths 6.28, 62.8, 628, 6283; limits 8 and 32.
        close(&rope.frequencies(1).0, &[1.0, 0.1 / 8.0, 0.01 / 8.0, 0.001 / 8.0]);
        let rope = Rope { theta: 16.0, ..rope };
        // Wavelengths 6.28, 12.57, 25.1, 50.3: the middle two are blended.
        let blend = |f: f64| {
            let smooth = (32.0 * f / (2.0 * PI) - 1.0) / 3.0;
            (1.0 - smooth) * f / 8.0 + smooth * f
        };
        close(&rope.frequencies(1).0, &[1.0, blend(0.5), blend(0.25), 0.125 / 8.0]);
    }

    #[test]
    fn yarn_ramps_between_kept_and_divided() {
        let scaling = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            original: 32,
            beta_fast: 2.0,
            beta_slow: 0.1,
            attention_factor: yarn_attention(4.0, 1.0),
            truncate,
        };
        let (frequencies, attention) = rope(scaling(true)).frequencies(1);
        assert!((attention - 1.138_629_4).abs() < 1e-6);
        // dimension(2) = 0.407 -> 0, dimension(0.1) = 1.708 -> 2: ramp 0, 1/2, 1, 1.
        close(&frequencies, &[1.0, 0.1 * (0.5 + 0.5 / 4.0), 0.0025, 0.00025]);
        let exact = |r: f64| 8.0 * (32.0 / (r * 2.0 * PI)).ln() / (2.0 * 10000f64.ln());
        let ramp = (1.0 - exact(2.0)) / (exact(0.1) - exact(2.0));
        let (frequencies, _) = rope(scaling(false)).frequencies(1);
        assert!((f64::from(frequencies[1]) - 0.1 * (1.0 - ramp + ramp / 4.0)).abs() < 1e-7);
    }

    #[test]
    fn longrope_switches_lists_above_the_original_length() {
        let rope = rope(RopeScaling::Long {
            short: vec![1.0; 4],
            long: vec![2.0, 4.0, 8.0, 16.0],
            original: 16,
            attention_factor: 1.5,
        });
        close(&rope.frequencies(16).0, &[1.0, 0.1, 0.01, 0.001]);
        close(&rope.frequencies(17).0, &[0.5, 0.025, 0.00125, 0.0000625]);
        assert_eq!(rope.frequencies(1).1, 1.5);
        assert_ne!(rope.length_key(16), rope.length_key(17));
    }

    #[test]
    fn tables_follow_the_rope_and_the_length() {
        let mut tables = RopeTables::default();
        assert_eq!(tables.get(0, &rope(RopeScaling::None), 60..65).positions(), 0..128);
        assert_eq!(tables.get(0, &rope(RopeScaling::None), 0..3).positions(), 0..128);
        let narrow = Rope { rotary_dim: 4, ..rope(RopeScaling::None) };
        assert_eq!(tables.get(0, &narrow, 0..3).rotary_dim(), 4);
        assert_eq!(tables.get(1, &rope(RopeScaling::None), 0..3).rotary_dim(), 8);
        assert_eq!(tables.get(0, &narrow, 0..3).rotary_dim(), 4);
    }

    #[test]
    fn a_table_that_serves_one_length_has_the_positions_asked_for() {
        let mut tables = RopeTables::default();
        let dynamic = rope(RopeScaling::Dynamic { factor: 2.0, max_positions: 16 });
        assert_eq!(tables.get(0, &dynamic, 15..16).positions(), 0..64);
        assert_eq!(tables.get(0, &dynamic, 19..20).positions(), 19..20);
        // Another sequence of the same length, with more rows.
        assert_eq!(tables.get(0, &dynamic, 4..20).positions(), 4..20);
        assert_eq!(tables.get(0, &dynamic, 20..21).positions(), 20..21);
    }
}
