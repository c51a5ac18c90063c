//! Zero points: what a field of `qzeros` means in the two published conventions.

use super::{Bits, pack_cols, unpack_cols};
use crate::error::{FormatError, Result};
use crate::quantize_config::CheckpointFormat;

/// Packs true zero points `[groups, outputs]` into `qzeros: [groups, outputs * bits / 32]`, both row-major.
///
/// `gptq` (v1) stores `z - 1`, `gptq_v2` stores `z`.
///
/// # Errors
/// If the format is not GPTQ's; if a zero point is 0 in v1, where some readers add 1 to the field and others to the whole word; if one exceeds
/// [`Bits::max_code`]; if the sizes do not fit.
pub fn encode_zeros(
    bits: Bits,
    format: CheckpointFormat,
    zeros: &[u8],
    groups: usize,
    outputs: usize,
) -> Result<Vec<u32>> {
    match format {
        CheckpointFormat::GptqV2 => pack_cols(bits, zeros, groups, outputs),
        CheckpointFormat::AwqGemm => Err(not_gptq()),
        CheckpointFormat::Gptq => {
            if let Some(index) = zeros.iter().position(|&z| z == 0) {
                return Err(FormatError::ZeroPointZero {
                    group: index / outputs,
                    output: index % outputs,
                });
            }
            let fields: Vec<u8> = zeros.iter().map(|z| z - 1).collect();
            pack_cols(bits, &fields, groups, outputs)
        }
    }
}

/// Unpacks `qzeros: [groups, outputs * bits / 32]` into true zero points `[groups, outputs]`, both row-major.
///
/// In v1 files of 2, 4 and 8 bits a true zero of 0 was stored by subtracting 1 in every field of the whole word, which
/// borrows from the next field; a wrapping addition to the word undoes exactly that. At 3 bits, where fields straddle
/// words, writers worked field by field modulo 8.
///
/// # Errors
/// If the sizes do not fit, or the format is not GPTQ's.
pub fn decode_zeros(
    bits: Bits,
    format: CheckpointFormat,
    qzeros: &[u32],
    groups: usize,
    outputs: usize,
) -> Result<Vec<u8>> {
    let one_per_field = match (format, bits) {
        (CheckpointFormat::GptqV2, _) => return unpack_cols(bits, qzeros, groups, outputs),
        (CheckpointFormat::AwqGemm, _) => return Err(not_gptq()),
        (CheckpointFormat::Gptq, Bits::B3) => {
            let mut fields = unpack_cols(bits, qzeros, groups, outputs)?;
            for field in &mut fields {
                *field = (*field + 1) & bits.max_code();
            }
            return Ok(fields);
        }
        (CheckpointFormat::Gptq, Bits::B2) => 0x5555_5555u32,
        (CheckpointFormat::Gptq, Bits::B4) => 0x1111_1111,
        (CheckpointFormat::Gptq, Bits::B8) => 0x0101_0101,
    };
    let words: Vec<u32> = qzeros.iter().map(|w| w.wrapping_add(one_per_field)).collect();
    unpack_cols(bits, &words, groups, outputs)
}

fn not_gptq() -> FormatError {
    FormatError::Pack("AutoAWQ's zero points are packed otherwise than GPTQ's".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn symmetric_zeros_give_the_known_words() {
        let cases = [
            (Bits::B2, 0x5555_5555, 0xAAAA_AAAA),
            (Bits::B4, 0x7777_7777, 0x8888_8888),
            (Bits::B8, 0x7F7F_7F7F, 0x8080_8080),
        ];
        for (bits, v1, v2) in cases {
            let zeros = vec![1u8 << (bits.as_u32() - 1); bits.codes_per_unit()];
            let encode = |format| encode_zeros(bits, format, &zeros, 1, zeros.len()).unwrap();
            assert_eq!(encode(CheckpointFormat::Gptq), [v1]);
            assert_eq!(encode(CheckpointFormat::GptqV2), [v2]);
        }
    }

    #[test]
    fn v1_refuses_a_true_zero_of_zero_and_says_where() {
        let mut zeros = [1u8; 16];
        zeros[13] = 0;
        let error = encode_zeros(Bits::B4, CheckpointFormat::Gptq, &zeros, 2, 8).unwrap_err();
        assert!(matches!(error, FormatError::ZeroPointZero { group: 1, output: 5 }));
        assert!(encode_zeros(Bits::B4, CheckpointFormat::GptqV2, &zeros, 2, 8).is_ok());
    }

    #[test]
    fn v1_words_that_borrowed_are_read_back() {
        // Eight 4-bit zero points 0, 3, 15, 0, 0, 8, 1, 2 in one word, minus 0x11111111 on the whole word.
        let zeros = [0u8, 3, 15, 0, 0, 8, 1, 2];
        let word = pack_cols(Bits::B4, &zeros, 1, 8).unwrap()[0].wrapping_sub(0x1111_1111);
        let read = decode_zeros(Bits::B4, CheckpointFormat::Gptq, &[word], 1, 8).unwrap();
        assert_eq!(read, zeros);
    }

    proptest! {
        #[test]
        fn both_conventions_round_trip(
            bits in prop::sample::select(Bits::ALL.to_vec()),
            seed in prop::collection::vec(any::<u8>(), 64),
        ) {
            for (format, least) in [(CheckpointFormat::Gptq, 1), (CheckpointFormat::GptqV2, 0)] {
                let zeros: Vec<u8> = seed.iter().map(|s| (s & bits.max_code()).max(least)).collect();
                let packed = encode_zeros(bits, format, &zeros, 2, 32).unwrap();
                prop_assert_eq!(decode_zeros(bits, format, &packed, 2, 32).unwrap(), zeros);
            }
        }
    }
}
