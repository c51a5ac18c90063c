//! From stored rows to floats. Results are equal to those of ggml's reference code to the bit.

use half::{bf16, f16};

use super::GgmlType;
use super::blocks::widen_blocks;

/// Bytes that do not decode to the values asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of {dtype} do not decode to {values} floats")]
pub struct DequantError {
    /// The storage type.
    pub dtype: GgmlType,
    /// Bytes given.
    pub bytes: usize,
    /// Floats asked for.
    pub values: usize,
}

/// Decodes whole rows: `bytes` (blocks of `dtype`, rows one after another) into `out` (the same rows as f32).
///
/// Integers are converted to the nearest f32.
///
/// # Errors
/// [`DequantError`] if `dtype` cannot be read or the lengths do not belong together.
pub fn dequantize_rows(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantError> {
    let error = DequantError { dtype, bytes: bytes.len(), values: out.len() };
    if dtype.byte_len(out.len() as u64) != Some(bytes.len() as u64) {
        return Err(error);
    }
    match dtype {
        GgmlType::F32 => each(bytes, out, f32::from_le_bytes),
        GgmlType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        GgmlType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        GgmlType::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        GgmlType::I8 => each(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
        GgmlType::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        GgmlType::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        GgmlType::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        _ => widen_blocks(dtype, bytes, out).ok_or(error)?,
    }
    Ok(())
}

/// Applies `decode` to the `B` bytes of each value.
fn each<const B: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; B]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<B>().0) {
        *value = decode(*bytes);
    }
}

#[cfg(test)]
mod tests;
