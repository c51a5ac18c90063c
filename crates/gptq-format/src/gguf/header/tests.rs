use std::path::Path;

use proptest::prelude::*;

use super::super::testing::{Builder, array, string, tiny_llama};
use super::super::{GgmlType, GgufArray, GgufError, GgufFile, GgufValue};
use super::*;
use crate::tokenizer::Tokenizer;

fn read(bytes: &[u8]) -> Result<GgufHeader, GgufError> {
    parse(bytes, bytes.len() as u64, Path::new("x.gguf"))
}

/// The message of the error that reading `bytes` gives.
fn refused(bytes: &[u8]) -> String {
    let message = read(bytes).unwrap_err().to_string();
    assert!(message.contains("x.gguf"), "{message}");
    message
}

#[track_caller]
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let message = refused(bytes);
    for part in parts {
        assert!(message.contains(part), "{part:?} not in {message:?}");
    }
}

#[test]
fn every_value_type_is_read() {
    let numbers = |kind: u32, bytes: &[u8], count| (kind, array(kind, count, bytes.into()));
    let mut b = Builder::default()
        .raw("u8", 0, vec![200])
        .raw("i8", 1, vec![0xFF])
        .raw("u16", 2, vec![1, 2])
        .raw("i16", 3, vec![0xFE, 0xFF])
        .u32("u32", 7)
        .raw("i32", 5, (-9i32).to_le_bytes().into())
        .f32("f32", 1e-5)
        .bool("bool", true)
        .str("string", "text é")
        .raw("u64", 10, u64::MAX.to_le_bytes().into())
        .raw("i64", 11, i64::MIN.to_le_bytes().into())
        .raw("f64", 12, 0.1f64.to_le_bytes().into())
        .strings("strings", &["a", "", "ü"])
        .raw("nested", 9, array(9, 2, [array(0, 1, vec![5]), array(8, 0, vec![])].concat()));
    for (kind, value) in [
        numbers(0, &[1, 2], 2),
        numbers(3, &[1, 0], 1),
        numbers(12, &[0; 16], 2),
        numbers(7, &[1, 0], 2),
    ] {
        b = b.raw(&format!("array{kind}"), 9, value);
    }
    let m = read(&b.build()).unwrap().metadata;
    assert_eq!(m["u8"].as_u64(), Some(200));
    assert_eq!(m["i8"], GgufValue::Int(-1));
    assert_eq!(m["u16"].as_u64(), Some(513));
    assert_eq!(m["i16"].as_u64(), None);
    assert_eq!(m["i32"], GgufValue::Int(-9));
    assert_eq!(m["f32"].as_f64(), Some(1e-5));
    assert_eq!(m["bool"].as_bool(), Some(true));
    assert_eq!(m["string"].as_str(), Some("text é"));
    assert_eq!(m["u64"].as_u64(), Some(u64::MAX));
    assert_eq!(m["i64"], GgufValue::Int(i64::MIN));
    assert_eq!(m["f64"].as_f64(), Some(0.1));
    assert_eq!(m["array0"].as_array(), Some(&GgufArray::U8(vec![1, 2])));
    assert_eq!(m["array3"].as_array(), Some(&GgufArray::I16(vec![1])));
    assert_eq!(m["array12"].as_array(), Some(&GgufArray::F64(vec![0.0; 2])));
    assert_eq!(m["array7"].as_array(), Some(&GgufArray::Bool(vec![true, false])));
    let nested = GgufArray::Array(vec![GgufArray::U8(vec![5]), GgufArray::String(vec![])]);
    assert_eq!(m["nested"].as_array(), Some(&nested));
}

