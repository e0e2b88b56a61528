//! Opening files from untrusted places.

use std::fs::{File, FileType};
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::error::LoadError;

/// First bytes of the text that Git LFS leaves in place of a file.
const LFS_PREFIX: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Maps a regular, non-empty file that is not a Git LFS pointer.
pub(crate) fn map(path: &Path) -> Result<Mmap, LoadError> {
    let (file, _) = open_regular(path)?;
    // SAFETY: the map is read-only and private to this process. Another process that truncates
    // the file while it is mapped can end this process with a bus error, which no check here can
    // rule out; it cannot break memory safety beyond that of plain bytes.
    let map = unsafe { Mmap::map(&file) }.map_err(|source| io(path, source))?;
    refuse_lfs_pointer(path, &map)?;
    Ok(map)
}

/// Gives the memory of a range back that won't be read again soon. Where that isn't possible the
/// pages stay until the system wants them.
pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    if !range.is_empty() {
        // SAFETY: the map is of a file and read-only, so that a page that is dropped and touched
        // again is read from the file again: no byte changes.
        let _ = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
        };
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// Reads a regular, non-empty file of at most `limit` bytes that is not a Git LFS pointer.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let (file, length) = open_regular(path)?;
    let too_large = |got| LoadError::FileTooLarge { path: path.into(), limit, got };
    if length > limit {
        return Err(too_large(length));
    }
    let mut bytes = Vec::new();
    // The file may grow after its length was asked for.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|source| io(path, source))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    refuse_lfs_pointer(path, &bytes)?;
    Ok(bytes)
}

pub(crate) fn io(path: &Path, source: std::io::Error) -> LoadError {
    LoadError::Io { path: path.into(), source }
}

fn open_regular(path: &Path) -> Result<(File, u64), LoadError> {
    // Asked before opening: opening a FIFO waits for a writer, perhaps forever.
    let kind = std::fs::metadata(path).map_err(|source| io(path, source))?.file_type();
    refuse_irregular(path, kind)?;
    let file = File::open(path).map_err(|source| io(path, source))?;
    let metadata = file.metadata().map_err(|source| io(path, source))?;
    refuse_irregular(path, metadata.file_type())?;
    if metadata.len() == 0 {
        return Err(LoadError::EmptyFile { path: path.into() });
    }
    Ok((file, metadata.len()))
}

fn refuse_irregular(path: &Path, kind: FileType) -> Result<(), LoadError> {
    if kind.is_file() {
        return Ok(());
    }
    let kind = if kind.is_dir() { "directory" } else { "FIFO, socket or device" };
    Err(LoadError::NotRegularFile { path: path.into(), kind })
}

fn refuse_lfs_pointer(path: &Path, bytes: &[u8]) -> Result<(), LoadError> {
    if bytes.starts_with(LFS_PREFIX) {
        return Err(LoadError::LfsPointer { path: path.into() });
    }
    Ok(())
}
