//! The few things done with files: private ones, replaced whole, made durable.
//!
//! The store changes its folder through a [`Disk`]: [`FileSystem`] in the product, one that fails on demand in tests.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hawker_core::piece::{PieceIndex, PieceSet, PieceTable};
use hawker_oci::digest::Chain;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::layout::TEMPORARY;

/// Read at once when a file is hashed again.
const HASH_BYTES: usize = 256 << 10;

/// Changes to the files of a store. Each one may be refused.
pub(super) trait Disk: Send + Sync + 'static {
    /// Makes a folder, and those above it, for this user only; a new one is durable in its parent.
    fn make_folder(&self, path: &Path) -> io::Result<()>;

    /// Makes changes of the names in a folder durable.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// A new, empty file for this user only.
    fn create(&self, path: &Path) -> io::Result<File>;

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a file as long as this.
    fn set_len(&self, file: &File, len: u64) -> io::Result<()>;

    /// Makes the bytes of a file durable.
    fn sync(&self, file: &File) -> io::Result<()>;

    /// Renames a file, also to a path where a folder stands.
    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Puts `content` in the place of the file at `path`, whole or not at all. It lasts once the folder was synced.
    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()>;

    /// The same for a file that is verified whenever it is read: after a power failure it may be empty or torn. The file has the
    /// `parts` one behind the other, and is returned to be read.
    fn replace_unsynced(&self, path: &Path, parts: &[&[u8]]) -> io::Result<File>;

    /// Removes a file, if it is there, or whatever stands in its place.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The file system of the machine.
pub(super) struct FileSystem;

impl Disk for FileSystem {
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        make_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        sync_folder(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        create(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename_over(from, to)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        replace_after(path, &[content], File::sync_all).map(drop)
    }

    fn replace_unsynced(&self, path: &Path, parts: &[&[u8]]) -> io::Result<File> {
        replace_after(path, parts, |_| Ok(()))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        remove(path)
    }
}

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

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A new, empty file for this user only.
pub(super) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// A file that is there, to read and write.
pub(super) fn open(path: &Path) -> io::Result<File> {
    regular(OpenOptions::new().read(true).write(true), path)
}

/// A file that is there, to read.
pub(super) fn open_to_read(path: &Path) -> io::Result<File> {
    regular(OpenOptions::new().read(true), path)
}

/// Opens a regular file, and nothing else that stands in its place: a pipe would block, a link leads elsewhere.
fn regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let other = || {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("{} is no regular file", path.display()),
        )
    };
    let is_link_or_socket = |error: &io::Error| {
        [Errno::LOOP, Errno::NXIO]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
    };
    match options.custom_flags(flags.bits() as i32).open(path) {
        Err(error) if is_link_or_socket(&error) => Err(other()),
        Ok(file) if !file.metadata()?.is_file() => Err(other()),
        opened => opened,
    }
}

/// Whether an error says that the file is not there, or that something else is in its place.
pub(super) const fn means_another_thing(kind: ErrorKind) -> bool {
    use ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound};
    matches!(kind, NotFound | InvalidData | IsADirectory | NotADirectory)
}

fn rename_over(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            remove(to)?;
            fs::rename(from, to)
        }
        renamed => renamed,
    }
}

fn replace_after(
    path: &Path,
    parts: &[&[u8]],
    sync: impl Fn(&File) -> io::Result<()>,
) -> io::Result<File> {
    let temporary = temporary_for(path);
    let written = create(&temporary).and_then(|mut file| {
        parts.iter().try_for_each(|part| file.write_all(part))?;
        sync(&file)?;
        rename_over(&temporary, path)?;
        Ok(file)
    });
    if written.is_err() {
        // The first error is the one to tell; leftovers are removed at the next start.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn temporary_for(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(
        ".{}{TEMPORARY}",
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    name.into()
}

/// Removes a file, if it is there, or whatever stands in its place.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == ErrorKind::IsADirectory => fs::remove_dir_all(path),
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// All bytes of a file that is at most `max_bytes` long.
pub(super) fn read_whole(file: &File, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(file.metadata()?.len().min(max_bytes) as usize);
    file.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        Err(ErrorKind::FileTooLarge.into())
    } else {
        Ok(bytes)
    }
}

/// Bytes of the file system that holds `path`: in all, and what may still be written.
pub(super) fn room(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((
        stat.f_blocks.saturating_mul(stat.f_frsize),
        stat.f_bavail.saturating_mul(stat.f_frsize),
    ))
}

/// Whether deleting something may help: no space, no inodes, or no quota left.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Whether a disk refuses to be written, full, failing or read-only: the daemon works on without it.
pub fn disk_refuses(error: &io::Error) -> bool {
    let io_error = Errno::IO.raw_os_error();
    is_full(error)
        || error.kind() == ErrorKind::ReadOnlyFilesystem
        || error.raw_os_error() == Some(io_error)
}

/// Whether a piece in `file` is what the table says; `false` too when the table does not know.
pub(super) fn piece_is_right(
    file: &File,
    table: &PieceTable,
    piece: PieceIndex,
) -> io::Result<bool> {
    let Some(mut chain) = table.chain_at(piece) else {
        return Ok(false);
    };
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
pub fn held_is_right(
    file: &File,
    table: &PieceTable,
    held: &PieceSet,
    bytes: Range<u64>,
) -> Option<bool> {
    let pieces = table.layout().covering(bytes);
    let (held, missing): (Vec<_>, Vec<_>) =
        pieces.partition(|piece| held.contains(*piece) && *piece < table.verifiable());
    match pieces_are_right(file, table, held.iter().copied()) {
        true if held.is_empty() || !missing.is_empty() => None,
        right => Some(right),
    }
}

/// Whether these pieces of a file are what its table says. One that can't be read is not.
fn pieces_are_right(
    file: &File,
    table: &PieceTable,
    mut pieces: impl Iterator<Item = PieceIndex>,
) -> bool {
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
