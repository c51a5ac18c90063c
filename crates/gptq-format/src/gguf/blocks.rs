//! What a stored block holds: integer codes, and a scale and perhaps a minimum for each group of them.
//!
//! Scales and minima are evaluated in f32 in the order in which ggml's reference code does (K-quants multiply their two
//! scales first). Layouts are those of `ggml-common.h`; a block is written as its fields in order, multi-byte fields
//! little endian.

use half::f16;

use super::GgmlType;

/// How the weights of a block type follow from its codes.
///
/// With a minimum, w = scale · code + minimum; without, w = scale · (code - 2^(bits - 1)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeFormat {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u32,
    /// Neighbouring weights of a row that share scale and minimum.
    pub group_size: usize,
    /// Whether there are minima.
    pub minima: bool,
    /// Whether f16 holds scales and minima exactly; else they are products in f32.
    pub half: bool,
}

impl GgmlType {
    /// How this type is made of codes; `None` if it holds floats or integers, or cannot be read.
    pub fn code_format(self) -> Option<CodeFormat> {
        let (bits, group_size, minima, half) = match self {
            Self::Q4_0 => (4, 32, false, true),
            Self::Q4_1 => (4, 32, true, true),
            Self::Q5_0 => (5, 32, false, true),
            Self::Q5_1 => (5, 32, true, true),
            Self::Q8_0 => (8, 32, false, true),
            Self::Q2K => (2, 16, true, false),
            Self::Q3K => (3, 16, false, false),
            Self::Q4K => (4, 32, true, false),
            Self::Q5K => (5, 32, true, false),
            Self::Q6K => (6, 16, false, false),
            _ => return None,
        };
        Some(CodeFormat { bits, group_size, minima, half })
    }
}

/// Buffers for the codes of rows, row-major.
#[derive(Debug)]
pub struct CodeRows<'a> {
    /// `[rows, columns]`
    pub codes: &'a mut [u8],
    /// `[rows, columns / group_size]`
    pub scales: &'a mut [f32],
    /// As `scales` where the type has minima, else empty.
    pub minima: &'a mut [f32],
}

impl CodeRows<'_> {
    /// The first group with a scale or minimum that is not finite, and this.
    pub(crate) fn not_finite(&self) -> Option<(usize, f32)> {
        let bad = |values: &[f32]| {
            let group = values.iter().position(|v| !v.is_finite())?;
            Some((group, values[group]))
        };
        bad(self.scales).or_else(|| bad(self.minima))
    }
}

/// `V` codes in `G` groups.
struct Block<const V: usize, const G: usize> {
    codes: [u8; V],
    scales: [f32; G],
    /// Not written by types without.
    minima: [f32; G],
}

impl<const V: usize, const G: usize> Block<V, G> {
    fn empty() -> Self {
        Self { codes: [0; V], scales: [0.0; G], minima: [0.0; G] }
    }
}

/// Calls `$each(.., unpack)` with the function that unpacks blocks of the type; `None` for types without codes.
macro_rules! with_blocks {
    ($dtype:expr, $each:ident($($arg:expr),*)) => {
        match $dtype {
            GgmlType::Q4_0 => Some($each($($arg,)* q4_0)),
            GgmlType::Q4_1 => Some($each($($arg,)* q4_1)),
            GgmlType::Q5_0 => Some($each($($arg,)* q5_0)),
            GgmlType::Q5_1 => Some($each($($arg,)* q5_1)),
            GgmlType::Q8_0 => Some($each($($arg,)* q8_0)),
            GgmlType::Q2K => Some($each($($arg,)* q2_k)),
            GgmlType::Q3K => Some($each($($arg,)* q3_k)),
            GgmlType::Q4K => Some($each($($arg,)* q4_k)),
            GgmlType::Q5K => Some($each($($arg,)* q5_k)),
            GgmlType::Q6K => Some($each($($arg,)* q6_k)),
            _ => None,
        }
    };
}

/// Unpacks whole rows of blocks into `rows`; `None`, with nothing written, for a type without codes. What the shorter of
/// both has no room for is left out.
pub(crate) fn unpack_rows(dtype: GgmlType, bytes: &[u8], rows: &mut CodeRows<'_>) -> Option<()> {
    with_blocks!(dtype, split(bytes, rows))
}

