//! From stored blocks to floats.
//!
//! Every formula is evaluated in f32 in the order in which ggml's reference code does (scale times code, then minus or
//! plus the minimum; K-quants multiply the two scales first), so results are equal to the bit. Layouts are those of
//! `ggml-common.h`; a block is written as its fields in order, multi-byte fields little endian.

use half::{bf16, f16};

use super::GgmlType;

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
    if dtype.byte_len(out.len() as u64) != Some(bytes.len() as u64) {
        return Err(DequantError { dtype, bytes: bytes.len(), values: out.len() });
    }
    // byte_len has a length only for types that have a decoder.
    if let Some(decode) = dequantizer(dtype) {
        decode(bytes, out);
    }
    Ok(())
}

/// Decodes whole blocks into as many values.
type Decoder = fn(&[u8], &mut [f32]);

/// The decoder of `dtype`, `None` for a type that cannot be read.
fn dequantizer(dtype: GgmlType) -> Option<Decoder> {
    Some(match dtype {
        GgmlType::F32 => |b, y| each(b, y, |b, [y]| *y = f32::from_le_bytes(*b)),
        GgmlType::F64 => |b, y| each(b, y, |b, [y]| *y = f64::from_le_bytes(*b) as f32),
        GgmlType::F16 => |b, y| each(b, y, |b, [y]| *y = f16::from_le_bytes(*b).to_f32()),
        GgmlType::Bf16 => |b, y| each(b, y, |b, [y]| *y = bf16::from_le_bytes(*b).to_f32()),
        GgmlType::I8 => |b, y| each(b, y, |b, [y]| *y = f32::from(i8::from_le_bytes(*b))),
        GgmlType::I16 => |b, y| each(b, y, |b, [y]| *y = f32::from(i16::from_le_bytes(*b))),
        GgmlType::I32 => |b, y| each(b, y, |b, [y]| *y = i32::from_le_bytes(*b) as f32),
        GgmlType::I64 => |b, y| each(b, y, |b, [y]| *y = i64::from_le_bytes(*b) as f32),
        GgmlType::Q4_0 => |b, y| each(b, y, q4_0),
        GgmlType::Q4_1 => |b, y| each(b, y, q4_1),
        GgmlType::Q5_0 => |b, y| each(b, y, q5_0),
        GgmlType::Q5_1 => |b, y| each(b, y, q5_1),
        GgmlType::Q8_0 => |b, y| each(b, y, q8_0),
        GgmlType::Q2K => |b, y| each(b, y, q2_k),
        GgmlType::Q3K => |b, y| each(b, y, q3_k),
        GgmlType::Q4K => |b, y| each(b, y, q4_k),
        GgmlType::Q5K => |b, y| each(b, y, q5_k),
        GgmlType::Q6K => |b, y| each(b, y, q6_k),
        GgmlType::Other(_) => return None,
    })
}

