//! Bytes on disk: one file a task, a small index beside it while it is partial, and manifests.
//!
//! - [`task_store`](TaskStore): the seam to the driver, with a suite for all implementations
//! - `partial`: pieces come in, in any order, over any number of restarts
//! - [`blob`](Blob): committed, leased to readers; `checks`: which of its pieces were hashed since the start
//! - `origins`: the registries that gave the bytes here
//! - `state`: the facts in memory, claims, eviction, the reaction to a full disk
//! - `record`, `layout`, `disk`: the form of the files, their names, the few things done with them
//! - `recovery`: the files found when the daemon starts
//!
//! All methods block on the disk unless they say otherwise: async code calls them through [`hawker_lanes`].

mod blob;
mod checks;
mod disk;
#[cfg(test)]
pub(crate) mod faulty;
mod layout;
mod manifests;
#[cfg(test)]
pub(crate) mod memory;
mod origins;
mod partial;
mod record;
mod recovery;
mod state;
#[cfg(test)]
pub(crate) mod suite;
mod task_store;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use hawker_core::piece::PieceLayout;
use hawker_oci::digest::Digest;

pub use self::blob::Blob;
pub use self::disk::{disk_refuses, held_is_right};
use self::layout::Layout;
pub use self::manifests::{Place, StoredManifest};
use self::state::{Entry, Inner, Key, Means};
use self::task_store::Keeper;
pub use self::task_store::{Partial, PartialTask, TaskStore};
use crate::settings::CacheSettings;

/// Why the store can't do it. Never the client's fault, and never a reason for a failed pull.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk does not take it: full, no inodes, quota, read-only, EIO. Go on without the disk.
    #[error("{what}: {source}")]
    Disk {
        /// The attempt, with the path.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another download of this task is under way here already, or it is committed.
    #[error("the task is being written already")]
    Busy,
    /// The bytes on disk are corrupt.
    #[error("{0} is rotten")]
    Rotten(Digest),
}

impl StoreError {
    /// Whether room is all that is missing: eviction may help.
    pub(crate) fn is_for_want_of_room(&self) -> bool {
        matches!(self, StoreError::Disk { source, .. } if disk::is_full(source))
    }
}

/// The store of one daemon. Cheap to clone.
///
/// The folder stays locked until all clones, leases and partial tasks are dropped.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// Opens or makes the store in `dir` (`DATA_DIR/store`): finds what is there and removes what a crash left behind.
    ///
    /// Pieces of partial tasks that were noted by another run of the daemon count again once [`TaskStore::begin`] has hashed them.
    /// An error when the folder can't be made or read, or when another daemon uses it.
    pub fn open(dir: &Path, settings: CacheSettings) -> Result<Self, StoreError> {
        Self::open_with(dir, settings, Means::default())
    }

    fn open_with(dir: &Path, settings: CacheSettings, means: Means) -> Result<Self, StoreError> {
        let layout = Layout::new(dir);
        recovery::make_folders(&layout)?;
        let lock = recovery::lock(&layout)?;
        let state = recovery::scan(&layout);
        Ok(Self {
            inner: Arc::new(Inner::new(layout, settings, state, lock, means)),
        })
    }

    /// A committed blob that somebody reads already, leased. Does not block.
    pub fn opened(&self, task: &Digest) -> Option<Blob> {
        blob::opened(&self.inner, task)
    }

    /// Size of a committed blob, if it is one; no lease, no touch.
    pub fn blob_bytes(&self, task: &Digest) -> Option<u64> {
        match self.inner.state().tasks.get(task) {
            Some(Entry::Blob { size_bytes, .. }) => Some(*size_bytes),
            _ => None,
        }
    }

    /// All that is held, for announcing: digest, size, pieces held, whether committed.
    pub fn holdings(&self) -> Vec<(Digest, u64, u32, bool)> {
        let state = self.inner.state();
        let holding = |(task, entry): (&Digest, &Entry)| match entry {
            Entry::Blob { size_bytes, .. } => (
                *task,
                *size_bytes,
                PieceLayout::new(*size_bytes).count(),
                true,
            ),
            Entry::Partial {
                size_bytes, pieces, ..
            } => (*task, *size_bytes, pieces.unwrap_or(0), false),
        };
        state.tasks.iter().map(holding).collect()
    }

    /// Keeps to these marks from now on; [`Self::evict`] applies them to blobs that are there.
    pub fn set_limits(&self, settings: CacheSettings) {
        self.inner.set_limits(settings);
    }

    /// Puts a manifest in the cache, under its digest; gives the place of its body, unless it is too long to be kept.
    /// Blocking.
    pub fn put_manifest(&self, digest: &Digest, body: &Bytes) -> Result<Option<Place>, StoreError> {
        manifests::put(&self.inner, digest, body)
    }

    /// A cached manifest, whose body hashes to `digest`. Blocking.
    pub fn manifest(&self, digest: &Digest) -> Option<StoredManifest> {
        manifests::get(&self.inner, digest)
    }

    /// How much memory a cached manifest takes when it is read, in bytes.
    pub fn manifest_bytes(&self, digest: &Digest) -> Option<u64> {
        self.inner.state().cache.size_bytes(&Key::Manifest(*digest))
    }

    /// Evicts down to the low watermark if the high one is passed. Blocking; called every few seconds.
    ///
    /// The tasks that went since the last call, for whatever reason, and did not come back: nobody should ask for them here.
    pub fn evict(&self) -> Vec<Digest> {
        self.inner.make_room(0);
        self.inner.take_gone()
    }

    /// Whether more should go than could: leased blobs stay. Blocking.
    pub fn is_crowded(&self) -> bool {
        self.inner.excess_bytes() > 0
    }

    /// For people.
    pub fn usage(&self) -> Usage {
        self.inner.usage()
    }
}

