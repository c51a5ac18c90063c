//! The factor that GPTQ sweeps with, by faer.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltError, LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Auto, MatMut, MatRef, Par, Spec};

use crate::error::{ComputeError, Result};

/// The upper triangular U `[n, n]`, row-major, with H⁻¹ = Uᵀ U, of a symmetric H `[n, n]`.
///
/// Instead of Cholesky, inverse and Cholesky again (Frantar et al. 2023, section 3), the rows and
/// columns of H are reversed: its lower factor, reversed back, is an upper R with H = R Rᵀ, and
/// U = R⁻¹. Half the work, and one decomposition that can fail instead of two.
///
/// # Errors
/// [`ComputeError::NotPositiveDefinite`] when H is not, or holds NaN.
///
/// # Panics
/// If `h` is not `n * n` long.
#[track_caller]
pub fn inverse_factor(mut h: Vec<f32>, n: usize) -> Result<Vec<f32>> {
    assert_eq!(h.len(), n * n, "square matrix");
    // H is symmetric, so reversing the whole buffer reverses rows and columns in either order.
    h.reverse();
    let params = Spec::<LltParams, f32>::new(Auto::<f32>::auto());
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(n, Par::Seq, params));
    cholesky_in_place(
        MatMut::from_column_major_slice_mut(&mut h, n, n),
        LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut memory),
        params,
    )
    .map_err(|LltError::NonPositivePivot { index }| ComputeError::NotPositiveDefinite {
        // The pivot of the reversed matrix.
        index: n - 1 - index.min(n - 1),
    })?;
    let mut inverse = vec![0.0f32; n * n];
    invert_lower_triangular(
        MatMut::from_column_major_slice_mut(&mut inverse, n, n),
        MatRef::from_column_major_slice(&h, n, n),
        Par::Seq,
    );
    // Column-major (i, j) of the inverse is (n-1-i, n-1-j) of U.
    let mut u = h;
    u.fill(0.0);
    for i in 0..n {
        for j in i..n {
            let v = inverse[(n - 1 - j) * n + (n - 1 - i)];
            if !v.is_finite() {
                return Err(ComputeError::NotPositiveDefinite { index: i });
            }
            u[i * n + j] = v;
        }
    }
    Ok(u)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u_is_the_factor_of_the_inverse() {
        for n in [1, 2, 17, 130, 300] {
            let b: Vec<f64> =
                (0..n * n).map(|i| ((i * 7919 % 2003) as f64 - 1000.0) / 1000.0).collect();
            let mut h = vec![0.0f32; n * n];
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| b[k * n + i] * b[k * n + j]).sum();
                    h[i * n + j] = (dot / n as f64 + if i == j { 0.2 } else { 0.0 }) as f32;
                }
            }
            let u = inverse_factor(h.clone(), n).unwrap();
            // H Uᵀ U = I.
            let at = |m: &[f32], i: usize, j: usize| f64::from(m[i * n + j]);
            for i in (0..n).step_by(7) {
                let hu: Vec<f64> =
                    (0..n).map(|j| (j..n).map(|k| at(&h, i, k) * at(&u, j, k)).sum()).collect();
                for j in 0..n {
                    let v: f64 = (0..=j).map(|k| hu[k] * at(&u, k, j)).sum();
                    assert!((v - f64::from(i == j)).abs() < 1e-4, "{n}: {i} {j} {v}");
                    assert!(j >= i || u[i * n + j] == 0.0);
                }
            }
        }
    }

    #[test]
    fn indefinite_and_nan_are_errors() {
        assert!(inverse_factor(vec![1.0, 2.0, 2.0, 1.0], 2).is_err());
        assert!(inverse_factor(vec![f32::NAN], 1).is_err());
        assert!(inverse_factor(vec![0.0], 1).is_err());
    }
}
