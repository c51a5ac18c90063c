//! From the Gram matrix of a stage's inputs to the factor that its linears are swept with.

use std::sync::Arc;

use gptq_compute::{DenseMatrix, Gram, Pool, Tensor, cholesky::inverse_factor, gemm_nt};

use crate::order::{ColumnOrder, OrderOptions};

/// Dampings that are tried, at most.
const MOST_TRIES: usize = 100;

/// H = 2/n Σ x xᵀ over the n calibration tokens of a stage, `[in, in]` (GPTQ, section 3).
#[derive(Debug, Clone)]
pub struct Hessian {
    matrix: Arc<[f32]>,
    width: usize,
    tokens: usize,
}

/// How a Hessian is damped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Damping {
    /// Share of the mean diagonal that is added to the diagonal.
    pub percent: f64,
    /// What is added to that share when the factorization fails, until it reaches 1.
    pub auto_increment: f64,
}

/// What a sweep needs: order, groups and the factor of the damped, permuted inverse.
#[derive(Debug, Clone)]
pub struct Factor {
    /// Order and groups of the columns.
    pub columns: ColumnOrder,
    /// U `[in, in]` upper with H⁻¹ = Uᵀ U, in the order of the sweep.
    pub upper: Vec<f32>,
    /// The damped diagonal of H in the order of the inputs, `[in]`; `None` where the factor is that of
    /// a diagonal, because H could not be factorised.
    pub diagonal: Option<Vec<f32>>,
    /// Inputs that were zero in all calibration tokens; their weights are set to zero.
    pub dead: Vec<bool>,
    /// The share that was added to the diagonal in the end.
    pub damp_percent: f64,
    /// Factorizations tried.
    pub tries: u32,
}

impl Hessian {
    /// Takes over the sum over a stage's inputs.
    pub fn new(gram: Gram) -> Self {
        let (width, tokens) = (gram.width(), gram.rows());
        let factor = 2.0 / tokens.max(1) as f32;
        Self { matrix: gram.into_symmetric(factor).into(), width, tokens }
    }

    /// A given symmetric matrix `[width, width]`, from `tokens` tokens.
    ///
    /// # Panics
    /// If it is not square.
    #[track_caller]
    pub fn from_matrix(matrix: Vec<f32>, width: usize, tokens: usize) -> Self {
        assert_eq!(matrix.len(), width * width, "square matrix");
        Self { matrix: matrix.into(), width, tokens }
    }

    /// That of the tokens of both.
    ///
    /// # Panics
    /// If the widths differ.
    #[track_caller]
    pub fn join(&self, other: &Self) -> Self {
        assert_eq!(self.width, other.width, "width of the Hessians");
        let tokens = self.tokens + other.tokens;
        let share = |tokens_of: usize| (tokens_of as f64 / tokens.max(1) as f64) as f32;
        let (ours, theirs) = (share(self.tokens), share(other.tokens));
        let both = self.matrix.iter().zip(other.matrix.iter());
        let matrix = both.map(|(a, b)| ours * a + theirs * b).collect();
        Self { matrix, width: self.width, tokens }
    }

    /// The matrix with its off-diagonal elements reduced by the share `shrink`, 0 to 1: of correlations that few
    /// tokens show, less is believed (Ledoit and Wolf 2004, towards the diagonal).
    #[must_use]
    pub fn shrunk(&self, shrink: f64) -> Self {
        if shrink == 0.0 {
            return self.clone();
        }
        let (n, kept) = (self.width, (1.0 - shrink) as f32);
        let element = |(i, &h): (usize, &f32)| if i / n == i % n { h } else { kept * h };
        Self { matrix: self.matrix.iter().enumerate().map(element).collect(), ..*self }
    }

    /// With 2 Σ w x xᵀ for further inputs, given as the sum over x √w.
    ///
    /// # Panics
    /// If the widths differ.
    #[track_caller]
    pub(crate) fn with(&self, weighted: Gram) -> Self {
        assert_eq!(self.width, weighted.width(), "width of the Hessians");
        let mut matrix = weighted.into_symmetric(2.0);
        matrix.iter_mut().zip(self.matrix.iter()).for_each(|(sum, x)| *sum += x);
        Self { matrix: matrix.into(), width: self.width, tokens: self.tokens }
    }

    /// Number of inputs.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens behind it.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The matrix `[in, in]`, row-major, not damped.
    pub fn matrix(&self) -> &[f32] {
        &self.matrix
    }

    /// Whether all elements are numbers. An infinite or undefined activation reaches the diagonal
    /// of its column.
    pub fn is_finite(&self) -> bool {
        self.diagonal().all(f32::is_finite)
    }

