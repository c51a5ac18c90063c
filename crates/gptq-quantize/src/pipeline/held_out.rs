//! The choice of the damping and of the off-diagonal shrink by windows that the fit does not see
//! (`--damp-percent auto`).
//!
//! Every eighth calibration window is held out ([`is_held_out`]). For each stage the Hessian of the
//! other windows is factorised with each damping of [`DAMPINGS`], then, with the best of these, with each
//! shrink of [`SHRINKS`]; some rows of each linear are solved, and ‖(W - Ŵ) X‖² / ‖W X‖² is taken over
//! the held-out windows, tr(ΔW H' ΔWᵀ) with their own Hessian H'. What has the least sum over the linears
//! is what the stage is solved with, then on all windows: nothing of the calibration is lost.

use std::ops::Range;

use gptq_compute::sweep::Grid;
use gptq_compute::{Pool, Tensor};
use gptq_format::ModuleSettings;
use gptq_model::{LinearRows, LinearSpec};

use super::Run;
use super::linear::spread;
use crate::error::Result;
use crate::hessian::{Damping, Factor, Hessian, OutputError};
use crate::order::OrderOptions;
use crate::solver;

/// The shares of the mean diagonal that are tried.
pub(crate) const DAMPINGS: [f64; 6] = [0.01, 0.025, 0.05, 0.1, 0.2, 0.4];
/// The shares of the off-diagonal elements that are tried to be left out.
pub(crate) const SHRINKS: [f64; 4] = [0.02, 0.05, 0.1, 0.2];
/// One window in so many is held out.
const ONE_IN: usize = 8;
/// The rows of a linear that are solved to judge a damping, and the pieces that they come in.
const ROWS: usize = 256;
const PIECES: usize = 4;

/// Whether window `index` of `windows` is held out: every eighth, or the last of fewer.
pub(crate) fn is_held_out(index: usize, windows: usize) -> bool {
    index % ONE_IN == ONE_IN - 1 || (windows < ONE_IN && index + 1 == windows)
}

/// How far a Hessian is believed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Regularization {
    /// Share of the mean diagonal that is added to the diagonal.
    pub(super) damp_percent: f64,
    /// Share of the off-diagonal elements that is left out.
    pub(super) shrink: f64,
}

/// The rows of some windows of a chunk.
#[derive(Default)]
pub(super) struct Part {
    /// `[rows, in]`.
    pub(super) input: Tensor,
    /// Rows of each window that is whole.
    pub(super) windows: Vec<Range<usize>>,
}

/// Splits the rows of `input` `[rows, in]`, a chunk of `windows`, into those of windows that are fitted
/// and those of windows that are `held`. `tokens`: the token of the chunk that each row belongs to,
/// where they are not all of them; windows are not whole then.
pub(super) fn split(
    input: &Tensor,
    windows: &[Range<usize>],
    held: &[bool],
    tokens: Option<&[u32]>,
) -> [Part; 2] {
    let of = |wanted: bool| {
        let mut part = Part::default();
        let mut data = Vec::new();
        let mut rows = 0;
        for (window, _) in windows.iter().zip(held).filter(|(_, held)| **held == wanted) {
            match tokens {
                None => {
                    data.extend_from_slice(
                        &input.as_slice()[window.start * input.cols()..window.end * input.cols()],
                    );
                    part.windows.push(rows..rows + window.len());
                    rows += window.len();
                }
                Some(tokens) => {
                    let inside = |token: &u32| window.contains(&(*token as usize));
                    for (row, _) in tokens.iter().enumerate().filter(|(_, token)| inside(token)) {
                        data.extend_from_slice(input.row(row));
                        rows += 1;
                    }
                }
            }
        }
        part.input = Tensor::from_vec(rows, input.cols(), data);
        part
    };
    [of(false), of(true)]
}

