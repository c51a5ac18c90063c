use super::*;
use crate::shards::{ShardPlan, ShardWriter, TensorSpec};
use half::bf16;
use proptest::prelude::*;
use std::fs;
use tempfile::TempDir;

/// A checkpoint directory of one file with the given tensors.
fn store_of(tensors: &[(&str, DType, &[usize], Vec<u8>)]) -> (TempDir, TensorStore) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), u64::MAX, tensors);
    let store = TensorStore::open_dir(dir.path()).unwrap();
    (dir, store)
}

fn write(dir: &Path, max_shard: u64, tensors: &[(&str, DType, &[usize], Vec<u8>)]) {
    let specs = tensors
        .iter()
        .map(|(name, dtype, shape, _)| TensorSpec {
            name: (*name).to_owned(),
            dtype: *dtype,
            shape: shape.to_vec(),
        })
        .collect();
    let plan = ShardPlan::new(specs, max_shard).unwrap();
    let mut writer = ShardWriter::create(dir, plan).unwrap();
    for (name, _, _, bytes) in tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn f16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
}

/// Two shards, `a` and `b`, to be damaged.
fn sharded() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let data = f32_bytes(&[1.0, 2.0]);
    let tensors = [("a", DType::F32, [2].as_slice(), data.clone()), ("b", DType::F32, &[2], data)];
    write(dir.path(), 8, &tensors);
    dir
}

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

