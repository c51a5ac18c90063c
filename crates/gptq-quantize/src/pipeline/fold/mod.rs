//! AWQ's scales folded into a block (Lin et al. 2023), before it is quantized by whatever method.
//!
//! W x = (W diag(s)) (x / s): the linears of a stage are multiplied by s, column by column, and what
//! makes their input by 1 / s. That is the norm before them, the rows of the up projection for the
//! down projection, the rows of the values for the attention's output. The block computes the same
//! function; it only rounds better. Weights are multiplied when they are read, a slab at a
//! time; norms are written changed.

mod sites;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;

use gptq_compute::{DenseMatrix, Linear, Matrix, NormKind};
use gptq_format::DType;
use gptq_model::{Block, Ctx, LinearRows, LinearSource, LinearSpec, Spec, Stage};
use half::{bf16, f16};

use super::Run;
use super::activations::Activations;
use super::inputs::StageInputs;
use super::output::halves;
use crate::error::{QuantizeError, Result};
use crate::hessian::Hessian;
use crate::report::AwqRecord;
use crate::solver::{Ratio, RatioSearch};
use sites::{Rows, Site, Source, sites};

/// Outputs of a linear, evenly spaced, that the search for the exponent looks at: it adds up one number
/// over all of them, and twenty products of all weights with the Hessian would cost more than GPTQ.
pub(super) const SEARCH_ROWS: usize = 128;

/// What the weights `[out, in]` of one linear are multiplied with.
#[derive(Debug, Clone, Default)]
pub(super) struct Factors {
    /// Of each input.
    inputs: Option<Vec<f32>>,
    /// Of each output, and of the bias.
    outputs: Option<Vec<f32>>,
}

/// The factors of the linears of a block, and what the report says of them, by module.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    factors: HashMap<String, Factors>,
    records: HashMap<String, AwqRecord>,
}

impl Folded {
    /// Multiplies the weights of the outputs `rows` of `module`.
    pub(super) fn scale(&self, module: &str, rows: Range<usize>, weights: &mut [f32]) {
        let Some(Factors { inputs, outputs }) = self.factors.get(module) else { return };
        let width = weights.len() / rows.len().max(1);
        for (row, weights) in rows.zip(weights.chunks_exact_mut(width.max(1))) {
            if let Some(inputs) = inputs {
                weights.iter_mut().zip(inputs).for_each(|(w, s)| *w *= s);
            }
            if let Some(outputs) = outputs {
                for w in weights {
                    *w *= outputs[row];
                }
            }
        }
    }

    /// Multiplies the bias of `module`.
    pub(super) fn scale_bias(&self, module: &str, bias: &mut [f32]) {
        let factors = self.factors.get(module).and_then(|factors| factors.outputs.as_ref());
        if let Some(outputs) = factors {
            bias.iter_mut().zip(outputs).for_each(|(b, s)| *b *= s);
        }
    }

    /// The float linear of `module`, multiplied.
    pub(super) fn linear(&self, module: &str, linear: Linear) -> Linear {
        let Linear { weight: Matrix::Dense(weight), mut bias } = linear else { return linear };
        if !self.factors.contains_key(module) {
            return Linear { weight: Matrix::Dense(weight), bias };
        }
        let (outputs, inputs) = (weight.out_features(), weight.in_features());
        let mut floats = weight.to_f32();
        self.scale(module, 0..outputs, &mut floats);
        if let Some(bias) = &mut bias {
            self.scale_bias(module, bias);
        }
        Linear { weight: Matrix::Dense(DenseMatrix::from_f32(outputs, inputs, floats)), bias }
    }

    /// What the report says of `module`.
    pub(super) fn record(&self, module: &str) -> Option<AwqRecord> {
        self.records.get(module).cloned()
    }

    /// Enters `scales`, those of the inputs of `linears`.
    fn scale_inputs(&mut self, linears: &[LinearSpec], scales: &[f32]) {
        for linear in linears {
            let factors = self.factors.entry(linear.module.clone()).or_default();
            factors.inputs = Some(scales.to_vec());
        }
    }

    /// Takes `scales`, one for each input of a later stage, out of the outputs of `linear`.
    fn scale_outputs(&mut self, linear: &LinearSpec, rows: &Rows, scales: &[f32]) {
        let factors = self.factors.entry(linear.module.clone()).or_default();
        let outputs = factors.outputs.get_or_insert_with(|| vec![1.0; linear.out_features]);
        for (input, &channel) in rows.channels.iter().enumerate() {
            outputs[rows.outputs[channel]] = f64::from(scales[input]).powf(-rows.power) as f32;
        }
    }
}