impl Run<'_> {
    /// The damping and the shrink with the least error on the held-out inputs, for linears whose damping no rule sets.
    pub(super) fn choose_regularization(
        &mut self,
        linears: &[(usize, &LinearSpec, ModuleSettings)],
        fitted: &Hessian,
        held: &Hessian,
    ) -> Result<Regularization> {
        let options = self.job.options;
        let best = Regularization { damp_percent: options.damp_percent, shrink: 0.0 };
        let free = || linears.iter().filter(|(_, _, settings)| settings.damp_percent.is_none());
        let mut samples = Vec::new();
        for (_, linear, settings) in free() {
            let rows = LinearRows::open(self.job.checkpoint, self.spec, linear)?;
            let mut weights = Vec::new();
            for range in spread(linear.out_features, ROWS, PIECES) {
                let mut part = self.phases.time("read", || rows.read(range.clone()))?;
                self.folded.scale(&linear.module, range, &mut part);
                weights.extend(part);
            }
            let (order, grid) = (options.order_of(settings, true), options.grid_of(settings));
            samples.push(Sample { weights, order, grid });
        }
        if samples.is_empty() {
            return Ok(best);
        }
        let pool = self.job.pool;
        let increment = options.damp_auto_increment;
        Ok(least(best, |candidate| {
            self.phases.time("damping", || {
                // Rules may give linears of a stage other groups and orders.
                let error = |same: &[Sample]| -> f64 {
                    let factor = candidate.factor(fitted, same[0].order, increment);
                    same.iter().map(|sample| sample.error(pool, &factor, held)).sum()
                };
                samples.chunk_by(|a, b| a.order == b.order).map(error).sum()
            })
        }))
    }
}

impl Regularization {
    fn factor(self, fitted: &Hessian, order: OrderOptions, auto_increment: f64) -> Factor {
        let damping = Damping { percent: self.damp_percent, auto_increment };
        fitted.shrunk(self.shrink).factor(order, damping)
    }
}

/// Some rows of a linear, and how they are quantized.
struct Sample {
    /// `[rows, in]`
    weights: Vec<f32>,
    order: OrderOptions,
    grid: Grid,
}

impl Sample {
    /// tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) with the Hessian of the `held` inputs, after a sweep with `factor`.
    fn error(&self, pool: &Pool, factor: &Factor, held: &Hessian) -> f64 {
        let solution = solver::gptq(pool, &self.weights, factor, self.grid);
        let mut sum = OutputError::default();
        held.add_error(pool, &self.weights, solution.dequantize(), &mut sum);
        sum.relative()
    }
}

