//! Committed blobs: whole, verified, on disk to stay until evicted.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use hawker_core::digest::Digest;
use hawker_core::piece::{PieceSet, PieceTable};

use super::state::{Entry, Inner, Key, USE_GRAIN, since_1970};
use super::{StoreError, disk, record};

/// The longest table or index file that is read: what [`record::MAX_BLOB_BYTES`] takes, several times over.
pub(super) const MAX_INDEX_BYTES: u64 = 512 << 20;

/// A committed blob under lease.
#[derive(Clone)]
pub struct Blob {
    /// The open file: reading goes on even if the file is unlinked.
    pub file: Arc<File>,
    /// Its full piece table (all values; signed where an issuer's seal was kept).
    pub table: Arc<PieceTable>,
    lease: Arc<Lease>,
}

impl Blob {
    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.table.layout().size_bytes()
    }

    /// Replaces the table kept on disk by the same one with a new seal. Blocking.
    ///
    /// Who has the blob keeps its old table; who gets it later gets the new one. Nothing happens when it was found rotten
    /// meanwhile. [`StoreError::Rotten`] when the values are not the same.
    pub fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError> {
        let (store, task) = (&self.lease.store, *self.table.task());
        if table.task() != &task || table.values() != self.table.values() {
            return Err(StoreError::Rotten(task));
        }
        let _claim = store.claim(&task)?;
        if !matches!(store.state().tasks.get(&task), Some(Entry::Blob { .. })) {
            return Ok(());
        }
        write_table(store, table)?;
        if let Some(Entry::Blob { opened, .. }) = store.state().tasks.get_mut(&task) {
            *opened = Weak::new();
        }
        Ok(())
    }
}

/// Keeps a blob from eviction until the last of its readers is gone.
pub(super) struct Lease {
    store: Arc<Inner>,
    file: Arc<File>,
    table: Arc<PieceTable>,
}

impl Lease {
    fn blob(self: Arc<Self>) -> Blob {
        Blob { file: Arc::clone(&self.file), table: Arc::clone(&self.table), lease: self }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.state().cache.release(&Key::Task(*self.table.task()));
    }
}

/// Writes the table file of a blob, whole.
pub(super) fn write_table(store: &Inner, table: &PieceTable) -> Result<(), StoreError> {
    let about = record::Header { digest: *table.task(), size_bytes: table.layout().size_bytes() };
    let content = record::index(&about, table, &PieceSet::empty(0));
    let path = store.layout.table(table.task());
    store.write(
        || format!("writing {}", path.display()),
        content.len() as u64,
        || {
            disk::make_folder(&store.layout.shard(table.task()))?;
            disk::replace(&path, &content)
        },
    )
}

/// Enters a blob whose files are in place, leased.
pub(super) fn enter(store: &Arc<Inner>, file: Arc<File>, table: &PieceTable) -> Blob {
    let task = *table.task();
    let size_bytes = table.layout().size_bytes();
    let lease = Arc::new(Lease { store: Arc::clone(store), file, table: Arc::new(table.clone()) });
    let now = store.now();
    let mut state = store.state();
    state.tasks.insert(task, Entry::Blob { size_bytes, opened: Arc::downgrade(&lease) });
    state.cache.insert(Key::Task(task), size_bytes, now);
    state.cache.lease(&Key::Task(task), now);
    drop(state);
    lease.blob()
}

/// The committed blob `task`, leased. One whose files are not what they should be goes.
pub(super) fn open(store: &Arc<Inner>, task: &Digest) -> Option<Blob> {
    let size_bytes = {
        let mut state = store.state();
        let Some(Entry::Blob { size_bytes, opened }) = state.tasks.get(task) else { return None };
        let (size_bytes, shared) = (*size_bytes, opened.upgrade());
        if let Some(shared) = shared {
            state.cache.touch(&Key::Task(*task), store.now());
            return Some(shared.blob());
        }
        state.cache.lease(&Key::Task(*task), store.now());
        size_bytes
    };
    match read_files(store, task, size_bytes) {
        Ok((file, table)) => {
            note_use(&file);
            let lease =
                Arc::new(Lease { store: Arc::clone(store), file: Arc::new(file), table: Arc::new(table) });
            if let Some(Entry::Blob { opened, .. }) = store.state().tasks.get_mut(task) {
                *opened = Arc::downgrade(&lease);
            }
            Some(lease.blob())
        }
        Err(unfit) => {
            store.state().cache.release(&Key::Task(*task));
            unfit.deal_with(store, task);
            None
        }
    }
}

/// Why a committed blob can't be served.
enum Unfit {
    /// It could not be read now: out of descriptors, say. It may be fine.
    Io(io::Error),
    /// It is not what was committed.
    Rotten(String),
}

impl Unfit {
    fn deal_with(self, store: &Arc<Inner>, task: &Digest) {
        match self {
            Unfit::Io(error) => tracing::warn!(%task, %error, "can't read a committed blob"),
            Unfit::Rotten(why) => {
                if let Err(error) = store.drop_rotten(task, &why) {
                    tracing::warn!(%task, %error, "can't delete a rotten blob");
                }
            }
        }
    }
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::FileTooLarge => Unfit::Rotten(error.to_string()),
            _ => Unfit::Io(error),
        }
    }
}

fn read_files(store: &Inner, task: &Digest, size_bytes: u64) -> Result<(File, PieceTable), Unfit> {
    let file = File::open(store.layout.blob(task))?;
    let actual_bytes = file.metadata()?.len();
    let table =
        read_table(&disk::read_whole(&File::open(store.layout.table(task))?, MAX_INDEX_BYTES)?, task)?;
    if actual_bytes != table.layout().size_bytes() || actual_bytes != size_bytes {
        return Err(Unfit::Rotten(format!(
            "it has {actual_bytes} bytes, not {}",
            table.layout().size_bytes()
        )));
    }
    Ok((file, table))
}

fn read_table(raw: &[u8], task: &Digest) -> Result<PieceTable, Unfit> {
    let contents =
        record::read(raw).map_err(|why| Unfit::Rotten(format!("its table can't be read: {why}")))?;
    if contents.header.digest != *task || !contents.table_is_full() {
        return Err(Unfit::Rotten("its table is not whole".to_owned()));
    }
    Ok(contents.table)
}

/// Keeps the order of use across restarts: as the file's time of modification, coarsely.
pub(super) fn note_use(file: &File) {
    let noted = file.metadata().and_then(|meta| meta.modified());
    let now = SystemTime::now();
    if noted.is_ok_and(|at| since_1970(now).saturating_sub(since_1970(at)) > USE_GRAIN) {
        // A read-only disk refuses it, and then the order does not matter.
        let _ = file.set_modified(now);
    }
}

/// Hashes the pieces of a committed blob that a range touches again; `None`: it is not there.
pub(super) fn recheck(
    store: &Arc<Inner>,
    task: &Digest,
    bytes: Range<u64>,
) -> Result<Option<bool>, StoreError> {
    let Some(blob) = open(store, task) else { return Ok(None) };
    let right = disk::blob_is_right(&blob.file, &blob.table, bytes);
    if !right {
        store.drop_rotten(task, "its bytes do not match the digest")?;
    }
    Ok(Some(right))
}

/// Moves a partial task's file to where committed blobs are. The caller holds a claim.
pub(super) fn move_in(store: &Inner, task: &Digest) -> Result<(), StoreError> {
    let (from, to) = (store.layout.partial(task), store.layout.blob(task));
    store.write(|| format!("renaming {} to {}", from.display(), to.display()), 0, || fs::rename(&from, &to))
}