impl TaskStore for Store {
    fn committed(&self, task: &Digest) -> Option<Blob> {
        blob::open(&self.inner, task)
    }

    fn has(&self, task: &Digest) -> bool {
        self.blob_bytes(task).is_some()
    }

    fn begin(&self, task: &Digest, size_bytes: u64) -> Result<Partial, StoreError> {
        partial::begin(&self.inner, task, size_bytes)
    }

    fn partial_size(&self, task: &Digest) -> Option<u64> {
        match self.inner.state().tasks.get(task) {
            Some(Entry::Partial { size_bytes, .. }) => Some(*size_bytes),
            _ => None,
        }
    }

    fn recheck(&self, task: &Digest, bytes: Range<u64>) -> Result<Option<bool>, StoreError> {
        match self.has(task) {
            true => blob::recheck(&self.inner, task, bytes),
            false => Ok(partial::recheck(&self.inner, task, bytes)),
        }
    }

    fn doubt(&self, task: &Digest) {
        self.inner.doubt(task);
    }

    fn takes_writes(&self) -> bool {
        self.inner.takes_writes()
    }

    fn origins(&self, digest: &Digest) -> Vec<String> {
        origins::get(&self.inner, digest)
    }

    fn add_origin(&self, digest: &Digest, registry: &str) -> Result<(), StoreError> {
        origins::add(&self.inner, digest, registry)
    }
}

/// How full the store is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Committed blobs.
    pub blobs: u64,
    /// Partial tasks.
    pub partials: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Whether writing failed lately: nothing is cached until it works again.
    pub degraded: bool,
}

#[cfg(test)]
impl Store {
    /// Puts a blob in as a download would, piece by piece.
    pub(crate) fn put(&self, data: &[u8]) -> Digest {
        use hawker_core::piece::PieceTable;
        use hawker_oci::digest::{Algorithm, Chain};

        let (digest, layout) = (
            Digest::of(Algorithm::Sha256, data),
            PieceLayout::new(data.len() as u64),
        );
        let partial = self.begin(&digest, data.len() as u64).unwrap();
        let (mut table, mut chain) = (
            PieceTable::new(digest, layout),
            Chain::new(Algorithm::Sha256),
        );
        for piece in 0..layout.count() {
            let range = layout.range(piece);
            let bytes = &data[range.start as usize..range.end as usize];
            chain.update(bytes);
            partial.write(piece, bytes).unwrap();
            if piece + 1 < layout.count() {
                table.push(chain.value().unwrap());
            }
        }
        partial.commit(&table).unwrap();
        digest
    }
}