    /// The matrix for products; no copy.
    pub(crate) fn dense(&self) -> DenseMatrix {
        DenseMatrix::from_f32(self.width, self.width, Arc::clone(&self.matrix))
    }

    pub(crate) fn diagonal(&self) -> impl Iterator<Item = f32> + Clone + '_ {
        (0..self.width).map(|i| self.matrix[i * self.width + i])
    }

    /// Orders, damps and factorises.
    ///
    /// Never fails: where the damping asked for does not make the matrix positive definite (too
    /// few or too similar tokens), it grows by `auto_increment` up to 1; then every diagonal
    /// element is raised to a floor of 10⁻⁶ … 10⁻¹ of the largest one on top of that; at last the
    /// off-diagonal elements are dropped, which makes the sweep round to nearest.
    pub fn factor(&self, order: OrderOptions, damping: Damping) -> Factor {
        let n = self.width;
        let mut diagonal: Vec<f32> = self.diagonal().collect();
        let dead: Vec<bool> = diagonal.iter().map(|&d| d == 0.0).collect();
        diagonal.iter_mut().filter(|d| **d == 0.0).for_each(|d| *d = 1.0);
        let columns = ColumnOrder::new(&diagonal, order);
        let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / n.max(1) as f64;
        let max = diagonal.iter().copied().fold(0.0, f32::max);

        let damped = |k: u32, percent: f64, floor: f32| {
            (diagonal[k as usize] + (percent * mean) as f32).max(floor)
        };
        let permuted = |percent: f64, floor: f32| {
            let mut h = Vec::with_capacity(n * n);
            for &a in &columns.order {
                let row = &self.matrix[a as usize * n..][..n];
                h.extend(columns.order.iter().map(|&b| row[b as usize]));
            }
            for (i, &k) in columns.order.iter().enumerate() {
                h[i * n + i] = damped(k, percent, floor);
            }
            h
        };
        let mut tries = 0;
        let mut attempt = |percent: f64, floor: f32| {
            tries += 1;
            inverse_factor(permuted(percent, floor), n).ok()
        };
        let (mut percent, mut floor) = (damping.percent, 0.0);
        let mut upper = attempt(percent, 0.0);
        // Steps too small to matter must not take forever.
        for _ in 0..MOST_TRIES {
            if upper.is_some()
                || damping.auto_increment <= 0.0
                || percent + damping.auto_increment >= 1.0
            {
                break;
            }
            percent += damping.auto_increment;
            upper = attempt(percent, 0.0);
        }
        for power in -6..0 {
            if upper.is_none() {
                floor = max * 10f32.powi(power);
                upper = attempt(percent, floor);
            }
        }
        let damped = (0..n as u32).map(|k| damped(k, percent, floor));
        let damped = upper.is_some().then(|| damped.collect());
        let upper = upper.unwrap_or_else(|| {
            let mut u = vec![0.0; n * n];
            for (i, &k) in columns.order.iter().enumerate() {
                u[i * n + i] = 1.0 / diagonal[k as usize].max(f32::MIN_POSITIVE).sqrt();
            }
            u
        });
        Factor { columns, upper, diagonal: damped, dead, damp_percent: percent, tries }
    }

    /// Adds ‖ΔW X‖² and ‖W X‖² over the calibration inputs for some rows of weights and their
    /// quantized values, both `[rows, in]`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_error(
        &self,
        pool: &Pool,
        weights: &[f32],
        mut quantized: Vec<f32>,
        sum: &mut OutputError,
    ) {
        assert_eq!(weights.len(), quantized.len(), "weights and quantized weights");
        let n = self.width;
        let rows = weights.len() / n.max(1);
        let h = self.dense();
        let mut wh = Tensor::default();
        let mut energy = |w: &Tensor| -> f64 {
            gemm_nt(pool, w, &h, None, &mut wh);
            let dot = |i: usize| -> f64 {
                w.row(i).iter().zip(wh.row(i)).map(|(a, b)| f64::from(a * b)).sum()
            };
            (0..rows).map(dot).sum()
        };
        quantized.iter_mut().zip(weights).for_each(|(q, w)| *q = w - *q);
        let mut rows_of = Tensor::from_vec(rows, n, quantized);
        sum.difference += energy(&rows_of);
        rows_of.as_mut_slice().copy_from_slice(weights);
        sum.total += energy(&rows_of);
    }
}

/// Squared outputs of a linear over its calibration inputs, as they are summed up.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputError {
    difference: f64,
    total: f64,
}

