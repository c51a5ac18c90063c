//! Read-only memory maps: the only unsafe code of this crate.

use crate::error::{FormatError, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An open file that can be read through a map (zero-copy) or by copying.
///
/// Pages touched through the map count as resident memory of the process until the kernel reclaims them; bulk reads that
/// are converted anyway should use [`MappedFile::read_at`], which leaves them in the page cache only.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: Arc<Mmap>,
}

impl MappedFile {
    /// Opens and maps `path`.
    ///
    /// # Errors
    /// If the file cannot be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(FormatError::io("open", path))?;
        let meta = file.metadata().map_err(FormatError::io("read", path))?;
        if !meta.is_file() {
            let not_file = std::io::Error::other("not a regular file");
            return Err(FormatError::io("open", path)(not_file));
        }
        // SAFETY: the map is private and read-only. As with every map, its contents change if another process writes to
        // the file; all parsing copies what it validates, and tensor bytes are plain numbers without invalid values.
        // Truncation by another process would raise SIGBUS, which no API can exclude.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io("map", path))?;
        Ok(Self { path: path.to_owned(), file, map: Arc::new(map) })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// A shared view of `range`; `None` if it does not lie in the file.
    pub fn share(&self, range: Range<usize>) -> Option<SharedBytes> {
        self.map.get(range.clone())?;
        Some(SharedBytes { map: Arc::clone(&self.map), range })
    }

    /// Copies `out.len()` bytes from `offset` on, without touching the map.
    ///
    /// # Errors
    /// If the file cannot be read or ends early.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset as u64).map_err(FormatError::io("read", &self.path))
    }
}

/// A range of a mapped file that keeps the map alive. Cheap to clone, can be sent to other threads.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        // `MappedFile::share` checked the range.
        &self.map[self.range.clone()]
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}
