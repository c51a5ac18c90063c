//! From named tensors to norms and linears of the shapes that the spec asks for.

use std::path::Path;
use std::sync::Arc;

use gptq_compute::{
    BlockParts, BlockRows, DenseMatrix, DenseType, GptqParts, Linear, Matrix, Norm, Pool,
    QuantizedMatrix,
};
use gptq_format::gguf::CodeRows;
use gptq_format::{Checkpoint, DType, FormatError, GptqLinear, TensorInfo, TensorStore};

use crate::head::bias_owner;
use crate::spec::{NormOver, NormSpec, QkNorm, Spec};
use crate::stages::LinearSpec;
use crate::{ModelError, Result, unfused};

/// Whether a tensor is a buffer that old checkpoints hold and every loader makes anew: masks of attention, among them one
/// of -1e9, which f16 cannot hold, and frequencies of rotations.
pub fn is_buffer(tensor: &str) -> bool {
    const ENDS: [&str; 5] = [
        ".rotary_emb.inv_freq",
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
    ];
    ENDS.iter().any(|end| tensor.ends_with(end))
}

/// Where a block's linears come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearSource {
    /// The checkpoint: packed codes where it has them, also those of GGUF's blocks; else floats that stay in the mapped
    /// file where their type allows.
    Mapped,
    /// The checkpoint, with floats copied (in their stored type, from GGUF's blocks as f32) so that the mapped file leaves
    /// no resident pages behind.
    Copied,
    /// Nowhere: the caller sets them ([`crate::Block::set_linear`]).
    Unset,
}

/// Whether both matrices are there and differ. Some rows tell: one that was trained by itself differs in all of them.
fn differ(tensors: &TensorStore, a: &str, b: &str) -> bool {
    const ROWS: usize = 64;
    let (Ok(first), Ok(second)) = (tensors.info(a), tensors.info(b)) else { return false };
    if first.shape != second.shape {
        return true;
    }
    let [rows, columns] = *first.shape else { return false };
    let row = |tensor: &str, row: usize| {
        let mut values = vec![0.0; columns];
        tensors.read_rows_f32(tensor, row..row + 1, &mut values).map(|()| values)
    };
    (0..rows).step_by(rows.div_ceil(ROWS).max(1)).any(|at| match (row(a, at), row(b, at)) {
        (Ok(a), Ok(b)) => a != b,
        // Who reads the whole of it tells what is wrong.
        _ => false,
    })
}

/// Loads one linear of a block by itself, as [`crate::Block::load`] would.
///
/// # Errors
/// A tensor that is missing, unreadable or of another shape than the spec asks for.
pub fn load_linear(
    checkpoint: &Checkpoint,
    spec: &Spec,
    linear: &LinearSpec,
    source: LinearSource,
) -> Result<Linear> {
    Loader { checkpoint, spec }.linear(linear, source)
}

/// Memory that a matrix takes when it is loaded to be run ([`LinearSource::Mapped`]), in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadedBytes {
    /// Of pages of the mapped file that it is used from.
    pub mapped: u64,
    /// Of what is made of it.
    pub owned: u64,
}

/// What the matrix `tensor` takes; nothing if there is none.
pub fn loaded_bytes(checkpoint: &Checkpoint, tensor: &str) -> LoadedBytes {
    let Ok(info) = checkpoint.tensors.info(tensor) else { return LoadedBytes::default() };
    if let Some(parts) = block_parts(checkpoint, tensor) {
        return LoadedBytes { mapped: 0, owned: parts.bytes() };
    }
    match dense_type(info.dtype).filter(|_| checkpoint.tensors.is_identity(tensor)) {
        Some(_) => LoadedBytes { mapped: info.bytes as u64, owned: 0 },
        None => LoadedBytes { mapped: 0, owned: (info.elements() * size_of::<f32>()) as u64 },
    }
}

