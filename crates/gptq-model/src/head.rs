//! From the residual stream after the last block to logits and pooled outputs.

use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{
    Activation, DenseMatrix, Linear, Matrix, Norm, Pool, QuantizedMatrix, Tensor, activate, linear,
    norm, scale, soft_cap,
};
use gptq_format::Checkpoint;

use crate::embedder::{Embedder, Tokens};
use crate::load::{LinearSource, Loader};
use crate::model::HeadBits;
use crate::spec::Spec;
use crate::stages::LinearSpec;
use crate::state::Ctx;
use crate::{ModelError, Result};

/// What happens after the last block: the final norm, the projection to logits, the pooled output.
pub struct HeadLayer {
    spec: Arc<Spec>,
    norm: Option<Norm>,
    project_out: Option<Linear>,
    transform: Option<(Linear, Activation, Norm)>,
    projection: Option<Linear>,
    pooler: Option<Linear>,
}

impl HeadLayer {
    /// Loads the head. Tied to an embedding of floats it shares its memory, to one in GGUF's
    /// blocks it is made of the same blocks; a quantized head in the checkpoint is used as it is.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape than the spec asks for.
    pub fn load(checkpoint: &Checkpoint, spec: &Arc<Spec>, embedder: &Embedder) -> Result<Self> {
        Self::load_on(&Pool::new(1), checkpoint, spec, embedder)
    }

    /// As [`HeadLayer::load`] with all threads of `pool`.
    ///
    /// # Errors
    /// As [`HeadLayer::load`].
    pub fn load_on(
        pool: &Pool,
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        embedder: &Embedder,
    ) -> Result<Self> {
        Self::load_as(checkpoint, spec, embedder, HeadBits::Stored, pool)
    }

    /// As [`HeadLayer::load`], with the projection to logits held as `bits` says.
    pub(crate) fn load_as(
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        embedder: &Embedder,
        bits: HeadBits,
        pool: &Pool,
    ) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let projection = spec.head.name.map(|name| {
            let mut projection = projection(&loader, name, embedder, pool)?;
            if bits == HeadBits::Eight
                && let Some(rounded) = rounded(&loader, name, &projection.weight, pool)?
            {
                projection.weight = Matrix::Quantized(rounded);
            }
            Ok::<_, ModelError>(projection)
        });
        let head = Self::load_without_projection(checkpoint, spec)?;
        Ok(Self { projection: projection.transpose()?, ..head })
    }

    /// Loads what the head has besides the projection to logits: [`HeadLayer::normalize`] gives the projection's input.
    ///
    /// # Errors
    /// As [`HeadLayer::load`].
    pub fn load_without_projection(checkpoint: &Checkpoint, spec: &Arc<Spec>) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let Spec { base, embedding, hidden, head, .. } = &**spec;
        let dense = |module: String, out_features, bias| {
            let (name, in_features) = (module.clone(), *hidden);
            let linear =
                LinearSpec { name, module, out_features, in_features, bias, transposed: false };
            loader.linear(&linear, LinearSource::Mapped)
        };
        let transform = head.transform.map(|transform| -> Result<_> {
            let width = embedding.width;
            let dense = dense(transform.dense.to_owned(), width, transform.bias)?;
            Ok((dense, transform.activation, loader.norm(transform.norm, width, spec.norm)?))
        });
        let project_out = head.project_out.map(|name| {
            let name = format!("{base}{name}.weight");
            let matrix = loader.matrix(&name, embedding.width, *hidden, LinearSource::Mapped)?;
            Ok::<_, ModelError>(Linear { weight: Matrix::Dense(matrix), bias: None })
        });
        let pooler = head.pooler.map(|name| dense(format!("{base}{name}"), *hidden, true));
        Ok(Self {
            norm: head
                .norm
                .map(|name| loader.norm(&format!("{base}{name}"), *hidden, spec.norm))
                .transpose()?,
            project_out: project_out.transpose()?,
            transform: transform.transpose()?,
            projection: None,
            pooler: pooler.transpose()?,
            spec: Arc::clone(spec),
        })
    }

    /// The final norm (and, where the family has it, the projection to the embedding's width): `[rows, hidden]` to
    /// `[rows, in_features of the head]`.
    pub fn normalize(&self, ctx: &mut Ctx, hidden: &Tensor, out: &mut Tensor) {
        match &self.norm {
            Some(final_norm) => norm(&ctx.pool, hidden, final_norm, out),
            None => crate::block::copy(&ctx.pool, hidden, out),
        }
        if let Some(project_out) = &self.project_out {
            linear(&ctx.pool, out, &mut [(project_out, &mut ctx.spare)], &mut ctx.scratch);
            std::mem::swap(out, &mut ctx.spare);
        }
    }

    /// Logits `[rows, vocab]` of normalised rows; `[rows, 0]` for a model that gives hidden states only.
    pub fn logits(&self, ctx: &mut Ctx, normalized: &Tensor, out: &mut Tensor) {
        let Some(projection) = &self.projection else {
            out.resize(normalized.rows(), 0);
            return;
        };
        let Ctx { pool, scratch, spare, gate, .. } = ctx;
        if let Some((dense, activation, transform_norm)) = &self.transform {
            linear(pool, normalized, &mut [(dense, &mut *gate)], scratch);
            activate(pool, *activation, gate);
            norm(pool, gate, transform_norm, spare);
            linear(pool, spare, &mut [(projection, &mut *out)], scratch);
        } else {
            linear(pool, normalized, &mut [(projection, &mut *out)], scratch);
        }
        if self.spec.head.scale != 1.0 {
            scale(pool, out, self.spec.head.scale);
        }
        if let Some(cap) = self.spec.head.soft_cap {
            soft_cap(pool, out, cap);
        }
    }

    /// The pooled output `[sequences, hidden]` from the first of each sequence's normalised `rows`, if the model has one.
    pub(crate) fn pool(
        &self,
        ctx: &mut Ctx,
        normalized: &Tensor,
        rows: &[Range<usize>],
        out: &mut Tensor,
    ) -> bool {
        let Some(pooler) = &self.pooler else { return false };
        let Ctx { pool, scratch, spare, .. } = ctx;
        spare.resize(rows.len(), normalized.cols());
        for (index, rows) in rows.iter().enumerate() {
            spare.row_mut(index).copy_from_slice(normalized.row(rows.start));
        }
        linear(pool, spare, &mut [(pooler, &mut *out)], scratch);
        activate(pool, Activation::Tanh, out);
        true
    }

    /// The projection to logits, if the model has one.
    pub fn projection(&self) -> Option<&Linear> {
        self.projection.as_ref()
    }

    /// Replaces the projection to logits.
    ///
    /// # Errors
    /// If its shape is another, or the model gives hidden states only.
    pub fn set_projection(&mut self, projection: Linear) -> Result<()> {
        let shape = |l: &Linear| (l.weight.out_features(), l.weight.in_features());
        let expected = self.projection.as_ref().map_or((0, 0), shape);
        let got = shape(&projection);
        if expected != got {
            let linear = self.spec.head.name.unwrap_or("head").to_owned();
            let layer = self.spec.layer_count();
            return Err(ModelError::LinearShape { layer, linear, expected, got });
        }
        self.projection = Some(projection);
        Ok(())
    }
}

