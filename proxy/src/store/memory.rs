//! A store in memory, for tests. The bytes of each task are in a file without a folder (`memfd_create`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hawker_core::piece::{MAX_BLOB_BYTES, PieceIndex, PieceLayout, PieceSet, PieceTable};
use hawker_oci::digest::{Chain, Digest};
use rustix::fs::{MemfdFlags, memfd_create};

use super::blob::Lease;
use super::checks::Checks;
use super::task_store::Keeper;
use super::{Blob, Partial, PartialTask, StoreError, TaskStore, disk, held_is_right};

/// Cheap to clone: clones have the same tasks.
#[derive(Clone, Default)]
pub(crate) struct MemoryStore {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tasks: HashMap<Digest, Entry>,
    origins: HashMap<Digest, Vec<String>>,
}

#[derive(Clone)]
enum Entry {
    Blob {
        file: Arc<File>,
        table: Arc<PieceTable>,
        checks: Arc<Checks>,
    },
    Partial(Box<Kept>),
}

/// A partial task at rest.
#[derive(Clone)]
struct Kept {
    file: Arc<File>,
    held: PieceSet,
    table: PieceTable,
    /// The pieces were hashed since the start.
    is_verified: bool,
    is_open: bool,
}

impl MemoryStore {
    /// The store that a daemon finds when it starts again. The handles of this one must be gone.
    pub(crate) fn restarted(&self) -> Self {
        let state = self.inner.state();
        let reopened = |entry: &Entry| match entry.clone() {
            Entry::Blob { file, table, .. } => Entry::Blob {
                file,
                table,
                checks: Arc::default(),
            },
            Entry::Partial(mut kept) => {
                (kept.is_verified, kept.is_open) = (false, false);
                Entry::Partial(kept)
            }
        };
        let tasks = state
            .tasks
            .iter()
            .map(|(task, entry)| (*task, reopened(entry)))
            .collect();
        let state = State {
            tasks,
            origins: state.origins.clone(),
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
            }),
        }
    }

    fn partial(&self, task: &Digest) -> Option<Kept> {
        match self.inner.state().tasks.get(task) {
            Some(Entry::Partial(kept)) => Some(Kept::clone(kept)),
            _ => None,
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn remove(&mut self, task: &Digest) {
        self.tasks.remove(task);
        self.origins.remove(task);
    }
}

impl TaskStore for MemoryStore {
    fn committed(&self, task: &Digest) -> Option<Blob> {
        let mut state = self.inner.state();
        let Some(Entry::Blob {
            file,
            table,
            checks,
        }) = state.tasks.get(task).cloned()
        else {
            return None;
        };
        if file
            .metadata()
            .is_ok_and(|meta| meta.len() == table.layout().size_bytes())
        {
            let keeper: Arc<dyn Keeper> = Arc::<Inner>::clone(&self.inner);
            return Some(Lease::new(keeper, file, table, checks).blob());
        }
        state.remove(task);
        None
    }

    fn has(&self, task: &Digest) -> bool {
        matches!(self.inner.state().tasks.get(task), Some(Entry::Blob { .. }))
    }

    fn begin(&self, task: &Digest, size_bytes: u64) -> Result<Partial, StoreError> {
        if size_bytes > MAX_BLOB_BYTES {
            return Err(refused(task, ErrorKind::FileTooLarge.into()));
        }
        let layout = PieceLayout::new(size_bytes);
        let mut state = self.inner.state();
        let kept = match state.tasks.get(task) {
            Some(Entry::Blob { .. }) => return Err(StoreError::Busy),
            Some(Entry::Partial(kept)) if kept.is_open => return Err(StoreError::Busy),
            Some(Entry::Partial(kept)) if kept.table.layout() == layout => still_right(kept),
            _ => Kept {
                file: Arc::new(new_file(size_bytes).map_err(|error| refused(task, error))?),
                held: PieceSet::empty(layout.count()),
                table: PieceTable::new(*task, layout),
                is_verified: true,
                is_open: true,
            },
        };
        let partial = MemoryPartial {
            store: Arc::clone(&self.inner),
            task: *task,
            layout,
            begun_with: kept.clone(),
            is_finished: AtomicBool::new(false),
        };
        state.tasks.insert(*task, Entry::Partial(Box::new(kept)));
        Ok(Arc::new(partial))
    }

    fn partial_size(&self, task: &Digest) -> Option<u64> {
        self.partial(task)
            .map(|kept| kept.table.layout().size_bytes())
    }

    fn recheck(&self, task: &Digest, bytes: Range<u64>) -> Result<Option<bool>, StoreError> {
        if let Some(blob) = self.committed(task) {
            let is_right = disk::blob_is_right(&blob.file, &blob.table, bytes);
            if !is_right {
                blob.drop_rotten("its bytes do not match the digest")?;
            }
            return Ok(Some(is_right));
        }
        let Some(kept) = self
            .partial(task)
            .filter(|kept| kept.is_verified && !kept.is_open)
        else {
            return Ok(None);
        };
        let is_right = held_is_right(&kept.file, &kept.table, &kept.held, bytes);
        if is_right == Some(false) {
            self.doubt(task);
        }
        Ok(is_right)
    }

    fn doubt(&self, task: &Digest) {
        if let Some(Entry::Partial(kept)) = self.inner.state().tasks.get_mut(task) {
            kept.is_verified &= kept.is_open;
        }
    }

    fn takes_writes(&self) -> bool {
        true
    }

    fn origins(&self, digest: &Digest) -> Vec<String> {
        self.inner
            .state()
            .origins
            .get(digest)
            .cloned()
            .unwrap_or_default()
    }

    fn add_origin(&self, digest: &Digest, registry: &str) -> Result<(), StoreError> {
        if self.has(digest) {
            let mut state = self.inner.state();
            let names = state.origins.entry(*digest).or_default();
            if !names.iter().any(|name| name == registry) {
                names.push(registry.to_owned());
            }
        }
        Ok(())
    }
}

impl Keeper for Inner {
    fn release(&self, _: &Digest) {}

    fn drop_rotten(
        self: Arc<Self>,
        task: &Digest,
        copy: &Arc<Checks>,
        _: &str,
    ) -> Result<(), StoreError> {
        let mut state = self.state();
        let is_it = matches!(state.tasks.get(task), Some(Entry::Blob { checks, .. }) if Arc::ptr_eq(checks, copy));
        if is_it {
            state.remove(task);
        }
        Ok(())
    }

    fn replace_table(self: Arc<Self>, newer: &PieceTable) -> Result<(), StoreError> {
        if let Some(Entry::Blob { table, .. }) = self.state().tasks.get_mut(newer.task()) {
            *table = Arc::new(newer.clone());
        }
        Ok(())
    }
}

/// A partial task that is begun again: pieces that can't be verified do not count, nor do wrong ones of an earlier run.
fn still_right(kept: &Kept) -> Kept {
    let mut held = kept.held.clone();
    for piece in kept.held.iter() {
        let is_right = || disk::piece_is_right(&kept.file, &kept.table, piece).unwrap_or(false);
        if piece >= kept.table.verifiable() || !kept.is_verified && !is_right() {
            held.remove(piece);
        }
    }
    Kept {
        held,
        is_verified: true,
        is_open: true,
        ..kept.clone()
    }
}

fn new_file(size_bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create("hawker-task", MemfdFlags::CLOEXEC)?);
    file.set_len(size_bytes)?;
    Ok(file)
}

