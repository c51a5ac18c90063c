//! Writing GGUF version 3: the header first, tensors in any order behind it, the name only when all are there.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{GgmlType, GgufArray, GgufValue};
use crate::error::{FormatError, Result};
use crate::fs::{parent, require_space, sibling, sync_directory};

/// Alignment of every tensor in bytes, the format's default.
const ALIGNMENT: u64 = 32;

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name in GGUF, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Storage type.
    pub dtype: GgmlType,
    /// Shape with the outermost dimension first, as everywhere but in the file: `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
}

/// A GGUF file being written: a hidden sibling `.NAME.partial`, locked against a second run, that takes the final name on
/// [`GgufWriter::finish`]. Dropped before that it is removed.
#[derive(Debug)]
pub struct GgufWriter {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    finished: bool,
    tensors: HashMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    /// From the start of the file.
    offset: u64,
    bytes: u64,
    done: u64,
}

impl GgufWriter {
    /// Lays out the file and writes its header. Metadata keep their order; integers become 32 bits wide where they fit,
    /// which is the width that llama.cpp asks for.
    ///
    /// # Errors
    /// If `target` exists and `overwrite` is false, another run writes to it, a name occurs twice, a type or shape cannot
    /// be stored, the disk has no room for the file, or it cannot be written.
    pub fn create(
        target: &Path,
        overwrite: bool,
        metadata: &[(String, GgufValue)],
        tensors: &[PlannedTensor],
    ) -> Result<Self> {
        match fs::symlink_metadata(target) {
            Ok(meta) if meta.is_dir() => {
                let source = std::io::Error::from(std::io::ErrorKind::IsADirectory);
                return Err(FormatError::io("write to", target)(source));
            }
            Ok(_) if !overwrite => return Err(FormatError::FileExists { path: target.to_owned() }),
            _ => {}
        }
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut slots = HashMap::with_capacity(tensors.len());
        let mut offset = 0u64;
        for tensor in tensors {
            let bytes = stored_bytes(tensor)?;
            string(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            header.extend(tensor.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
            header.extend(tensor.dtype.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            let slot = Slot { offset, bytes, done: 0 };
            if slots.insert(tensor.name.clone(), slot).is_some() {
                return Err(write_error(&tensor.name, "it is planned twice"));
            }
            offset = bytes
                .checked_add(offset)
                .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
                .ok_or_else(|| write_error(&tensor.name, "the file would be too large"))?;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        for slot in slots.values_mut() {
            slot.offset += header.len() as u64;
        }

        let partial = sibling(target, ".partial")?;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&partial)
            .map_err(FormatError::io("create", &partial))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(FormatError::Locked { path: target.to_owned(), lock: partial });
            }
            Err(TryLockError::Error(source)) => {
                return Err(FormatError::io("lock", &partial)(source));
            }
        }
        let writer =
            Self { file, partial, target: target.to_owned(), finished: false, tensors: slots };
        // What an interrupted run left behind goes first.
        writer.file.set_len(0).map_err(FormatError::io("write", &writer.partial))?;
        let bytes = header.len() as u64 + offset;
        require_space(parent(target), bytes)?;
        writer
            .file
            .set_len(bytes)
            .and_then(|()| writer.file.write_all_at(&header, 0))
            .map_err(FormatError::io("write", &writer.partial))?;
        Ok(writer)
    }

    /// Writes the next bytes of a tensor, behind those that were appended to it before.
    ///
    /// # Errors
    /// If the tensor is not planned or would become too long, or the file cannot be written.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot =
            self.tensors.get_mut(name).ok_or_else(|| write_error(name, "it is not planned"))?;
        let end = slot.done + bytes.len() as u64;
        if end > slot.bytes {
            let reason = format!("{end} bytes were given, but {} are planned", slot.bytes);
            return Err(write_error(name, &reason));
        }
        self.file
            .write_all_at(bytes, slot.offset + slot.done)
            .map_err(FormatError::io("write", &self.partial))?;
        slot.done = end;
        Ok(())
    }

