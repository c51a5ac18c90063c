//! Element types of stored tensors.

use crate::gguf::GgmlType;
use std::fmt;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// Upper half of a 32-bit float.
    BF16,
    /// 8-bit float, 4 exponent bits. Known, so that its tensors can be listed; not read as numbers.
    F8E4M3,
    /// 8-bit float, 5 exponent bits. Known, so that its tensors can be listed; not read as numbers.
    F8E5M2,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed byte.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned byte.
    U8,
    /// One byte, 0 or 1.
    Bool,
    /// A block-quantized type of ggml; its plain types are the variants above.
    Ggml(GgmlType),
}

impl DType {
    /// `(elements, bytes)` of the smallest unit that can be stored: one element, or one block of a ggml type.
    pub fn unit(self) -> (usize, usize) {
        match self {
            Self::F64 | Self::I64 | Self::U64 => (1, 8),
            Self::F32 | Self::I32 | Self::U32 => (1, 4),
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => (1, 2),
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => (1, 1),
            // Types that cannot be read have no size; reading them is an error.
            Self::Ggml(ggml) => ggml.block().unwrap_or((1, 0)),
        }
    }

    /// Bytes of a tensor of `shape`; `None` on overflow or where rows do not end at a unit.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        let (elements, bytes) = self.unit();
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if !shape.last().unwrap_or(&1).is_multiple_of(elements) {
            return None;
        }
        (count / elements).checked_mul(bytes)
    }

    /// Whether [`crate::TensorStore::read_f32`] can read it.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::Ggml(_))
    }

    /// The name in a safetensors header; `None` for types that only GGUF holds.
    pub fn safetensors(self) -> Option<safetensors::Dtype> {
        use safetensors::Dtype as S;
        Some(match self {
            Self::F64 => S::F64,
            Self::F32 => S::F32,
            Self::F16 => S::F16,
            Self::BF16 => S::BF16,
            Self::F8E4M3 => S::F8_E4M3,
            Self::F8E5M2 => S::F8_E5M2,
            Self::I64 => S::I64,
            Self::I32 => S::I32,
            Self::I16 => S::I16,
            Self::I8 => S::I8,
            Self::U64 => S::U64,
            Self::U32 => S::U32,
            Self::U16 => S::U16,
            Self::U8 => S::U8,
            Self::Bool => S::BOOL,
            Self::Ggml(_) => return None,
        })
    }

    /// The type for a safetensors name; `None` for those that no supported checkpoint uses.
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype as S;
        Some(match dtype {
            S::F64 => Self::F64,
            S::F32 => Self::F32,
            S::F16 => Self::F16,
            S::BF16 => Self::BF16,
            S::F8_E4M3 => Self::F8E4M3,
            S::F8_E5M2 => Self::F8E5M2,
            S::I64 => Self::I64,
            S::I32 => Self::I32,
            S::I16 => Self::I16,
            S::I8 => Self::I8,
            S::U64 => Self::U64,
            S::U32 => Self::U32,
            S::U16 => Self::U16,
            S::U8 => Self::U8,
            S::BOOL => Self::Bool,
            _ => return None,
        })
    }
}

impl From<GgmlType> for DType {
    fn from(ggml: GgmlType) -> Self {
        match ggml {
            GgmlType::F64 => Self::F64,
            GgmlType::F32 => Self::F32,
            GgmlType::F16 => Self::F16,
            GgmlType::Bf16 => Self::BF16,
            GgmlType::I64 => Self::I64,
            GgmlType::I32 => Self::I32,
            GgmlType::I16 => Self::I16,
            GgmlType::I8 => Self::I8,
            other => Self::Ggml(other),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::Ggml(ggml) => return ggml.fmt(f),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_names_agree_with_safetensors() {
        for dtype in [
            DType::F64,
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::F8E4M3,
            DType::F8E5M2,
            DType::I64,
            DType::I32,
            DType::I16,
            DType::I8,
            DType::U64,
            DType::U32,
            DType::U16,
            DType::U8,
            DType::Bool,
        ] {
            let stored = dtype.safetensors().unwrap();
            assert_eq!(DType::from_safetensors(stored), Some(dtype));
            assert_eq!(dtype.to_string(), stored.to_string());
            assert_eq!(dtype.unit(), (1, stored.bitsize() / 8));
        }
    }

    #[test]
    fn sizes_do_not_overflow_and_blocks_do_not_span_rows() {
        assert_eq!(DType::F32.byte_len(&[3, 5]), Some(60));
        assert_eq!(DType::F32.byte_len(&[]), Some(4));
        assert_eq!(DType::F32.byte_len(&[usize::MAX, 2]), None);
        assert_eq!(DType::F64.byte_len(&[usize::MAX / 4]), None);
        let q8 = DType::from(GgmlType::Q8_0);
        assert_eq!(q8.byte_len(&[2, 64]), Some(2 * 2 * 34));
        assert_eq!(q8.byte_len(&[2, 48]), None);
        assert_eq!(DType::from(GgmlType::Bf16), DType::BF16);
    }
}
