//! GGUF files: header, metadata, dequantization, and the Hugging Face view of names, shapes and config.
//!
//! [`GgufFile::open`] reads the header only; tensor data are read by whoever needs them, through [`GgufFile::read_f32`]
//! or by the ranges that [`GgufFile::hf_tensors`] gives. [`GgufWriter`] writes new files.

mod blocks;
mod config;
mod dequant;
mod error;
pub mod header;
mod names;
#[cfg(test)]
pub(crate) mod testing;
mod types;
mod value;
mod writer;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

pub(crate) use blocks::unpack_rows;
pub use blocks::{CodeFormat, CodeRows};
pub use dequant::{DequantError, dequantize_rows};
pub use error::GgufError;
pub use header::{GgufHeader, GgufTensor};
pub use names::{Architecture, HfTensor, RowMap, gguf_name};
pub use types::GgmlType;
pub use value::{GgufArray, GgufValue};
pub use writer::{GgufWriter, PlannedTensor};

/// Bytes of the file that are read first; enough for the header of most models.
const FIRST_READ: u64 = 16 << 20;
/// A header larger than this is refused. The largest vocabularies take some 20 MiB.
const MAX_HEADER: u64 = 256 << 20;

/// A GGUF file whose header has been read and checked.
#[derive(Debug, Clone)]
pub struct GgufFile {
    path: PathBuf,
    header: GgufHeader,
}

impl GgufFile {
    /// Reads the header of `path`.
    ///
    /// # Errors
    /// [`GgufError`] if the file cannot be read or is not a well-formed little-endian GGUF of version 2 or 3.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io = |source| GgufError::Io { path: path.into(), source };
        let mut file = File::open(path).map_err(io)?;
        let file_len = file.metadata().map_err(io)?.len();
        let mut bytes = Vec::new();
        let mut wanted = FIRST_READ.min(file_len);
        loop {
            let more = wanted - bytes.len() as u64;
            (&mut file).take(more).read_to_end(&mut bytes).map_err(io)?;
            match header::parse(&bytes, file_len, path) {
                Err(GgufError::Truncated { .. }) if wanted == MAX_HEADER => {
                    return Err(GgufError::HeaderTooLarge { path: path.into(), limit: MAX_HEADER });
                }
                // A file that shrinks while it is read gives fewer bytes than asked for.
                Err(GgufError::Truncated { .. })
                    if wanted < file_len && bytes.len() as u64 == wanted =>
                {
                    wanted = (wanted * 4).min(MAX_HEADER).min(file_len);
                }
                result => {
                    return Ok(Self { path: path.into(), header: result? });
                }
            }
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed header.
    pub fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// The tensor of that name (in GGUF's naming).
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.header.tensors.iter().find(|t| t.name == name)
    }

    /// Reads one tensor as floats, row-major in the order of the file.
    ///
    /// # Errors
    /// [`GgufError::UnsupportedType`] if its type cannot be read, [`GgufError::Io`] if the file cannot.
    pub fn read_f32(&self, tensor: &GgufTensor) -> Result<Vec<f32>, GgufError> {
        let unsupported = || GgufError::UnsupportedType {
            path: self.path.clone(),
            tensor: tensor.name.clone(),
            dtype: tensor.dtype,
        };
        let (per_block, block_bytes) = tensor.dtype.block().ok_or_else(unsupported)?;
        let io = |source| GgufError::Io { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start(tensor.offset)).map_err(io)?;
        // The header's check bounds the length by the file's.
        let mut bytes = vec![0; tensor.len as usize];
        file.read_exact(&mut bytes).map_err(io)?;
        let mut out = vec![0.0; bytes.len() / block_bytes * per_block];
        dequantize_rows(tensor.dtype, &bytes, &mut out).map_err(|_| unsupported())?;
        Ok(out)
    }

    /// The metadata value of `key`, if present.
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.header.metadata.get(key)
    }

    /// The unsigned integer under `key`, `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if the key holds something else.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an integer that is not negative", GgufValue::as_u64)
    }

    /// The float under `key`, `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if the key holds something else, or a value that is not finite.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a finite float", |v| v.as_f64().filter(|f| f.is_finite()))
    }

    /// The text under `key`, `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if the key holds something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "text", GgufValue::as_str)
    }

    /// The boolean under `key`, `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if the key holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", GgufValue::as_bool)
    }

    /// The array of texts under `key`, `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if the key holds something else.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of texts", |v| match v.as_array()? {
            GgufArray::String(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// `value` or the error that `key` is missing.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, GgufError> {
        value.ok_or_else(|| GgufError::MissingKey { path: self.path.clone(), key: key.into() })
    }

    /// The error that `key` should be `expected`.
    pub(crate) fn bad_value(&self, key: &str, expected: impl Into<String>) -> GgufError {
        GgufError::Value {
            path: self.path.clone(),
            key: key.into(),
            expected: expected.into(),
            got: self.value(key).map_or_else(|| "absent".into(), GgufValue::describe),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(self.bad_value(key, expected)),
            },
        }
    }
}
