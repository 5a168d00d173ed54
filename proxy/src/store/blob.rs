//! Committed blobs: whole, verified, on disk to stay until evicted.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use hawker_core::piece::{PieceSet, PieceTable};
use hawker_oci::digest::{Chain, Digest};

use super::checks::Checks;
use super::state::{Entry, Inner, Key, USE_GRAIN, since_1970};
use super::{Keeper, StoreError, disk, record};

/// The longest table or index file that is read: several times the need of [`record::MAX_BLOB_BYTES`].
pub(super) const MAX_INDEX_BYTES: u64 = 512 << 20;

/// A committed blob under lease, of whatever store.
#[derive(Clone)]
pub struct Blob {
    /// The open file: reading goes on even if the file is unlinked.
    pub file: Arc<File>,
    /// Its full piece table (all values; signed where an issuer's seal was kept).
    pub table: Arc<PieceTable>,
    lease: Arc<Lease>,
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Blob").field(self.table.task()).finish()
    }
}

impl Blob {
    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.table.layout().size_bytes()
    }

    pub(super) fn checks(&self) -> &Arc<Checks> {
        &self.lease.checks
    }

    /// Deletes it from the store, unless another copy has taken its place: it is not what it should be. Blocking.
    pub(super) fn drop_rotten(&self, why: &str) -> Result<(), StoreError> {
        self.checks().found_rotten();
        Arc::clone(&self.lease.keeper).drop_rotten(self.table.task(), self.checks(), why)
    }

    /// Replaces the table kept on disk by the same one with a new seal. Blocking.
    ///
    /// Present leases keep the old table; later ones have the new one. Nothing happens when the blob was found rotten meanwhile.
    /// [`StoreError::Rotten`] when the values are not the same.
    pub fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError> {
        let task = *self.table.task();
        if table.task() != &task || table.values() != self.table.values() {
            return Err(StoreError::Rotten(task));
        }
        Arc::clone(&self.lease.keeper).replace_table(table)
    }
}

/// Keeps a blob from eviction until the last of its readers is gone.
pub(super) struct Lease {
    keeper: Arc<dyn Keeper>,
    file: Arc<File>,
    table: Arc<PieceTable>,
    checks: Arc<Checks>,
}

impl Lease {
    /// A first lease. The keeper has counted it.
    pub(super) fn new(
        keeper: Arc<dyn Keeper>,
        file: Arc<File>,
        table: Arc<PieceTable>,
        checks: Arc<Checks>,
    ) -> Arc<Self> {
        Arc::new(Self {
            keeper,
            file,
            table,
            checks,
        })
    }

    pub(super) fn blob(self: Arc<Self>) -> Blob {
        Blob {
            file: Arc::clone(&self.file),
            table: Arc::clone(&self.table),
            lease: self,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.release(self.table.task());
    }
}

impl Keeper for Inner {
    fn release(&self, task: &Digest) {
        self.state().cache.release(&Key::Task(*task));
    }

    fn drop_rotten(
        self: Arc<Self>,
        task: &Digest,
        copy: &Arc<Checks>,
        why: &str,
    ) -> Result<(), StoreError> {
        self.remove_rotten(task, Some(copy), why)
    }

