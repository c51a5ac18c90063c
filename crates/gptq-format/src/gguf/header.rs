//! The header of a GGUF file: metadata and tensor descriptions.
//!
//! Layout (little endian), from the GGUF specification in the ggml repository: magic `GGUF`, version u32, tensor count
//! u64, key count u64, then the keys (`string` name, u32 type, value), then the tensors (`string` name, u32 number of
//! dimensions, u64 each, u32 type, u64 offset from the data section), then padding up to `general.alignment`, then the
//! data section. A `string` is a u64 length and that many bytes of UTF-8.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::value::{GgufArray, GgufValue};
use super::{GgmlType, GgufError};

/// Alignment of the data section where `general.alignment` is absent, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Longest name of a key or tensor that is accepted, in bytes; the specification allows 65535.
const MAX_NAME: u64 = 65535;
/// How deep arrays may nest; the specification gives no use for more than one level.
const MAX_NESTING: usize = 4;

/// The parsed header of a GGUF file. All ranges have been checked against the file's length.
#[derive(Debug, Clone)]
pub struct GgufHeader {
    /// Format version, 2 or 3.
    pub version: u32,
    /// All metadata.
    pub metadata: BTreeMap<String, GgufValue>,
    /// All tensors, in file order.
    pub tensors: Vec<GgufTensor>,
}

/// One tensor of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name in the file, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions as stored: the fastest-running first, so a linear layer is `[in, out]`.
    pub dims: Vec<u64>,
    /// Storage type.
    pub dtype: GgmlType,
    /// Absolute position of the data in the file, in bytes.
    pub offset: u64,
    /// Length of the data in bytes; 0 where the type is [`GgmlType::Other`].
    pub len: u64,
}

/// Reads the header from the first bytes of a file.
///
/// `bytes` is a prefix of the file and `file_len` the length of the whole file in bytes; tensor data need not be in the
/// prefix. Total: any input gives a header or an error, and no more memory is taken than a small multiple of `bytes`.
///
/// # Errors
/// [`GgufError::Truncated`] if the header runs past the prefix (the caller may come back with a longer one if the file
/// has more), otherwise the variant for what is wrong, naming the key or tensor.
pub fn parse(bytes: &[u8], file_len: u64, path: &Path) -> Result<GgufHeader, GgufError> {
    let mut r = Reader { bytes, position: 0, path };
    if r.take(4, "magic")? != b"GGUF" {
        return Err(GgufError::NotGguf { path: path.into() });
    }
    let version = r.u32("version")?;
    if matches!(version.swap_bytes(), 1..=3) {
        return Err(GgufError::BigEndian { path: path.into() });
    }
    if !matches!(version, 2 | 3) {
        return Err(GgufError::Version { path: path.into(), version });
    }
    // The smallest tensor entry is 8 + 4 + 8 + 4 + 8 bytes, the smallest key 8 + 4 + 1.
    let tensor_count = r.u64("tensor count")?;
    let key_count = r.u64("key count")?;
    let metadata = read_metadata(&mut r, key_count)?;
    if let Some(parts) = metadata.get("split.count").and_then(GgufValue::as_u64)
        && parts > 1
    {
        return Err(GgufError::Split { path: path.into(), parts });
    }
    let alignment = read_alignment(&metadata, path)?;
    let mut tensors = read_tensors(&mut r, tensor_count)?;
    let data_start = (r.position as u64).next_multiple_of(alignment);
    place_tensors(&mut tensors, data_start, alignment, file_len, path)?;
    Ok(GgufHeader { version, metadata, tensors })
}

fn read_metadata(r: &mut Reader<'_>, count: u64) -> Result<BTreeMap<String, GgufValue>, GgufError> {
    r.check_count(count, 13, "metadata keys")?;
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = r.name(&format!("key {index}"))?;
        let kind = r.u32(&key)?;
        let value = read_value(r, kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(r.malformed(&key, "the key occurs twice"));
        }
    }
    Ok(metadata)
}

