//! Files that appear whole or not at all.

use crate::error::{FormatError, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Largest JSON file that is read, in bytes; the same limit as for safetensors headers.
pub const MAX_JSON_BYTES: u64 = 100_000_000;

/// Reads a JSON file of at most [`MAX_JSON_BYTES`].
///
/// # Errors
/// If the file cannot be read, is too large, or is not JSON.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_slice(&read_limited(path, MAX_JSON_BYTES)?)
        .map_err(|source| FormatError::Json { path: path.to_owned(), source })
}

/// Like [`read_json`], with `None` where there is no such file.
///
/// # Errors
/// As [`read_json`], except for a missing file.
pub fn read_json_if_exists(path: &Path) -> Result<Option<serde_json::Value>> {
    match path.try_exists() {
        Ok(false) => Ok(None),
        _ => read_json(path).map(Some),
    }
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// If the file cannot be read or is larger.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(FormatError::io("open", path))?;
    let bytes = file.metadata().map_err(FormatError::io("read", path))?.len();
    let too_large = |bytes| FormatError::TooLarge { path: path.to_owned(), bytes, limit };
    if bytes > limit {
        return Err(too_large(bytes));
    }
    // The size of a pipe or a device is reported as 0, so the limit is enforced on what is read too.
    let mut data = Vec::with_capacity(bytes as usize);
    file.take(limit + 1).read_to_end(&mut data).map_err(FormatError::io("read", path))?;
    if data.len() as u64 > limit {
        return Err(too_large(data.len() as u64));
    }
    Ok(data)
}

/// Writes `bytes` to `path` so that the path holds either its old content or all of the new, also after a power cut:
/// temporary file in the same directory, fsync, rename, fsync of the directory.
///
/// # Errors
/// If any step fails; the temporary file is removed then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling(path, &format!(".tmp-{}", std::process::id()))?;
    let write = || -> Result<()> {
        let mut file = File::create(&temporary).map_err(FormatError::io("create", &temporary))?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(FormatError::io("write", &temporary))?;
        fs::rename(&temporary, path).map_err(FormatError::io("rename into", path))?;
        sync_directory(parent(path))
    };
    write().inspect_err(|_| {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    })
}

/// Makes the names in `directory` durable.
///
/// # Errors
/// If the directory cannot be opened or synced.
pub fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|d| d.sync_all()).map_err(FormatError::io("sync", directory))
}

/// Refuses to begin what the disk of `directory` has no room for. Where the file system does not tell what is free, all
/// fits.
///
/// # Errors
/// If less than `bytes` are free there.
pub fn require_space(directory: &Path, bytes: u64) -> Result<()> {
    // Some network and user-space file systems have no blocks to count.
    let known = rustix::fs::statvfs(directory).ok().filter(|disk| disk.f_blocks > 0);
    let available = known.map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    if bytes > available {
        return Err(FormatError::NoSpace { path: directory.to_owned(), needed: bytes, available });
    }
    Ok(())
}

/// A directory being written: a hidden sibling `.NAME.partial` of the final directory, locked against a second run, that
/// takes the final name on [`OutputDir::commit`]. Dropped without commit it is removed, unless [`OutputDir::keep`] was
/// called.
#[derive(Debug)]
pub struct OutputDir {
    partial: PathBuf,
    target: PathBuf,
    overwrite: bool,
    keep: bool,
    committed: bool,
    /// Held for its lock.
    _lock: File,
}

const LOCK_NAME: &str = ".lock";
/// What follows the name of a directory that is being replaced.
const REPLACED: &str = ".replaced-by-gptq";
/// What follows the name of an unfinished one that is being deleted, before the number of the process.
const DROPPED: &str = ".dropped-by-gptq-";

impl OutputDir {
    /// Starts afresh: what an interrupted run left behind is deleted.
    ///
    /// # Errors
    /// If `target` exists with content and `overwrite` is false, if another run holds the lock, or if the directory
    /// cannot be created.
    pub fn create(target: &Path, overwrite: bool) -> Result<Self> {
        let dir = Self::resume(target, overwrite)?;
        for entry in fs::read_dir(&dir.partial).map_err(FormatError::io("list", &dir.partial))? {
            let path = entry.map_err(FormatError::io("list", &dir.partial))?.path();
            if path.file_name() == Some(LOCK_NAME.as_ref()) {
                continue;
            }
            let is_dir = path.symlink_metadata().is_ok_and(|m| m.is_dir());
            if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .map_err(FormatError::io("remove", &path))?;
        }
        Ok(dir)
    }