/// The candidate with the least error: all dampings are tried, then all shrinks with the best of them. `best` where no
/// error is a number.
fn least(mut best: Regularization, mut error: impl FnMut(Regularization) -> f64) -> Regularization {
    let mut least = f64::INFINITY;
    let dampings = DAMPINGS.map(|percent| (Some(percent), 0.0));
    for (percent, shrink) in dampings.into_iter().chain(SHRINKS.map(|shrink| (None, shrink))) {
        let damp_percent = percent.unwrap_or(best.damp_percent);
        let candidate = Regularization { damp_percent, shrink };
        let error = error(candidate);
        if error < least {
            (least, best) = (error, candidate);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use gptq_compute::sweep::ScaleSearch;

    use super::*;
    use crate::solver::gauss_inverse;

    const ORDER: OrderOptions = OrderOptions {
        group_size: -1,
        desc_act: false,
        act_group_aware: false,
        static_groups: false,
    };

    /// H of `tokens` correlated random inputs of width `n`.
    fn hessian(r: &mut gptq_testkit::Rng, n: usize, tokens: usize) -> Hessian {
        let noise = r.normals(tokens * (n + 1), 1.0);
        let x = |t: usize, i: usize| noise[t * (n + 1) + i] + 0.9 * noise[t * (n + 1) + i + 1];
        let sum = |i: usize| (0..tokens).map(|t| x(t, i / n) * x(t, i % n)).sum::<f32>();
        let matrix = (0..n * n).map(|i| 2.0 * sum(i) / tokens as f32).collect();
        Hessian::from_matrix(matrix, n, tokens)
    }

    /// The error of a candidate from its definition, in f64: column after column is rounded, and what is behind it
    /// takes its optimum, by the inverse of what is left of H.
    fn oracle(w: &[f32], bits: u32, fitted: &Hessian, held: &Hessian, c: Regularization) -> f64 {
        let n = fitted.width();
        let (top, zero) = (f64::from((1u32 << bits) - 1), f64::from(1u32 << (bits - 1)));
        let mean = (0..n).map(|i| f64::from(fitted.matrix()[i * n + i])).sum::<f64>() / n as f64;
        let h = |i: usize, j: usize| {
            let h = f64::from(fitted.matrix()[i * n + j]);
            if i == j { h + c.damp_percent * mean } else { (1.0 - c.shrink) * h }
        };
        let inverses: Vec<Vec<f64>> =
            (0..n).map(|first| gauss_inverse(&(first..n).collect::<Vec<_>>(), h)).collect();
        let energy = |d: &[f64]| -> f64 {
            let product = |i: usize| d[i / n] * f64::from(held.matrix()[i]) * d[i % n];
            (0..n * n).map(product).sum()
        };
        let (mut error, mut all) = (0.0, 0.0);
        for row in w.chunks_exact(n) {
            let original: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
            let largest = original.iter().fold(0.0f64, |m, w| m.max(w.abs()));
            let scale = half::f16::from_f64(2.0 * largest / top).to_f64();
            let (mut w, mut left) = (original.clone(), Vec::new());
            for (c, inverse) in inverses.iter().enumerate() {
                let q = ((w[c] / scale).round_ties_even() + zero).clamp(0.0, top);
                let value = scale * (q - zero);
                let e = (w[c] - value) / inverse[0];
                for (w, inverse) in w[c + 1..].iter_mut().zip(&inverse[1..]) {
                    *w -= e * inverse;
                }
                left.push(original[c] - value);
            }
            error += energy(&left);
            all += energy(&original);
        }
        error / all
    }

    #[test]
    fn errors_on_held_out_inputs_are_those_of_the_definition() {
        let (pool, mut r) = (Pool::new(2), gptq_testkit::Rng::new(21));
        let n = 24;
        // Fewer tokens than inputs: damping and shrink decide.
        let (fitted, held) = (hessian(&mut r, n, 20), hessian(&mut r, n, 200));
        for bits in [2, 3, 4] {
            let search = ScaleSearch::MinMax;
            let grid =
                Grid { bits, sym: true, search, signed: false, min_zero: 1, f16_scales: true };
            let sample = Sample { weights: r.normals(19 * n, 1.0), order: ORDER, grid };
            let mut errors = Vec::new();
            for damp_percent in DAMPINGS {
                for shrink in [0.0].into_iter().chain(SHRINKS) {
                    let candidate = Regularization { damp_percent, shrink };
                    let factor = candidate.factor(&fitted, ORDER, 0.01);
                    let got = sample.error(&pool, &factor, &held);
                    let want = oracle(&sample.weights, bits, &fitted, &held, candidate);
                    // A code on a tie may fall to the other side.
                    assert!(
                        (got / want - 1.0).abs() < 0.02,
                        "{bits} bits {candidate:?}: {got} {want}"
                    );
                    errors.push(want);
                }
            }
            let (low, high) =
                errors.iter().fold((f64::MAX, 0.0), |(l, h), &e| (e.min(l), e.max(h)));
            assert!(high > 1.2 * low, "{bits} bits: nothing to choose between {low} and {high}");
        }
    }

    #[test]
    fn the_least_error_is_chosen() {
        let usual = Regularization { damp_percent: 0.07, shrink: 0.0 };
        for (damp_percent, shrink) in [(0.01, 0.0), (0.1, 0.05), (0.4, 0.2), (0.05, 0.02)] {
            let error = |c: Regularization| {
                (c.damp_percent / damp_percent).ln().powi(2) + 10.0 * (c.shrink - shrink).powi(2)
            };
            assert_eq!(least(usual, error), Regularization { damp_percent, shrink });
        }
        assert_eq!(least(usual, |_| f64::NAN), usual);
    }

    #[test]
    fn one_window_in_eight_is_held_out() {
        let held = |windows| (0..windows).filter(|&i| is_held_out(i, windows)).collect::<Vec<_>>();
        assert_eq!(held(2), [1]);
        assert_eq!(held(7), [6]);
        assert_eq!(held(8), [7]);
        assert_eq!(held(33), [7, 15, 23, 31]);
    }

    #[test]
    fn rows_go_with_their_windows() {
        let input = Tensor::from_vec(6, 2, (0..12).map(|i| i as f32).collect());
        let (windows, held) = ([0..2, 2..3, 3..6], [false, true, false]);
        let [fit, judge] = split(&input, &windows, &held, None);
        assert_eq!(judge.input.as_slice(), [4.0, 5.0]);
        assert_eq!(judge.windows, vec![0..1; 1]);
        assert_eq!((fit.input.rows(), fit.windows), (5, vec![0..2, 2..5]));
        // Four routed rows, of tokens 1, 2, 2 and 5.
        let routed = Tensor::from_vec(4, 1, vec![1.0, 2.0, 3.0, 4.0]);
        let [fit, judge] = split(&routed, &windows, &held, Some(&[1, 2, 2, 5]));
        assert_eq!(fit.input.as_slice(), [1.0, 4.0]);
        assert_eq!(judge.input.as_slice(), [2.0, 3.0]);
    }
}
