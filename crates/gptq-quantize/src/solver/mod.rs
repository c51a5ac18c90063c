//! From weights and a Hessian to integer codes.
//!
//! All solvers return codes, scales and zero points; floats are derived from these and never
//! quantized again.

pub(crate) mod awq;
mod correction;
mod obq;
mod refine;

use std::borrow::Cow;
use std::ops::Range;

use gptq_compute::Pool;
use gptq_compute::sweep::{Feed, Grid, ScaleSearch, Sweep, Swept};

use crate::hessian::Factor;
use crate::order::ColumnOrder;

pub use awq::{Ratio, RatioSearch, clipped};
pub use correction::{Corrected, Correction, Shift};
pub use obq::obq;
pub use refine::refine;

/// A solved linear.
#[derive(Debug, Clone)]
pub struct Solution {
    /// `[in, out]`, row-major.
    pub codes: Vec<u8>,
    /// `[groups, out]`.
    pub scales: Vec<f32>,
    /// `[groups, out]`.
    pub zeros: Vec<u8>,
    /// Group of each input, `[in]`.
    pub g_idx: Vec<u32>,
    /// ½ tr(ΔW H ΔWᵀ) with the damped H; 0 for [`rtn`].
    pub loss: f64,
}

impl Solution {
    fn new(swept: Swept, g_idx: &[u32]) -> Self {
        let Swept { codes, scales, zeros, losses } = swept;
        Self { codes, scales, zeros, g_idx: g_idx.to_vec(), loss: losses.iter().sum() }
    }

    /// Outputs of the linear.
    pub fn outputs(&self) -> usize {
        self.codes.len() / self.g_idx.len().max(1)
    }

    /// The weights that the codes stand for, `[out, in]`.
    pub fn dequantize(&self) -> Vec<f32> {
        self.dequantize_rows(0..self.outputs())
    }

    /// Some rows of [`Solution::dequantize`], `[rows, in]`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[track_caller]
    pub fn dequantize_rows(&self, rows: Range<usize>) -> Vec<f32> {
        let (inputs, outputs) = (self.g_idx.len(), self.outputs());
        let mut weights = vec![0.0; inputs * rows.len()];
        for (k, (codes, &g)) in self.codes.chunks_exact(outputs.max(1)).zip(&self.g_idx).enumerate()
        {
            let at = g as usize * outputs;
            let params =
                self.scales[at..][rows.clone()].iter().zip(&self.zeros[at..][rows.clone()]);
            for (n, (&q, (s, &z))) in codes[rows.clone()].iter().zip(params).enumerate() {
                weights[n * inputs + k] = s * (f32::from(q) - f32::from(z));
            }
        }
        weights
    }
}

/// A solution that grows by parts of the outputs, which do not interact.
#[derive(Debug)]
pub struct Joined {
    outputs: usize,
    filled: usize,
    whole: Option<Solution>,
}

impl Joined {
    /// Nothing yet of a linear with `outputs` outputs.
    pub fn new(outputs: usize) -> Self {
        Self { outputs, filled: 0, whole: None }
    }

    /// Appends the solution of the outputs that come next.
    ///
    /// # Panics
    /// If it has more outputs than are left, or another shape than the parts before it.
    #[track_caller]
    pub fn push(&mut self, part: Solution) {
        let (outputs, filled, rows) = (self.outputs, self.filled, part.outputs());
        self.filled += rows;
        if rows == outputs {
            self.whole = Some(part);
            return;
        }
        let Solution { codes, scales, zeros, g_idx, loss } = part;
        let groups = scales.len() / rows.max(1);
        let whole = self.whole.get_or_insert_with(|| Solution {
            codes: vec![0; g_idx.len() * outputs],
            scales: vec![0.0; groups * outputs],
            zeros: vec![0; groups * outputs],
            g_idx,
            loss: 0.0,
        });
        put_columns(&mut whole.codes, &codes, outputs, filled, rows);
        put_columns(&mut whole.scales, &scales, outputs, filled, rows);
        put_columns(&mut whole.zeros, &zeros, outputs, filled, rows);
        whole.loss += loss;
    }

    /// The solution of all outputs; `None` while some are missing.
    pub fn finish(self) -> Option<Solution> {
        self.whole.filter(|_| self.filled == self.outputs)
    }
}

/// Copies `[_, rows]` to the columns of `[_, outputs]` from `first` on.
fn put_columns<T: Copy>(to: &mut [T], from: &[T], outputs: usize, first: usize, rows: usize) {
    for (to, from) in to.chunks_exact_mut(outputs).zip(from.chunks_exact(rows)) {
        to[first..first + rows].copy_from_slice(from);
    }
}

/// Rounds to nearest on the grid of each group: the baseline that uses no data. `weights`:
/// `[out, in]`; groups of neighbouring inputs, -1 for one group.
pub fn rtn(pool: &Pool, weights: &[f32], inputs: usize, group_size: i64, grid: Grid) -> Solution {
    let options = crate::order::OrderOptions {
        group_size,
        desc_act: false,
        act_group_aware: false,
        static_groups: true,
    };
    let ColumnOrder { order, groups, g_idx, .. } = ColumnOrder::new(&vec![0.0; inputs], options);
    let sweep = Sweep { factor: None, order: &order, groups: &groups, static_groups: true, grid };
    Solution::new(sweep.run(pool, weights, weights.len() / inputs.max(1)), &g_idx)
}

/// GPTQ: the column sweep with error feedback (Frantar et al. 2023). `weights`: `[out, in]`.
pub fn gptq(pool: &Pool, weights: &[f32], factor: &Factor, grid: Grid) -> Solution {
    gptq_fed(pool, weights, factor, grid, Feed::default())
}

/// [`gptq`] with what a correction feeds into the sweep.
fn gptq_fed(pool: &Pool, weights: &[f32], factor: &Factor, grid: Grid, feed: Feed<'_>) -> Solution {
    let ColumnOrder { order, groups, g_idx, static_groups } = &factor.columns;
    let one_group = groups.iter().all(|&g| g == 0);
    let inputs = order.len();
    let sweep =
        Sweep { factor: Some(&factor.upper), order, groups, static_groups: *static_groups, grid };
    let outputs = weights.len() / inputs.max(1);
    let alive = alive(weights, factor);
    // A single group takes its range from all weights, as the reference does; but where inputs weigh errors, one that
    // never fires would weigh more than the others.
    let weighed = grid.search == ScaleSearch::Hessian;
    let ranges = if one_group && !weighed { weights } else { &alive };
    Solution::new(sweep.run_fed(pool, &alive, ranges, outputs, feed), g_idx)
}

/// The weights `[out, in]`, with zeros where an input never fires.
fn alive<'w>(weights: &'w [f32], factor: &Factor) -> Cow<'w, [f32]> {
    if !factor.dead.contains(&true) {
        return Cow::from(weights);
    }
    let row = |row: &[f32]| -> Vec<f32> {
        row.iter().zip(&factor.dead).map(|(w, dead)| if *dead { 0.0 } else { *w }).collect()
    };
    weights.chunks_exact(factor.dead.len()).flat_map(row).collect()
}

#[cfg(test)]
mod correction_tests;
#[cfg(test)]
pub(crate) use tests::gauss_inverse;
#[cfg(test)]
mod tests;
