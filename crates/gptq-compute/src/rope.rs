//! Rotary position embedding.

use std::ops::Range;

use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Which two columns of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// i and i + rotary_dim/2 (Llama, NeoX).
    Half,
    /// 2i and 2i + 1 (GPT-J, Cohere).
    Interleaved,
}

/// Cosines and sines of a range of positions, `[positions, rotary_dim / 2]` each.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// The first position.
    start: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
    style: RopeStyle,
}

impl RopeTable {
    /// The table of `positions`. `inv_freq`: `[rotary_dim / 2]` radians per position; cosines and
    /// sines are multiplied by `attention_factor` (YaRN).
    pub fn new(
        inv_freq: &[f32],
        attention_factor: f32,
        style: RopeStyle,
        positions: Range<usize>,
    ) -> Self {
        let pairs = inv_freq.len();
        let start = positions.start;
        let room = positions.len() * pairs;
        let (mut cos, mut sin) = (Vec::with_capacity(room), Vec::with_capacity(room));
        for position in positions {
            for &f in inv_freq {
                // The product is rounded to f32 as in transformers; the functions are exact.
                let angle = f64::from(position as f32 * f);
                cos.push((angle.cos() as f32) * attention_factor);
                sin.push((angle.sin() as f32) * attention_factor);
            }
        }
        Self { start, cos, sin, pairs, style }
    }

    /// The positions covered.
    pub fn positions(&self) -> Range<usize> {
        let count = self.cos.len().checked_div(self.pairs).unwrap_or(usize::MAX - self.start);
        self.start..self.start + count
    }

    /// Columns of each head that rotate.
    pub fn rotary_dim(&self) -> usize {
        2 * self.pairs
    }
}

/// Rotates the first `rotary_dim` columns of every head of `x` `[rows, heads * head_dim]`;
/// `positions`: `[rows]`.
///
/// # Panics
/// If a position is not covered by the table or the widths do not fit.
#[track_caller]
pub fn rope(pool: &Pool, x: &mut Tensor, head_dim: usize, table: &RopeTable, positions: &[u32]) {
    turn(pool, x, head_dim, table, positions, 1.0);
}

/// The gradient of what was rotated by [`rope`], from that of the result, in place: the transposed matrix,
/// which rotates back.
///
/// # Panics
/// As [`rope`].
#[track_caller]
pub fn rope_backward(
    pool: &Pool,
    dy: &mut Tensor,
    head_dim: usize,
    table: &RopeTable,
    positions: &[u32],
) {
    turn(pool, dy, head_dim, table, positions, -1.0);
}

/// Rotates, forward with `sign` 1 and back with -1.
#[track_caller]
fn turn(
    pool: &Pool,
    x: &mut Tensor,
    head_dim: usize,
    table: &RopeTable,
    positions: &[u32],
    sign: f32,
) {
    let (rows, cols, pairs) = (x.rows(), x.cols(), table.pairs);
    assert_eq!(positions.len(), rows, "one position per row");
    assert!(cols.is_multiple_of(head_dim) && 2 * pairs <= head_dim, "head of {head_dim}");
    let covered = table.positions();
    assert!(positions.iter().all(|&p| covered.contains(&(p as usize))), "position out of range");
    let raw = RawSlice::new(x.as_mut_slice());
    let step = (8 * 1024 / cols.max(1)).max(1);
    pool.run(rows.div_ceil(step), &|task| {
        for row in task * step..((task + 1) * step).min(rows) {
            let at = (positions[row] as usize - covered.start) * pairs;
            let (cos, sin) = (&table.cos[at..at + pairs], &table.sin[at..at + pairs]);
            // SAFETY: each row belongs to one task.
            for head in unsafe { raw.range(row * cols, cols) }.chunks_exact_mut(head_dim) {
                match table.style {
                    RopeStyle::Half => {
                        let (a, b) = head[..2 * pairs].split_at_mut(pairs);
                        for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                            let s = sign * s;
                            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                        }
                    }
                    RopeStyle::Interleaved => {
                        let pairs = head[..2 * pairs].chunks_exact_mut(2);
                        for ((p, c), s) in pairs.zip(cos).zip(sin) {
                            let s = sign * s;
                            (p[0], p[1]) = (p[0] * c - p[1] * s, p[1] * c + p[0] * s);
                        }
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_styles_rotate_the_same_pairs() {
        let pool = Pool::new(2);
        let freq = [1.0, 0.1];
        let half = RopeTable::new(&freq, 1.0, RopeStyle::Half, 0..8);
        let inter = RopeTable::new(&freq, 1.0, RopeStyle::Interleaved, 7..8);
        // Head of 5: four rotate, one passes. Pairs (1,3), (2,4).
        let mut a = Tensor::from_vec(1, 5, vec![1.0, 2.0, 3.0, 4.0, 9.0]);
        let mut b = Tensor::from_vec(1, 5, vec![1.0, 3.0, 2.0, 4.0, 9.0]);
        rope(&pool, &mut a, 5, &half, &[7]);
        rope(&pool, &mut b, 5, &inter, &[7]);
        let want = [
            7f32.cos() - 3.0 * 7f32.sin(),
            2.0 * 0.7f32.cos() - 4.0 * 0.7f32.sin(),
            3.0 * 7f32.cos() + 7f32.sin(),
            4.0 * 0.7f32.cos() + 2.0 * 0.7f32.sin(),
            9.0,
        ];
        for (y, t) in a.as_slice().iter().zip(want) {
            assert!((y - t).abs() < 1e-6);
        }
        let b = b.as_slice();
        assert_eq!(a.as_slice(), &[b[0], b[2], b[1], b[3], b[4]]);
    }

    #[test]
    fn the_backward_is_the_transposed_matrix() {
        let pool = Pool::new(2);
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            // An attention factor stays one and is not inverted.
            let table = RopeTable::new(&[1.0, 0.1], 1.5, style, 0..8);
            let (mut x, mut dy) = (Tensor::zeros(1, 10), Tensor::zeros(1, 10));
            for i in 0..10 {
                (x.as_mut_slice()[i], dy.as_mut_slice()[i]) = (i as f32 - 3.0, 2.0 - i as f32);
            }
            let (plain, gradient) = (x.clone(), dy.clone());
            rope(&pool, &mut x, 5, &table, &[7]);
            rope_backward(&pool, &mut dy, 5, &table, &[7]);
            let dot = |a: &Tensor, b: &Tensor| -> f32 {
                a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| a * b).sum()
            };
            assert!((dot(&x, &gradient) - dot(&plain, &dy)).abs() < 1e-4);
        }
    }
}
