//! Optimal Brain Quantizer (Frantar & Alistarh 2022), the exact greedy method that GPTQ
//! approximates: every row quantizes, again and again, the weight whose rounding costs least,
//! and corrects all that are left.
//!
//! For a row w with inverse Hessian H⁻¹ restricted to the weights left, the next one is
//! q = argmin (quant(w_q) - w_q)² / [H⁻¹]_qq; all others get w -= (w_q - quant(w_q)) / [H⁻¹]_qq ·
//! H⁻¹_:,q, and the inverse loses row and column q by one step of Gaussian elimination. O(in³) per
//! row, so for single layers and small models.

use std::sync::{Mutex, PoisonError};

use gptq_compute::Pool;
use gptq_compute::sweep::Grid;

use super::{Solution, rtn};
use crate::hessian::Factor;

/// OBQ on the grids that [`rtn`] finds. `weights`: `[out, in]`; the factor must be in the order of
/// the inputs (no activation order). Rows are independent and the result is the same for any number
/// of threads.
///
/// # Panics
/// If the factor is in another order.
pub fn obq(pool: &Pool, weights: &[f32], factor: &Factor, group_size: i64, grid: Grid) -> Solution {
    let n = factor.columns.order.len();
    assert!(factor.columns.order.iter().enumerate().all(|(i, &k)| i as u32 == k), "natural order");
    let mut solution = rtn(pool, weights, n, group_size, grid);
    let outputs = weights.len() / n.max(1);
    let inverse = inverse(&factor.upper, n);
    let rows: Vec<Mutex<(Vec<u8>, f64)>> = (0..outputs).map(|_| Mutex::default()).collect();
    pool.run(outputs, &|row| {
        let params: Vec<(f32, f32)> = (0..n)
            .map(|k| {
                let at = solution.g_idx[k] as usize * outputs + row;
                (solution.scales[at], f32::from(solution.zeros[at]))
            })
            .collect();
        let mut w = weights[row * n..(row + 1) * n].to_vec();
        w.iter_mut().zip(&factor.dead).filter(|(_, dead)| **dead).for_each(|(w, _)| *w = 0.0);
        let solved = solve_row(w, inverse.clone(), &params, grid.max_code() as f32);
        *rows[row].lock().unwrap_or_else(PoisonError::into_inner) = solved;
    });
    solution.loss = 0.0;
    for (row, solved) in rows.into_iter().enumerate() {
        let (codes, loss) = solved.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (k, q) in codes.into_iter().enumerate() {
            solution.codes[k * outputs + row] = q;
        }
        solution.loss += loss;
    }
    solution
}

/// H⁻¹ = Uᵀ U.
fn inverse(upper: &[f32], n: usize) -> Vec<f32> {
    let mut inverse = vec![0.0f32; n * n];
    for k in 0..n {
        let row = &upper[k * n..(k + 1) * n];
        for i in k..n {
            let u = row[i];
            for (h, v) in inverse[i * n + k..(i + 1) * n].iter_mut().zip(&row[k..]) {
                *h += u * v;
            }
        }
    }
    inverse
}

/// Codes of one row and its loss ½ Σ e² / [H⁻¹]_qq.
fn solve_row(mut w: Vec<f32>, mut h: Vec<f32>, params: &[(f32, f32)], top: f32) -> (Vec<u8>, f64) {
    let n = w.len();
    let mut codes = vec![0u8; n];
    let mut left: Vec<usize> = (0..n).collect();
    let mut loss = 0.0;
    let round = |w: f32, (s, z): (f32, f32)| ((w / s).round_ties_even() + z).clamp(0.0, top);
    while !left.is_empty() {
        let cost = |&k: &usize| {
            let (s, z) = params[k];
            let e = w[k] - s * (round(w[k], params[k]) - z);
            e * e / h[k * n + k].max(f32::MIN_POSITIVE)
        };
        let mut best = (0, f32::INFINITY);
        for (i, k) in left.iter().enumerate() {
            let c = cost(k);
            if c < best.1 {
                best = (i, c);
            }
        }
        let k = left.swap_remove(best.0);
        let (s, z) = params[k];
        let q = round(w[k], params[k]);
        codes[k] = q as u8;
        let d = h[k * n + k].max(f32::MIN_POSITIVE);
        let e = (w[k] - s * (q - z)) / d;
        loss += 0.5 * f64::from(e) * f64::from(e) * f64::from(d);
        let column: Vec<f32> = h[k * n..(k + 1) * n].to_vec();
        for (w, c) in w.iter_mut().zip(&column) {
            *w -= e * c;
        }
        for &i in &left {
            let f = column[i] / d;
            if f != 0.0 {
                for (h, c) in h[i * n..(i + 1) * n].iter_mut().zip(&column) {
                    *h -= f * c;
                }
            }
        }
    }
    (codes, loss)
}