/// A norm with its weight and bias divided by the scales, in the type in which it is stored.
struct FoldedNorm {
    weight: Vec<u8>,
    bias: Option<Vec<u8>>,
    /// By what the stored weight really is smaller than the one before.
    scales: Vec<f32>,
}

/// Divides a norm by `scales`. Where a quotient does not fit its type, the channel stays as it is.
fn divide_norm(
    kind: NormKind,
    dtype: DType,
    weight: &[f32],
    bias: Option<(&[f32], DType)>,
    scales: &[f32],
) -> FoldedNorm {
    let plus = if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
    let stored = |dtype: DType, x: f32| match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => f16::from_f32(x).to_f32(),
    };
    let fits = |channel: usize, scale: f32| {
        let bias = bias.map_or(0.0, |(bias, dtype)| stored(dtype, bias[channel] / scale));
        scale.is_finite() && scale > 0.0 && bias.is_finite()
    };
    let channels = weight.iter().zip(scales).enumerate();
    let divided: Vec<(f32, f32)> = channels
        .map(|(channel, (&w, &s))| {
            let new = stored(dtype, (w + plus) / s - plus);
            // What is left of the scale after rounding goes into the weights behind the norm.
            let left = (w + plus) / (new + plus);
            if fits(channel, left) { (new, left) } else { (stored(dtype, w), 1.0) }
        })
        .collect();
    let scales: Vec<f32> = divided.iter().map(|(_, s)| *s).collect();
    let weight: Vec<f32> = divided.iter().map(|(w, _)| *w).collect();
    let bias = bias.map(|(bias, dtype)| {
        halves(dtype, &bias.iter().zip(&scales).map(|(b, s)| b / s).collect::<Vec<_>>())
    });
    FoldedNorm { weight: halves(dtype, &weight), bias, scales }
}

