//! GPTQ codes as ggml's blocks of 32 weights.
//!
//! A block has an f16 scale `d`. `Q4_0` stands for `d (q - 8)` with codes of 4 bits, `Q8_0` for `d q` with signed bytes, `Q4_1`
//! for `d q + m`. A GPTQ group of 32, 64, 128, ... inputs is a run of blocks with one scale, and a symmetric weight
//! `s (q - 2^(b-1))` is the same product, so 4 bits fit `Q4_0` and 8 bits `Q8_0` to the bit. Layouts: `ggml-common.h`.

use gptq_format::gguf::{GgmlType, RowMap};
use gptq_format::pack::unpack_rows;
use gptq_format::{Bits, DType, GptqLinear};
use half::f16;

use super::super::copy::{Sink, encode};
use crate::error::{CheckpointError, Result};

/// Weights in a block.
const BLOCK: usize = 32;
/// Outputs that are gathered from the codes at once, so that whole cache lines are used.
const TILE: usize = 64;

/// How a quantized linear is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Symmetric 4 bits, exact.
    Q4_0,
    /// Codes less zero points fit a signed byte, exact.
    Q8_0,
    /// Asymmetric 4 bits; the minimum `-s z` is rounded to f16.
    Q4_1,
    /// The nearest 8-bit code of every weight.
    NearestQ8_0,
    /// Floats.
    F16,
}

impl Encoding {
    /// The encoding of a module.
    ///
    /// # Errors
    /// If it is not exact, or exact but larger than what it was, and `lossy` is not set.
    pub(super) fn choose(linear: &GptqLinear, module: &str, lossy: bool) -> Result<Self> {
        let (encoding, reason, instead) = Self::best(linear);
        if lossy || instead.is_empty() {
            return Ok(encoding);
        }
        Err(CheckpointError::Lossy {
            subject: format!("module `{module}`"),
            reason,
            lossy: instead.to_owned(),
        })
    }

    /// With the reason why it is not one to one, and what is done instead; empty if it is.
    fn best(linear: &GptqLinear) -> (Self, String, &'static str) {
        let bits = linear.bits;
        let inputs = linear.in_features;
        if !inputs.is_multiple_of(BLOCK) {
            let reason = format!("its {inputs} inputs are no multiple of ggml's blocks of {BLOCK}");
            return (Self::F16, reason, "write it as F16");
        }
        let one_group = |block: &[u32]| block.iter().all(|&group| group == block[0]);
        if !linear.g_idx.chunks(BLOCK).all(one_group) {
            let reason = format!(
                "its groups are not runs of {BLOCK} inputs (activation order, or a group size that {BLOCK} does not divide)"
            );
            return (Self::NearestQ8_0, reason, "round its weights to Q8_0");
        }
        let middle = 1u8 << (bits.as_u32() - 1);
        let symmetric = linear.zeros.iter().all(|&zero| zero == middle);
        match (bits, symmetric) {
            (Bits::B4, true) => (Self::Q4_0, String::new(), ""),
            (Bits::B8, true) => (Self::Q8_0, String::new(), ""),
            (Bits::B4, false) => {
                let reason = "its 4-bit grid is asymmetric".to_owned();
                (Self::Q4_1, reason, "write it as Q4_1, with s z rounded to f16")
            }
            (Bits::B8, false) => {
                let reason = "its 8-bit grid is asymmetric".to_owned();
                (Self::NearestQ8_0, reason, "round its weights to Q8_0")
            }
            (Bits::B2 | Bits::B3, _) => {
                let reason = format!("ggml has no type for {bits}-bit codes with f16 scales");
                (Self::Q8_0, reason, "write the same weights as Q8_0, at 8.5 bits per weight")
            }
        }
    }

    pub(super) fn dtype(self) -> GgmlType {
        match self {
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q8_0 | Self::NearestQ8_0 => GgmlType::Q8_0,
            Self::Q4_1 => GgmlType::Q4_1,
            Self::F16 => GgmlType::F16,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 | Self::NearestQ8_0 => "Q8_0",
            Self::Q4_1 => "Q4_1",
            Self::F16 => "F16",
        }
    }