fn read_value(r: &mut Reader<'_>, kind: u32, key: &str) -> Result<GgufValue, GgufError> {
    Ok(match kind {
        0 => GgufValue::Uint(u64::from(u8::from_le_bytes(r.array(key)?))),
        1 => GgufValue::Int(i64::from(i8::from_le_bytes(r.array(key)?))),
        2 => GgufValue::Uint(u64::from(u16::from_le_bytes(r.array(key)?))),
        3 => GgufValue::Int(i64::from(i16::from_le_bytes(r.array(key)?))),
        4 => GgufValue::Uint(u64::from(u32::from_le_bytes(r.array(key)?))),
        5 => GgufValue::Int(i64::from(i32::from_le_bytes(r.array(key)?))),
        6 => GgufValue::F32(f32::from_le_bytes(r.array(key)?)),
        7 => GgufValue::Bool(r.bool(key)?),
        8 => GgufValue::String(r.string(key)?),
        9 => GgufValue::Array(read_array(r, key, MAX_NESTING)?),
        10 => GgufValue::Uint(u64::from_le_bytes(r.array(key)?)),
        11 => GgufValue::Int(i64::from_le_bytes(r.array(key)?)),
        12 => GgufValue::F64(f64::from_le_bytes(r.array(key)?)),
        other => return Err(r.malformed(key, &format!("value type {other} does not exist"))),
    })
}

fn read_array(r: &mut Reader<'_>, key: &str, nesting: usize) -> Result<GgufArray, GgufError> {
    let kind = r.u32(key)?;
    let count = r.u64(key)?;
    Ok(match kind {
        0 => GgufArray::U8(r.numbers(count, key, u8::from_le_bytes)?),
        1 => GgufArray::I8(r.numbers(count, key, i8::from_le_bytes)?),
        2 => GgufArray::U16(r.numbers(count, key, u16::from_le_bytes)?),
        3 => GgufArray::I16(r.numbers(count, key, i16::from_le_bytes)?),
        4 => GgufArray::U32(r.numbers(count, key, u32::from_le_bytes)?),
        5 => GgufArray::I32(r.numbers(count, key, i32::from_le_bytes)?),
        6 => GgufArray::F32(r.numbers(count, key, f32::from_le_bytes)?),
        7 => {
            r.check_count(count, 1, key)?;
            GgufArray::Bool((0..count).map(|_| r.bool(key)).collect::<Result<_, _>>()?)
        }
        8 => {
            r.check_count(count, 8, key)?;
            GgufArray::String((0..count).map(|_| r.string(key)).collect::<Result<_, _>>()?)
        }
        9 => {
            if nesting == 0 {
                return Err(r.malformed(key, &format!("arrays nest deeper than {MAX_NESTING}")));
            }
            r.check_count(count, 12, key)?;
            GgufArray::Array(
                (0..count).map(|_| read_array(r, key, nesting - 1)).collect::<Result<_, _>>()?,
            )
        }
        10 => GgufArray::U64(r.numbers(count, key, u64::from_le_bytes)?),
        11 => GgufArray::I64(r.numbers(count, key, i64::from_le_bytes)?),
        12 => GgufArray::F64(r.numbers(count, key, f64::from_le_bytes)?),
        other => return Err(r.malformed(key, &format!("array type {other} does not exist"))),
    })
}

fn read_alignment(metadata: &BTreeMap<String, GgufValue>, path: &Path) -> Result<u64, GgufError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    // ggml demands a power of two as well; the upper bound keeps the arithmetic below far from overflow.
    match value.as_u64() {
        Some(a) if a.is_power_of_two() && a <= 1 << 20 => Ok(a),
        _ => Err(GgufError::Value {
            path: path.into(),
            key: "general.alignment".into(),
            expected: "a power of two of at most 1048576".into(),
            got: value.describe(),
        }),
    }
}

/// Reads the tensor table; offsets stay relative to the data section and lengths 0.
fn read_tensors(r: &mut Reader<'_>, count: u64) -> Result<Vec<GgufTensor>, GgufError> {
    r.check_count(count, 32, "tensors")?;
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for index in 0..count {
        let name = r.name(&format!("tensor {index}"))?;
        let rank = r.u32(&name)?;
        if !(1..=4).contains(&rank) {
            return Err(r.tensor(&name, format!("has {rank} dimensions, expected 1 to 4")));
        }
        let dims = (0..rank).map(|_| r.u64(&name)).collect::<Result<Vec<_>, _>>()?;
        let dtype = GgmlType::from_id(r.u32(&name)?);
        let offset = r.u64(&name)?;
        if !names.insert(name.clone()) {
            return Err(r.tensor(&name, "occurs twice".into()));
        }
        tensors.push(GgufTensor { name, dims, dtype, offset, len: 0 });
    }
    Ok(tensors)
}

