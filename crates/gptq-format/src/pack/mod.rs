//! GPTQ bit packing: codes to and from 32-bit words, for 2, 3, 4 and 8 bits.
//!
//! One rule covers every width: along the packed axis the codes form a little-endian bit stream, code `k` at bit
//! `bits * k` of it, cut into 32-bit words. For 2, 4 and 8 bits `32 / bits` codes fill a word exactly; for 3 bits 32 codes
//! fill three words, and codes 10 and 21 of them straddle a border.
//!
//! `qweight` is packed along its rows (the inputs), `qzeros` along its columns (the outputs).

mod zeros;

pub use zeros::{decode_zeros, encode_zeros};

use crate::error::{FormatError, Result};

/// Width of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bits {
    /// 2 bits, codes 0 to 3.
    B2,
    /// 3 bits, codes 0 to 7.
    B3,
    /// 4 bits, codes 0 to 15.
    B4,
    /// 8 bits, codes 0 to 255.
    B8,
}

impl Bits {
    /// All widths, ascending.
    pub const ALL: [Self; 4] = [Self::B2, Self::B3, Self::B4, Self::B8];

    /// The number of bits.
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::B2 => 2,
            Self::B3 => 3,
            Self::B4 => 4,
            Self::B8 => 8,
        }
    }

    /// The largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        (u8::MAX as u32 >> (8 - self.as_u32())) as u8
    }

    /// Number of codes after which a word ends: a packed axis must be a multiple of it.
    pub const fn codes_per_unit(self) -> usize {
        match self {
            Self::B3 => 32,
            _ => (32 / self.as_u32()) as usize,
        }
    }

    /// Words that `count` codes fill; `None` if they do not end at a word.
    pub const fn words(self, count: usize) -> Option<usize> {
        if count.is_multiple_of(self.codes_per_unit()) {
            Some(count / self.codes_per_unit() * self.words_per_unit())
        } else {
            None
        }
    }

    /// Codes that `words` words hold; `None` if the last code would be cut.
    pub const fn codes(self, words: usize) -> Option<usize> {
        if words.is_multiple_of(self.words_per_unit()) {
            (words / self.words_per_unit()).checked_mul(self.codes_per_unit())
        } else {
            None
        }
    }

    const fn words_per_unit(self) -> usize {
        match self {
            Self::B3 => 3,
            _ => 1,
        }
    }

    /// Word and shift of code `k` of a stream.
    const fn position(self, k: usize) -> (usize, u32) {
        let bit = k * self.as_u32() as usize;
        (bit / 32, (bit % 32) as u32)
    }

    /// Whether a code at `shift` continues in the next word.
    const fn straddles(self, shift: u32) -> bool {
        shift + self.as_u32() > 32
    }
}

impl TryFrom<u64> for Bits {
    type Error = FormatError;

    fn try_from(bits: u64) -> Result<Self> {
        match bits {
            2 => Ok(Self::B2),
            3 => Ok(Self::B3),
            4 => Ok(Self::B4),
            8 => Ok(Self::B8),
            other => Err(FormatError::Bits(other)),
        }
    }
}

impl TryFrom<u8> for Bits {
    type Error = FormatError;

    fn try_from(bits: u8) -> Result<Self> {
        Self::try_from(u64::from(bits))
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_u32().fmt(f)
    }
}

/// Packs `codes: [inputs, outputs]` (row-major) into `qweight: [inputs * bits / 32, outputs]` (row-major).
///
/// # Errors
/// If `codes` has another length, a code exceeds [`Bits::max_code`], or `inputs` does not fill whole words.
pub fn pack_rows(bits: Bits, codes: &[u8], inputs: usize, outputs: usize) -> Result<Vec<u32>> {
    check_codes(bits, codes, inputs, outputs)?;
    let word_rows = whole_words(bits, inputs, "inputs")?;
    let mut packed = vec![0u32; word_rows * outputs];
    if outputs == 0 {
        return Ok(packed);
    }
    for (k, row) in codes.chunks_exact(outputs).enumerate() {
        let (word, shift) = bits.position(k);
        let (low, high) = packed[word * outputs..].split_at_mut(outputs);
        for (w, &code) in low.iter_mut().zip(row) {
            *w |= u32::from(code) << shift;
        }
        if bits.straddles(shift) {
            for (w, &code) in high.iter_mut().zip(row) {
                *w |= u32::from(code) >> (32 - shift);
            }
        }
    }
    Ok(packed)
}