fn refused(task: &Digest, source: io::Error) -> StoreError {
    StoreError::Disk {
        what: format!("keeping {task} in memory"),
        source,
    }
}

struct MemoryPartial {
    store: Arc<Inner>,
    task: Digest,
    layout: PieceLayout,
    begun_with: Kept,
    /// Committed or thrown away.
    is_finished: AtomicBool,
}

impl MemoryPartial {
    /// Does something with what is kept, unless the task is finished.
    fn with<T: Default>(
        &self,
        act: impl FnOnce(&mut Kept) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut state = self.store.state();
        match state.tasks.get_mut(&self.task) {
            Some(Entry::Partial(kept)) if !self.is_finished.load(Ordering::Relaxed) => act(kept),
            _ => Ok(T::default()),
        }
    }

    fn misuse(&self, why: &'static str) -> StoreError {
        refused(&self.task, io::Error::new(ErrorKind::InvalidInput, why))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let written = self.begun_with.file.write_all_at(bytes, offset);
        written.map_err(|error| refused(&self.task, error))
    }
}

impl PartialTask for MemoryPartial {
    fn file(&self) -> Arc<File> {
        Arc::clone(&self.begun_with.file)
    }

    fn held(&self) -> PieceSet {
        self.begun_with.held.clone()
    }

