//! Making up for inputs that are not those of the float model.
//!
//! X̂ are the inputs of a stage behind the quantized stages before it, X those of the float model; S is
//! their difference X - X̂. What a linear should compute is W X, what it can compute is Ŵ X̂, and the
//! float weights that come nearest to it on X̂ are W + W D H⁻¹ with H = X̂ X̂ᵀ and D = S X̂ᵀ. All three
//! corrections go there or part of the way, at another point of the sweep:
//!
//! - QEP (arXiv 2504.09629) moves the weights before any solver sees them: W + α W D H⁻¹.
//! - GPTAQ (arXiv 2504.02692) lets each column hand the share of its own input, w_c S_c, to the columns
//!   behind it when it is rounded: P = α · triu(D Uᵀ, 1) U, w_j += w_c P_cj.
//! - Qronos (arXiv 2505.11695) rounds the first column to what fits best with all others as they are,
//!   w_1 + (W D)_1 / H_11, then gives the others their best values for that code. These are what the
//!   sweep of GPTQ makes of the others when it begins at the optimum W + W D H⁻¹ and takes the error
//!   from there, so that the rest of it is the plain sweep.
//!
//! H is damped everywhere, and every U is the factor of its inverse in the order of the sweep.

use std::borrow::Cow;
use std::sync::Arc;

use gptq_compute::sweep::{Feed, Grid};
use gptq_compute::{Cross, DenseMatrix, Pool, Tensor, gemm_nt, times_inverse};

use super::{Solution, gptq_fed};
use crate::hessian::Factor;

/// How a linear makes up for the errors of its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Correction {
    /// Not at all.
    #[default]
    None,
    /// Its weights are moved before they are solved.
    Qep,
    /// Every column passes its share on when it is rounded.
    Gptaq,
    /// The first column is rounded to the best fit, the others start from their best values.
    Qronos,
}

impl Correction {
    /// Its name on the command line and in configs.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Qep => "qep",
            Self::Gptaq => "gptaq",
            Self::Qronos => "qronos",
        }
    }

    /// The share of the difference that its authors correct.
    pub fn usual_strength(self) -> f64 {
        match self {
            Self::None => 0.0,
            Self::Qep => 0.5,
            Self::Gptaq => 0.25,
            Self::Qronos => 1.0,
        }
    }
}

/// How far the inputs of a stage are from those of the float model, on the scale of its Hessian.
#[derive(Debug, Clone)]
pub struct Shift {
    /// 2/n X̂ Sᵀ `[in, in]`: the transpose of D.
    turned: Arc<[f32]>,
    correction: Correction,
    strength: f32,
}

impl Shift {
    /// Takes over the sum X̂ Sᵀ, of which the share `strength` is to be corrected.
    pub fn new(sum: Cross, correction: Correction, strength: f64) -> Self {
        let tokens = sum.rows().max(1);
        let turned = sum.into_matrix(2.0 / tokens as f32).into();
        Self { turned, correction, strength: strength as f32 }
    }

    /// What the sweeps of all linears with this factor share: P of GPTAQ.
    pub fn passed_on(&self, pool: &Pool, factor: &Factor) -> Option<Vec<f32>> {
        if self.correction != Correction::Gptaq || factor.diagonal.is_none() {
            return None;
        }
        let order = &factor.columns.order;
        let (n, turned) = (order.len(), &self.turned);
        let mut p = Vec::with_capacity(n * n);
        for &a in order {
            p.extend(order.iter().map(|&b| self.strength * turned[b as usize * n + a as usize]));
        }
        times_inverse(pool, &factor.upper, n, &mut p, true);
        Some(p)
    }

    /// The weights `[out, in]` that a solver should aim at, and what the first column of its sweep
    /// should be rounded from.
    fn targets<'w>(
        &self,
        pool: &Pool,
        weights: &'w [f32],
        factor: &Factor,
    ) -> (Cow<'w, [f32]>, Option<Vec<f32>>) {
        let moves = matches!(self.correction, Correction::Qep | Correction::Qronos);
        let Some(diagonal) = factor.diagonal.as_ref().filter(|_| moves) else {
            return (Cow::from(weights), None);
        };
        let order = &factor.columns.order;
        let n = order.len();
        let mut product = Tensor::default();
        let rows = Tensor::from_vec(weights.len() / n.max(1), n, weights.to_vec());
        let turned = DenseMatrix::from_f32(n, n, Arc::clone(&self.turned));
        gemm_nt(pool, &rows, &turned, None, &mut product);
        let mut moved = rows;
        // In the order of the sweep.
        for (to, from) in
            moved.as_mut_slice().chunks_exact_mut(n).zip(product.as_slice().chunks_exact(n))
        {
            to.iter_mut().zip(order).for_each(|(v, &k)| *v = self.strength * from[k as usize]);
        }
        drop(product);
        // An input that never fires has weight zero, whatever comes out here.
        let first = order.first().map(|&k| k as usize).filter(|&k| !factor.dead[k]);
        let first = first.filter(|_| self.correction == Correction::Qronos).map(|k| {
            let rows = weights.chunks_exact(n).zip(moved.as_slice().chunks_exact(n));
            rows.map(|(w, m)| w[k] + m[0] / diagonal[k]).collect()
        });
        times_inverse(pool, &factor.upper, n, moved.as_mut_slice(), false);
        let mut targets = weights.to_vec();
        for (to, from) in targets.chunks_exact_mut(n).zip(moved.as_slice().chunks_exact(n)) {
            for (&k, v) in order.iter().zip(from) {
                to[k as usize] += v;
            }
        }
        (Cow::from(targets), first)
    }
}

/// A correction at work on the linears of one factor.
#[derive(Debug, Clone, Copy)]
pub struct Corrected<'a> {
    /// The stage's.
    pub shift: &'a Shift,
    /// What [`Shift::passed_on`] gave.
    pub passed_on: Option<&'a [f32]>,
}

impl Corrected<'_> {
    /// What any solver but [`Corrected::gptq`] should be given instead of `weights` `[out, in]`, and
    /// what a solution is refined towards.
    pub fn weights<'w>(&self, pool: &Pool, weights: &'w [f32], factor: &Factor) -> Cow<'w, [f32]> {
        self.shift.targets(pool, weights, factor).0
    }

    /// [`super::gptq`] with the correction; gives the weights that it aimed at, too.
    pub fn gptq<'w>(
        &self,
        pool: &Pool,
        weights: &'w [f32],
        factor: &Factor,
        grid: Grid,
    ) -> (Solution, Cow<'w, [f32]>) {
        let (targets, first) = self.shift.targets(pool, weights, factor);
        let feed = Feed { pass_on: self.passed_on, first: first.as_deref() };
        (gptq_fed(pool, &targets, factor, grid, feed), targets)
    }
}
