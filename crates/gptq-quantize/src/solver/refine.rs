//! A solution improved after the sweep, on the same H.

use std::borrow::Cow;

use gptq_compute::Pool;
use gptq_compute::sweep::{Grid, Refine, Swept};

use super::{Solution, alive};
use crate::hessian::{Factor, Hessian};

/// Lets `rounds` rounds of closed-form scales and coordinate descent ([`Refine`]) improve the
/// `solution` that a solver found for `weights` `[out, in]` with `factor`, the factor of `hessian`.
/// The loss never rises. Without a solvable H (a factor that has only a diagonal) nothing is changed.
pub fn refine(
    pool: &Pool,
    weights: &[f32],
    hessian: &Hessian,
    factor: &Factor,
    grid: Grid,
    rounds: usize,
    solution: Solution,
) -> Solution {
    let Some(damped) = factor.diagonal.as_ref().filter(|_| rounds > 0) else { return solution };
    let inputs = solution.g_idx.len();
    // Groups must be consecutive. Where they are formed along the sweep, its order is taken.
    let along_sweep = !solution.g_idx.is_sorted();
    let order: Vec<u32> =
        if along_sweep { factor.columns.order.clone() } else { (0..inputs as u32).collect() };
    let groups: Vec<u32> = order.iter().map(|&k| solution.g_idx[k as usize]).collect();
    let matrix: Cow<'_, [f32]> = if along_sweep {
        let row = |&a: &u32| &hessian.matrix()[a as usize * inputs..][..inputs];
        let rows = order.iter().map(row);
        rows.flat_map(|row| order.iter().map(|&b| row[b as usize])).collect()
    } else {
        Cow::from(hessian.matrix())
    };
    let diagonal: Vec<f32> = order.iter().map(|&k| damped[k as usize]).collect();
    let Solution { codes, scales, zeros, g_idx, .. } = solution;
    let losses = vec![0.0; codes.len() / inputs.max(1)];
    let mut swept = Swept { codes, scales, zeros, losses };
    let refine = Refine {
        hessian: &matrix,
        diagonal: &diagonal,
        order: &order,
        groups: &groups,
        grid,
        rounds,
    };
    refine.run(pool, &alive(weights, factor), &mut swept);
    Solution::new(swept, &g_idx)
}