/// Unpacks `qweight: [inputs * bits / 32, outputs]` into codes `[inputs, outputs]`, both row-major.
///
/// # Errors
/// If `packed` has another length or `inputs` does not fill whole words.
pub fn unpack_rows(bits: Bits, packed: &[u32], inputs: usize, outputs: usize) -> Result<Vec<u8>> {
    let word_rows = whole_words(bits, inputs, "inputs")?;
    check_words(packed, word_rows, outputs)?;
    let mut codes = vec![0u8; inputs * outputs];
    if outputs == 0 {
        return Ok(codes);
    }
    let mask = bits.max_code();
    for (k, row) in codes.chunks_exact_mut(outputs).enumerate() {
        let (word, shift) = bits.position(k);
        let (low, high) = packed[word * outputs..].split_at(outputs);
        if bits.straddles(shift) {
            for ((code, &l), &h) in row.iter_mut().zip(low).zip(high) {
                *code = ((l >> shift) | (h << (32 - shift))) as u8 & mask;
            }
        } else {
            for (code, &l) in row.iter_mut().zip(low) {
                *code = (l >> shift) as u8 & mask;
            }
        }
    }
    Ok(codes)
}

/// Packs `fields: [groups, outputs]` along the outputs into `qzeros: [groups, outputs * bits / 32]`, both row-major. The
/// fields are stored as they are; [`encode_zeros`] applies the zero-point convention first.
///
/// # Errors
/// If `fields` has another length, a field exceeds [`Bits::max_code`], or `outputs` does not fill whole words.
pub fn pack_cols(bits: Bits, fields: &[u8], groups: usize, outputs: usize) -> Result<Vec<u32>> {
    check_codes(bits, fields, groups, outputs)?;
    let words = whole_words(bits, outputs, "outputs")?;
    let mut packed = vec![0u32; groups * words];
    if outputs == 0 {
        return Ok(packed);
    }
    for (row, out) in fields.chunks_exact(outputs).zip(packed.chunks_exact_mut(words)) {
        for (k, &field) in row.iter().enumerate() {
            let (word, shift) = bits.position(k);
            out[word] |= u32::from(field) << shift;
            if bits.straddles(shift) {
                out[word + 1] |= u32::from(field) >> (32 - shift);
            }
        }
    }
    Ok(packed)
}

/// Unpacks `qzeros: [groups, outputs * bits / 32]` into the stored fields `[groups, outputs]`, both row-major.
///
/// # Errors
/// If `packed` has another length or `outputs` does not fill whole words.
pub fn unpack_cols(bits: Bits, packed: &[u32], groups: usize, outputs: usize) -> Result<Vec<u8>> {
    let words = whole_words(bits, outputs, "outputs")?;
    check_words(packed, groups, words)?;
    let mut fields = vec![0u8; groups * outputs];
    if outputs == 0 {
        return Ok(fields);
    }
    for (row, stored) in fields.chunks_exact_mut(outputs).zip(packed.chunks_exact(words)) {
        for (k, field) in row.iter_mut().enumerate() {
            let (word, shift) = bits.position(k);
            let mut value = stored[word] >> shift;
            if bits.straddles(shift) {
                value |= stored[word + 1] << (32 - shift);
            }
            *field = value as u8 & bits.max_code();
        }
    }
    Ok(fields)
}

fn whole_words(bits: Bits, count: usize, axis: &str) -> Result<usize> {
    bits.words(count).ok_or_else(|| {
        FormatError::Pack(format!(
            "{count} {axis} are not a multiple of {}, as {bits}-bit packing needs",
            bits.codes_per_unit()
        ))
    })
}

fn check_codes(bits: Bits, codes: &[u8], rows: usize, columns: usize) -> Result<()> {
    if Some(codes.len()) != rows.checked_mul(columns) {
        return Err(FormatError::Pack(format!(
            "{} codes given for [{rows}, {columns}]",
            codes.len()
        )));
    }
    // The maximum vectorizes, a search for the position does not.
    if codes.iter().copied().max().unwrap_or(0) <= bits.max_code() {
        return Ok(());
    }
    let index = codes.iter().position(|&c| c > bits.max_code()).unwrap_or(0);
    Err(FormatError::Pack(format!(
        "code {} at [{}, {}] does not fit {bits} bits",
        codes[index],
        index / columns,
        index % columns
    )))
}

