//! Operations on single elements and rows: scaling, adding, gathering, embedding.

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::math;
use crate::matrix::DenseMatrix;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Elements that one task handles.
const CHUNK: usize = 16 * 1024;

/// A function of one element and, for binary operations, its partner in a second tensor.
pub(crate) trait Elementwise: Copy + Sync {
    /// # Safety
    /// The processor must have the instruction set of `S`.
    unsafe fn apply<S: Simd>(self, x: S::F, y: S::F) -> S::F;
}

struct Map<'a, O> {
    op: O,
    x: &'a mut [f32],
    y: Option<&'a [f32]>,
}

impl<O: Elementwise> Kernel for Map<'_, O> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.x.len();
        let whole = n - n % LANES;
        for i in (0..whole).step_by(LANES) {
            let p = self.x.as_mut_ptr().add(i);
            let x = S::load(p);
            let y = match self.y {
                Some(y) => S::load(y.as_ptr().add(i)),
                None => x,
            };
            S::store(p, self.op.apply::<S>(x, y));
        }
        if whole < n {
            let (mut x, mut y) = ([0.0; LANES], [0.0; LANES]);
            x[..n - whole].copy_from_slice(&self.x[whole..]);
            if let Some(tail) = self.y {
                y[..n - whole].copy_from_slice(&tail[whole..n]);
            }
            let out = self.op.apply::<S>(S::load(x.as_ptr()), S::load(y.as_ptr()));
            S::store(x.as_mut_ptr(), out);
            self.x[whole..].copy_from_slice(&x[..n - whole]);
        }
    }
}

/// x <- op(x, y), in parallel.
pub(crate) fn map<O: Elementwise>(pool: &Pool, op: O, x: &mut Tensor, y: Option<&Tensor>) {
    if let Some(y) = y {
        assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shapes differ");
    }
    let n = x.as_slice().len();
    let raw = RawSlice::new(x.as_mut_slice());
    pool.run(n.div_ceil(CHUNK), &|task| {
        let start = task * CHUNK;
        let len = CHUNK.min(n - start);
        // SAFETY: chunks of different tasks do not overlap.
        let x = unsafe { raw.range(start, len) };
        dispatch(Map { op, x, y: y.map(|y| &y.as_slice()[start..start + len]) });
    });
}

#[derive(Clone, Copy)]
struct AddScaled(f32);
impl Elementwise for AddScaled {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, y: S::F) -> S::F {
        S::fma(y, S::splat(self.0), x)
    }
}

#[derive(Clone, Copy)]
struct Scale(f32);
impl Elementwise for Scale {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, _: S::F) -> S::F {
        S::mul(x, S::splat(self.0))
    }
}

#[derive(Clone, Copy)]
struct Multiply;
impl Elementwise for Multiply {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, y: S::F) -> S::F {
        S::mul(x, y)
    }
}

#[derive(Clone, Copy)]
struct SoftCap(f32);
impl Elementwise for SoftCap {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, _: S::F) -> S::F {
        let y = S::div(x, S::splat(self.0));
        S::mul(math::tanh::<S>(y), S::splat(self.0))
    }
}

#[derive(Clone, Copy)]
struct Clamp(f32);
impl Elementwise for Clamp {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, _: S::F) -> S::F {
        // In this order what is no number stays.
        S::max(S::splat(-self.0), S::min(S::splat(self.0), x))
    }
}

/// x <- x + scale · y.
///
/// # Panics
/// If the shapes differ.
pub fn add_scaled(pool: &Pool, x: &mut Tensor, y: &Tensor, scale: f32) {
    map(pool, AddScaled(scale), x, Some(y));
}

/// [`add_scaled`] of one row, by the calling thread.
pub(crate) fn add_row(x: &mut [f32], y: &[f32], scale: f32) {
    dispatch(Map { op: AddScaled(scale), x, y: Some(y) });
}

#[derive(Clone, Copy)]
struct ExpAbove(f32);
impl Elementwise for ExpAbove {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, _: S::F) -> S::F {
        math::exp::<S>(S::sub(x, S::splat(self.0)))
    }
}

/// x <- e^(x - most), by the calling thread.
pub(crate) fn exp_row(x: &mut [f32], most: f32) {
    dispatch(Map { op: ExpAbove(most), x, y: None });
}

/// x <- s · x.
pub fn scale(pool: &Pool, x: &mut Tensor, s: f32) {
    map(pool, Scale(s), x, None);
}

/// x <- x · y, element by element.
///
/// # Panics
/// If the shapes differ.
#[track_caller]
pub fn multiply(pool: &Pool, x: &mut Tensor, y: &Tensor) {
    map(pool, Multiply, x, Some(y));
}

/// x <- cap · tanh(x / cap).
pub fn soft_cap(pool: &Pool, x: &mut Tensor, cap: f32) {
    map(pool, SoftCap(cap), x, None);
}

