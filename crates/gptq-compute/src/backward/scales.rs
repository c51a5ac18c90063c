//! Weights as steps of a grid times scales, and the gradients of the scales.

use crate::matrix::DenseMatrix;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Outputs that one task computes.
const ROWS: usize = 16;

/// A matrix of codes less their zero points: the weight of output n and input k is `values[n, k]` times
/// the scale of output n in the group of k.
#[derive(Debug, Clone)]
pub struct Steps {
    /// `[out, in]`, row-major.
    values: Vec<i16>,
    /// Group of each input, `[in]`.
    g_idx: Vec<u32>,
    groups: usize,
}

impl Steps {
    /// From codes `[in, out]`, true zero points `[groups, out]` and the group of each input, all
    /// row-major.
    ///
    /// # Panics
    /// If the lengths do not fit or a group is out of range.
    #[track_caller]
    pub fn new(codes: &[u8], zeros: &[u8], g_idx: &[u32], groups: usize) -> Self {
        let inputs = g_idx.len();
        let outputs = codes.len() / inputs.max(1);
        assert_eq!((codes.len(), zeros.len()), (inputs * outputs, groups * outputs), "steps");
        let mut values = vec![0i16; codes.len()];
        for (k, codes) in codes.chunks_exact(outputs.max(1)).enumerate() {
            let zeros = &zeros[g_idx[k] as usize * outputs..][..outputs];
            for (n, (&code, &zero)) in codes.iter().zip(zeros).enumerate() {
                values[n * inputs + k] = i16::from(code) - i16::from(zero);
            }
        }
        Self { values, g_idx: g_idx.to_vec(), groups }
    }

    fn inputs(&self) -> usize {
        self.g_idx.len()
    }

    fn outputs(&self) -> usize {
        self.values.len() / self.inputs().max(1)
    }

    /// The weights with `scales` `[groups, out]`.
    ///
    /// # Panics
    /// If there are not so many scales.
    #[track_caller]
    pub fn weights(&self, pool: &Pool, scales: &[f32]) -> DenseMatrix {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        assert_eq!(scales.len(), self.groups * outputs, "scales");
        let mut weights = vec![0.0f32; self.values.len()];
        let raw = RawSlice::new(&mut weights);
        pool.run(outputs.div_ceil(ROWS), &|task| {
            let mut own = vec![0.0f32; self.groups];
            for n in task * ROWS..((task + 1) * ROWS).min(outputs) {
                for (g, scale) in own.iter_mut().enumerate() {
                    *scale = scales[g * outputs + n];
                }
                let steps = self.values[n * inputs..][..inputs].iter().zip(&self.g_idx);
                // SAFETY: each row belongs to one task.
                let row = unsafe { raw.range(n * inputs, inputs) };
                for (weight, (&step, &g)) in row.iter_mut().zip(steps) {
                    *weight = f32::from(step) * own[g as usize];
                }
            }
        });
        DenseMatrix::from_f32(outputs, inputs, weights)
    }

    /// Adds the gradient of the scales to `sums` `[groups, out]`, from that of the weights `[out, in]`:
    /// the sum over a group of step times dw.
    ///
    /// # Panics
    /// If the shapes do not match.
    #[track_caller]
    pub fn add_gradient(&self, pool: &Pool, dw: &Tensor, sums: &mut [f32]) {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        assert_eq!((dw.rows(), dw.cols()), (outputs, inputs), "gradient of the weights");
        assert_eq!(sums.len(), self.groups * outputs, "gradient of the scales");
        let raw = RawSlice::new(sums);
        pool.run(outputs.div_ceil(ROWS), &|task| {
            let mut own = vec![0.0f32; self.groups];
            for n in task * ROWS..((task + 1) * ROWS).min(outputs) {
                own.fill(0.0);
                let steps = self.values[n * inputs..][..inputs].iter().zip(&self.g_idx);
                for ((&step, &g), dw) in steps.zip(dw.row(n)) {
                    own[g as usize] += f32::from(step) * dw;
                }
                for (g, sum) in own.iter().enumerate() {
                    // SAFETY: each output belongs to one task.
                    let to = unsafe { raw.range(g * outputs + n, 1) };
                    to[0] += sum;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_gradients_match_f64() {
        // Groups out of order, a number of outputs that fills no whole task.
        let (inputs, outputs, groups) = (20, 37, 3);
        let value = |i: usize| (i * 37 % 19) as f32 / 7.0 - 1.2;
        let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % 256) as u8).collect();
        let zeros: Vec<u8> = (0..groups * outputs).map(|i| (i * 11 % 255) as u8).collect();
        let g_idx: Vec<u32> = (0..inputs).map(|k| (k / 3 % groups) as u32).collect();
        let scales: Vec<f32> = (0..groups * outputs).map(value).collect();
        let dw: Vec<f32> = (0..inputs * outputs).map(|i| value(i + 5)).collect();
        let steps = Steps::new(&codes, &zeros, &g_idx, groups);
        let step = |n: usize, k: usize| {
            let zero = zeros[g_idx[k] as usize * outputs + n];
            f64::from(codes[k * outputs + n]) - f64::from(zero)
        };
        let mut want = vec![1.0f64; groups * outputs];
        for (i, dw) in dw.iter().enumerate() {
            let (n, k) = (i / inputs, i % inputs);
            want[g_idx[k] as usize * outputs + n] += step(n, k) * f64::from(*dw);
        }
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let weights = steps.weights(&pool, &scales).to_f32();
            for (i, weight) in weights.iter().enumerate() {
                let (n, k) = (i / inputs, i % inputs);
                let scale = scales[g_idx[k] as usize * outputs + n];
                assert_eq!(*weight, step(n, k) as f32 * scale);
            }
            let mut sums = vec![1.0f32; groups * outputs];
            let dw = Tensor::from_vec(outputs, inputs, dw.clone());
            steps.add_gradient(&pool, &dw, &mut sums);
            for (got, want) in sums.iter().zip(&want) {
                // Up to 20 terms of magnitude 300 in f32.
                assert!((f64::from(*got) - want).abs() < 1e-3, "{got} {want}");
            }
        }
    }
}
