//! Safetensors headers: eight bytes of length, a JSON object, the data.

use crate::dtype::DType;
use crate::error::{FormatError, Result};
use crate::mmap::MappedFile;
use crate::tensors::Located;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;

/// Largest header that is read or written, in bytes; the limit of the reference implementation.
pub const MAX_HEADER_BYTES: usize = 100_000_000;

/// Reads and validates the header of `file`: every tensor lies inside the file, has the size of its shape and dtype, and
/// the tensors follow each other without gap or overlap up to the end of the file. In the order of their data.
///
/// # Errors
/// If any of that does not hold, a name occurs twice, or a dtype is one that no supported checkpoint uses.
pub fn parse(file: &MappedFile) -> Result<Vec<Located>> {
    let invalid =
        |reason: String| FormatError::Safetensors { path: file.path().to_owned(), reason };
    let bytes = file.bytes();
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(invalid(format!(
            "it has {} bytes, less than the 8 of the header length",
            bytes.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(invalid(format!(
            "its header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}; is it a safetensors file?"
        )));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(invalid(format!(
            "its header claims {length} bytes, but only {} follow; the file is truncated",
            rest.len()
        )));
    };
    let Header(mut tensors) =
        serde_json::from_slice(header).map_err(|e| invalid(format!("header: {e}")))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);

    let start = 8 + length as usize;
    let metadata = Metadata::new(None, tensors.clone()).map_err(|e| invalid(e.to_string()))?;
    let (needed, got) = (metadata.data_len(), file.len() - start);
    if needed != got {
        let state = if got < needed { "truncated" } else { "damaged" };
        return Err(invalid(format!(
            "its header describes {needed} bytes of data, but {got} follow; the file is {state}"
        )));
    }
    tensors
        .into_iter()
        .map(|(name, info)| {
            let Some(dtype) = DType::from_safetensors(info.dtype) else {
                return Err(invalid(format!(
                    "tensor `{name}` has dtype {}, which is not supported",
                    info.dtype
                )));
            };
            // `Metadata::new` proved that the offsets ascend, and `data_len` that they end in the file.
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            Ok(Located { name, dtype, shape: info.shape, range })
        })
        .collect()
}

/// The tensors of a header, names checked to be unique, which a map would hide.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Header, A::Error> {
                let mut tensors = Vec::new();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    // Names are shown; these would forge lines or command a terminal.
                    if name.contains(char::is_control) {
                        return Err(A::Error::custom(format_args!(
                            "the name of tensor {name:?} has control characters"
                        )));
                    }
                    let info = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("tensor `{name}` occurs twice")));
                    }
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_bytes(bytes: &[u8]) -> Result<Vec<Located>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        parse(&MappedFile::open(&path)?)
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn message(bytes: &[u8]) -> String {
        let message = parse_bytes(bytes).unwrap_err().to_string();
        assert!(message.contains("model.safetensors"), "{message}");
        message
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},
        "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let tensors = parse_bytes(&file(TWO, 20)).unwrap();
        let start = 8 + TWO.len();
        assert_eq!(tensors[0].name, "a");
        assert_eq!(tensors[1].range, start + 8..start + 20);
        assert_eq!(tensors[1].shape, [2, 3]);
        assert_eq!(tensors[1].dtype, DType::F16);
    }

    #[test]
    fn empty_file() {
        assert!(message(b"").contains("0 bytes"));
    }

    #[test]
    fn truncated_header() {
        assert!(message(&file(TWO, 20)[..40]).contains("truncated"));
    }

    #[test]
    fn truncated_data() {
        assert!(message(&file(TWO, 19)).contains("truncated"));
    }

    #[test]
    fn trailing_data() {
        assert!(message(&file(TWO, 21)).contains("damaged"));
    }

    #[test]
    fn huge_header_length() {
        let mut bytes = file(TWO, 20);
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(message(&bytes).contains("more than the limit"));
    }

    #[test]
    fn overlapping_tensors() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        message(&file(header, 12));
    }

    #[test]
    fn gap_between_tensors() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#;
        message(&file(header, 20));
    }

    #[test]
    fn reversed_and_overflowing_offsets() {
        message(&file(r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[8,0]}}"#, 0));
        let max = u64::MAX;
        let header =
            format!(r#"{{"a":{{"dtype":"F64","shape":[{max},{max}],"data_offsets":[0,{max}]}}}}"#);
        message(&file(&header, 8));
    }

    #[test]
    fn size_that_contradicts_the_shape() {
        message(&file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8));
    }

    #[test]
    fn name_that_occurs_twice() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(message(&file(header, 8)).contains("`a` occurs twice"));
    }

    #[test]
    fn name_that_commands_a_terminal() {
        let header = r#"{"a\u001b[2J":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let message = message(&file(header, 8));
        assert!(message.contains("control characters") && !message.contains('\u{1b}'), "{message}");
    }

    #[test]
    fn unknown_dtype_and_wrong_json() {
        let header = r#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(message(&file(header, 8)).contains("tensor `a`"));
        let complex = r#"{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#;
        assert!(message(&file(complex, 8)).contains("C64"));
        message(&file("[]", 0));
        message(&file("\u{1}", 0));
        message(&file(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#, 8));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(at in 0usize..200, byte in any::<u8>()) {
            let mut bytes = file(TWO, 20);
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(tensors) = parse_bytes(&bytes) {
                prop_assert!(tensors.iter().all(|t| t.range.end <= bytes.len()));
            }
        }
    }
}
