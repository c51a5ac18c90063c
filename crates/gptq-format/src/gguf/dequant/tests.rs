use half::f16;

use super::super::GgmlType;
use super::super::blocks::{CodeRows, unpack_rows};
use super::*;

/// Quantized types with the positions of their f16 fields, and the hash of what `gguf` 0.19.0 (PyPI, `quants.py`)
/// dequantizes [`block_bytes`] to.
const TYPES: [(GgmlType, &[usize], u64); 10] = [
    (GgmlType::Q4_0, &[0], 0xf3fde7647c99422a),
    (GgmlType::Q4_1, &[0, 2], 0x44e6868835ad6be6),
    (GgmlType::Q5_0, &[0], 0x60059c8eba09d84e),
    (GgmlType::Q5_1, &[0, 2], 0x7b778821fcb8471a),
    (GgmlType::Q8_0, &[0], 0x6e98f5acfec1e37e),
    (GgmlType::Q2K, &[80, 82], 0xcbb727621f740346),
    (GgmlType::Q3K, &[108], 0xec444680f6d100c3),
    (GgmlType::Q4K, &[0, 2], 0x1f69b97b66005ef7),
    (GgmlType::Q5K, &[0, 2], 0x1123bcba25486b88),
    (GgmlType::Q6K, &[208], 0x7d9bda308f6bbb26),
];

const BLOCKS: usize = 64;

fn pseudo_random(n: usize) -> Vec<u8> {
    let mut state = 0x2545F4914F6CDD1Du64;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

/// Blocks of noise whose f16 fields are finite.
fn block_bytes(dtype: GgmlType, halves: &[usize]) -> Vec<u8> {
    let (_, size) = dtype.block().unwrap();
    let mut bytes = pseudo_random(BLOCKS * size);
    for block in bytes.chunks_mut(size) {
        for &at in halves {
            block[at + 1] &= 0xBF;
        }
    }
    bytes
}

/// FNV-1a over the little-endian bytes.
fn fnv(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .fold(0xcbf29ce484222325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3))
}

fn decode(dtype: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let (per_block, size) = dtype.block().unwrap();
    let mut out = vec![f32::NAN; bytes.len() / size * per_block];
    dequantize_rows(dtype, bytes, &mut out).unwrap();
    out
}

/// Bits `from..from + n` of a little-endian bit string.
fn bits(bytes: &[u8], from: usize, n: usize) -> i32 {
    (0..n).map(|k| i32::from((bytes[(from + k) / 8] >> ((from + k) % 8)) & 1) << k).sum()
}

/// Value `i` of a block, each field looked up bit by bit from the description of the format.
fn oracle(dtype: GgmlType, b: &[u8], i: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    // 32 values in 16 bytes: the first half of the values in the low nibbles.
    let nibble = |at: usize| bits(&b[at..], 8 * (i % 16) + 4 * (i / 16), 4);
    // In K-quants of 2 and 3 bits: four planes of 32 values per 128, two bits each.
    let two_bits =
        |at: usize| bits(&b[at + 32 * (i / 128)..], 8 * (i % 32) + 2 * ((i % 128) / 32), 2);
    // In those of 4 and 5 bits: two planes of 32 values per 64.
    let four_bits =
        |at: usize| bits(&b[at + 32 * (i / 64)..], 8 * (i % 32) + 4 * ((i % 64) / 32), 4);
    // The 12 bytes of scales and minima of Q4_K and Q5_K.
    let scale_min = |at: usize| {
        let j = i / 32;
        let (byte, high) =
            (|k: usize| bits(&b[at..], 8 * k, 6), |k: usize| bits(&b[at..], 8 * k + 6, 2));
        let (low_scale, low_min) = (bits(&b[at + 4..], 8 * j, 4), bits(&b[at + 4..], 8 * j + 4, 4));
        if j < 4 {
            (byte(j), byte(j + 4))
        } else {
            (low_scale + 16 * high(j - 4), low_min + 16 * high(j))
        }
    };
    match dtype {
        GgmlType::Q4_0 => half(0) * (nibble(2) - 8) as f32,
        GgmlType::Q4_1 => half(0) * nibble(4) as f32 + half(2),
        GgmlType::Q5_0 => half(0) * (nibble(6) + 16 * bits(&b[2..], i, 1) - 16) as f32,
        GgmlType::Q5_1 => half(0) * (nibble(8) + 16 * bits(&b[4..], i, 1)) as f32 + half(2),
        GgmlType::Q8_0 => half(0) * f32::from(b[2 + i] as i8),
        GgmlType::Q2K => {
            let (scale, min) = (bits(b, 8 * (i / 16), 4), bits(b, 8 * (i / 16) + 4, 4));
            half(80) * scale as f32 * two_bits(16) as f32 - half(82) * min as f32
        }
        GgmlType::Q3K => {
            let j = i / 16;
            let low = bits(&b[96..], 8 * (j % 8) + 4 * (j / 8), 4);
            let high = bits(&b[104..], 8 * (j % 4) + 2 * (j / 4), 2);
            let third = bits(b, 8 * (i % 32) + i / 32, 1);
            half(108) * (low + 16 * high - 32) as f32 * (two_bits(32) + 4 * third - 4) as f32
        }
        GgmlType::Q4K => {
            let (scale, min) = scale_min(4);
            half(0) * scale as f32 * four_bits(16) as f32 - half(2) * min as f32
        }
        GgmlType::Q5K => {
            let (scale, min) = scale_min(4);
            let code = four_bits(48) + 16 * bits(&b[16..], 8 * (i % 32) + i / 32, 1);
            half(0) * scale as f32 * code as f32 - half(2) * min as f32
        }
        GgmlType::Q6K => {
            let within = i % 128;
            let low = bits(&b[64 * (i / 128)..], 8 * (within % 64) + 4 * (within / 64), 4);
            let high = bits(&b[128 + 32 * (i / 128)..], 8 * (within % 32) + 2 * (within / 32), 2);
            half(208) * f32::from(b[192 + i / 16] as i8) * (low + 16 * high - 32) as f32
        }
        _ => unreachable!(),
    }
}

