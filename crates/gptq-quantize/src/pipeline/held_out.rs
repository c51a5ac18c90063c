//! The choice of the damping and of the off-diagonal shrink by windows that the fit does not see
//! (`--damp-percent auto`).
//!
//! Every eighth calibration window is held out ([`is_held_out`]). For each stage the Hessian of the
//! other windows is factorised with each damping of [`DAMPINGS`], then, with the best of these, with each
//! shrink of [`SHRINKS`]; some rows of each linear are solved, and ‖(W - Ŵ) X‖² / ‖W X‖² is taken over
//! the held-out windows, tr(ΔW H' ΔWᵀ) with their own Hessian H'. What has the least sum over the linears
//! is what the stage is solved with, then on all windows: nothing of the calibration is lost.

use std::ops::Range;

use gptq_compute::Tensor;
use gptq_format::ModuleSettings;
use gptq_model::{LinearRows, LinearSpec};

use super::Run;
use crate::error::Result;
use crate::hessian::{Damping, Hessian, OutputError};
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
    /// The damping and the shrink with the least error on the held-out inputs.
    pub(super) fn choose_regularization(
        &mut self,
        linears: &[(usize, &LinearSpec, ModuleSettings)],
        fitted: &Hessian,
        held: &Hessian,
    ) -> Result<Regularization> {
        let options = self.job.options;
        let mut best = Regularization { damp_percent: options.damp_percent, shrink: 0.0 };
        let Some((_, _, first)) = linears.first() else { return Ok(best) };
        let order = options.order_of(first, true);
        let mut samples = Vec::new();
        for (_, linear, settings) in linears {
            let rows = LinearRows::open(self.job.checkpoint, self.spec, linear)?;
            let mut weights = Vec::new();
            for range in sample(linear.out_features) {
                weights.extend(self.phases.time("read", || rows.read(range))?);
            }
            samples.push((weights, self.job.options.grid_of(settings)));
        }
        let pool = self.job.pool;
        let mut least = f64::INFINITY;
        // A shrink is tried with the damping that was best without any.
        let dampings = DAMPINGS.map(|percent| (Some(percent), 0.0));
        for (percent, shrink) in dampings.into_iter().chain(SHRINKS.map(|shrink| (None, shrink))) {
            let percent = percent.unwrap_or(best.damp_percent);
            let damping = Damping { percent, auto_increment: options.damp_auto_increment };
            let error = self.phases.time("damping", || {
                let factor = fitted.shrunk(shrink).factor(order, damping);
                let of = |(weights, grid): &(Vec<f32>, _)| {
                    let solution = solver::gptq(pool, weights, &factor, *grid);
                    let mut sum = OutputError::default();
                    held.add_error(pool, weights, solution.dequantize(), &mut sum);
                    sum.relative()
                };
                samples.iter().map(of).sum::<f64>()
            });
            if error < least {
                least = error;
                best = Regularization { damp_percent: percent, shrink };
            }
        }
        Ok(best)
    }
}

/// Rows of a linear with `outputs` rows, evenly placed pieces of it.
fn sample(outputs: usize) -> Vec<Range<usize>> {
    if outputs <= ROWS {
        return std::iter::once(0..outputs).collect();
    }
    let piece = ROWS / PIECES;
    (0..PIECES).map(|i| i * (outputs - piece) / (PIECES - 1)).map(|at| at..at + piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_window_in_eight_is_held_out() {
        let held = |windows| (0..windows).filter(|&i| is_held_out(i, windows)).collect::<Vec<_>>();
        assert_eq!(held(2), [1]);
        assert_eq!(held(7), [6]);
        assert_eq!(held(8), [7]);
        assert_eq!(held(33), [7, 15, 23, 31]);
    }

    #[test]
    fn samples_are_rows_of_the_linear() {
        assert_eq!(sample(200), vec![0..200; 1]);
        assert_eq!(sample(256), vec![0..256; 1]);
        let pieces = sample(576);
        assert_eq!((pieces.len(), pieces[0].clone(), pieces[3].clone()), (4, 0..64, 512..576));
        assert!(sample(257).iter().all(|piece| piece.end <= 257));
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
