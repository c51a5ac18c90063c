//! Weight matrices: dense in a stored float type, or quantized.

use std::sync::Arc;

use half::{bf16, f16};

use crate::arch::isa;
use crate::error::{ComputeError, Result};
use crate::pairs;
use crate::pool::Pool;
use crate::quantized::QuantizedMatrix;

/// Bytes that somebody else owns, such as a range of a memory map.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Element type of a [`DenseMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DenseType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

#[derive(Clone)]
enum Storage {
    Owned(Arc<[f32]>),
    Shared(SharedBytes),
}

/// A float matrix `[out_features, in_features]`, row-major, as a checkpoint stores it.
#[derive(Clone)]
pub struct DenseMatrix {
    storage: Storage,
    dtype: DenseType,
    out_features: usize,
    in_features: usize,
    /// The weights once more, for products of pairs.
    pairs: Option<Arc<pairs::Weights>>,
}

impl std::fmt::Debug for DenseMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DenseMatrix[{}, {}] {:?}", self.out_features, self.in_features, self.dtype)
    }
}

impl DenseMatrix {
    /// Takes over f32 weights `[out, in]`, row-major.
    ///
    /// # Panics
    /// If the length does not match the shape.
    #[track_caller]
    pub fn from_f32(
        out_features: usize,
        in_features: usize,
        weights: impl Into<Arc<[f32]>>,
    ) -> Self {
        let weights = weights.into();
        assert_eq!(weights.len(), out_features * in_features, "dense matrix");
        let (storage, dtype) = (Storage::Owned(weights), DenseType::F32);
        Self { storage, dtype, out_features, in_features, pairs: None }
    }

    /// Weights that stay where they are, `[out, in]` row-major little-endian; no alignment needed.
    ///
    /// # Errors
    /// [`ComputeError::Length`] if the byte count does not match the shape.
    pub fn from_shared(
        out_features: usize,
        in_features: usize,
        dtype: DenseType,
        bytes: SharedBytes,
    ) -> Result<Self> {
        let (expected, got) = (out_features * in_features * dtype.size(), (*bytes).as_ref().len());
        if expected != got {
            return Err(ComputeError::Length { what: "dense matrix bytes", expected, got });
        }
        let storage = Storage::Shared(bytes);
        Ok(Self { storage, dtype, out_features, in_features, pairs: None })
    }

    /// The same for products of many tokens in which both sides may be rounded to 16 bits, which is done where the
    /// processor multiplies pairs of these. Takes two bytes more for each weight.
    pub fn rounding(mut self, pool: &Pool) -> Self {
        if crate::arch::pairs(isa()).is_some() {
            self.pairs = Some(pairs::Weights::pack(isa(), pool, &self).into());
        }
        self
    }

    /// The weights in pairs, if products may be rounded.
    pub(crate) fn pairs(&self) -> Option<&pairs::Weights> {
        self.pairs.as_deref()
    }

    /// Output width (rows).
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Input width (columns).
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Element type in memory.
    pub fn dtype(&self) -> DenseType {
        self.dtype
    }

    /// Size of the weights in bytes.
    pub fn bytes(&self) -> usize {
        self.out_features * self.in_features * self.dtype.size()
    }

    /// All bytes, row-major little-endian.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Owned(v) => bytemuck::cast_slice(v),
            Storage::Shared(b) => (**b).as_ref(),
        }
    }

    /// The weights where they are f32 in memory of their own, `[out, in]`.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        match &self.storage {
            Storage::Owned(weights) => Some(weights),
            Storage::Shared(_) => None,
        }
    }

    /// Widens row `row` to f32.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let size = self.in_features * self.dtype.size();
        widen(self.dtype, &self.as_bytes()[row * size..][..size], out);
    }

    /// All weights as f32, `[out, in]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.out_features * self.in_features];
        widen(self.dtype, self.as_bytes(), &mut out);
        out
    }
}

/// Widens little-endian elements of `dtype` to f32.
pub(crate) fn widen(dtype: DenseType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DenseType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        DenseType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        DenseType::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
    }
}

/// The weight of a linear layer.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// Floats as stored.
    Dense(DenseMatrix),
    /// GPTQ codes in the runtime layout.
    Quantized(QuantizedMatrix),
}

impl Matrix {
    /// Output width.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Dense(m) => m.out_features(),
            Self::Quantized(m) => m.out_features(),
        }
    }

    /// Input width.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Dense(m) => m.in_features(),
            Self::Quantized(m) => m.in_features(),
        }
    }

    /// Bytes that one pass over the weights reads.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(m) => m.bytes(),
            Self::Quantized(m) => m.bytes(),
        }
    }
}

/// A linear layer y = x Wᵀ + b.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Weight `[out, in]`.
    pub weight: Matrix,
    /// Bias `[out]`.
    pub bias: Option<Vec<f32>>,
}
