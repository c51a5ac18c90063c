//! A GGUF file runs from the codes of its blocks, and computes what its weights as floats do.

mod common;

use std::path::Path;

use common::{load, logits, open, session};
use gptq_compute::Matrix;
use gptq_format::Checkpoint;
use gptq_format::gguf::{
    CodeRows, GgmlType, GgufValue, GgufWriter, PlannedTensor, dequantize_rows,
};
use gptq_testkit::{Rng, assert_relative};

const HIDDEN: usize = 256;
const WIDTH: usize = 512;
const KV: usize = 128;
const VOCAB: usize = 96;

/// Block types with the places of their f16 fields.
const TYPES: [(GgmlType, &[usize]); 10] = [
    (GgmlType::Q4_0, &[0]),
    (GgmlType::Q4_1, &[0, 2]),
    (GgmlType::Q5_0, &[0]),
    (GgmlType::Q5_1, &[0, 2]),
    (GgmlType::Q8_0, &[0]),
    (GgmlType::Q2K, &[80, 82]),
    (GgmlType::Q3K, &[108]),
    (GgmlType::Q4K, &[0, 2]),
    (GgmlType::Q5K, &[0, 2]),
    (GgmlType::Q6K, &[208]),
];

fn matrices(tied: bool) -> Vec<(String, [usize; 2])> {
    let mut list = vec![("token_embd".to_owned(), [VOCAB, HIDDEN])];
    for (name, shape) in [
        ("attn_q", [HIDDEN, HIDDEN]),
        ("attn_k", [KV, HIDDEN]),
        ("attn_v", [KV, HIDDEN]),
        ("attn_output", [HIDDEN, HIDDEN]),
        ("ffn_gate", [WIDTH, HIDDEN]),
        ("ffn_up", [WIDTH, HIDDEN]),
        ("ffn_down", [HIDDEN, WIDTH]),
    ] {
        list.push((format!("blk.0.{name}"), shape));
    }
    if !tied {
        list.push(("output".to_owned(), [VOCAB, HIDDEN]));
    }
    list
}

/// Random blocks whose weights are small.
fn random_blocks(rng: &mut Rng, dtype: GgmlType, halves: &[usize], elements: usize) -> Vec<u8> {
    let (per_block, size) = dtype.block().unwrap();
    let mut bytes: Vec<u8> = (0..elements / per_block * size).map(|_| rng.u64() as u8).collect();
    for block in bytes.chunks_exact_mut(size) {
        for &at in halves {
            // Of either sign, 2^-11 to 2^-7.
            block[at + 1] = (block[at + 1] & 0x8F) | 0x10;
        }
    }
    bytes
}

/// Writes a Llama with one block, its matrices in `stored` as their blocks or as the floats they stand for.
fn write(path: &Path, tied: bool, dtype: GgmlType, stored: &[Vec<u8>], floats: bool) {
    let text = |value: &str| GgufValue::String(value.into());
    let int = |value: usize| GgufValue::Uint(value as u64);
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", int(1)),
        ("llama.context_length", int(64)),
        ("llama.embedding_length", int(HIDDEN)),
        ("llama.feed_forward_length", int(WIDTH)),
        ("llama.attention.head_count", int(4)),
        ("llama.attention.head_count_kv", int(2)),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(1e-5)),
        ("llama.vocab_size", int(VOCAB)),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let matrices = matrices(tied);
    let norms = ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"];
    let kind = if floats { GgmlType::F32 } else { dtype };
    let plan = |name: &str, dtype: GgmlType, shape: &[usize]| PlannedTensor {
        name: format!("{name}.weight"),
        dtype,
        shape: shape.to_vec(),
    };
    let planned: Vec<PlannedTensor> = matrices
        .iter()
        .map(|(name, shape)| plan(name, kind, shape))
        .chain(norms.iter().map(|name| plan(name, GgmlType::F32, &[HIDDEN])))
        .collect();
    let mut writer = GgufWriter::create(path, true, &metadata, &planned).unwrap();
    for ((name, shape), bytes) in matrices.iter().zip(stored) {
        let name = format!("{name}.weight");
        if floats {
            let mut values = vec![0.0; shape[0] * shape[1]];
            dequantize_rows(dtype, bytes, &mut values).unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.append(&name, &bytes).unwrap();
        } else {
            writer.append(&name, bytes).unwrap();
        }
    }
    for name in norms {
        let ones: Vec<u8> = [1f32; HIDDEN].iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.append(&format!("{name}.weight"), &ones).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn codes_compute_what_floats_do() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(0x66);
    let ids: Vec<u32> = (0..40).map(|i| i * 37 % VOCAB as u32).collect();
    for (index, (dtype, halves)) in TYPES.into_iter().enumerate() {
        let tied = index % 2 == 0;
        let stored: Vec<Vec<u8>> = matrices(tied)
            .iter()
            .map(|(_, shape)| random_blocks(&mut rng, dtype, halves, shape[0] * shape[1]))
            .collect();
        let [packed, wide] = [false, true].map(|floats| {
            let path = folder.path().join(format!("{dtype}-{floats}.gguf"));
            write(&path, tied, dtype, &stored, floats);
            load(&open(&path))
        });
        let head = packed.head().projection().unwrap();
        assert!(matches!(head.weight, Matrix::Quantized(_)), "{dtype}: the head is floats");
        // Codes of 5 and 6 bits take bytes, scales of K-quants 32 bits.
        let (bytes, floats) = (packed.weight_bytes(), wide.weight_bytes());
        assert!(3 * bytes <= floats, "{dtype}: {bytes} of {floats} bytes");
        let [got, want] = [&packed, &wide].map(|model| logits(model, &mut session(), &ids, 1));
        // The same weights, but for one rounding each, summed in another order.
        assert_relative(&dtype.to_string(), got.as_slice(), want.as_slice(), 2e-5);
    }
}

