//! The few things done with files: private ones, replaced whole, made durable.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hawker_core::digest::Chain;
use hawker_core::piece::{PieceIndex, PieceSet, PieceTable};

use super::layout::TEMPORARY;

/// Read at once when a file is hashed again.
const HASH_BYTES: usize = 256 << 10;

/// Makes a folder, and those above it, for this user only; a new one is durable in its parent.
pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_folder(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
        Ok(()) => parent.map_or(Ok(()), sync_folder),
    }
}

/// Makes what happened to names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A new, empty file for this user only.
pub(super) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// A file that is there, to read and write.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Puts `content` in the place of the file at `path`, whole or not at all. It lasts once the folder was synced.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    replace_after(path, &[content], File::sync_all).map(drop)
}

/// The same for a file that is verified whenever it is read: after a power failure it may be empty or torn. What is in `parts`
/// comes one behind the other; the file, to read.
pub(super) fn replace_unsynced(path: &Path, parts: &[&[u8]]) -> io::Result<File> {
    replace_after(path, parts, |_| Ok(()))
}

fn replace_after(path: &Path, parts: &[&[u8]], sync: impl Fn(&File) -> io::Result<()>) -> io::Result<File> {
    let temporary = temporary_for(path);
    let written = create(&temporary).and_then(|mut file| {
        parts.iter().try_for_each(|part| file.write_all(part))?;
        sync(&file)?;
        fs::rename(&temporary, path)?;
        Ok(file)
    });
    if written.is_err() {
        // The first error is the one to tell; what is left is removed at the next start.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn temporary_for(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}{TEMPORARY}", NEXT.fetch_add(1, Ordering::Relaxed)));
    name.into()
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// All bytes of a file that is at most `max_bytes` long.
pub(super) fn read_whole(file: &File, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(file.metadata()?.len().min(max_bytes) as usize);
    file.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes { Err(ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Bytes of the file system that holds `path`: in all, and what may still be written.
pub(super) fn room(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Whether deleting something may help: no space, no inodes, or no quota left.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Whether a disk refuses to be written, full, failing or read-only: the daemon works on without it.
pub fn disk_refuses(error: &io::Error) -> bool {
    let io_error = rustix::io::Errno::IO.raw_os_error();
    is_full(error) || error.kind() == ErrorKind::ReadOnlyFilesystem || error.raw_os_error() == Some(io_error)
}

/// Whether a piece in `file` is what the table says; `false` too when the table does not know.
pub(super) fn piece_is_right(file: &File, table: &PieceTable, piece: PieceIndex) -> io::Result<bool> {
    let Some(mut chain) = table.chain_at(piece) else { return Ok(false) };
    let range = table.layout().range(piece);
    let mut buffer = vec![0; HASH_BYTES];
    let mut at = range.start;
    while at < range.end {
        let want = (range.end - at).min(HASH_BYTES as u64) as usize;
        file.read_exact_at(&mut buffer[..want], at)?;
        chain.update(&buffer[..want]);
        at += want as u64;
    }
    Ok(table.verify(piece, &chain) == Some(true))
}

/// Whether a file that is not whole has these bytes, and right; `None` where not all are there. Blocking.
pub fn held_is_right(file: &File, table: &PieceTable, held: &PieceSet, bytes: Range<u64>) -> Option<bool> {
    let pieces = table.layout().covering(bytes);
    let (held, missing): (Vec<_>, Vec<_>) =
        pieces.partition(|piece| held.contains(*piece) && *piece < table.verifiable());
    match pieces_are_right(file, table, held.iter().copied()) {
        true if held.is_empty() || !missing.is_empty() => None,
        right => Some(right),
    }
}

/// Whether these pieces of a file are what its table says. One that can't be read is not.
fn pieces_are_right(file: &File, table: &PieceTable, mut pieces: impl Iterator<Item = PieceIndex>) -> bool {
    pieces.all(|piece| piece_is_right(file, table, piece).unwrap_or(false))
}

/// Whether a committed file has, in this range, what its table and its digest say.
pub(super) fn blob_is_right(file: &File, table: &PieceTable, bytes: Range<u64>) -> bool {
    let layout = table.layout();
    if layout.count() == 0 {
        return Chain::new(table.task().algorithm()).finish() == *table.task();
    }
    pieces_are_right(file, table, layout.covering(bytes))
}