/// Decodes whole blocks into floats; `None`, with nothing written, for a type without codes.
pub(super) fn widen_blocks(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) -> Option<()> {
    let format = dtype.code_format()?;
    with_blocks!(dtype, widen(format, bytes, out))
}

fn split<const B: usize, const V: usize, const G: usize>(
    bytes: &[u8],
    rows: &mut CodeRows<'_>,
    unpack: impl Fn(&[u8; B], &mut Block<V, G>),
) {
    let (codes, _) = rows.codes.as_chunks_mut::<V>();
    let (scales, _) = rows.scales.as_chunks_mut::<G>();
    let mut minima = rows.minima.as_chunks_mut::<G>().0.iter_mut();
    let mut values = Block::empty();
    for ((block, codes), scales) in bytes.as_chunks::<B>().0.iter().zip(codes).zip(scales) {
        unpack(block, &mut values);
        (*codes, *scales) = (values.codes, values.scales);
        if let Some(minima) = minima.next() {
            *minima = values.minima;
        }
    }
}

fn widen<const B: usize, const V: usize, const G: usize>(
    format: CodeFormat,
    bytes: &[u8],
    out: &mut [f32],
    unpack: impl Fn(&[u8; B], &mut Block<V, G>),
) {
    let centre = 1 << (format.bits - 1);
    let mut values = Block::empty();
    for (block, out) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<V>().0) {
        unpack(block, &mut values);
        let groups = out.chunks_exact_mut(V / G).zip(values.codes.chunks_exact(V / G));
        for ((out, codes), (scale, minimum)) in groups.zip(values.scales.iter().zip(&values.minima))
        {
            for (v, &code) in out.iter_mut().zip(codes) {
                *v = if format.minima {
                    scale * f32::from(code) + minimum
                } else {
                    scale * (i32::from(code) - centre) as f32
                };
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, q: [16] u8`; code j is the low nibble of byte j, code j + 16 the high one.
fn q4_0(b: &[u8; 18], y: &mut Block<32, 1>) {
    y.scales = [half_at(b, 0)];
    nibbles(&b[2..], &mut y.codes);
}

/// `d: f16, m: f16, q: [16] u8`; nibbles as in Q4_0.
fn q4_1(b: &[u8; 20], y: &mut Block<32, 1>) {
    (y.scales, y.minima) = ([half_at(b, 0)], [half_at(b, 2)]);
    nibbles(&b[4..], &mut y.codes);
}

/// `d: f16, high: u32, q: [16] u8`; bit j of `high` is the fifth bit of code j.
fn q5_0(b: &[u8; 22], y: &mut Block<32, 1>) {
    y.scales = [half_at(b, 0)];
    nibbles(&b[6..], &mut y.codes);
    fifth_bits([b[2], b[3], b[4], b[5]], &mut y.codes);
}

/// `d: f16, m: f16, high: u32, q: [16] u8`.
fn q5_1(b: &[u8; 24], y: &mut Block<32, 1>) {
    (y.scales, y.minima) = ([half_at(b, 0)], [half_at(b, 2)]);
    nibbles(&b[8..], &mut y.codes);
    fifth_bits([b[4], b[5], b[6], b[7]], &mut y.codes);
}

fn nibbles(bytes: &[u8], codes: &mut [u8; 32]) {
    for (j, q) in bytes.iter().enumerate() {
        codes[j] = q & 15;
        codes[j + 16] = q >> 4;
    }
}

fn fifth_bits(high: [u8; 4], codes: &mut [u8; 32]) {
    let high = u32::from_le_bytes(high);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= ((high >> j & 1) << 4) as u8;
    }
}

/// `d: f16, q: [32] i8`; 128 is added to the codes.
fn q8_0(b: &[u8; 34], y: &mut Block<32, 1>) {
    y.scales = [half_at(b, 0)];
    for (code, q) in y.codes.iter_mut().zip(&b[2..]) {
        *code = q ^ 0x80;
    }
}

/// `scales: [16] u8 (low nibble scale, high nibble minimum), q: [64] u8, d: f16, dmin: f16`.
///
/// Group g of 16 codes lies in the bytes 32 (g / 8) + 16 (g % 2).., at bit 2 ((g / 2) % 4).
fn q2_k(b: &[u8; 84], y: &mut Block<256, 16>) {
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    for (g, codes) in y.codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        y.scales[g] = d * f32::from(b[g] & 15);
        y.minima[g] = -(dmin * f32::from(b[g] >> 4));
        let stored = &b[16 + 32 * (g / 8) + 16 * (g % 2)..][..16];
        let shift = 2 * ((g / 2) % 4);
        for (code, q) in codes.iter_mut().zip(stored) {
            *code = (q >> shift) & 3;
        }
    }
}

/// `high: [32] u8, q: [64] u8, scales: [12] u8, d: f16`.
///
/// Two low bits as in Q2_K; the third bit of code i is bit i / 32 of `high[i % 32]`. Scale g has its low nibble in byte
/// g % 8 and its upper two bits in byte 8 + g % 4; 32 is subtracted.
fn q3_k(b: &[u8; 110], y: &mut Block<256, 16>) {
    let d = half_at(b, 108);
    let (high, rest) = b.split_at(32);
    let scales = &rest[64..76];
    for (g, codes) in y.codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = (scales[g % 8] >> (4 * (g / 8))) & 15;
        let upper = (scales[8 + g % 4] >> (2 * (g / 4))) & 3;
        y.scales[g] = d * (i32::from(low | (upper << 4)) - 32) as f32;
        let half = 16 * (g % 2);
        let stored = &rest[32 * (g / 8) + half..][..16];
        let (shift, bit) = (2 * ((g / 2) % 4), g / 2);
        for ((code, q), h) in codes.iter_mut().zip(stored).zip(&high[half..half + 16]) {
            *code = ((q >> shift) & 3) | ((h >> bit) & 1) << 2;
        }
    }
}

/// Scales and minima of Q4_K and Q5_K from their 12 bytes: 6 bits each, the first four whole in bytes 0..8, the others
/// with their low nibbles in bytes 8..12 and their upper two bits above the first four.
fn scales_and_minima(b: &[u8], y: &mut Block<256, 8>) {
    let (d, dmin, packed) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    for j in 0..8 {
        let (scale, minimum) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (
                (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
                (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
            )
        };
        y.scales[j] = d * f32::from(scale);
        y.minima[j] = -(dmin * f32::from(minimum));
    }
}

/// `d: f16, dmin: f16, scales: [12] u8, q: [128] u8`; group j of 32 codes is nibble j % 2 of the bytes 32 (j / 2)...
fn q4_k(b: &[u8; 144], y: &mut Block<256, 8>) {
    scales_and_minima(b, y);
    for (j, codes) in y.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = 4 * (j % 2);
        for (code, q) in codes.iter_mut().zip(&b[16 + 32 * (j / 2)..][..32]) {
            *code = (q >> shift) & 15;
        }
    }
}

/// `d: f16, dmin: f16, scales: [12] u8, high: [32] u8, q: [128] u8`; nibbles as in Q4_K, the fifth bit of group j is bit j.
fn q5_k(b: &[u8; 176], y: &mut Block<256, 8>) {
    scales_and_minima(b, y);
    for (j, codes) in y.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = 4 * (j % 2);
        let stored = b[48 + 32 * (j / 2)..][..32].iter().zip(&b[16..48]);
        for (code, (q, h)) in codes.iter_mut().zip(stored) {
            *code = ((q >> shift) & 15) | (((h >> j) & 1) << 4);
        }
    }
}

/// `low: [128] u8, high: [64] u8, scales: [16] i8, d: f16`; codes of 6 bits.
///
/// Part j of 32 codes (4 per half block) has its nibbles (j / 2) % 2 in `low[64 (j / 4) + 32 (j % 2)..]` and its upper
/// bits 2 (j % 4) in `high[32 (j / 4)..]`; scales are per 16 codes.
fn q6_k(b: &[u8; 210], y: &mut Block<256, 16>) {
    let d = half_at(b, 208);
    for (scale, &stored) in y.scales.iter_mut().zip(&b[192..208]) {
        *scale = d * f32::from(stored as i8);
    }
    for (j, codes) in y.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = &b[64 * (j / 4) + 32 * (j % 2)..][..32];
        let high = &b[128 + 32 * (j / 4)..][..32];
        let (nibble, bits) = (4 * ((j / 2) % 2), 2 * (j % 4));
        for (code, (low, high)) in codes.iter_mut().zip(low.iter().zip(high)) {
            *code = ((low >> nibble) & 15) | (((high >> bits) & 3) << 4);
        }
    }
}