    /// Opens what an interrupted run left behind, or starts afresh where there is nothing.
    ///
    /// # Errors
    /// As [`OutputDir::create`].
    pub fn resume(target: &Path, overwrite: bool) -> Result<Self> {
        let target = &behind_link(target)?;
        check_target(target, overwrite)?;
        let partial = Self::partial_path(target)?;
        fs::create_dir_all(&partial).map_err(FormatError::io("create", &partial))?;
        let lock_path = partial.join(LOCK_NAME);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(FormatError::io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(FormatError::Locked { path: target.to_owned(), lock: lock_path });
            }
            Err(TryLockError::Error(source)) => {
                return Err(FormatError::io("lock", &lock_path)(source));
            }
        }
        recover(target)?;
        check_target(target, overwrite)?;
        Ok(Self {
            partial,
            target: target.to_owned(),
            overwrite,
            keep: false,
            committed: false,
            _lock: lock,
        })
    }

    /// Where the unfinished output of `target` lies.
    ///
    /// # Errors
    /// If `target` has no file name (`/`, `..`).
    pub fn partial_path(target: &Path) -> Result<PathBuf> {
        sibling(&behind_link(target)?, ".partial")
    }

    /// The directory to write into.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// The directory it will become.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Leaves the unfinished directory in place on drop, to be resumed.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Syncs the directory and gives it its final name.
    ///
    /// # Errors
    /// If the final directory has content meanwhile and may not be overwritten, or a rename fails; the unfinished
    /// directory is kept then.
    pub fn commit(mut self) -> Result<PathBuf> {
        // Hours of work are in there: from now on nothing may delete it.
        self.keep = true;
        check_target(&self.target, self.overwrite)?;
        sync_directory(&self.partial)?;
        let replaced = sibling(&self.target, REPLACED)?;
        // rename(2) replaces an empty directory, but not one with content.
        let occupied = has_content(&self.target)?;
        if occupied {
            fs::rename(&self.target, &replaced).map_err(FormatError::io("rename", &self.target))?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.target) {
            if occupied {
                // Put the old output back; the error to report is the first one.
                let _ = fs::rename(&replaced, &self.target);
            }
            return Err(FormatError::io("rename into", &self.target)(source));
        }
        self.committed = true;
        if occupied {
            fs::remove_dir_all(&replaced).map_err(FormatError::io("remove", &replaced))?;
        }
        // Only now: while it had the name, the lock file kept other runs out.
        let lock = self.target.join(LOCK_NAME);
        fs::remove_file(&lock).map_err(FormatError::io("remove", &lock))?;
        sync_directory(parent(&self.target))?;
        Ok(self.target.clone())
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if self.committed || self.keep {
            return;
        }
        // Renamed first, so that a run starting now does not lock a directory that is being deleted. Errors cannot be
        // reported from here; a leftover is deleted by the next run.
        let Ok(doomed) = sibling(&self.target, &format!("{DROPPED}{}", std::process::id())) else {
            return;
        };
        if fs::rename(&self.partial, &doomed).is_ok() {
            let _ = fs::remove_dir_all(&doomed);
        }
    }
}

/// Ends what a run left that was stopped while it replaced `target`: the old directory gets its name back, or goes if the
/// new one has it. What a run was deleting when it was stopped goes, too.
fn recover(target: &Path) -> Result<()> {
    let dropped = sibling(target, DROPPED)?;
    let dropped = dropped.file_name().unwrap_or_default().as_encoded_bytes();
    for entry in fs::read_dir(parent(target)).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(dropped) {
            // Another run may be at it.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let replaced = sibling(target, REPLACED)?;
    if !replaced.is_dir() {
        return Ok(());
    }
    if target.exists() {
        fs::remove_dir_all(&replaced).map_err(FormatError::io("remove", &replaced))
    } else {
        fs::rename(&replaced, target).map_err(FormatError::io("rename", &replaced))
    }
}

/// What a link names, so that the output is made on the disk that it will be on.
fn behind_link(target: &Path) -> Result<PathBuf> {
    if target.is_symlink() {
        return fs::canonicalize(target).map_err(FormatError::io("follow", target));
    }
    Ok(target.to_owned())
}

fn check_target(target: &Path, overwrite: bool) -> Result<()> {
    match fs::metadata(target) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(FormatError::io("read", target)(e)),
        Ok(meta) if !meta.is_dir() => {
            let source = std::io::Error::from(ErrorKind::NotADirectory);
            Err(FormatError::io("write to", target)(source))
        }
        Ok(_) if !overwrite && has_content(target)? => {
            Err(FormatError::OutputExists { path: target.to_owned() })
        }
        // No rename(2) replaces it.
        Ok(meta) if fs::metadata(parent(target)).is_ok_and(|p| p.dev() != meta.dev()) => {
            let source =
                std::io::Error::other("it is a mount point; name a directory inside of it");
            Err(FormatError::io("replace", target)(source))
        }
        Ok(_) => Ok(()),
    }
}

