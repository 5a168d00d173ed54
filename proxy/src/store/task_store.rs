//! The seam between downloads and the store: all that the driver, its readers and the proofs do with tasks at rest.
//!
//! [`Store`](super::Store) keeps tasks in a folder; the store in memory and the faulty one serve tests. The bytes of a task are
//! an open [`File`] in every implementation (the one in memory has a file without a folder): clients get them by `sendfile`, and
//! no copy or call stands between a file and a socket. One suite (`suite`) holds for all implementations.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use hawker_core::piece::{PieceIndex, PieceSet, PieceTable};
use hawker_oci::digest::Digest;

use super::checks::Checks;
use super::{Blob, StoreError};

/// Tasks at rest: partial and committed ones. All methods may block on a disk, unless they say otherwise.
pub trait TaskStore: Send + Sync + 'static {
    /// A committed blob, leased: it is not evicted while the lease lives.
    ///
    /// One whose file or table is not whole is deleted and counts as not there.
    fn committed(&self, task: &Digest) -> Option<Blob>;

    /// Whether it is committed; no lease, no touch. Does not block.
    fn has(&self, task: &Digest) -> bool;

    /// A partial task: the one that is there, or a new empty one, leased. One of another size is thrown away.
    ///
    /// [`StoreError::Busy`] while it is begun already, or when it is committed; [`StoreError::Disk`] when it can't be kept.
    fn begin(&self, task: &Digest, size_bytes: u64) -> Result<Partial, StoreError>;

    /// The size of a partial task, if there is one. Does not block.
    fn partial_size(&self, task: &Digest) -> Option<u64>;

    /// Hashes the pieces that a range touches again: of a committed blob, which is evicted if one is rotten, or of a partial task
    /// that nobody has open, of which all is hashed before it counts if one is. The answer is whether all were right; `None` when
    /// not all are there.
    fn recheck(&self, task: &Digest, bytes: Range<u64>) -> Result<Option<bool>, StoreError>;

    /// The pieces of a partial task that nobody has open may have rotted: they are hashed again before they count. Does not block.
    fn doubt(&self, task: &Digest);

    /// Whether the disk takes writes, after it refused.
    fn takes_writes(&self) -> bool;

    /// The registries that gave this content or proved that they have it, the earliest first.
    fn origins(&self, digest: &Digest) -> Vec<String>;

    /// Notes such a registry beside the content, if that is here.
    fn add_origin(&self, digest: &Digest, registry: &str) -> Result<(), StoreError>;
}

/// A handle on a partial task.
pub type Partial = Arc<dyn PartialTask>;

/// A partial task under lease. Dropping the last handle leaves it in the store, to go on from later, or to be evicted.
///
/// Late writes, after the task was committed or discarded, do nothing. Methods that return a `Result` block on the disk.
pub trait PartialTask: Send + Sync {
    /// The file, for reading pieces that are held.
    fn file(&self) -> Arc<File>;

    /// The pieces that were there when the task was begun.
    fn held(&self) -> PieceSet;

    /// The table that was there when the task was begun.
    fn table(&self) -> PieceTable;

    /// Writes a verified piece and notes that it is held.
    fn write(&self, piece: PieceIndex, data: &[u8]) -> Result<(), StoreError>;

    /// Notes that a piece was verified whose bytes are in the file already.
    fn note(&self, piece: PieceIndex) -> Result<(), StoreError>;

    /// Writes bytes that nobody has verified yet. They count for nothing after a restart, and never overwrite verified pieces.
    fn write_loose(&self, start: u64, data: &[u8]) -> Result<(), StoreError>;

    /// Notes new values of the table, or a new statement.
    fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError>;

    /// Makes a task durable of which all pieces are held and match.
    ///
    /// When the data can't be made durable, the task is thrown away: nobody knows then what the disk has of it.
    fn commit(&self, table: &PieceTable) -> Result<Blob, StoreError>;

    /// Throws everything away: the table was poisoned, or the disk let it rot.
    fn discard(&self) -> Result<(), StoreError>;
}

/// The store that a committed blob belongs to, as its leases see it.
pub(super) trait Keeper: Send + Sync {
    /// The last lease of a blob is gone.
    fn release(&self, task: &Digest);

    /// Deletes a blob that is not what it should be, if it still is the `copy` that these checks are about.
    fn drop_rotten(
        self: Arc<Self>,
        task: &Digest,
        copy: &Arc<Checks>,
        why: &str,
    ) -> Result<(), StoreError>;

    /// Replaces the table that is kept of a blob by one with the same values.
    fn replace_table(self: Arc<Self>, table: &PieceTable) -> Result<(), StoreError>;
}
