//! All tensors of one checkpoint under their Hugging Face names, read from memory-mapped files.

mod codes;
mod decode;
mod open;

pub use crate::mmap::SharedBytes;

use crate::dtype::DType;
use crate::error::{FormatError, Result};
use crate::gguf::{GgufError, GgufFile, RowMap};
use crate::mmap::MappedFile;
use decode::Bad;
use half::f16;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The tensors of a checkpoint. Opening validates every header; reading checks dtype, shape and values.
///
/// Reads that convert go through a small buffer, not through the map, so that they leave no resident pages behind: a model
/// larger than memory can be read tensor by tensor. [`TensorStore::bytes`] gives zero-copy access.
#[derive(Debug)]
pub struct TensorStore {
    path: PathBuf,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

/// Where one tensor lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The tensor's name.
    pub name: String,
    /// Its dtype.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its bytes, from the start of the file.
    pub range: Range<usize>,
}

/// What is known of a tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its elements are stored.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: PathBuf,
    /// Its stored size in bytes.
    pub bytes: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    file: usize,
    offset: usize,
    row_map: Option<RowMap>,
}

impl Entry {
    fn shape_error(&self, name: &str, expected: &str) -> FormatError {
        FormatError::Shape {
            path: self.info.file.clone(),
            tensor: name.to_owned(),
            expected: expected.to_owned(),
            got: self.info.shape.clone(),
        }
    }

    fn dtype_error(&self, name: &str, expected: &'static str) -> FormatError {
        FormatError::DtypeMismatch {
            path: self.info.file.clone(),
            tensor: name.to_owned(),
            expected,
            got: self.info.dtype.to_string(),
        }
    }

    /// The conversion to f32, or the error that it does not hold floats.
    fn f32_decoder(&self, name: &str) -> Result<decode::F32Decoder> {
        decode::to_f32(self.info.dtype).ok_or_else(|| match self.info.dtype {
            DType::Ggml(dtype) => {
                let (path, tensor) = (self.info.file.clone(), name.to_owned());
                GgufError::UnsupportedType { path, tensor, dtype }.into()
            }
            _ => self.dtype_error(name, "a float type (F32, F16, BF16, F64 or a ggml type)"),
        })
    }
}

/// Bytes that are read at once when converting: fits the second-level cache together with its result.
const CHUNK_BYTES: usize = 128 << 10;

impl TensorStore {
    /// Opens the safetensors files of a checkpoint directory: `model.safetensors`; or the shards of
    /// `model.safetensors.index.json`; or the one `*.safetensors` file or index that is there, such as AutoGPTQ's
    /// `gptq_model-4bit-128g.safetensors`.
    ///
    /// # Errors
    /// If there is none, or any file of the checkpoint is malformed or missing.
    pub fn open_dir(directory: &Path) -> Result<Self> {
        open::directory(directory)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let tensors = crate::safetensors_file::parse(&file)?;
        let tensors = tensors.into_iter().map(|t| (t, None)).collect();
        Self::from_mapped(file, tensors)
    }

    /// The tensors of a GGUF file under their Hugging Face names; permuted rows are put back in order on reading.
    ///
    /// # Errors
    /// If the architecture is not supported, or a tensor is malformed or has no place in it.
    pub fn open_gguf(gguf: &GgufFile) -> Result<Self> {
        let tensors = gguf.hf_tensors()?.into_iter().map(|t| {
            let (start, len) = (t.offset as usize, t.len as usize);
            let located = Located {
                name: t.name,
                dtype: t.dtype.into(),
                shape: t.shape,
                range: start..start.saturating_add(len),
            };
            (located, t.row_map)
        });
        Self::from_mapped(MappedFile::open(gguf.path())?, tensors.collect())
    }