/// Makes offsets absolute, fills in lengths, and refuses tensors that are misaligned, outside the file or overlapping.
fn place_tensors(
    tensors: &mut [GgufTensor],
    data_start: u64,
    alignment: u64,
    file_len: u64,
    path: &Path,
) -> Result<(), GgufError> {
    for t in tensors.iter_mut() {
        let fail = |reason: String| GgufError::Tensor {
            path: path.into(),
            tensor: t.name.clone(),
            reason,
        };
        let elements = t
            .dims
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .filter(|&n| n > 0 && i64::try_from(n).is_ok())
            .ok_or_else(|| fail(format!("has the impossible shape {:?}", t.dims)))?;
        if !t.offset.is_multiple_of(alignment) {
            return Err(fail(format!(
                "begins at offset {}, which is no multiple of the alignment {alignment}",
                t.offset
            )));
        }
        let len = match t.dtype.block() {
            None => 0,
            Some((per_block, _)) if !t.dims[0].is_multiple_of(per_block as u64) => {
                return Err(fail(format!(
                    "has rows of {} values, no multiple of the {per_block} in a block of {}",
                    t.dims[0], t.dtype
                )));
            }
            Some(_) => t
                .dtype
                .byte_len(elements)
                .ok_or_else(|| fail(format!("has the impossible shape {:?}", t.dims)))?,
        };
        let offset = data_start.checked_add(t.offset);
        let end = offset.and_then(|o| o.checked_add(len));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= file_len => (t.offset, t.len) = (offset, len),
            _ => {
                return Err(fail(format!(
                    "needs {len} bytes at offset {} of the data section, but the file ends at byte {file_len} \
                     (data section at {data_start}); the file is truncated or damaged",
                    t.offset
                )));
            }
        }
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().filter(|t| t.len > 0).collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        // The sum was checked against the file's length above.
        if pair[0].offset + pair[0].len > pair[1].offset {
            return Err(GgufError::Tensor {
                path: path.into(),
                tensor: pair[1].name.clone(),
                reason: format!("overlaps tensor `{}`", pair[0].name),
            });
        }
    }
    Ok(())
}

/// A cursor over the header bytes whose every failure names the file and what was read.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], GgufError> {
        if n > self.remaining() {
            return Err(self.truncated(what, n as u64));
        }
        let slice = &self.bytes[self.position..self.position + n];
        self.position += n;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn bool(&mut self, what: &str) -> Result<bool, GgufError> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.malformed(what, &format!("{other} is no boolean"))),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let len = self.u64(what)?;
        self.check_count(len, 1, what)?;
        // check_count bounded the length by the slice's.
        let bytes = self.take(len as usize, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(self.malformed(what, &format!("text is not UTF-8: {e}"))),
        }
    }

    fn name(&mut self, what: &str) -> Result<String, GgufError> {
        let start = self.position;
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME || name.contains(char::is_control) {
            return Err(self.malformed(
                what,
                &format!("the name at byte {start} is empty, too long or has control characters"),
            ));
        }
        Ok(name)
    }

    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        what: &str,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        self.check_count(count, N as u64, what)?;
        // check_count bounded the product by the slice's length.
        let bytes = self.take(count as usize * N, what)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&b| decode(b)).collect())
    }

    /// Refuses a count that cannot fit into the bytes that are left, at `size` bytes or more each.
    fn check_count(&self, count: u64, size: u64, what: &str) -> Result<(), GgufError> {
        match count.checked_mul(size) {
            Some(needed) if needed <= self.remaining() as u64 => Ok(()),
            needed => Err(self.truncated(what, needed.unwrap_or(u64::MAX))),
        }
    }

    fn truncated(&self, what: &str, needed: u64) -> GgufError {
        GgufError::Truncated {
            path: self.path.into(),
            what: what.into(),
            position: self.position as u64,
            needed,
        }
    }

    fn malformed(&self, what: &str, reason: &str) -> GgufError {
        GgufError::Malformed { path: self.path.into(), what: what.into(), reason: reason.into() }
    }

    fn tensor(&self, name: &str, reason: String) -> GgufError {
        GgufError::Tensor { path: self.path.into(), tensor: name.into(), reason }
    }
}

#[cfg(test)]
mod tests;
