//! Element types of GGUF tensors.

use std::fmt;

/// The storage type of a GGUF tensor.
///
/// Rows are cut into blocks of [`GgmlType::block`] elements, each block a fixed number of bytes; a block never spans rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// Upper half of a 32-bit float.
    Bf16,
    /// 64-bit float.
    F64,
    /// Signed byte.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// 32 codes of 4 bits, one f16 scale: `d * (q - 8)`.
    Q4_0,
    /// 32 codes of 4 bits, f16 scale and minimum: `d * q + m`.
    Q4_1,
    /// 32 codes of 5 bits, one f16 scale: `d * (q - 16)`.
    Q5_0,
    /// 32 codes of 5 bits, f16 scale and minimum: `d * q + m`.
    Q5_1,
    /// 32 signed bytes, one f16 scale.
    Q8_0,
    /// 256 codes of 2 bits; scales and minima of 4 bits per 16.
    Q2K,
    /// 256 codes of 3 bits; scales of 6 bits per 16.
    Q3K,
    /// 256 codes of 4 bits; scales and minima of 6 bits per 32.
    Q4K,
    /// 256 codes of 5 bits; scales and minima of 6 bits per 32.
    Q5K,
    /// 256 codes of 6 bits; scales of 8 bits per 16.
    Q6K,
    /// A type that is named by the file but cannot be read here; the number is ggml's.
    Other(u32),
}

impl GgmlType {
    /// The type for ggml's number.
    pub fn from_id(id: u32) -> Self {
        match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            24 => Self::I8,
            25 => Self::I16,
            26 => Self::I32,
            27 => Self::I64,
            28 => Self::F64,
            30 => Self::Bf16,
            other => Self::Other(other),
        }
    }

    /// ggml's number of the type.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::I8 => 24,
            Self::I16 => 25,
            Self::I32 => 26,
            Self::I64 => 27,
            Self::F64 => 28,
            Self::Bf16 => 30,
            Self::Other(id) => id,
        }
    }

    /// `(elements, bytes)` of one block, or `None` for a type that cannot be read.
    pub fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Self::F32 | Self::I32 => (1, 4),
            Self::F16 | Self::Bf16 | Self::I16 => (1, 2),
            Self::F64 | Self::I64 => (1, 8),
            Self::I8 => (1, 1),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::Other(_) => return None,
        })
    }

    /// Bytes of `elements` values, or `None` if the type cannot be read, the count is no whole number of blocks, or the
    /// size overflows.
    pub fn byte_len(self, elements: u64) -> Option<u64> {
        let (per_block, bytes) = self.block()?;
        if !elements.is_multiple_of(per_block as u64) {
            return None;
        }
        (elements / per_block as u64).checked_mul(bytes as u64)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F64 => "F64",
            Self::I8 => "I8",
            Self::I16 => "I16",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Other(id) => match id {
                9 => "Q8_1",
                15 => "Q8_K",
                16 => "IQ2_XXS",
                17 => "IQ2_XS",
                18 => "IQ3_XXS",
                19 => "IQ1_S",
                20 => "IQ4_NL",
                21 => "IQ3_S",
                22 => "IQ2_S",
                23 => "IQ4_XS",
                29 => "IQ1_M",
                34 => "TQ1_0",
                35 => "TQ2_0",
                39 => "MXFP4",
                other => return write!(f, "ggml type {other}"),
            },
        };
        f.write_str(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_types_are_inverse() {
        for id in 0..64 {
            assert_eq!(GgmlType::from_id(id).id(), id);
        }
    }
}