    fn from_mapped(file: MappedFile, tensors: Vec<(Located, Option<RowMap>)>) -> Result<Self> {
        let mut store =
            Self { path: file.path().to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        store.add_file(file, tensors)?;
        Ok(store)
    }

    fn add_file(
        &mut self,
        file: MappedFile,
        tensors: Vec<(Located, Option<RowMap>)>,
    ) -> Result<()> {
        for (tensor, row_map) in tensors {
            let invalid = |reason: String| FormatError::NoCheckpoint {
                path: file.path().to_owned(),
                reason: format!("tensor `{}` {reason}", tensor.name),
            };
            let Range { start, end } = tensor.range;
            if start > end || end > file.len() {
                return Err(invalid(format!(
                    "lies at bytes {start} to {end} of a file of {} bytes",
                    file.len()
                )));
            }
            if tensor.dtype.byte_len(&tensor.shape) != Some(end - start) {
                return Err(invalid(format!(
                    "of shape {:?} and dtype {} cannot have {} bytes",
                    tensor.shape,
                    tensor.dtype,
                    end - start
                )));
            }
            if let Some(RowMap { heads, head_rows }) = row_map {
                let rows = tensor.shape.first().copied();
                if head_rows == 0 || head_rows % 2 != 0 || heads.checked_mul(head_rows) != rows {
                    return Err(invalid(format!(
                        "has shape {:?}, which does not divide into {heads} heads of {head_rows} rows",
                        tensor.shape
                    )));
                }
            }
            if let Some(first) = self.entries.get(&tensor.name) {
                return Err(invalid(format!("is also in `{}`", first.info.file.display())));
            }
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape,
                file: file.path().to_owned(),
                bytes: end - start,
            };
            let entry = Entry { info, file: self.files.len(), offset: start, row_map };
            self.entries.insert(tensor.name, entry);
        }
        self.files.push(file);
        Ok(())
    }