    /// Whether the weights stay the same real numbers.
    pub(super) fn exact(self) -> bool {
        matches!(self, Self::Q4_0 | Self::Q8_0)
    }
}

/// Writes the rows of a linear, `[out]` rows of blocks, in the order of the file.
pub(super) fn write(
    linear: &GptqLinear,
    encoding: Encoding,
    module: &str,
    rows: Option<RowMap>,
    sink: Sink<'_>,
) -> Result<()> {
    let order = (0..linear.out_features).map(|row| rows.map_or(row, |map| map.logical(row)));
    let (inputs, outputs) = (linear.in_features, linear.out_features);
    if matches!(encoding, Encoding::NearestQ8_0 | Encoding::F16) {
        let weights = linear.dequantize();
        for n in order {
            let row = &weights[n * inputs..(n + 1) * inputs];
            let bytes = match encoding {
                Encoding::F16 => encode(module, DType::F16, n * inputs, row)?,
                _ => nearest_q8_0(module, row, n * inputs)?,
            };
            sink(&bytes)?;
        }
        return Ok(());
    }
    let codes = unpack_rows(linear.bits, &linear.qweight, inputs, outputs)?;
    let order: Vec<usize> = order.collect();
    let mut tile = vec![0u8; TILE * inputs];
    let mut bytes = Vec::new();
    for outputs_here in order.chunks(TILE) {
        for (k, row) in codes.chunks_exact(outputs).enumerate() {
            for (slot, &n) in outputs_here.iter().enumerate() {
                tile[slot * inputs + k] = row[n];
            }
        }
        bytes.clear();
        for (slot, &n) in outputs_here.iter().enumerate() {
            let row = &tile[slot * inputs..(slot + 1) * inputs];
            for (block, codes) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
                let at = linear.g_idx[block * BLOCK] as usize * outputs + n;
                let (scale, zero) = (linear.scales[at], linear.zeros[at]);
                let first = outputs_here[slot] * inputs + block * BLOCK;
                put_block(encoding, codes, scale, zero, (module, first), &mut bytes)?;
            }
        }
        sink(&bytes)?;
    }
    Ok(())
}

/// One block of codes with their scale and zero point, from index `first` of a module.
fn put_block(
    encoding: Encoding,
    codes: &[u8; BLOCK],
    scale: f16,
    zero: u8,
    (module, first): (&str, usize),
    out: &mut Vec<u8>,
) -> Result<()> {
    out.extend(scale.to_le_bytes());
    if encoding == Encoding::Q8_0 {
        // At most 8 bits about the middle, or 3 bits about anything: a signed byte.
        out.extend(codes.iter().map(|&code| code.wrapping_sub(zero)));
        return Ok(());
    }
    if encoding == Encoding::Q4_1 {
        let minimum = -scale.to_f32() * f32::from(zero);
        out.extend(encode(module, DType::F16, first, &[minimum])?);
    }
    // The first half in the low nibbles, the second in the high ones.
    let (low, high) = codes.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(low, high)| low | (high << 4)));
    Ok(())
}

/// Rounds a row to `Q8_0` as ggml's reference does: `d = max |x| / 127`, codes from the unrounded scale.
fn nearest_q8_0(module: &str, row: &[f32], first: usize) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(row.len() / BLOCK * (BLOCK + 2));
    for (block, values) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
        let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        out.extend(encode(module, DType::F16, first + block * BLOCK, &[scale])?);
        // `as` saturates; the quotient of tiny scales may overflow.
        out.extend(values.iter().map(|x| ((x * inverse).round() as i8).cast_unsigned()));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimum_beyond_f16_is_refused() {
        let mut out = Vec::new();
        let mut put = |scale: f32| {
            let (scale, place) = (f16::from_f32(scale), ("m", 64));
            put_block(Encoding::Q4_1, &[0; BLOCK], scale, 15, place, &mut out)
        };
        put(4000.0).unwrap();
        let error = put(5000.0).unwrap_err();
        assert!(matches!(error, CheckpointError::Overflow { index: 64, .. }), "{error}");
    }
}