impl Run<'_> {
    /// Finds the scales of block `layer` with the inputs that its float linears compute, folds them,
    /// and writes the norms that take part. Without effect unless the options ask for it.
    pub(super) fn fold(
        &mut self,
        ctx: &mut Ctx,
        layer: usize,
        activations: Option<&mut Activations>,
    ) -> Result<()> {
        self.folded = Folded::default();
        let Some(activations) = activations.filter(|_| self.job.options.folds()) else {
            return Ok(());
        };
        self.progress.phase("inputs");
        let source = self.job.checkpoint;
        let block = Block::load(source, self.spec, layer, LinearSource::Copied)?;
        let fallback = self.job.options.moe_fallback;
        let (layout, spec) = (self.layout, self.spec);
        let wanted = |stage| layout.quantizes(spec, layer, stage);
        let inputs = activations.all_inputs(ctx, &block, wanted, fallback, &mut self.phases)?;
        drop(block);
        let mut inputs: HashMap<Stage, StageInputs> =
            self.spec.stage_order(layer).into_iter().zip(inputs).collect();
        self.progress.phase("scales");
        for site in sites(self.spec, layer) {
            let inputs: Vec<Option<StageInputs>> =
                site.stages.iter().map(|stage| inputs.remove(stage)).collect();
            let record = match self.fold_site(layer, &site, inputs)? {
                Ok(Ratio { alpha, loss, .. }) => {
                    AwqRecord { alpha: Some(alpha), loss: Some(loss), skipped: None }
                }
                Err(reason) => AwqRecord { alpha: None, loss: None, skipped: Some(reason) },
            };
            for linear in linears(self.spec, layer, &site) {
                self.folded.records.insert(linear.module, record.clone());
            }
        }
        Ok(())
    }

    /// Folds one site, or says why not.
    fn fold_site(
        &mut self,
        layer: usize,
        site: &Site,
        inputs: Vec<Option<StageInputs>>,
    ) -> Result<std::result::Result<Ratio, String>> {
        let skip = |reason: &str| Ok(Err(reason.to_owned()));
        if let Source::Nothing(reason) = site.source {
            return skip(reason);
        }
        let maker = match &site.source {
            Source::Rows(rows) => {
                self.spec.stage_linears(layer, rows.stage).get(rows.index).cloned()
            }
            _ => None,
        };
        let all = linears(self.spec, layer, site);
        let float = |l: &&LinearSpec| self.layout.settings(&l.module).is_none();
        if let Some(linear) = all.iter().chain(&maker).find(float) {
            return skip(&format!("{} stays as it is", linear.name));
        }
        if let Source::Norm(name) = &site.source {
            let stored = ["weight", "bias"].map(|part| self.stored_type(&format!("{name}.{part}")));
            let half = |dtype: &DType| matches!(dtype, DType::F16 | DType::BF16);
            if let Some(dtype) = stored.into_iter().flatten().find(|dtype| !half(dtype)) {
                return skip(&format!("the norm before it is stored as {dtype}"));
            }
        }
        let mut hessians = Vec::with_capacity(inputs.len());
        for inputs in inputs {
            let Some(StageInputs { gram: Some(gram), held, .. }) = inputs else {
                return skip("too few tokens went to the expert");
            };
            let hessian = self.phases.time("hessian", || {
                let fit = Hessian::new(gram);
                match held {
                    Some(held) => fit.join(&Hessian::new(held)),
                    None => fit,
                }
            });
            if !hessian.is_finite() {
                let module = all.first().map_or_else(String::new, |l| l.module.clone());
                return Err(QuantizeError::NotFinite { layer, module });
            }
            hessians.push(hessian);
        }
        let mut ratio = self.search(layer, site, &hessians)?;
        drop(hessians);
        match (&site.source, &maker) {
            (Source::Norm(name), _) => ratio.scales = self.fold_norm(name, &ratio.scales)?,
            (Source::Rows(rows), Some(linear)) => {
                self.folded.scale_outputs(linear, rows, &ratio.scales);
            }
            _ => {}
        }
        self.folded.scale_inputs(&all, &ratio.scales);
        Ok(Ok(ratio))
    }

    /// The best scales for the linears of a site.
    fn search(&mut self, layer: usize, site: &Site, hessians: &[Hessian]) -> Result<Ratio> {
        let (job, spec) = (self.job, self.spec);
        let mut squares = vec![0.0f64; hessians.first().map_or(0, Hessian::width)];
        for hessian in hessians {
            squares.iter_mut().zip(hessian.diagonal()).for_each(|(m, d)| *m += f64::from(d));
        }
        if let Source::Rows(rows) = &site.source {
            // Inputs of one channel get one scale, by their mean.
            let mut sums = vec![(0.0, 0.0); rows.outputs.len()];
            for (square, &channel) in squares.iter().zip(&rows.channels) {
                sums[channel] = (sums[channel].0 + square, sums[channel].1 + 1.0);
            }
            for (square, &channel) in squares.iter_mut().zip(&rows.channels) {
                *square = sums[channel].0 / sums[channel].1;
            }
        }
        let mut search = RatioSearch::new(&squares);
        for (&stage, hessian) in site.stages.iter().zip(hessians) {
            for linear in spec.stage_linears(layer, stage) {
                let Some(settings) = self.layout.settings(&linear.module) else { continue };
                let grid = self.job.options.grid_of(settings);
                let rows = LinearRows::open(job.checkpoint, spec, &linear)?;
                let outputs = linear.out_features;
                let some = outputs.min(SEARCH_ROWS);
                let mut weights = Vec::with_capacity(some * linear.in_features);
                for row in (0..some).map(|i| i * outputs / some) {
                    weights.extend(self.phases.time("read", || rows.read(row..row + 1))?);
                }
                self.phases.time("scales", || {
                    search.add(job.pool, &weights, hessian, settings.group_size, grid);
                });
            }
        }
        Ok(search.best())
    }

    /// The type of the norm `name` in the output.
    fn stored_type(&self, tensor: &str) -> Option<DType> {
        self.layout.copied.iter().find(|c| c.name == tensor).map(|c| c.dtype)
    }

    /// Writes the norm `name` divided by `scales`; returns by what it was divided in the end.
    fn fold_norm(&mut self, name: &str, scales: &[f32]) -> Result<Vec<f32>> {
        let store = &self.job.checkpoint.tensors;
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let weight = store.read_f32(&weight_name, &[scales.len()])?;
        let bias = if self.spec.norm.bias {
            Some(store.read_f32(&bias_name, &[scales.len()])?)
        } else {
            None
        };
        let dtype = |tensor: &str| self.stored_type(tensor).unwrap_or(DType::F16);
        let bias = bias.as_deref().map(|bias| (bias, dtype(&bias_name)));
        let kind = self.spec.norm.kind;
        let folded = divide_norm(kind, dtype(&weight_name), &weight, bias, scales);
        self.output.replace(&weight_name, &folded.weight)?;
        if let Some(bias) = &folded.bias {
            self.output.replace(&bias_name, bias)?;
        }
        Ok(folded.scales)
    }
}

/// The linears of a site.
fn linears(spec: &Spec, layer: usize, site: &Site) -> Vec<LinearSpec> {
    site.stages.iter().flat_map(|&stage| spec.stage_linears(layer, stage)).collect()
}