fn set_index(dir: &TempDir, weight_map: &str) {
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(index, format!(r#"{{"weight_map": {weight_map}}}"#)).unwrap();
}

fn open_message(dir: &TempDir) -> String {
    TensorStore::open_dir(dir.path()).unwrap_err().to_string()
}

#[test]
fn one_of_several_shards_is_no_checkpoint() {
    let dir = sharded();
    for name in ["model.safetensors.index.json", SHARDS[1]] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let message = open_message(&dir);
    assert!(message.contains(SHARDS[0]) && message.contains("download the others"), "{message}");
    // One of one, and names that look alike.
    for name in ["model-00001-of-00001.safetensors", "best-of-2.safetensors"] {
        let only = tempfile::tempdir().unwrap();
        fs::copy(dir.path().join(SHARDS[0]), only.path().join(name)).unwrap();
        TensorStore::open_dir(only.path()).unwrap();
    }
}

#[test]
fn every_float_type_is_read() {
    let values = [0.0f32, -1.5, 65504.0, 6.1e-5, 0.25, 3.0];
    let bf = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let f64s = values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
    let (_dir, store) = store_of(&[
        ("f32", DType::F32, &[2, 3], f32_bytes(&values)),
        ("f16", DType::F16, &[2, 3], f16_bytes(&values)),
        ("bf16", DType::BF16, &[2, 3], bf),
        ("f64", DType::F64, &[2, 3], f64s),
    ]);
    let halves: Vec<f32> = values.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
    let brains: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    for (name, expected) in
        [("f32", values.as_slice()), ("f16", &halves), ("bf16", &brains), ("f64", &values)]
    {
        assert_eq!(store.read_f32(name, &[2, 3]).unwrap(), expected, "{name}");
        let mut row = [0.0; 3];
        store.read_rows_f32(name, 1..2, &mut row).unwrap();
        assert_eq!(row, expected[3..], "{name}");
    }
    assert_eq!(store.names().collect::<Vec<_>>(), ["bf16", "f16", "f32", "f64"]);
    assert_eq!(store.total_bytes(), 6 * (4 + 2 + 2 + 8));
    let info = store.info("f16").unwrap();
    assert_eq!((info.bytes, info.elements()), (12, 6));
    assert!(info.file.ends_with("model.safetensors"));
}

#[test]
fn tensors_larger_than_the_buffer_are_read_whole() {
    let values: Vec<f32> = (0..CHUNK_BYTES).map(|i| (i % 2039) as f32).collect();
    let shape = [values.len() / 64, 64];
    let (_dir, store) = store_of(&[
        ("w", DType::F32, &shape, f32_bytes(&values)),
        ("h", DType::F16, &shape, f16_bytes(&values)),
    ]);
    assert_eq!(store.read_f32("w", &shape).unwrap(), values);
    assert_eq!(store.read_f32("h", &shape).unwrap(), values);
    let mut rows = vec![0.0; 1500 * 64];
    store.read_rows_f32("h", 100..1600, &mut rows).unwrap();
    assert_eq!(rows, values[100 * 64..1600 * 64]);
}

#[test]
fn integers_and_halves_are_read_or_refused() {
    let i64s = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (_dir, store) = store_of(&[
        ("i32", DType::I32, &[2], [1i32, -7].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("i64", DType::I64, &[2], i64s(&[5, -5])),
        ("wide", DType::I64, &[2], i64s(&[5, 1 << 31])),
        ("f32", DType::F32, &[2], f32_bytes(&[0.1, 2.0])),
        ("big", DType::F32, &[2], f32_bytes(&[0.0, 1e5])),
        ("f16", DType::F16, &[2], f16_bytes(&[0.5, f32::INFINITY])),
    ]);
    assert_eq!(store.read_i32("i32", &[2]).unwrap(), [1, -7]);
    assert_eq!(store.read_i32("i64", &[2]).unwrap(), [5, -5]);
    let message = store.read_i32("wide", &[2]).unwrap_err().to_string();
    assert!(message.contains("2147483648 at index 1"), "{message}");
    let halves = store.read_f16("f32", &[2]).unwrap();
    assert_eq!(halves, [f16::from_f32(0.1), f16::from_f32(2.0)]);
    let message = store.read_f16("big", &[2]).unwrap_err().to_string();
    assert!(message.contains("100000 at index 1"), "{message}");
    let message = store.read_f16("f16", &[2]).unwrap_err().to_string();
    assert!(message.contains("inf at index 1"), "{message}");
}

#[test]
fn wrong_dtype() {
    let (_dir, store) = store_of(&[
        ("i", DType::I32, &[1], vec![0; 4]),
        ("f8", DType::F8E4M3, &[4], vec![0; 4]),
        ("f", DType::F32, &[1], vec![0; 4]),
    ]);
    for error in [
        store.read_f32("i", &[1]).unwrap_err(),
        store.read_f32("f8", &[4]).unwrap_err(),
        store.read_f16("i", &[1]).unwrap_err(),
        store.read_i32("f", &[1]).map(|_| ()).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(
            message.contains("has dtype") && message.contains("model.safetensors"),
            "{message}"
        );
    }
}

#[test]
fn wrong_shape_and_missing_tensor() {
    let (_dir, store) = store_of(&[("w", DType::F32, &[2, 3], vec![0; 24])]);
    let message = store.read_f32("w", &[3, 2]).unwrap_err().to_string();
    assert!(message.contains("has shape [2, 3], expected [3, 2]"), "{message}");
    assert!(store.read_rows_f32("w", 1..3, &mut [0.0; 6]).is_err());
    assert!(store.read_rows_f32("w", 0..1, &mut [0.0; 2]).is_err());
    assert!(store.read_rows_f32("w", 0..usize::MAX, &mut []).is_err());
    let message = store.read_f32("v", &[1]).unwrap_err().to_string();
    assert!(message.contains("tensor `v` is not in"), "{message}");
    assert!(!store.contains("v") && !store.is_identity("v"));
}

#[test]
fn not_a_number_and_infinity() {
    for (value, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let mut values = vec![1.0f32; CHUNK_BYTES / 2];
        let bad = CHUNK_BYTES / 4 + 77;
        values[bad] = value;
        let shape = [values.len()];
        let (_dir, store) = store_of(&[
            ("w", DType::F32, &shape, f32_bytes(&values)),
            ("h", DType::F16, &shape, f16_bytes(&values)),
        ]);
        for name in ["w", "h"] {
            let message = store.read_f32(name, &shape).unwrap_err().to_string();
            let expected = format!("tensor `{name}`");
            assert!(message.contains(&expected), "{message}");
            assert!(message.contains(&format!("holds {text} at index {bad},")), "{message}");
        }
    }
}

#[test]
fn stored_bytes_are_shared_between_threads() {
    let (_dir, store) = store_of(&[("w", DType::U8, &[3], vec![1, 2, 3])]);
    let bytes = store.bytes("w").unwrap();
    drop(store);
    let copy = bytes.clone();
    let sum = std::thread::spawn(move || copy.iter().map(|&b| u32::from(b)).sum::<u32>());
    assert_eq!(sum.join().unwrap(), 6);
    assert_eq!(&bytes[1..], [2, 3]);
}

#[test]
fn stored_bytes_are_copied_in_parts() {
    let (_dir, store) = store_of(&[("w", DType::U8, &[5], vec![1, 2, 3, 4, 5])]);
    let mut part = [0; 2];
    store.copy_bytes("w", 3, &mut part).unwrap();
    assert_eq!(part, [4, 5]);
    assert!(store.copy_bytes("w", 4, &mut part).is_err());
    assert!(store.copy_bytes("w", usize::MAX, &mut part).is_err());
}

#[test]
fn permuted_rows_are_put_back() {
    // Two heads of four rows of two columns. In the file the halves of a head alternate: 0 2 1 3.
    let order = [0, 2, 1, 3, 4, 6, 5, 7];
    let stored: Vec<f32> = order.iter().flat_map(|&r| [r as f32, -(r as f32)]).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    fs::write(&path, f32_bytes(&stored)).unwrap();
    let map = RowMap { heads: 2, head_rows: 4 };
    let tensor = |name: &str, shape: &[usize], range| Located {
        name: name.to_owned(),
        dtype: DType::F32,
        shape: shape.to_vec(),
        range,
    };
    let open = |map, shape: &[usize]| {
        let tensors = vec![(tensor("q", shape, 0..64), Some(map))];
        TensorStore::from_mapped(MappedFile::open(&path).unwrap(), tensors)
    };
    let store = open(map, &[8, 2]).unwrap();
    let expected: Vec<f32> = (0..8).flat_map(|r| [r as f32, -(r as f32)]).collect();
    assert_eq!(store.read_f32("q", &[8, 2]).unwrap(), expected);
    let mut rows = [0.0; 6];
    store.read_rows_f32("q", 4..7, &mut rows).unwrap();
    assert_eq!(rows, expected[8..14]);
    assert!(!store.is_identity("q"));
    assert!(matches!(store.bytes("q"), Err(FormatError::Permuted { .. })));
    assert!(matches!(store.copy_bytes("q", 0, &mut [0]), Err(FormatError::Permuted { .. })));
    // A bias is a row of one element each: 16 of them are four heads of four.
    let bias = open(RowMap { heads: 4, head_rows: 4 }, &[16]).unwrap();
    let read = bias.read_f32("q", &[16]).unwrap();
    assert_eq!(read[..4], [stored[0], stored[2], stored[1], stored[3]]);
    for wrong in [(3, 2), (8, 1), (0, 0), (usize::MAX, 4)] {
        let (heads, head_rows) = wrong;
        assert!(open(RowMap { heads, head_rows }, &[8, 2]).is_err(), "{wrong:?}");
    }
}

#[test]
fn the_files_of_a_checkpoint_are_found() {
    let data = |v: f32| f32_bytes(&[v]);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), u64::MAX, &[("w", DType::F32, &[1], data(1.0))]);
    let model = dir.path().join("model.safetensors");
    let legacy = dir.path().join("gptq_model-4bit-128g.safetensors");
    fs::rename(&model, &legacy).unwrap();
    let value = || TensorStore::open_dir(dir.path()).unwrap().read_f32("w", &[1]).unwrap()[0];
    assert_eq!(value(), 1.0);
    fs::write(dir.path().join("adapter_model.safetensors"), "not the model").unwrap();
    assert_eq!(value(), 1.0);
    fs::write(dir.path().join("other.safetensors"), "not the model").unwrap();
    assert_eq!(value(), 1.0);
    write(dir.path(), u64::MAX, &[("w", DType::F32, &[1], data(2.0))]);
    assert_eq!(value(), 2.0);
    assert_eq!(TensorStore::open_dir(dir.path()).unwrap().path(), dir.path());
}

#[test]
fn directories_without_a_checkpoint_are_described() {
    let dir = tempfile::tempdir().unwrap();
    let touch = |name: &str| fs::write(dir.path().join(name), "").unwrap();
    assert!(open_message(&dir).contains("found nothing"));
    touch("readme.md");
    assert!(open_message(&dir).contains("found readme.md"));
    touch("pytorch_model.bin");
    assert!(open_message(&dir).contains("pickle"));
    touch("model.gguf");
    assert!(open_message(&dir).contains("`model.gguf`"));
    touch("a.safetensors");
    touch("b.safetensors");
    assert!(open_message(&dir).contains("a.safetensors, b.safetensors"));
}

#[test]
fn missing_shard() {
    let dir = sharded();
    fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
    let message = open_message(&dir);
    assert!(message.contains(SHARDS[1]) && message.contains("tensor `b`"), "{message}");
}

#[test]
fn index_that_points_outside_the_directory() {
    let dir = sharded();
    let absolute = dir.path().join(SHARDS[0]);
    let absolute = absolute.to_str().unwrap();
    let names = [
        "../x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "x\\\\y",
        absolute,
        "./x.safetensors",
    ];
    for name in names {
        set_index(&dir, &format!(r#"{{"a": "{name}"}}"#));
        let message = open_message(&dir);
        assert!(
            message.contains("not a plain file name") && message.contains("tensor `a`"),
            "{message}"
        );
    }
}

#[test]
fn index_that_places_a_tensor_in_the_wrong_shard() {
    let dir = sharded();
    set_index(&dir, &format!(r#"{{"a": "{}", "b": "{}"}}"#, SHARDS[1], SHARDS[0]));
    let message = open_message(&dir);
    assert!(message.contains("does not hold it"), "{message}");
    set_index(&dir, &format!(r#"{{"a": "{}", "c": "{}"}}"#, SHARDS[0], SHARDS[0]));
    assert!(open_message(&dir).contains("places tensor `c`"));
}

#[test]
fn index_that_is_malformed() {
    let dir = sharded();
    for (map, part) in [
        ("{}", "is empty"),
        ("[]", "no object `weight_map`"),
        (r#"{"a": 1}"#, "not text"),
        ("{", "not valid JSON"),
    ] {
        set_index(&dir, map);
        let message = open_message(&dir);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn tensor_in_two_shards() {
    let dir = sharded();
    fs::copy(dir.path().join(SHARDS[0]), dir.path().join(SHARDS[1])).unwrap();
    set_index(&dir, &format!(r#"{{"a": "{}", "b": "{}"}}"#, SHARDS[0], SHARDS[1]));
    let message = open_message(&dir);
    assert!(message.contains("tensor `a` is also in"), "{message}");
}

#[test]
fn symlink_loops_and_directories_in_place_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(open_message(&dir).contains("cannot open"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(open_message(&dir).contains("model.safetensors"));
}

proptest! {
    #[test]
    fn f32_survives_writing_and_reading(values in prop::collection::vec(-1e30f32..1e30, 1..300)) {
        let shape = [values.len()];
        let (_dir, store) = store_of(&[("w", DType::F32, &shape, f32_bytes(&values))]);
        prop_assert_eq!(store.read_f32("w", &shape).unwrap(), values);
    }

    #[test]
    fn f16_reads_as_itself(bits in prop::collection::vec(any::<u16>(), 1..600)) {
        let values: Vec<f16> = bits.iter().map(|&b| f16::from_bits(b)).filter(|v| v.is_finite()).collect();
        let shape = [values.len()];
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (_dir, store) = store_of(&[("w", DType::F16, &shape, bytes)]);
        prop_assert_eq!(store.read_f16("w", &shape).unwrap(), values.clone());
        let floats: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        prop_assert_eq!(store.read_f32("w", &shape).unwrap(), floats);
    }
}
