//! The column sweep of GPTQ (Frantar et al. 2023, algorithm 1).
//!
//! Symbols: W `[out, in]` weights, H `[in, in]` Hessian, U upper with H⁻¹ = Uᵀ U, s and z scale
//! and zero point of a group, q = clamp(round(w / s) + z, 0, 2^bits - 1) the code of w.
//! Columns are visited in the order of the sweep; after column c is quantized, its error
//! e = (w_c - ŵ_c) / U_cc is taken out of the columns behind it: w_j -= U_cj e.
//!
//! Rows do not interact, so 16 of them are the lanes of a vector: a panel `[in, 16]`. Inside a
//! block of 128 columns the corrections are collected when a column is reached; those of a whole
//! block are applied to all columns behind it at its end (lazy batch update). Both give the sums of
//! the published loop in the same order.

mod clip;
mod grid;
mod panel;
mod product;
mod refine;

pub use clip::Clip;
pub use grid::{Grid, ScaleSearch};
pub use refine::Refine;

use crate::arch::{LANES, dispatch};
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Columns between lazy batch updates.
pub const BLOCK: usize = 128;
/// Panels of 16 rows that one task sweeps together, sharing what it reads of U.
const PANELS: usize = 4;

/// How to sweep one layer.
#[derive(Debug, Clone, Copy)]
pub struct Sweep<'a> {
    /// The factor U `[in, in]` in sweep order, row-major; `None` rounds to nearest (no correction).
    pub factor: Option<&'a [f32]>,
    /// Input column at each position of the sweep, `[in]`.
    pub order: &'a [u32],
    /// Group (row of the scales) at each position of the sweep, `[in]`.
    pub groups: &'a [u32],
    /// Whether all scales are found before the sweep, from the weights as they were. Otherwise
    /// the scale of a group is found at its first position in the sweep, and every group must
    /// occupy consecutive positions.
    pub static_groups: bool,
    /// How scales are found.
    pub grid: Grid,
}

/// What a sweep makes up for beside its own errors: that its inputs are not those of the float model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Feed<'a> {
    /// P `[in, in]` in sweep order, strictly upper: when column c is reached, w_j += P_cj w_c for all
    /// columns j behind it, with w_c as it is before it is rounded (GPTAQ, arXiv 2504.02692).
    pub pass_on: Option<&'a [f32]>,
    /// What the first column of the sweep is rounded from, `[out]`, instead of its weights; its error
    /// is still taken from these (Qronos, arXiv 2505.11695).
    pub first: Option<&'a [f32]>,
}

/// A quantized layer.
#[derive(Debug, Clone)]
pub struct Swept {
    /// `[in, out]`, row-major, in the original order of inputs.
    pub codes: Vec<u8>,
    /// `[groups, out]`.
    pub scales: Vec<f32>,
    /// `[groups, out]`.
    pub zeros: Vec<u8>,
    /// Σ e² / 2 of each output, `[out]`: its share of tr(ΔW H ΔWᵀ) / 2 (0 without a factor).
    pub losses: Vec<f64>,
}

impl Sweep<'_> {
    /// Quantizes `weights` `[out, in]`, row-major. The result does not depend on the threads.
    ///
    /// # Panics
    /// If lengths do not fit or an index is out of range.
    #[track_caller]
    pub fn run(&self, pool: &Pool, weights: &[f32], out_features: usize) -> Swept {
        self.run_fed(pool, weights, weights, out_features, Feed::default())
    }

    /// [`Sweep::run`] with static scales found on other weights `ranges` `[out, in]`, that makes up for other inputs too;
    /// that needs a factor to have an effect.
    ///
    /// # Panics
    /// As [`Sweep::run`].
    #[track_caller]
    pub fn run_fed(
        &self,
        pool: &Pool,
        weights: &[f32],
        ranges: &[f32],
        out_features: usize,
        feed: Feed<'_>,
    ) -> Swept {
        let columns = self.order.len();
        assert_eq!(weights.len(), out_features * columns, "weights");
        assert_eq!(ranges.len(), weights.len(), "ranges");
        assert!(feed.pass_on.is_none_or(|p| p.len() == columns * columns), "passed on");
        assert!(feed.first.is_none_or(|first| first.len() == out_features), "first column");
        assert_eq!(self.groups.len(), columns, "groups");
        assert!(self.order.iter().all(|&k| (k as usize) < columns), "order");
        assert!(self.factor.is_none_or(|u| u.len() == columns * columns), "factor");
        let groups = self.groups.iter().max().map_or(0, |g| *g as usize + 1);
        let mut swept = Swept {
            codes: vec![0; columns * out_features],
            scales: vec![0.0; groups * out_features],
            zeros: vec![0; groups * out_features],
            losses: vec![0.0; out_features],
        };
        let importance = self.importance();
        let codes = RawSlice::new(&mut swept.codes);
        let scales = RawSlice::new(&mut swept.scales);
        let zeros = RawSlice::new(&mut swept.zeros);
        let losses = RawSlice::new(&mut swept.losses);
        let rows_per_task = PANELS * LANES;
        pool.run(out_features.div_ceil(rows_per_task), &|task| {
            let first = task * rows_per_task;
            let rows = rows_per_task.min(out_features - first);
            let mut panels: Vec<panel::Panel> = (0..rows.div_ceil(LANES))
                .map(|p| {
                    let first = first + p * LANES;
                    let rows = LANES.min(out_features - first);
                    panel::Panel::new(self, weights, first, rows, groups)
                })
                .collect();
            let importance = &importance;
            let panels = &mut panels[..];
            dispatch(panel::SweepPanels { sweep: self, ranges, importance, feed, panels });
            for (p, panel) in panels.iter().enumerate() {
                let first = first + p * LANES;
                let rows = LANES.min(out_features - first);
                // SAFETY: the columns of these rows belong to this task.
                unsafe {
                    for (k, lanes) in panel.codes.iter().enumerate() {
                        codes.range(k * out_features + first, rows).copy_from_slice(&lanes[..rows]);
                    }
                    for g in 0..groups {
                        let at = g * out_features + first;
                        scales.range(at, rows).copy_from_slice(&panel.scales[g][..rows]);
                        let to = zeros.range(at, rows);
                        to.iter_mut().zip(&panel.zeros[g]).for_each(|(t, z)| *t = *z as u8);
                    }
                    losses.range(first, rows).copy_from_slice(&panel.losses[..rows]);
                }
            }
        });
        swept
    }

    /// 1/U_jj² at each position of the sweep over the largest of them; 1 without a factor.
    fn importance(&self) -> Vec<f32> {
        let columns = self.order.len();
        let Some(u) = self.factor else { return vec![1.0; columns] };
        let least = (0..columns).map(|j| u[j * columns + j]).fold(f32::INFINITY, f32::min);
        (0..columns).map(|j| (least / u[j * columns + j]).powi(2)).collect()
    }
}

#[cfg(test)]
mod clip_tests;
#[cfg(test)]
mod refine_tests;
#[cfg(test)]
mod tests;