    /// Checks that every tensor is whole, makes the file durable and gives it its name.
    ///
    /// # Errors
    /// If a tensor is incomplete or a step fails; the unfinished file is removed then.
    pub fn finish(mut self) -> Result<PathBuf> {
        if let Some((name, slot)) = self.tensors.iter().find(|(_, slot)| slot.done != slot.bytes) {
            let reason = format!("{} of {} bytes were written", slot.done, slot.bytes);
            return Err(write_error(name, &reason));
        }
        self.file.sync_all().map_err(FormatError::io("sync", &self.partial))?;
        fs::rename(&self.partial, &self.target)
            .map_err(FormatError::io("rename into", &self.target))?;
        self.finished = true;
        sync_directory(parent(&self.target))?;
        Ok(self.target.clone())
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Errors cannot be reported from here; a leftover is overwritten by the next run.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn stored_bytes(tensor: &PlannedTensor) -> Result<u64> {
    let fail = |reason: &str| {
        write_error(
            &tensor.name,
            &format!("{reason} ({} of shape {:?})", tensor.dtype, tensor.shape),
        )
    };
    let (per_block, _) = tensor.dtype.block().ok_or_else(|| fail("its type is not known"))?;
    let [.., columns] = tensor.shape.as_slice() else {
        return Err(fail("it has no dimension"));
    };
    if tensor.shape.len() > 4 {
        return Err(fail("it has more than 4 dimensions"));
    }
    if !columns.is_multiple_of(per_block) {
        return Err(fail("its rows are no whole number of blocks"));
    }
    tensor
        .shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d as u64))
        .filter(|&n| n > 0)
        .and_then(|n| tensor.dtype.byte_len(n))
        .ok_or_else(|| fail("its size is impossible"))
}