    /// The directory or file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Sum of the stored sizes of all tensors, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.entries.values().map(|e| e.info.bytes as u64).sum()
    }

    /// Dtype, shape, file and size of a tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.entry(name).map(|e| &e.info)
    }

    /// Whether the stored bytes are in logical order, so that [`TensorStore::bytes`] can give them.
    pub fn is_identity(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|e| e.row_map.is_none())
    }

    /// The stored bytes of a tensor, without copying.
    ///
    /// # Errors
    /// If there is no such tensor or its rows are stored permuted.
    pub fn bytes(&self, name: &str) -> Result<SharedBytes> {
        let entry = self.unpermuted(name)?;
        let range = entry.offset..entry.offset + entry.info.bytes;
        self.files[entry.file].share(range).ok_or_else(|| {
            // Checked when the file was added; kept as an error because a range is never worth a panic.
            entry.shape_error(name, "a range inside the file")
        })
    }

    /// Copies `out.len()` stored bytes of a tensor, from byte `offset` of it on, without touching the map.
    ///
    /// # Errors
    /// If there is no such tensor, its rows are stored permuted, the range is not inside it, or reading fails.
    pub fn copy_bytes(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        self.unpermuted(name)?;
        self.copy_stored(name, offset, out)
    }

    /// As [`TensorStore::copy_bytes`], but of a tensor whose rows are stored permuted the bytes as they lie in the file.
    ///
    /// # Errors
    /// If there is no such tensor, the range is not inside it, or reading fails.
    pub fn copy_stored(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        let entry = self.entry(name)?;
        let end = offset.checked_add(out.len());
        if end.is_none_or(|end| end > entry.info.bytes) {
            return Err(entry.shape_error(name, "more bytes than it has"));
        }
        self.files[entry.file].read_at(entry.offset + offset, out)
    }

    /// Reads a tensor of floats (F32, F16, BF16, F64 or any ggml type) as f32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its shape is not `shape`, it does not hold floats, a value is NaN or infinite, or
    /// reading fails.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let entry = self.shaped(name, shape)?;
        let decode = entry.f32_decoder(name)?;
        let mut out = vec![0.0; entry.info.elements()];
        self.read(name, entry, &decode, &mut out)?;
        Ok(out)
    }

    /// Reads `rows` of a tensor `[rows, columns]` of floats as f32 into `out: [rows.len(), columns]`, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, it has not two dimensions or not those rows, `out` has another length, it does not hold
    /// floats, a value is NaN or infinite, or reading fails.
    pub fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        let fits = match *entry.info.shape {
            [total, columns] => {
                rows.start <= rows.end
                    && rows.end <= total
                    && rows.len().checked_mul(columns) == Some(out.len())
            }
            _ => false,
        };
        if !fits {
            let expected = format!("[rows, columns] with rows {rows:?} and {} values", out.len());
            return Err(entry.shape_error(name, &expected));
        }
        let decode = entry.f32_decoder(name)?;
        self.read_rows(name, entry, &decode, rows, out)
    }

    /// Reads all floats of a tensor and keeps none; does nothing with a tensor of other types.
    ///
    /// # Errors
    /// If there is no such tensor, a value is NaN or infinite, or reading fails.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        let Some(decode) = decode::to_f32(entry.info.dtype) else { return Ok(()) };
        // Whole blocks of any type.
        let mut floats = vec![0.0; CHUNK_BYTES / size_of::<f32>()];
        let (elements, mut buffer) = (entry.info.elements(), Vec::new());
        for first in (0..elements).step_by(floats.len()) {
            let count = floats.len().min(elements - first);
            let part = &mut floats[..count];
            self.read_elements(name, entry, &decode, first, first, part, &mut buffer)?;
        }
        Ok(())
    }

    /// Reads a tensor of integers (I32, or I64 with values in range) as i32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its shape is not `shape`, it has another dtype, a value does not fit, or reading fails.
    pub fn read_i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>> {
        let entry = self.shaped(name, shape)?;
        let decode = match entry.info.dtype {
            DType::I32 => decode::i32_to_i32,
            DType::I64 => decode::i64_to_i32,
            _ => return Err(entry.dtype_error(name, "I32 or I64")),
        };
        let mut out = vec![0; entry.info.elements()];
        self.read(name, entry, &decode, &mut out)?;
        Ok(out)
    }

    /// Reads a tensor of floats (F16; F32 and BF16 are rounded) as f16, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its shape is not `shape`, it has another dtype, a value is NaN, infinite or too large
    /// for f16, or reading fails.
    pub fn read_f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>> {
        let entry = self.shaped(name, shape)?;
        let decode = match entry.info.dtype {
            DType::F16 => decode::f16_to_f16,
            DType::F32 => decode::f32_to_f16,
            DType::BF16 => decode::bf16_to_f16,
            _ => return Err(entry.dtype_error(name, "F16, F32 or BF16")),
        };
        let mut out = vec![f16::ZERO; entry.info.elements()];
        self.read(name, entry, &decode, &mut out)?;
        Ok(out)
    }

    /// The whole tensor in logical order.
    fn read<T, D>(&self, name: &str, entry: &Entry, decode: &D, out: &mut [T]) -> Result<()>
    where
        D: Fn(&[u8], &mut [T]) -> std::result::Result<(), Bad>,
    {
        if let (Some(_), Some(&rows)) = (entry.row_map, entry.info.shape.first()) {
            return self.read_rows(name, entry, decode, 0..rows, out);
        }
        self.read_elements(name, entry, decode, 0, 0, out, &mut Vec::new())
    }

    /// Logical rows; a tensor of one dimension has rows of one element.
    fn read_rows<T, D>(
        &self,
        name: &str,
        entry: &Entry,
        decode: &D,
        rows: Range<usize>,
        out: &mut [T],
    ) -> Result<()>
    where
        D: Fn(&[u8], &mut [T]) -> std::result::Result<(), Bad>,
    {
        let columns: usize = entry.info.shape.iter().skip(1).product();
        if rows.is_empty() || columns == 0 {
            return Ok(());
        }
        let mut buffer = Vec::new();
        let Some(map) = entry.row_map else {
            let first = rows.start * columns;
            return self.read_elements(name, entry, decode, first, first, out, &mut buffer);
        };
        for (row, part) in rows.zip(out.chunks_exact_mut(columns)) {
            let stored = map.source(row) * columns;
            self.read_elements(name, entry, decode, stored, row * columns, part, &mut buffer)?;
        }
        Ok(())
    }

    /// `out.len()` elements from stored element `first` on; `logical` is the index of the first for error messages. Both
    /// are multiples of the dtype's block, because rows are.
    fn read_elements<T, D>(
        &self,
        name: &str,
        entry: &Entry,
        decode: &D,
        first: usize,
        logical: usize,
        out: &mut [T],
        buffer: &mut Vec<u8>,
    ) -> Result<()>
    where
        D: Fn(&[u8], &mut [T]) -> std::result::Result<(), Bad>,
    {
        let (per_unit, unit_bytes) = entry.info.dtype.unit();
        let units = (CHUNK_BYTES / unit_bytes.max(1)).max(1);
        buffer.resize(units.min(out.len() / per_unit) * unit_bytes, 0);
        let mut offset = entry.offset + first / per_unit * unit_bytes;
        let mut index = logical;
        for part in out.chunks_mut(units * per_unit) {
            let raw = &mut buffer[..part.len() / per_unit * unit_bytes];
            self.files[entry.file].read_at(offset, raw)?;
            decode(raw, part).map_err(|bad| FormatError::Value {
                path: entry.info.file.clone(),
                tensor: name.to_owned(),
                index: index + bad.index,
                value: bad.value,
                expected: bad.expected,
            })?;
            offset += raw.len();
            index += part.len();
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        })
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let entry = self.entry(name)?;
        if entry.info.shape == shape {
            Ok(entry)
        } else {
            Err(entry.shape_error(name, &format!("{shape:?}")))
        }
    }

    fn unpermuted(&self, name: &str) -> Result<&Entry> {
        let entry = self.entry(name)?;
        if entry.row_map.is_none() {
            return Ok(entry);
        }
        Err(FormatError::Permuted { path: entry.info.file.clone(), tensor: name.to_owned() })
    }
}

#[cfg(test)]
mod tests;
