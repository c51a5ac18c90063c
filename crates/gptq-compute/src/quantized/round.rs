//! Floats rounded to 8 bits with one scale per output: what an output head becomes for decoding.

use std::ops::Range;

use half::f16;

use super::{GptqParts, QuantizedMatrix};
use crate::math;
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Rows that one task reads and rounds.
const ROWS: usize = 64;
/// Codes are -127..=127 around this zero point.
const ZERO: u8 = 128;
const BITS: u32 = 8;
/// Codes of one word.
const CODES: usize = 4;

impl QuantizedMatrix {
    /// Rounds a float matrix `[out_features, in_features]` to the nearest of 255 multiples of one
    /// f16 scale per row. `read` fills a buffer `[rows, in_features]` with the rows it is asked for,
    /// from several threads at once.
    ///
    /// The codes are rounded against the scale as f16 holds it, so its 11 bits cost no accuracy: they
    /// only make the step up to a thousandth longer.
    ///
    /// # Errors
    /// What `read` returns.
    ///
    /// # Panics
    /// If the width is not a multiple of 4.
    #[track_caller]
    pub fn round_rows<E: Send>(
        pool: &Pool,
        out_features: usize,
        in_features: usize,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        assert!(in_features.is_multiple_of(CODES), "{in_features} inputs in 8 bits");
        let mut qweight = vec![0u32; in_features / CODES * out_features];
        let mut scales = vec![f16::ZERO; out_features];
        let (words, scale_cells) = (RawSlice::new(&mut qweight), RawSlice::new(&mut scales));
        pool.try_run(out_features.div_ceil(ROWS), &|task| {
            let rows = task * ROWS..((task + 1) * ROWS).min(out_features);
            let mut floats = vec![0.0; rows.len() * in_features];
            read(rows.clone(), &mut floats)?;
            // SAFETY: rows belong to one task.
            let scales = unsafe { scale_cells.range(rows.start, rows.len()) };
            let mut inverses = [0.0f32; ROWS];
            for ((row, scale), inverse) in
                floats.chunks_exact(in_features).zip(&mut *scales).zip(&mut inverses)
            {
                let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                *scale = scale_of(largest);
                *inverse = if *scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
            }
            for word in 0..in_features / CODES {
                // SAFETY: columns of rows that belong to one task.
                let cells = unsafe { words.range(word * out_features + rows.start, rows.len()) };
                for (row, (cell, inverse)) in cells.iter_mut().zip(&inverses).enumerate() {
                    let part = &floats[row * in_features + word * CODES..][..CODES];
                    let code = |x: &f32| {
                        let code = math::nearest((x * inverse).clamp(-127.0, 127.0));
                        (code + i32::from(ZERO)) as u8
                    };
                    *cell = u32::from_le_bytes([0, 1, 2, 3].map(|i| code(&part[i])));
                }
            }
            Ok(())
        })?;
        let zeros = vec![ZERO; out_features];
        let g_idx = vec![0; in_features];
        let rounded = Self::from_gptq_on(
            pool,
            GptqParts {
                bits: BITS,
                in_features,
                out_features,
                qweight: &qweight,
                scales: &scales,
                zeros: &zeros,
                g_idx: &g_idx,
            },
        );
        // All lengths are right by construction.
        Ok(rounded.expect("a matrix of consistent parts"))
    }
}

/// The smallest f16 that takes `largest` to at most 127 steps, or the largest f16.
fn scale_of(largest: f32) -> f16 {
    let exact = largest / 127.0;
    let near = f16::from_f32(exact);
    let up = if near.to_f32() < exact { f16::from_bits(near.to_bits() + 1) } else { near };
    if up.is_finite() { up } else { f16::MAX }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ComputeError, Linear, Matrix, Scratch, Tensor, linear};

    #[test]
    fn every_weight_is_within_half_a_step() {
        let (pool, n, k) = (Pool::new(3), 150, 36);
        let weight = |r: usize, c: usize| match r {
            // Rows of zeros, of tiny and of large numbers.
            3 => 0.0,
            4 => 1e-7 * (c as f32 - 17.0),
            5 => 3e4 * (c as f32 - 17.0),
            _ => ((r * 37 + c * 101) % 997) as f32 / 500.0 - 1.0,
        };
        let read = |rows: Range<usize>, out: &mut [f32]| -> Result<(), ComputeError> {
            for (row, out) in rows.zip(out.chunks_exact_mut(k)) {
                out.iter_mut().enumerate().for_each(|(c, v)| *v = weight(row, c));
            }
            Ok(())
        };
        let matrix = QuantizedMatrix::round_rows(&pool, n, k, read).unwrap();
        let layer = Linear { weight: Matrix::Quantized(matrix), bias: None };
        let (mut y, mut scratch) = (Tensor::default(), Scratch::default());
        for c in 0..k {
            // One input at a time reads the weights back.
            let mut x = Tensor::zeros(1, k);
            x.row_mut(0)[c] = 1.0;
            linear(&pool, &x, &mut [(&layer, &mut y)], &mut scratch);
            for r in 0..n {
                let largest = (0..k).map(|c| weight(r, c).abs()).fold(0.0, f32::max);
                // Half a step; steps are multiples of 2^-24, the smallest f16.
                let step = (largest / 127.0 * 1.001).max(f16::from_bits(1).to_f32());
                let error = (y.row(0)[r] - weight(r, c)).abs();
                assert!(error <= 0.5001 * step, "[{r}, {c}]: {error} with steps of {step}");
            }
        }
    }

    #[test]
    fn failures_are_passed_on() {
        let pool = Pool::new(2);
        let fail = |_: Range<usize>, _: &mut [f32]| Err(ComputeError::Bits { bits: 99 });
        let error = QuantizedMatrix::round_rows(&pool, 100, 8, fail).unwrap_err();
        assert!(matches!(error, ComputeError::Bits { bits: 99 }));
    }
}