fn write_error(tensor: &str, reason: &str) -> FormatError {
    FormatError::ShardWrite { tensor: tensor.to_owned(), reason: reason.to_owned() }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A value with its type number before it; the numbers are those of [`super::header`].
fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    let mut put = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        GgufValue::Uint(v) => match u32::try_from(*v) {
            Ok(v) => put(4, &v.to_le_bytes()),
            Err(_) => put(10, &v.to_le_bytes()),
        },
        GgufValue::Int(v) => match i32::try_from(*v) {
            Ok(v) => put(5, &v.to_le_bytes()),
            Err(_) => put(11, &v.to_le_bytes()),
        },
        GgufValue::F32(v) => put(6, &v.to_le_bytes()),
        GgufValue::F64(v) => put(12, &v.to_le_bytes()),
        GgufValue::Bool(v) => put(7, &[u8::from(*v)]),
        GgufValue::String(v) => {
            put(8, &[]);
            string(out, v);
        }
        GgufValue::Array(v) => {
            put(9, &[]);
            put_array(out, v);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    let mut open = |kind: u32| {
        out.extend(kind.to_le_bytes());
        out.extend((array.len() as u64).to_le_bytes());
    };
    match array {
        GgufArray::U8(v) => {
            open(0);
            out.extend(v);
        }
        GgufArray::I8(v) => {
            open(1);
            out.extend(v.iter().map(|x| x.cast_unsigned()));
        }
        GgufArray::U16(v) => {
            open(2);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::I16(v) => {
            open(3);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::U32(v) => {
            open(4);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::I32(v) => {
            open(5);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::F32(v) => {
            open(6);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::Bool(v) => {
            open(7);
            out.extend(v.iter().map(|&x| u8::from(x)));
        }
        GgufArray::String(v) => {
            open(8);
            for text in v {
                string(out, text);
            }
        }
        GgufArray::Array(v) => {
            open(9);
            for array in v {
                put_array(out, array);
            }
        }
        GgufArray::U64(v) => {
            open(10);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::I64(v) => {
            open(11);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufArray::F64(v) => {
            open(12);
            out.extend(v.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;

    fn tensor(name: &str, dtype: GgmlType, shape: &[usize]) -> PlannedTensor {
        PlannedTensor { name: name.into(), dtype, shape: shape.into() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let metadata: Vec<(String, GgufValue)> = vec![
            ("general.architecture".into(), GgufValue::String("llama".into())),
            ("u".into(), GgufValue::Uint(7)),
            ("big".into(), GgufValue::Uint(1 << 40)),
            ("i".into(), GgufValue::Int(-3)),
            ("f".into(), GgufValue::F32(1e-5)),
            ("d".into(), GgufValue::F64(0.5)),
            ("b".into(), GgufValue::Bool(true)),
            ("s".into(), GgufValue::Array(GgufArray::String(vec!["é".into(), String::new()]))),
            ("n".into(), GgufValue::Array(GgufArray::I32(vec![-1, 6]))),
            (
                "nested".into(),
                GgufValue::Array(GgufArray::Array(vec![
                    GgufArray::U8(vec![1]),
                    GgufArray::Bool(vec![false]),
                ])),
            ),
        ];
        let tensors = [tensor("a", GgmlType::F32, &[3]), tensor("b", GgmlType::Q4_0, &[2, 32])];
        let mut writer = GgufWriter::create(&path, false, &metadata, &tensors).unwrap();
        let blocks: Vec<u8> = (0..36).collect();
        writer.append("b", &blocks[..18]).unwrap();
        writer.append("a", &[1.0f32, 2.0, 3.0].map(f32::to_le_bytes).concat()).unwrap();
        writer.append("b", &blocks[18..]).unwrap();
        assert!(!path.exists());
        assert_eq!(writer.finish().unwrap(), path);

        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.header().version, 3);
        for (key, value) in &metadata {
            assert_eq!(file.value(key), Some(value), "{key}");
        }
        assert_eq!(file.tensor("b").unwrap().dims, [32, 2]);
        assert_eq!(file.read_f32(file.tensor("a").unwrap()).unwrap(), [1.0, 2.0, 3.0]);
        let bytes = fs::read(&path).unwrap();
        let at = file.tensor("b").unwrap().offset as usize;
        assert_eq!(bytes[at..at + 36], blocks);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_unfinished_file_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let tensors = [tensor("a", GgmlType::F32, &[3])];
        let mut writer = GgufWriter::create(&path, false, &[], &tensors).unwrap();
        let second = GgufWriter::create(&path, false, &[], &tensors);
        assert!(matches!(second, Err(FormatError::Locked { .. })));
        writer.append("a", &[0; 4]).unwrap();
        assert!(writer.append("a", &[0; 9]).is_err());
        assert!(writer.append("b", &[]).is_err());
        let message = writer.finish().unwrap_err().to_string();
        assert!(message.contains("4 of 12 bytes"), "{message}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_file_is_replaced_only_when_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        fs::write(&path, "old").unwrap();
        let create = |overwrite| GgufWriter::create(&path, overwrite, &[], &[]);
        assert!(matches!(create(false), Err(FormatError::FileExists { .. })));
        create(true).unwrap().finish().unwrap();
        assert!(fs::read(&path).unwrap().starts_with(b"GGUF"));
        assert!(GgufWriter::create(dir.path(), true, &[], &[]).is_err());
    }

    #[test]
    fn tensors_that_cannot_be_stored_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |tensors: &[PlannedTensor], part: &str| {
            let path = dir.path().join("a.gguf");
            let message = GgufWriter::create(&path, false, &[], tensors).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        refused(&[tensor("a", GgmlType::Q8_0, &[2, 48])], "blocks");
        refused(&[tensor("a", GgmlType::F32, &[])], "no dimension");
        refused(&[tensor("a", GgmlType::F32, &[0])], "impossible");
        refused(&[tensor("a", GgmlType::F32, &[usize::MAX, 2])], "impossible");
        refused(&[tensor("a", GgmlType::Other(99), &[1])], "not known");
        refused(
            &[tensor("a", GgmlType::F32, &[1]), tensor("a", GgmlType::F32, &[1])],
            "planned twice",
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