#[test]
fn codes_are_read_by_rows_and_refused_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(9);
    let matrices = matrices(true);
    let stored: Vec<Vec<u8>> = matrices
        .iter()
        .map(|(_, s)| random_blocks(&mut rng, GgmlType::Q4_1, &[0, 2], s[0] * s[1]))
        .collect();
    let path = folder.path().join("a.gguf");
    write(&path, true, GgmlType::Q4_1, &stored, false);
    let store = open(&path).tensors;
    let read = |name: &str, rows: std::ops::Range<usize>, sizes: [usize; 3]| {
        let (mut codes, mut scales) = (vec![0; sizes[0]], vec![0.0; sizes[1]]);
        let mut minima = vec![0.0; sizes[2]];
        let to = CodeRows { codes: &mut codes, scales: &mut scales, minima: &mut minima };
        store.read_codes(name, rows, to).map(|()| (codes, scales, minima))
    };
    // Queries are stored in another order than they are read in.
    for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"] {
        let (codes, scales, minima) = read(name, 3..10, [7 * 256, 7 * 8, 7 * 8]).unwrap();
        let mut floats = vec![0.0; 7 * 256];
        store.read_rows_f32(name, 3..10, &mut floats).unwrap();
        for (i, &want) in floats.iter().enumerate() {
            let got = scales[i / 32] * f32::from(codes[i]) + minima[i / 32];
            assert_eq!(got.to_bits(), want.to_bits(), "{name} {i}");
        }
        for (rows, sizes) in [
            (3..10, [7 * 256 - 1, 56, 56]),
            (3..10, [7 * 256, 55, 55]),
            (3..10, [7 * 256, 56, 0]),
            (3..600, [597 * 256, 597 * 8, 597 * 8]),
        ] {
            let error = read(name, rows, sizes).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
    let error = read("model.norm.weight", 0..1, [256, 8, 8]).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("F32"), "{error}");
}

/// Types that nobody here reads are refused by name, also where only rows of them are looked up.
#[test]
fn an_embedding_of_an_unknown_type_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(10);
    let stored: Vec<Vec<u8>> = matrices(false)
        .iter()
        .map(|(_, s)| random_blocks(&mut rng, GgmlType::Q4_0, &[0], s[0] * s[1]))
        .collect();
    let path = folder.path().join("a.gguf");
    write(&path, false, GgmlType::Q4_0, &stored, false);
    // The type behind the name, the number of dimensions and these.
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 16;
    bytes[at..at + 4].copy_from_slice(&20u32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(&path)
        .map_err(|error| error.to_string())
        .and_then(|c| gptq_model::Model::load(&c).map_err(|error| error.to_string()))
        .err()
        .unwrap();
    assert!(error.contains("IQ4_NL") && error.contains("embed_tokens"), "{error}");
}

#[test]
fn a_scale_that_is_no_number_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(7);
    let matrices = matrices(false);
    for (broken, name) in [
        (0, "model.embed_tokens.weight"),
        (1, "model.layers.0.self_attn.q_proj.weight"),
        (8, "lm_head.weight"),
    ] {
        let mut stored: Vec<Vec<u8>> = matrices
            .iter()
            .map(|(_, s)| random_blocks(&mut rng, GgmlType::Q4_1, &[0, 2], s[0] * s[1]))
            .collect();
        // The minimum of the third block of the first row.
        stored[broken][2 * 20 + 2..2 * 20 + 4].copy_from_slice(&[0, 0x7E]);
        let path = folder.path().join("a.gguf");
        write(&path, false, GgmlType::Q4_1, &stored, false);
        let error = gptq_model::Model::load(&open(&path)).err().unwrap().to_string();
        assert!(error.contains(name) && error.contains("64") && error.contains("NaN"), "{error}");
    }
}