    fn replace_table(self: Arc<Self>, table: &PieceTable) -> Result<(), StoreError> {
        let task = *table.task();
        let _claim = self.claim(&task)?;
        if !matches!(self.state().tasks.get(&task), Some(Entry::Blob { .. })) {
            return Ok(());
        }
        write_table(&self, table)?;
        if let Some(Entry::Blob { opened, .. }) = self.state().tasks.get_mut(&task) {
            *opened = Weak::new();
        }
        Ok(())
    }
}

/// Writes the table file of a blob, whole.
pub(super) fn write_table(store: &Inner, table: &PieceTable) -> Result<(), StoreError> {
    let about = record::Header {
        digest: *table.task(),
        size_bytes: table.layout().size_bytes(),
    };
    let content = record::index(&about, table, &PieceSet::empty(0));
    let path = store.layout.table(table.task());
    store.write(
        || format!("writing {}", path.display()),
        content.len() as u64,
        || {
            store.disk.make_folder(&store.layout.shard(table.task()))?;
            store.disk.replace(&path, &content)
        },
    )
}

/// Enters a blob whose files are in place, leased.
pub(super) fn enter(store: &Arc<Inner>, file: Arc<File>, table: &PieceTable) -> Blob {
    let task = *table.task();
    let size_bytes = table.layout().size_bytes();
    let checks = Arc::new(Checks::all_right(&file));
    let entry_checks = Some(Arc::clone(&checks));
    let lease = Lease::new(
        Arc::<Inner>::clone(store),
        file,
        Arc::new(table.clone()),
        checks,
    );
    let now = store.now();
    let mut state = store.state();
    let entry = Entry::Blob {
        size_bytes,
        opened: Arc::downgrade(&lease),
        checks: entry_checks,
    };
    state.tasks.insert(task, entry);
    state.cache.insert(Key::Task(task), size_bytes, now);
    state.cache.lease(&Key::Task(task), now);
    drop(state);
    lease.blob()
}

/// The committed blob `task`, leased, if somebody has it open already. Does not block.
pub(super) fn opened(store: &Arc<Inner>, task: &Digest) -> Option<Blob> {
    let mut state = store.state();
    let Some(Entry::Blob { opened, .. }) = state.tasks.get(task) else {
        return None;
    };
    let shared = opened.upgrade()?;
    state.cache.touch(&Key::Task(*task), store.now());
    drop(state);
    Some(shared.blob())
}

/// The committed blob `task`, leased. One whose files are not what they should be goes.
pub(super) fn open(store: &Arc<Inner>, task: &Digest) -> Option<Blob> {
    if let Some(blob) = opened(store, task) {
        return Some(blob);
    }
    let (size_bytes, checks) = {
        let mut state = store.state();
        let Some(Entry::Blob {
            size_bytes, checks, ..
        }) = state.tasks.get_mut(task)
        else {
            return None;
        };
        let found = (*size_bytes, Arc::clone(checks.get_or_insert_default()));
        state.cache.lease(&Key::Task(*task), store.now());
        found
    };
    match read_files(store, task, size_bytes) {
        Ok((file, table)) => {
            checks.changed_by_us(&file, || note_use(&file));
            let (file, table) = (Arc::new(file), Arc::new(table));
            let lease = Lease::new(Arc::<Inner>::clone(store), file, table, checks);
            if let Some(Entry::Blob { opened, .. }) = store.state().tasks.get_mut(task) {
                *opened = Arc::downgrade(&lease);
            }
            Some(lease.blob())
        }
        Err(unfit) => {
            store.state().cache.release(&Key::Task(*task));
            unfit.deal_with(store, task, &checks);
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
    fn deal_with(self, store: &Arc<Inner>, task: &Digest, checks: &Arc<Checks>) {
        match self {
            Unfit::Io(error) => tracing::warn!(%task, %error, "can't read a committed blob"),
            Unfit::Rotten(why) => {
                if let Err(error) = store.remove_rotten(task, Some(checks), &why) {
                    tracing::warn!(%task, %error, "can't delete a rotten blob");
                }
            }
        }
    }
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            kind if kind == ErrorKind::FileTooLarge || disk::means_another_thing(kind) => {
                Unfit::Rotten(error.to_string())
            }
            _ => Unfit::Io(error),
        }
    }
}

fn read_files(store: &Inner, task: &Digest, size_bytes: u64) -> Result<(File, PieceTable), Unfit> {
    let file = disk::open_to_read(&store.layout.blob(task))?;
    let actual_bytes = file.metadata()?.len();
    let table = disk::open_to_read(&store.layout.table(task))?;
    let table = read_table(&disk::read_whole(&table, MAX_INDEX_BYTES)?, task)?;
    if actual_bytes != table.layout().size_bytes() || actual_bytes != size_bytes {
        return Err(Unfit::Rotten(format!(
            "it has {actual_bytes} bytes, not {}",
            table.layout().size_bytes()
        )));
    }
    if actual_bytes == 0 && Chain::new(task.algorithm()).finish() != *task {
        return Err(Unfit::Rotten("it is empty".to_owned()));
    }
    Ok((file, table))
}

fn read_table(raw: &[u8], task: &Digest) -> Result<PieceTable, Unfit> {
    let contents = record::read(raw)
        .map_err(|why| Unfit::Rotten(format!("its table can't be read: {why}")))?;
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
    let Some(blob) = open(store, task) else {
        return Ok(None);
    };
    let right = disk::blob_is_right(&blob.file, &blob.table, bytes);
    if !right {
        blob.drop_rotten("its bytes do not match the digest")?;
    }
    Ok(Some(right))
}

/// Moves a partial task's file to where committed blobs are. The caller holds a claim.
pub(super) fn move_in(store: &Inner, task: &Digest) -> Result<(), StoreError> {
    let (from, to) = (store.layout.partial(task), store.layout.blob(task));
    let what = || format!("renaming {} to {}", from.display(), to.display());
    store.write(what, 0, || store.disk.rename_over(&from, &to))
}