/// The projection to logits named `name`, or the embedding where it is tied.
fn projection(loader: &Loader<'_>, name: &str, embedder: &Embedder, pool: &Pool) -> Result<Linear> {
    let Spec { base, embedding, vocab, head, .. } = loader.spec;
    let has = |suffix: &str| loader.checkpoint.tensors.contains(&format!("{name}.{suffix}"));
    let owner = bias_owner(loader.checkpoint, name);
    if head.unit_rows {
        let stored = format!("{name}.weight");
        loader.check_shape(&stored, &[*vocab, embedding.width])?;
        let mut rows = loader.checkpoint.tensors.read_f32(&stored, &[*vocab, embedding.width])?;
        rows.chunks_exact_mut(embedding.width).for_each(crate::pooling::normalize);
        let weight = Matrix::Dense(DenseMatrix::from_f32(*vocab, embedding.width, rows));
        return Ok(Linear { weight, bias: loader.bias(name, *vocab, head.bias)? });
    }
    if head.tied && !has("qweight") {
        let bias = loader.bias(owner, *vocab, head.bias)?;
        let weight = match &embedder.tokens {
            Tokens::Floats(table) => Matrix::Dense(table.clone()),
            Tokens::Blocks { width, .. } => {
                let name = format!("{base}{}.weight", embedding.name);
                loader.weight(pool, &name, *vocab, *width, LinearSource::Mapped)?
            }
        };
        return Ok(Linear { weight, bias });
    }
    let linear = LinearSpec {
        name: name.to_owned(),
        module: name.to_owned(),
        out_features: *vocab,
        in_features: embedding.width,
        bias: head.bias && owner == name,
        transposed: false,
    };
    let mut projection = loader.linear_on(pool, &linear, LinearSource::Mapped)?;
    if owner != name {
        projection.bias = loader.bias(owner, *vocab, head.bias)?;
    }
    Ok(projection)
}

/// The projection in 8 bits; `None` where it is not a stored float matrix of a width that packs. Rows are copied from the
/// file and not read through the map, where they would stay resident beside what becomes of them.
fn rounded(
    loader: &Loader<'_>,
    name: &str,
    weight: &Matrix,
    pool: &Pool,
) -> Result<Option<QuantizedMatrix>> {
    let (rows, width) = (weight.out_features(), weight.in_features());
    let Spec { base, embedding, head, .. } = loader.spec;
    if matches!(weight, Matrix::Quantized(_)) || head.unit_rows || !width.is_multiple_of(4) {
        return Ok(None);
    }
    let tensor = if head.tied {
        format!("{base}{}.weight", embedding.name)
    } else {
        format!("{name}.weight")
    };
    let store = &loader.checkpoint.tensors;
    let read = |rows: Range<usize>, out: &mut [f32]| {
        store.read_rows_f32(&tensor, rows, out).map_err(ModelError::from)
    };
    QuantizedMatrix::round_rows(pool, rows, width, read).map(Some)
}

/// The module that the bias of the head `name` is stored under: transformers ties the bias of `X.decoder` to a parameter
/// `X.bias` and saves one of the two.
pub(crate) fn bias_owner<'a>(checkpoint: &Checkpoint, name: &'a str) -> &'a str {
    let has = |module: &str| checkpoint.tensors.contains(&format!("{module}.bias"));
    match name.rsplit_once('.') {
        Some((parent, _)) if !has(name) && has(parent) => parent,
        _ => name,
    }
}