#[test]
fn tensors_are_placed() {
    let bytes = tiny_llama("llama").build();
    let h = read(&bytes).unwrap();
    assert_eq!(h.version, 3);
    let t = &h.tensors[0];
    assert_eq!((t.name.as_str(), t.dtype, t.len), ("token_embd.weight", GgmlType::Q4_0, 8 * 36));
    assert_eq!(t.dims, [64, 8]);
    assert!(t.offset.is_multiple_of(32));
    let last = h.tensors.last().unwrap();
    assert_eq!(last.offset + last.len, bytes.len() as u64);
    // The data need not be in the prefix, but must be in the file.
    let header = h.tensors[0].offset as usize;
    assert_eq!(
        parse(&bytes[..header], bytes.len() as u64, Path::new("x")).unwrap().tensors,
        h.tensors
    );
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = tiny_llama("llama").build();
    for n in 0..bytes.len() {
        let message = refused(&bytes[..n]);
        assert!(message.contains("truncated"), "{n}: {message}");
    }
}

#[test]
fn what_is_no_little_endian_gguf_is_named() {
    let mut bytes = tiny_llama("llama").build();
    assert_refused(b"PK\x03\x04 something", &["not a GGUF file"]);
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert_refused(&bytes, &["big-endian"]);
    for version in [0u32, 1, 4, 77] {
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert_refused(&bytes, &[&format!("version {version}")]);
    }
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    assert_eq!(read(&bytes).unwrap().version, 2);
    assert_refused(&tiny_llama("llama").u32("split.count", 3).build(), &["3 parts", "merge"]);
}

#[test]
fn huge_counts_are_refused_before_memory_is_taken() {
    let mut bytes = tiny_llama("llama").build();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_refused(&bytes, &["truncated", "tensors"]);
    bytes[8..16].copy_from_slice(&(u64::MAX / 32).to_le_bytes());
    assert_refused(&bytes, &["truncated", "tensors"]);
    bytes[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert_refused(&bytes, &["truncated", "metadata keys"]);
    for kind in [0, 4, 7, 8, 9, 12] {
        let mut body = array(kind, 0, vec![]);
        body[4..12].copy_from_slice(&(1u64 << 61).to_le_bytes());
        assert_refused(
            &Builder::default().raw("big.array", 9, body).build(),
            &["truncated", "big.array"],
        );
    }
    let long = Builder::default().raw("long", 8, u64::MAX.to_le_bytes().into());
    assert_refused(&long.build(), &["truncated", "long"]);
}

#[test]
fn malformed_metadata_is_named() {
    let one = |kind, value| Builder::default().raw("the.key", kind, value).build();
    assert_refused(&one(13, vec![0; 64]), &["the.key", "type 13"]);
    assert_refused(&one(9, array(99, 1, vec![0; 64])), &["the.key", "array type 99"]);
    assert_refused(&one(7, vec![2]), &["the.key", "boolean"]);
    let mut bad = string("ab");
    bad[8] = 0xFF;
    assert_refused(&one(8, bad), &["the.key", "UTF-8"]);
    let nested = (0..6).fold(array(0, 0, vec![]), |inner, _| array(9, 1, inner));
    assert_refused(&one(9, nested), &["the.key", "nest"]);
    for alignment in [0, 3, 1 << 30] {
        let b = Builder::default().u32("general.alignment", alignment);
        assert_refused(&b.build(), &["general.alignment", "power of two"]);
    }
    let name = Builder::default().u32("", 1).build();
    assert_refused(&name, &["key 0", "name"]);
    // Two keys of one name: the builder replaces, so spell one differently and patch it.
    let mut twice = Builder::default().u32("key.a", 1).u32("key.b", 2).build();
    let at = twice.windows(5).position(|w| w == b"key.b").unwrap();
    twice[at + 4] = b'a';
    assert_refused(&twice, &["key.a", "twice"]);
}

#[test]
fn malformed_tensors_are_named() {
    let one = |dims: &[u64], kind, data| {
        Builder::default().tensor("the.tensor", dims, kind, data).build()
    };
    assert_refused(&one(&[0, 4], 0, vec![]), &["the.tensor", "shape"]);
    assert_refused(&one(&[1 << 40, 1 << 40], 0, vec![]), &["the.tensor", "shape"]);
    assert_refused(&one(&[1 << 62], 0, vec![]), &["the.tensor", "shape"]);
    assert_refused(&one(&[1 << 50], 0, vec![]), &["the.tensor", "truncated"]);
    assert_refused(&one(&[33], 2, vec![0; 64]), &["the.tensor", "33", "Q4_0"]);
    assert_refused(&one(&[], 0, vec![0; 64]), &["the.tensor", "0 dimensions"]);
    assert_refused(&one(&[1; 5], 0, vec![0; 64]), &["the.tensor", "5 dimensions"]);
    let twice = Builder::default().f32_tensor("a", &[1], &[0.0]).f32_tensor("a", &[1], &[0.0]);
    assert_refused(&twice.build(), &["`a`", "twice"]);

    // The offset is the last field of the last tensor's description.
    let two = Builder::default()
        .f32_tensor("first", &[16], &[0.0; 16])
        .f32_tensor("second", &[8], &[0.0; 8])
        .build();
    let field = two.windows(6).position(|w| w == b"second").unwrap() + 6 + 4 + 8 + 4;
    let with = |offset: u64| {
        let mut bytes = two.clone();
        bytes[field..field + 8].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    assert!(read(&with(64)).is_ok());
    assert_refused(&with(32), &["second", "overlaps", "first"]);
    assert_refused(&with(0), &["overlaps"]);
    assert_refused(&with(65), &["second", "alignment"]);
    assert_refused(&with(96), &["second", "ends at byte"]);
    assert_refused(&with(u64::MAX - 31), &["second", "ends at byte"]);
}

#[test]
fn a_type_that_cannot_be_read_is_named_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let file =
        tiny_llama("llama").tensor("blk.0.attn_q.bias", &[64], 16, vec![0; 64]).write(dir.path());
    let t = file.tensor("blk.0.attn_q.bias").unwrap();
    let message = file.read_f32(t).unwrap_err().to_string();
    assert!(message.contains("blk.0.attn_q.bias") && message.contains("IQ2_XXS"), "{message}");
    let norm = file.tensor("output_norm.weight").unwrap();
    assert_eq!(file.read_f32(norm).unwrap(), [1.0; 64]);
}

#[test]
fn opening_reports_missing_and_truncated_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let open = || GgufFile::open(&path).unwrap_err().to_string();
    assert!(open().contains("m.gguf"));
    std::fs::write(&path, &tiny_llama("llama").build()[..200]).unwrap();
    assert!(open().contains("truncated"));
    std::fs::write(&path, b"").unwrap();
    assert!(open().contains("truncated"));
}