    fn table(&self) -> PieceTable {
        self.begun_with.table.clone()
    }

    fn write(&self, piece: PieceIndex, data: &[u8]) -> Result<(), StoreError> {
        let range = self.layout.range(piece);
        if range.is_empty() || range.end - range.start != data.len() as u64 {
            return Err(self.misuse("the piece has another length"));
        }
        self.with(|kept| {
            if !kept.held.contains(piece) {
                self.write_at(data, range.start)?;
                kept.held.insert(piece);
            }
            Ok(())
        })
    }

    fn note(&self, piece: PieceIndex) -> Result<(), StoreError> {
        self.with(|kept| {
            kept.held.insert(piece);
            Ok(())
        })
    }

    fn write_loose(&self, start: u64, data: &[u8]) -> Result<(), StoreError> {
        let end = start.saturating_add(data.len() as u64);
        if end > self.layout.size_bytes() {
            return Err(self.misuse("the bytes lie past the end of the blob"));
        }
        self.with(|kept| {
            for piece in self
                .layout
                .covering(start..end)
                .filter(|piece| !kept.held.contains(*piece))
            {
                let piece = self.layout.range(piece);
                let part = piece.start.max(start)..piece.end.min(end);
                self.write_at(
                    &data[(part.start - start) as usize..(part.end - start) as usize],
                    part.start,
                )?;
            }
            Ok(())
        })
    }

    fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError> {
        self.with(|kept| {
            let extended = kept
                .table
                .extend(0, table.values(), table.signed().cloned());
            extended
                .map(drop)
                .map_err(|_| StoreError::Rotten(self.task))
        })
    }

    fn commit(&self, table: &PieceTable) -> Result<Blob, StoreError> {
        let lease = self.with(|kept| {
            if !kept.held.is_full() || table.values().len() != table.full_count() as usize {
                return Err(self.misuse("pieces are missing"));
            }
            let is_empty = self.layout.count() == 0;
            if (table.task(), table.layout()) != (&self.task, self.layout)
                || !table.values().starts_with(kept.table.values())
                || is_empty && Chain::new(self.task.algorithm()).finish() != self.task
            {
                return Err(StoreError::Rotten(self.task));
            }
            let checks = Arc::new(Checks::all_right(&kept.file));
            let keeper: Arc<dyn Keeper> = Arc::<Inner>::clone(&self.store);
            Ok(Some(Lease::new(
                keeper,
                Arc::clone(&kept.file),
                Arc::new(table.clone()),
                checks,
            )))
        })?;
        let Some(lease) = lease else {
            return Err(self.misuse("it is committed or thrown away already"));
        };
        let blob = lease.blob();
        self.is_finished.store(true, Ordering::Relaxed);
        let (file, table) = (Arc::clone(&blob.file), Arc::clone(&blob.table));
        let entry = Entry::Blob {
            file,
            table,
            checks: Arc::clone(blob.checks()),
        };
        self.store.state().tasks.insert(self.task, entry);
        Ok(blob)
    }

    fn discard(&self) -> Result<(), StoreError> {
        let mut state = self.store.state();
        if !self.is_finished.swap(true, Ordering::Relaxed) {
            state.remove(&self.task);
        }
        Ok(())
    }
}

impl Drop for MemoryPartial {
    fn drop(&mut self) {
        let is_finished = self.is_finished.load(Ordering::Relaxed);
        if let Some(Entry::Partial(kept)) = self.store.state().tasks.get_mut(&self.task)
            && !is_finished
        {
            kept.is_open = false;
        }
    }
}
