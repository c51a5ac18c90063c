use super::plan::ALIGNMENT;
use super::*;
use crate::{DType, TensorStore};
use safetensors::SafeTensors;
use serde_json::Value;

fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn specs() -> Vec<TensorSpec> {
    vec![
        spec("odd", DType::F16, &[3]),
        spec("words", DType::I32, &[2, 2]),
        spec("empty", DType::F32, &[0, 4]),
        spec("bytes", DType::U8, &[5]),
        spec("wide", DType::F64, &[2]),
    ]
}

fn content(spec: &TensorSpec) -> Vec<u8> {
    let len = spec.dtype.byte_len(&spec.shape).unwrap();
    (0..len).map(|i| (i * 7 + spec.name.len()) as u8).collect()
}

fn write_all(dir: &Path, max: u64) -> Vec<PathBuf> {
    let plan = ShardPlan::new(specs(), max).unwrap();
    let mut writer = ShardWriter::create(dir, plan).unwrap();
    for spec in specs().iter().rev() {
        writer.write(&spec.name, &content(spec)).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn one_file_is_read_by_the_reference_implementation() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_all(dir.path(), u64::MAX);
    assert_eq!(paths, [dir.path().join("model.safetensors")]);
    let bytes = std::fs::read(&paths[0]).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header + 8) % ALIGNMENT, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), specs().len());
    for spec in specs() {
        let tensor = read.tensor(&spec.name).unwrap();
        assert_eq!(tensor.shape(), spec.shape);
        assert_eq!(Some(tensor.dtype()), spec.dtype.safetensors());
        assert_eq!(tensor.data(), content(&spec));
        let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(start % spec.dtype.unit().1, 0, "{} is not aligned", spec.name);
    }
}

#[test]
fn several_files_get_an_index_and_open_as_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    // 6 + 16 bytes, then 0 + 5 + 16.
    let paths = write_all(dir.path(), 22);
    let names: Vec<_> = paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    let expected =
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_NAME];
    assert_eq!(names, expected);
    let index: Value = serde_json::from_slice(&std::fs::read(&paths[2]).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 43);
    assert_eq!(index["weight_map"]["words"], expected[0]);
    assert_eq!(index["weight_map"]["wide"], expected[1]);
    let store = TensorStore::open_dir(dir.path()).unwrap();
    assert_eq!(store.total_bytes(), 43);
    for spec in specs() {
        assert_eq!(store.bytes(&spec.name).unwrap().as_ref(), content(&spec));
    }
}

#[test]
fn a_tensor_above_the_limit_gets_its_own_file() {
    let plan = ShardPlan::new(specs(), 1).unwrap();
    let sizes: Vec<u64> = plan.shards.iter().map(|s| s.data_bytes).collect();
    assert_eq!(sizes, [6, 16, 0, 5, 16]);
    assert_eq!(plan.tensors().count(), 5);
    assert_eq!(plan.total_bytes(), 43);
    assert_eq!(plan.files().count(), 5);
}

#[test]
fn an_interrupted_run_continues_with_identical_bytes() {
    let (whole, resumed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plan = || ShardPlan::new(specs(), 22).unwrap();
    let mut writer = ShardWriter::create(resumed.path(), plan()).unwrap();
    writer.write("words", &content(&specs()[1])).unwrap();
    writer.write_part("wide", 0, &[1; 7]).unwrap();
    writer.sync().unwrap();
    drop(writer);
    let mut writer = ShardWriter::reopen(resumed.path(), plan(), ["words"]).unwrap();
    for spec in specs().iter().filter(|s| s.name != "words") {
        writer.write(&spec.name, &content(spec)).unwrap();
    }
    for (a, b) in writer.finish().unwrap().iter().zip(write_all(whole.path(), 22)) {
        assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    }
}

#[test]
fn files_of_another_plan_are_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    drop(ShardWriter::create(dir.path(), ShardPlan::new(specs(), 22).unwrap()).unwrap());
    let mut other = specs();
    other[1].shape = vec![4, 1];
    let plan = ShardPlan::new(other, 22).unwrap();
    assert!(ShardWriter::reopen(dir.path(), plan, []).is_err());
    let one_file = ShardPlan::new(specs(), u64::MAX).unwrap();
    assert!(ShardWriter::reopen(dir.path(), one_file, []).is_err());
}

#[test]
fn the_plan_is_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(dir.path(), ShardPlan::new(specs(), 22).unwrap()).unwrap();
    let mut message = |name: &str, bytes: &[u8]| writer.write(name, bytes).unwrap_err().to_string();
    assert!(message("none", &[]).contains("not planned"));
    assert!(message("words", &[0; 15]).contains("15 bytes, but 16"));
    writer.write("words", &[0; 16]).unwrap();
    let mut message = |name: &str, bytes: &[u8]| writer.write(name, bytes).unwrap_err().to_string();
    assert!(message("words", &[0; 16]).contains("already"));
    writer.write_part("wide", 0, &[0; 10]).unwrap();
    assert!(writer.write_part("wide", 8, &[0; 8]).is_err());
    assert!(writer.write_part("wide", 10, &[0; 7]).is_err());
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("`odd`") && message.contains("0 of 6"), "{message}");
}

#[test]
fn impossible_plans_are_refused() {
    let plan = |specs| ShardPlan::new(specs, 100);
    let twice = vec![spec("a", DType::U8, &[1]), spec("a", DType::U8, &[1])];
    assert!(plan(twice).is_err());
    assert!(plan(vec![spec("", DType::U8, &[1])]).is_err());
    assert!(plan(vec![spec("__metadata__", DType::U8, &[1])]).is_err());
    assert!(plan(vec![spec("a", DType::F64, &[usize::MAX, 2])]).is_err());
    let ggml = DType::from(crate::gguf::GgmlType::Q4_0);
    assert!(plan(vec![spec("a", ggml, &[32])]).is_err());
}
