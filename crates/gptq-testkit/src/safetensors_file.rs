//! Safetensors files as bytes, so that tests can damage them in ways that no writer would.

use serde_json::{Map, Value};

/// A file of this header, whatever it says, and these data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Header and data of a file that is sound.
pub fn parts(file: &[u8]) -> (Map<String, Value>, &[u8]) {
    let start = data_start(file);
    let header = serde_json::from_slice(&file[8..start]);
    (header.unwrap_or_else(|error| panic!("header: {error}")), &file[start..])
}

/// The file with its header changed; the data stay.
pub fn edited(file: &[u8], change: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
    let (mut header, data) = parts(file);
    change(&mut header);
    self::file(&Value::Object(header).to_string(), data)
}

/// Where the bytes of a tensor begin and end in a file that is sound.
pub fn range(file: &[u8], tensor: &str) -> std::ops::Range<usize> {
    let (header, _) = parts(file);
    let offset = |end: usize| match header[tensor]["data_offsets"][end].as_u64() {
        Some(offset) => offset as usize + data_start(file),
        None => panic!("no tensor {tensor}"),
    };
    offset(0)..offset(1)
}

/// Overwrites every element of a tensor in f32, or only the first.
pub fn fill(file: &mut [u8], tensor: &str, value: f32, all: bool) {
    let range = range(file, tensor);
    let count = if all { range.len() / 4 } else { 1 };
    for element in file[range].chunks_exact_mut(4).take(count) {
        element.copy_from_slice(&value.to_le_bytes());
    }
}

/// The file with every tensor, all of them in f32, cut to bfloat16, which holds numbers as large.
pub fn as_bf16(file: &[u8]) -> Vec<u8> {
    let (mut header, data) = parts(file);
    for (_, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        entry["dtype"] = "BF16".into();
        for end in entry["data_offsets"].as_array_mut().into_iter().flatten() {
            *end = end.as_u64().map_or(Value::Null, |end| (end / 2).into());
        }
    }
    let data: Vec<u8> = data.chunks_exact(4).flat_map(|x| [x[2], x[3]]).collect();
    self::file(&Value::Object(header).to_string(), &data)
}

fn data_start(file: &[u8]) -> usize {
    let length = file.first_chunk().unwrap_or_else(|| panic!("a file of {} bytes", file.len()));
    8 + u64::from_le_bytes(*length) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_found_and_filled() {
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        let mut bytes = file(header, &[0; 12]);
        fill(&mut bytes, "b", 1.0, true);
        assert_eq!(parts(&bytes).1, [0, 0, 0, 0, 0, 0, 128, 63, 0, 0, 128, 63]);
        let bytes = as_bf16(&bytes);
        assert_eq!(parts(&bytes).1, [0, 0, 128, 63, 128, 63]);
        assert_eq!(range(&bytes, "b"), bytes.len() - 4..bytes.len());
    }
}