fn has_content(directory: &Path) -> Result<bool> {
    match fs::read_dir(directory) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(FormatError::io("list", directory)(e)),
    }
}

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// `.NAME<suffix>` beside `path`.
pub(crate) fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        let source = std::io::Error::other("the path has no last component to name the output");
        return Err(FormatError::io("write to", path)(source));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    Ok(path.with_file_name(hidden))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn atomic_write_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn atomic_write_into_missing_directory_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("no/a.json");
        let message = write_atomic(&path, b"x").unwrap_err().to_string();
        assert!(message.contains("no/.a.json.tmp"), "{message}");
    }

    #[test]
    fn files_over_the_limit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [0; 11]).unwrap();
        assert!(matches!(read_limited(&path, 10), Err(FormatError::TooLarge { bytes: 11, .. })));
        assert_eq!(read_limited(&path, 11).unwrap().len(), 11);
    }

    #[test]
    fn what_no_disk_holds_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        require_space(dir.path(), 0).unwrap();
        let message = require_space(dir.path(), u64::MAX - 1).unwrap_err().to_string();
        assert!(message.contains("are free on its disk"), "{message}");
        // What is wrong with it is told by those who write there.
        require_space(&dir.path().join("missing"), u64::MAX - 1).unwrap();
    }

    #[test]
    fn a_link_is_followed_and_a_mount_point_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("disk/real"), dir.path().join("out"));
        fs::create_dir_all(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let out = OutputDir::create(&link, false).unwrap();
        assert_eq!(out.path(), dir.path().canonicalize().unwrap().join("disk/.real.partial"));
        assert_eq!(OutputDir::partial_path(&link).unwrap(), out.path());
        fs::write(out.path().join("x"), "1").unwrap();
        out.commit().unwrap();
        assert_eq!((names(&link), link.is_symlink()), (vec!["x".to_owned()], true));
        let message = OutputDir::create(Path::new("/proc"), true).unwrap_err().to_string();
        assert!(message.contains("mount point"), "{message}");
    }

    #[test]
    fn output_appears_only_on_commit() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let out = OutputDir::create(&target, false).unwrap();
        fs::write(out.path().join("x"), "1").unwrap();
        assert!(!target.exists());
        out.commit().unwrap();
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(names(&target), ["x"]);
    }

    #[test]
    fn dropped_output_is_removed_and_kept_output_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        drop(OutputDir::create(&target, false).unwrap());
        assert!(names(dir.path()).is_empty());

        let mut out = OutputDir::create(&target, false).unwrap();
        out.keep();
        fs::write(out.path().join("x"), "1").unwrap();
        drop(out);
        let out = OutputDir::resume(&target, false).unwrap();
        assert_eq!(names(out.path()), [".lock", "x"]);
        let mut out = out;
        out.keep();
        drop(out);
        let out = OutputDir::create(&target, false).unwrap();
        assert_eq!(names(out.path()), [".lock"]);
    }

    #[test]
    fn what_a_stopped_run_was_deleting_goes_with_the_next() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".out.dropped-by-gptq-7/x", ".outer.dropped-by-gptq-7"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        OutputDir::create(&dir.path().join("out"), false).unwrap().commit().unwrap();
        assert_eq!(names(dir.path()), [".outer.dropped-by-gptq-7", "out"]);
    }

    #[test]
    fn second_run_into_one_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let first = OutputDir::create(&target, false).unwrap();
        assert!(matches!(OutputDir::create(&target, false), Err(FormatError::Locked { .. })));
        assert!(first.path().exists());
    }

    #[test]
    fn existing_content_is_replaced_only_when_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        OutputDir::create(&target, false).unwrap().commit().unwrap();
        fs::write(target.join("old"), "1").unwrap();
        assert!(matches!(OutputDir::create(&target, false), Err(FormatError::OutputExists { .. })));
        let out = OutputDir::create(&target, true).unwrap();
        fs::write(out.path().join("new"), "1").unwrap();
        out.commit().unwrap();
        assert_eq!(names(&target), ["new"]);
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn a_replacement_that_was_stopped_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (target, old) = (dir.path().join("out"), dir.path().join(".out.replaced-by-gptq"));
        // Stopped between the two renames: the old content is back, and not overwritten unless allowed.
        fs::create_dir(&old).unwrap();
        fs::write(old.join("old"), "1").unwrap();
        assert!(matches!(OutputDir::create(&target, false), Err(FormatError::OutputExists { .. })));
        assert_eq!(names(&target), ["old"]);
        // Stopped behind them: the new content stays, the old one goes.
        fs::create_dir(&old).unwrap();
        drop(OutputDir::create(&target, true).unwrap());
        assert_eq!((names(&target), names(dir.path())), (vec!["old".into()], vec!["out".into()]));
    }

    #[test]
    fn a_target_that_is_a_file_or_has_no_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "").unwrap();
        assert!(OutputDir::create(&file, true).is_err());
        assert!(OutputDir::create(Path::new("/"), true).is_err());
    }
}