/// The type in which floats are used as they are stored.
fn dense_type(dtype: DType) -> Option<DenseType> {
    match dtype {
        DType::F32 => Some(DenseType::F32),
        DType::F16 => Some(DenseType::F16),
        DType::BF16 => Some(DenseType::Bf16),
        _ => None,
    }
}

/// What becomes of the matrix `tensor` of a GGUF file when it is run: codes, if it is stored in blocks.
pub fn block_parts(checkpoint: &Checkpoint, tensor: &str) -> Option<BlockParts> {
    let tensors = &checkpoint.tensors;
    let format = tensors.code_format(tensor)?;
    let [out_features, in_features] = *tensors.info(tensor).ok()?.shape else { return None };
    Some(BlockParts {
        bits: format.bits,
        group_size: format.group_size,
        minima: format.minima,
        half: format.half,
        in_features,
        out_features,
    })
}

impl Spec {
    /// The architecture of a checkpoint: its config, with the prefix of the tensors' names taken from the tensors, since
    /// checkpoints of the bare model leave it (or its first part) out.
    ///
    /// # Errors
    /// As [`Spec::from_config`].
    pub fn for_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let mut spec = Self::from_config(&checkpoint.config)?;
        let tensors = &checkpoint.tensors;
        let has = |base: &str| tensors.contains(&format!("{base}{}.weight", spec.embedding.name));
        let shorter = spec.base.split_once('.').map_or("", |(_, rest)| rest);
        let base =
            [spec.base.as_str(), shorter, ""].into_iter().find(|base| has(base)).map(str::to_owned);
        let bare = base.as_ref().is_some_and(|base| *base != spec.base);
        spec.base = base.unwrap_or(spec.base);
        unfused::adapt(&mut spec, tensors);
        // Encoders are saved with the head of their task, with another one, or without any.
        let lacks = |module: &str| {
            !["weight", "qweight"].iter().any(|end| tensors.contains(&format!("{module}.{end}")))
        };
        if let (Some(transform), Some(name)) = (spec.head.transform, spec.head.name) {
            // Classifiers may have the first part of the head.
            let bias = format!("{}.bias", bias_owner(checkpoint, name));
            if lacks(transform.dense) || (spec.head.bias && !tensors.contains(&bias)) {
                (spec.head.transform, spec.head.name) = (None, None);
            }
        }
        // Decoders that embed text are often saved without a head.
        if bare && !spec.head.tied && spec.head.transform.is_none() {
            spec.head.name = spec.head.name.filter(|name| !lacks(name));
        }
        spec.head.pooler = spec.head.pooler.filter(|name| !lacks(&format!("{}{name}", spec.base)));
        if let Some(name) = spec.head.name.filter(|_| spec.head.tied) {
            let embedding = format!("{}{}.weight", spec.base, spec.embedding.name);
            if spec.head.transform.is_none()
                && differ(tensors, &format!("{name}.weight"), &embedding)
            {
                tracing::warn!(
                    "{}: {name}.weight differs from {embedding}, to which the config ties it; it is used, as by transformers",
                    checkpoint.path.display()
                );
                spec.head.tied = false;
            }
        }
        let beyond = format!("{}.", spec.block_name(spec.layer_count()));
        if let Some(name) = tensors.names().find(|name| name.starts_with(&beyond)) {
            let (file, layers) = (checkpoint.path.display(), spec.layer_count());
            tracing::warn!(
                "{file} holds {name}, but its config has {layers} blocks; the rest is left out"
            );
        }
        Ok(spec)
    }
}

/// Loads named tensors of one checkpoint.
pub(crate) struct Loader<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) spec: &'a Spec,
}

