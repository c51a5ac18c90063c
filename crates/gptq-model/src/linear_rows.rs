//! The float weights of one linear, a few outputs at a time.

use std::ops::Range;

use gptq_format::{Checkpoint, TensorStore};

use crate::load::Loader;
use crate::spec::Spec;
use crate::stages::LinearSpec;
use crate::{ModelError, Result};

/// A linear whose weights are read in rows `[outputs, in]`, so that no more of them is in memory than the caller holds.
/// Weights that are stored `[in, out]` are the exception: they are turned as a whole.
pub struct LinearRows<'a> {
    store: &'a TensorStore,
    name: String,
    in_features: usize,
    /// `[out, in]`, where they had to be turned.
    turned: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl<'a> LinearRows<'a> {
    /// Opens the weights of `linear`, which are floats of any stored type.
    ///
    /// # Errors
    /// If they are packed codes, missing or of another shape than the spec asks for, or the bias cannot be read.
    pub fn open(checkpoint: &'a Checkpoint, spec: &Spec, linear: &LinearSpec) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let LinearSpec { module, out_features, in_features, transposed, .. } = linear;
        let name = format!("{module}.weight");
        let turned = if *transposed {
            Some(loader.transposed(&name, *out_features, *in_features)?)
        } else {
            loader.check_shape(&name, &[*out_features, *in_features])?;
            None
        };
        let bias = loader.bias(module, *out_features, linear.bias)?;
        Ok(Self { store: &checkpoint.tensors, name, in_features: *in_features, turned, bias })
    }

    /// Takes the bias `[out]`, if there is one.
    pub fn take_bias(&mut self) -> Option<Vec<f32>> {
        self.bias.take()
    }

    /// The weights of the outputs `rows` as f32 `[rows, in]`, row-major.
    ///
    /// # Errors
    /// If they cannot be read, or one of them is NaN or infinite; the error names it.
    ///
    /// # Panics
    /// If there are no such rows.
    #[track_caller]
    pub fn read(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let width = self.in_features;
        if let Some(turned) = &self.turned {
            return Ok(turned[rows.start * width..rows.end * width].to_vec());
        }
        let mut weights = vec![0.0; rows.len() * width];
        let read = self.store.read_rows_f32(&self.name, rows, &mut weights);
        read.map_err(ModelError::Format)?;
        Ok(weights)
    }
}