/// Limits x to [-limit, limit].
pub fn clamp(pool: &Pool, x: &mut Tensor, limit: f32) {
    map(pool, Clamp(limit), x, None);
}

/// Copies rows `ids` of `weight` `[vocab, hidden]`, widened to f32, into `out`
/// `[ids.len(), hidden]`.
///
/// # Panics
/// If an id is not below `vocab`; callers check ids where they enter.
#[track_caller]
pub fn embed(weight: &DenseMatrix, ids: &[u32], out: &mut Tensor) {
    out.resize(ids.len(), weight.in_features());
    for (row, &id) in ids.iter().enumerate() {
        assert!((id as usize) < weight.out_features(), "token id {id} is outside the vocabulary");
        weight.row_to_f32(id as usize, out.row_mut(row));
    }
}

/// Each row of `out` becomes the concatenation of the column ranges `(first, length)` of the row of
/// `src`: takes a fused projection apart, whatever its interleave.
pub fn gather_cols(pool: &Pool, src: &Tensor, chunks: &[(usize, usize)], out: &mut Tensor) {
    let cols: usize = chunks.iter().map(|c| c.1).sum();
    out.resize(src.rows(), cols);
    let rows_per_task = (CHUNK / cols.max(1)).max(1);
    let raw = RawSlice::new(out.as_mut_slice());
    pool.run(src.rows().div_ceil(rows_per_task), &|task| {
        for row in task * rows_per_task..((task + 1) * rows_per_task).min(src.rows()) {
            // SAFETY: each row belongs to one task.
            let mut rest = unsafe { raw.range(row * cols, cols) };
            for &(first, len) in chunks {
                let (head, tail) = rest.split_at_mut(len);
                head.copy_from_slice(&src.row(row)[first..first + len]);
                rest = tail;
            }
        }
    });
}

/// The inverse of [`gather_cols`]: the columns of each row of `src` go to the column ranges `(first,
/// length)` of the row of `out`, whose other columns stay.
///
/// # Panics
/// If the rows differ, `src` is not as wide as the ranges together, or a range is outside `out`.
#[track_caller]
pub fn scatter_cols(src: &Tensor, chunks: &[(usize, usize)], out: &mut Tensor) {
    assert_eq!(src.rows(), out.rows(), "rows");
    assert_eq!(src.cols(), chunks.iter().map(|c| c.1).sum::<usize>(), "columns");
    for row in 0..src.rows() {
        let mut rest = src.row(row);
        for &(first, len) in chunks {
            let (head, tail) = rest.split_at(len);
            out.row_mut(row)[first..first + len].copy_from_slice(head);
            rest = tail;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_with_tails() {
        let pool = Pool::new(2);
        for n in [1, 15, 16, 17, 70_001] {
            let mut x = Tensor::from_vec(1, n, (0..n).map(|i| i as f32).collect());
            let y = x.clone();
            add_scaled(&pool, &mut x, &y, -0.5);
            scale(&pool, &mut x, 4.0);
            let mut square = y.clone();
            multiply(&pool, &mut square, &y);
            assert!(square.as_slice().iter().zip(y.as_slice()).all(|(s, y)| *s == y * y));
            clamp(&pool, &mut x, 100.0);
            assert!(
                x.as_slice().iter().enumerate().all(|(i, &v)| v == (2.0 * i as f32).min(100.0))
            );
        }
    }

    #[test]
    fn limits_leave_what_is_no_number() {
        let mut x = Tensor::from_vec(1, 3, vec![f32::NAN, f32::INFINITY, -9.0]);
        clamp(&Pool::new(1), &mut x, 4.0);
        assert!(x.row(0)[0].is_nan());
        assert_eq!(x.row(0)[1..], [4.0, -4.0]);
    }

    #[test]
    fn gathers_columns() {
        let pool = Pool::new(2);
        let src = Tensor::from_vec(2, 4, (0..8).map(|i| i as f32).collect());
        let mut out = Tensor::default();
        gather_cols(&pool, &src, &[(3, 1), (0, 2)], &mut out);
        assert_eq!(out.as_slice(), &[3.0, 0.0, 1.0, 7.0, 4.0, 5.0]);
        let mut back = Tensor::from_vec(2, 4, vec![-1.0; 8]);
        scatter_cols(&out, &[(3, 1), (0, 2)], &mut back);
        assert_eq!(back.as_slice(), &[0.0, 1.0, -1.0, 3.0, 4.0, 5.0, -1.0, 7.0]);
    }

    #[test]
    fn soft_cap_matches_tanh() {
        let pool = Pool::new(1);
        let mut x = Tensor::from_vec(1, 3, vec![-7.0, 0.25, 100.0]);
        soft_cap(&pool, &mut x, 5.0);
        for (y, x) in x.as_slice().iter().zip([-7.0f32, 0.25, 100.0]) {
            assert!((y - 5.0 * (x / 5.0).tanh()).abs() < 2e-6);
        }
    }
}