impl OutputError {
    /// ‖ΔW X‖² / ‖W X‖²; NaN where either is no number.
    pub fn relative(self) -> f64 {
        if self.total <= 0.0 {
            return 0.0;
        }
        // Rounding may leave a little less than nothing, and `max` would hide what is no number.
        let relative = self.difference / self.total;
        if relative < 0.0 { 0.0 } else { relative }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: OrderOptions = OrderOptions {
        group_size: -1,
        desc_act: false,
        act_group_aware: false,
        static_groups: false,
    };
    const DAMPING: Damping = Damping { percent: 0.01, auto_increment: 0.01 };

    #[test]
    fn an_error_that_is_no_number_is_not_the_least() {
        let relative = |difference, total| OutputError { difference, total }.relative();
        assert_eq!(
            (relative(1.0, 4.0), relative(-1e-9, 4.0), relative(0.0, 0.0)),
            (0.25, 0.0, 0.0)
        );
        for (difference, total) in
            [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::INFINITY, f64::INFINITY)]
        {
            assert!(relative(difference, total).is_nan(), "{difference} {total}");
        }
    }

    #[test]
    fn rank_one_and_empty_hessians_are_factorised() {
        let n = 24;
        let x: Vec<f32> = (0..n).map(|i| (i as f32 - 7.0) * 1e3).collect();
        let h: Vec<f32> = (0..n * n).map(|i| x[i / n] * x[i % n]).collect();
        for matrix in [h, vec![0.0; n * n], vec![1e30; n * n], vec![1e-30; n * n]] {
            let f = Hessian::from_matrix(matrix, n, 1).factor(PLAIN, DAMPING);
            assert!(f.upper.iter().all(|u| u.is_finite()));
            assert!((0..n).all(|i| f.upper[i * n + i] > 0.0));
        }
    }

    #[test]
    fn shrinking_leaves_the_diagonal() {
        let h = Hessian::from_matrix(vec![2.0, 1.0, 1.0, 4.0], 2, 7);
        assert_eq!(h.shrunk(0.25).matrix(), [2.0, 0.75, 0.75, 4.0]);
        assert_eq!((h.shrunk(0.25).tokens(), h.shrunk(0.0).matrix()), (7, h.matrix()));
    }

    #[test]
    fn indefinite_hessians_get_more_damping() {
        // Eigenvalues 1 +- 1.5: needs half the mean diagonal and more.
        let f = Hessian::from_matrix(vec![1.0, 1.5, 1.5, 1.0], 2, 1).factor(PLAIN, DAMPING);
        let diagonal = f.diagonal.as_ref().unwrap();
        assert!((f64::from(diagonal[0]) - 1.0 - f.damp_percent).abs() < 1e-6);
        assert!(f.tries > 40 && f.damp_percent > 0.5 && f.damp_percent < 0.53, "{f:?}");
        let f = Hessian::from_matrix(vec![1.0, 9.0, 9.0, 1.0], 2, 1).factor(PLAIN, DAMPING);
        assert_eq!(f.upper[1], 0.0, "falls back to the diagonal");
        assert_eq!(f.diagonal, None);
    }

    #[test]
    fn joined_hessians_are_those_of_all_tokens() {
        let a = Hessian::from_matrix(vec![1.0, 0.0, 0.0, 4.0], 2, 30);
        let b = Hessian::from_matrix(vec![5.0, 2.0, 2.0, 0.0], 2, 10);
        let both = a.join(&b);
        assert_eq!((both.matrix(), both.tokens()), (&[2.0, 0.5, 0.5, 3.0][..], 40));
    }

    #[test]
    fn dead_inputs_are_found() {
        let f = Hessian::from_matrix(vec![2.0, 0.0, 0.0, 0.0], 2, 1).factor(PLAIN, DAMPING);
        assert_eq!(f.dead, [false, true]);
        assert_eq!(f.tries, 1);
    }

    #[test]
    fn relative_error_is_the_energy_ratio() {
        let pool = Pool::new(1);
        let h = Hessian::from_matrix(vec![2.0, 1.0, 1.0, 3.0], 2, 8);
        let mut sum = OutputError::default();
        h.add_error(&pool, &[1.0, 2.0], vec![0.5, 2.0], &mut sum);
        // 0.25 * 2 over 2 + 4 + 12.
        assert!((sum.relative() - 0.5 / 18.0).abs() < 1e-6);
        // A second row without an error doubles the total.
        h.add_error(&pool, &[1.0, 2.0], vec![1.0, 2.0], &mut sum);
        assert!((sum.relative() - 0.5 / 36.0).abs() < 1e-6);
    }
}