fn check_words(packed: &[u32], rows: usize, columns: usize) -> Result<()> {
    if Some(packed.len()) == rows.checked_mul(columns) {
        Ok(())
    } else {
        Err(FormatError::Pack(format!("{} words given for [{rows}, {columns}]", packed.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The format's definition, bit by bit: bit `j` of code `k` is bit `bits * k + j` of the stream.
    fn naive_stream(bits: Bits, codes: &[u8]) -> Vec<u32> {
        let b = bits.as_u32() as usize;
        let mut words = vec![0u32; codes.len() * b / 32];
        for (k, &code) in codes.iter().enumerate() {
            for j in 0..b {
                let at = b * k + j;
                words[at / 32] |= u32::from(code >> j & 1) << (at % 32);
            }
        }
        words
    }

    fn any_bits() -> impl Strategy<Value = Bits> {
        prop::sample::select(Bits::ALL.to_vec())
    }

    /// Codes of a matrix whose `packed` axis has whole words and whose other axis is arbitrary.
    fn matrix() -> impl Strategy<Value = (Bits, Vec<u8>, usize, usize)> {
        (any_bits(), 0usize..6, 0usize..9).prop_flat_map(|(bits, units, other)| {
            let packed = units * bits.codes_per_unit();
            prop::collection::vec(0..=bits.max_code(), packed * other)
                .prop_map(move |codes| (bits, codes, packed, other))
        })
    }

    proptest! {
        #[test]
        fn rows_follow_the_bit_stream((bits, codes, inputs, outputs) in matrix()) {
            let packed = pack_rows(bits, &codes, inputs, outputs).unwrap();
            for n in 0..outputs {
                let column: Vec<u8> = (0..inputs).map(|k| codes[k * outputs + n]).collect();
                let words: Vec<u32> = packed.iter().skip(n).step_by(outputs).copied().collect();
                prop_assert_eq!(words, naive_stream(bits, &column));
            }
            prop_assert_eq!(unpack_rows(bits, &packed, inputs, outputs).unwrap(), codes);
        }

        #[test]
        fn columns_follow_the_bit_stream((bits, fields, outputs, groups) in matrix()) {
            let packed = pack_cols(bits, &fields, groups, outputs).unwrap();
            let expected: Vec<u32> = match outputs {
                0 => Vec::new(),
                _ => fields.chunks_exact(outputs).flat_map(|row| naive_stream(bits, row)).collect(),
            };
            prop_assert_eq!(&packed, &expected);
            prop_assert_eq!(unpack_cols(bits, &packed, groups, outputs).unwrap(), fields);
        }

        #[test]
        fn any_words_unpack_and_pack_again((bits, units, outputs, seed) in (any_bits(), 1usize..4, 1usize..5, any::<u32>())) {
            let inputs = units * bits.codes_per_unit();
            let words: Vec<u32> = (0..bits.words(inputs).unwrap() * outputs)
                .map(|i| seed.wrapping_mul(2654435761).rotate_left(i as u32 * 7))
                .collect();
            let codes = unpack_rows(bits, &words, inputs, outputs).unwrap();
            prop_assert_eq!(pack_rows(bits, &codes, inputs, outputs).unwrap(), words);
        }
    }

    #[test]
    fn three_bit_words_match_the_published_layout() {
        let q: Vec<u8> = (0..32).map(|i| (i * 5 % 8) as u8).collect();
        let at = |i: usize| u32::from(q[i]);
        let mut w0 = (at(10) & 3) << 30;
        (0..10).for_each(|i| w0 |= at(i) << (3 * i));
        let mut w1 = (at(10) >> 2) | ((at(21) & 1) << 31);
        (11..21).for_each(|i| w1 |= at(i) << (3 * (i - 11) + 1));
        let mut w2 = at(21) >> 1;
        (22..32).for_each(|i| w2 |= at(i) << (3 * (i - 22) + 2));
        assert_eq!(pack_rows(Bits::B3, &q, 32, 1).unwrap(), [w0, w1, w2]);
        assert_eq!(pack_cols(Bits::B3, &q, 1, 32).unwrap(), [w0, w1, w2]);
    }

    #[test]
    fn axes_that_do_not_fill_words_are_refused() {
        assert!(pack_rows(Bits::B3, &[0; 16], 16, 1).is_err());
        assert!(pack_rows(Bits::B4, &[0; 12], 12, 1).is_err());
        assert!(pack_rows(Bits::B4, &[0; 8], 8, 1).is_ok());
        assert!(unpack_cols(Bits::B8, &[0], 1, 3).is_err());
    }

    #[test]
    fn wrong_lengths_and_codes_are_refused() {
        assert!(pack_rows(Bits::B4, &[0; 8], 8, 2).is_err());
        assert!(unpack_rows(Bits::B4, &[0; 2], 8, 1).is_err());
        assert!(unpack_rows(Bits::B4, &[], usize::MAX & !7, usize::MAX).is_err());
        let mut codes = [0u8; 16];
        codes[11] = 16;
        let message = pack_rows(Bits::B4, &codes, 8, 2).unwrap_err().to_string();
        assert!(message.contains("code 16 at [5, 1]"), "{message}");
    }

    #[test]
    fn only_four_widths_exist() {
        for bits in 0u8..=32 {
            assert_eq!(Bits::try_from(bits).is_ok(), [2, 3, 4, 8].contains(&bits));
        }
        assert_eq!(Bits::ALL.map(Bits::max_code), [3, 7, 15, 255]);
    }
}