impl Loader<'_> {
    fn store(&self) -> &TensorStore {
        &self.checkpoint.tensors
    }

    fn file(&self) -> &Path {
        self.store().path()
    }

    /// The norm `name` over `width` columns.
    pub(crate) fn norm(&self, name: &str, width: usize, spec: NormSpec) -> Result<Norm> {
        // Checkpoints converted from TensorFlow have the names of its layer norm.
        let vector = |suffix: &str, old: &str| {
            let (new, old) = (format!("{name}.{suffix}"), format!("{name}.{old}"));
            let is_old = self.store().contains(&old) && !self.store().contains(&new);
            self.vector(if is_old { &old } else { &new }, width)
        };
        Ok(Norm {
            kind: spec.kind,
            weight: spec.weight.then(|| vector("weight", "gamma")).transpose()?,
            bias: spec.bias.then(|| vector("bias", "beta")).transpose()?,
            eps: spec.eps,
        })
    }

    /// The norms of queries or keys, named `name`: one for all heads, or one for each.
    pub(crate) fn head_norms(
        &self,
        name: &str,
        heads: usize,
        head_dim: usize,
        qk: &QkNorm,
    ) -> Result<Vec<Norm>> {
        match qk.over {
            NormOver::Row => Ok(vec![self.norm(name, heads * head_dim, qk.norm)?]),
            NormOver::Head | NormOver::ListedHead => {
                let names = qk.names(name, heads);
                names.iter().map(|name| self.norm(name, head_dim, qk.norm)).collect()
            }
            NormOver::OwnHead => {
                let tensor = format!("{name}.weight");
                let rows = self.matrix(&tensor, heads, head_dim, LinearSource::Copied)?.to_f32();
                let norm = |weight: &[f32]| Norm {
                    kind: qk.norm.kind,
                    weight: Some(weight.to_vec()),
                    bias: None,
                    eps: qk.norm.eps,
                };
                Ok(rows.chunks_exact(head_dim).map(norm).collect())
            }
        }
    }

    /// A linear of a block: quantized where the checkpoint has packed codes for it.
    pub(crate) fn linear(&self, linear: &LinearSpec, source: LinearSource) -> Result<Linear> {
        self.linear_on(&Pool::new(1), linear, source)
    }

    /// As [`Loader::linear`], with codes repacked on all threads of `pool`.
    pub(crate) fn linear_on(
        &self,
        pool: &Pool,
        linear: &LinearSpec,
        source: LinearSource,
    ) -> Result<Linear> {
        let LinearSpec { module, out_features, in_features, .. } = linear;
        if self.store().contains(&format!("{module}.qweight")) {
            return self.quantized(pool, linear);
        }
        let name = format!("{module}.weight");
        let weight = if linear.transposed {
            let weights = self.transposed(&name, *out_features, *in_features)?;
            Matrix::Dense(DenseMatrix::from_f32(*out_features, *in_features, weights))
        } else {
            self.weight(pool, &name, *out_features, *in_features, source)?
        };
        let bias = self.bias(module, *out_features, linear.bias)?;
        Ok(Linear { weight, bias })
    }

    /// A weight `[rows, cols]`: the blocks of a GGUF file as codes repacked for the processor unless they are to be copied,
    /// all else as [`Loader::matrix`].
    pub(crate) fn weight(
        &self,
        pool: &Pool,
        name: &str,
        rows: usize,
        cols: usize,
        source: LinearSource,
    ) -> Result<Matrix> {
        let parts = block_parts(self.checkpoint, name).filter(|_| source == LinearSource::Mapped);
        let Some(parts) = parts else {
            return Ok(Matrix::Dense(self.matrix(name, rows, cols, source)?));
        };
        self.check_shape(name, &[rows, cols])?;
        QuantizedMatrix::from_blocks(pool, parts, |rows, to| {
            let BlockRows { codes, scales, minima } = to;
            Ok(self.store().read_codes(name, rows, CodeRows { codes, scales, minima })?)
        })
        .map(Matrix::Quantized)
    }

    /// A float matrix `[rows, cols]` in its stored type where that is one of the three that need no conversion.
    pub(crate) fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        source: LinearSource,
    ) -> Result<DenseMatrix> {
        let info = self.check_shape(name, &[rows, cols])?;
        let dtype = dense_type(info.dtype).filter(|_| self.store().is_identity(name));
        let Some(dtype) = dtype else {
            let weights = self.store().read_f32(name, &[rows, cols])?;
            return Ok(DenseMatrix::from_f32(rows, cols, weights));
        };
        let matrix = if source == LinearSource::Copied {
            let mut bytes = vec![0; info.bytes];
            self.store().copy_bytes(name, 0, &mut bytes)?;
            DenseMatrix::from_shared(rows, cols, dtype, Arc::new(bytes))
        } else {
            DenseMatrix::from_shared(rows, cols, dtype, Arc::new(self.store().bytes(name)?))
        };
        matrix.map_err(|source| ModelError::Compute { tensor: name.to_owned(), source })
    }

    /// A tensor of floats, row-major.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check_shape(name, shape)?;
        Ok(self.store().read_f32(name, shape)?)
    }

    /// A vector of floats.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])
    }

    /// The bias of `module`: required where the family has one, else absent or zero.
    pub(crate) fn bias(
        &self,
        module: &str,
        len: usize,
        expected: bool,
    ) -> Result<Option<Vec<f32>>> {
        let name = format!("{module}.bias");
        if expected {
            return self.vector(&name, len).map(Some);
        }
        // Old quantizers wrote a bias of zeros for every linear.
        if self.store().contains(&name) && self.vector(&name, len)?.iter().any(|&b| b != 0.0) {
            let family = self.spec.family.to_owned();
            return Err(ModelError::UnexpectedBias {
                file: self.file().to_owned(),
                tensor: name,
                family,
            });
        }
        Ok(None)
    }

    /// A matrix stored `[in, out]`, turned to `[out, in]`.
    pub(crate) fn transposed(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Vec<f32>> {
        self.check_shape(name, &[in_features, out_features])?;
        let stored = self.store().read_f32(name, &[in_features, out_features])?;
        let mut turned = vec![0.0; stored.len()];
        for (i, row) in stored.chunks_exact(out_features).enumerate() {
            for (o, &value) in row.iter().enumerate() {
                turned[o * in_features + i] = value;
            }
        }
        Ok(turned)
    }

    /// Packed codes, repacked for the processor.
    fn quantized(&self, pool: &Pool, linear: &LinearSpec) -> Result<Linear> {
        let LinearSpec { module, out_features, in_features, bias, .. } = linear;
        let config = self.checkpoint.quantize_config.as_ref().ok_or_else(|| {
            ModelError::NoQuantizeConfig { file: self.file().to_owned(), module: module.clone() }
        })?;
        let stored =
            GptqLinear::load(self.store(), module, config, Some([*out_features, *in_features]))?;
        let parts = GptqParts {
            bits: stored.bits.as_u32(),
            in_features: *in_features,
            out_features: *out_features,
            qweight: &stored.qweight,
            scales: &stored.scales,
            zeros: &stored.zeros,
            g_idx: &stored.g_idx,
        };
        let matrix = QuantizedMatrix::from_gptq_on(pool, parts)
            .map_err(|source| ModelError::Compute { tensor: module.clone(), source })?;
        let bias = self.bias(module, *out_features, *bias)?;
        Ok(Linear { weight: Matrix::Quantized(matrix), bias })
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.store().info(name).map_err(|error| match error {
            FormatError::MissingTensor { .. } => ModelError::MissingTensor {
                file: self.file().to_owned(),
                tensor: name.to_owned(),
                family: self.spec.family.to_owned(),
            },
            other => other.into(),
        })
    }

    /// What is known of tensor `name`, which must have this shape.
    pub(crate) fn check_shape(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo> {
        let info = self.info(name)?;
        if info.shape == expected {
            return Ok(info);
        }
        Err(ModelError::Shape {
            file: self.file().to_owned(),
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            got: info.shape.clone(),
        })
    }
}