/// Applies `decode` to each block of `B` bytes and the `V` values it stands for.
fn each<const B: usize, const V: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; V]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (values, _) = out.as_chunks_mut::<V>();
    for (block, y) in blocks.iter().zip(values) {
        decode(block, y);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, q: [16] u8`; value j is the low nibble of byte j, value j + 16 the high one.
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = (i32::from(q & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

/// `d: f16, m: f16, q: [16] u8`; nibbles as in Q4_0.
fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for j in 0..16 {
        let q = b[4 + j];
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The two 5-bit codes of byte `j`: nibbles from `q`, fifth bits j and j + 16 from `high`.
fn five_bits(high: u32, q: u8, j: usize) -> (i32, i32) {
    let low = i32::from(q & 15) | (((high >> j) & 1) << 4) as i32;
    let upper = i32::from(q >> 4) | (((high >> (j + 16)) & 1) << 4) as i32;
    (low, upper)
}

/// `d: f16, high: u32, q: [16] u8`.
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let (low, upper) = five_bits(high, b[6 + j], j);
        y[j] = (low - 16) as f32 * d;
        y[j + 16] = (upper - 16) as f32 * d;
    }
}

/// `d: f16, m: f16, high: u32, q: [16] u8`.
fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let (low, upper) = five_bits(high, b[8 + j], j);
        y[j] = low as f32 * d + m;
        y[j + 16] = upper as f32 * d + m;
    }
}

/// `d: f16, q: [32] i8`.
fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for (v, &q) in y.iter_mut().zip(&b[2..]) {
        *v = f32::from(q as i8) * d;
    }
}

/// `scales: [16] u8 (low nibble scale, high nibble minimum), q: [64] u8, d: f16, dmin: f16`.
///
/// Group g of 16 values lies in the bytes 32 (g / 8) + 16 (g % 2).., at bit 2 ((g / 2) % 4).
fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    let (groups, _) = y.as_chunks_mut::<16>();
    for (g, values) in groups.iter_mut().enumerate() {
        let scale = d * f32::from(b[g] & 15);
        let min = dmin * f32::from(b[g] >> 4);
        let codes = &b[16 + 32 * (g / 8) + 16 * (g % 2)..][..16];
        let shift = 2 * ((g / 2) % 4);
        for (v, &q) in values.iter_mut().zip(codes) {
            *v = scale * f32::from((q >> shift) & 3) - min;
        }
    }
}

/// `high: [32] u8, q: [64] u8, scales: [12] u8, d: f16`.
///
/// Two low bits as in Q2_K; the third bit of value i is bit i / 32 of `high[i % 32]`, and 4 is subtracted where it is
/// clear. Scale g has its low nibble in byte g % 8 and its upper two bits in byte 8 + g % 4; 32 is subtracted.
fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = half_at(b, 108);
    let (high, rest) = b.split_at(32);
    let scales = &rest[64..76];
    let (groups, _) = y.as_chunks_mut::<16>();
    for (g, values) in groups.iter_mut().enumerate() {
        let low = (scales[g % 8] >> (4 * (g / 8))) & 15;
        let upper = (scales[8 + g % 4] >> (2 * (g / 4))) & 3;
        let scale = d * (i32::from(low | (upper << 4)) - 32) as f32;
        let half = 16 * (g % 2);
        let codes = &rest[32 * (g / 8) + half..][..16];
        let shift = 2 * ((g / 2) % 4);
        let bit = g / 2;
        for ((v, &q), &h) in values.iter_mut().zip(codes).zip(&high[half..half + 16]) {
            let code = i32::from((q >> shift) & 3) + 4 * i32::from((h >> bit) & 1) - 4;
            *v = scale * code as f32;
        }
    }
}

/// Scale and minimum `j` of 8 from the 12 bytes of Q4_K and Q5_K: 6 bits each, the first four whole in bytes 0..8, the
/// others with their low nibbles in bytes 8..12 and their upper two bits above the first four.
fn scale_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (
            (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4),
            (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

/// `d: f16, dmin: f16, scales: [12] u8, q: [128] u8`; group j of 32 values is nibble j % 2 of the bytes 32 (j / 2)...
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (groups, _) = y.as_chunks_mut::<32>();
    for (j, values) in groups.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        for (v, &q) in values.iter_mut().zip(&b[16 + 32 * (j / 2)..][..32]) {
            *v = scale * f32::from((q >> shift) & 15) - min;
        }
    }
}

/// `d: f16, dmin: f16, scales: [12] u8, high: [32] u8, q: [128] u8`; nibbles as in Q4_K, the fifth bit of group j is bit j.
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (groups, _) = y.as_chunks_mut::<32>();
    for (j, values) in groups.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        let codes = &b[48 + 32 * (j / 2)..][..32];
        for ((v, &q), &h) in values.iter_mut().zip(codes).zip(&b[16..48]) {
            let code = ((q >> shift) & 15) | (((h >> j) & 1) << 4);
            *v = scale * f32::from(code) - min;
        }
    }
}

/// `low: [128] u8, high: [64] u8, scales: [16] i8, d: f16`; codes of 6 bits, 32 subtracted.
///
/// Group j of 32 values (4 per half block) has its nibbles (j / 2) % 2 in `low[64 (j / 4) + 32 (j % 2)..]` and its upper
/// bits 2 (j % 4) in `high[32 (j / 4)..]`; scales are per 16 values.
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half_at(b, 208);
    let (groups, _) = y.as_chunks_mut::<32>();
    for (j, values) in groups.iter_mut().enumerate() {
        let low = &b[64 * (j / 4) + 32 * (j % 2)..][..32];
        let high = &b[128 + 32 * (j / 4)..][..32];
        let (nibble, bits) = (4 * ((j / 2) % 2), 2 * (j % 4));
        let scales = [2 * j, 2 * j + 1].map(|s| d * f32::from(b[192 + s] as i8));
        for (i, v) in values.iter_mut().enumerate() {
            let code = ((low[i] >> nibble) & 15) | (((high[i] >> bits) & 3) << 4);
            *v = scales[i / 16] * (i32::from(code) - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests;