#[test]
fn quantized_types_equal_the_description() {
    for (dtype, halves, _) in TYPES {
        let bytes = block_bytes(dtype, halves);
        let (per_block, size) = dtype.block().unwrap();
        let got = decode(dtype, &bytes);
        for (n, block) in bytes.chunks(size).enumerate() {
            for i in 0..per_block {
                let (got, expected) = (got[n * per_block + i], oracle(dtype, block, i));
                assert_eq!(
                    got.to_bits(),
                    expected.to_bits(),
                    "{dtype} block {n} value {i}: {got} {expected}"
                );
            }
        }
    }
}

#[test]
fn quantized_types_equal_the_gguf_package_to_the_bit() {
    for (dtype, halves, hash) in TYPES {
        assert_eq!(fnv(&decode(dtype, &block_bytes(dtype, halves))), hash, "{dtype}");
    }
}

/// What is computed from codes is what is decoded to floats.
#[test]
fn codes_stand_for_the_same_values() {
    for (dtype, halves, _) in TYPES {
        let bytes = block_bytes(dtype, halves);
        let floats = decode(dtype, &bytes);
        let format = dtype.code_format().unwrap();
        let groups = floats.len() / format.group_size;
        let (mut codes, mut scales) = (vec![0; floats.len()], vec![0.0; groups]);
        let mut minima = vec![0.0; if format.minima { groups } else { 0 }];
        let mut rows = CodeRows { codes: &mut codes, scales: &mut scales, minima: &mut minima };
        unpack_rows(dtype, &bytes, &mut rows).unwrap();
        for (i, &float) in floats.iter().enumerate() {
            assert!(u32::from(codes[i]) < 1 << format.bits, "{dtype} code {i}");
            let (group, code) = (i / format.group_size, f32::from(codes[i]));
            let value = match minima.get(group) {
                Some(minimum) => scales[group] * code + minimum,
                None => scales[group] * (code - (1 << (format.bits - 1)) as f32),
            };
            assert_eq!(value.to_bits(), float.to_bits(), "{dtype} value {i}");
        }
        if format.half {
            let held = |v: &f32| f16::from_f32(*v).to_f32().to_bits() == v.to_bits();
            assert!(scales.iter().chain(&minima).all(held), "{dtype}");
        }
    }
    assert_eq!(GgmlType::F16.code_format(), None);
}

#[test]
fn plain_types_are_converted() {
    let values = [0.0, -1.5, 65504.0];
    let bytes = |f: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|&v| f(v)).collect::<Vec<_>>();
    assert_eq!(decode(GgmlType::F32, &bytes(&|v| v.to_le_bytes().into())), values);
    assert_eq!(decode(GgmlType::F64, &bytes(&|v| f64::from(v).to_le_bytes().into())), values);
    assert_eq!(decode(GgmlType::F16, &bytes(&|v| f16::from_f32(v).to_le_bytes().into())), values);
    assert_eq!(
        decode(GgmlType::Bf16, &bytes(&|v| bf16::from_f32(v).to_le_bytes().into())),
        [0.0, -1.5, 65536.0]
    );
    assert_eq!(decode(GgmlType::I8, &[0xFF, 1]), [-1.0, 1.0]);
    assert_eq!(decode(GgmlType::I16, &[0, 0x80]), [-32768.0]);
    assert_eq!(decode(GgmlType::I32, &(-7i32).to_le_bytes()), [-7.0]);
    assert_eq!(decode(GgmlType::I64, &(1i64 << 40).to_le_bytes()), [(1u64 << 40) as f32]);
}

#[test]
fn lengths_that_do_not_belong_together_are_refused() {
    let mut out = [0.0; 32];
    let message = dequantize_rows(GgmlType::Q4_0, &[0; 17], &mut out).unwrap_err().to_string();
    assert_eq!(message, "17 bytes of Q4_0 do not decode to 32 floats");
    assert!(dequantize_rows(GgmlType::Q4_0, &[0; 18], &mut out[..31]).is_err());
    assert!(dequantize_rows(GgmlType::Other(16), &[0; 66], &mut out).is_err());
    assert!(dequantize_rows(GgmlType::F32, &[], &mut []).is_ok());
}