/// Everything that is built on a header.
fn use_all(bytes: &[u8]) {
    let path = Path::new("x.gguf");
    if let Ok(header) = parse(bytes, bytes.len() as u64, path) {
        let file = GgufFile { path: path.into(), header };
        let _ = file.hf_tensors();
        let _ = file.hf_config();
        let _ = file.hf_generation_config();
        if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
            let ids = tokenizer.encode("ab c <s>", true);
            let _ = tokenizer.decode(&ids.unwrap_or_default(), false);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        words in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(vec![
            0u64, 1, 31, 32, 0xFFFF_FFFF, 1 << 31, 1 << 32, i64::MAX as u64, u64::MAX - 31, u64::MAX,
        ])), 0..2),
        cut in prop::option::of(any::<prop::sample::Index>()),
        spm in any::<bool>(),
    ) {
        let b = tiny_llama("llama");
        let b = if spm { b.str("tokenizer.ggml.model", "llama").f32s("tokenizer.ggml.scores", &[0.0; 8]) } else { b };
        let mut bytes = b.build();
        // Damage to tensor data changes nothing here: aim at the header.
        let header = read(&bytes).unwrap().tensors[0].offset as usize;
        for (at, value) in changes {
            bytes[at.index(header)] = value;
        }
        for (at, value) in words {
            let at = at.index(header - 8);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(header));
        }
        use_all(&bytes);
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        use_all(&noise);
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(&noise);
        use_all(&bytes);
    }
}
